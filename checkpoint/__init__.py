"""Everything on disk: training state, shards, weights of any layout, folders for others to read.

`run_folder` knows which checkpoints a run has, `run_lock` who writes them; `state` and `sharded`
are their files. `weights` opens and loads weights of every layout by the names in `layouts` and
`families`, `described` what files say of themselves; `hub` writes what others read, with the code
of `diffusers_pipeline`; `upcycled` makes mixtures of dense blocks. Knows `common`, `data`, `models`
and `moe_ops` only.
"""

from checkpoint.weights import load_model, load_settings, open_weights

__all__ = ["load_model", "load_settings", "open_weights"]
