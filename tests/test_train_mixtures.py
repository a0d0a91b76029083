"""Every choice of the mixture is a flag: it reaches the network, its losses and its state."""

import argparse
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model, refusal
from launch import TINY_RUN
from torch.testing import assert_close

from checkpoint.state import save_safetensors
from common.errors import UserError
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import Job, prepare
from training.loop import micro_loss
from training.resume import check_resumable
from training.settings import NETWORK_FLAGS

PROMOE = ("--affinity", "cosine", "--balance", "contrastive", "--unconditional-expert")
DIFFMOE = ("--selection", "batch_choice", "--balance", "z_loss")
DSMOE = ("--affinity", "sigmoid", "--balance", "bias", "--norm-topk-prob")


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, "--max-steps", "4", *flags])


def job_of(folder: Path, *flags: str, meta: bool = True) -> Job:
    return prepare(parse("--results-dir", str(folder), *flags), meta=meta)


def batch_of(size: int = 8) -> Any:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size, 1, 8, 8, generator=generator)
    return latents, torch.arange(size), {"t": torch.linspace(0.1, 0.9, size)}


# ------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        (PROMOE, {"affinity": "cosine", "balance": ("contrastive",), "unconditional_expert": True}),
        (DIFFMOE, {"selection": "batch_choice", "balance": ("z_loss",), "exact_thresholds": False}),
        (DSMOE, {"affinity": "sigmoid", "balance": ("bias",), "norm_topk_prob": True}),
        (("--balance", "switch", "z_loss"), {"balance": ("switch", "z_loss")}),
        (
            ("--selection", "expert_choice", "--balance", "none", "--capacity", "1.5"),
            {"selection": "expert_choice", "balance": (), "capacity": 1.5},
        ),
        (
            ("--moe-blocks", "every_second", "--dense-mlp-ratio", "2", "--mlp-type", "gelu"),
            {"moe_blocks": "every_second", "dense_mlp_ratio": 2.0, "mlp_type": "gelu"},
        ),
        (
            ("--first-k-dense-replace", "1", "--routed-scaling-factor", "2.5"),
            {"first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "balance": ("switch",)},
        ),
        (("--qk-norm", "--qk-norm-eps", "1e-5"), {"qk_norm": True, "qk_norm_eps": 1e-5}),
    ],
)
def test_a_flag_is_the_field_of_its_name(
    flags: tuple[str, ...], fields: dict[str, Any], tmp_path: Path
) -> None:
    config = job_of(tmp_path, *flags).model.config
    assert {name: getattr(config, name) for name in fields} == fields


def test_every_choice_of_the_mixture_is_a_flag() -> None:
    assert set(NETWORK_FLAGS) <= set(vars(parse()))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--selection", "expert_choice"), "'switch' means nothing with selection='expert_choice'"),
        (("--affinity", "cosine", "--balance", "z_loss"), "'z_loss' means nothing with affinity="),
        (("--capacity", "2"), "capacity=2.0 means nothing with selection='token_choice'"),
        (("--balance", "none", "switch"), "--balance none switch: none goes with no other"),
        (("--rf", "False", "--time-scale", "1000"), "--time-scale 1000 means nothing without --rf"),
        (("--moe-blocks", "every_second", "--num-experts", "0"), "means nothing with num_experts"),
    ],
)
def test_choices_that_mean_nothing_are_refused(
    flags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        job_of(tmp_path, *flags)


def test_a_refusal_is_one_line() -> None:
    line = refusal("train.py", *TINY_RUN, "--dry-run", "--selection", "expert_choice")
    assert "--model DiT-Ti/2: DiTConfig: balance=('switch',)" in line


def test_the_time_scale_reaches_the_objective_and_the_settings(tmp_path: Path) -> None:
    job = job_of(tmp_path, "--time-scale", "1000")
    assert job.diffusion.time_scale == job.settings.to_dict()["time_scale"] == 1000.0
    assert job_of(tmp_path).diffusion.time_scale == 1.0
    assert job_of(tmp_path, "--rf", "False").settings.time_scale is None


@pytest.mark.parametrize(("scope", "pooled"), [("global", True), ("rank", False)])
def test_statistics_are_of_all_ranks_or_of_each(scope: str, pooled: bool, tmp_path: Path) -> None:
    model: Any = job_of(tmp_path, "--aux-loss-scope", scope).model
    assert all(block.moe.router.pooled == pooled for block in model.blocks)


# ------------------------------------------------------------------------------ losses and state


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        (("--balance", "switch", "--aux-loss-weight", "0.25"), {"aux_loss": 0.25}),
        ((*PROMOE, "--contrastive-loss-weight", "0.5"), {"contrastive_loss": 0.5}),
        (
            (*DIFFMOE, "--z-loss-weight", "0.125", "--capacity-loss-weight", "2"),
            {"z_loss": 0.125, "capacity_loss": 2.0},
        ),
        (DSMOE, {}),
    ],
)
def test_each_loss_is_weighted_once_and_logged_by_its_name(
    flags: tuple[str, ...], weights: dict[str, float], tmp_path: Path
) -> None:
    job = job_of(tmp_path, *flags, meta=False)
    job.model.train()
    losses = micro_loss(job, job.model, batch_of())
    assert set(losses.parts) == {"loss", *weights}
    expected = losses.parts["loss"]
    for name, weight in weights.items():
        assert losses.parts[name] > 0
        expected = expected + weight * job.model.config.depth * losses.parts[name]
    assert_close(losses.total.detach(), expected)


