"""Which expert took which patch of a few pictures, at every step of drawing them.

`RoutingTracer` stands for a model and notes what its routers decide while it runs. What it has
noted, a `RoutingTrace`, is asked at a `Place`: a picture, a step, a layer, with its class or
without. `patches_per_expert`, `pairs_of` and `ranked_experts` are about the weights found there.

Shapes: S steps, L layers with experts, N pictures, T patches, E experts. The first axis of length 2
is conditional, unconditional, see `tables.HALVES`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import DiT, DiTConfig, Routing
from routing.counting import mixtures_of
from routing.tables import UNCONDITIONAL


class Place(NamedTuple):
    """Where to look in a trace; all count from 0."""

    picture: int = 0
    step: int = 0
    layer: int = 0  # among those with experts
    half: int = 0  # 1: without its class


class RoutingTrace:
    """What the routers decided for every patch.

    Attributes:
        layers: numbers of the L blocks that have experts; none in a dense model.
        weights: (2, S, L, N, T, E) float16, NaN where an expert was not chosen. A weight may be 0
            or, as a cosine, below.
        ran: (2, S) bool, whether the pictures ran through the network at that step.
    """

    def __init__(self, config: DiTConfig, num_steps: int, num_pictures: int) -> None:
        self.config, self.layers = config, layers_of(config)
        shape = _shape(config, num_steps, num_pictures)
        self.weights = torch.full(shape, math.nan, dtype=torch.float16)
        self.ran = torch.zeros(2, num_steps, dtype=torch.bool)

    @property
    def expert_names(self) -> list[str]:
        """Return what charts call the E experts: numbers, and `tables.UNCONDITIONAL`."""
        names = [str(expert) for expert in range(self.config.num_experts)]
        return [*names, UNCONDITIONAL] if self.config.unconditional_expert else names

    def at(self, place: Place) -> Tensor:
        """Return the weights (T, E) fp32 at a place, NaN where an expert was not chosen."""
        return self.weights[place.half, place.step, place.layer, place.picture].float()

    def over_steps(self, place: Place, patch: int) -> Tensor:
        """Return the weights (S, E) fp32 of one patch at every step."""
        return self.weights[place.half, :, place.layer, place.picture, patch].float()


class RoutingTracer:
    """A model that notes its routers' decisions; samplers call it as they would the model.

    Its hooks are there during a call only, so the model is nobody's afterwards, however it ends.
    """

    def __init__(self, model: DiT, num_steps: int, num_pictures: int) -> None:
        """Make an empty trace.

        Args:
            model: in eval mode; called with N pictures or 2N: with their class, then without.
            num_steps: S.
            num_pictures: N.
        """
        self.model, self.trace = model, RoutingTrace(model.config, num_steps, num_pictures)
        self._num_pictures, self._step = num_pictures, 0

    def at_step(self, step: int, _t: float = 0.0) -> None:
        """Say which step the next call belongs to; give it to a sampler as its callback."""
        self._step = step

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the model's prediction; of a step's calls the first is noted, at the step's t."""
        if self.trace.ran[0, self._step]:
            return self.model(x, t, y)
        halves = len(x) // self._num_pictures
        hooks = [
            child.register_forward_hook(self._make_hook(layer, halves))
            for layer, mixture in enumerate(mixtures_of(self.model))
            for child in mixture.children()
        ]
        try:
            prediction = self.model(x, t, y)
        finally:
            for hook in hooks:
                hook.remove()
        self.trace.ran[:halves, self._step] = True
        return prediction

    def _make_hook(self, layer: int, halves: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Any) -> None:
            if isinstance(routing, Routing):
                indices, weights = routing.expert_indices, routing.expert_weights.float()
                num_experts = routing.probs.shape[1]
                # (M, E), without the last column, where empty slots go
                chosen = weights.new_full((len(indices), num_experts + 1), math.nan)
                chosen = chosen.scatter_(1, indices, weights)[:, :num_experts]
                noted = self.trace.weights[:halves, self._step, layer]  # (1 or 2, N, T, E)
                noted.copy_(chosen.view_as(noted))

        return hook


def layers_of(config: DiTConfig) -> list[int]:
    """Return the numbers of the blocks that have experts."""
    return [block for block in range(config.depth) if config.is_moe_block(block)]


def trace_bytes(config: DiTConfig, num_steps: int, num_pictures: int) -> int:
    """Return the memory that a trace takes."""
    return 2 * math.prod(_shape(config, num_steps, num_pictures))


def _shape(config: DiTConfig, num_steps: int, num_pictures: int) -> tuple[int, ...]:
    of_one = (num_pictures, config.num_patches, config.num_all_experts)
    return (2, num_steps, len(layers_of(config)), *of_one)


# ------------------------------------------------------------------------------ weights of a place


def patches_per_expert(weights: Tensor) -> Tensor:
    """Count the patches of each expert: (T, E) weights -> (E,) int64."""
    return (~weights.isnan()).sum(dim=0)


def pairs_of(weights: Tensor) -> Tensor:
    """Count the patches that chose both of two experts: (T, E) -> (E, E) int64.

    The diagonal has the patches of the one.
    """
    chosen = (~weights.isnan()).float()
    return (chosen.T @ chosen).long()


def ranked_experts(weights: Tensor) -> list[list[int]]:
    """Return the experts of each of T patches, the heaviest first: (T, E) -> T lists of 0 to E."""
    order = weights.nan_to_num(nan=-math.inf).argsort(dim=1, descending=True, stable=True)
    counts = (~weights.isnan()).sum(dim=1).tolist()
    return [row[:count] for row, count in zip(order.tolist(), counts, strict=True)]
