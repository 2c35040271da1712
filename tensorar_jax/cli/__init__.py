"""The command line: one file for each group of modes.

A mode has a frozen dataclass of its options, from which its flags, its help and
its checks are made, and beside it the function that does what it says. `main`
parses the command line with `parser` and calls that function; nothing else
imports this package.

Modules here import the rooms below inside functions: `--help` and a wrong flag
are answered before JAX is loaded.
"""
