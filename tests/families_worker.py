"""One rank's part of a step of every family, or both parts on one rank; see test_families_ranks.py.

torchrun --nproc-per-node 2 tests/families_worker.py OUT
"""

import os
import sys

import torch
import torch.distributed as dist
from test_families import FAMILIES, config_of, randn, randomize

from models import DiT, DiTConfig

NUM_IMAGES, NUM_STEPS = 8, 3
BY_RANK = ("promoe", "diffmoe", "two_slots")  # whose balance or choice depends on the ranks then


def step(model: DiT, rank: int, world_size: int, number: int) -> dict[str, torch.Tensor]:
    """Return this rank's gradients; its images are every W-th block of the batch."""
    share = NUM_IMAGES // world_size
    own = slice(rank * share, (rank + 1) * share)
    x, target = (randn(NUM_IMAGES, 4, 8, 8, seed=10 * number + i)[own] for i in (0, 1))
    t = torch.linspace(0.1, 0.9, NUM_IMAGES)[own]
    y = torch.tensor([3, 10, 1, 2, 10, 10, 10, 5])[own]  # one null label here, three there
    prediction, aux_losses = model(x, t, y, torch.zeros(share, dtype=torch.bool))
    loss = (prediction - target).square().mean()
    sum(aux_losses.values(), loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train(
    config: DiTConfig, rank: int, world_size: int, by_rank: bool = False
) -> dict[str, torch.Tensor]:
    """Make a few updates; gradients are averaged over ranks, as DDP does."""
    model = randomize(DiT(config)).train()
    model.use_rank_statistics(by_rank)
    for number in range(NUM_STEPS):
        model.zero_grad()
        for gradient in step(model, rank, world_size, number).values():
            if world_size > 1:
                dist.all_reduce(gradient)
                gradient /= world_size
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        model.update_router_state()
    return model.state_dict()


if __name__ == "__main__":
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")
    found = {family: train(config_of(family), rank, world_size) for family in FAMILIES}
    for family in BY_RANK:
        found[f"{family} by rank"] = train(config_of(family), rank, world_size, by_rank=True)
    torch.save(found, f"{sys.argv[1]}/{world_size}_{rank}.pt")
    dist.destroy_process_group()
