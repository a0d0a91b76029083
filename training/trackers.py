"""Where a run's curves and pictures go, by `--tracker`: TensorBoard's files, Weights & Biases.

In order: `Tracker`, `TensorBoard`, `Wandb`, `open_trackers`, then `LoadPicture`, the load of all
experts as an image over steps.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from training.settings import TrainSettings

EVEN_COLOUR, LOW_COLOUR, HIGH_COLOUR = (245, 245, 245), (33, 72, 135), (176, 28, 44)  # RGB
LOAD_MEASURES = ("max_vio", "entropy", "dead")  # each a chart with a line a layer
COLUMNS, CELL = 512, 3  # of the load's picture: most columns, pixels of a row


class Tracker(Protocol):
    """What keeps curves and pictures; an OSError of it costs the curves, not the run."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, (H, W, 3) uint8."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run_dir: Path, start_step: int, layers: Sequence[int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the checkpoint are done again: this hides their first points.
        self.writer = SummaryWriter(str(run_dir), purge_step=start_step + 1)
        if layers:
            charts = {
                f"{name} by layer": [
                    "Multiline",
                    [f"experts/{name}/layer_{layer:02d}" for layer in layers],
                ]
                for name in LOAD_MEASURES
            }
            self.writer.add_custom_scalars({"experts": charts})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, (H, W, 3) uint8."""
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, online or, with WANDB_MODE=offline, in RUN_DIR/wandb.

    A run that goes on has the same id; of steps done again the first points stay.
    """

    def __init__(self, run_dir: Path, settings: TrainSettings) -> None:
        import wandb

        self.wandb = wandb
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16]
        try:
            self.run: Any = wandb.init(
                project="dit-moe",
                id=name,
                name=settings.run_name,
                dir=str(run_dir),
                config=settings.to_dict(),
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise UserError(f"--tracker wandb: {error}") from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve."""
        self.run.log(dict(values), step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add a picture, (H, W, 3) uint8."""
        self.run.log({name: self.wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not there.

    Raises:
        UserError: it says what to install.
    """
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        raise UserError("--tracker wandb needs a package that is not here: pip install wandb")


def open_trackers(
    settings: TrainSettings, run_dir: Path, start_step: int, layers: Sequence[int]
) -> list[Tracker]:
    """Open what `--tracker` names.

    Args:
        settings: of the run, kept beside the curves.
        run_dir: its folder.
        start_step: steps done.
        layers: numbers of the blocks with experts.

    Raises:
        UserError: wandb refuses, for want of a key.
    """
    trackers: list[Tracker] = []
    if "tensorboard" in settings.tracker:
        trackers.append(TensorBoard(run_dir, start_step, layers))
    if "wandb" in settings.tracker:
        trackers.append(Wandb(run_dir, settings))
    return trackers


class LoadPicture:
    """The share of tokens of every expert, one row each under its layer's, over the steps so far.

    White is an even share, blue none and red twice as much or more. Every attempt of a run begins
    anew; when there are too many columns, every second one goes.
    """

    def __init__(self) -> None:
        self._columns: list[Tensor] = []  # (L, E) each, 1.0 = even

    def add(self, counts: Tensor) -> None:
        """Take the tokens by layer and expert (L, E) of some steps."""
        total = counts.sum(dim=1, keepdim=True).clamp(min=1)
        self._columns.append((counts * counts.shape[1] / total).float().cpu())
        if len(self._columns) > COLUMNS:
            del self._columns[::2]

    def pixels(self) -> np.ndarray | None:
        """Return (H, W, 3) uint8, None if nothing was added."""
        if not self._columns or not self._columns[0].numel():
            return None
        share = torch.stack(self._columns, dim=-1).clamp(0, 2)  # (L, E, columns)
        even, low, high = (torch.tensor(c).float() for c in (EVEN_COLOUR, LOW_COLOUR, HIGH_COLOUR))
        above = (share - 1).clamp(min=0)[..., None]
        below = (1 - share).clamp(min=0)[..., None]
        colours = even + above * (high - even) + below * (low - even)  # (L, E, columns, 3)
        rows = torch.nn.functional.pad(colours, (0, 0, 0, 0, 0, 1), value=0.0)  # black between
        picture = rows.flatten(0, 1)[:-1].repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)
        return picture.round().to(torch.uint8).numpy()
