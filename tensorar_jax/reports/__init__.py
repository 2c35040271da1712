"""Draws pages and plots from result files: runs, ablations, scans, progress.

It trains and measures nothing. The modes call it at their end.
"""
