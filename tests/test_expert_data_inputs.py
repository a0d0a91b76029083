"""What expert_data.py reads and refuses: flags, files of routing data, images and their classes."""

import dataclasses
import hashlib
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import SETTINGS, assert_same, count, save_model
from helpers import TINY_DIGITS, refusal, run_main
from PIL import Image

import expert_data
from checkpoint.state import save_safetensors
from common.errors import FileError, UserError
from expert_data import print_summary
from models import DiT
from routing import (
    RoutingRecorder,
)
from routing.tables import RoutingData


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(ckpt: str, tmp_path_factory: pytest.TempPathFactory) -> RoutingData:
    return count(ckpt, tmp_path_factory.mktemp("data") / "routing.npz")


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "10"], r"--labels 10: expected a number in \[0, 9\] or one of 0, 1"),
        (["--sampler", "ddim"], "--sampler ddim: rf accepts euler, heun"),
        (["--times", "0.5"], "--times: only with --real"),
        (["--real", "--num-per-class", "9999"], "--num-per-class 9999: class 0 of digits has"),
        (["--merge", "x.npz"], "--ckpt or --merge: give one of them"),
        (["--rf", "False"], "--rf False: the checkpoint was trained with rf"),
    ],
)
def test_wrong_flags_are_named(ckpt: str, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        count(ckpt, tmp_path / "a.npz", *flags)


def test_a_dense_model_is_refused(tmp_path: Path):
    config = dataclasses.replace(TINY_DIGITS, num_experts=0)
    path = tmp_path / "dense.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, SETTINGS)
    with pytest.raises(UserError, match="dense model: it has no experts to count"):
        count(str(path), tmp_path / "a.npz")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "b.npz")


def rewrite(source: Path, out: Path, **changed: Any) -> Path:
    """Copy a file of routing data with some of its arrays or metadata changed."""
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    for name, value in changed.items():
        (arrays if name in arrays else meta)[name] = value
    np.savez(out, meta=json.dumps(meta), **arrays)
    return out


