"""A folder of encoded images: what encode_latents.py writes and a trainer reads instead of images.

    index.json      what the cache is of, see `plan`; "complete" once all is there
    labels.npy      (n,) int64, of all images, also those that could not be read
    shard-00000.npy (shard_size, 2, 2, C, H, W): image and its mirror; mean and deviation, scaled

Rows follow the image folder's order; those of unreadable images are zero and skipped. Half formats
are kept as the bits of int16, which is all that .npy files know of bfloat16.

Shape letters: N batch, C H W latent, n images in the folder.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import atomic_write
from data import (
    LATENT_CACHE,
    VAE,
    FolderImages,
    ImageDataset,
    Key,
    Pixels,
    cache_index,
    draw_latents,
    load_vae,
)

DTYPES = {
    "float16": (torch.float16, np.int16),
    "bfloat16": (torch.bfloat16, np.int16),
    "float32": (torch.float32, np.float32),
}
VERSION = 1


def vae_identity(vae: VAE | Pixels) -> str:
    """Return a hash of a VAE's weights and latent scale, the same wherever it is stored.

    "none" where the model works on pixels.
    """
    if isinstance(vae, Pixels):
        return "none"
    digest = hashlib.sha256(repr((vae.scale, vae.shift)).encode())
    for name, tensor in sorted(vae.model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def plan(
    dataset: FolderImages, vae: VAE, *, data_path: str, vae_path: str, dtype: str, shard_size: int
) -> dict[str, Any]:
    """Return the index of a cache before its first image."""
    side = dataset.image_size // vae.downsample
    files = "\n".join(str(Path(path).relative_to(data_path)) for path in dataset.paths)
    return {
        "format": LATENT_CACHE,
        "version": VERSION,
        "data_path": str(Path(data_path).resolve()),
        "files": hashlib.sha256(files.encode()).hexdigest()[:32],
        "num_images": len(dataset),
        "image_size": dataset.image_size,
        "class_names": dataset.class_names,
        "vae_path": vae_path,
        "vae": vae_identity(vae),
        "scale": vae.scale,
        "shift": vae.shift,
        "latent_shape": [vae.channels, side, side],
        "dtype": dtype,
        "shard_size": shard_size,
        "complete": False,
        "bad": [],
    }


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json."""
    with atomic_write(folder / "index.json") as temp:
        temp.write_text(json.dumps(index, indent=1) + "\n")


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard:05d}.npy"


def to_stored(moments: Tensor, dtype: str) -> np.ndarray:
    """Return fp32 moments as the array that a shard keeps."""
    torch_dtype, stored = DTYPES[dtype]
    rounded = moments.to(torch_dtype)
    return (rounded if stored == np.float32 else rounded.view(torch.int16)).numpy()


def from_stored(rows: np.ndarray, dtype: str) -> Tensor:
    """Return rows of a shard in fp32."""
    return torch.from_numpy(rows).view(DTYPES[dtype][0]).float()


class CachedLatents(ImageDataset):
    """A cache as the data set of a trainer: its samples are moments, not images."""

    def __init__(self, folder: Path, *, flip: bool = True) -> None:
        """Open a cache; shards are mapped when they are needed.

        Args:
            folder: of the cache.
            flip: whether training takes the mirrored half as often.

        Raises:
            ValueError: the cache is not finished or of a newer version.
        """
        index = cache_index(folder)
        if index is None or index["version"] > VERSION:
            raise ValueError(f"{folder}/index.json is not of a latent cache that this code reads")
        if not index["complete"]:
            raise ValueError(
                f"--data-path {folder}: this cache is not finished; run its encode_latents.py "
                "command again"
            )
        self.folder, self.index = folder, index
        bad = [entry["index"] for entry in index["bad"]]
        labels = np.load(folder / "labels.npy")
        self.rows = np.delete(np.arange(len(labels)), bad)
        self._shards: dict[int, np.ndarray] = {}
        kept = torch.from_numpy(labels[self.rows])
        super().__init__(kept, index["class_names"], 3, index["image_size"], flip)

    def check_vae(self, vae: VAE | Pixels, vae_path: str) -> None:
        """Make sure that a VAE is the one that made the cache.

        Raises:
            ValueError: it is another.
        """
        if isinstance(vae, Pixels) or vae_identity(vae) != self.index["vae"]:
            raise ValueError(
                f"--vae-path {vae_path} is not the VAE that made {self.folder}: that was "
                f"{self.index['vae_path']}; leave the flag out, or encode anew"
            )

    def moments(self, keys: Sequence[Key]) -> Tensor:
        """Return mean and deviation (N, 2, C, H, W) fp32 of N samples."""
        parts = []
        for index, flip in keys:
            shard, row = divmod(int(self.rows[index]), self.index["shard_size"])
            if shard not in self._shards:
                self._shards[shard] = np.load(shard_path(self.folder, shard), mmap_mode="r")
            parts.append(self._shards[shard][row, int(flip)])
        return from_stored(np.stack(parts), self.index["dtype"])

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """Return a batch: moments (N, 2, C, H, W) fp32, labels (N,) int64."""
        indices = torch.tensor([index for index, _ in keys])
        return self.moments(keys), self.labels[indices]

    def latents(self, batch: Tensor, vae: VAE | Pixels) -> Tensor:
        """Draw latents (N, C, H, W) from the moments of a batch, as the VAE does from images."""
        mean, std = batch.unbind(dim=1)
        return draw_latents(mean, std)


def open_cache(
    folder: Path,
    *,
    image_size: int | None,
    flip: bool | None,
    vae_path: str | None,
    device: torch.device,
) -> tuple[CachedLatents, VAE | Pixels, str]:
    """Open a cache and its VAE for training.

    Returns:
        The data set, the VAE (it draws the sample grids) and its path.

    Raises:
        ValueError: a flag contradicts the cache.
    """
    dataset = CachedLatents(folder, flip=flip is not False)
    if image_size not in (None, dataset.image_size):
        raise ValueError(
            f"--image-size {image_size}: {folder} was encoded at {dataset.image_size} pixels"
        )
    vae_path = vae_path or dataset.index["vae_path"]
    vae = load_vae(vae_path, device=device)
    dataset.check_vae(vae, vae_path)
    return dataset, vae, vae_path
