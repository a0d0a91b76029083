"""GELU experts with biases: grouped matmuls between a gather there and a sum back."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.matmul import grouped_linear
from moe_ops.plan import DispatchPlan, sum_rows


class _Dispatch(torch.autograd.Function):
    """Copy tokens to sorted rows; the gradient sums K rows per token instead of scattering."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, inverse: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(inverse, starts)
        return x.index_select(0, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return sum_rows(grad.contiguous(), *ctx.saved_tensors), None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K sorted rows; the gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, tokens: Tensor, inverse: Tensor, starts: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return sum_rows(rows, inverse, starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        return grad.index_select(0, tokens), None, None, None


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
    """Send tokens to their experts and sum the weighted results.

    The biases come in by matmuls with the (row, expert) membership, whose gradients, unlike a
    gather's, are sums in a fixed order.

    Args: as `gelu_experts`, weights in x's dtype; the plan's offsets placed by `place_offsets`.
    Returns: (M, D).
    """
    num_experts, places = len(up_proj), (plan.tokens, plan.inverse, plan.starts)
    row_experts = expert_indices.flatten().index_select(0, plan.order)
    row_weights = expert_weights.flatten().index_select(0, plan.order)[:, None]
    is_expert = F.one_hot(row_experts, num_experts).to(x.dtype)  # (R, E)
    rows = _Dispatch.apply(x, *places)  # (R, D)
    hidden = grouped_linear(rows, up_proj, plan.offsets) + is_expert @ up_bias  # (R, F)
    hidden = F.gelu(hidden, approximate="tanh") * row_weights
    out_rows = (
        grouped_linear(hidden, down_proj, plan.offsets) + (is_expert * row_weights) @ down_bias
    )
    return _Combine.apply(out_rows, *places)
