"""A checkpoint becomes a picture: ours and published, by seed, label and sampler."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, random_model, refusal, save_tiny_vae
from PIL import Image

from checkpoint.described import save_description
from checkpoint.layouts import to_published
from checkpoint.state import checkpoint_path, save_checkpoint, save_safetensors
from common.errors import FileError
from models import DiT, DiT_models, DiTConfig
from sample import build_parser, columns_per_class, default_out, main
from sampling.grid import arrange

CONFIG = dataclasses.replace(TINY, in_channels=1, qk_norm=False)
SETTINGS = {"objective": "rf", "vae_path": "none", "class_names": ["ant", "bee", "cat"]}
CELL = 64 + 2  # pixels: small images are enlarged to 64, with a frame of 2 between
HEAD = 18  # pixels of the names above the columns


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run folder whose EMA weights differ from the trained ones."""
    model = random_model(CONFIG, std=0.1, frozen=True)
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
    with pytest.raises((ValueError, OSError), match=message) as caught:
        sample(ckpt, out, *flags)
    assert not out.exists() and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------ ours


def test_a_run_folder_becomes_a_grid_with_one_class_a_column(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = sample(run, tmp_path / "new" / "grid.png", "--num-per-class", "2")
    assert picture.shape == (HEAD + 2 * CELL + 2, 3 * CELL + 2, 3)
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
    assert by_name.shape == (HEAD + CELL + 2, 2 * CELL + 2, 3)
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
        tmp_path / "w.safetensors",
        random_model(CONFIG, std=0.1, frozen=True).state_dict(),
        CONFIG,
        SETTINGS,
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
        (["--sampler", "ddim"], "sampler must be one of euler, heun, sde; got 'ddim'"),
        (["--cfg-interval", "0.9", "0.1"], "cfg_interval must be 0 <= low <= high <= 1"),
        (["--vae-path", "nowhere"], "--vae-path nowhere is not a folder"),
        (["--labels", "bea"], "--labels bea: expected .*; did you mean bee?"),
        (["--num-per-class", "1000000000"], "--num-per-class 1000000000 needs .* GiB of memory"),
        (["--quantize", "int8", "--offload", "disk"], "exclude each other"),
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


@pytest.mark.parametrize(("dtype", "short"), [("float16", "fp16"), ("bf16", "bf16")])
def test_a_dtype_without_kernels_on_this_cpu_says_what_it_computes_in(
    dtype: str,
    short: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("common.process.has_fast_bf16", lambda device: False)
    sample(run, tmp_path / "grid.png", "--num-per-class", "1", "--dtype", dtype)
    expected = f"--dtype {short} has no fast kernels on this CPU: computing in fp32"
    assert expected in capsys.readouterr().out


# ------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize(
    ("num_labels", "per_class", "width"),
    [(1, 40, 6), (1, 1, 1), (1, 2, 1), (1, 9, 3), (2, 20, 3), (3, 13, 2), (8, 5, 1), (10, 4, 1)],
)
def test_a_grid_is_as_square_as_it_can_be(num_labels: int, per_class: int, width: int) -> None:
    assert columns_per_class(num_labels, per_class) == width

    def longer_than_wide(other: int) -> int:
        return abs(-(-per_class // other) - other * num_labels)

    best = min(map(longer_than_wide, range(1, per_class + 1)))
    assert longer_than_wide(width) == best


def test_each_class_keeps_its_columns_and_gaps_are_black() -> None:
    images = torch.tensor([0.1, 0.2] * 5).view(10, 1, 1, 1)  # classes take turns
    grid = arrange(images, num_labels=2, width=2).view(3, 4)
    expected = torch.tensor([[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2], [0.1, -1, 0.2, -1]])
    assert torch.equal(grid, expected)


def test_one_class_fills_a_square_not_a_strip(run: Path, tmp_path: Path) -> None:
    picture = sample(run, tmp_path / "grid.png", "--labels", "bee")
    assert picture.shape == (HEAD + 6 * CELL + 2, 6 * CELL + 2, 3)  # of about 40 images
    gaps = sample(run, tmp_path / "grid.png", "--labels", "bee", "--num-per-class", "3")
    assert gaps.shape == (HEAD + 2 * CELL + 2, 2 * CELL + 2, 3)
    assert gaps[-CELL:, -CELL:].max() == 0 and gaps[-CELL:, :CELL].max() > 0


def test_by_default_the_picture_lies_in_its_run_under_a_name_of_its_own(run: Path) -> None:
    flags = ["--ckpt", str(run), "--dtype", "fp32", "--num-sampling-steps", "1"]
    others: list[list[str]] = [
        [], ["--seed", "1"], ["--labels", "ant"], ["--labels", "0"], ["--cfg-scale", "2"],
        ["--ema", "False"], ["--num-per-class", "2"], ["--sampler", "heun"],
        ["--labels", *("ant", "bee") * 12], ["--labels", *("bee", "ant") * 12],
    ]  # fmt: skip
    for other in others:
        main(build_parser().parse_args([*flags, *other]))
    names = sorted(file.name for file in (run / "samples").iterdir())
    assert len(names) == len(others)
    assert "0000001-1steps-cfg1.5-fp32-seed0.png" in names
    assert "0000001-trained-1steps-cfg1.5-fp32-seed0.png" in names


def test_the_default_name_holds_nothing_that_leaves_its_folder() -> None:
    args = build_parser().parse_args(["--ckpt", "x.pt", "--labels", "../../etc/passwd", "a b"])
    path = default_out(args, Path("models/x.pt"))
    assert path == Path("models/samples/x-______etc_passwd-a_b-cfg1.5-seed0.png")


def test_a_picture_is_never_written_over_a_checkpoint(run: Path, tmp_path: Path) -> None:
    weights = checkpoint_path(run, 1)
    before = weights.read_bytes()
    with pytest.raises(FileError, match=r"a picture's name ends in one of \.png, \.jpg"):
        sample(run, weights)
    (tmp_path / "weights.png").write_bytes(before)
    with pytest.raises(FileError, match=r"weights\.png exists and is no picture"):
        sample(run, tmp_path / "weights.png")
    assert weights.read_bytes() == before == (tmp_path / "weights.png").read_bytes()


def test_where_nothing_can_be_written_nothing_is_drawn(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sampling.opening.open_run", None)  # it is not called
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="file is no folder that this user may write to"):
        sample(run, tmp_path / "file" / "grid.png")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FileError, match="/proc/1 is no folder"):
        sample(run, Path("/proc/1/grid.png"))


def test_a_picture_of_no_numbers_is_not_written(run: Path, tmp_path: Path) -> None:
    assert_refused(
        r"the model drew NaN in float32: try .*--cfg-scale below 1e\+300",
        *(run, tmp_path / "grid.png", "--cfg-scale", "1e300", "--num-per-class", "1"),
    )


def test_a_mistake_is_one_line_and_exit_code_2(run: Path) -> None:
    line = refusal("sample.py", "--ckpt", run, "--labels", "\x1b[31mdog")
    assert line.startswith("sample.py: error: --labels \\x1b[31mdog: expected a number in")


# ------------------------------------------------------------------------------ published


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def published_file(path: Path, *, flash_attention: bool, **fields: Any) -> DiTConfig:
    """Write a small model in a layout of PAPER.md; latents 4x4, 1000 classes."""
    config = DiTConfig(input_size=4, depth=1, num_experts=2, mlp_ratio=0.5, **fields)
    state = dict(
        to_published(
            random_model(config, std=0.1, frozen=True).state_dict(), flash_attention=flash_attention
        )
    )
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
    with Image.open("samples/C-cfg1.5-seed0.png") as image:
        assert image.size == (
            8 * CELL + 2,
            HEAD + 5 * CELL + 2,
        )  # eight classes, 40 images
    assert "40 images, one class a column, rf" in capsys.readouterr().out


def test_a_published_ddpm_model_is_sampled_and_rf_can_be_asked_for(
    vae_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S and B: {"ema"}, no QK norm, so DDPM unless told otherwise."""
    published_file(tmp_path / "s.pt", flash_attention=False, hidden_size=384, num_heads=6)
    flags = ("--vae-path", str(vae_folder), "--labels", "207", "360", "--num-per-class", "1")
    by_default = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags)
    assert by_default.shape == (HEAD + CELL + 2, 2 * CELL + 2, 3)
    few_steps = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags, "--sampler", "dpm++")
    flow = sample(tmp_path / "s.pt", tmp_path / "grid.png", *flags, "--rf", "True")
    assert (by_default != few_steps).any() and (by_default != flow).any()
    objectives = [line.split(", ")[2] for line in capsys.readouterr().out.splitlines()]
    assert objectives == ["ddpm", "ddpm", "rf"]


def test_a_vae_of_other_channels_is_refused(run: Path, vae_folder: Path, tmp_path: Path) -> None:
    message = "--vae-path .* makes 4 latent channels, .* has 1"
    assert_refused(message, run, tmp_path / "grid.png", "--vae-path", str(vae_folder))


def test_the_name_of_the_size_is_enough_for_a_published_file_of_any_width(
    vae_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Width 32 without QK norm: neither shapes nor a published width tell the heads."""
    size = {"hidden_size": 32, "num_heads": 2, "num_experts_per_tok": 1}
    config = published_file(tmp_path / "s.pt", flash_attention=False, **size)
    flags = ("--vae-path", str(vae_folder), "--labels", "207", "--num-per-class", "1")
    assert_refused("num_heads can't be told .*give --model", tmp_path / "s.pt", tmp_path / "a.png")
    monkeypatch.setitem(DiT_models, "DiT-Ti/2", partial(DiT, config))
    by_flags = sample(
        tmp_path / "s.pt", tmp_path / "b.png", *flags, "--model", "DiT-Ti/2",
        "--num-experts-per-tok", "1",
    )  # fmt: skip
    save_description(tmp_path / "s.pt", config, {"objective": "ddpm"})
    assert (sample(tmp_path / "s.pt", tmp_path / "c.png", *flags) == by_flags).all()
    wrong = ("--model", "DiT-S/2")
    assert_refused(
        "--model DiT-S/2 has hidden_size 384", tmp_path / "s.pt", tmp_path / "d.png", *wrong
    )
