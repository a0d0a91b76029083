"""ProMoE's, EC-DiT's and DiffMoE's files: recognised, loaded, and written back as they were."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import FAMILIES, GOLDEN, GOLDEN_FIELDS, config_of, golden_model, randomize
from torch import Tensor

from checkpoint.families import has_family, to_family
from checkpoint.hub import our_blocks, save_file, save_folder, save_published
from checkpoint.layouts import known_fields, to_ours
from checkpoint.weights import load_model, open_weights
from common.errors import UserError
from diffusion import create_diffusion
from models import DiT, DiT_models

goldens = pytest.mark.parametrize("name", GOLDEN_FIELDS)


def golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.pt", weights_only=True)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@goldens
def test_a_published_file_with_its_config_is_all_that_is_needed(name: str):
    model, data = load_model(GOLDEN / f"{name}.pt"), golden(name)
    expected = dataclasses.asdict(golden_model(name)[0].config)
    found = dataclasses.asdict(model.config)
    for config in (expected, found):  # two spellings of the mean number of experts
        config["capacity"] = config["capacity"] or config["num_experts_per_tok"]
        config["num_experts_per_tok"] = 0
    assert found == expected
    assert model.settings == {"objective": "rf", "time_scale": 1000.0}
    with torch.inference_mode():
        prediction = model(data["x"], data["t"], data["y"])
    torch.testing.assert_close(prediction, data["outputs"]["forward"], atol=1e-5, rtol=0)


@goldens
def test_a_training_checkpoint_has_two_sets_of_weights_and_needs_to_be_told_little(
    name: str, tmp_path: Path
):
    state = golden(name)["state_dict"]
    content: dict[str, Any] = {
        "model_state_dict": {f"module.{n}": tensor + 1 for n, tensor in state.items()},
        "ema_model_state_dict": state,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
        "step": 7,
    }
    for decay in (n for n in state if n.endswith("ema_decay")):  # not a weight
        content["model_state_dict"][f"module.{decay}"] = state[decay]
    torch.save(content, tmp_path / "checkpoint.pt")
    known: dict[str, Any] = {"num_heads": 4}  # a width that no published model has
    if name == "promoe_ec_4E":
        known["selection"] = "expert_choice"
    if name == "ecdit_4E":
        known["capacity"] = 2.0
    averaged = load_model(tmp_path / "checkpoint.pt", known=known)
    trained = load_model(tmp_path / "checkpoint.pt", ema=False, known=known)
    assert_same(averaged.state_dict(), dict(to_ours(state)))
    assert torch.equal(trained.pos_embed, averaged.pos_embed + 1)
    assert open_weights(tmp_path / "checkpoint.pt", known=known).kind == "averaged"
    data = golden(name)
    prediction = averaged(data["x"], data["t"], data["y"])
    torch.testing.assert_close(prediction, data["outputs"]["forward"], atol=1e-5, rtol=0)


@goldens
def test_published_layout_to_ours_and_back_is_the_identity(name: str, tmp_path: Path):
    state = golden(name)["state_dict"]
    assert_same(dict(to_family(dict(to_ours(state)))), state)
    weights = open_weights(GOLDEN / f"{name}.pt")
    save_published(tmp_path / "x.pt", weights, flash_attention=False, dtype=None)
    written = torch.load(tmp_path / "x.pt", weights_only=True)
    assert_same(written["ema_model_state_dict"], state)
    again = load_model(tmp_path / "x.pt")
    assert again.config == weights.config and again.settings == dict(weights.settings)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_with_its_state_survives_our_own_layouts(family: str, tmp_path: Path):
    """Twelve blocks; biases and thresholds are saved like weights."""
    model = randomize(DiT(config_of(family, depth=12, moe_blocks="every_second")))
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.arange(4) / 7 + len(name))
    model.settings = {"objective": "rf", "time_scale": 1000.0}
    model.save_pretrained(tmp_path / "folder")
    expected = model.state_dict()
    weights = open_weights(tmp_path / "folder")
    save_file(tmp_path / "x.safetensors", our_blocks(weights, None), model.config, model.settings)
    save_folder(tmp_path / "again", our_blocks(weights, None), model.config, model.settings)
    for path in ("folder", "x.safetensors", "again"):
        found = load_model(tmp_path / path)
        assert found.config == model.config and found.settings == model.settings
        assert_same(found.state_dict(), expected)
    half = load_model(tmp_path / "folder", dtype=torch.bfloat16)
    for name, buffer in half.named_buffers():
        assert torch.equal(buffer, expected[name])


@pytest.mark.parametrize("name", [n for n in DiT_models if not n.startswith("DiT-")])
def test_registered_sizes_are_read_from_the_shapes_of_their_published_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with torch.device("meta"):
        config = DiT_models[name]().config
        small = dataclasses.replace(config, depth=2)
        state = dict(to_family(DiT(small).state_dict()))
    monkeypatch.setattr("checkpoint.weights.load_torch", lambda _: {"ema_model_state_dict": state})
    is_dict = lambda content: isinstance(content, dict)  # noqa: E731
    monkeypatch.setattr("checkpoint.weights._is_state_dict", is_dict)
    monkeypatch.setattr("torch.allclose", lambda *_: True)  # the decay has no value on meta
    found = open_weights(tmp_path / "x.pt", known=known_fields(name)).config
    assert has_family(found) and found == small


def test_an_epsilon_of_norms_that_are_not_there_is_no_other_mixture():
    """A recipe on a size of DiT-MoE, whose epsilon is another."""
    config = config_of("promoe")
    assert not config.qk_norm
    assert has_family(dataclasses.replace(config, qk_norm_eps=1e-6))
    assert not has_family(dataclasses.replace(config, qk_norm=True, qk_norm_eps=1e-6))


@pytest.mark.parametrize("family", ["dsmoe", "two_slots"])
def test_a_mixture_that_no_published_code_has_is_not_written_in_their_layout(
    family: str, tmp_path: Path
):
    model = DiT(config_of(family))
    model.save_pretrained(tmp_path / "folder")
    weights = open_weights(tmp_path / "folder")
    with pytest.raises(UserError, match=r"write a \.safetensors or a folder"):
        save_published(tmp_path / "x.pt", weights, flash_attention=False, dtype=None)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("norm_topk_prob", True, "norm_topk_prob True, only False"),
        ("router_weight_mode", "softmax", "router_weight_mode softmax, only identity"),
    ],
)
def test_a_published_config_that_our_routers_do_not_compute_is_refused(
    field: str, value: object, message: str, tmp_path: Path
):
    content = golden("promoe_tc_6E1A")
    content["published_config"]["MoE_config"][field] = value
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "x.pt")


def test_another_decay_of_thresholds_is_refused(tmp_path: Path):
    content = golden("diffmoe_4E")
    content["state_dict"]["blocks.3.mlp.ema_decay"] += 0.01
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"blocks\.3\.mlp\.ema_decay is .*only 0\.95"):
        load_model(tmp_path / "x.pt")


def test_a_missing_matrix_of_an_expert_is_named(tmp_path: Path):
    content = golden("ecdit_4E")
    del content["state_dict"]["blocks.3.mlp.experts.2.fc2.bias"]
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"blocks\.3\.mlp\.experts\.2\.fc2\.bias"):
        load_model(tmp_path / "x.pt")


# -- time scale


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_the_unit_of_time_changes_what_the_model_sees_and_nothing_else(sampler: str):
    """A model that divides its time by 1000 draws what one in units of 1 draws."""
    seen: list[float] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(t[0].item())
        return x * (t / 1000).view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1)

    def unscaled(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, 1000 * t, y)

    noise, y = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    given: dict[str, Any] = {"sampler": sampler, "num_steps": 4, "cfg_scale": 2.0}
    given |= {"null_label": 5, "cfg_interval": (0.2, 0.8)}
    steps: list[float] = []
    scaled = create_diffusion("rf", time_scale=1000.0)
    found = scaled.sample(model, noise, y, callback=lambda _, t: steps.append(t), **given)
    assert seen[0] == 1000.0 and steps == [1.0, 0.75, 0.5, 0.25]
    torch.testing.assert_close(found, create_diffusion("rf").sample(unscaled, noise, y, **given))


def test_training_times_are_scaled_for_the_model_and_mix_as_before():
    latents, y = torch.randn(64, 4, 4, 4), torch.zeros(64, dtype=torch.long)
    seen = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.append((x, t))
        return x, {}

    for scale in (1.0, 1000.0):
        generator = torch.Generator().manual_seed(0)
        diffusion = create_diffusion("rf", time_scale=scale)
        diffusion.training_loss(model, latents, y, generator=generator)
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert torch.equal(1000 * seen[0][1], seen[1][1]) and 100 < seen[1][1].mean() < 900


def test_time_scales_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="time_scale must be positive, got 0"):
        create_diffusion("rf", time_scale=0.0)
    with pytest.raises(ValueError, match=r"time_scale 1000.0: only rectified flow"):
        create_diffusion("ddpm", time_scale=1000.0)
