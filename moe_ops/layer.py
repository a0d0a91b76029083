"""What the network calls: routed experts of both forms and one MLP that sees every token.

The only place that chooses a path: CPUs run segments, everything else grouped matmuls. GELU
experts, those of upcycled dense networks and of later families, are grouped on every device, and so
are all where a token may have any number of experts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.choice import gelu_choice, swiglu_choice
from moe_ops.dense import swiglu_dense
from moe_ops.grouped import gelu_grouped, swiglu_grouped
from moe_ops.plan import sort_by_expert
from moe_ops.segments import swiglu_segments


def swiglu_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    num_rows: int | None = None,
) -> Tensor:
    """Send every token through its K experts and sum the weighted outputs, dropping none.

    Args:
        x: (M, D) tokens; its dtype is the one computed in.
        gate_up_proj: (E, 2F, D), gate rows above up rows, in any dtype.
        down_proj: (E, D, F), in any dtype.
        expert_indices: (M, K) int64, in [0, E).
        expert_weights: (M, K), in any dtype.
        num_rows: where some indices are E, for no expert: at most so many are not.

    Returns:
        (M, D): sum_k weight_k * down(silu(gate(x)) * up(x)) of expert k. The weight multiplies the
        hidden activation, which is the same by linearity and saves a pass over the output.

    Source: arXiv:2407.11633, sec. 2.2; SwiGLU: arXiv:2002.05202.
    """
    # Outside the ops: the backward uses the same cast.
    gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
    expert_weights = expert_weights.to(x.dtype)
    if num_rows is not None:
        return swiglu_choice(x, gate_up_proj, down_proj, expert_indices, expert_weights, num_rows)
    plan = sort_by_expert(expert_indices, gate_up_proj.shape[0])
    if x.device.type == "cpu":
        keep_hidden = _needs_grad(x, gate_up_proj, down_proj, expert_weights)
        return swiglu_segments(
            x, gate_up_proj, down_proj, expert_weights, plan.order, plan.offsets, keep_hidden
        )[0]
    return swiglu_grouped(x, gate_up_proj, down_proj, expert_weights, plan)


def gelu_experts(
    x: Tensor,
    up_proj: Tensor,
    up_bias: Tensor,
    down_proj: Tensor,
    down_bias: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    num_rows: int | None = None,
) -> Tensor:
    """Do what `swiglu_experts` does for experts with biases and a GELU.

    Args:
        x: (M, D) tokens; its dtype is the one computed in.
        up_proj: (E, F, D), up_bias: (E, F), down_proj: (E, D, F), down_bias: (E, D), in any dtype.
        expert_indices: (M, K) int64, in [0, E).
        expert_weights: (M, K), in any dtype.
        num_rows: as there.

    Returns:
        (M, D): sum_k weight_k * (down(gelu(up(x) + up_bias)) + down_bias) of expert k, the GELU
        being the tanh approximation.
    """
    weights = (up_proj, up_bias, down_proj, down_bias)
    up_proj, up_bias, down_proj, down_bias = (weight.to(x.dtype) for weight in weights)
    weights = (up_proj, up_bias, down_proj, down_bias)
    chosen = expert_indices, expert_weights.to(x.dtype)
    if num_rows is not None:
        return gelu_choice(x, *weights, *chosen, num_rows)
    return gelu_grouped(x, *weights, *chosen, sort_by_expert(expert_indices, len(up_proj)))


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send all tokens through one SwiGLU, down(silu(gate(x)) * up(x)).

    Args:
        x: (..., D); its dtype is the one computed in.
        gate_up: (2F, D), gate rows above up rows, and down: (D, F), in any dtype.

    Returns:
        (..., D).
    """
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    if x.device.type == "cpu":
        tokens = x.reshape(-1, x.shape[-1])
        return swiglu_dense(tokens, gate_up, down, _needs_grad(x, gate_up, down))[0].view_as(x)
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def _needs_grad(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