def test_the_bias_moves_at_its_rate_and_is_the_averages_too(tmp_path: Path) -> None:
    trainer = DdpTrainer(job_of(tmp_path, *DSMOE, "--bias-update-rate", "0.25", meta=False))
    trainer.train_step([batch_of()])
    for name, value in trainer.model.state_dict().items():
        if name.endswith("expert_bias"):
            steps = value - value.max()  # +-0.25 (or 0), then centred
            assert set(steps.tolist()) <= {0.0, -0.25, -0.5} and value.abs().max() > 0
            assert torch.equal(trainer.ema.model.state_dict()[name], value)


# ------------------------------------------------------------------------------ going on


def test_checkpoints_of_before_these_flags_resume_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = job_of(tmp_path)
    settings, config = job.settings.to_dict(), job.model.config.to_dict()
    first = ("loss_weight", "bias_update_rate", "aux_loss_scope", "time_scale", *NETWORK_FLAGS[4:])
    old = {name: v for name, v in settings.items() if not name.endswith(first)}
    old["aux_loss_weight"] = settings["aux_loss_weight"]
    later = ("affinity", "selection", "capacity", "balance", "moe_blocks", "dense_mlp_ratio")
    with caplog.at_level(logging.WARNING):
        check_resumable(job, Path("run"), {n: v for n, v in config.items() if n not in later}, old)
    assert not caplog.records


def test_a_run_does_not_go_on_with_another_mixture_or_time_scale(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = job_of(tmp_path, *DSMOE)
    saved = before.model.config.to_dict(), before.settings.to_dict()
    with pytest.raises(UserError, match="trained with another affinity, balance; give the same"):
        check_resumable(job_of(tmp_path, "--norm-topk-prob"), Path("run"), *saved)
    with pytest.raises(UserError, match="trained with another time_scale; give the same"):
        check_resumable(job_of(tmp_path, *DSMOE, "--time-scale", "1000"), Path("run"), *saved)
    check_resumable(job_of(tmp_path, *DSMOE, "--bias-update-rate", "1"), Path("run"), *saved)
    assert "--bias-update-rate was 0.001, is 1.0" in caplog.text


def test_a_run_starts_with_the_mixture_and_time_scale_of_its_file(tmp_path: Path) -> None:
    fields = {"affinity": "cosine", "balance": ("contrastive",), "unconditional_expert": True}
    start = job_of(tmp_path, *PROMOE)
    model = random_model(start.model.config)
    path = tmp_path / "w.safetensors"
    save_safetensors(path, model.state_dict(), model.config, {"objective": "rf", "time_scale": 9.0})
    job = job_of(tmp_path, "--init-from", str(path), "--balance", "contrastive", "bias", meta=False)
    assert {n: getattr(job.model.config, n) for n in fields} == fields | {
        "balance": ("contrastive", "bias")
    }
    assert job.settings.time_scale == job.diffusion.time_scale == 9.0
    state = job.model.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    assert all(not value.any() for name, value in state.items() if name.endswith("expert_bias"))
