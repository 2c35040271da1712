"""Draws images from trained models: requests, batches, files, pictures.

The modes sample, evaluate and demo, and the ablations, draw their images here.
"""
