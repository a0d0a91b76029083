"""Images and latents: data sets, the stateless training stream, the frozen VAE, image grids.

In the order data flows: the datasets (`load_dataset`), the stream of training batches
(`TrainBatches`, `make_loader`), pixels to latents and back (`load_vae`). Images are float32 in
[-1, 1]; the latent scale is applied here and nowhere else.

Shape letters: N batch, C channels, S image size, H W latent size, n samples in a dataset.
"""

import contextlib
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import FileError, UserError
from common.network import why_unreachable
from common.quiet import silence_torchao, silence_worker_count
from common.stopping import ignore_signals
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
    "It accepts 'digits', 'fashion-mnist', a folder with one subfolder of images per class, or "
    "what encode_latents.py made of one"
)
DIGITS_NUM_TEST = 300
MAX_BROKEN_IN_A_ROW = 1000  # more, and it is not single files that are broken
DECODE_CHUNK_PIXELS = 16 * 32 * 32  # latent pixels decoded at once: 16 images of 256 px


# --- Datasets -------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """Labelled images; a subclass only says how to get the pixels.

    Indexed by `(index, flip)`, so that every random choice is made by the batch sampler.
    """

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
        return {"num_images": len(self), "digest": self._digest()}

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

    def latents(self, batch: Tensor, vae: "VAE | Pixels") -> Tensor:
        """Return the latents (N, C, H, W) of a batch of `__getitems__`, on the batch's device."""
        return vae.encode(batch)


class TensorImages(ImageDataset):
    """A small dataset held in memory as uint8."""

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: list[str], flip: bool):
        """Hold pixels (n, C, S, S) uint8 and labels (n,) int64."""
        super().__init__(labels, class_names, pixels.shape[1], pixels.shape[-1], flip)
        self._pixels = pixels

    def _digest(self) -> str:
        """Hash pixels and labels."""
        values = self._pixels.numpy().tobytes() + self.labels.numpy().tobytes()
        return hashlib.sha256(values).hexdigest()[:32]

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
        start = len(str(self.root)) + 1
        files = "\n".join(path[start:] for path in self.paths)
        return hashlib.sha256(os.fsencode(files)).hexdigest()[:32]

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


# --- The stream of training batches ---------------------------------------------------------------


