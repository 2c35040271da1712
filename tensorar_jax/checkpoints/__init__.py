"""Files that hold weights or long work: ours, PyTorch's, the hub's.

Orbax checkpoints, the import and export of published PyTorch files, published
files by name, and work that a killed run can go on with.
"""
