"""The network and both objectives against the published code's tensors, tests/golden/README.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint.layouts import to_ours
from checkpoint.weights import load_model
from diffusion import TrainingLoss, create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from models import (
    DiTConfig,
    Routing,
    TopKRouter,
)

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", ["ddpm_timm_attn_4E2A", "rf_flash_attn_qknorm_4E2A"])
def test_published_weights_predict_and_choose_experts_as_published(name: str, tmp_path: Path):
    golden = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    torch.save(golden["state_dict"], tmp_path / "weights.pt")
    model = load_model(tmp_path / "weights.pt", config=DiTConfig(**golden["config"]))
    layers: list[Routing] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _, args, routing: layers.append(routing))
    with torch.inference_mode():
        prediction = model(golden["x"], golden["t"], golden["y"])
    outputs = golden["outputs"]
    torch.testing.assert_close(prediction, outputs["forward"], atol=1e-5, rtol=0)
    indices, order = torch.stack([layer.expert_indices for layer in layers]).sort(dim=-1)
    weights = torch.stack([layer.expert_weights for layer in layers]).gather(-1, order)
    published, published_order = outputs["topk_idx"].sort(dim=-1)
    assert torch.equal(indices, published)
    expected = outputs["topk_weight"].gather(-1, published_order)
    torch.testing.assert_close(weights, expected, atol=1e-5, rtol=0)


class Golden:
    """Published weights in our model, and what the published code computes with them."""

    def __init__(self, name: str, folder: Path) -> None:
        tensors = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
        torch.save(tensors["state_dict"], folder / "weights.pt")
        self.model = load_model(folder / "weights.pt", config=DiTConfig(**tensors["config"]))
        self.null_label = tensors["config"]["num_classes"]
        self.diffusion = create_diffusion(tensors["objective"])
        self.sampling, self.training = tensors["sampling"], tensors["training"]

    def sample(self, **settings: Any) -> Tensor:
        noise, y = self.sampling["z"], self.sampling["cond"]
        return self.diffusion.sample(self.model, noise, y, null_label=self.null_label, **settings)

    def training_loss(self) -> TrainingLoss:
        latents, y, t, noise = (self.training[name] for name in ("x0", "y", "t", "noise"))
        keep_labels = torch.zeros(len(y), dtype=torch.bool)
        return self.diffusion.training_loss(
            self.model.train(), latents, y, t=t, noise=noise, drop_mask=keep_labels
        )


@pytest.fixture
def golden_ddpm(tmp_path: Path) -> Golden:
    return Golden("ddpm_timm_attn_4E2A", tmp_path)


@pytest.fixture
def golden_rf(tmp_path: Path) -> Golden:
    return Golden("rf_flash_attn_qknorm_4E2A", tmp_path)


@pytest.fixture(params=["golden_ddpm", "golden_rf"])
def golden(request: pytest.FixtureRequest) -> Golden:
    return request.getfixturevalue(request.param)


def assert_agrees(actual: Tensor, expected: Tensor) -> None:
    """Compare to 1e-5, absolute or, where values exceed 1, relative to the largest."""
    tolerance = 1e-5 * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_ddim_with_guidance_on_three_channels_samples_as_published(golden_ddpm: Golden):
    samples = golden_ddpm.sample(sampler="ddim", num_steps=25, cfg_scale=2.0)
    # Up to 606 as random weights are no denoiser: float32 itself is coarser than 1e-5 there.
    assert_agrees(samples, golden_ddpm.sampling["ddim_25steps_cfg2.0_first3_noclip"])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_ancestral_step_has_the_published_mean_and_variance(golden_ddpm: Golden, index: int):
    expected, x_t = (
        golden_ddpm.sampling["p_mean_variance_25steps"][index],
        golden_ddpm.sampling["z"],
    )
    diffusion = golden_ddpm.diffusion
    assert isinstance(diffusion, GaussianDiffusion)
    timesteps, levels = diffusion.respace(25)
    t = torch.full((len(x_t),), float(timesteps[expected["index"]]))
    with torch.no_grad():
        prediction = golden_ddpm.model(x_t, t, golden_ddpm.sampling["cond"])
    back = diffusion.p_mean_variance(levels.at(expected["index"]), prediction, x_t)
    assert timesteps == golden_ddpm.sampling["timestep_map"].tolist()
    assert_agrees(back.mean, expected["mean"])
    assert_agrees(back.log_variance, expected["log_variance"])
    assert_agrees(back.x0, expected["pred_xstart"])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("rf_euler_10steps_cfg3.0", {"num_steps": 10, "cfg_scale": 3.0}),
        ("rf_euler_50steps_cfg1.0_nocfg", {}),
    ],
)
def test_euler_samples_as_published(golden_rf: Golden, name: str, settings: dict[str, Any]):
    assert_agrees(golden_rf.sample(**settings), golden_rf.sampling[name])


def test_loss_of_each_sample_is_the_published_one(golden: Golden):
    loss = golden.training_loss()
    assert_agrees(loss.per_sample.detach(), golden.training["per_sample"])
    for name, term in loss.terms.items():
        assert_agrees(
            term, golden.training.get(f"per_sample_{name}", golden.training["per_sample"])
        )


def test_aux_loss_is_the_sum_of_the_published_layers(golden: Golden):
    published = golden.training["aux_loss_per_layer_alpha0.01"].sum()
    assert_agrees(0.01 * golden.training_loss().aux_losses["switch"].detach(), published)


def test_gradient_of_every_parameter_is_the_published_one(golden: Golden):
    loss = golden.training_loss()
    (loss.per_sample.mean() + 0.01 * loss.aux_losses["switch"]).backward()
    expected = dict(to_ours(golden.training["grads_of_mean_loss_plus_sum_aux"]))
    trained = {name: p.grad for name, p in golden.model.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    for name, gradient in trained.items():
        # On paper 0 for k_norm.bias, which moves all scores of a query alike: rounding is left.
        largest = max(expected[name].abs().max().item(), 2e-5)
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], atol=1e-5 * largest, rtol=0, msg=name)
