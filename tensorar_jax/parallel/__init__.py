"""Devices and processes: the mesh, what goes where, meeting and stopping.

Also models as flat dictionaries of arrays (`weights`), which sharding rules,
checkpoints and optimizer groups name by path. Everything above may call it.
"""
