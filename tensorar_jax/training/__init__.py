"""The one training loop, and what a step needs: optimiser, logs, throughput.

`loop.fit` trains any stage: models, tokenizers, classifiers. The command line,
ablations and studies call it.
"""
