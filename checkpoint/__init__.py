"""Everything on disk: training state, shards, weights of any layout, folders for others to read.

`run_folder` knows which checkpoints a run has, `run_lock` who writes them; `state` and `sharded`
are their files. `weights` opens and loads weights of every layout by the names in `layouts` and
`families`, of the hub by `download`, and `described` is what files say of themselves; `hub` writes
what others read, with a model `card` and the code of `diffusers_pipeline`, `space` a folder that
serves app.py; `upcycled` makes mixtures of dense blocks. Knows `common`, `data`, `diffusion`,
`models` and `moe_ops` only.
"""

from checkpoint.weights import load_model, load_settings, open_weights

__all__ = ["load_model", "load_settings", "open_weights"]
