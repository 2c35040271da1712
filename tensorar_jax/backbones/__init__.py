"""Published autoregressive models, a file for each family.

A new file here is known by its name at once; see docs/extending.md.
"""
