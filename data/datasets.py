"""Labelled images: those in memory, those in a folder, and `load_dataset`, which opens any.

Images are float32 in [-1, 1].

Shape letters: N batch, C channels, S image size, H W latent size, n samples in a dataset.
"""

import contextlib
import copy
import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from common.errors import FileError, UserError
from data.autoencoders import VAE, Pixels
from data.image_files import UnreadableImageError, list_classes, read_square
from data.latent_index import cache_index

Key = tuple[int, bool]  # (index in the dataset, mirror it left to right?)

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist
FASHION_MNIST_DOWNLOAD = Path("downloads")
# fmt: off
FASHION_MNIST_CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
                         "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
# fmt: on
ACCEPTED_DATA = (
    "It accepts 'digits', 'fashion-mnist', a folder with one subfolder of images per class, "
    "tar:SHARDS, hf:NAME, or what encode_latents.py made of one"
)
CONTAINERS = ("hf:", "tar:")  # what a path may begin with
OPENERS: dict[str, Callable[[str, int, bool], Any]] = {}  # of data/collections.py, by these
DIGITS_NUM_TEST = 300
MAX_BROKEN_IN_A_ROW = 1000  # more, and it is not single files that are broken


class ImageDataset(Dataset):
    """Labelled images; a subclass only says how to get the pixels.

    Indexed by `(index, flip)`, so that every random choice is made by the batch sampler.
    """

    in_memory = False  # then worker processes are of no use

    def __init__(
        self, labels: Tensor, class_names: list[str], channels: int, image_size: int, flip: bool
    ):
        """Check the labels.

        Args:
            labels: (n,) int64 in [0, len(class_names)).
            class_names: name of each class.
            channels: C.
            image_size: S, pixels.
            flip: whether training mirrors half of the images.

        Raises:
            UserError: there are no images, or a label is out of range.
        """
        self.labels, self.class_names = labels, class_names
        self.channels, self.image_size, self.flip = channels, image_size, flip
        self.broken: dict[int, str] = {}  # images met that can't be read, and why
        self._part = ""  # digest of a part, see `select`
        if len(labels) == 0:
            raise UserError("--data-path: there are no images in it that can be read")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= self.num_classes:
            raise UserError(f"labels must be in [0, {self.num_classes - 1}], found {low} to {high}")

    @property
    def num_classes(self) -> int:
        """Number of classes, without the null label."""
        return len(self.class_names)

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this data from any other, in this order, as plain values."""
        return {"num_images": len(self), "digest": self._part or self._digest()}

    def keys(self) -> np.ndarray:
        """Return a hash of each sample (n,) uint64, by its name or content and nothing else."""
        raise NotImplementedError

    def select(self, chosen: Tensor) -> Self:
        """Return some of the samples as a data set, in this order.

        Args:
            chosen: (m,) int64, their numbers.
        """
        part = copy.copy(self)
        whole = self.fingerprint()["digest"].encode()
        part._part = hashlib.sha256(whole + chosen.numpy().tobytes()).hexdigest()[:32]
        part.labels, part.broken = self.labels[chosen], {}
        part._take(chosen)
        return part

    def _take(self, chosen: Tensor) -> None:
        """Keep what belongs to some samples only, in a copy of this data set."""
        raise NotImplementedError

    def _digest(self) -> str:
        """Return a hash of what the samples are, in their order."""
        raise NotImplementedError

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the (N, C, S, S) uint8 pixels of N samples."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Return n."""
        return len(self.labels)

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        """Return one image (C, S, S) float32 in [-1, 1] and its label."""
        images, labels = self.__getitems__([key])
        return images[0], int(labels[0])

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch: images (N, C, S, S) float32 in [-1, 1], labels (N,) int64.

        `DataLoader` calls this, so a batch is a few tensor operations and needs no collating.
        """
        indices, flips = (torch.tensor(column) for column in zip(*keys, strict=True))
        pixels = self.pixels(indices)
        if flips.any():
            pixels = torch.where(flips.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        return pixels.float() / 127.5 - 1, self.labels[indices]

    def latents(self, batch: Tensor, vae: VAE | Pixels) -> Tensor:
        """Return the latents (N, C, H, W) of a batch of `__getitems__`, on the batch's device."""
        return vae.encode(batch)


def hash_all(contents: Iterable[bytes]) -> np.ndarray:
    """Return the first 8 bytes of each content's SHA-256, (n,) uint64."""
    digests = b"".join(hashlib.sha256(content).digest()[:8] for content in contents)
    return np.frombuffer(digests, "<u8")


