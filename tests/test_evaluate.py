"""evaluate.py: which samples it draws, on how many ranks, after a kill; what it says of them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY_DIGITS, random_model, run_main
from launch import Process, torchrun
from PIL import Image

import evaluate
from checkpoint.state import (
    checkpoint_hash,
    checkpoint_path,
    commit_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from common import process
from common.errors import FileError, UserError
from evaluation import classifiers, comparison
from evaluation.classifiers import load_classifier
from evaluation.comparison import Look, describe_source, reference_statistics
from evaluation.features import ClassifierExtractor
from evaluation.image_sets import NpzSet, save_npz
from evaluation.metrics import Statistics
from models import DiT

TINY = dataclasses.replace(TINY_DIGITS, depth=1)
SETTINGS = {"vae_path": "none", "data_path": "digits", "image_size": 8}
FD = "FD (classifier features)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of each objective and a cache with a quick classifier."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = random_model(TINY)
    for objective in ("rf", "ddpm"):
        settings = {**SETTINGS, "objective": objective}
        save_safetensors(folder / f"{objective}.safetensors", model.state_dict(), TINY, settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(classifiers.EPOCHS, "digits", 1)
        load_classifier("digits", folder / "cache")
    return folder


def flags(folder: Path, out: Path, *more: str) -> list[str]:
    source = [] if "--ckpt" in more or "--images" in more else ["--ckpt", "rf"]
    words = [*source, *more]
    if "--ckpt" in words:
        position = words.index("--ckpt") + 1
        words[position] = str(folder / f"{words[position]}.safetensors")
        words += ["--num-samples", "23", "--num-sampling-steps", "2", "--dtype", "fp32"]
    common = ["--cache", str(folder / "cache"), "--batch-size", "5", "--out", str(out)]
    return [*common, *words]


def run(folder: Path, out: Path, *more: str) -> dict:
    """Run evaluate.py in this process; returns its metrics.json."""
    run_main(evaluate, *flags(folder, out, *more))
    return json.loads((out / "metrics.json").read_text())


def samples(out: Path, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    with np.load(out / f"seed{seed}.npz") as file:
        return file["arr_0"], file["arr_1"]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    run(folder, folder / "whole")
    return folder / "whole"


def test_every_class_gets_its_share_and_the_file_is_what_adm_reads(whole: Path) -> None:
    images, labels = samples(whole)
    assert images.shape == (23, 8, 8, 1) and images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["metrics.json", "seed0.json", "seed0.npz", "seed0.png"]


@pytest.mark.parametrize(("objective", "sampler"), [("rf", "heun"), ("ddpm", "ddpm")])
def test_samples_do_not_depend_on_the_batch_size(
    objective: str, sampler: str, folder: Path, tmp_path: Path
) -> None:
    choice = ("--ckpt", objective, "--sampler", sampler)
    run(folder, tmp_path / "5", *choice)
    run(folder, tmp_path / "23", *choice, "--batch-size", "23")
    one, other = (samples(tmp_path / name)[0].astype(int) for name in ("5", "23"))
    assert np.abs(one - other).max() <= 1  # rounding of a value at the border of two
    assert (one != other).mean() < 0.01


def test_two_ranks_draw_and_measure_what_one_does(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    command = torchrun("evaluate.py", *flags(folder, tmp_path / "out"))
    Process(command, tmp_path / "log").wait()
    assert np.array_equal(samples(tmp_path / "out")[0], samples(whole)[0])
    one, two = (
        json.loads((path / "metrics.json").read_text()) for path in (whole, tmp_path / "out")
    )
    for name, value in one["values"]["seed 0"].items():
        if name != "seconds per sample":
            assert two["values"]["seed 0"][name] == pytest.approx(value, rel=1e-9), name
    assert two["facts"] == pytest.approx(one["facts"], rel=1e-6)


def test_a_killed_run_goes_on_to_the_same_samples_and_values(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = evaluate.SampleRun.draw

    def count(self, seed, first, stop):
        if len(drawn) == 2 and stop <= 15:
            raise KeyboardInterrupt
        drawn.append(first)
        return draw(self, seed, first, stop)

    monkeypatch.setattr(evaluate.SampleRun, "draw", count)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path)
    assert drawn == [0, 5] and not (tmp_path / "seed0.npz").exists()
    drawn.append(-1)  # from here on it is not stopped
    found = run(folder, tmp_path)
    assert drawn == [0, 5, -1, 10, 15, 20]
    assert np.array_equal(samples(tmp_path)[0], samples(whole)[0])
    expected = json.loads((whole / "metrics.json").read_text())["values"]["seed 0"]
    assert found["values"]["seed 0"][FD] == expected[FD]


def test_samples_of_another_command_are_not_taken_for_these(
    whole: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"holds samples with cfg_scale 1\.5, this command has 2"):
        run(folder, whole, "--cfg-scale", "2")


def test_samples_through_another_vae_are_not_taken_for_these(whole: Path, folder: Path) -> None:
    claim = whole / "seed0.json"
    text = claim.read_text()
    assert '"vae": "none"' in text
    claim.write_text(text.replace('"vae": "none"', '"vae": "0123"'))
    with pytest.raises(UserError, match="holds samples with vae 0123, this command has none"):
        run(folder, whole)
    claim.write_text(text)


def test_several_seeds_are_shown_with_mean_and_deviation(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(folder, tmp_path, "--num-seeds", "3")["values"]
    values = [found[f"seed {seed}"][FD] for seed in range(3)]
    assert len(set(values)) == 3
    table = capsys.readouterr().out.splitlines()
    row = next(line for line in table if line.startswith(FD)).removeprefix(FD).split()
    expected = [*values, np.mean(values), np.std(values, ddof=1)]
    assert [float(cell) for cell in row] == pytest.approx(expected, abs=1e-4)
    assert table[0].split() == ["seed", "0", "seed", "1", "seed", "2", "mean", "std"]


def test_an_npz_is_judged_as_the_samples_it_holds(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    found = run(folder, tmp_path, "--images", str(whole / "seed0.npz"), "--reference", "digits")
    expected = json.loads((whole / "metrics.json").read_text())["values"]["seed 0"]
    assert found["values"]["seed0.npz"][FD] == pytest.approx(expected[FD], rel=1e-9)


def test_real_images_are_at_no_distance_and_others_at_the_floor(
    folder: Path, tmp_path: Path
) -> None:
    digits = classifiers.load_dataset("digits", split="train")
    pixels = digits.pixels(torch.arange(len(digits)))
    save_npz(tmp_path / "real.npz", len(digits), iter([pixels]), digits.labels)
    images = ("--images", str(tmp_path / "real.npz"), "--reference", "digits")
    found = run(folder, tmp_path / "out", *images)
    values = found["values"]["real.npz"]
    assert values[FD] == pytest.approx(0.0, abs=1e-6) and values["precision"] == 1.0
    assert found["facts"][f"{FD} of 300 other real images"] > 10 * values[FD]


def test_reference_statistics_are_computed_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, tmp_path / "one")
    looked: list[str] = []
    collect = comparison.collect

    def look(images, *rest):
        looked.append(images.name)
        return collect(images, *rest)

    monkeypatch.setattr(comparison, "collect", look)
    run(folder, tmp_path / "two")
    assert "digits train" not in looked and "digits test" in looked


def test_a_changed_reference_is_looked_at_again(folder: Path, whole: Path, tmp_path: Path) -> None:
    images = torch.from_numpy(samples(whole)[0]).permute(0, 3, 1, 2)
    small = classifiers.Classifier(classifiers.SmallCNN(10, 16).eval(), 0.0)
    extractor = ClassifierExtractor(small, "digits", torch.device("cpu"))
    look = Look(extractor, 5, process.setup())
    means = []
    for real in (images, 255 - images):
        save_npz(tmp_path / "real.npz", 23, iter([real]), torch.zeros(23))
        source = describe_source(str(tmp_path / "real.npz"))
        real_set = NpzSet(tmp_path / "real.npz")
        found = reference_statistics(real_set, look, source=source, cache=tmp_path)
        assert found is not None
        means.append(found.pool["mu"])
    assert not np.allclose(means[0], means[1])


def test_moments_that_a_reference_brings_are_used_and_need_inception(
    folder: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adm.npz"
    moments = {"mu": np.zeros(2), "sigma": np.eye(2), "mu_s": np.zeros(2), "sigma_s": np.eye(2)}
    np.savez(path, samples(whole)[0], **moments)  # type: ignore[arg-type]
    rt = process.setup()

    class Two:
        name, identity = "", "two"

        def __call__(self, images):
            rows = images.float().flatten(1)[:, :2]
            return classifiers.Features(rows, rows, rows)

    def reference() -> Statistics | None:
        look, source = Look(Two(), 5, rt), describe_source(str(path))
        return reference_statistics(NpzSet(path), look, source=source, cache=tmp_path)

    found = reference()
    assert found is not None and np.array_equal(found.pool["sigma"], np.eye(2))
    assert len(found.rows) == 23
    Two.name = Two.identity = "else"
    with pytest.raises(ValueError, match="its moments need --features inception"):
        reference()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "a.npz", "--ckpt", "rf"], "--ckpt or --images: give one of them"),
        (["--images", "none.npz"], "--reference: give the real images"),
        (["--ckpt", "rf", "--image-size", "16"], "--image-size 16: .* has 8"),
        (["--ckpt", "rf", "--sampler", "ddim"], "--sampler ddim: .* takes one of euler, heun"),
        (
            ["--ckpt", "rf", "--reference", "nowhere"],
            "nowhere: not a folder, an .npz, or one of digits",
        ),
        (
            ["--ckpt", "rf", "--features", "inception", "--inception-weights", "nowhere"],
            "--inception-weights: nowhere does not load",
        ),
    ],
)
def test_wrong_flags_are_named(more: list[str], message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, tmp_path, *more)


# ------------------------------------------------------------------------------ before the work


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that loads any network."""
    for name in ("open_eyes", "open_run"):
        monkeypatch.setattr(evaluate, name, lambda *_, name=name, **__: pytest.fail(name))


