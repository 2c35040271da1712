"""Experiments whose results the documentation quotes, and what they left.

Each file is a program of its own (`python -m studies.NAME`); none is imported
by the package, and wheels leave the folder out.
"""
