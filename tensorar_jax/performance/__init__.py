"""How fast it is and could be: benchmark, compile report, the peer.

`--mode=benchmark` times real programs; `--mode=compile` counts those for
hardware that need not be there.
"""
