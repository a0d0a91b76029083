"""Sets of uint8 images, a batch at a time: a folder, an .npz as ADM's evaluation has, a data set.

A set has a number of images and gives images first..stop-1 as (N, C, S, S); nothing is read before.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.files import atomic_write
from data import ImageDataset


class ImageSet(Protocol):
    """Images (n, C, S, S) uint8 that are read when asked for."""

    name: str

    def __len__(self) -> int: ...

    def images(self, first: int, stop: int) -> Tensor: ...


class DatasetSet:
    """The unflipped images of a data set."""

    def __init__(self, dataset: ImageDataset, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        """Return n."""
        return len(self.dataset)

    def images(self, first: int, stop: int) -> Tensor:
        """Return images first..stop-1, (N, C, S, S) uint8."""
        return self.dataset.pixels(torch.arange(first, min(stop, len(self))))


class Spread:
    """Some images of another set, at even distances, so that sorted classes are all there."""

    def __init__(self, whole: ImageSet, count: int) -> None:
        """Take `count` images, or all if there are fewer."""
        self.whole, self.name = whole, whole.name
        self.chosen = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(int)

    def __len__(self) -> int:
        """Return n."""
        return len(self.chosen)

    def images(self, first: int, stop: int) -> Tensor:
        """Return images first..stop-1, (N, C, S, S) uint8."""
        return torch.cat([self.whole.images(i, i + 1) for i in self.chosen[first:stop].tolist()])


class FolderSet:
    """All image files below a folder, in the order of their names, all of one size."""

    def __init__(self, folder: Path) -> None:
        """List the files.

        Raises:
            ValueError: there are none.
        """
        self.name = str(folder)
        files = (path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        self.paths = sorted(files)
        if not self.paths:
            raise ValueError(f"--images {folder}: no image files in it")

    def __len__(self) -> int:
        """Return n."""
        return len(self.paths)

    def images(self, first: int, stop: int) -> Tensor:
        """Return images first..stop-1 in RGB, (N, 3, S, S) uint8.

        Raises:
            ValueError: a file is broken or of another size.
        """
        arrays = []
        for path in self.paths[first:stop]:
            try:
                with Image.open(path) as image:
                    arrays.append(np.array(image.convert("RGB")))
            except Exception as error:  # PIL raises many types for a broken file
                raise ValueError(f"cannot read the image file {path}: {error}") from error
            if arrays[-1].shape != arrays[0].shape:
                raise ValueError(
                    f"{path} has {arrays[-1].shape[:2]} pixels, {self.paths[first]} "
                    f"{arrays[0].shape[:2]}: images must be of one size"
                )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class NpzSet:
    """The array arr_0 (n, S, S, C) of an .npz, mapped from the file where it is not compressed."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            ValueError: it is not such a file.
        """
        self.name = str(path)
        try:
            self.array = _map_member(path, "arr_0.npy")
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no images arr_0 in it: {error}") from error
        if self.array.ndim != 4 or self.array.dtype != np.uint8:
            raise ValueError(
                f"{path}: arr_0 is {self.array.dtype} {self.array.shape}, not uint8 (n, S, S, C)"
            )

    def __len__(self) -> int:
        """Return n."""
        return len(self.array)

    def images(self, first: int, stop: int) -> Tensor:
        """Return images first..stop-1, (N, C, S, S) uint8."""
        return torch.from_numpy(np.array(self.array[first:stop])).permute(0, 3, 1, 2)


def _map_member(path: Path, member: str) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(member)
    if info.compress_type != zipfile.ZIP_STORED:
        with np.load(path) as file:
            return file[member.removesuffix(".npy")]
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # lengths of the name and of the extra field
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), 1)
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
        shape, fortran, dtype = (read or np.lib.format.read_array_header_2_0)(file)
        if fortran:
            raise ValueError("column-major arrays are not images")
        return np.memmap(path, dtype, "r", offset=file.tell(), shape=shape)


def save_npz(path: Path, num_images: int, batches: Iterator[Tensor], labels: Tensor) -> None:
    """Write an .npz with arr_0 (n, S, S, C) uint8 and arr_1 (n,) labels, a batch at a time.

    Args:
        path: the file.
        num_images: n.
        batches: of (N, C, S, S) uint8 images, n in all.
        labels: (n,) int64.
    """
    with atomic_write(path) as temp, zipfile.ZipFile(temp, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for index, images in enumerate(batches):
                array = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
                if index == 0:
                    header = np.lib.format.header_data_from_array_1_0(array)
                    header["shape"] = (num_images, *array.shape[1:])
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(array.tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, labels.numpy())
