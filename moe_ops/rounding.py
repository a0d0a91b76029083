"""Weights rounded once a step to what the matmuls compute in, instead of once in every forward."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

KEY = "rounded"  # in the __dict__ of a weight: its copy


class _StandIn(torch.autograd.Function):
    """Return the copy of a weight; the gradient is the weight's."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.to(ctx.dtype), None


@contextmanager
def rounded_once(weights: Iterable[Tensor], dtype: torch.dtype) -> Iterator[None]:
    """Keep a copy in `dtype` beside each weight within a `with`, in which no weight may change.

    It has to end before the optimizer's step: torch's fused one leaves no trace of what it changes.
    """
    weights = [weight for weight in weights if weight.dtype != dtype]
    copies = [torch.empty_like(weight, dtype=dtype, requires_grad=False) for weight in weights]
    if weights:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
    for weight, copy in zip(weights, copies, strict=True):
        weight.__dict__[KEY] = copy
    try:
        yield
    finally:
        for weight in weights:
            del weight.__dict__[KEY]


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in `dtype`: its copy within `rounded_once`."""
    if weight.dtype == dtype or torch.compiler.is_compiling():  # a compiler fuses the cast
        return weight.to(dtype)
    copy = weight.__dict__.get(KEY)
    if copy is None or copy.dtype != dtype:
        return weight.to(dtype)
    return _StandIn.apply(weight, copy)
