"""The command line: one file for each group of modes.

A mode has a frozen dataclass of its options, which gives its flags, its help
and its checks, and a function that carries it out. `main` parses the command
line with `parser` and calls that function; nothing else imports this package.

Modules here import the packages below inside functions, so that `--help` and a
wrong flag are answered before JAX is loaded.
"""
