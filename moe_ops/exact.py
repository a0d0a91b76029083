"""The router's matmul: full float32 on every GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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


def _exact_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _exact_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return exact_linear(grad, weight.t()), exact_linear(grad.t(), x.t())


exact_linear.register_autograd(_exact_linear_backward, setup_context=_exact_linear_setup)