@pytest.fixture(scope="module")
def saved(data: RoutingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "routing.npz"
    data.save(path)
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": np.array([{}])}, "pairs is object, expected int64"),
        (
            {"pairs": np.zeros((2, 2, 4, 5), int)},
            r"pairs is \(2, 2, 4, 5\), expected \(2, 2, 4, 4\)",
        ),
        ({"by_class": np.zeros((2, 10, 3, 4), int)}, r"by_class is \(2, 10, 3, 4\), expected"),
        ({"times": np.zeros(3)}, None),
        ({"times": np.array([1.0, 2.0, np.nan])}, r"times are not all in \[0, 1\]"),
        ({"traced_labels": np.full(10, 10)}, r"traced_labels are not all in \[0, 9\]"),
        ({"by_step": np.full((2, 3, 2, 4), -1)}, "counts below 0"),
        ({"runs": []}, "it has no runs"),
        ({"runs": [{"seed": "0"}]}, "runs: seed is a str"),
        ({"class_names": [1, 2]}, "class_names are not all text"),
        ({"cfg_scale": None}, "its metadata: cfg_scale is a NoneType"),
        ({"config": {"depth": "many"}}, "is no routing data"),
        ({"version": 3}, "it has version 3, expected up to 2"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused_in_a_line(
    saved: Path, tmp_path: Path, changed: dict[str, Any], message: str | None
) -> None:
    path = rewrite(saved, tmp_path / "a.npz", **changed)
    if message is None:
        RoutingData.load(path)
        return
    with pytest.raises(FileError, match=message):
        RoutingData.load(path)


def test_tables_larger_than_the_memory_are_refused_before_they_are_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 30)
    with pytest.raises(FileError, match="it needs 0 GiB of memory"):
        RoutingData.load(saved)
    monkeypatch.undo()
    header = io.BytesIO()
    shape = {"descr": "<i8", "fortran_order": False, "shape": (2, 10**12)}
    np.lib.format.write_array_header_1_0(header, shape)
    huge = header.getvalue() + bytes(48)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(tmp_path / "a.npz", "w") as target:
        for info in source.infolist():
            content = huge if info.filename == "rows.npy" else source.read(info)
            target.writestr(info.filename, content)
    with pytest.raises(FileError, match="rows is cut"):
        RoutingData.load(tmp_path / "a.npz")


def test_a_file_whose_times_rise_is_read_with_noise_first(saved: Path, tmp_path: Path) -> None:
    whole = RoutingData.load(saved)
    axes = {"times": 0, "by_step": 1, "probs": 1, "rows": 1, "traced_ids": 1}
    turned = {name: getattr(whole, name).flip(axis).numpy() for name, axis in axes.items()}
    assert_same(RoutingData.load(rewrite(saved, tmp_path / "a.npz", **turned)), whole)


def test_a_file_of_version_1_is_read_and_continued(ckpt: str, data: RoutingData, tmp_path: Path):
    """It said raw for traced, and wrote no labels as floats."""
    part = tmp_path / "part.npz"
    count(ckpt, part, "--max-batches", "1")
    with np.load(part) as file:
        arrays = {name.replace("traced_", "raw_"): file[name] for name in file.files}
    arrays["meta"] = np.array(json.dumps({**json.loads(str(arrays["meta"])), "version": 1}))
    np.savez(tmp_path / "old.npz", **arrays)
    assert_same(count(ckpt, tmp_path / "old.npz"), data)
    flags = ("--raw_samples", "0", "--max-batches", "1")  # the flag's spelling of then
    none = count(ckpt, tmp_path / "b.npz", *flags)
    assert none.traced_labels.dtype == torch.int64 and len(none.traced_labels) == 0
    path = rewrite(tmp_path / "b.npz", tmp_path / "c.npz", traced_labels=np.zeros(0, np.float32))
    assert RoutingData.load(path).traced_labels.dtype == torch.int64


def test_more_experts_than_a_byte_counts_are_traced() -> None:
    config = dataclasses.replace(TINY_DIGITS, num_experts=300, depth=1)
    torch.manual_seed(0)
    model = DiT(config).eval()
    recorder = RoutingRecorder(model, num_steps=1, num_traced=40)
    recorder.begin(torch.zeros(40, dtype=torch.long), first_index=0)
    with torch.no_grad():
        model(torch.randn(40, 1, 8, 8) * 9, torch.rand(40), torch.zeros(40, dtype=torch.long))
    counted = torch.bincount(recorder.tables["traced_ids"].flatten().long(), minlength=300)
    assert torch.equal(counted, recorder.tables["by_step"][0, 0, 0]) and counted[256:].sum() > 0


def test_what_is_shown_of_a_name_controls_no_terminal(
    ckpt: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b[2Jclear", "two\nlines", "x" * 500]
    path = rewrite(saved, tmp_path / "a.npz", class_names=names, sampler="\x1b]0;title\x07")
    loaded = RoutingData.load(path)
    assert loaded.class_names[0] == "\\x1b[2Jclear" and loaded.class_names[1] == "two\\nlines"
    assert len(loaded.class_names[2]) == 40
    assert loaded.class_names[3:] == [f"class {i}" for i in range(3, 10)]  # more than names
    print_summary(loaded, "a.npz")
    assert "\x1b" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ which images


def image_folder(root: Path, names: str) -> Path:
    """Write two gray images of each class, as bright as the place of its name in the alphabet."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            level = 5 * (ord(name) - ord("a")) + i
            Image.new("RGB", (9, 8), (level,) * 3).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """Write a model of RGB pixels whose classes are a, b, c and one that has no name."""
    config = dataclasses.replace(TINY_DIGITS, in_channels=3, num_classes=4)
    torch.manual_seed(0)
    settings = {"objective": "rf", "vae_path": "none", "class_names": ["a", "b", "c"]}
    path = tmp_path / "letters.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, settings)
    return str(path)


def route(ckpt: str, out: Path, *flags: str) -> RoutingData:
    """Run expert_data.py without the flags of `command`."""
    steps = ("--num-sampling-steps", "2", "--dtype", "fp32")
    arguments = ["--ckpt", ckpt, "--out", str(out), *steps, *flags]
    run_main(expert_data, *arguments)
    return RoutingData.load(out)


def test_classes_are_given_by_name_and_those_without_one_are_left_out(letters: str, tmp_path: Path):
    found = route(letters, tmp_path / "a.npz", "--labels", "c", "a", "--num-per-class", "1")
    assert found.drawn_classes.tolist() == [0, 2] and found.traced_labels.tolist() == [2, 0]
    assert route(letters, tmp_path / "b.npz", "--num-per-class", "1").drawn_classes.tolist() == [
        *(0, 1, 2)
    ]
    assert found.class_names == ["a", "b", "c", "class 3"]
    with pytest.raises(UserError, match="class 2 is there twice"):
        route(letters, tmp_path / "c.npz", "--labels", "c", "2")


def test_classes_of_a_folder_are_found_by_name_not_by_place(letters: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", "bc")  # places 0 and 1
    flags = ("--real", "--data-path", str(folder), "--num-per-class", "2")
    found = route(letters, tmp_path / "a.npz", *flags)
    assert found.drawn_classes.tolist() == [1, 2]
    brightness = found.traced_images.float().mean(dim=(1, 2, 3)).round().tolist()
    assert dict(zip(brightness, found.traced_labels.tolist(), strict=True)) == {
        5: 1,
        6: 1,
        10: 2,
        11: 2,
    }
    image_folder(folder, "x")
    with pytest.raises(UserError, match="has the class 'x', the checkpoint was trained with 'a'"):
        route(letters, tmp_path / "b.npz", *flags)
    assert not (tmp_path / "b.npz").exists()


def test_classes_without_names_must_be_as_many(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_DIGITS, in_channels=3)
    path = tmp_path / "published.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, {"vae_path": "none"})
    flags = ("--real", "--data-path", str(image_folder(tmp_path / "images", "ab")), "--rf")
    with pytest.raises(UserError, match="has 2 classes, the checkpoint 10 without names"):
        route(str(path), tmp_path / "a.npz", *flags)


def test_single_pictures_are_routed_with_the_class_that_is_said(letters: str, tmp_path: Path):
    folder = image_folder(tmp_path / "images", "bc")
    pictures = [str(folder / "c" / "1.png"), str(folder / "b" / "0.png")]
    flags = ("--times", "0.2", "0.6", "--batch-size", "1")
    found = route(letters, tmp_path / "a.npz", "--image", *pictures, "--labels", "c", "b", *flags)
    assert found.images_done == 2 and found.traced_labels.tolist() == [2, 1]
    assert found.times.tolist() == [0.6, 0.2]  # noise first
    assert found.traced_images.float().mean(dim=(1, 2, 3)).round().tolist() == [11, 5]
    assert found.title.endswith("2 real images at 2 noise levels")
    alone = route(letters, tmp_path / "b.npz", "--image", pictures[0], "--labels", "c", *flags)
    assert torch.equal(alone.traced_ids[0], found.traced_ids[0])
    with pytest.raises(UserError, match="--image needs --labels: one class for all or one for"):
        route(letters, tmp_path / "c.npz", "--image", *pictures)
    with pytest.raises(UserError, match="exists and run differs"):
        route(letters, tmp_path / "b.npz", "--image", pictures[1], "--labels", "c", *flags)
    with pytest.raises(FileError, match=r"cannot read .*nowhere\.png"):
        route(letters, tmp_path / "c.npz", "--image", "nowhere.png", "--labels", "c")


# ------------------------------------------------------------------------------ what is written


def test_only_npz_is_written_and_nothing_that_is_not_ours_is_replaced(
    ckpt: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--out .*x\.csv: expected a name that ends in \.npz"):
        count(ckpt, tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("name,score\nmine,1\n")
    with pytest.raises(FileError, match=r"x\.csv exists and is none of ours"):
        count(ckpt, tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"mine")
    with pytest.raises(FileError, match=r"y\.npz is no routing data"):
        count(ckpt, tmp_path / "y.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "y.npz"]
    assert (tmp_path / "x.csv").read_text() == "name,score\nmine,1\n"


def test_a_name_that_cannot_be_written_is_one_line(ckpt: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"--out .*file can't be written to: File exists"):
        count(ckpt, tmp_path / "file" / "a.npz")


def test_what_is_loaded_is_what_is_hashed_while_the_run_goes_on(
    ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer checkpoint appears right after the first look."""
    files = [Path(ckpt), tmp_path / "newer.safetensors"]
    monkeypatch.setattr("expert_data.resolve_checkpoint", lambda _: files.pop(0))
    (tmp_path / "run").mkdir()
    found = count(str(tmp_path / "run"), tmp_path / "a.npz", "--max-batches", "1")
    named = found.meta["checkpoint"]
    assert named["path"].endswith("run") and named["file"] == ckpt
    assert named["sha256"] == hashlib.sha256(Path(ckpt).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traced-samples", "999999999", "--num-per-class", "999999999"], "--traced-samples 9"),
        (["--cfg-interval", "0.8", "0.2"], "--cfg-interval 0.8 0.2: expected LOW <= HIGH"),
        (["--real", "--image", "a.png"], "--real or --image: give one of them"),
    ],
)
def test_absurd_flags_are_refused_before_any_work(
    ckpt: str, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        count(ckpt, tmp_path / "a.npz", *flags)
    assert not list(tmp_path.iterdir())


def test_the_script_says_a_mistake_in_one_line(ckpt: str, tmp_path: Path) -> None:
    line = refusal("expert_data.py", "--ckpt", tmp_path / "no\x1b[2Jwhere")
    assert "no such file" in line and "\x1b" not in line
