"""Images, captions and tokens from disk, as batches.

`sources` finds a data set by its name; `pipeline` makes the endless, resumable
iterator that training reads; `tokenize` writes token shards. Training, the
tokenize mode and evaluation call it.
"""
