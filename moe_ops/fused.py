"""SwiGLU of rows that go to their experts, or of all tokens: a forward and a backward by hand.

In order: the activation and its gradients, one kernel each, and `swiglu_rows`, which keeps only
tokens, gate and up for the backward and computes the rest again. Used on every device.

Shapes: M tokens, K experts per token, R = M*K rows, or M, D hidden, F expert hidden.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops.matmul import grouped_linear, grouped_outer
from moe_ops.plan import DispatchPlan, sum_rows

CHUNK = 128  # rows whose gate, up and products stay in a core's cache

RowFunction = Callable[..., tuple[Tensor, ...]]


def _activate(hidden: Tensor, row_weights: Tensor | None) -> tuple[Tensor, ...]:
    gate, up = hidden.chunk(2, dim=-1)
    activation = F.silu(gate) * up
    return (activation if row_weights is None else activation * row_weights,)


def _activate_backward(
    grad: Tensor, hidden: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, ...]:
    gate, up = hidden.chunk(2, dim=-1)
    silu = F.silu(gate)
    activation = silu * up
    grad_weights = grad.new_empty(grad.shape[0], 0)
    if row_weights is not None:
        grad_weights = (grad * activation).sum(dim=-1, keepdim=True)
        activation, grad = activation * row_weights, grad * row_weights
    grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return activation, torch.cat([grad_gate, silu * grad], dim=-1), grad_weights


@cache
def _compiled(function: RowFunction) -> RowFunction:
    """Make one kernel of a function, where there is a compiler for it."""
    return torch.compile(function, dynamic=True) if find_spec("triton") else function


def _by_rows(function: RowFunction, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Apply a function of rows: on a GPU as one kernel, on a CPU to as many as its cache holds."""
    first = inputs[0]
    assert first is not None
    if first.device.type != "cpu":
        return _compiled(function)(*inputs)
    if len(first) <= CHUNK:
        return function(*inputs)
    outs: tuple[Tensor, ...] = ()
    for start in range(0, len(first), CHUNK):
        rows = slice(start, start + CHUNK)
        parts = function(*(None if x is None else x[rows] for x in inputs))
        outs = outs or tuple(part.new_empty(len(first), part.shape[1]) for part in parts)
        for out, part in zip(outs, parts, strict=True):
            out[rows] = part
    return outs


@torch.library.custom_op("dit_moe::activate", mutates_args=())
def activate(hidden: Tensor, row_weights: Tensor | None) -> Tensor:
    """Return silu(gate) * up * weight.

    Args:
        hidden: (R, 2F), gate beside up.
        row_weights: (R, 1).

    Returns:
        (R, F).
    """
    return _by_rows(_activate, hidden, row_weights)[0]


@activate.register_fake
def _(hidden: Tensor, row_weights: Tensor | None) -> Tensor:
    return hidden.new_empty(hidden.shape[0], hidden.shape[1] // 2)


@torch.library.custom_op("dit_moe::activate_backward", mutates_args=())
def activate_backward(
    grad: Tensor, hidden: Tensor, row_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `activate`.

    Args:
        grad: (R, F); the rest as there.

    Returns:
        (R, F) what `activate` returned; the gradients (R, 2F) and (R, 1), or (R, 0) without weight.
    """
    activation, grad_hidden, grad_weights = _by_rows(_activate_backward, grad, hidden, row_weights)
    return activation, grad_hidden, grad_weights


@activate_backward.register_fake
def _(grad: Tensor, hidden: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_weights = grad.new_empty(grad.shape[0], 0 if row_weights is None else 1)
    return grad.new_empty(grad.shape), hidden.new_empty(hidden.shape), grad_weights


def _linear(rows: Tensor, weight: Tensor, offsets: Tensor | None) -> Tensor:
    return rows @ weight.t() if offsets is None else grouped_linear(rows, weight, offsets)


def _outer(grad: Tensor, rows: Tensor, offsets: Tensor | None) -> Tensor:
    return grad.t() @ rows if offsets is None else grouped_outer(grad, rows, offsets)


class _SwiGLU(torch.autograd.Function):
    """down(silu(gate(x)) * up(x) * weight), summed over each token's rows if there is a plan."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        expert_weights: Tensor | None,
        *fields: Tensor,
    ) -> Tensor:
        plan, row_weights, rows = None, None, x
        if fields:
            assert expert_weights is not None
            plan = DispatchPlan(*fields)
            row_weights = expert_weights.flatten().index_select(0, plan.order)[:, None]
            rows = x.index_select(0, plan.tokens)  # (R, D)
        offsets = plan.offsets if plan else None
        hidden = _linear(rows, gate_up, offsets)  # (R, 2F)
        compiling = torch.compiler.is_compiling()  # then the compiler fuses it with more
        activation = (
            _activate(hidden, row_weights)[0] if compiling else activate(hidden, row_weights)
        )
        out = _linear(activation, down, offsets)  # (R, D)
        ctx.save_for_backward(x, gate_up, down, row_weights, hidden, *fields)
        return sum_rows(out, plan.inverse, plan.starts) if plan else out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, row_weights, hidden, *fields = ctx.saved_tensors
        plan = DispatchPlan(*fields) if fields else None
        offsets = plan.offsets if plan else None
        gather = (lambda t: t.index_select(0, plan.tokens)) if plan else (lambda t: t.contiguous())
        grad = gather(grad)  # (R, D)
        grad_activation = _linear(grad, down.transpose(-2, -1), offsets)  # but for the weight
        compiling = torch.compiler.is_compiling()
        differentiate = _activate_backward if compiling else activate_backward
        activation, grad_hidden, grad_weights = differentiate(grad_activation, hidden, row_weights)
        grad_down = _outer(grad, activation, offsets) if ctx.needs_input_grad[2] else None
        grad_x = _linear(grad_hidden, gate_up.transpose(-2, -1), offsets)
        grad_gate_up = _outer(grad_hidden, gather(x), offsets) if ctx.needs_input_grad[1] else None
        if plan is None:
            return grad_x, grad_gate_up, grad_down, None
        grad_weights = grad_weights.flatten().index_select(0, plan.inverse).view(len(x), -1)
        grad_x = sum_rows(grad_x, plan.inverse, plan.starts)
        return grad_x, grad_gate_up, grad_down, grad_weights, *[None] * len(fields)


def swiglu_rows(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    expert_weights: Tensor | None = None,
    plan: DispatchPlan | None = None,
) -> Tensor:
    """Send tokens to their experts and sum the weighted results, or all through one SwiGLU.

    Args:
        x: (M, D).
        gate_up: (E, 2F, D), gate rows above up rows, and down: (E, D, F), in x's dtype; without
            a plan (2F, D) and (D, F).
        expert_weights: (M, K), in x's dtype.
        plan: of these tokens, its offsets placed by `place_offsets`.

    Returns:
        (M, D).
    """
    return _SwiGLU.apply(x, gate_up, down, expert_weights, *(plan or ()))
