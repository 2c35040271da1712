"""Measures images: FID and its relatives, scores of benchmarks, yardsticks.

The images are drawn by `generation`, or come in files of any program.
"""
