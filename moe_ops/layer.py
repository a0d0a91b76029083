"""What the network calls: routed experts of both forms and one MLP that sees every token.

Where a token may have any number of experts it is `choice`; else `fused` or `gelu`.
"""

from torch import Tensor

from moe_ops.choice import gelu_choice, swiglu_choice
from moe_ops.fused import swiglu_rows
from moe_ops.gelu import gelu_grouped
from moe_ops.matmul import place_offsets
from moe_ops.plan import DispatchPlan, sort_by_expert
from moe_ops.rounding import rounded


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
    gate_up_proj, down_proj = rounded(gate_up_proj, x.dtype), rounded(down_proj, x.dtype)
    expert_weights = expert_weights.to(x.dtype)
    if num_rows is not None:
        return swiglu_choice(x, gate_up_proj, down_proj, expert_indices, expert_weights, num_rows)
    plan = plan_dispatch(x, expert_indices, len(gate_up_proj))
    return swiglu_rows(x, gate_up_proj, down_proj, expert_weights, plan)


def plan_dispatch(x: Tensor, expert_indices: Tensor, num_experts: int) -> DispatchPlan:
    """Plan where the tokens go, (M, D) by (M, K) of E experts, and how the matmuls find them."""
    plan = sort_by_expert(expert_indices, num_experts)
    return plan._replace(offsets=place_offsets(plan.offsets, x))


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
    up_proj, up_bias, down_proj, down_bias = (rounded(weight, x.dtype) for weight in weights)
    weights = (up_proj, up_bias, down_proj, down_bias)
    chosen = expert_indices, expert_weights.to(x.dtype)
    if num_rows is not None:
        return gelu_choice(x, *weights, *chosen, num_rows)
    return gelu_grouped(x, *weights, *chosen, plan_dispatch(x, expert_indices, len(up_proj)))


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Send all tokens through one SwiGLU, down(silu(gate(x)) * up(x)).

    Args:
        x: (..., D); its dtype is the one computed in.
        gate_up: (2F, D), gate rows above up rows, and down: (D, F), in any dtype.

    Returns:
        (..., D).
    """
    gate_up, down = rounded(gate_up, x.dtype), rounded(down, x.dtype)
    return swiglu_rows(x.reshape(-1, x.shape[-1]), gate_up, down).view_as(x)