def write_pictures(folder: Path, *sizes: tuple[int, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(sizes):
        Image.new("L", size, 40 * index).save(folder / f"{index}.png")
    return folder


def test_a_folder_is_cropped_to_the_size_of_the_reference(folder: Path, tmp_path: Path) -> None:
    """Both sides through the same crop: the images themselves are at no distance."""
    sizes = [(20, 12), (12, 30), (16, 16), (40, 25)]
    real = write_pictures(tmp_path / "real" / "only", *sizes).parent
    args = evaluate.build_parser().parse_args(
        ["--images", str(real / "only"), "--reference", str(real), "--image-size", "8"]
    )
    judged = evaluate.open_judged(Path(args.images), args.image_size)[0].images
    reference, others = evaluate.open_real(args, {})
    assert others is None and len(judged) == len(reference) == 4
    assert torch.equal(judged.images(0, 4), reference.images(0, 4))
    assert judged.images(0, 4).shape == (4, 3, 8, 8)


def test_images_of_several_sizes_are_found_before_a_network_is_loaded(
    folder: Path, tmp_path: Path, no_network: None
) -> None:
    images = write_pictures(tmp_path / "images", (8, 8), (8, 9))
    with pytest.raises(UserError, match=r"1\.png has 8 x 9 pixels.*--image-size S crops them"):
        run(folder, tmp_path / "out", "--images", str(images), "--reference", "digits")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("sizes", [[], [(8, 8)]])
def test_a_folder_of_no_or_one_image_is_refused(
    sizes: list, folder: Path, tmp_path: Path, no_network: None
) -> None:
    images = write_pictures(tmp_path / "images", *sizes)
    with pytest.raises(UserError, match=r"no image files|has 1 image; at least 2"):
        run(folder, tmp_path / "out", "--images", str(images), "--reference", "digits")


def test_two_images_are_enough(folder: Path, tmp_path: Path) -> None:
    images = write_pictures(tmp_path / "images", (8, 8), (8, 8))
    found = run(folder, tmp_path / "out", "--images", str(images), "--reference", "digits")
    assert np.isfinite(found["values"]["images"][FD])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--images", "{tmp}/none", "--reference", "digits"], "none is no folder of images"),
        (["--images", "{tmp}/none.npz", "--reference", "digits"], "none.npz: No such file"),
        (["--ckpt", "rf", "--test-data", "{tmp}/none"], "--test-data .*none: not a folder"),
        (
            ["--ckpt", "rf", "--reference", "none.npz"],
            "--reference none.npz: not a folder",
        ),
        (["--ckpt", "rf", "--cfg-interval", "1", "0"], "--cfg-interval .*less than the first"),
        (["--ckpt", "rf", "--features", "inception"], "--inception-weights: can't be downloaded"),
    ],
)
def test_what_is_wrong_is_said_before_a_network_is_loaded(
    more: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    no_network: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("evaluation.features.why_unreachable", lambda url: "no network")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError, match=message) as caught:
        run(folder, tmp_path / "out", *(word.format(tmp=tmp_path) for word in more))
    assert "\n" not in str(caught.value)


