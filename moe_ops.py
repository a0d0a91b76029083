"""How tokens meet stacked expert weights: sort by expert, grouped matmul, un-sort and combine.

In order: `sort_by_expert` (the plan of one dispatch), `grouped_linear` (one matmul per expert over
sorted rows, the only place that knows which kernel runs where), `dispatch` / `combine` (moving rows
there and back without atomics), and `swiglu_experts`, the whole routed layer.

Shapes: M tokens, K experts per token, R = M*K routed rows, E experts, D hidden, F expert hidden.
Nothing here reads a tensor's value on the host on a GPU, and every shape is static.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DispatchPlan(NamedTuple):
    """Where every routed row goes: row r of the sorted order is token `order[r] // K`."""

    order: Tensor  # (R,) int64: flat (token, choice) index of each sorted row
    inverse: Tensor  # (R,) int64: sorted position of each flat (token, choice) index
    offsets: Tensor  # (E,) int32: end of each expert's segment in the sorted order


def sort_by_expert(expert_indices: Tensor, num_experts: int) -> DispatchPlan:
    """Plan a stable sort of all (token, choice) pairs by expert.

    Args:
        expert_indices: (M, K) int64, in [0, E).
        num_experts: E.

    Returns:
        The plan; equal input gives equal bits, on every device.
    """
    sorted_experts, order = expert_indices.flatten().sort(stable=True)
    rows = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)  # a permutation: no collisions
    experts = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    return DispatchPlan(order, inverse, offsets)


@torch.library.custom_op("dit_moe::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's segment of rows by that expert's matrix: rows_e @ weight_e.T.

    On a GPU this is torch's grouped matmul; on a CPU a loop over segments written into one output,
    which is faster there. A custom op, because `grouped_mm` compiles in bfloat16 only.

    Args:
        rows: (R, I) sorted by expert.
        weight: (E, O, I), same dtype as the rows.
        offsets: (E,) int32, end of each segment; the last one is R.

    Returns:
        (R, O), contiguous.
    """
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            torch.mm(rows[start:end], weight[expert].t(), out=out[start:end])
        start = end
    return out


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("dit_moe::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Sum grad_r x rows_r over each expert's segment: the weight gradient of `grouped_linear`.

    Args:
        grad: (R, O) and rows: (R, I), both sorted by expert.
        offsets: (E,) int32, end of each segment.

    Returns:
        (E, O, I); zero for an expert without rows.
    """
    if rows.is_cuda:
        return F.grouped_mm(grad.t(), rows, offs=offsets)
    out = rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        torch.mm(grad[start:end].t(), rows[start:end], out=out[expert])  # zeros when empty
        start = end
    return out


@grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])


def _grouped_linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx, grad: Tensor):
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grouped_linear(grad, weight.transpose(-2, -1), offsets)
    return grad_rows, grouped_outer(grad, rows, offsets), None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_grouped_linear_setup)


class _Dispatch(torch.autograd.Function):
    """Copy tokens to sorted rows; the gradient gathers K rows per token instead of scattering."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_tokens = x.shape[0]
        return x.index_select(0, order // (order.numel() // x.shape[0]))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return grad.view(ctx.num_tokens, -1, grad.shape[-1]).sum(dim=1), None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K sorted rows; the gradient is a gather too."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return rows.index_select(0, inverse).view(-1, k, rows.shape[-1]).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def swiglu_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
) -> Tensor:
    """Send every token through its K experts and sum the weighted outputs, dropping none.

    Args:
        x: (M, D) tokens.
        gate_up_proj: (E, 2F, D), gate rows above up rows.
        down_proj: (E, D, F).
        expert_indices: (M, K) int64, in [0, E).
        expert_weights: (M, K).

    Returns:
        (M, D): sum_k weight_k * down(silu(gate(x)) * up(x)) of expert k. The weight multiplies the
        hidden activation, which is the same by linearity and saves a pass over the output.

    Source: arXiv:2407.11633, sec. 2.2; SwiGLU: arXiv:2002.05202.
    """
    plan = sort_by_expert(expert_indices, gate_up_proj.shape[0])
    rows = _Dispatch.apply(x, plan.order, plan.inverse)  # (R, D)
    gate, up = grouped_linear(rows, gate_up_proj, plan.offsets).chunk(2, dim=-1)  # (R, F) each
    weights = expert_weights.to(x.dtype).flatten().index_select(0, plan.order)
    hidden = F.silu(gate) * up * weights[:, None]
    rows = grouped_linear(hidden, down_proj, plan.offsets)  # (R, D)
    return _Combine.apply(rows, plan.order, plan.inverse, expert_indices.shape[1])
