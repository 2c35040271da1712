"""Building blocks of networks: attention, layers, transformer, convolutions.

Backbones, tokenizers, text encoders and the method's own modules use it.
"""
