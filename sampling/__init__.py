"""From a checkpoint to images.

`opening` opens a run for drawing in one call: model, objective, autoencoder, settings, names of the
classes; `flags` has the flags of every script that does. `grid` draws the images of a picture,
`drawing` a few step by step with their experts; `numbered` samples by their numbers, `loss`
judges on real images. `offload` loads models that are larger than the memory: experts in int8,
blocks that come when it is their turn.
"""
