"""From a config to typed objects: stages, models, initial weights.

`config_file.load` reads a config, and `parse` turns it once into the
dataclasses of `schema`. Training, sampling and every other mode take a `Stage`
of these; `build` makes its models and `initial_weights` what training starts
from. `saved` compares stages with what a work directory holds of them, and
`published` reads and writes PyTorch files. `families` is the only file that
reaches a family by its name.
"""
