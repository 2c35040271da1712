"""Conditions, the input that an image is made from: classes, text or prompts.

`conditions` turns labels, text features and token ids into arrays; the other
modules turn captions and prompts into these: the T5 encoder, chat templates,
cleaned captions, fixed word vectors. Backbones, data and generation call it.
"""
