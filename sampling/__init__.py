"""From a checkpoint to images.

`opening` opens a run for drawing in one call: model, objective, autoencoder, settings, names of the
classes; it also has the flags of every script that does. `offload` loads models that are larger
than the memory: experts in int8, blocks that come when it is their turn.
"""
