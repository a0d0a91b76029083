"""Flags become a job, steps become curves, and a run folder says what is in it."""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from launch import TINY_RUN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from checkpoint.state import checkpoint_path, save_safetensors
from checkpoint.weights import load_model
from common.errors import UserError
from models import DiT_models
from routing import LoadCounter
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.initial import initial_weights
from training.job import Ema, Job, build_model, describe, prepare
from training.loop import launch
from training.optimization import learning_rate
from training.reporter import Reporter, draw_grid, load_scalars
from training.settings import TrainSettings

DEPTH, NUM_EXPERTS = 4, 4  # of TINY_RUN


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, *flags])


def tiny_job(results: Path, *flags: str) -> Job:
    return prepare(parse("--results-dir", str(results), "--max-steps", "4", *flags))


def settings(*flags: str) -> TrainSettings:
    return prepare(parse(*flags), meta=True).settings


def train(results: Path, *flags: str) -> Path:
    launch(parse("--results-dir", str(results), *flags), DdpTrainer)
    return results / "run"


def read_curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every point of every curve, as TensorBoard shows them."""
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


# ------------------------------------------------------------------------------ flags


def test_the_same_seed_gives_the_same_initial_weights_and_another_seed_others(
    tmp_path: Path,
) -> None:
    router = "blocks.0.moe.router.weight"
    first, second, other = (
        tiny_job(tmp_path, "--seed", seed).model.state_dict()[router] for seed in "113"
    )
    assert torch.equal(first, second) and not torch.equal(first, other)


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_a_run_draws_one_by_one_the_weights_that_dit_draws_as_a_whole(mlp_type: str) -> None:
    model = DiT_models["DiT-Ti/2"](input_size=8, num_experts=4, mlp_type=mlp_type)
    torch.manual_seed(3)
    model.initialize_weights()
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    drawn = dict(initial_weights(settings("--seed", "3"), model.config, shapes))
    assert_close(drawn, dict(model.state_dict()), rtol=0, atol=0)


def test_a_fresh_run_starts_from_the_weights_of_init_from(tmp_path: Path) -> None:
    source = tiny_job(tmp_path, "--seed", "5").model
    save_safetensors(tmp_path / "w.safetensors", source.state_dict(), source.config, {})
    started = tiny_job(tmp_path, "--init-from", str(tmp_path / "w.safetensors")).model
    assert_close(started.state_dict(), source.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"--init-from .*w\.safetensors has num_experts 4"):
        tiny_job(tmp_path, "--init-from", str(tmp_path / "w.safetensors"), "--num-experts", "2")


def test_an_image_size_that_the_vae_cannot_divide_is_refused() -> None:
    odd = dataclasses.replace(settings(), image_size=20)
    with pytest.raises(UserError, match="--image-size 20 is not a multiple of 8"):
        build_model(odd, latent_channels=4, downsample=8)


def test_the_description_counts_all_and_activated_parameters(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    text = describe(job)
    total = sum(p.numel() for p in job.model.parameters())
    one_expert = 3 * 96 * 48  # gate, up, down
    assert f"{total:,} total, {total - DEPTH * 2 * one_expert:,} activated" in text
    assert json.loads(text[: text.index("\n}") + 2])["num_experts"] == NUM_EXPERTS


def test_the_learning_rate_warms_up_linearly_then_stays() -> None:
    warm = settings("--lr", "0.4", "--warmup-steps", "4")
    assert [learning_rate(warm, step) for step in range(6)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]
    )
    assert learning_rate(settings("--lr", "0.4"), 0) == 0.4


# ------------------------------------------------------------------------------ EMA


def test_ema_starts_as_the_model_is_frozen_and_leaves_the_position_table() -> None:
    model = DiT_models["DiT-Ti/4"](input_size=8, in_channels=1, num_classes=3, num_experts=2)
    ema = Ema(model, 0.5)
    assert_close(ema.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    before = {name: value.clone() for name, value in ema.model.state_dict().items()}
    ema.update()
    for name, value in ema.model.state_dict().items():
        assert_close(value, before[name] + (0.0 if name == "pos_embed" else 0.5))


# ------------------------------------------------------------------------------ curves and grids


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    flags = ("--log-every", "2", "--ckpt-every", "2", "--sample-every", "4", "--max-steps", "4")
    return train(tmp_path_factory.mktemp("short"), *flags)


def test_curves_have_every_documented_tag(short_run: Path) -> None:
    curves = read_curves(short_run)
    tags = {f"train/{name}" for name in ("loss", "aux_loss", "grad_norm", "lr")}
    tags |= {f"system/{n}" for n in ("images_per_second", "tflops_per_second", "peak_memory_gib")}
    tags |= {f"time/{phase}" for phase in ("data", "step", "save", "draw")}
    for measure in ("entropy", "max_vio", "dead"):
        tags.add(f"experts/{measure}")
        tags |= {f"experts/{measure}/layer_{layer:02d}" for layer in range(DEPTH)}
    assert set(curves) == tags
    assert all([step for step, _ in curve] == [2, 4] for curve in curves.values())
    assert all(math.isfinite(value) for curve in curves.values() for _, value in curve)
    assert all(0.9 < value < NUM_EXPERTS for _, value in curves["train/aux_loss"])
    assert all(0 < value <= 1 for _, value in curves["experts/entropy"])
    assert curves["train/lr"][0][1] == pytest.approx(0.001)


def test_a_run_folder_has_settings_log_weights_and_samples(short_run: Path) -> None:
    assert json.loads((short_run / "args.json").read_text())["num_experts"] == NUM_EXPERTS
    log = (short_run / "log.txt").read_text()
    assert "step 4: loss" in log and "parameters:" in log and "done:" in log
    assert load_model(short_run).config.num_experts == NUM_EXPERTS
    with Image.open(short_run / "samples" / "0000004.png") as grid:
        assert grid.size == (10 * 66 + 2, 6 * 66 + 2 + 18)  # 64 px, 2 between, names above


def test_steps_done_again_after_a_kill_appear_once_in_the_curves(tmp_path: Path) -> None:
    flags = ("--log-every", "1", "--ckpt-every", "2", "--max-steps", "4")
    run = train(tmp_path, *flags)
    checkpoint_path(run, 4).unlink()  # as if killed before it was written
    train(tmp_path, *flags)
    assert [step for step, _ in read_curves(run)["train/loss"]] == [1, 2, 3, 4]


def test_a_point_is_the_mean_of_the_steps_since_the_last(tmp_path: Path) -> None:
    with Reporter(tiny_job(tmp_path), 0) as reporter:
        for loss in (1.0, 2.0, 6.0, 8.0):
            reporter.add(loss=torch.tensor(loss), grad_norm=torch.tensor(0.5))
            if loss in (2.0, 8.0):
                reporter.log(2 if loss == 2.0 else 4, lr=0.1)
    assert read_curves(tmp_path / "run")["train/loss"] == [(2, 1.5), (4, 7.0)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_a_number_stops_the_run(
    name: str, precision: str, tmp_path: Path
) -> None:
    values = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(1.0)}
    with Reporter(tiny_job(tmp_path, "--precision", precision), 0) as reporter:
        reporter.add(**values)
        reporter.add(**values | {name: torch.tensor(torch.nan)})
        said = f"the {name} is nan after step 2; .*lower --lr"
        with pytest.raises(FloatingPointError, match=said):
            reporter.log(2, lr=0.1)


def test_steps_whose_gradient_overflows_float16_are_counted_apart(tmp_path: Path) -> None:
    with Reporter(tiny_job(tmp_path, "--precision", "fp16"), 0) as reporter:
        reporter.skip()
        reporter.add(loss=torch.tensor(1.0), grad_norm=torch.tensor(0.5))
        reporter.skip()
        reporter.log(1, lr=0.1)
    curves = read_curves(tmp_path / "run")
    assert curves["train/skipped_steps"] == [(1, 2.0)] and curves["train/loss"] == [(1, 1.0)]


def test_load_curves_tell_even_from_collapsed_layers() -> None:
    model = DiT_models["DiT-Ti/4"](input_size=8, num_experts=4, depth=2)
    counter = LoadCounter(model)
    counter.counts.copy_(torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]]))
    scalars = load_scalars(counter)
    assert scalars["experts/entropy/layer_00"] == pytest.approx(1.0)
    assert scalars["experts/entropy/layer_01"] == pytest.approx(0.0)
    assert scalars["experts/max_vio"] == pytest.approx(1.5)  # of 0 and 3
    assert scalars["experts/dead/layer_01"] == 3


def test_load_curves_are_of_routed_experts_and_called_by_the_number_of_their_block() -> None:
    model = DiT_models["ProMoE-S/2"](input_size=4, hidden_size=64, num_heads=2, num_experts=4)
    counter = LoadCounter(model)
    assert counter.counts.shape == (6, 5)
    counter.counts.copy_(torch.tensor([5, 5, 5, 5, 7]))  # 7 tokens of images without a class
    scalars = load_scalars(counter)
    assert scalars["experts/entropy"] == pytest.approx(1.0)
    assert scalars["experts/max_vio"] == scalars["experts/dead"] == 0
    layers = [name for name in scalars if name.startswith("experts/dead/")]
    assert layers == [f"experts/dead/layer_{block:02d}" for block in range(1, 12, 2)]


def test_a_dense_model_has_no_load_curves() -> None:
    model = DiT_models["DiT-Ti/4"](input_size=8, num_experts=0, depth=1)
    assert load_scalars(LoadCounter(model)) == {}


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_drawing_a_grid_repeats_itself_and_leaves_the_random_state_alone(
    objective: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = tiny_job(tmp_path, "--model", "DiT-Ti/4", "--rf", str(objective == "rf"))
    state = torch.get_rng_state()
    model = job.model.eval()
    first = draw_grid(model, job, 1).read_bytes()
    assert draw_grid(model, job, 2).read_bytes() == first
    assert torch.equal(torch.get_rng_state(), state)
    assert "samples: " in caplog.text


def test_sampling_and_logging_do_not_change_the_training(tmp_path: Path) -> None:
    run = ("--model", "DiT-Ti/4", "--max-steps", "3")
    busy = ("--log-every", "1", "--ckpt-every", "1", "--sample-every", "2")
    first, second = (
        load_model(train(tmp_path / name, *run, *flags), ema=False).state_dict()
        for name, flags in (("quiet", ()), ("busy", busy))
    )
    assert_close(first, second, rtol=0, atol=0)
