"""Speed: the benchmark, the compile report and the PyTorch peer.

`--mode=benchmark` times programs on this machine. `--mode=compile` compiles
them for hardware that need not be present, and counts what they do.
"""
