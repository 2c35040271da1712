"""The one train loop, and what a step needs: optimizer, logs, throughput.

`loop.fit` trains any stage: models, tokenizers, classifiers.
"""
