"""The path of CPUs: one expert after the other over its segment of sorted rows, fused by hand.

A custom operator with its own backward: `swiglu_segments`. Before it, how rows are laid out.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_ops.dense import swiglu_backward, swiglu_forward
from moe_ops.plan import sum_rows


class _Rows(NamedTuple):
    """Sorted rows, each expert's segment padded to a multiple of `alignment` rows.

    oneDNN compiles a kernel for every new matrix shape (about 1 ms each), and the loads change at
    every step: padding leaves few shapes. A padding row repeats the segment's last token with
    weight 0, so it adds nothing to any sum. float32 matmuls (MKL) compile nothing: no padding.
    """

    segments: list[tuple[int, int, int]]  # (expert, start, end) of every expert that has rows
    tokens: Tensor  # (R_pad,) int64
    weights: Tensor  # (R_pad, 1)
    row_of_choice: Tensor  # (R,) int64: row of each flat (token, choice) index


def _row_alignment(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return the power of two that pads an average segment by a thirty-second at most."""
    if dtype == torch.float32:
        return 1
    return 1 << min(max(num_rows // (32 * num_experts), 1).bit_length() - 1, 6)


def _padded_size(num_rows: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return the number of rows that always suffices, whatever the loads."""
    return num_rows + num_experts * (_row_alignment(num_rows, num_experts, dtype) - 1)


def lay_out_rows(expert_weights: Tensor, order: Tensor, offsets: Tensor, alignment: int) -> _Rows:
    """Lay the sorted rows out, every segment padded to a multiple of `alignment`.

    Example: three tokens, two choices each, [[0, 2], [0, 2], [2, 0]], of three experts; choices are
    numbered 0..5 by token, then choice. By expert they are 0, 2, 5 | none | 1, 3, 4, which is
    `order`, and `offsets` are 3, 3, 6. Aligned to 2 (a star is padding):

        segments        (0, 0, 4)  (2, 4, 8)    expert, first row, row after the last
        choices         0 2 5 5*   1 3 4 4*
        tokens          0 1 2 2*   0 1 2 2*
        weights         those of the choices, 0 at a star
        row_of_choice   0 4 1 5 6 2             where choices 0..5 are

    Args:
        expert_weights: (M, K).
        order, offsets: of the `DispatchPlan`.
        alignment: 1 or more.
    """
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    padded_counts = (counts + alignment - 1) // alignment * alignment
    ends, padded_ends = offsets.long(), padded_counts.cumsum(0)
    starts, padded_starts = ends - counts, padded_ends - padded_counts
    expert = torch.arange(len(offsets)).repeat_interleave(padded_counts)  # (R_pad,)
    within = torch.arange(len(expert)) - padded_starts[expert]  # row within its segment
    real = within < counts[expert]
    choice = order[torch.minimum(starts[expert] + within, ends[expert] - 1)]
    weights = expert_weights.flatten()[choice].mul_(real)
    row_of_choice = torch.empty_like(order)
    row_of_choice[choice[real]] = real.nonzero().squeeze(1)
    spans = zip(padded_starts.tolist(), padded_ends.tolist(), strict=True)
    segments = [(expert, start, end) for expert, (start, end) in enumerate(spans) if end > start]
    return _Rows(segments, choice // expert_weights.shape[1], weights[:, None], row_of_choice)


@torch.library.custom_op("dit_moe::swiglu_segments", mutates_args=())
def swiglu_segments(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """Run each expert over its segment of rows, one after the other.

    Scratch memory is one segment, so it stays in cache from matmul to matmul. A custom op, so that
    `torch.compile` sees one node.

    Args:
        x: (M, D) tokens.
        gate_up_proj: (E, 2F, D), down_proj: (E, D, F) and expert_weights: (M, K), in x's dtype.
        order, offsets: of the `DispatchPlan`.
        keep_hidden: whether there will be a backward, which needs the hidden rows.

    Returns:
        (M, D) output, and the sorted, padded gate and up rows (2, R_pad, F), or (2, 0, F).
    """
    alignment = _row_alignment(len(order), len(offsets), x.dtype)
    laid = lay_out_rows(expert_weights, order, offsets, alignment)
    out_rows = x.new_empty(len(laid.tokens), x.shape[1])
    num_hidden = _padded_size(len(order), len(offsets), x.dtype) if keep_hidden else 0
    hidden = x.new_empty(2, num_hidden, down_proj.shape[2])
    for expert, start, end in laid.segments:
        rows = x.index_select(0, laid.tokens[start:end])
        kept = hidden[:, start:end] if keep_hidden else None
        swiglu_forward(rows, gate_up_proj[expert], down_proj[expert], out_rows[start:end], kept)
    out_rows.mul_(laid.weights)
    return sum_rows(out_rows, laid.row_of_choice, expert_weights.shape[1]), hidden


@swiglu_segments.register_fake
def _(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    num_rows = _padded_size(order.shape[0], offsets.shape[0], x.dtype) if keep_hidden else 0
    return x.new_empty(x.shape), x.new_empty(2, num_rows, down_proj.shape[2])


@torch.library.custom_op("dit_moe::swiglu_segments_backward", mutates_args=())
def swiglu_segments_backward(
    grad: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differentiate `swiglu_segments`.

    Args:
        grad: (M, D), gradient of the output; the rest as in the forward.

    Returns:
        Gradients of x, gate_up_proj, down_proj and expert_weights, in their shapes.
    """
    alignment = _row_alignment(len(order), len(offsets), x.dtype)
    laid = lay_out_rows(expert_weights, order, offsets, alignment)
    grad_rows = x.new_empty(len(laid.tokens), x.shape[1])
    grad_row_weights = torch.empty_like(laid.weights)
    grad_gate_up = gate_up_proj.new_empty(gate_up_proj.shape)
    grad_down = down_proj.new_empty(down_proj.shape)
    for expert, start, end in laid.segments:
        tokens = laid.tokens[start:end]
        of_weights = swiglu_backward(
            grad.index_select(0, tokens),
            x.index_select(0, tokens),
            laid.weights[start:end],
            gate_up_proj[expert],
            down_proj[expert],
            hidden[:, start:end],
            grad_rows[start:end],
            grad_gate_up[expert],
            grad_down[expert],
        )
        assert of_weights is not None
        grad_row_weights[start:end] = of_weights
    for expert in set(range(len(offsets))) - {expert for expert, _, _ in laid.segments}:
        grad_gate_up[expert].zero_()
        grad_down[expert].zero_()
    grad_weights = grad_row_weights[laid.row_of_choice].view_as(expert_weights)
    grad_x = sum_rows(grad_rows, laid.row_of_choice, expert_weights.shape[1])
    return grad_x, grad_gate_up, grad_down, grad_weights


@swiglu_segments_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    hidden: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(of.new_empty(of.shape) for of in (x, gate_up_proj, down_proj, expert_weights))


def _segments_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _segments_backward(ctx: Any, grad: Tensor, _grad_hidden: None) -> tuple[Tensor | None, ...]:
    grads = swiglu_segments_backward(grad.contiguous(), *ctx.saved_tensors)
    return (*grads, None, None, None)


swiglu_segments.register_autograd(_segments_backward, setup_context=_segments_setup)
