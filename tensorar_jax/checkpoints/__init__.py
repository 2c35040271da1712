"""Files that hold weights or long work: ours, PyTorch's, the hub's.

Orbax checkpoints, the import and export of published PyTorch files, published
files by name, whole files and JSON, and work that a killed run continues.
Experiment, training, data, generation and evaluation call it.
"""
