"""The method of the papers, and nothing else.

Windows, noise, the two query transformers around a backbone, the loss, and the
sliding-window sampler. Training and generation call it; it knows no family.
`noising` says how to add a kind of noise, `drawing` how to add a rule for
drawing tokens.
"""
