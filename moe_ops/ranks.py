"""What statistics of a batch that is spread over ranks need: sums and gathers over all ranks.

Operators, so that `torch.compile` sees one node for each. W ranks.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """Return W, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number in [0, W)."""
    return dist.get_rank() if num_ranks() > 1 else 0


@torch.library.custom_op("dit_moe::sum_over_ranks", mutates_args=())
def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum a tensor over all ranks; every rank must call.

    The gradient is summed too: with a loss that all ranks compute alike from the sum, the average
    of their gradients, which DDP and ZeRO take, is that of one rank with all the tokens.
    """
    total = x.clone()
    dist.all_reduce(total)
    return total


@sum_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _sum_backward(ctx: Any, grad: Tensor) -> Tensor:
    return sum_over_ranks(grad.contiguous())


sum_over_ranks.register_autograd(_sum_backward)


@torch.library.custom_op("dit_moe::gather_over_ranks", mutates_args=())
def gather_over_ranks(x: Tensor) -> Tensor:
    """Concatenate the ranks' equally large tensors along the first dimension, without gradient."""
    every = x.new_empty(num_ranks() * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(every, x.contiguous())
    return every


@gather_over_ranks.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(num_ranks() * x.shape[0], *x.shape[1:])
