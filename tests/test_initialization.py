"""Every parameter starts from its published distribution, whatever the order of drawing."""

import dataclasses
import math
from typing import Any, Literal

import helpers
import pytest
import torch
from torch import Tensor

from models import (
    DiT,
    initialize_parameter,
)

TINY = dataclasses.replace(helpers.TINY, num_classes=10)


def assert_uniform(weight: Tensor, bound: float) -> None:
    """Check largest entry and spread of a matrix that should be uniform in [-bound, bound]."""
    assert 0.97 * bound < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    standard_error = bound / math.sqrt(3 * weight.numel())
    assert weight.mean().item() == pytest.approx(0.0, abs=4 * standard_error)


def test_every_matrix_starts_from_its_published_distribution():
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(TINY, hidden_size=64, depth=1))
    parameters = dict(model.named_parameters())

    def xavier(fan_in: int, fan_out: int) -> float:
        return math.sqrt(6 / (fan_in + fan_out))

    moe: Any = model.get_submodule("blocks.0.moe")
    for gate_up, down in zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True):
        for matrix in (*gate_up.chunk(2), down):
            assert_uniform(matrix, xavier(64, 256))
    for matrix in (
        *moe.shared_experts.gate_up_proj.weight.chunk(2),
        moe.shared_experts.down_proj.weight,
    ):
        assert_uniform(matrix, xavier(64, 128))
    assert_uniform(moe.router.weight, 1 / math.sqrt(64))
    assert_uniform(parameters["blocks.0.attn.qkv.weight"], xavier(64, 3 * 64))
    assert_uniform(parameters["blocks.0.attn.proj.weight"], xavier(64, 64))
    assert_uniform(parameters["x_embedder.proj.weight"], xavier(4 * 2 * 2, 64))
    for name in ("y_embedder.embedding_table", "t_embedder.mlp.0", "t_embedder.mlp.2"):
        assert parameters[f"{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1)
    biases = [p for name, p in parameters.items() if name.endswith("bias")]
    assert len(biases) == 10
    assert not any(bias.any() for bias in biases)


def test_gelu_experts_start_each_as_linear_maps_of_its_own_with_zero_biases():
    torch.manual_seed(0)
    model = DiT(dataclasses.replace(TINY, hidden_size=64, depth=1, mlp_type="gelu"))
    moe: Any = model.get_submodule("blocks.0.moe")
    experts, shared = moe.experts, moe.shared_experts
    matrices = [*experts.up_proj, *experts.down_proj]  # (4D, D) and (D, 4D) of each expert
    for matrix in matrices:
        assert_uniform(matrix, math.sqrt(6 / (64 + 256)))
    for matrix in (shared.fc1.weight, shared.fc2.weight):
        assert_uniform(matrix, math.sqrt(6 / (64 + 128)))
    assert len({matrix.flatten()[0].item() for matrix in matrices}) == 2 * TINY.num_experts
    for bias in (experts.up_bias, experts.down_bias, shared.fc1.bias, shared.fc2.bias):
        assert not bias.any()


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
@torch.no_grad()
def test_initial_values_depend_on_the_generator_alone(mlp_type: Literal["swiglu", "gelu"]):
    model = DiT(dataclasses.replace(TINY, mlp_type=mlp_type))
    state = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            initialize_parameter(name, parameter.fill_(torch.nan), generator)
        draws.append({name: p.clone() for name, p in model.named_parameters()})
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = draws
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        is_drawn = value.std() > 0 and name != "pos_embed"
        assert torch.equal(value, other[name]) != is_drawn, name
