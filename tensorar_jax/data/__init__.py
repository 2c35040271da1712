"""Images, captions and tokens from disk, as batches.

Sources are found by name; `pipeline` makes the endless, resumable iterator that
training reads; `tokenize` writes token shards.
"""
