"""From a config to typed objects: stages, models, initial weights.

A config enters by `config_file.load` and is parsed once, by `parse` into the
dataclasses of `schema`. Training, sampling and every other mode take a `Stage`
of these, and `build` makes its models. `saved` says what a work directory knows
of its stages, `families` is the only file that reaches a family by its name.
"""
