"""Experiments whose results the documentation quotes, with their results.

Each is a program of its own (`python -m studies.NAME`); the package imports
none of them, and wheels leave the folder out.
"""
