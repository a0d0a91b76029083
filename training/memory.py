"""How much memory a rank needs, and sends, by arithmetic alone: what `--dry-run` prints.

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

from models import DiT

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
    model: DiT,
    stage: int,
    num_ranks: int,
    *,
    offload: bool = False,
    persistent: int = PERSISTENT,
    size: int = 1,
) -> Memory:
    """Count what a rank holds.

    Args:
        model: may be on the meta device, not yet partitioned.
        stage: ZeRO 0, 2 or 3; 0 is what train.py needs too.
        num_ranks: N.
        offload: stage 3 with optimizer and weights in host memory: all but the gather is there,
            the weights twice, and the gradients, as accumulated and as the optimizer reads them.
        persistent: stage 3 keeps parameters of at most so many elements whole.
        size: ranks that hold the experts together (`--expert-parallel`), at stages 0 and 2; the
            experts' state is cut over the num_ranks / size ranks that hold the same.
    """
    sizes = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    state = sum(buffer.nbytes for buffer in model.buffers())
    if stage < 3:
        parts = [(sum(trained), num_ranks)]
        if size > 1:
            dense, experts = split_parameters(model, size)
            parts = [(dense - sum(sizes) + sum(trained), num_ranks), (experts, num_ranks // size)]
        count = sum(part for part, _ in parts)
        weights = 4 * (count + sum(sizes) - sum(trained)) + state
        if stage == 0:
            return Memory(weights, 4 * count, 8 * count, 4 * count + state, 0)
        part = sum(-(-part // (holders * ALIGNMENT)) * ALIGNMENT for part, holders in parts)
        return Memory(weights, 4 * part, 12 * part, 4 * part, 0)
    part = sum(-(-size // num_ranks) for size in trained)
    weights = sum(-(-size // num_ranks) for size in sizes)
    whole = sum(size for size in sizes if size <= persistent)
    own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
    gradients, optimizer = (8 * part, 12 * part) if offload else (4 * part, 8 * part)
    return Memory(4 * (weights + whole) + state, gradients, optimizer, 4 * part, 4 * max(own))


def memory_table(model: DiT, ranks: Sequence[int], size: int = 1) -> str:
    """Return a table of GiB per rank: every stage on every number of ranks.

    Args:
        model: whole.
        ranks: numbers of them.
        size: of `--expert-parallel`, which divides them.
    """
    head = ("ranks", "stage", "weights", "gradients", "optimizer", "EMA", "gather", "GPU", "host")
    rows: list[tuple[str, ...]] = [head]
    for num_ranks in ranks:
        for stage in STAGES if size == 1 else ("0", "2"):
            offload = "offload" in stage
            memory = rank_memory(model, int(stage[0]), num_ranks, offload=offload, size=size)
            gpu = memory.gather if offload else memory.total
            host = memory.total - gpu
            values = [f"{value / GIB:.2f}" for value in (*memory, gpu, host)]
            rows.append((str(num_ranks), stage, *values))
    lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
    experts = f", with --expert-parallel {size}" if size > 1 else ""
    return "\n".join([f"memory per rank in GiB, without activations{experts}:", *lines])


# ------------------------------------------------------------------------------ expert parallelism


class Wire(NamedTuple):
    """Bytes that a rank sends to others in an optimizer step, at an even load of the experts."""

    gradients: int  # summed over the ranks that hold the same, in rings
    tokens: int  # rows of tokens and of their gradients, there and back


def split_parameters(model: DiT, size: int) -> tuple[int, int]:
    """Return the parameters that are not experts', and those of the experts of one of N ranks.

    Args:
        model: whole.
        size: N; the last rank, which may have the unconditional expert too, counts.
    """
    named = list(model.named_parameters())
    experts = [p for name, p in named if ".moe.experts." in name]
    held = model.config.num_all_experts - (size - 1) * (model.config.num_all_experts // size)
    every = sum(p.numel() for p in experts)
    part = sum(p.numel() // len(p) * held for p in experts)
    return sum(p.numel() for _, p in named) - every, part


def expert_memory(model: DiT, size: int) -> Memory:
    """Count what a rank holds with `--expert-parallel N`, as of DDP: all but the other experts.

    Args:
        model: whole, may be on the meta device.
        size: N.
    """
    dense, experts = split_parameters(model, size)
    whole = dense + experts
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = whole - frozen
    return Memory(4 * whole, 4 * trained, 8 * trained, 4 * whole, 0)


def expert_wire(
    model: DiT, num_ranks: int, size: int, num_images: float, width: int, grad_checkpointing: bool
) -> Wire:
    """Count what a rank sends in an optimizer step with `--expert-parallel N`.

    A row of D goes out and back, and so does its gradient: 4 rows a choice, 6 where the forward
    pass is made again; (N - 1) / N of them go to other ranks.

    Args:
        model: whole, may be on the meta device.
        num_ranks: W.
        size: N; 1 is DDP.
        num_images: of a rank in a step.
        width: bytes of an element of the rows: 2 in half formats, else 4.
        grad_checkpointing: whether it is on.
    """
    dense, experts = split_parameters(model, size)
    config, replicas = model.config, num_ranks // size
    gradients = 8 * (
        dense * (num_ranks - 1) / num_ranks + experts * (replicas - 1) / replicas
    )  # float32, twice through a ring
    layers = sum(config.is_moe_block(index) for index in range(config.depth))
    rows = num_images * config.num_patches * config.experts_per_token * layers
    trips = 6 if grad_checkpointing else 4
    tokens = trips * rows * config.hidden_size * width * (size - 1) / size
    return Wire(round(gradients), round(tokens))


def expert_table(
    model: DiT,
    ranks: Sequence[int],
    sizes: Sequence[int],
    *,
    images: int,
    width: int,
    grad_checkpointing: bool,
) -> str:
    """Return a table of GiB per rank and GB on the wire: N of `--expert-parallel` on W ranks.

    Args:
        model: whole.
        ranks, sizes: W and N.
        images: of all ranks in a step.
        width, grad_checkpointing: as in `expert_wire`.
    """
    head = ("ranks", "N", "state", "gradients", "tokens")
    rows: list[tuple[str, ...]] = [head]
    for num_ranks in ranks:
        for size in sizes:
            if num_ranks % size:
                continue
            state = expert_memory(model, size).total / GIB
            sent = expert_wire(
                model, num_ranks, size, images / num_ranks, width, grad_checkpointing
            )
            values = (state, *(value / 1e9 for value in sent))
            rows.append((str(num_ranks), str(size), *(f"{value:.2f}" for value in values)))
    lines = ["  ".join(f"{cell:>9}" for cell in row) for row in rows]
    what = f"per rank: GiB of state, GB sent in a step of {images} images at an even load:"
    return "\n".join([what, *lines])
