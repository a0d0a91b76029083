"""Real images for a checkpoint: a data set whose classes are found by name, or single files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from data.datasets import ImageDataset, TensorImages, load_dataset
from data.image_files import read_square
from data.latent_cache import CachedLatents, Data
from data.latent_index import cache_index

MAX_LISTED = 10  # class names in an error message


def open_with_classes(
    data_path: str,
    image_size: int,
    num_classes: int,
    class_names: Sequence[str],
    fashion_mnist_root: str | Path | None = None,
) -> ImageDataset:
    """Open a data set and give its images the class numbers of a checkpoint.

    Args:
        data_path: as `data.load_dataset` takes it; it may have some of the checkpoint's classes,
            in any order.
        image_size: S, pixels.
        num_classes: of the model.
        class_names: of the checkpoint. If it has none, the data set must have all classes, and they
            count in their order.
        fashion_mnist_root: folder of the four idx files.

    Raises:
        UserError: no such data set, or it has a class that the checkpoint does not know.
    """
    dataset = load_dataset(data_path, image_size=image_size, fashion_mnist_root=fashion_mnist_root)
    if class_names:
        dataset.labels = numbers_by_name(dataset, data_path, class_names)[dataset.labels]
    elif dataset.num_classes != num_classes:
        raise UserError(
            f"--data-path {data_path} has {dataset.num_classes} classes, the checkpoint "
            f"{num_classes} without names: nothing says which is which"
        )
    return dataset


def open_validation(
    val_path: str, data: Data, data_path: str, fashion_mnist_root: str | None = None
) -> ImageDataset:
    """Open images, or their latents, that a run is judged by, with the class numbers of its own.

    Args:
        val_path: as `data_path`; "test" is the test split of digits or Fashion-MNIST.
        data: that the run learns from.
        data_path: of it.
        fashion_mnist_root: folder of the four idx files.

    Raises:
        UserError: no such data, another size or autoencoder, or an unknown class.
    """
    if val_path == "test":
        return load_dataset(data_path, split="test", fashion_mnist_root=fashion_mnist_root)
    if cache_index(val_path) is None:
        found = load_dataset(
            val_path, image_size=data.dataset.image_size, fashion_mnist_root=fashion_mnist_root
        )
    else:
        found = CachedLatents(Path(val_path))
        found.check_vae(data.vae, data.vae_path)
    if found.image_size != data.dataset.image_size:
        raise UserError(
            f"--val-path {val_path} has {found.image_size} pixels, --data-path "
            f"{data.dataset.image_size}"
        )
    numbers = numbers_by_name(found, val_path, data.dataset.class_names, "--val-path")
    found.labels = numbers[found.labels]
    return found


def numbers_by_name(
    dataset: ImageDataset, data_path: str, class_names: Sequence[str], flag: str = "--data-path"
) -> Tensor:
    """Return the checkpoint's number of each class of the data set, (num_classes,) int64."""
    if unknown := [name for name in dataset.class_names if name not in class_names]:
        known = ", ".join(map(repr, class_names[:MAX_LISTED]))
        known += ", …" if len(class_names) > MAX_LISTED else ""
        raise UserError(
            f"{flag} {data_path} has the class {unknown[0]!r}, the checkpoint was trained "
            f"with {known}"
        )
    return torch.tensor([class_names.index(name) for name in dataset.class_names])


def open_pictures(paths: Sequence[str], image_size: int, channels: int) -> ImageDataset:
    """Read image files, cut to their central square; their class, 0, says nothing.

    Args:
        paths: the files.
        image_size: S, pixels.
        channels: C, 1 for gray or 3.

    Raises:
        FileError: one can't be read.
    """
    pixels = []
    for path in paths:
        square = Image.fromarray(read_square(path, image_size))
        array = np.array(square.convert("L" if channels == 1 else "RGB"))
        pixels.append(torch.from_numpy(array.reshape(image_size, image_size, channels)))
    images = torch.stack(pixels).permute(0, 3, 1, 2)  # (n, C, S, S)
    return TensorImages(images, torch.zeros(len(images), dtype=torch.long), ["?"], flip=False)


def first_of_each(
    dataset: ImageDataset, data_path: str, labels: Sequence[int], num_per_class: int
) -> Tensor:
    """Return indices of the first images of some classes, which take turns, (n,) int64.

    Raises:
        UserError: if a class has too few.
    """
    columns = []
    for label in labels:
        found = (dataset.labels == label).nonzero().flatten()
        if len(found) < num_per_class:
            raise UserError(
                f"--num-per-class {num_per_class}: class {label} of {data_path} has "
                f"{len(found)} images"
            )
        columns.append(found[:num_per_class])
    return torch.stack(columns, dim=1).flatten()
