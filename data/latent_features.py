"""Features of an image encoder beside a latent cache, for `--repa` without images.

    features.json        {"encoder", "grid", "width", "complete", "checksums"}
    features-00000.npy   (shard_size, 2, grid * grid, width) float16: of the image and its mirror

Rows are those of the latents' shards.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import FileError, UserError
from common.files import atomic_write
from data.datasets import Key
from data.latent_index import num_shards, shard_rows

INDEX = "features.json"


def features_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"features-{shard:05d}.npy"


def read_features_index(folder: Path) -> dict[str, Any] | None:
    """Return what the features of a cache are of, None if it has none.

    Raises:
        FileError: features.json is damaged.
    """
    path = folder / INDEX
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    kinds = {"encoder": str, "grid": int, "width": int, "complete": bool, "checksums": dict}
    fits = isinstance(found, dict) and all(type(found.get(n)) is k for n, k in kinds.items())
    if not fits:
        raise FileError(f"{path} is damaged: it lacks one of {', '.join(kinds)}")
    return found


def write_features_index(
    folder: Path, encoder: str, grid: int, width: int, checksums: dict[str, str] | None = None
) -> None:
    """Say what the features are of; with the checksums of all files, that all are there."""
    content = {"encoder": encoder, "grid": grid, "width": width}
    content |= {"complete": checksums is not None, "checksums": checksums or {}}
    with atomic_write(folder / INDEX) as temp:
        temp.write_text(json.dumps(content, indent=2) + "\n")


class CachedFeatures:
    """The features of a latent cache, mapped from its files when they are needed.

    Attributes:
        width: of the features.
    """

    def __init__(self, folder: Path, index: dict[str, Any], encoder: str, grid: int) -> None:
        """Open them.

        Args:
            folder: of the cache.
            index: of the cache.
            encoder: that they must be of, timm:NAME.
            grid: tokens in a row of the model.

        Raises:
            UserError: there are none, or others.
            FileError: a file is missing or damaged.
        """
        found = read_features_index(folder)
        again = f"encode_latents.py with --features {encoder} --feature-grid {grid}"
        if found is None or not found["complete"]:
            what = "no features" if found is None else "features that are not all there"
            raise UserError(f"--repa {encoder}: {folder} has {what}; run its {again}")
        if (found["encoder"], found["grid"]) != (encoder, grid):
            raise UserError(
                f"--repa {encoder}: {folder} has features of {found['encoder']} on a grid of "
                f"{found['grid']}, the model has {grid}; run its {again}"
            )
        self.width, self._shard_size = found["width"], index["shard_size"]
        self._shards: list[np.ndarray] = []
        for shard in range(num_shards(index)):
            path = features_path(folder, shard)
            shape = (len(shard_rows(index, shard)), 2, grid * grid, self.width)
            try:
                self._shards.append(np.load(path, mmap_mode="r"))
            except (OSError, ValueError, EOFError) as error:
                raise FileError(f"{path} cannot be read: {error}") from error
            if self._shards[-1].shape != shape or self._shards[-1].dtype != np.float16:
                raise FileError(f"{path} holds {self._shards[-1].shape}, not float16 {shape}")

    def rows(self, rows: Sequence[int], keys: Sequence[Key]) -> Tensor:
        """Return (N, T, width) fp32 of rows of the cache, mirrored as the keys say."""
        parts = []
        for row, (_, flip) in zip(rows, keys, strict=True):
            shard, place = divmod(int(row), self._shard_size)
            parts.append(torch.from_numpy(self._shards[shard][place, int(flip)].astype(np.float32)))
        return torch.stack(parts)
