"""The files of drawn samples: written as they come, whole at the end, never over something else's.

`SampleFiles` are those of one seed; `read_object` and `write_object` are for JSON beside them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import FileError, UserError
from common.files import atomic_write
from common.pictures import save_grid
from evaluation.image_sets import NpzSet, save_npz


class SampleFiles:
    """The files of one seed: its claim, batches while they come, then an .npz and a picture."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        self.claim, self.npz = out / f"seed{seed}.json", out / f"seed{seed}.npz"
        self.picture, self.parts = out / f"seed{seed}.png", out / f"seed{seed}"

    def check(self, identity: dict[str, Any]) -> float:
        """Return the seconds per sample that were measured before, 0 if none were.

        Raises:
            UserError: the files are of another command, or not of this script.
        """
        if not self.claim.exists():
            for path in (self.npz, self.picture, self.parts):
                if path.exists():
                    raise UserError(
                        f"--out {self.out} has {path.name}, which no {self.claim.name} describes: "
                        "give another --out"
                    )
            return 0.0
        found = read_object(self.claim)
        seconds = found.pop("seconds_per_sample", 0.0)
        if different := [name for name in identity if found.get(name) != identity[name]]:
            name = different[0]
            raise UserError(
                f"--out {self.out} holds samples with {name} {found.get(name)}, this command has "
                f"{identity[name]}: give another --out, or delete it"
            )
        return float(seconds)

    def part(self, first: int) -> Path:
        """Return the file of a batch by its first sample."""
        return self.parts / f"{first:08d}.npy"

    def join(self, starts: range, labels: Tensor, columns: int) -> None:
        """Make one .npz and a picture of all batches, and remove these."""
        batches = (torch.from_numpy(np.load(self.part(first))) for first in starts)
        save_npz(self.npz, len(labels), batches, labels)
        shutil.rmtree(self.parts)
        images = NpzSet(self.npz).images(0, min(100, len(labels))).float() / 127.5 - 1
        save_grid(images, self.picture, columns=columns)


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object that this script wrote.

    Raises:
        FileError: it is damaged or something else.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise FileError(f"{path} is damaged ({error}); delete it, or give another --out") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} is not of this script; give another --out")
    return found


def write_object(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    with atomic_write(path) as temp:
        temp.write_text(json.dumps(content, indent=2) + "\n")
