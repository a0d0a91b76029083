"""First updates of each recipe with every balance term it can have; see test_recipes_ranks.py.

    torchrun --nproc_per_node=2 tests/recipes_worker.py OUT.pt FOLDER RECIPE...

FOLDER gets the engine files.
"""

import functools
import sys

import torch
from deepspeed_worker import make_updates
from launch import REPO

from common import process
from training import zero

CASES = (None, "stage 2", "stage 3")  # None: train.py
# Every term that means something with the recipe's affinity and selection.
BALANCE = {
    "dit_moe": ("switch", "contrastive", "z_loss", "bias"),
    "promoe": ("switch", "contrastive", "bias"),
    "promoe_ec": ("contrastive",),
    "ec_dit": ("contrastive", "z_loss"),
    "diffmoe": ("contrastive", "z_loss"),
    "dsmoe": ("switch", "contrastive", "z_loss", "bias"),
}
WEIGHTS = tuple(
    word
    for name in ("aux-loss", "contrastive-loss", "z-loss", "capacity-loss")
    for word in (f"--{name}-weight", "0.1")
)


def flags_of(recipe: str) -> list[str]:
    """Return the flags of a small run of a recipe whose balance is all on, and matters."""
    config = ("--config", str(REPO / f"config/recipes/{recipe}.yaml"), "--model", "DiT-Ti/2")
    return [*config, "--balance", *BALANCE[recipe], "--bias-update-rate", "0.01", *WEIGHTS]


def main(path: str, recipes: list[str]) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    zero.join()
    process.setup = functools.cache(process.setup)
    updates = {
        (case, recipe): make_updates(case, *flags_of(recipe))
        for recipe in recipes
        for case in CASES
    }
    if process.setup().is_main:
        torch.save(updates, path)
    process.finish()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[3:])
