"""A folder of encoded images: what encode_latents.py writes and a trainer reads instead of images.

    index.json      what the cache is of, see `plan`; "complete" once all is there
    labels.npy      (n,) int64, of all images, also those that could not be read
    keys.npy        (n,) uint64, hashes of their names
    shard-00000.npy (shard_size, 2, M, C, H, W): image and its mirror; M = 2: mean and deviation,
                    scaled; M = 1: the latents of a deterministic autoencoder

Rows follow the image folder's order; those of unreadable images are zero and skipped. Half formats
are kept as the bits of int16, which is all that .npy files know of bfloat16.

Shape letters: N batch, C H W latent, n images in the folder.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from common.arrays import ArrayHeader, array_header
from common.errors import FileError, UserError
from common.files import verify_file
from data.autoencoders import VAE, LatentNorm, Pixels, draw_latents, load_vae, vae_identity
from data.datasets import ImageDataset, Key, load_dataset
from data.latent_features import CachedFeatures
from data.latent_index import (
    FORMAT,
    KEYS,
    LABELS,
    VERSION,
    cache_index,
    num_shards,
    shard_path,
    shard_rows,
)

# Name in the index -> the type of the values, and the type that a file stores their bits as.
DTYPES = {
    "float16": (torch.float16, torch.int16),
    "bfloat16": (torch.bfloat16, torch.int16),
    "float32": (torch.float32, torch.float32),
}
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"  # of images


def plan(
    dataset: ImageDataset, vae: VAE, *, data_path: str, vae_path: str, dtype: str, shard_size: int
) -> dict[str, Any]:
    """Return the index of a cache before its first image."""
    side = dataset.image_size // vae.downsample
    return {
        "format": FORMAT,
        "version": VERSION,
        "data_path": whole_path(data_path),
        "files": dataset.fingerprint()["digest"],
        "num_images": len(dataset),
        "image_size": dataset.image_size,
        "class_names": dataset.class_names,
        "vae_path": vae_path,
        "vae": vae_identity(vae),
        "scale": vae.scale,
        "shift": vae.shift,
        "latent_shape": [vae.channels, side, side],
        "num_moments": 1 if vae.deterministic else 2,
        "dtype": dtype,
        "shard_size": shard_size,
        "complete": False,
        "unreadable": [],
        "checksums": {},
    }


def whole_path(data_path: str) -> str:
    """Return what a path means wherever the command runs; a hub id as it is."""
    if data_path.startswith("hf:"):
        return data_path
    prefix = "tar:" if data_path.startswith("tar:") else ""
    return prefix + str(Path(data_path.removeprefix(prefix)).resolve())


def to_stored(moments: Tensor, dtype: str) -> np.ndarray:
    """Return fp32 moments as the array that a shard keeps."""
    values, stored = DTYPES[dtype]
    return moments.to(values).view(stored).numpy()


def from_stored(rows: Tensor, dtype: str) -> Tensor:
    """Return rows of a shard in fp32."""
    return rows.view(DTYPES[dtype][0]).float()


class CachedLatents(ImageDataset):
    """A cache as the data set of a trainer: its samples are moments, not images."""

    def __init__(self, folder: Path, *, flip: bool = True) -> None:
        """Open a cache; shards are mapped when they are needed.

        Args:
            folder: of the cache.
            flip: whether training takes the mirrored half as often.

        Raises:
            UserError: the cache is not finished, not one of ours, or of a newer version.
            FileError: a file of it is missing, too short or something else.
        """
        index = cache_index(folder)
        if index is None:
            raise FileError(f"{folder}/index.json is not of a latent cache that this code reads")
        if not index["complete"]:
            raise UserError(
                f"--data-path {folder}: this cache is not finished; run its encode_latents.py "
                "command again"
            )
        self.folder, self.index = folder, index
        unreadable = [entry["index"] for entry in index["unreadable"]]
        labels = self._read_column(LABELS, np.int64)
        self.rows = np.delete(np.arange(len(labels)), unreadable)
        self._shards: dict[int, Tensor] = {}
        self.features: CachedFeatures | None = None  # set where a trainer wants them
        for shard in range(num_shards(index)):
            self._header(shard)
        kept = torch.from_numpy(labels[self.rows])
        super().__init__(kept, index["class_names"], 3, index["image_size"], flip)

    def _digest(self) -> str:
        """Return that of the folder it was made of, whose order it has; unreadable files count."""
        unreadable = [entry["index"] for entry in self.index["unreadable"]]
        files = self.index["files"]
        if not unreadable:
            return files
        return hashlib.sha256(f"{files}{unreadable}".encode()).hexdigest()[:32]

    def keys(self) -> np.ndarray:
        """Return the hashes of the images' names, as the image folder has them.

        Raises:
            UserError: the cache is of a version that did not keep them.
        """
        if KEYS not in self.index.get("checksums", {}):
            raise UserError(f"--data-path {self.folder} has no names of its images: encode anew")
        return self._read_column(KEYS, np.uint64)[self.rows]

    def _take(self, chosen: Tensor) -> None:
        self.rows = self.rows[chosen.numpy()]

    def _read_column(self, name: str, kind: type) -> np.ndarray:
        path = self.folder / name
        try:
            column = np.load(path)  # never with Python objects
        except FileNotFoundError as error:
            raise FileError(f"--data-path {self.folder}: {path.name} is missing") from error
        except (ValueError, EOFError) as error:
            raise FileError(f"{path} is damaged: {error}") from error
        if column.shape != (self.index["num_images"],) or column.dtype != kind:
            raise FileError(
                f"{path} holds {column.dtype} {column.shape}, not {kind.__name__} "
                f"({self.index['num_images']},)"
            )
        return column

    def _header(self, shard: int) -> ArrayHeader:
        """Make sure that a shard is there and as large as it should be; its values are not read."""
        path, stored = shard_path(self.folder, shard), DTYPES[self.index["dtype"]][1]
        parts = (2, self.index["num_moments"])  # image and mirror; mean and deviation
        shape = (len(shard_rows(self.index, shard)), *parts, *self.index["latent_shape"])
        try:
            with open(path, "rb") as file:
                header, size = array_header(file), os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise FileError(
                f"--data-path {self.folder}: {path.name} is missing; encode anew"
            ) from error
        except ValueError as error:
            raise FileError(f"{path} is damaged: {error}") from error
        expected = np.dtype(str(stored).removeprefix("torch."))
        if header.shape != shape or header.dtype != expected or header.column_major:
            raise FileError(f"{path} holds {header.dtype} {header.shape}, not {expected} {shape}")
        if size != header.end:
            raise FileError(f"{path} is damaged: {size} bytes instead of {header.end}; encode anew")
        return header

    def verify(self, rank: int = 0, num_ranks: int = 1) -> None:
        """Compare this rank's share of the files with their checksums, each read once.

        Raises:
            DamagedFileError: a file has changed since it was written.
        """
        checksums = self.index.get("checksums", {})  # old caches have none
        mine = sorted(checksums)[rank::num_ranks]
        for name in tqdm(mine, desc="checksums", unit="file", disable=rank > 0, leave=False):
            verify_file(self.folder / name, checksums[name])

    def check_vae(self, vae: VAE | Pixels, vae_path: str) -> None:
        """Make sure that a VAE is the one that made the cache.

        Raises:
            UserError: it is another.
        """
        if isinstance(vae, Pixels) or vae_identity(vae) != self.index["vae"]:
            raise UserError(
                f"--vae-path {vae_path} is not the VAE that made {self.folder}: that was "
                f"{self.index['vae_path']}; leave the flag out, or encode anew"
            )

    def _mapped(self, shard: int) -> Tensor:
        """Return the rows of a shard, (rows, 2, M, C, H, W); torch's maps keep no file open."""
        if shard not in self._shards:
            header, path = self._header(shard), shard_path(self.folder, shard)
            stored = DTYPES[self.index["dtype"]][1]
            size = header.dtype.itemsize  # .npy files start their values at a multiple of 64 bytes
            whole = torch.from_file(str(path), False, header.end // size, dtype=stored)
            self._shards[shard] = whole[header.offset // size :].view(header.shape)
        return self._shards[shard]

    def moments(self, keys: Sequence[Key]) -> Tensor:
        """Return mean and deviation (N, M, C, H, W) fp32 of N samples."""
        parts = []
        for index, flip in keys:
            shard, row = divmod(int(self.rows[index]), self.index["shard_size"])
            parts.append(self._mapped(shard)[row, int(flip)])
        return from_stored(torch.stack(parts), self.index["dtype"])

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Any, Tensor]:
        """Return a batch: moments (N, M, C, H, W) fp32, labels (N,) int64.

        Where `features` are asked for, the first is a pair: moments, and features (N, T, width).
        """
        indices = torch.tensor([index for index, _ in keys])
        if self.features is None:
            return self.moments(keys), self.labels[indices]
        features = self.features.rows(self.rows[indices.numpy()], keys)
        return (self.moments(keys), features), self.labels[indices]

    def latents(self, batch: Tensor, vae: VAE | Pixels) -> Tensor:
        """Draw latents (N, C, H, W) from the moments of a batch, as the VAE does from images."""
        return draw_latents(vae.normalize(batch.unbind(dim=1)))


class Data(NamedTuple):
    """What a run learns from."""

    dataset: ImageDataset  # images, or the moments of their latents
    vae: VAE | Pixels
    vae_path: str

    def latent_norm(self) -> LatentNorm:
        """Return the mean and deviation of each channel that encode_latents.py measured.

        Raises:
            UserError: it did not.
        """
        index = self.dataset.index if isinstance(self.dataset, CachedLatents) else {}
        if index.get("latent_norm") is None:
            raise UserError(
                "--latent-norm channel: --data-path has no mean and deviation of its channels; "
                "give a cache of encode_latents.py (an older one learns them by its same command)"
            )
        return LatentNorm(*(tuple(index["latent_norm"][name]) for name in ("mean", "std")))


def open_data(
    data_path: str,
    *,
    device: torch.device | str,
    vae_path: str | None = None,
    image_size: int | None = None,
    flip: bool | None = None,
    fashion_mnist_root: str | None = None,
    skip_broken: bool = False,
) -> Data:
    """Open images, or a latent cache, and the autoencoder that belongs to them, for training.

    Args:
        data_path: see `load_dataset`; a latent cache is read instead of its images.
        device: where the autoencoder runs.
        vae_path: see `load_vae`; default: a cache's own, Stable Diffusion's for an image folder,
            "none" for the embedded data.
        image_size, flip, fashion_mnist_root, skip_broken: see `load_dataset`.

    Raises:
        UserError: naming the flag that does not fit, or the file that is broken.
    """
    if cache_index(data_path) is None:
        dataset = load_dataset(
            data_path,
            image_size=image_size,
            fashion_mnist_root=fashion_mnist_root,
            flip=flip,
            skip_broken=skip_broken,
        )
        folder = not dataset.in_memory
        vae_path = vae_path or (DEFAULT_VAE if folder else "none")
        return Data(dataset, load_vae(vae_path, device=device), vae_path)
    cache = CachedLatents(Path(data_path), flip=flip is not False)
    if image_size not in (None, cache.image_size):
        raise UserError(
            f"--image-size {image_size}: {data_path} was encoded at {cache.image_size} pixels"
        )
    vae_path = vae_path or cache.index["vae_path"]
    vae = load_vae(vae_path, device=device)
    cache.check_vae(vae, vae_path)
    # The ranks of a node share the work, since each node may have its own copy.
    env = os.environ
    cache.verify(int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1)))
    return Data(cache, vae, vae_path)
