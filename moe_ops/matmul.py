"""Grouped matmuls: every expert's segment of rows by that expert's matrix.

`place_offsets` is the one place that chooses how; `grouped_linear` and `grouped_outer` follow. With
the segments' ends beside the rows it is torch's own kernel, which no value on the host steers; with
the ends on the host, one plain matmul a segment, which is as fast on a CPU and far faster than the
loop that torch's grouped matmul is on a GPU without that kernel. So a layer reads the host once at
most, forward and backward.

Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def native_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether torch has one kernel for it: bfloat16 on compute capability 9.x and 10.x."""
    if device.type != "cuda" or dtype != torch.bfloat16 or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def expert_matmuls(device: torch.device, dtype: torch.dtype) -> str:
    """Name what the experts' matmuls run as, for a log."""
    if native_grouped_mm(device, dtype):
        return "one grouped matmul for all experts"
    return "one matmul an expert" + " and a wait for the GPU" * (device.type == "cuda")


def place_offsets(offsets: Tensor, rows: Tensor) -> Tensor:
    """Leave the ends of segments (E,) where they are for the native kernel, else read them here."""
    return offsets if native_grouped_mm(rows.device, rows.dtype) else offsets.cpu()


def _on_host(offsets: Tensor) -> bool:
    return offsets.device.type == "cpu"


def _segments(offsets: Tensor) -> Iterator[tuple[int, int]]:
    """Yield start and end of every expert's segment."""
    ends = offsets.tolist()
    return zip([0, *ends], ends, strict=False)


def _step(length: int, rows: Tensor) -> int:
    """Return what a segment's length is rounded to a multiple of, a sixteenth of it at most.

    oneDNN compiles a kernel for every new shape of half-precision matrices, a millisecond and a
    megabyte or two each, and the loads change at every step: this leaves 16 shapes an octave.
    """
    return 1 if rows.dtype == torch.float32 else max(16, 2 ** (length - 1).bit_length() // 32)


@torch.library.custom_op("dit_moe::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply each expert's segment of rows by that expert's matrix: rows_e @ weight_e.T.

    A custom op, because bare `grouped_mm` compiles in bfloat16 only.

    Args:
        rows: (R, I) sorted by expert.
        weight: (E, O, I), same dtype as the rows.
        offsets: (E,) int32, end of each segment, of `place_offsets`.

    Returns:
        (R, O), contiguous; rows after the last segment are whatever they are.
    """
    if not _on_host(offsets):
        return F.grouped_mm(rows, weight.transpose(-2, -1), offs=offsets)
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for matrix, (start, end) in zip(weight, _segments(offsets), strict=True):
        if end > start:
            # The rows behind a segment are the next one's, whose matmul comes later and writes
            # them again; where there are not enough of them, rows before it are computed aside.
            padded = start + -(-(end - start) // (step := _step(end - start, rows))) * step
            if padded <= len(rows):
                torch.mm(rows[start:padded], matrix.t(), out=out[start:padded])
            else:
                first = max(0, start + len(rows) - padded)
                out[start:end] = torch.mm(rows[first:], matrix.t())[start - first : end - first]
    return out


@grouped_linear.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


@torch.library.custom_op("dit_moe::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Sum grad_r x rows_r over each expert's segment: the weight gradient of `grouped_linear`.

    Args:
        grad: (R, O) and rows: (R, I), both sorted by expert.
        offsets: (E,) int32, as there.

    Returns:
        (E, O, I); zero for an expert without rows.
    """
    if not _on_host(offsets):
        return F.grouped_mm(grad.t(), rows, offs=offsets)
    out = rows.new_empty(len(offsets), grad.shape[1], rows.shape[1])
    for total, (start, end) in zip(out, _segments(offsets), strict=True):
        if end == start:
            total.zero_()
            continue
        over = (end - start) % _step(end - start, rows)
        torch.mm(grad[start : end - over].t(), rows[start : end - over], out=total)
        if over:  # zeros round it up
            padding = (0, 0, 0, _step(end - start, rows) - over)
            tails = [F.pad(tensor[end - over : end], padding) for tensor in (grad, rows)]
            total.addmm_(tails[0].t(), tails[1])
    return out


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
