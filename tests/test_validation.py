"""What is held out, by names that never move, and the loss on it as a curve."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, run_main, save_autoencoder, save_image_folder
from launch import TINY_RUN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

import encode_latents
from checkpoint.state import checkpoint_path, load_checkpoint
from common import process
from common.errors import UserError
from data import load_dataset, load_vae
from data.datasets import hold_out
from data.latent_cache import CachedLatents
from models import DiTConfig
from sampling.loss import loss_on_images
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import Job, prepare
from training.loop import launch

DEEP = DiTConfig(
    input_size=8, patch_size=4, in_channels=1, hidden_size=32, depth=12, num_heads=2,
    num_classes=10, num_experts=4, mlp_ratio=1.0,
)  # fmt: skip


def names_of(dataset: Any) -> set[str]:
    return {"/".join(path.split("/")[-2:]) for path in dataset.paths}


def test_which_images_are_held_out_does_not_move_when_others_come(tmp_path: Path) -> None:
    folder = save_image_folder(tmp_path / "images", 3, 40, lambda *_: (8, 8))
    learnt, held = hold_out(load_dataset(folder, image_size=8), 0.2)
    assert 10 <= len(held) <= 40 and len(learnt) + len(held) == 120
    assert not names_of(learnt) & names_of(held)
    for name in ("0a", "zz"):
        Image.new("RGB", (8, 8)).save(folder / "class1" / f"{name}.png")
    Image.new("RGB", (8, 8)).save(folder / "class0" / "0.png")  # content does not count
    more_learnt, more_held = hold_out(load_dataset(folder, image_size=8), 0.2)
    new = {"class1/0a.png", "class1/zz.png"}
    assert names_of(more_held) - new == names_of(held)
    assert names_of(more_learnt) - new == names_of(learnt)
    assert more_learnt.fingerprint() != learnt.fingerprint()
    with pytest.raises(UserError, match=r"--val-fraction 1e-09 of 122 images leaves 0 to validate"):
        hold_out(load_dataset(folder, image_size=8), 1e-9)


def test_a_cache_holds_out_what_its_images_do_and_digits_do_by_content(tmp_path: Path) -> None:
    folder = save_image_folder(tmp_path / "images", 2, 20, lambda *_: (16, 16))
    vae = save_autoencoder(tmp_path / "vae", "tiny")
    flags = ("--data-path", folder, "--vae-path", vae, "--image-size", 16, "--num-workers", 0)
    run_main(encode_latents, *flags, "--out", tmp_path / "cache", "--shard-size", 7)
    images, cache = load_dataset(folder, image_size=16), CachedLatents(tmp_path / "cache")
    assert np.array_equal(images.keys(), cache.keys())
    for ours, theirs in zip(hold_out(images, 0.3), hold_out(cache, 0.3), strict=True):
        assert ours.fingerprint() == theirs.fingerprint()
        keys = [(i, i % 2 == 0) for i in range(len(ours))]
        pixels, labels = ours.__getitems__(keys)
        loaded = load_vae(vae, device="cpu")
        expected = ours.latents(pixels, loaded)
        moments, cached = theirs.__getitems__(keys)
        assert torch.equal(labels, cached)
        assert_close(theirs.latents(moments, loaded), expected, rtol=1e-2, atol=1e-3)
    digits = load_dataset("digits")
    held = hold_out(digits, 0.1)[1]
    again = hold_out(digits.select(torch.arange(len(digits)).flip(0)), 0.1)[1]
    order = torch.arange(len(held))
    assert torch.equal(held.pixels(order), again.pixels(order.flip(0)))


def test_the_loss_of_twelve_blocks_is_the_same_every_time_and_draws_nothing() -> None:
    model, rt = random_model(DEEP), process.Runtime(0, 1, torch.device("cpu"))
    job = job_of("--val-path", "test")
    assert job.val is not None

    def loss() -> float:
        assert job.val is not None
        return loss_on_images(
            model, job.diffusion, job.val, job.vae, rt, num_images=50, num_draws=2
        )

    state = torch.get_rng_state()
    first = loss()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert loss() == first > 0


def job_of(*flags: str) -> Job:
    return prepare(build_parser(None).parse_args([*TINY_RUN, *flags]), meta=True)


def test_validation_is_a_curve_and_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    def train(name: str, *flags: str) -> dict[str, Any]:
        words = [*TINY_RUN, "--results-dir", str(tmp_path / name), "--max-steps", "3", *flags]
        launch(build_parser(None).parse_args(words), DdpTrainer)
        return load_checkpoint(checkpoint_path(tmp_path / name / "run", 3))

    judged = train("judged", "--val-path", "test", "--val-every", "2")
    plain = train("plain")
    for part in ("model", "ema", "optimizer", "rng"):
        assert_close(judged[part], plain[part], rtol=0, atol=0)
    curves = EventAccumulator(str(tmp_path / "judged" / "run")).Reload()
    points = [(point.step, point.value) for point in curves.Scalars("val/loss")]
    assert [step for step, _ in points] == [2, 3] and all(0 < value < 10 for _, value in points)
    log = (tmp_path / "judged" / "run" / "log.txt").read_text()
    assert re.search(r"step 2: val/loss \d", log) and "300 more are held out" in log


def test_validation_images_are_matched_by_class_and_refused_where_they_do_not_fit(
    tmp_path: Path,
) -> None:
    data = save_image_folder(tmp_path / "images", 3, 4, lambda *_: (16, 16))
    other = save_image_folder(tmp_path / "other", 1, 2, lambda *_: (16, 16))
    (other / "class0").rename(other / "class2")
    words = ["--data-path", str(data), "--vae-path", "none", "--image-size", "16"]
    words += ["--model", "DiT-Ti/4", "--rf", "--global-batch-size", "4", "--val-path"]

    def val(*flags: str) -> Job:
        return prepare(build_parser(None).parse_args([*words, *flags]), meta=True)

    found = val(str(other)).val
    assert found is not None and found.labels.tolist() == [2, 2]
    with pytest.raises(UserError, match="--val-path and --val-fraction: give one of them"):
        val(str(other), "--val-fraction", "0.1")
    with pytest.raises(UserError, match=f"--val-path test: --data-path {data} has no test split"):
        val("test")
    (other / "class2").rename(other / "unknown")
    with pytest.raises(UserError, match=r"--val-path .*other has the class 'unknown'"):
        val(str(other))
