"""Stream, loader and data sets: which samples a step gets, and what files are refused."""

import gzip
import struct
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny_vae
from PIL import Image

from common.errors import UserError
from data import (
    TrainBatches,
    datasets,
    load_dataset,
    make_loader,
)
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch

NOT_INSTALLED = not datasets.FASHION_MNIST_ROOT.is_dir()


def stream(num_steps, world_size=1, accum_steps=1, global_batch=12, num_samples=20, **options):
    """Return the keys of each step, joined over micro-batches and ranks in stream order."""
    micro = global_batch // (world_size * accum_steps)
    ranks = [
        TrainBatches(
            num_samples,
            micro_batch_size=micro,
            accum_steps=accum_steps,
            rank=rank,
            world_size=world_size,
            **options,
        )
        for rank in range(world_size)
    ]
    rows = zip(*(islice(rank, num_steps * accum_steps) for rank in ranks), strict=True)
    keys = [key for row in rows for micro_batch in row for key in micro_batch]
    return [keys[i : i + global_batch] for i in range(0, len(keys), global_batch)]


def tiny_images(num_samples=20, flip=True):
    """Return a dataset of random 4-pixel images whose labels are 0, 1, 2, 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (num_samples, 3, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.arange(num_samples) % 3
    return datasets.TensorImages(pixels, labels, ["a", "b", "c"], flip)


def loader_of(dataset, **options):
    """Return a one-rank loader of micro-batches of 6, 2 a step."""
    layout = {"micro_batch_size": 6, "accum_steps": 2, "rank": 0, "world_size": 1, "seed": 0}
    return make_loader(dataset, **(layout | options))


def write_image_folder(root, sizes=((40, 30), (30, 40), (64, 64))):
    """Write one class folder per colour and one PNG per (width, height)."""
    for name, color in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
        (root / name).mkdir(parents=True)
        for number, size in enumerate(sizes):
            Image.new("RGB", size, color).save(root / name / f"{number}.png")
    return root


def write_idx(path, array):
    """Write a gzipped idx file of bytes."""
    header = struct.pack(f">4B{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(root, labels=(0, 9, 4)):
    """Write the train files of a Fashion-MNIST of white images."""
    write_idx(root / "train-images-idx3-ubyte.gz", np.full((len(labels), 28, 28), 255))
    write_idx(root / "train-labels-idx1-ubyte.gz", np.array(labels))
    return root


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """Save a small random AutoencoderKL and return its folder."""
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


# --- The stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "accum_steps"), [(2, 1), (1, 3), (2, 3), (3, 4)])
def test_a_step_has_the_same_samples_for_any_number_of_ranks_and_micro_batches(
    world_size, accum_steps
):
    reference = stream(5, flip=True)
    assert stream(5, world_size, accum_steps, flip=True) == reference


def test_every_epoch_is_another_permutation_even_when_batches_span_epochs():
    indices = [index for step in stream(5) for index, _ in step]  # 60 positions: 3 epochs of 20
    epochs = [indices[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_larger_than_the_dataset_holds_every_sample_equally_often():
    (step,) = stream(1, num_samples=3)
    assert sorted(index for index, _ in step) == [0] * 4 + [1] * 4 + [2] * 4


def test_the_stream_resumes_at_any_step():
    assert (
        stream(2, accum_steps=2, start_step=3, flip=True) == stream(5, accum_steps=2, flip=True)[3:]
    )


def test_the_stream_depends_on_the_seed_and_seeds_do_not_share_epochs():
    first, second = (stream(4, global_batch=10, seed=seed) for seed in (0, 1))
    assert first != second
    assert first[2:] != second[:2]  # epoch 1 of seed 0 is not epoch 0 of seed 1


def test_flips_are_fair_change_with_the_epoch_and_can_be_switched_off():
    keys = stream(2, global_batch=1000, num_samples=1000, flip=True)
    epochs = [dict(step) for step in keys]
    assert 400 < sum(epochs[0].values()) < 600
    assert epochs[0] != epochs[1]
    assert not any(flip for step in stream(5, flip=False) for _, flip in step)


# --- The loader -----------------------------------------------------------------------------------


def test_the_loader_gives_the_samples_the_stream_names():
    dataset = tiny_images()
    images, labels = next(iter(loader_of(dataset)))
    keys = next(iter(TrainBatches(20, micro_batch_size=6, accum_steps=2, flip=True)))
    for image, label, key in zip(images, labels, keys, strict=True):
        expected_image, expected_label = dataset[key]
        assert torch.equal(image, expected_image)
        assert label == expected_label
    assert any(flip for _, flip in keys)


def test_worker_processes_do_not_change_the_batches():
    dataset = tiny_images()
    here = list(islice(loader_of(dataset, start_step=1), 5))
    workers = list(islice(loader_of(dataset, start_step=1, num_workers=2), 5))
    for (images, labels), (worker_images, worker_labels) in zip(here, workers, strict=True):
        assert torch.equal(images, worker_images)
        assert torch.equal(labels, worker_labels)


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    next(iter(loader_of(tiny_images())))
    assert torch.equal(torch.get_rng_state(), before)


# --- Datasets -------------------------------------------------------------------------------------


def test_pixels_map_to_minus_one_to_one_and_a_flip_mirrors_left_and_right():
    pixels = torch.tensor([[0, 255], [51, 204]], dtype=torch.uint8).view(1, 1, 2, 2)
    dataset = datasets.TensorImages(pixels, torch.tensor([0]), ["only"], flip=False)
    image, label = dataset[0, False]
    mirrored, _ = dataset[0, True]
    assert torch.allclose(image, torch.tensor([[[-1.0, 1.0], [-0.6, 0.6]]]))
    assert torch.equal(mirrored, image.flip(-1))
    assert (image.dtype, label) == (torch.float32, 0)


def test_a_label_without_a_class_is_refused():
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\], found 0 to 2"):
        datasets.TensorImages(torch.zeros(3, 1, 4, 4).byte(), torch.arange(3), ["a", "b"], False)


def test_digits_splits_are_disjoint_and_complete():
    train, test, everything = (load_dataset("digits", split=s) for s in ("train", "test", "all"))
    as_set = [
        {tuple(p.flatten().tolist()) for p in d.pixels(torch.arange(len(d)))}
        for d in (train, test, everything)
    ]
    assert (len(train), len(test), len(everything)) == (1497, 300, 1797)
    assert as_set[0] | as_set[1] == as_set[2] and not as_set[0] & as_set[1]
    assert (train.channels, train.image_size, train.num_classes, train.flip) == (1, 8, 10, False)
    assert set(test.labels.tolist()) == set(range(10))


def test_fashion_mnist_is_padded_with_black_to_32_pixels(tmp_path):
    dataset = load_dataset("fashion-mnist", fashion_mnist_root=write_fashion_mnist(tmp_path))
    image, label = dataset[1, False]
    assert image.shape == (1, 32, 32)
    assert (image[:, 2:30, 2:30] == 1).all()
    assert (image == -1).sum() == 32 * 32 - 28 * 28
    assert dataset.class_names[label] == "Ankle boot"


@pytest.mark.skipif(NOT_INSTALLED, reason="needs Debian's dataset-fashion-mnist")
def test_the_installed_fashion_mnist_has_ten_even_classes():
    dataset = load_dataset("fashion-mnist", split="test")
    assert torch.bincount(dataset.labels).tolist() == [1000] * 10


def test_a_damaged_fashion_mnist_is_refused(tmp_path):
    write_fashion_mnist(tmp_path, labels=(0, 10))
    with pytest.raises(ValueError, match="found 0 to 10"):
        load_dataset("fashion-mnist", fashion_mnist_root=tmp_path)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        load_dataset("fashion-mnist", fashion_mnist_root=tmp_path)
    write_idx(images, np.zeros((2, 28, 27)))
    with pytest.raises(ValueError, match=r"\(2, 28, 27\) images and \(2,\) labels, not \(n, 28"):
        load_dataset("fashion-mnist", fashion_mnist_root=tmp_path)


def test_no_fashion_mnist_and_no_network_says_what_to_install(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", fail)
    monkeypatch.setattr(datasets, "FASHION_MNIST_ROOT", tmp_path / "missing")
    monkeypatch.setattr(datasets, "FASHION_MNIST_DOWNLOAD", tmp_path / "data")
    with pytest.raises(ValueError, match=r"apt install dataset-fashion-mnist.*no network"):
        load_dataset("fashion-mnist")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_downloaded_fashion_mnist_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    roots = []

    def download(root, download):
        roots.append(root)
        raw = Path(root) / "FashionMNIST" / "raw"
        raw.mkdir(parents=True)
        write_fashion_mnist(raw)

    monkeypatch.setattr("torchvision.datasets.FashionMNIST", download)
    monkeypatch.setattr(datasets, "FASHION_MNIST_ROOT", tmp_path / "missing")
    monkeypatch.setattr(datasets, "FASHION_MNIST_DOWNLOAD", tmp_path / "data")
    for _ in range(2):
        assert len(load_dataset("fashion-mnist")) == 3
    assert len(roots) == 1 and [p.name for p in (tmp_path / "data").iterdir()] == ["FashionMNIST"]


def test_a_folder_gives_rgb_squares_and_alphabetical_classes(tmp_path):
    dataset = load_dataset(write_image_folder(tmp_path), image_size=16)
    images, labels = next(iter(loader_of(dataset)))
    blue, label = dataset[0, False]
    assert (len(dataset), dataset.class_names, dataset.flip) == (6, ["blue", "red"], True)
    assert images.shape == (6, 3, 16, 16)
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1]
    assert torch.equal(blue, torch.tensor([-1.0, -1, 1]).view(3, 1, 1).expand(3, 16, 16))
    assert label == 0


def break_images(root, *names):
    """Cut image files off."""
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:60])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(tmp_path, num_workers):
    break_images(write_image_folder(tmp_path), "red/1.png")
    loader = loader_of(load_dataset(tmp_path, image_size=16), num_workers=num_workers)
    with pytest.raises(UserError, match=r"cannot read the image file .*red/1\.png") as caught:
        next(iter(loader))
    assert "\n" not in str(caught.value)


def test_a_training_run_ends_with_the_name_of_a_broken_image(tmp_path, vae_folder):
    break_images(write_image_folder(tmp_path / "images"), "red/1.png")
    words = [
        *("--data-path", str(tmp_path / "images"), "--image-size", "32", "--num-workers", "1"),
        *("--vae-path", str(vae_folder), "--model", "DiT-Ti/2", "--global-batch-size", "6"),
        *("--max-steps", "1", "--results-dir", str(tmp_path / "results")),
    ]
    with pytest.raises(UserError, match=r"cannot read the image file .*red/1\.png") as caught:
        launch(build_parser(None).parse_args(words), DdpTrainer)
    assert "\n" not in str(caught.value)
    launch(build_parser(None).parse_args([*words, "--skip-broken"]), DdpTrainer)
    assert "1.png: " in next((tmp_path / "results").glob("*/log.txt")).read_text()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_image_stands_in_for_a_broken_one_and_is_counted(tmp_path, num_workers, caplog):
    break_images(write_image_folder(tmp_path), "blue/1.png", "blue/2.png", "red/2.png")
    dataset = load_dataset(tmp_path, image_size=16, skip_broken=True)
    loader = loader_of(dataset, num_workers=num_workers)
    batches = list(islice(loader, 4))
    stand_ins = {1: 3, 2: 3, 5: 0}  # a later image is of another class: its label comes with it
    stream = islice(TrainBatches(6, micro_batch_size=6, accum_steps=2, flip=True), 4)
    for keys, (images, labels) in zip(stream, batches, strict=True):
        expected = [stand_ins.get(index, index) for index, _ in keys]
        assert labels.tolist() == dataset.labels[expected].tolist()
        assert [bool(image[0].mean() > 0) for image in images] == (labels == 1).tolist()
    lines = [record.getMessage() for record in caplog.records]
    assert sorted(loader.broken) == [1, 2, 5] and len(lines) == 3
    assert all("--skip-broken: cannot read the image file" in line for line in lines)
    assert "the next image stands in (3 so far)" in lines[2]


def test_a_resumed_loader_takes_the_same_stand_ins(tmp_path):
    break_images(write_image_folder(tmp_path), "blue/0.png", "red/2.png")
    dataset = load_dataset(tmp_path, image_size=16, skip_broken=True)
    whole = list(islice(loader_of(dataset), 6))
    again = load_dataset(tmp_path, image_size=16, skip_broken=True)  # that has met none
    resumed = list(islice(loader_of(again, start_step=2), 2))
    for (images, labels), (resumed_images, resumed_labels) in zip(whole[4:], resumed, strict=True):
        assert torch.equal(images, resumed_images) and torch.equal(labels, resumed_labels)


def test_a_folder_of_broken_images_only_ends_the_run(tmp_path):
    names = [f"{color}/{i}.png" for color in ("blue", "red") for i in range(3)]
    break_images(write_image_folder(tmp_path), *names)
    loader = loader_of(load_dataset(tmp_path, image_size=16, skip_broken=True))
    with pytest.raises(UserError, match="--skip-broken: 6 images in a row can't be read"):
        next(iter(loader))


def test_an_image_that_cannot_be_opened_is_never_skipped(tmp_path):
    write_image_folder(tmp_path)
    (tmp_path / "red" / "1.png").unlink()
    (tmp_path / "red" / "1.png").symlink_to("gone")
    loader = loader_of(load_dataset(tmp_path, image_size=16, skip_broken=True))
    with pytest.raises(UserError, match=r"red/1\.png: No such file"):
        next(iter(loader))


def test_a_folder_without_images_is_refused(tmp_path):
    for folder, message in ((tmp_path / "missing", "not a folder"), (tmp_path, "class folder")):
        with pytest.raises(
            ValueError, match=rf"--data-path .*{message}.*'digits', 'fashion-mnist'"
        ):
            load_dataset(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"--data-path .*no images in the class folder 'empty'"):
        load_dataset(tmp_path)


def test_a_wrong_split_or_size_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'val'.*'train', 'test', 'all'"):
        load_dataset("digits", split="val")
    with pytest.raises(ValueError, match="another split's folder"):
        load_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match="--image-size 256: digits has 8"):
        load_dataset("digits", image_size=256)
