"""From a config to typed objects: stages, models, initial weights.

A config enters here once. Training, sampling and every other mode take what
comes out. `build` is the only file that reaches a family by its name.
"""
