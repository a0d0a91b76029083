"""The latent cache: what it holds, over ranks, after a kill; training from it as from images."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_image_folder, save_tiny_vae
from launch import Process, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import encode_latents
from common.errors import FileError, UserError
from common.files import DamagedFileError, file_crc32
from data import VAE, load_dataset, load_vae, make_loader
from data.latent_cache import CachedLatents, open_data
from data.latent_index import cache_index
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch

NUM_CLASSES, PER_CLASS, SIZE = 2, 5, 32


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/CLASS/*.png and a small vae/."""
    folder = tmp_path_factory.mktemp("inputs")
    save_image_folder(folder / "images", NUM_CLASSES, PER_CLASS, lambda *_: (40, 36))
    save_tiny_vae(folder / "vae")
    return folder


def flags(inputs: Path, out: Path, *more: str) -> list[str]:
    source = ["--data-path", str(inputs / "images"), "--vae-path", str(inputs / "vae")]
    size = ["--image-size", str(SIZE), "--shard-size", "4", "--batch-size", "3"]
    return [*source, *size, "--num-workers", "0", "--out", str(out), *more]


def encode(inputs: Path, out: Path, *more: str) -> Path:
    """Run encode_latents.py in this process."""
    args = encode_latents.build_parser().parse_args(flags(inputs, out, *more))
    encode_latents.main(args)
    return out


@pytest.fixture(scope="module")
def cache(inputs: Path) -> Path:
    return encode(inputs, inputs / "cache", "--dtype", "float32")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ------------------------------------------------------------------------------ what it holds


def test_the_cache_holds_what_the_vae_gives_for_images_and_mirrors(
    inputs: Path, cache: Path
) -> None:
    images = load_dataset(inputs / "images", image_size=SIZE)
    vae = load_vae(inputs / "vae", device="cpu")
    assert isinstance(vae, VAE)
    found = CachedLatents(cache)
    assert len(found) == 10 and found.class_names == images.class_names and found.flip
    for flip in (False, True):
        keys = [(index, flip) for index in range(10)]
        moments, labels = found.__getitems__(keys)
        batch, expected_labels = images.__getitems__(keys)
        expected = torch.stack(vae.moments(batch), dim=1)
        assert moments.shape == (10, 2, 4, SIZE // 8, SIZE // 8)
        torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_formats_round_and_take_half_the_room(
    dtype: str, digits: float, inputs: Path, cache: Path, tmp_path: Path
) -> None:
    half = CachedLatents(encode(inputs, tmp_path / "half", "--dtype", dtype))
    keys = [(index, index % 2 == 0) for index in range(10)]
    expected = CachedLatents(cache).moments(keys)
    found = half.moments(keys)
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=digits, atol=1e-6)
    sizes = [(path / "shard-00000.npy").stat().st_size - 128 for path in (half.folder, cache)]
    assert 2 * sizes[0] == sizes[1]


def test_shards_are_mapped_not_read(cache: Path) -> None:
    found = CachedLatents(cache)
    found.moments([(0, False), (9, True)])
    assert sorted(found._shards) == [0, 2]
    maps = Path("/proc/self/maps").read_text()
    assert all(str(cache / f"shard-0000{shard}.npy") in maps for shard in (0, 2))


def test_two_ranks_write_the_same_bytes(inputs: Path, cache: Path, tmp_path: Path) -> None:
    command = flags(inputs, tmp_path / "two", "--dtype", "float32")
    output = Process(torchrun("encode_latents.py", *command), tmp_path / "log").wait()
    assert output.count("10 images: ") == 1
    assert contents(tmp_path / "two") == contents(cache)


