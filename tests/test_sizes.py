"""Registered sizes: their published parameter counts, and what a patch size changes."""

from typing import Any

import pytest
import torch

from models import (
    PATCH_SIZES,
    DiT_models,
)


@pytest.mark.parametrize(
    ("name", "overrides", "total", "activated"),
    [
        ("DiT-S/2", {}, 199_307_552, 71.9e6),
        ("DiT-S/2", {"num_experts": 16}, 369_213_728, 71.9e6),
        ("DiT-B/2", {}, 795_861_536, 286.3e6),
        ("DiT-L/2", {}, 2_823_764_000, 1.012e9),
        ("DiT-XL/2", {}, 4_168_172_192, 1.493e9),
        ("DiT-G/2", {}, 16_503_731_232, 3.182e9),
    ],
)
def test_published_sizes_have_their_published_parameter_counts(
    name: str, overrides: dict[str, Any], total: int, activated: float
):
    with torch.device("meta"):
        counts = DiT_models[name](**overrides).num_parameters()
    assert counts == (total, pytest.approx(activated, rel=1e-3))


@pytest.mark.parametrize("name", [name for name in DiT_models if name.startswith("DiT-")])
def test_patch_size_changes_only_the_two_ends_of_a_registered_size(name: str):
    size, patch_size = name.removeprefix("DiT-").split("/")
    with torch.device("meta"):
        model, sibling = DiT_models[name](), DiT_models[f"DiT-{size}/{PATCH_SIZES[size][0]}"]()
    D, P = model.config.hidden_size, int(patch_size)
    ends = {
        "pos_embed": (1, (32 // P) ** 2, D),
        "x_embedder.proj.weight": (D, 4, P, P),
        "final_layer.linear.weight": (P * P * 8, D),
        "final_layer.linear.bias": (P * P * 8,),
    }
    shapes = {name: tuple(p.shape) for name, p in sibling.named_parameters()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes | ends


@pytest.mark.parametrize(
    ("name", "total", "activated"),
    [
        ("ProMoE-S/2", 75_537_424, 32_987_152),
        ("ProMoE-B/2", 300_595_216, 130_560_016),
        ("ProMoE-L/2", 1_062_668_304, 458_246_160),
        ("ProMoE-XL/2", 1_567_715_344, 675_320_848),
        ("ProMoE-EC-L/2", 1_062_668_304, 458_246_160),
        ("EC-DiT-L/2", 1_163_257_872, 458_184_720),
        ("DiffMoE-B/2", 332_459_584, 134_117_440),
        ("DiffMoE-L/2", 1_175_951_472, 470_878_320),
        ("DiffMoE-XL/2", 1_734_978_944, 693_964_928),
    ],
)
def test_published_sizes_of_later_families(name: str, total: int, activated: int):
    with torch.device("meta"):
        assert DiT_models[name]().num_parameters() == (total, activated)
