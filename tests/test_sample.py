"""A checkpoint becomes a picture: ours and published, by seed, label and sampler."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import save_tiny_vae
from PIL import Image
from torch import nn

from checkpoint import checkpoint_path, save_checkpoint, save_safetensors
from layouts import to_published
from models import DiT, DiT_models, DiTConfig
from sample import build_parser, main

CONFIG = DiTConfig(
    input_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=3, num_experts=4
)
SETTINGS = {"objective": "rf", "vae_path": "none", "class_names": ["ant", "bee", "cat"]}
CELL = 64 + 2  # pixels: small images are enlarged to 64, with a frame of 2 between


def random_model(config: DiTConfig) -> DiT:
    model = DiT(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder whose EMA weights differ from the trained ones."""
    model = random_model(CONFIG)
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(
        checkpoint_path(folder, 1),
        config=CONFIG,
        settings=SETTINGS,
        model={name: 2 * value for name, value in model.state_dict().items()},
        ema=model.state_dict(),
        optimizer={},
        scaler=None,
        step=1,
        rng=[],
    )
    return folder


def sample(ckpt: Path, out: Path, *flags: str) -> np.ndarray:
    """Run the script in float32 with few steps; returns the picture (height, width, 3)."""
    given = ["--ckpt", str(ckpt), "--out", str(out), "--dtype", "fp32"]
    main(build_parser().parse_args([*given, "--num-sampling-steps", "2", *flags]))
    with Image.open(out) as image:
        return np.array(image)


def assert_refused(message: str, ckpt: Path, out: Path, *flags: str) -> None:
    with pytest.raises(SystemExit, match=message):
        sample(ckpt, out, *flags)
    assert not out.exists()


# ------------------------------------------------------------------------------ ours


def test_a_run_folder_becomes_a_grid_with_one_class_a_column(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = sample(run, tmp_path / "new" / "grid.png", "--num-per-class", "2")
    assert picture.shape == (2 * CELL + 2, 3 * CELL + 2, 3)
    assert "6 images, one class a column, rf" in capsys.readouterr().out


def test_the_seed_decides_every_bit(run: Path, tmp_path: Path) -> None:
    first, again, other = (
        sample(run, tmp_path / "grid.png", "--num-per-class", "1", "--seed", seed) for seed in "001"
    )
    assert (first == again).all() and (first != other).any()


def test_batches_only_divide_the_work(run: Path, tmp_path: Path) -> None:
    flags = ("--num-per-class", "2")
    whole = sample(run, tmp_path / "grid.png", *flags).astype(int)
    parts = sample(run, tmp_path / "grid.png", *flags, "--batch-size", "4").astype(int)
    assert abs(whole - parts).max() <= 1  # of 255: matmuls round by batch size


def test_labels_are_numbers_or_names(run: Path, tmp_path: Path) -> None:
    flags = ("--num-per-class", "1", "--labels")
    by_name = sample(run, tmp_path / "grid.png", *flags, "cat", "ant")
    by_number = sample(run, tmp_path / "grid.png", *flags, "2", "0")
    assert by_name.shape == (CELL + 2, 2 * CELL + 2, 3)
    assert (by_name == by_number).all()


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("--ema", "False"),
        ("--cfg-scale", "4"),
        ("--sampler", "heun"),
        ("--num-sampling-steps", "3"),
        ("--cfg-interval", "0 0.1"),
    ],
)
def test_every_sampling_flag_changes_the_picture(
    flag: str, other: str, run: Path, tmp_path: Path
) -> None:
    flags = ("--num-per-class", "1", "--cfg-scale", "2")
    first = sample(run, tmp_path / "first.png", *flags)
    second = sample(run, tmp_path / "second.png", *flags, flag, *other.split())
    assert (first != second).any()


