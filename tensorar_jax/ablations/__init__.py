"""Variants of one experiment, measured alike.

`variants` says what differs, `runs` trains and measures what is missing.
"""
