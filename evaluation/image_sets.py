"""Sets of uint8 images, a batch at a time: a folder, an .npz as ADM's evaluation has, a data set.

A set has a number of images and gives images first..stop-1 as (N, C, S, S); nothing is read before.
"""

import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from common.arrays import array_header
from common.errors import FileError, UserError
from common.files import atomic_write
from data import ImageDataset
from data.image_files import list_images, read_image, read_square, same_size

MAX_UNPACKED, MAX_RATIO = 2**30, 50  # bytes of a compressed array, and how many a packed byte gives


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

    def __init__(self, folder: Path, image_size: int | None = None) -> None:
        """List the files, and read their headers to compare their sizes.

        Args:
            folder: with images, at any depth.
            image_size: S, pixels, to which each image is cropped as for training; None leaves them
                as they are.

        Raises:
            UserError: there are none, or they are of several sizes and not to be cropped.
            FileError: a file is broken.
        """
        self.name, self.image_size = str(folder), image_size
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder of images and no .npz")
        self.paths = sorted(Path(path) for path in list_images(folder))
        if not self.paths:
            raise UserError(f"{folder}: no image files in it")
        if image_size is None:
            same_size(self.paths)

    def __len__(self) -> int:
        """Return n."""
        return len(self.paths)

    def images(self, first: int, stop: int) -> Tensor:
        """Return images first..stop-1 in RGB, (N, 3, S, S) uint8.

        Raises:
            FileError: a file is broken.
        """
        size = self.image_size
        arrays = [
            np.array(read_image(path)) if size is None else read_square(path, size)
            for path in self.paths[first:stop]
        ]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class NpzSet:
    """The array arr_0 (n, S, S, C) of an .npz, mapped from the file where it is not compressed."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            FileError: it is not such a file.
        """
        self.name = str(path)
        try:
            self.array = _map_member(path, "arr_0.npy")
        except OSError as error:
            raise FileError(f"cannot read {path}: {error.strerror or error}") from error
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise FileError(f"{path}: no images arr_0 in it: {error}") from error
        shape = self.array.shape
        if len(shape) != 4 or self.array.dtype != np.uint8 or 0 in shape or shape[3] not in (1, 3):
            raise FileError(
                f"{path}: arr_0 is {self.array.dtype} {shape}, not uint8 (n, S, S, 1 or 3)"
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
        if info.file_size > max(MAX_UNPACKED, MAX_RATIO * info.compress_size):
            raise ValueError(f"{info.compress_size:,} bytes unpack to {info.file_size:,}")
        with np.load(path) as file:
            return file[member.removesuffix(".npy")]
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)  # lengths of the name and of the extra field
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(int(lengths.sum()), 1)
        start = file.tell()
        header = array_header(file)
        if header.end - start != info.file_size:
            raise ValueError(f"{info.file_size} bytes, not those of {header.shape}")
        if header.column_major:
            raise ValueError("column-major arrays are not images")
        return np.memmap(path, header.dtype, "r", offset=header.offset, shape=header.shape)


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