def test_safetensors_of_ours_tell_the_objective_and_the_names(run: Path, tmp_path: Path) -> None:
    save_safetensors(
        tmp_path / "w.safetensors", random_model(CONFIG).state_dict(), CONFIG, SETTINGS
    )
    flags = ("--num-per-class", "1", "--labels", "bee")
    ours = sample(tmp_path / "w.safetensors", tmp_path / "a.png", *flags)
    assert (ours == sample(run, tmp_path / "b.png", *flags)).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "dog"], r"--labels dog: expected a number in \[0, 2\] or one of ant, bee"),
        (["--labels", "3"], r"--labels 3: expected a number in \[0, 2\]"),
        (["--labels", "-1"], r"--labels -1: expected a number in \[0, 2\]"),
        (["--rf", "False"], "--rf False: .* was trained with rf"),
        (["--model", "DiT-S/2"], "--model DiT-S/2 has hidden_size 384, .* has 32"),
        (["--num-classes", "1000"], "--num-classes 1000: .* has 3"),
        (["--num_experts", "8"], "--num-experts 8: .* has 4"),
        (["--num_experts_per_tok", "1"], "--num-experts-per-tok 1: .* has 2"),
        (["--image-size", "256"], "--image-size 256: .* has 8"),
        (["--sampler", "ddim"], "sampler must be one of euler, heun; got 'ddim'"),
        (["--cfg-interval", "0.9", "0.1"], "cfg_interval must be 0 <= low <= high <= 1"),
        (["--vae-path", "nowhere"], "--vae-path nowhere is not a folder"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(
    flags: list[str], message: str, run: Path, tmp_path: Path
) -> None:
    assert_refused(message, run, tmp_path / "grid.png", *flags)


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    assert_refused("no such file: .*nowhere", tmp_path / "nowhere", tmp_path / "grid.png")
    (tmp_path / "text.pt").write_text("no weights")
    assert_refused("text.pt is not a readable", tmp_path / "text.pt", tmp_path / "grid.png")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_dtype_without_kernels_on_this_cpu_says_what_it_computes_in(
    dtype: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.process.has_fast_bf16", lambda device: False)
    sample(run, tmp_path / "grid.png", "--num-per-class", "1", "--dtype", dtype)
    expected = f"--dtype {dtype} has no fast kernels on this CPU: computing in fp32"
    assert expected in capsys.readouterr().out


# ------------------------------------------------------------------------------ published


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def published_file(path: Path, *, flash_attention: bool, **fields: Any) -> DiTConfig:
    """Write a small model in a layout of PAPER.md; latents 4x4, 1000 classes."""
    config = DiTConfig(input_size=4, depth=1, num_experts=2, mlp_ratio=0.5, **fields)
    state = dict(to_published(random_model(config).state_dict(), flash_attention=flash_attention))
    flat = {name: value.half() for name, value in state.items()}
    torch.save(flat if flash_attention else {"ema": state}, path)
    return config


def test_a_published_flow_model_is_sampled_by_the_published_command(
    vae_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """XL and G: flat, float16, QK norm, so rectified flow; here in a small size."""
    size = {"hidden_size": 32, "num_heads": 2, "qk_norm": True}
    config = published_file(tmp_path / "C", flash_attention=True, **size)
    monkeypatch.setitem(DiT_models, "DiT-XL/2", partial(DiT, config))
    monkeypatch.chdir(tmp_path)
    command = f"--model DiT-XL/2 --ckpt C --vae-path {vae_folder} --image-size 32 --cfg-scale 1.5"
    main(build_parser().parse_args(command.split()))
    with Image.open("samples/sample.png") as image:
        assert image.size == (8 * CELL + 2, 5 * CELL + 2)  # eight ImageNet classes, 40 images
    assert "40 images, one class a column, rf" in capsys.readouterr().out


def test_a_published_ddpm_model_is_sampled_and_rf_can_be_asked_for(
    vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S and B: {"ema"}, no QK norm, so DDPM unless told otherwise."""
    published_file(tmp_path / "s.pt", flash_attention=False, hidden_size=384, num_heads=6)
    flags = ("--vae-path", str(vae_folder), "--labels", "207", "360", "--num-per-class", "1")
    by_default = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags)
    assert by_default.shape == (CELL + 2, 2 * CELL + 2, 3)
    few_steps = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags, "--sampler", "dpm++")
    flow = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags, "--rf", "True")
    assert (by_default != few_steps).any() and (by_default != flow).any()
    objectives = [line.split(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert objectives == ["ddpm", "ddpm", "rf"]


def test_a_vae_of_other_channels_is_refused(run: Path, vae_folder: Path, tmp_path: Path) -> None:
    message = "--vae-path .* makes 4 latent channels, .* has 1"
    assert_refused(message, run, tmp_path / "grid.png", "--vae-path", str(vae_folder))
