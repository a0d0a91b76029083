"""How tokens meet stacked expert weights: sort by expert, matmul by expert, un-sort and combine.

In order: `sort_by_expert` (the plan of one dispatch), the router's matmul, the CPU path (a loop
over the experts' segments, fused by hand), the GPU path (grouped matmuls and gathers),
`swiglu_experts`, the whole routed layer and the only place that chooses between the two, and
`gelu_experts`, the layer for upcycled dense networks, grouped on every device.

Shapes: M tokens, K experts per token, R = M*K routed rows, E experts, D hidden, F expert hidden.
On a GPU every shape is static, and in bfloat16 on compute capability 9.x and 10.x (H100 to B300)
no tensor's value is read on the host. On other GPUs and in other dtypes torch's `grouped_mm` is a
loop over the experts that reads the offsets on the host, once a matmul. No sum depends on the order
of atomics: equal input gives equal bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
    """
    sorted_experts, order = expert_indices.flatten().sort(stable=True)
    rows = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, rows)  # a permutation: no collisions
    experts = torch.arange(num_experts, device=order.device)
    offsets = torch.searchsorted(sorted_experts, experts, right=True, out_int32=True)
    return DispatchPlan(order, inverse, offsets)


def sum_rows(rows: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Add up each token's K sorted rows by a gather: (R, D) -> (M, D)."""
    return rows.index_select(0, inverse).view(-1, k, rows.shape[-1]).sum(dim=1)


# ------------------------------------------------------------------------------ router


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Let float32 matmuls on a GPU keep all 24 bits of their factors; TF32 keeps 11."""
    matmul = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        yield
        return
    matmul.allow_tf32 = False  # sets fp32_precision too; the reverse leaves this flag behind
    try:
        yield
    finally:
        matmul.allow_tf32 = True


@torch.library.custom_op("dit_moe::exact_linear", mutates_args=())
def exact_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x @ weight.T in full float32 whatever TF32 says, and its gradients too.

    For routers: what TF32 rounds away makes logits tie and flips choices between experts. A custom
    op, because compiled code takes no notice of a setting that changes on the way.

    Args:
        x: (M, I) and weight: (O, I), float32.

    Returns:
        (M, O).
    """
    with _without_tf32():
        return x @ weight.t()


@exact_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _exact_linear_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _exact_linear_backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    return exact_linear(grad, weight.t()), exact_linear(grad.t(), x.t())


exact_linear.register_autograd(_exact_linear_backward, setup_context=_exact_linear_setup)


# ------------------------------------------------------------------------------ CPU path


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


def _lay_out_rows(expert_weights: Tensor, order: Tensor, offsets: Tensor) -> _Rows:
    num_rows, num_experts = len(order), len(offsets)
    alignment = _row_alignment(num_rows, num_experts, expert_weights.dtype)
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))
    padded_counts = (counts + alignment - 1) // alignment * alignment
    ends, padded_ends = offsets.long(), padded_counts.cumsum(0)
    starts, padded_starts = ends - counts, padded_ends - padded_counts
    expert = torch.arange(num_experts).repeat_interleave(padded_counts)  # (R_pad,)
    within = torch.arange(len(expert)) - padded_starts[expert]  # row within its segment
    real = within < counts[expert]
    source = order[torch.minimum(starts[expert] + within, ends[expert] - 1)]
    weights = expert_weights.flatten()[source].mul_(real)
    row_of_choice = torch.empty_like(order)
    row_of_choice[source[real]] = real.nonzero().squeeze(1)
    spans = zip(padded_starts.tolist(), padded_ends.tolist(), strict=True)
    segments = [(expert, start, end) for expert, (start, end) in enumerate(spans) if end > start]
    return _Rows(segments, source // expert_weights.shape[1], weights[:, None], row_of_choice)


def _swiglu_forward(
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


def _swiglu_backward(
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
    """Differentiate `weights * _swiglu_forward(rows)`; activations come again from `hidden`.

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
    laid = _lay_out_rows(expert_weights, order, offsets)
    out_rows = x.new_empty(len(laid.tokens), x.shape[1])
    num_hidden = _padded_size(len(order), len(offsets), x.dtype) if keep_hidden else 0
    hidden = x.new_empty(2, num_hidden, down_proj.shape[2])
    for expert, start, end in laid.segments:
        rows = x.index_select(0, laid.tokens[start:end])
        kept = hidden[:, start:end] if keep_hidden else None
        _swiglu_forward(rows, gate_up_proj[expert], down_proj[expert], out_rows[start:end], kept)
    out_rows.mul_(laid.weights)
    return sum_rows(out_rows, laid.row_of_choice, expert_weights.shape[1]), hidden


@swiglu_segments.register_fake
def _(x, gate_up_proj, down_proj, expert_weights, order, offsets, keep_hidden):
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
    laid = _lay_out_rows(expert_weights, order, offsets)
    grad_rows = x.new_empty(len(laid.tokens), x.shape[1])
    grad_row_weights = torch.empty_like(laid.weights)
    grad_gate_up = gate_up_proj.new_empty(gate_up_proj.shape)
    grad_down = down_proj.new_empty(down_proj.shape)
    for expert, start, end in laid.segments:
        tokens = laid.tokens[start:end]
        of_weights = _swiglu_backward(
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
def _(grad, x, gate_up_proj, down_proj, expert_weights, order, offsets, hidden):
    return tuple(of.new_empty(of.shape) for of in (x, gate_up_proj, down_proj, expert_weights))


def _segments_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _segments_backward(ctx, grad: Tensor, _grad_hidden: None):
    grads = swiglu_segments_backward(grad.contiguous(), *ctx.saved_tensors)
    return (*grads, None, None, None)


swiglu_segments.register_autograd(_segments_backward, setup_context=_segments_setup)


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
    _swiglu_forward(x, gate_up, down, out, hidden if keep_hidden else None)
    return out, hidden


@swiglu_dense.register_fake
def _(x, gate_up, down, keep_hidden):
    return x.new_empty(x.shape), x.new_empty(2, x.shape[0] if keep_hidden else 0, down.shape[1])


@torch.library.custom_op("dit_moe::swiglu_dense_backward", mutates_args=())
def swiglu_dense_backward(
    grad: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `swiglu_dense`: gradients of x, gate_up and down."""
    grads = x.new_empty(x.shape), gate_up.new_empty(gate_up.shape), down.new_empty(down.shape)
    _swiglu_backward(grad, x, None, gate_up, down, hidden, *grads)
    return grads


@swiglu_dense_backward.register_fake
def _(grad, x, gate_up, down, hidden):
    return tuple(of.new_empty(of.shape) for of in (x, gate_up, down))


def _dense_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:-1], output[1])
    ctx.set_materialize_grads(False)


def _dense_backward(ctx, grad: Tensor, _grad_hidden: None):
    return (*swiglu_dense_backward(grad.contiguous(), *ctx.saved_tensors), None)


swiglu_dense.register_autograd(_dense_backward, setup_context=_dense_setup)


# ------------------------------------------------------------------------------ GPU path


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
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return sum_rows(grad, inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sum each token's K sorted rows; the gradient is a gather too."""

    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return sum_rows(rows, inverse, k)

    @staticmethod
    def backward(ctx, grad: Tensor):
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


# ------------------------------------------------------------------------------ the layer


def swiglu_experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
) -> Tensor:
    """Send every token through its K experts and sum the weighted outputs, dropping none.

    Args:
        x: (M, D) tokens; its dtype is the one computed in.
        gate_up_proj: (E, 2F, D), gate rows above up rows, in any dtype.
        down_proj: (E, D, F), in any dtype.
        expert_indices: (M, K) int64, in [0, E).
        expert_weights: (M, K), in any dtype.

    Returns:
        (M, D): sum_k weight_k * down(silu(gate(x)) * up(x)) of expert k. The weight multiplies the
        hidden activation, which is the same by linearity and saves a pass over the output.

    Source: arXiv:2407.11633, sec. 2.2; SwiGLU: arXiv:2002.05202.
    """
    plan = sort_by_expert(expert_indices, gate_up_proj.shape[0])
    # Outside the ops: the backward uses the same cast.
    gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
    expert_weights = expert_weights.to(x.dtype)
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
) -> Tensor:
    """Do what `swiglu_experts` does for experts with biases and a GELU.

    The biases come in by matmuls with the (row, expert) membership, whose gradients, unlike a
    gather's, are sums in a fixed order.

    Args:
        x: (M, D) tokens; its dtype is the one computed in.
        up_proj: (E, F, D), up_bias: (E, F), down_proj: (E, D, F), down_bias: (E, D), in any dtype.
        expert_indices: (M, K) int64, in [0, E).
        expert_weights: (M, K), in any dtype.

    Returns:
        (M, D): sum_k weight_k * (down(gelu(up(x) + up_bias)) + down_bias) of expert k, the GELU
        being the tanh approximation.
    """
    num_experts, k = up_proj.shape[0], expert_indices.shape[1]
    plan = sort_by_expert(expert_indices, num_experts)
    weights = (up_proj, up_bias, down_proj, down_bias, expert_weights)
    up_proj, up_bias, down_proj, down_bias, expert_weights = (w.to(x.dtype) for w in weights)
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
