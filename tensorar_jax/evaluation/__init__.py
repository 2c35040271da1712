"""How good images are: FID and its kin, benchmarks' scores, yardsticks.

Measures what `generation` draws, or files that any program made.
"""
