"""Steps of both trainers whose routers have state, on two gloo ranks; see test_router_state.py.

torchrun --nproc_per_node=2 tests/router_state_worker.py OUT.pt FOLDER
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed_worker import averages, make_trainer, set_loss_scale
from torch import Tensor
from train_worker import global_batch, micro_batches

from checkpoint.state import latest_checkpoint
from checkpoint.weights import load_model
from common import process
from training import zero

MIXTURES = {
    "expert_bias": ("--affinity", "sigmoid", "--balance", "bias", "--bias-update-rate", "0.01"),
    "thresholds": ("--selection", "batch_choice", "--balance", "z_loss"),
}
CASES = (None, "stage 0", "stage 2", "stage 3")
NUM_STEPS = 3


def state_of(trainer: Any) -> dict[str, Tensor]:
    """Return a copy of what routers keep beside their weights."""
    return {name: buffer.clone() for name, buffer in trainer.job.model.named_buffers()}


def step(trainer: Any, number: int) -> None:
    """Make one optimizer step of two micro-batches, the same for every trainer."""
    trainer.train_step(micro_batches(trainer, global_batch(number, 8)))


def run(case: str | None, mixture: str) -> dict[str, Any]:
    """Make steps, save, resume, and make one more with and without having stopped."""
    folder, name = Path(sys.argv[2]), f"{case}-{mixture}"
    flags = ("--accum-steps", "2", "--results-dir", str(folder), "--run-name", name)
    trainer: Any = make_trainer(case, *flags, *MIXTURES[mixture])
    for number in range(NUM_STEPS):
        step(trainer, number)
    facts: dict[str, Any] = {"state": state_of(trainer)}
    trainer.save()
    resumed: Any = make_trainer(case, *flags, *MIXTURES[mixture])
    resumed.resume(latest_checkpoint(folder / name))
    facts["resumed"] = state_of(resumed)
    loaded = {
        ema: dict(load_model(folder / name, ema=ema).named_buffers()) for ema in (True, False)
    }
    facts["loaded"] = loaded
    for one in (trainer, resumed):
        step(one, NUM_STEPS)
    pairs = zip(averages(trainer), averages(resumed), strict=True)
    facts["goes on the same"] = all(torch.equal(a, b) for a, b in pairs)
    facts["state after"] = [state_of(trainer), state_of(resumed)]
    return facts


def overflow(case: str | None) -> list[dict[str, Tensor]]:
    """Return the routers' state before and after a step that is skipped, and after the next."""
    trainer: Any = make_trainer(case, "--precision", "fp16", *MIXTURES["expert_bias"])
    states = [state_of(trainer)]
    for scale in (2.0**40, 2.0**8):
        set_loss_scale(trainer, scale)
        step(trainer, 0)
        states.append(state_of(trainer))
    return states


def main(path: str) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    zero.join()
    process.setup = functools.cache(process.setup)
    results = {(case, mixture): run(case, mixture) for case in CASES for mixture in MIXTURES}
    skipped = {case: overflow(case) for case in CASES}
    if process.setup().is_main:
        torch.save({"runs": results, "overflows": skipped}, path)
    process.finish()


if __name__ == "__main__":
    main(sys.argv[1])
