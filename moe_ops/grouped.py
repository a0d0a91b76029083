"""The path of GPUs: all experts at once, two grouped matmuls between two gathers.

In order: the grouped matmul and its gradient as operators, the gathers, then the layers made of
them, `swiglu_grouped` and `gelu_grouped`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.plan import DispatchPlan, sum_rows


@torch.library.custom_op("dit_moe::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's segment of rows by that expert's matrix: rows_e @ weight_e.T.

    torch's grouped matmul: on CUDA a native kernel in bfloat16 on capability 9.x and 10.x, else its
    own loop, which waits for the offsets.
    A custom op, because bare `grouped_mm` compiles in bfloat16 only.

    Args:
        rows: (R, I) sorted by expert.
        weight: (E, O, I), same dtype as the rows.
        offsets: (E,) int32, end of each segment; the last one is R.

    Returns:
        (R, O), contiguous.
    """
    return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)


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
    return F.grouped_mm(grad.t(), rows, offs=offsets)


@grouped_outer.register_fake
def _(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0], grad.shape[1], rows.shape[1])


def _grouped_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_rows = grouped_linear(grad, weight.transpose(-2, -1), offsets)
    return grad_rows, grouped_outer(grad, rows, offsets), None


grouped_linear.register_autograd(_grouped_linear_backward, setup_context=_grouped_linear_setup)


class _Dispatch(torch.autograd.Function):
    """Copy tokens to sorted rows; the gradient gathers K rows per token instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return sum_rows(grad, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K sorted rows; the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return sum_rows(rows, inverse, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order // ctx.k), None, None, None


def swiglu_grouped(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, expert_weights: Tensor, plan: DispatchPlan
) -> Tensor:
    """Run all experts at once: two grouped matmuls between a gather there and a gather back.

    Args: as `swiglu_segments`, weights in x's dtype. Returns: (M, D).
    """
    k = expert_weights.shape[1]
    rows = _Dispatch.apply(x, plan.order, plan.inverse, k)  # (R, D)
    gate, up = grouped_linear(rows, gate_up_proj, plan.offsets).chunk(2, dim=-1)  # (R, F) each
    row_weights = expert_weights.flatten().index_select(0, plan.order)[:, None]
    hidden = F.silu(gate) * up * row_weights
    out_rows = grouped_linear(hidden, down_proj, plan.offsets)  # (R, D)
    return _Combine.apply(out_rows, plan.order, plan.inverse, k)


def gelu_grouped(
    x: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    plan: DispatchPlan,
) -> Tensor:
    """Do the same for experts with biases and a GELU.

    The biases come in by matmuls with the (row, expert) membership, whose gradients, unlike a
    gather's, are sums in a fixed order.

    Args: as `gelu_experts`, weights in x's dtype. Returns: (M, D).
    """
    k, num_experts = expert_weights.shape[1], len(up_proj)
    row_experts = expert_indices.flatten().index_select(0, plan.order)
    row_weights = expert_weights.flatten().index_select(0, plan.order)[:, None]
    is_expert = F.one_hot(row_experts, num_experts).to(x.dtype)  # (R, E)
    rows = _Dispatch.apply(x, plan.order, plan.inverse, k)  # (R, D)
    hidden = grouped_linear(rows, up_proj, plan.offsets) + is_expert @ up_bias  # (R, F)
    hidden = F.gelu(hidden, approximate="tanh") * row_weights
    out_rows = (
        grouped_linear(hidden, down_proj, plan.offsets) + (is_expert * row_weights) @ down_bias
    )
    return _Combine.apply(out_rows, plan.order, plan.inverse, k)
