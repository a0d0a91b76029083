"""Trainer runs on fixed batches, and the script that makes them on several ranks.

    torchrun --nproc_per_node=2 tests/train_worker.py OUT.pt

The test calls the same functions in its own single process. Latents, labels, noise, t and label
drops of a step are drawn once for the global batch, then cut as the data stream cuts it.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import process
from routing import LoadCounter
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.reporter import draw_grid

NUM_UPDATES = 5
FLAGS = [
    *("--data-path", "digits", "--model", "DiT-Ti/4", "--num-experts", "4", "--mlp-ratio", "0.5"),
    *("--rf", "--precision", "fp32", "--aux-loss-weight", "0"),
]
State = dict[str, Tensor]


def make_trainer(*flags: str, random_weights: bool = True) -> DdpTrainer:
    """Build a trainer; random weights, since adaLN-Zero hides most gradients at first."""
    job = prepare(build_parser(None).parse_args([*FLAGS, *flags]))
    if random_weights:
        generator = torch.Generator().manual_seed(1)
        for parameter in job.model.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return DdpTrainer(job)


def global_batch(step: int, size: int) -> dict[str, Tensor]:
    """Draw all that a step depends on."""
    generator = torch.Generator().manual_seed(100 + step)
    return {
        "latents": torch.randn(size, 1, 8, 8, generator=generator),
        "labels": torch.randint(10, (size,), generator=generator),
        "noise": torch.randn(size, 1, 8, 8, generator=generator),
        "t": torch.rand(size, generator=generator),
        "drop_mask": torch.rand(size, generator=generator) < 0.2,
    }


def micro_batches(
    trainer: DdpTrainer, batch: dict[str, Tensor]
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
    """Cut this rank's micro-batches out of a global batch, as `data.TrainBatches` does."""
    rt, size = trainer.rt, trainer.settings.micro_batch_size
    for k in range(trainer.settings.accum_steps):
        start = (k * rt.world_size + rt.rank) * size
        part = {name: value[start : start + size] for name, value in batch.items()}
        yield part.pop("latents"), part.pop("labels"), part


def make_updates(*flags: str) -> list[State]:
    """Return the gradient's norm and all weights after each of the first updates.

    Adam moves a weight by the learning rate even where its gradient is rounding noise, as that of
    the keys' biases; a larger epsilon keeps noise small, and makes the gradient's scale count.
    """
    trainer = make_trainer("--global-batch-size", "4", "--lr", "0.001", *flags)
    trainer.optimizer.param_groups[0]["eps"] = 1e-3
    states = []
    for step in range(NUM_UPDATES):
        values = trainer.train_step(micro_batches(trainer, global_batch(step, 4)))
        weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        states.append({"grad_norm": values["grad_norm"], **weights})
    return states


def gradients_of_step(trainer: DdpTrainer, batches: Any) -> State:
    """Make one step and return the gradients that the optimizer saw."""
    gradients: State = {}

    def keep(*_: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = parameter.grad.clone()

    handle = trainer.optimizer.register_step_pre_hook(keep)
    trainer.train_step(batches)
    handle.remove()
    return gradients


def train_on_disjoint_experts() -> tuple[State, Tensor]:
    """Make one step in which every rank's tokens have experts of their own.

    Class 0 shifts the router's input along the first axis, class 1 along the second; experts 0, 1
    answer to the first, experts 2, 3 to the second.

    Returns:
        Gradients, and this rank's tokens by layer and expert (L, E).
    """
    trainer = make_trainer("--global-batch-size", "4", "--clip-grad", "0")
    hidden_size = trainer.model.config.hidden_size
    with torch.no_grad():
        trainer.model.y_embedder.embedding_table.weight[:2] = 5 * torch.eye(2, hidden_size)
        block: Any
        for block in trainer.model.blocks:
            shift, scale = block.adaLN_modulation[1].weight.chunk(6)[3:5]  # of the MLP, (D, D)
            shift.copy_(2 * torch.eye(hidden_size))
            scale.zero_()
            block.moe.router.weight.mul_(0.1)
            block.moe.router.weight[:2, 0] = block.moe.router.weight[2:, 1] = 5.0
    counter = LoadCounter(trainer.model)
    batch = global_batch(0, 4)
    batch |= {"labels": torch.tensor([0, 0, 1, 1]), "drop_mask": torch.zeros(4, dtype=torch.bool)}
    gradients = gradients_of_step(trainer, micro_batches(trainer, batch))
    return gradients, counter.counts


def grid_of_twelve_blocks(folder: Path) -> bytes:
    """Draw a grid and return its file, on the main process; elsewhere nothing."""
    flags = ("--model", "DiT-S/8", "--global-batch-size", "4", "--results-dir", str(folder))
    trainer = make_trainer(*flags)
    path = draw_grid(trainer.ema.model, trainer.job, trainer.step)
    return path.read_bytes() if trainer.rt.is_main else b""


def main(path: str) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    process.setup = functools.cache(process.setup)  # one process group for many jobs
    gradients, tokens_per_expert = train_on_disjoint_experts()
    results = {
        "updates": make_updates(),
        "accumulated updates": make_updates("--accum-steps", "2"),
        "disjoint gradients": gradients,
        "grid": grid_of_twelve_blocks(Path(path).parent),
        "tokens_per_expert": process.gather_on_main(tokens_per_expert),
    }
    if process.setup().is_main:
        torch.save(results, path)
    process.finish()


if __name__ == "__main__":
    main(sys.argv[1])
