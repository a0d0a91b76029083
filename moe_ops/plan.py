"""The plan of one dispatch: where every routed row goes and comes back from."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Where every routed row goes: row r of the sorted order is token `order[r] // K`."""

    order: Tensor  # (R,) int64: flat (token, choice) index of each sorted row
    tokens: Tensor  # (R,) int64: token of each sorted row
    inverse: Tensor  # (R,) int64: sorted position of each flat (token, choice) index
    starts: Tensor  # (M,) int64: where each token's choices begin in `inverse`
    offsets: Tensor  # (E,) int32: end of each expert's segment in the sorted order


def sort_by_expert(expert_indices: Tensor, num_experts: int) -> DispatchPlan:
    """Plan a stable sort of all (token, choice) pairs by expert.

    Args:
        expert_indices: (M, K) int64, in [0, E).
        num_experts: E.
    """
    k = expert_indices.shape[1]
    sorted_experts, order = expert_indices.flatten().sort(stable=True)
    rows = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)  # a permutation: no collisions
    experts = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    return DispatchPlan(order, order // k, inverse, rows[::k].contiguous(), offsets)


def sum_rows(rows: Tensor, inverse: Tensor, starts: Tensor) -> Tensor:
    """Add up each token's K sorted rows in one pass: (R, D) -> (M, D).

    Args:
        rows: without a gradient of their own.
        inverse, starts: of the `DispatchPlan`.
    """
    if torch.compiler.is_compiling():  # a gather that the compiler fuses with what comes next
        choices = rows.index_select(0, inverse).view(len(starts), -1, rows.shape[1])
        return choices.sum(dim=1, dtype=rows.dtype)  # autocast would make it float32
    return F.embedding_bag(inverse, rows, starts, mode="sum")
