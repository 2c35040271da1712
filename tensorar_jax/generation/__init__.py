"""Images from trained models: what was asked, batches, files, pictures.

The sample mode, evaluation, the demo and ablations draw their images here.
"""
