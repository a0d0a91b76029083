"""The path of tokens that may have any number of experts, from none to all.

In order: `plan_rows`, tokens to rows and back, then the two layers. Rows are sorted by expert as in
`plan`, but a slot may be empty and the number of rows is only bounded: what lies beyond the last
expert's segment is void.

Shapes: M tokens, S slots a token, R rows, E experts, D hidden, F expert hidden.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.matmul import grouped_linear, place_offsets


class RowPlan(NamedTuple):
    """Which token every row is, in two orders: by expert and by token."""

    tokens: Tensor  # (R,) int64: token of each row, rows sorted by expert
    slots: Tensor  # (R,) int64: flat (token, slot) index of each row
    experts: Tensor  # (R,) int64: expert of each row, E for void ones, which come last
    offsets: Tensor  # (E,) int32: end of each expert's segment
    by_token: Tensor  # (R,) int64: the rows sorted by token, void ones last
    token_starts: Tensor  # (M + 1,) int64: where each token's rows begin in that order


def plan_rows(expert_indices: Tensor, num_experts: int, num_rows: int) -> RowPlan:
    """Plan a stable sort of all filled slots by expert.

    Args:
        expert_indices: (M, S) int64, in [0, E]; E is an empty slot.
        num_experts: E.
        num_rows: R, at least as many as there are filled slots.
    """
    num_tokens, num_slots = expert_indices.shape
    sorted_experts, order = expert_indices.flatten().sort(stable=True)
    every = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_experts, every, right=True, out_int32=True)
    slots, experts = order[:num_rows], sorted_experts[:num_rows]
    tokens = slots // num_slots
    by_token = torch.where(experts < num_experts, tokens, num_tokens).argsort(stable=True)
    ends = (expert_indices < num_experts).sum(dim=1).cumsum(dim=0)
    token_starts = torch.cat([ends.new_zeros(1), ends])
    return RowPlan(tokens, slots, experts, offsets, by_token, token_starts)


def sum_by_token(rows: Tensor, plan: RowPlan) -> Tensor:
    """Add up each token's rows, one after the other: (R, D) -> (M, D); no row is 0."""
    # the bag after the last token's takes the void rows, whatever they hold
    return F.embedding_bag(plan.by_token, rows, plan.token_starts, mode="sum")[:-1]


class _Dispatch(torch.autograd.Function):
    """Copy tokens to rows; the gradient sums each token's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *plan: Tensor) -> Tensor:
        ctx.save_for_backward(*plan)
        return x.index_select(0, RowPlan(*plan).tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan = RowPlan(*ctx.saved_tensors)
        return (sum_by_token(grad.contiguous(), plan), *[None] * len(plan))


class _Combine(torch.autograd.Function):
    """Sum each token's rows; the gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, *plan: Tensor) -> Tensor:
        ctx.save_for_backward(*plan)
        return sum_by_token(rows, RowPlan(*plan))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan = RowPlan(*ctx.saved_tensors)
        return (grad.index_select(0, plan.tokens), *[None] * len(plan))


def dispatch_rows(x: Tensor, plan: RowPlan) -> Tensor:
    """Copy (M, D) tokens to (R, D) rows, sorted by expert."""
    return _Dispatch.apply(x, *plan)


def combine_rows(rows: Tensor, plan: RowPlan) -> Tensor:
    """Sum each token's rows: (R, D) to (M, D)."""
    return _Combine.apply(rows, *plan)


def swiglu_choice(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    num_rows: int,
) -> Tensor:
    """Do what `swiglu_rows` does where slots may be empty.

    Args:
        x: (M, D) tokens; its dtype is the one computed in.
        gate_up_proj: (E, 2F, D), down_proj: (E, D, F), in any dtype.
        expert_indices: (M, S) int64, in [0, E]; E is an empty slot.
        expert_weights: (M, S), in any dtype.
        num_rows: at least as many as there are filled slots.

    Returns:
        (M, D): the weighted sum over the token's experts, 0 for a token without any.
    """
    plan = plan_rows(expert_indices, len(gate_up_proj), num_rows)
    offsets = place_offsets(plan.offsets, x)
    gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
    void = (plan.experts == len(gate_up_proj))[:, None]  # (R, 1): grouped matmuls leave them unset
    rows = _Dispatch.apply(x, *plan)  # (R, D)
    hidden = grouped_linear(rows, gate_up_proj, offsets).masked_fill(void, 0)
    gate, up = hidden.chunk(2, dim=-1)
    row_weights = expert_weights.to(x.dtype).flatten().index_select(0, plan.slots)[:, None]
    hidden = (F.silu(gate) * up * row_weights).masked_fill(void, 0)
    return _Combine.apply(grouped_linear(hidden, down_proj, offsets), *plan)


def gelu_choice(
    x: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    num_rows: int,
) -> Tensor:
    """Do the same for experts with biases and a GELU; arguments as in `gelu_experts` and above.

    Returns:
        (M, D): the weighted sum over the token's experts, 0 for a token without any.
    """
    num_experts = len(up_proj)
    plan = plan_rows(expert_indices, num_experts, num_rows)
    offsets = place_offsets(plan.offsets, x)
    weights = (up_proj, up_bias, down_proj, down_bias, expert_weights)
    up_proj, up_bias, down_proj, down_bias, expert_weights = (w.to(x.dtype) for w in weights)
    void = (plan.experts == num_experts)[:, None]  # (R, 1): grouped matmuls leave these rows unset
    every = torch.arange(num_experts, device=x.device)
    is_expert = (plan.experts[:, None] == every).to(x.dtype)  # (R, E)
    row_weights = expert_weights.flatten().index_select(0, plan.slots)[:, None]
    rows = _Dispatch.apply(x, *plan)  # (R, D)
    hidden = grouped_linear(rows, up_proj, offsets).masked_fill(void, 0) + is_expert @ up_bias
    hidden = (F.gelu(hidden, approximate="tanh") * row_weights).masked_fill(void, 0)
    out_rows = grouped_linear(hidden, down_proj, offsets)
    return _Combine.apply(out_rows + (is_expert * row_weights) @ down_bias, *plan)
