"""One SwiGLU over many rows on a CPU, forward and backward by hand.

`swiglu_forward` and `swiglu_backward` are the arithmetic of one MLP, written where the caller says:
a segment's rows or all tokens. `swiglu_dense` is the operator for all tokens: shared experts and
dense blocks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_forward(
    rows: Tensor, gate_up: Tensor, down: Tensor, out: Tensor, hidden: Tensor | None
) -> None:
    """Write down(silu(gate(rows)) * up(rows)) to `out`; gate and up rows stay in `hidden` if given.

    Args:
        rows, out: (m, D). gate_up: (2F, D). down: (D, F). hidden: (2, m, F).
    """
    gate_weight, up_weight = gate_up.chunk(2)
    if hidden is None:
        activation, up = F.silu(rows @ gate_weight.t(), inplace=True), rows @ up_weight.t()
    else:
        gate, up = hidden
        torch.mm(rows, gate_weight.t(), out=gate)
        torch.mm(rows, up_weight.t(), out=up)
        activation = F.silu(gate)
    torch.mm(activation.mul_(up), down.t(), out=out)


def swiglu_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Tensor | None,
    gate_up: Tensor,
    down: Tensor,
    hidden: Tensor,
    grad_rows: Tensor,
    grad_gate_up: Tensor,
    grad_down: Tensor,
) -> Tensor | None:
    """Differentiate `weights * swiglu_forward(rows)`; activations come again from `hidden`.

    By linearity the row weights multiply (m, D) tensors only, never the wider (m, F).

    Args:
        grad: (m, D), gradient of the weighted output; may be overwritten.
        rows: (m, D); may be overwritten. weights: (m, 1). hidden: (2, m, F).
        grad_rows, grad_gate_up, grad_down: where the gradients are written.

    Returns:
        (m, 1) gradient of the weights, if there are any.
    """
    gate, up = hidden
    silu = F.silu(gate)
    activation = silu * up
    grad_activation = grad @ down  # but for the row's weight
    grad_weights = None
    if weights is not None:
        # <grad, down(activation)> without keeping the expert's output
        grad_weights = (grad_activation * activation).sum(dim=1, keepdim=True)
        grad, rows = grad.mul_(weights), rows.mul_(weights)
    torch.mm(grad.t(), activation, out=grad_down)
    grad_up = silu.mul_(grad_activation)
    grad_gate = torch.ops.aten.silu_backward(grad_activation.mul_(up), gate)
    gate_weight, up_weight = gate_up.chunk(2)
    torch.mm(grad_gate, gate_weight, out=grad_rows).addmm_(grad_up, up_weight)
    if weights is not None:
        grad_rows.mul_(weights)
    width = down.shape[1]
    torch.mm(grad_gate.t(), rows, out=grad_gate_up[:width])
    torch.mm(grad_up.t(), rows, out=grad_gate_up[width:])
    return grad_weights


@torch.library.custom_op("dit_moe::swiglu_dense", mutates_args=())
def swiglu_dense(
    x: Tensor, gate_up: Tensor, down: Tensor, keep_hidden: bool
) -> tuple[Tensor, Tensor]:
    """Run one SwiGLU over all tokens by the same steps as the experts.

    Args:
        x: (M, D). gate_up: (2F, D) and down: (D, F), in x's dtype.
        keep_hidden: whether there will be a backward.

    Returns:
        (M, D) output, and the gate and up rows (2, M, F), or (2, 0, F).
    """
    out = x.new_empty(x.shape)
    hidden = x.new_empty(2, len(x) if keep_hidden else 0, down.shape[1])
    swiglu_forward(x, gate_up, down, out, hidden if keep_hidden else None)
    return out, hidden


@swiglu_dense.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, keep_hidden: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2, x.shape[0] if keep_hidden else 0, down.shape[1])


@torch.library.custom_op("dit_moe::swiglu_dense_backward", mutates_args=())
def swiglu_dense_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `swiglu_dense`: gradients of x, gate_up and down."""
    grads = x.new_empty(x.shape), gate_up.new_empty(gate_up.shape), down.new_empty(down.shape)
    swiglu_backward(grad, x, None, gate_up, down, hidden, *grads)
    return grads


@swiglu_dense_backward.register_fake
def _(grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    return tuple(of.new_empty(of.shape) for of in (x, gate_up, down))


def _dense_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _dense_backward(ctx: Any, grad: Tensor, _grad_hidden: None) -> tuple[Tensor | None, ...]:
    return (*swiglu_dense_backward(grad.contiguous(), *ctx.saved_tensors), None)


swiglu_dense.register_autograd(_dense_backward, setup_context=_dense_setup)