def test_an_output_that_cannot_be_written_is_named_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr(evaluate, "draw_samples", lambda *_: pytest.fail("it draws"))
    with pytest.raises(FileError, match=r"--out .*file/out can't be written to: Not a directory"):
        run(folder, tmp_path / "file" / "out")


@pytest.mark.parametrize("name", ["seed0.npz", "seed0.png", "seed0/mine.txt", "metrics.json"])
def test_files_of_something_else_are_not_written_over(
    name: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="give another --out"):
        run(folder, tmp_path)
    assert (tmp_path / name).read_text() == "{}"


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_claim_is_named(content: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "seed0.json").write_text(content)
    with pytest.raises(FileError, match=r"seed0\.json is (damaged|not of this script)"):
        run(folder, tmp_path)


def test_what_was_loaded_of_a_live_run_is_what_is_hashed_and_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run writes a checkpoint and deletes the loaded one as soon as this has been opened."""
    live = tmp_path / "live"
    torch.manual_seed(0)
    config, settings = TINY, {**SETTINGS, "objective": "rf", "class_names": [*"0123456789"]}

    def write(step: int) -> Path:
        path = checkpoint_path(live, step)
        save_checkpoint(
            path, config=config, settings=settings, model=DiT(config).state_dict(),
            ema=None, optimizer={}, scaler=None, step=step, rng=[],
        )  # fmt: skip
        commit_checkpoint(path, 1)
        return path

    loaded = write(1)
    expected = checkpoint_hash(loaded)
    open_run = evaluate.open_run

    def open_and_go_on(*words, **options):
        opened = open_run(*words, **options)
        monkeypatch.setattr(evaluate, "draw_seeds", go_on)
        return opened

    draw_seeds = evaluate.draw_seeds

    def go_on(samples, out):
        write(2)
        assert not loaded.exists()
        return draw_seeds(samples, out)

    monkeypatch.setattr(evaluate, "open_run", open_and_go_on)
    monkeypatch.chdir(tmp_path)
    words = ["--ckpt", str(live), "--cache", str(folder / "cache"), "--num-seeds", "2"]
    args = [*words, "--num-samples", "10", "--num-sampling-steps", "1", "--dtype", "fp32"]
    run_main(evaluate, *args)
    out = tmp_path / "results" / "evaluation" / "live-0000001-euler1-cfg1.5-10"
    for seed in range(2):
        assert json.loads((out / f"seed{seed}.json").read_text())["checkpoint"] == expected
    assert json.loads((out / "metrics.json").read_text())["flags"]["ckpt"] == str(loaded)


def test_a_damaged_cache_is_named(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "digits.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"digits\.pt is damaged; delete it, and it is trained"):
        run(folder, tmp_path / "out", "--cache", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("moments", "message"),
    [
        ({"mu": np.zeros(3), "sigma": np.eye(3)}, "'mu_s is not a file in the archive'"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"mu is \(2,\), sigma \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "mu or sigma is not finite"),
        ({"mu": np.array(["x"]), "sigma": np.eye(1)}, "could not convert string"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "Object arrays cannot be loaded"),
        (
            {"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(2), "sigma_s": np.eye(2)},
            "its moments are of 3 features, not 2",
        ),
    ],
)
def test_broken_moments_of_a_reference_are_one_line(
    moments: dict, message: str, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "adm.npz"
    np.savez(path, samples(whole)[0], **moments)

    class Two:
        name, identity = "", "two"

        def __call__(self, images):
            rows = images.float().flatten(1)[:, :2]
            return classifiers.Features(rows, rows, rows)

    look = Look(Two(), 5, process.setup())
    with pytest.raises(FileError, match=message) as caught:
        reference_statistics(NpzSet(path), look, source="", cache=tmp_path)
    assert "\n" not in str(caught.value)


def test_the_loss_of_a_model_is_the_same_for_any_sampler(folder: Path, tmp_path: Path) -> None:
    name = "loss on test images"
    one = run(folder, tmp_path / "1", "--sampler", "euler")["facts"][name]
    assert run(folder, tmp_path / "2", "--sampler", "heun")["facts"][name] == one > 0
