"""Pages and plots of what runs have left: run, ablations, scans, progress.

Reads results; trains and measures nothing.
"""
