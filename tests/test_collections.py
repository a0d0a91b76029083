"""Tar shards and Hugging Face data sets give the batches of the image folder they were made of."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_main, save_autoencoder, save_image_folder

import encode_latents
from common.errors import UserError
from data import ImageDataset, load_dataset, make_loader
from data.latent_cache import CachedLatents
from data.latent_index import cache_index
from training.flags import build_parser
from training.job import prepare


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "images"
    return save_image_folder(folder, 3, 5, lambda label, index: (20 + index, 24 - label))


def write_tars(folder: Path, images: Path, with_cls: bool) -> Path:
    """Write shards of 4 images in the order of the folder, classes as numbers or as folders."""
    folder.mkdir()
    files = sorted(images.glob("*/*.png"))
    for shard in range(0, len(files), 4):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as archive:
            for number, file in enumerate(files[shard : shard + 4], shard):
                if with_cls:
                    archive.add(file, f"{number:04d}.png")
                    label = file.parent.name.removeprefix("class").encode()
                    info = tarfile.TarInfo(f"{number:04d}.cls")
                    info.size = len(label)
                    archive.addfile(info, io.BytesIO(label))
                else:
                    archive.add(file, f"{file.parent.name}/{file.name}")
    return folder


def batches(dataset: ImageDataset, start_step: int = 0) -> list[Any]:
    """Return three training batches, mirrored at random, as two ranks' first one has them."""
    loader = iter(
        make_loader(
            dataset, micro_batch_size=4, accum_steps=1, rank=0, world_size=2, seed=1,
            start_step=start_step,
        )
    )  # fmt: skip
    return [next(loader) for _ in range(3)]


def assert_same(found: ImageDataset, expected: ImageDataset) -> None:
    assert len(found) == len(expected) == 15
    for ours, theirs in zip(batches(found), batches(expected), strict=True):
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    later = batches(found, start_step=1)  # a run that was killed goes on with the next batch
    assert torch.equal(later[0][0], batches(expected)[1][0])


@pytest.mark.parametrize("with_cls", [True, False])
def test_tar_shards_give_the_batches_of_the_folder_bit_for_bit(
    images: Path, tmp_path: Path, with_cls: bool
) -> None:
    tars = write_tars(tmp_path / "tars", images, with_cls)
    found = load_dataset(f"tar:{tars}", image_size=16)
    assert_same(found, load_dataset(images, image_size=16))
    assert found.class_names == (["0", "1", "2"] if with_cls else ["class0", "class1", "class2"])


def test_a_tar_without_classes_or_that_is_none_is_refused(images: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(images / "class0" / "0.png", "0.png")
    with pytest.raises(UserError, match=r"a\.tar: 0 has no 0\.cls, and no folder"):
        load_dataset(f"tar:{tmp_path}/a.tar")
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"a\.tar cannot be read as a tar file"):
        load_dataset(f"tar:{tmp_path}/a.tar")
    with pytest.raises(UserError, match="tar:nowhere: no such file or folder"):
        load_dataset("tar:nowhere")


def test_tars_become_the_cache_of_the_folder_and_are_found_again(
    images: Path, tmp_path: Path
) -> None:
    tars = write_tars(tmp_path / "tars", images, True)
    vae = save_autoencoder(tmp_path / "vae", "tiny")
    caches: list[CachedLatents] = []
    for source in (f"tar:{tars}", images):
        out = tmp_path / f"cache{len(caches)}"
        flags = ("--vae-path", vae, "--image-size", 16, "--num-workers", 0, "--out", out)
        run_main(encode_latents, "--data-path", source, *flags)
        caches.append(CachedLatents(out))
    keys = [(index, index % 2 == 0) for index in range(15)]
    assert torch.equal(caches[0].moments(keys), caches[1].moments(keys))
    index = cache_index(tmp_path / "cache0")
    assert index is not None and index["data_path"] == f"tar:{tars}"
    assert_same(load_dataset(tmp_path / "cache0"), load_dataset(images, image_size=16))


def test_a_run_trains_on_tars(images: Path, tmp_path: Path) -> None:
    tars = write_tars(tmp_path / "tars", images, False)
    words = ["--data-path", f"tar:{tars}", "--model", "DiT-Ti/4", "--rf", "--image-size", "16"]
    words += ["--vae-path", "none", "--global-batch-size", "4", "--val-fraction", "0.3"]
    job = prepare(build_parser(None).parse_args(words), meta=True)
    assert job.settings.class_names == ["class0", "class1", "class2"] and job.val is not None
    assert len(job.dataset) + len(job.val) == 15 and job.settings.num_workers == 4


# ------------------------------------------------------------------------------ datasets


def write_parquet(folder: Path, images: Path) -> Path:
    pytest.importorskip("datasets")
    pyarrow: Any = pytest.importorskip("pyarrow")
    parquet: Any = pytest.importorskip("pyarrow.parquet")
    files = sorted(images.glob("*/*.png"))
    columns = {
        "picture": [{"bytes": file.read_bytes(), "path": None} for file in files],
        "kind": [file.parent.name for file in files],
    }
    folder.mkdir()
    parquet.write_table(pyarrow.table(columns), folder / "train-00000.parquet")
    return folder


def test_a_folder_of_parquet_gives_the_batches_of_the_folder_bit_for_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_parquet(tmp_path / "parquet", images)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found = load_dataset(f"hf:{folder}?image=picture&label=kind", image_size=16)
    assert found.class_names == ["class0", "class1", "class2"]
    assert_same(found, load_dataset(images, image_size=16))
    part = found.select(torch.tensor([3, 1]))
    assert torch.equal(part.pixels(torch.tensor([0])), found.pixels(torch.tensor([3])))
    with pytest.raises(UserError, match="no column 'image'; there are picture, kind"):
        load_dataset(f"hf:{folder}")
    with pytest.raises(UserError, match=r"does not load: Unknown split .*val"):
        load_dataset(f"hf:{folder}?image=picture&label=kind&split=val")


def test_an_imagefolder_of_datasets_gives_the_batches_of_the_folder_bit_for_bit(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub"))
    found = load_dataset(f"hf:{images}", image_size=16)
    assert_same(found, load_dataset(images, image_size=16))
