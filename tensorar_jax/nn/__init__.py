"""What networks are made of: attention, layers, transformer, convolutions.

Backbones, tokenizers, text encoders and the method's own modules use it.
"""
