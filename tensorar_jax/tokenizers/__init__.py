"""Maps between images and tokens, one file for each family.

A new file here is found by its name. `experiment.build` makes tokenizers; data,
training and generation call them. What they share is `nn.image_tokenizer`.
"""
