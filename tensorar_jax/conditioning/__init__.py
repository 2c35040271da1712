"""What an image is made from: classes, text, prompts.

Conditions, and what turns captions into them: the T5 encoder, chat templates,
cleaned captions, fixed word vectors. Backbones, data and generation call it.
"""
