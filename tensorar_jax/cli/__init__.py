"""The command line: one file for each group of modes.

`main` parses the flags and calls this package, which checks what was asked and
calls the rooms below. Nothing else imports it.
"""
