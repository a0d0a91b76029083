"""How much memory a rank needs, by arithmetic alone: what `train_deepspeed.py --dry-run` prints.

Counted is what stays from step to step, and the largest gather. Not counted: activations, the
buckets of the engine's configuration, and a step's scratch.

Bytes of one of P parameters on N ranks, in any precision, since half formats are autocast:
    weights 4, gradients 4, EMA 4, optimizer 8 (Adam's two moments), and 4 more for the engine's own
    copy of the weights at stage 2 and with offload; stage 2 divides all but the weights by N,
    stage 3 all.
What routers keep beside their weights, biases and thresholds, is whole on every rank, 4 bytes each,
and 4 more in train.py's EMA, which copies it.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

GIB = 2**30
STAGES = ("0", "2", "3", "3+offload")
PERSISTENT = 100_000  # parameters up to this size stay whole under stage 3 (config/zero3.json)
ALIGNMENT = 4  # elements that DeepSpeed rounds a rank's part of a stage 2 partition up to


class Memory(NamedTuple):
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int  # float32 weights, where they are a copy, and both moments
    ema: int
    gather: int  # largest set of whole weights that one layer needs at once

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(self)


def rank_memory(
    model: nn.Module,
    stage: int,
    num_ranks: int,
    *,
    offload: bool = False,
    persistent: int = PERSISTENT,
) -> Memory:
    """Count what a rank holds.

    Args:
        model: may be on the meta device, not yet partitioned.
        stage: ZeRO 0, 2 or 3; 0 is what train.py needs too.
        num_ranks: N.
        offload: stage 3 with optimizer and weights in host memory: all but the gather is there,
            the weights twice, and the gradients, as accumulated and as the optimizer reads them.
        persistent: stage 3 keeps parameters of at most so many elements whole.
    """
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    state = sum(buffer.nbytes for buffer in model.buffers())
    if stage == 0:
        count = sum(trained)
        return Memory(4 * sum(sizes) + state, 4 * count, 8 * count, 4 * count + state, 0)
    if stage == 2:
        part = -(-sum(trained) // (num_ranks * ALIGNMENT)) * ALIGNMENT
        return Memory(4 * sum(sizes) + state, 4 * part, 12 * part, 4 * part, 0)
    part = sum(-(-size // num_ranks) for size in trained)
    weights = sum(-(-size // num_ranks) for size in sizes)
    whole = sum(size for size in sizes if size <= persistent)
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    gradients, optimizer = (8 * part, 12 * part) if offload else (4 * part, 8 * part)
    return Memory(4 * (weights + whole) + state, gradients, optimizer, 4 * part, 4 * max(own))


def memory_table(model: nn.Module, ranks: Sequence[int]) -> str:
    """Return a table of GiB per rank: every stage on every number of ranks."""
    head = ("ranks", "stage", "weights", "gradients", "optimizer", "EMA", "gather", "GPU", "host")
    rows: list[tuple[str, ...]] = [head]
    for num_ranks in ranks:
        for stage in STAGES:
            offload = "offload" in stage
            memory = rank_memory(model, int(stage[0]), num_ranks, offload=offload)
            gpu = memory.gather if offload else memory.total
            host = memory.total - gpu
            values = [f"{value / GIB:.2f}" for value in (*memory, gpu, host)]
            rows.append((str(num_ranks), stage, *values))
    lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
    return "\n".join(["memory per rank in GiB, without activations:", *lines])
