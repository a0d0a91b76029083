"""Key maps of published layouts, and the config that shapes tell."""

import pytest
import torch
from torch import Tensor

from checkpoint.layouts import infer_config, to_ours, to_published
from models import DiT, DiT_models, DiTConfig

TINY = DiTConfig(
    input_size=4, hidden_size=16, depth=2, num_heads=2, num_classes=3, num_experts=4, qk_norm=True
)


def tiny_state(**overrides: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return DiT(DiTConfig.from_dict({**TINY.to_dict(), **overrides})).state_dict()


@pytest.mark.parametrize(
    ("flash_attention", "attention"), [(True, "attn.Wqkv"), (False, "attn.qkv")]
)
def test_published_layouts_invert_to_our_layout(flash_attention: bool, attention: str) -> None:
    state = tiny_state()
    published = dict(to_published(state, flash_attention=flash_attention))
    assert published[f"blocks.1.{attention}.weight"].shape == (48, 16)
    assert published["blocks.1.moe.experts.3.up_proj.weight"].shape == (64, 16)
    assert published["blocks.1.moe.gate.weight"].shape == (4, 16)
    torch.testing.assert_close(dict(to_ours(published)), state, rtol=0, atol=0)


def test_our_layout_passes_unchanged_and_without_a_copy() -> None:
    state = tiny_state()
    ours = dict(to_ours(state))
    assert {name: tensor.data_ptr() for name, tensor in ours.items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_compile_are_dropped(prefix: str) -> None:
    state = tiny_state()
    wrapped = {prefix + name: tensor for name, tensor in state.items()}
    assert list(dict(to_ours(wrapped))) == list(state)


def test_unknown_names_are_shown_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"encoder\.weight.*expected x_embedder"):
        dict(to_ours({"encoder.weight": torch.zeros(1)}))


def test_a_missing_expert_matrix_is_named_in_the_error() -> None:
    published = dict(to_published(tiny_state(), flash_attention=False))
    del published["blocks.1.moe.experts.2.down_proj.weight"]
    with pytest.raises(ValueError, match=r"blocks\.1\.moe\.experts\.2\.down_proj\.weight"):
        dict(to_ours(published))


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/8", "DiT-XL/4", "DiT-G/2"])
def test_config_of_published_sizes_is_read_from_shapes(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    assert infer_config(model.state_dict()) == model.config


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_shared_experts": 0, "learn_sigma": False, "in_channels": 1, "mlp_ratio": 2.0},
        {"num_experts": 0, "mlp_type": "gelu"},
        {"num_experts": 0, "mlp_type": "swiglu", "input_size": 8},
    ],
)
def test_config_of_variants_is_read_from_shapes(overrides: dict[str, object]) -> None:
    expected = DiTConfig.from_dict({**TINY.to_dict(), **overrides})
    assert infer_config(tiny_state(**overrides)) == expected


def test_heads_that_shapes_do_not_tell_must_be_given() -> None:
    state = tiny_state(qk_norm=False)
    with pytest.raises(ValueError, match=r"num_heads.*16.*config="):
        infer_config(state)
    assert infer_config(state, {"num_heads": 4}).num_heads == 4


def test_known_fields_win_over_published_defaults() -> None:
    assert infer_config(tiny_state()).num_experts_per_tok == 2
    assert infer_config(tiny_state(), {"num_experts_per_tok": 1}).num_experts_per_tok == 1
