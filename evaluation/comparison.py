"""Sets of images judged: opened, looked at by all ranks, compared with real ones.

In this order: `check_source` and `open_images`, what a user names as real images; `collect`, the
statistics of any set; `reference_statistics`, those that are kept; `floor_distance` and
`classified_right`, what there is to know besides.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common import process
from common.errors import FileError, UserError
from data import load_dataset
from data.datasets import CONTAINERS
from data.latent_index import cache_index
from evaluation.classifiers import EPOCHS, Classifier, predict
from evaluation.encoders import ReaderResult
from evaluation.features import Extractor
from evaluation.image_sets import DatasetSet, ImageSet, NpzSet, Spread
from evaluation.metrics import Statistics, StatisticsBuilder, frechet_distance, read_moments

MIN_IMAGES = 2  # of a set: fewer have no covariance


def check_source(path: str, flag: str) -> None:
    """Make sure that real images can be there.

    Raises:
        UserError: naming the flag, if they can't.
    """
    found = Path(path).is_file() if path.endswith(".npz") else Path(path).is_dir()
    found = found or path.startswith(CONTAINERS)  # looked for when they are opened
    if not found and path not in EPOCHS:
        raise UserError(f"{flag} {path}: not a folder, an .npz, or one of {', '.join(EPOCHS)}")


def open_images(
    path: str,
    *,
    split: str = "train",
    image_size: int | None = None,
    fashion_mnist_root: str | None = None,
) -> ImageSet:
    """Open real images: a data set by name, a class folder (cropped as in training) or an .npz.

    Args:
        path: as `check_source` accepts.
        split: of a data set by name.
        image_size: pixels of a class folder; default: as `load_dataset`.
        fashion_mnist_root: see `load_dataset`.

    Raises:
        UserError: they can't be opened.
    """
    if path.endswith(".npz"):
        return NpzSet(Path(path))
    named = path in EPOCHS
    dataset = load_dataset(
        path,
        image_size=None if named else image_size,
        split=split,
        fashion_mnist_root=fashion_mnist_root,
    )
    return DatasetSet(dataset, f"{path} {split}" if named else path)


def check_enough(images: ImageSet) -> None:
    """Refuse a set that has no covariance.

    Raises:
        UserError: naming it.
    """
    if len(images) < MIN_IMAGES:
        raise UserError(f"{images.name} has {len(images)} image; at least {MIN_IMAGES} are needed")


Witness = Classifier | ReaderResult


class Look(NamedTuple):
    """How images are looked at."""

    extractor: Extractor
    batch_size: int  # images at once
    rt: process.Runtime

    def starts(self, images: ImageSet) -> list[int]:
        """Return the first images of this rank's batches."""
        return list(range(0, len(images), self.batch_size))[self.rt.rank :: self.rt.world_size]


def collect(images: ImageSet, look: Look) -> Statistics | None:
    """Look at all images of a set, shared by the ranks; the main one gets the statistics."""
    builder = StatisticsBuilder(len(images))
    starts, is_main = look.starts(images), look.rt.is_main
    for first in tqdm(starts, desc="features", unit="batch", disable=not is_main, leave=False):
        builder.add(first, look.extractor(images.images(first, first + look.batch_size)))
    return builder.finish(look.rt)


def reference_statistics(
    real: ImageSet, look: Look, *, source: str, cache: Path
) -> Statistics | None:
    """Return the statistics of real images, from the cache if they are there; main rank only.

    An .npz that brings its moments, as ADM's do, is used with these.

    Args:
        real: the images.
        look: how they are looked at.
        source: of `describe_source`.
        cache: folder of statistics.

    Raises:
        UserError: moments of an .npz that are broken, or of another extractor.
    """
    size = real.dataset.image_size if isinstance(real, DatasetSet) else None
    key = f"{source} {len(real)} {size} {look.extractor.identity}"
    cached = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if process.from_main(cached.exists()):
        return Statistics.load(cached) if look.rt.is_main else None
    found = collect(real, look)
    if found is None:
        return None
    if isinstance(real, NpzSet):
        _take_moments(real.name, look.extractor, found)
    found.save(cached)
    return found


def _take_moments(path: str, extractor: Extractor, found: Statistics) -> None:
    with np.load(path) as file:
        if "mu" not in file.files:
            return
        if extractor.name:
            raise UserError(f"--reference {path}: its moments need --features inception")
        try:
            pool, spatial = read_moments(file, ""), read_moments(file, "_s")
        except (KeyError, ValueError) as error:
            raise FileError(f"--reference {path}: broken moments: {error}") from error
    for ours, given in ((found.pool, pool), (found.spatial, spatial)):
        if ours["mu"].shape != given["mu"].shape:
            counts = f"{len(given['mu'])} features, not {len(ours['mu'])}"
            raise FileError(f"--reference {path}: its moments are of {counts}")
    found.pool, found.spatial = pool, spatial


def describe_source(path: str, fashion_mnist_root: str | None = None) -> str:
    """Name real images so that changed ones get another name: by the files' place and age."""
    if path in EPOCHS:
        return f"{path} {fashion_mnist_root}" if fashion_mnist_root else path
    index = cache_index(path)
    path = index["data_path"] if index else path
    if path.startswith("hf:"):
        return path
    root = Path(path.removeprefix("tar:"))
    ages = [entry.stat().st_mtime_ns for entry in (root, *root.glob("*/")) if entry.exists()]
    return f"{root.resolve()} {max(ages)} {root.stat().st_size}"


def floor_distance(
    others: ImageSet, real: Statistics | None, look: Look, *, num_images: int
) -> dict[str, float]:
    """Return the distance of other real images from the reference: what a perfect model gets.

    Of as many as there are samples, if there are so many, since the distance of few is larger.
    """
    found = collect(Spread(others, num_images), look)
    if found is None or real is None:
        return {}
    name = f"FD ({look.extractor.name})" if look.extractor.name else "FID"
    return {f"{name} of {found.count} other real images": frechet_distance(found.pool, real.pool)}


def classified_right(classifier: Witness, images: ImageSet, labels: Tensor, look: Look) -> float:
    """Return the share of samples that a classifier reads as the class they were asked for."""
    device = look.rt.device
    right = torch.zeros((), dtype=torch.float64, device=device)
    for first in look.starts(images):
        stop = first + look.batch_size
        batch = images.images(first, stop).to(device).float() / 127.5 - 1
        right += (predict(classifier.model, batch).cpu() == labels[first:stop]).sum().to(device)
    return (process.sum_over_ranks(right) / len(images)).item()