def test_a_killed_run_goes_on_to_the_same_bytes(
    inputs: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode_shard = encode_latents.Encoder._encode_shard

    def stop_at_the_second(self, shard, rows, bar):
        if len(encoded) == 1:
            raise KeyboardInterrupt
        encoded.append(shard)
        encode_shard(self, shard, rows, bar)

    monkeypatch.setattr(encode_latents.Encoder, "_encode_shard", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        encode(inputs, tmp_path / "cache", "--dtype", "float32")
    with pytest.raises(ValueError, match="this cache is not finished"):
        CachedLatents(tmp_path / "cache")
    encoded.append(-1)
    encode(inputs, tmp_path / "cache", "--dtype", "float32")
    assert encoded == [0, -1, 1, 2] and contents(tmp_path / "cache") == contents(cache)


def test_unreadable_images_are_listed_and_left_out(
    inputs: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(inputs / "images", tmp_path / "images")
    shutil.copytree(inputs / "vae", tmp_path / "vae")
    broken = tmp_path / "images" / "class0" / "3.png"
    broken.write_bytes(broken.read_bytes()[:100])
    folder = encode(tmp_path, tmp_path / "cache", "--dtype", "float32")
    text = capsys.readouterr().out
    assert f"not readable: cannot read the image file {broken}" in text
    assert "9 images, 1 NOT READABLE" in text
    found, whole = CachedLatents(folder), CachedLatents(cache)
    assert found.labels.tolist() == [0] * 4 + [1] * 5
    kept = [(index, False) for index in range(10) if index != 3]
    assert torch.equal(found.moments([(i, False) for i in range(9)]), whole.moments(kept))
    images = load_dataset(folder)  # those that the cache is of, without the broken one
    assert images.labels.tolist() == found.labels.tolist()
    assert images.pixels(torch.arange(9)).shape == (9, 3, SIZE, SIZE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--dtype", "float16"], "was begun with dtype float32, now --dtype means float16"),
        (["--image-size", "64"], "was begun with image_size 32, now --image-size means 64"),
        (["--shard-size", "5"], "was begun with shard_size 4, now --shard-size means 5"),
        (["--vae-path", "none"], "--vae-path none: pixels need no cache"),
        (["--data-path", "digits"], "--data-path digits is not an image folder"),
        (["--image-size", "36"], "--image-size 36 is not a multiple of 8"),
    ],
)
def test_another_command_is_refused(
    more: list[str], message: str, inputs: Path, cache: Path
) -> None:
    before = contents(cache)
    with pytest.raises(UserError, match=message):
        encode(inputs, cache, "--dtype", "float32", *more)
    assert contents(cache) == before


def test_a_folder_of_something_else_is_left_alone(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a latent cache"):
        encode(inputs, tmp_path)


def test_a_finished_cache_is_checked_against_the_images(
    inputs: Path, cache: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    for path in folder.glob("shard-*.npy"):
        np.save(path, np.load(path) + 1)
    with pytest.raises(UserError, match="encoded again are not what the cache has"):
        encode(inputs, folder, "--dtype", "float32")


# ------------------------------------------------------------------------------ what is broken


def copy_of(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def rewrite(folder: Path, **entries: object) -> None:
    """Change entries of an index; None takes one out."""
    index = json.loads((folder / "index.json").read_text()) | entries
    index = {name: value for name, value in index.items() if value is not None}
    (folder / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["shard-00001.npy", "labels.npy"])
def test_a_flipped_bit_of_a_cache_is_found_when_a_run_opens_it(
    name: str, cache: Path, tmp_path: Path
) -> None:
    folder = copy_of(cache, tmp_path)
    content = bytearray((folder / name).read_bytes())
    content[-8] ^= 1  # of a label: another class
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{name} is damaged: its CRC-32"):
        open_data(str(folder), device="cpu")


def test_the_ranks_of_a_node_share_the_checksums(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = CachedLatents(cache)
    verified: list[str] = []
    monkeypatch.setattr("data.latent_cache.verify_file", lambda path, _: verified.append(path.name))
    for rank in range(3):
        found.verify(rank, 3)
    assert sorted(verified) == sorted(found.index["checksums"])
    found.moments([(index, False) for index in range(10)])
    assert len(verified) == 5  # three shards, labels and keys, once each, none by a batch


def test_a_cache_of_before_checksums_stays_readable(cache: Path, tmp_path: Path) -> None:
    folder = copy_of(cache, tmp_path)
    rewrite(folder, version=1, bad=[{"index": 3, "error": "cut"}], unreadable=None, checksums=None)
    dataset = open_data(str(folder), device="cpu").dataset
    assert len(dataset) == 9 and load_dataset(folder).labels.tolist() == dataset.labels.tolist()


def test_a_missing_short_or_other_shard_is_named_at_the_start(cache: Path, tmp_path: Path) -> None:
    folder = copy_of(cache, tmp_path)
    path = folder / "shard-00002.npy"
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(FileError, match=r"shard-00002\.npy is missing"):
        CachedLatents(folder)
    path.write_bytes(whole[:-1])
    with pytest.raises(FileError, match=r"shard-00002\.npy is damaged: \d+ bytes instead of"):
        CachedLatents(folder)
    path.write_bytes(whole[:20])
    with pytest.raises(FileError, match=r"shard-00002\.npy is damaged"):
        CachedLatents(folder)
    np.save(path, np.zeros((2, 2, 2, 4, 4, 4)))
    with pytest.raises(FileError, match=r"holds float64 \(2, 2, 2, 4, 4, 4\), not float32"):
        CachedLatents(folder)
    np.save(path, np.array([{}]), allow_pickle=True)
    with pytest.raises(FileError, match="Python objects"):
        CachedLatents(folder)


def test_labels_that_are_missing_or_of_another_kind_are_named(cache: Path, tmp_path: Path) -> None:
    folder = copy_of(cache, tmp_path)
    np.save(folder / "labels.npy", np.zeros(10))
    with pytest.raises(FileError, match=r"labels\.npy holds float64 \(10,\), not int64"):
        CachedLatents(folder)
    np.save(folder / "labels.npy", np.array([{}] * 10), allow_pickle=True)
    with pytest.raises(FileError, match=r"labels\.npy is damaged: Object arrays"):
        CachedLatents(folder)
    (folder / "labels.npy").unlink()
    with pytest.raises(FileError, match=r"labels\.npy is missing"):
        CachedLatents(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"shard_size": "4"}, "shard_size is '4', not a positive integer"),
        ({"num_images": -1}, "num_images is -1, not a positive integer"),
        ({"latent_shape": [4, 4]}, r"latent_shape is \[4, 4\], not three positive integers"),
        ({"class_names": "cats"}, "class_names is 'cats', not a list of names"),
        ({"dtype": "int8"}, "dtype is 'int8', not one of float16"),
        ({"complete": 1}, "complete is 1, not true or false"),
        ({"unreadable": [{"index": 10, "error": ""}]}, "unreadable names image 10 of 10"),
        ({"unreadable": [3]}, r"unreadable is \[3\], not a list of"),
        ({"vae": None}, "vae is None, not a text"),
        ({"data_path": "../images"}, r"data_path is '\.\./images', not an absolute path"),
        ({"data_path": "/data/../etc"}, "not an absolute path without"),
        ({"version": 99}, "version 99, this code reads 1 to 3"),
        ({"version": "2"}, "version '2', this code reads"),
    ],
)
def test_a_wrong_entry_of_an_index_is_one_line(
    entries: dict, message: str, cache: Path, tmp_path: Path
) -> None:
    folder = copy_of(cache, tmp_path)
    rewrite(folder, **entries)
    for open_it in (CachedLatents, load_dataset):
        with pytest.raises(FileError, match=message) as caught:
            open_it(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["../labels.npy", "/etc/passwd", "shard-00003.npy"])
def test_an_index_leads_to_no_file_outside_its_folder(
    name: str, cache: Path, tmp_path: Path
) -> None:
    folder = copy_of(cache, tmp_path)
    shutil.copy(cache / "labels.npy", tmp_path)
    checksums = json.loads((folder / "index.json").read_text())["checksums"]
    rewrite(folder, checksums=checksums | {name: file_crc32(cache / "labels.npy")})
    with pytest.raises(FileError, match=f"checksums has, or lacks, '{name}'"):
        CachedLatents(folder)


def test_many_shards_are_read_with_few_files_open(
    inputs: Path, cache: Path, tmp_path: Path
) -> None:
    folder = copy_of(cache, tmp_path)
    index = cache_index(folder)
    assert index is not None
    rewrite(folder, num_images=200, shard_size=1, checksums=None, dtype="float16")
    np.save(folder / "labels.npy", np.arange(200) % 2)
    for shard in range(200):
        row = torch.full((1, 2, 2, 4, 4, 4), float(shard)).half().view(torch.int16).numpy()
        np.save(folder / f"shard-{shard:05d}.npy", row)
    code = (
        "import sys; from pathlib import Path; from data import CachedLatents\n"
        "found = CachedLatents(Path(sys.argv[1]))\n"
        "keys = [(index, False) for index in range(200)]\n"
        "print(*found.moments(keys).mean(dim=(1, 2, 3, 4)).int().tolist())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "."},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert run.stdout.split() == [str(shard) for shard in range(200)], run.stderr


def test_a_failing_disk_is_not_taken_for_a_broken_image(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path, image_size):
        raise FileError(f"cannot read the image file {path}: Input/output error")

    monkeypatch.setattr("data.datasets.read_square", fail)
    with pytest.raises(FileError, match=r"0\.png: Input/output error"):
        encode(inputs, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("shard*"))


def test_an_output_that_cannot_be_written_is_named(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a latent cache"):
        encode(inputs, tmp_path / "file")
    with pytest.raises(OSError, match=r"could not write .*file/cache/index\.json"):
        encode(inputs, tmp_path / "file" / "cache")


def test_a_cache_is_not_encoded_again(inputs: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data-path .*cache is not an image folder"):
        encode(inputs, tmp_path / "cache", "--data-path", str(cache))


# ------------------------------------------------------------------------------ training


def train_losses(data: Path, results: Path, *more: str) -> list[float]:
    """Train a few steps; returns the loss of each."""
    words = [
        *("--data-path", str(data), "--model", "DiT-Ti/2", "--num-experts", "4", "--rf"),
        *("--global-batch-size", "4", "--max-steps", "6", "--precision", "fp32", "--lr", "1e-3"),
        *("--log-every", "1", "--num-workers", "0", "--sample-every", "0", "--run-name", "run"),
        *("--results-dir", str(results), *more),
    ]
    launch(build_parser(None).parse_args(words), DdpTrainer)
    events = EventAccumulator(str(results / "run")).Reload()
    return [point.value for point in events.Scalars("train/loss")]


def test_training_from_the_cache_equals_training_from_images(
    inputs: Path, cache: Path, tmp_path: Path
) -> None:
    vae = ("--vae-path", str(inputs / "vae"))
    size = ("--image-size", str(SIZE))
    images = train_losses(inputs / "images", tmp_path / "images", *vae, *size)
    cached = train_losses(cache, tmp_path / "cache")
    assert len(images) == 6 and cached == pytest.approx(images, rel=1e-6)
    half = encode(inputs, tmp_path / "half")
    halved = train_losses(half, tmp_path / "half-run")
    assert halved != images and halved == pytest.approx(images, rel=1e-3)


def test_loader_workers_give_the_same_batches(cache: Path) -> None:
    def batches(num_workers: int) -> list[torch.Tensor]:
        loader = make_loader(
            CachedLatents(cache),
            micro_batch_size=3,
            accum_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            num_workers=num_workers,
        )
        return [batch for (batch, _), _ in zip(loader, range(4), strict=False)]

    assert all(map(torch.equal, batches(0), batches(2)))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image-size", "64"], "--image-size 64: .* was encoded at 32 pixels"),
        (["--vae-path", "none"], "--vae-path none is not the VAE that made"),
        (["--vae-path", "{other}"], "is not the VAE that made .*: that was .*vae; leave the flag"),
    ],
)
def test_training_refuses_flags_that_contradict_the_cache(
    more: list[str], message: str, inputs: Path, cache: Path, tmp_path: Path
) -> None:
    other = load_vae(inputs / "vae", device="cpu")
    assert isinstance(other, VAE)
    with torch.no_grad():
        next(other.model.parameters()).add_(1)
    other.model.save_pretrained(tmp_path / "other")
    words = [word.format(other=tmp_path / "other") for word in more]
    with pytest.raises(UserError, match=message):
        train_losses(cache, tmp_path / "results", *words)


def test_the_same_vae_elsewhere_is_accepted(inputs: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "vae", tmp_path / "moved")
    flags = ("--vae-path", str(tmp_path / "moved"), "--dry-run")
    args = ["--data-path", str(cache), "--model", "DiT-Ti/2", "--global-batch-size", "4", *flags]
    launch(build_parser(None).parse_args(args), DdpTrainer)


def test_the_images_of_a_cache_are_those_that_it_was_made_of(inputs: Path, cache: Path) -> None:
    found = load_dataset(cache)
    assert found.image_size == SIZE
    expected = load_dataset(inputs / "images", image_size=SIZE)
    assert torch.equal(found.pixels(torch.arange(3)), expected.pixels(torch.arange(3)))


def test_a_cache_has_the_fingerprint_of_its_images_but_not_with_some_left_out(
    inputs: Path, cache: Path
) -> None:
    images, found = load_dataset(inputs / "images", image_size=SIZE), CachedLatents(cache)
    assert found.fingerprint() == images.fingerprint()
    found.index = found.index | {"unreadable": [{"index": 3, "error": "broken"}]}
    assert found.fingerprint() != images.fingerprint()


def test_an_index_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(json.dumps({"format": "else", "version": 1}))
    with pytest.raises(ValueError, match=r"index\.json is not of a latent cache"):
        CachedLatents(tmp_path)


def test_an_image_folder_may_hold_another_index(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "images", tmp_path / "images")
    (tmp_path / "images" / "index.json").write_text("[]")
    assert len(load_dataset(tmp_path / "images", image_size=SIZE)) == 10
    (tmp_path / "images" / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        load_dataset(tmp_path / "images", image_size=SIZE)
