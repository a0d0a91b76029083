"""Images to numbers: how close drawn images are to real ones.

`image_sets` are images a batch at a time, `sample_files` those that were drawn; `classifiers`,
`encoders` of timm and `features` look at them, `metrics` compares what they see; `judging` opens
what looks, as `flags` name it; `comparison` does it on all ranks. Knows `common` and `data` only.
"""