@lru_cache(maxsize=2)  # a batch may span the end of an epoch
def epoch_order(num_samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one epoch's permutation of the samples (n,) and its coin tosses for flips (n,)."""
    generator = np.random.default_rng((seed, epoch))
    return generator.permutation(num_samples), generator.random(num_samples) < 0.5


class TrainBatches(Sampler[list[Key]]):
    """One rank's endless micro-batches, cut from a global stream that depends on the seed only.

    Position p of the stream is sample `p % n` of epoch `p // n`. Micro-batch k of step s on rank r
    takes `micro_batch_size` positions from `((s * accum_steps + k) * world_size + r) *
    micro_batch_size`. So the data position is the step: resuming needs no other state, and the
    samples of a step do not depend on the number of ranks, micro-batches or workers.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        flip: bool = False,
    ):
        """Describe the stream.

        Args:
            num_samples: n.
            micro_batch_size: samples per rank and forward pass.
            accum_steps: micro-batches per optimizer step.
            rank: in [0, world_size).
            world_size: number of ranks.
            seed: non-negative, the same on every rank.
            start_step: optimizer steps already taken.
            flip: mirror half of the samples.
        """
        assert 0 <= rank < world_size and micro_batch_size > 0 and accum_steps > 0
        self.num_samples, self.seed, self.flip = num_samples, seed, flip
        self.micro_batch_size, self.accum_steps = micro_batch_size, accum_steps
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield micro-batches for ever, from the first of `start_step`."""
        for micro_step in itertools.count(self.start_step * self.accum_steps):
            start = (micro_step * self.world_size + self.rank) * self.micro_batch_size
            yield [self._key(p) for p in range(start, start + self.micro_batch_size)]

    def _key(self, position: int) -> Key:
        epoch, offset = divmod(position, self.num_samples)
        order, flips = epoch_order(self.num_samples, self.seed, epoch)
        return int(order[offset]), self.flip and bool(flips[offset])


class _Fetched(NamedTuple):
    """What a worker process sends."""

    batch: tuple[Tensor, Tensor]
    broken: dict[int, str]  # images that it has just found to be broken


class _Worker(Dataset):
    """The data set inside a worker: an error that a user can mend is sent, not raised there.

    `DataLoader` would raise it again with the worker's traceback as its message.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset, self._num_told = dataset, 0

    def __getitems__(self, keys: Sequence[Key]) -> _Fetched | UserError:
        try:
            batch = self.dataset.__getitems__(keys)
        except UserError as error:
            return error
        broken = dict([*self.dataset.broken.items()][self._num_told :])
        self._num_told += len(broken)
        return _Fetched(batch, broken)


def _as_is(batch: Any) -> Any:
    return batch  # `__getitems__` has made it already


class TrainLoader:
    """The endless micro-batches of one rank: images (N, C, S, S) and labels (N,)."""

    def __init__(self, fetched: DataLoader) -> None:
        self.fetched = fetched
        self.broken: dict[int, str] = {}  # images that others stood in for, and why

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches; log every broken image once.

        Raises:
            UserError: an image can't be read.
        """
        for item in self.fetched:
            if isinstance(item, UserError):
                raise item
            for index, why in item.broken.items():
                if index not in self.broken:
                    self.broken[index] = why
                    logging.warning(
                        "--skip-broken: %s; the next image stands in (%d so far)",
                        why, len(self.broken),
                    )  # fmt: skip
            yield item.batch


def make_loader(
    dataset: ImageDataset,
    *,
    micro_batch_size: int,
    accum_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> TrainLoader:
    """Return the endless loader of one rank's micro-batches.

    Args: as `TrainBatches`; num_workers 0 loads in this process, the batches are the same.
    """
    batches = TrainBatches(
        len(dataset),
        micro_batch_size=micro_batch_size,
        accum_steps=accum_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        flip=dataset.flip,
    )
    silence_worker_count()
    fetched: DataLoader = DataLoader(
        _Worker(dataset),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from, and so shifts, the global RNG
        worker_init_fn=ignore_signals,  # a run that is told to stop finishes its step first
    )
    return TrainLoader(fetched)


# --- Images <-> latents ---------------------------------------------------------------------------


class Pixels:
    """No VAE: the model works on the images themselves."""

    channels: int | None = None  # those of the images
    downsample = 1
    x0_range: tuple[float, float] | None = (-1.0, 1.0)  # bounds of what the model draws

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images, (N, C, S, S) in [-1, 1]."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return (N, C, S, S) fp32 images, clamped to [-1, 1]."""
        return latents.float().clamp(-1, 1)


class VAE:
    """A frozen diffusers AutoencoderKL; the only place that knows the latent scale."""

    x0_range: tuple[float, float] | None = None  # latents have no bounds

    def __init__(self, model: Any, dtype: torch.dtype):
        """Wrap an AutoencoderKL.

        Args:
            model: the autoencoder, in float32 on its device.
            dtype: precision of `encode`; `decode` is always float32.
        """
        self.model, self.dtype = model.eval().requires_grad_(False), dtype
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0
        self.image_channels: int = model.config.in_channels
        self.channels: int = model.config.latent_channels
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, scaled, each (N, C, H, W) fp32.

        Args:
            images: (N, 3, S, S) in [-1, 1].

        Raises:
            UserError: the images do not have the VAE's channels.
        """
        if images.shape[1] != self.image_channels:
            raise UserError(
                f"--vae-path: this VAE takes {self.image_channels}-channel images, the data has "
                f"{images.shape[1]}; use --vae-path none"
            )
        low_precision = self.dtype != torch.float32
        with torch.autocast(images.device.type, self.dtype, enabled=low_precision):
            posterior = self.model.encode(images.float()).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents (N, C, H, W) fp32 from the posterior of images (N, 3, S, S).

        Args:
            images: in [-1, 1].
            generator: on the images' device; default: its global one.
        """
        return draw_latents(*self.moments(images), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, S, S) fp32 in [-1, 1] of scaled latents (N, C, H, W)."""
        codes = latents.float() / self.scale + self.shift
        chunk = max(1, DECODE_CHUNK_PIXELS // codes[0, 0].numel())
        with torch.autocast(codes.device.type, enabled=False):
            images = [self.model.decode(part).sample for part in codes.split(chunk)]
        return torch.cat(images).clamp(-1, 1)


def draw_latents(mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw latents (N, C, H, W) fp32 from their mean and deviation, with fresh noise."""
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def load_vae(
    vae_path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    model_channels: int | None = None,
) -> VAE | Pixels:
    """Load a frozen VAE, or `Pixels` for "none".

    Args:
        vae_path: local folder or hub id of a diffusers AutoencoderKL, or of a pipeline that has
            one in its folder "vae"; or "none".
        device: where it runs.
        dtype: precision of `encode`; `decode` is always float32.
        model_channels: latent channels of the checkpoint it is for, where there is one.

    Raises:
        UserError: nothing there, it does not load completely, is of a class or has a scale that
            is not supported, or it makes other latents.
    """
    if str(vae_path) == "none":
        return Pixels()
    files = _find_vae(str(vae_path))
    _check_config(files.config, vae_path)
    silence_torchao()
    from diffusers import AutoencoderKL

    options: dict[str, Any] = {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        model, info = AutoencoderKL.from_pretrained(
            str(vae_path),
            subfolder=files.subfolder or None,
            local_files_only=files.downloaded,
            **options,
        )
    except Exception as error:  # of many types, by what is wrong in the files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--vae-path {vae_path} does not load: {reason}") from error
    if info["missing_keys"]:  # diffusers would go on with random weights
        raise UserError(f"--vae-path {vae_path} lacks the weights {info['missing_keys'][:3]} ...")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"--vae-path {vae_path}: {name} is not finite")
    vae = VAE(model.float().to(device), dtype)
    if model_channels not in (None, vae.channels):
        raise UserError(
            f"--vae-path {vae_path} makes {vae.channels} latent channels, the checkpoint has "
            f"{model_channels}"
        )
    return vae


def _check_config(config: Any, vae_path: str | Path) -> None:
    """Refuse what would load with another meaning, or not at all, naming it."""
    if not isinstance(config, dict):
        raise UserError(f"--vae-path {vae_path} does not load: its config.json is no object")
    name = config.get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(
            f"--vae-path {vae_path} is of class {name}; only AutoencoderKL is supported"
        )
    for entry in ("latents_mean", "latents_std"):
        if config.get(entry) is not None:
            raise UserError(
                f"--vae-path {vae_path} has {entry}, a scale for each channel, which is not "
                "supported; one scaling_factor and shift_factor are"
            )
    for entry in ("scaling_factor", "shift_factor"):
        value = config.get(entry)
        number = isinstance(value, int | float) and math.isfinite(value)
        if (value is not None and not number) or (value == 0 and entry == "scaling_factor"):
            raise UserError(f"--vae-path {vae_path}: its config.json has {entry} {value!r}")


class _VaeFiles(NamedTuple):
    """Where a VAE is in a folder or hub repository."""

    subfolder: str  # "" or, in a pipeline, "vae"
    config: Any  # what its config.json says
    downloaded: bool  # before: nothing is to be asked of the hub


def _find_vae(vae_path: str) -> _VaeFiles:
    if Path(vae_path).is_dir():
        for subfolder in ("", "vae"):
            if (file := Path(vae_path, subfolder, "config.json")).is_file():
                return _VaeFiles(subfolder, _read_json(file, vae_path), True)
        raise UserError(
            f"--vae-path {vae_path} does not load: no config.json in it, nor in {vae_path}/vae"
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", vae_path) is None:
        raise UserError(
            f"--vae-path {vae_path} is not a folder; it accepts a folder saved by diffusers "
            "(config.json and weights), a hub id such as stabilityai/sd-vae-ft-mse, or none"
        )
    return _find_on_hub(vae_path)


def _read_json(file: str | Path, vae_path: str) -> Any:
    try:
        return json.loads(Path(file).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"--vae-path {vae_path}: {file} is damaged: {error}") from error


def _find_on_hub(vae_path: str) -> _VaeFiles:
    """Find config.json; without a network, what was downloaded before counts.

    Raises:
        UserError: neither downloaded nor to be had now.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    tried = f"--vae-path {vae_path}: no such folder, and as a hub id"
    instead = "give a folder saved by diffusers (config.json and weights), or none"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    why = why or why_unreachable(constants.ENDPOINT)
    files = {subfolder: f"{subfolder}/config.json".lstrip("/") for subfolder in ("", "vae")}
    for subfolder, name in files.items() if why else ():
        if isinstance(file := try_to_load_from_cache(vae_path, name), str):
            return _VaeFiles(subfolder, _read_json(file, vae_path), True)
    if why:
        raise UserError(f"{tried} it can't be downloaded ({why}): {instead}")
    for subfolder, name in files.items():
        try:
            file = hf_hub_download(vae_path, name)
            return _VaeFiles(subfolder, _read_json(file, vae_path), False)
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{tried} it can't be downloaded ({reason}): {instead}") from error
    raise UserError(f"{tried} it has no config.json, nor one in vae: {instead}")
