"""Maps between images and tokens, a file for each family.

A new file here is known by its name at once.
"""