def hold_out(dataset: ImageDataset, fraction: float) -> tuple[ImageDataset, ImageDataset]:
    """Split a data set by its samples' keys: which part one is in never moves.

    Returns:
        Those to train on, and about `fraction` of all, held out.

    Raises:
        UserError: one of the two is empty.
    """
    held = torch.from_numpy(dataset.keys() < np.uint64(fraction * 2.0**64))
    if held.all() or not held.any():
        raise UserError(
            f"--val-fraction {fraction:g} of {len(dataset)} images leaves {int(held.sum())} to "
            "validate and the rest to train on: give another, or --val-path"
        )
    return dataset.select((~held).nonzero().flatten()), dataset.select(held.nonzero().flatten())


class TensorImages(ImageDataset):
    """A small dataset held in memory as uint8."""

    in_memory = True

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: list[str], flip: bool):
        """Hold pixels (n, C, S, S) uint8 and labels (n,) int64."""
        super().__init__(labels, class_names, pixels.shape[1], pixels.shape[-1], flip)
        self._pixels = pixels

    def _digest(self) -> str:
        """Hash pixels and labels."""
        values = self._pixels.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(values).hexdigest()[:32]

    def keys(self) -> np.ndarray:
        """Hash each image's pixels."""
        return hash_all(image.tobytes() for image in self._pixels.numpy())

    def _take(self, chosen: Tensor) -> None:
        self._pixels = self._pixels[chosen]

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the (N, C, S, S) uint8 pixels of N samples."""
        return self._pixels[indices]


class FolderImages(ImageDataset):
    """A folder with one subfolder of image files per class, centre-cropped, RGB."""

    def __init__(
        self,
        root: Path,
        image_size: int,
        flip: bool,
        unreadable: Sequence[int] = (),
        skip_broken: bool = False,
    ):
        """List the files; classes are the subfolders in alphabetical order.

        Args:
            root: the folder.
            image_size: S, pixels.
            flip: whether training mirrors half of the images.
            unreadable: numbers of files to leave out.
            skip_broken: the next image that can be read stands in for a broken one.

        Raises:
            UserError: not a folder of class folders with images.
        """
        try:
            class_names, found = list_classes(root)
        except UserError as error:
            raise UserError(f"--data-path {error}. {ACCEPTED_DATA}") from error
        left_out = set(unreadable)
        samples = [item for i, item in enumerate(found) if i not in left_out]
        self.root, self.paths = root, [path for path, _ in samples]
        self.skip_broken = skip_broken
        labels = torch.tensor([label for _, label in samples])
        super().__init__(labels, class_names, 3, image_size, flip)

    def _digest(self) -> str:
        """Hash the files' names, which begin with their class."""
        return hashlib.sha256(os.fsencode("\n".join(self._names()))).hexdigest()[:32]

    def _names(self) -> list[str]:
        start = len(str(self.root)) + 1
        return [path[start:] for path in self.paths]

    def keys(self) -> np.ndarray:
        """Hash each file's name, its class's folder included."""
        return hash_all(map(os.fsencode, self._names()))

    def _take(self, chosen: Tensor) -> None:
        self.paths = [self.paths[i] for i in chosen.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the (N, 3, S, S) uint8 pixels of N files.

        Raises:
            UnreadableImageError: one is broken; it is now in `broken`.
            FileError: one can't be opened.
        """
        return torch.stack([self._read(index) for index in indices.tolist()])

    def _read(self, index: int) -> Tensor:
        try:
            array = read_square(self.paths[index], self.image_size)
        except UnreadableImageError as error:
            self.broken[index] = str(error)
            raise
        return torch.from_numpy(array).permute(2, 0, 1)  # (3, S, S)

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch as any data set does, with stand-ins for broken images by `skip_broken`.

        Which image stands in depends on the files alone, so every rank, worker and resumed run
        takes the same.
        """
        while True:  # once more for each broken image that was not known
            try:
                return super().__getitems__([(self._stand_in(i), flip) for i, flip in keys])
            except UnreadableImageError:
                if not self.skip_broken:
                    raise

    def _stand_in(self, index: int) -> int:
        if not self.skip_broken:
            return index
        for step in range(min(MAX_BROKEN_IN_A_ROW, len(self))):
            if (candidate := (index + step) % len(self)) not in self.broken:
                return candidate
        raise FileError(
            f"--skip-broken: {step + 1} images in a row can't be read, from this one on: "
            f"{self.broken[index]}"
        )


def load_dataset(
    data_path: str | Path,
    *,
    image_size: int | None = None,
    split: str = "train",
    fashion_mnist_root: str | Path | None = None,
    flip: bool | None = None,
    skip_broken: bool = False,
) -> ImageDataset:
    """Open a dataset.

    Args:
        data_path: "digits" (8 px), "fashion-mnist" (28 px, padded to 32), an image folder, or a
            latent cache, which means the folder that it was made of.
        image_size: pixels; default 256 for a folder, the dataset's own size otherwise.
        split: "train" or "test"; "digits" also has "all"; a folder is one split, "train".
        fashion_mnist_root: folder of the four idx files; default: Debian's, else a download.
        flip: mirror half of the images in training; default: only for a folder.
        skip_broken: see `FolderImages`.

    Raises:
        UserError: no such dataset, split or size.
    """
    name = str(data_path)
    splits = {"digits": ("train", "test", "all"), "fashion-mnist": ("train", "test")}
    accepted = splits.get(name, ("train",))
    if split not in accepted:
        hint = "" if name in splits else " (give the path of another split's folder instead)"
        raise UserError(f"split {split!r} of --data-path {name}: accepted {accepted}{hint}")
    if name not in splits:
        unreadable: list[int] = []
        if (index := cache_index(name)) is not None:
            name, image_size = index["data_path"], image_size or index["image_size"]
            unreadable = [entry["index"] for entry in index["unreadable"]]
        if name.startswith(CONTAINERS):
            dataset = _open_container(name, image_size or 256, flip is not False)
            good = sorted(set(range(len(dataset))) - set(unreadable))
            return dataset.select(torch.tensor(good)) if unreadable else dataset
        if not Path(name).is_dir():
            raise UserError(f"--data-path {name} is not a folder. {ACCEPTED_DATA}")
        return FolderImages(
            Path(name), image_size or 256, flip is not False, unreadable, skip_broken
        )

    dataset = (
        _load_digits(split, bool(flip))
        if name == "digits"
        else _load_fashion_mnist(split, fashion_mnist_root, bool(flip))
    )
    if image_size not in (None, dataset.image_size):
        raise UserError(f"--image-size {image_size}: {name} has {dataset.image_size} pixels")
    return dataset


def _open_container(name: str, image_size: int, flip: bool) -> ImageDataset:
    """Open the images that a path with a prefix of `CONTAINERS` means."""
    kind, _, place = name.partition(":")
    return OPENERS[f"{kind}:"](place, image_size, flip)


def _load_digits(split: str, flip: bool) -> TensorImages:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))  # the fixed split
    test, train = order[:DIGITS_NUM_TEST], order[DIGITS_NUM_TEST:]
    chosen = {"train": train, "test": test, "all": order}[split]
    pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)  # values 0..16
    labels = torch.from_numpy(digits.target[chosen])
    return TensorImages(torch.from_numpy(pixels)[:, None], labels, [*"0123456789"], flip)


