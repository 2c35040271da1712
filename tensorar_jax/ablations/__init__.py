"""Variants of one experiment, measured alike.

`variants` says what differs, `runs` trains and measures what is missing. The
command line calls it for configs with a section `ablation`.
"""
