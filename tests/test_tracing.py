"""Which expert took which patch: a trace says what the router said, in every family."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import TINY_DIGITS, moe_of, random_model

from diffusion import create_diffusion
from models import DiT, DiTConfig
from routing import RoutingRecorder
from routing.tracing import (
    Place,
    RoutingTracer,
    layers_of,
    pairs_of,
    patches_per_expert,
    ranked_experts,
    trace_bytes,
)

DEEP = dataclasses.replace(TINY_DIGITS, depth=12, learn_sigma=False)
FAMILIES = {
    "token choice": DEEP,
    "one expert a token": dataclasses.replace(DEEP, num_experts_per_tok=1),
    "first blocks dense": dataclasses.replace(DEEP, first_k_dense_replace=5),
    "expert choice": dataclasses.replace(DEEP, selection="expert_choice", balance=()),
    "batch choice": dataclasses.replace(
        DEEP, selection="batch_choice", balance=(), moe_blocks="deep_half"
    ),
    "prototypes": dataclasses.replace(
        DEEP,
        affinity="cosine",
        balance=("contrastive",),
        unconditional_expert=True,
        moe_blocks="every_second",
        mlp_type="gelu",
    ),
}
NAN = float("nan")


def drawn(
    tracer: Any, model: DiT, *, cfg_scale: float = 1.5, sampler: str = "euler"
) -> torch.Tensor:
    """Draw two digits in three steps, guided while t > 0.5."""
    config = model.config
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return create_diffusion("rf").sample(
        tracer,
        noise,
        torch.tensor([3, 7]),
        num_steps=3,
        sampler=sampler,
        cfg_scale=cfg_scale,
        null_label=config.null_label,
        cfg_interval=(0.5, 1.0),
        callback=getattr(tracer, "at_step", None),
    )


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_a_trace_has_the_experts_and_weights_that_every_router_chose(config: DiTConfig) -> None:
    model = random_model(config)
    seen: list[tuple[int, Any]] = []  # (block, routing) of every call
    for block in layers_of(config):
        moe_of(model, block).router.register_forward_hook(
            lambda _m, _i, routing, block=block: seen.append((block, routing))
        )
    tracer = RoutingTracer(model, num_steps=3, num_pictures=2)
    drawn(tracer, model)
    trace, layers = tracer.trace, layers_of(config)
    assert trace.layers == layers and len(seen) == 3 * len(layers)
    for call, (block, routing) in enumerate(seen):
        step, layer = call // len(layers), layers.index(block)
        for row, (indices, weights) in enumerate(
            zip(routing.expert_indices, routing.expert_weights, strict=True)
        ):
            half, rest = divmod(row, 2 * config.num_patches)
            picture, patch = divmod(rest, config.num_patches)
            expected = torch.full((config.num_all_experts,), NAN)
            for expert, weight in zip(indices.tolist(), weights.half().float(), strict=True):
                if expert < config.num_all_experts:
                    expected[expert] = weight
            found = trace.at(Place(picture, step, layer, half))[patch]
            assert torch.equal(found.nan_to_num(9), expected.nan_to_num(9))


def test_a_trace_says_at_which_steps_guidance_ran_the_pictures_without_a_class() -> None:
    model = random_model(DEEP)
    tracer = RoutingTracer(model, 3, 2)
    drawn(tracer, model)
    assert tracer.trace.ran.tolist() == [[True, True, True], [True, True, False]]
    assert tracer.trace.at(Place(step=2, half=1)).isnan().all()


def test_of_a_step_with_two_model_calls_the_first_is_noted() -> None:
    model = random_model(DEEP)
    euler, heun = RoutingTracer(model, 3, 2), RoutingTracer(model, 3, 2)
    drawn(euler, model)
    drawn(heun, model, sampler="heun")
    assert torch.equal(euler.trace.at(Place()).isnan(), heun.trace.at(Place()).isnan())


def test_a_tracer_draws_what_the_model_draws_and_leaves_no_hook() -> None:
    model = random_model(DEEP)
    alone = drawn(model, model)
    assert torch.equal(drawn(RoutingTracer(model, 3, 2), model), alone)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_call_that_fails_leaves_no_hook() -> None:
    model = random_model(DEEP)
    tracer = RoutingTracer(model, 1, 1)
    with pytest.raises(IndexError):
        tracer(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.tensor([99]))
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_is_drawn_and_has_no_layers() -> None:
    model = random_model(dataclasses.replace(DEEP, num_experts=0))
    tracer = RoutingTracer(model, 3, 2)
    drawn(tracer, model)
    assert tracer.trace.layers == [] and tracer.trace.ran[0].all()


@pytest.mark.parametrize("name", ["token choice", "expert choice", "prototypes"])
def test_a_trace_agrees_with_the_recorder_of_expert_data(name: str) -> None:
    config = FAMILIES[name]
    model = random_model(config)
    recorder = RoutingRecorder(model, num_steps=3)
    recorder.begin(torch.tensor([3, 7]), 0)
    drawn(model_with(recorder, model), model)
    recorder.remove()
    tracer = RoutingTracer(model, 3, 2)
    drawn(tracer, model)
    for half in (0, 1):
        counts = (~tracer.trace.weights[half].isnan()).sum(dim=(2, 3))  # (S, L, E)
        assert torch.equal(counts, recorder.tables["by_step"][half])


def model_with(recorder: RoutingRecorder, model: DiT) -> Any:
    """Return the model as a sampler's callable that carries the recorder's callback."""

    class Both:
        at_step = staticmethod(recorder.at_step)

        def __call__(self, *inputs: Any) -> Any:
            return model(*inputs)

    return Both()


def test_the_memory_of_a_trace_is_told_before() -> None:
    model = random_model(DEEP)
    weights = RoutingTracer(model, 3, 2).trace.weights
    assert trace_bytes(DEEP, 3, 2) == weights.nbytes == 2 * (2 * 3 * 12 * 2 * 4 * 4)


# ------------------------------------------------------------------------------ weights of a place

# Three patches: two experts, none, and all three with one weight below 0.
WEIGHTS = torch.tensor([[0.2, NAN, 0.7], [NAN, NAN, NAN], [0.1, -0.3, 0.0]])


def test_patches_are_counted_by_expert_and_by_pair() -> None:
    assert patches_per_expert(WEIGHTS).tolist() == [2, 1, 2]
    assert pairs_of(WEIGHTS).tolist() == [[2, 1, 2], [1, 1, 1], [2, 1, 2]]


def test_experts_of_a_patch_come_heaviest_first_and_may_be_none() -> None:
    assert ranked_experts(WEIGHTS) == [[2, 0], [], [0, 2, 1]]


def test_the_weights_of_a_patch_over_the_steps_are_those_at_each_step() -> None:
    model = random_model(DEEP)
    tracer = RoutingTracer(model, 3, 2)
    drawn(tracer, model)
    place = Place(picture=1, layer=7)
    history = tracer.trace.over_steps(place, 2)
    for step in range(3):
        at_step = tracer.trace.at(place._replace(step=step))[2]
        assert torch.equal(history[step].nan_to_num(9), at_step.nan_to_num(9))