def _load_fashion_mnist(split: str, root: str | Path | None, flip: bool) -> TensorImages:
    folder = Path(root) if root is not None else _find_fashion_mnist()
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")  # (n, 28, 28)
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")  # (n,)
    if images.shape != (len(labels), 28, 28) or labels.ndim != 1:
        shapes = f"{tuple(images.shape)} images and {tuple(labels.shape)} labels"
        raise FileError(f"--fashion-mnist-root {folder}: {shapes}, not (n, 28, 28) and (n,)")
    pixels = pad(images[:, None], (2, 2, 2, 2))  # 32 px divide by 2, 4 and 8
    return TensorImages(pixels, labels.long(), FASHION_MNIST_CLASSES, flip)


def _find_fashion_mnist() -> Path:
    if FASHION_MNIST_ROOT.is_dir():
        return FASHION_MNIST_ROOT
    whole = FASHION_MNIST_DOWNLOAD / "FashionMNIST"
    for found in (whole, Path("data/FashionMNIST")):  # where it went before
        if found.is_dir():
            return found / "raw"
    from torchvision.datasets import FashionMNIST

    try:
        FASHION_MNIST_DOWNLOAD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=FASHION_MNIST_DOWNLOAD) as temp:  # each rank its own
            FashionMNIST(temp, download=True)
            with contextlib.suppress(OSError):  # another rank was faster
                os.rename(Path(temp) / "FashionMNIST", whole)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"--data-path fashion-mnist: no files in {FASHION_MNIST_ROOT} (Debian: apt install "
            f"dataset-fashion-mnist) and the download to {FASHION_MNIST_DOWNLOAD} failed: {error}"
        ) from error
    return whole / "raw"


def _read_idx(path: Path) -> Tensor:
    """Read a gzipped idx file of bytes: 0, 0, 8, number of dimensions, sizes, values."""
    try:
        data = gzip.decompress(path.read_bytes())
        shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
        values = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (OSError, EOFError, IndexError, ValueError, zlib.error) as error:
        raise FileError(f"cannot read the idx file {path}: {error}") from error
    return torch.from_numpy(values.copy())
