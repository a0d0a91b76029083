"""What times and classes do to a model, computed once for all steps and images of a picture.

`evaluation_times` are the times at which a sampler calls its model, `known_conditions` lends the
model tables of them: a row of conditioning is looked up by its number, not computed from t and y.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffusion import Diffusion
from models import DiT

MOST_BYTES = 2**30  # of all tables; beyond it each step computes its own rows


def evaluation_times(
    diffusion: Diffusion, *, sampler: str | None, num_steps: int | None, learn_sigma: bool
) -> list[float]:
    """Return the model times of all calls, falling, by sampling a latent of one pixel.

    Args:
        diffusion: the objective.
        sampler: as in `Diffusion.sample`.
        num_steps: likewise.
        learn_sigma: whether its models also predict a variance.
    """
    times: set[float] = set()

    def model(x: Tensor, t: Tensor, _y: Tensor) -> Tensor:
        times.add(t.item())
        return torch.cat([x, torch.zeros_like(x)], dim=1) if learn_sigma else x

    # Real sampling, since what a model gets is float32: its times are these, bit for bit.
    latent, label = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    diffusion.sample(model, latent, label, sampler=sampler, num_steps=num_steps)
    return sorted(times, reverse=True)


class _StepNumber(nn.Module):
    """In place of `t_embedder`: (N,) times to the number of the first row of each one's step."""

    def __init__(self, times: Tensor, num_labels: int) -> None:
        super().__init__()
        self.times, self.num_labels = times, num_labels  # (S,) fp32, rising

    def forward(self, t: Tensor) -> Tensor:
        return torch.searchsorted(self.times, t) * self.num_labels


class _LabelNumber(nn.Module):
    """In place of the label embedding: (N,) labels to their numbers within a step."""

    def __init__(self, labels: Tensor, num_labels: int) -> None:
        super().__init__()
        numbers = torch.zeros(num_labels, dtype=torch.long, device=labels.device)
        self.numbers = numbers.scatter(0, labels, torch.arange(len(labels), device=labels.device))

    def forward(self, y: Tensor) -> Tensor:
        return self.numbers[y]


class _Row(nn.Module):
    """In place of an adaLN's: (N,) numbers to rows of what it makes of all conditionings."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, number: Tensor) -> Tensor:
        return self.table.index_select(0, number)


@contextmanager
def known_conditions(
    model: DiT, times: Sequence[float], labels: Sequence[int], most_bytes: int = MOST_BYTES
) -> Iterator[None]:
    """Let a model look its conditioning up, while it is called at these times and labels only.

    The rows are those that it would compute, but for the order in which a matmul of another height
    adds up. Where the tables would be larger than `most_bytes`, nothing changes.

    Args:
        model: in eval mode, all of it on one device.
        times: at which it will be called, each row of a batch at any of them.
        labels: that it will be given, the null label among them if there is guidance by it.
        most_bytes: of all tables.
    """
    layers = [*model.blocks, model.final_layer]
    linears: list[Any] = [layer.adaLN_modulation[-1] for layer in layers]
    rows = len(times) * len(labels)
    if rows * sum(linear.out_features for linear in linears) * model.dtype.itemsize > most_bytes:
        yield
        return
    device = linears[0].weight.device
    t = torch.tensor(sorted(times), dtype=torch.float32, device=device)  # (S,)
    y = torch.tensor(labels, device=device)  # (L,)
    table = model.y_embedder.embedding_table
    with torch.no_grad():
        c = (model.t_embedder(t)[:, None] + table(y)).flatten(0, 1)  # (S L, D)
        found = [_Row(layer.adaLN_modulation(c)) for layer in layers]
    lent: list[tuple[Any, str, nn.Module]] = [
        (model, "t_embedder", _StepNumber(t, len(labels))),
        (model.y_embedder, "embedding_table", _LabelNumber(y, model.config.num_classes + 1)),
        *((layer, "adaLN_modulation", row) for layer, row in zip(layers, found, strict=True)),
    ]
    with ExitStack() as back:
        for owner, name, module in lent:
            back.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, module.eval())
        yield
