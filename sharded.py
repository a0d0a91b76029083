"""Sharded checkpoints on disk: one file of each rank's share, readable by any number of ranks.

    RUN_DIR/checkpoints/latest                      name of the last whole checkpoint
    RUN_DIR/checkpoints/0001000/state.json          config, settings, step, shapes
    RUN_DIR/checkpoints/0001000/00000.safetensors   what rank 0 held

A share is a set of fragments: `KIND/NAME` is a flat fp32 piece of parameter NAME, and the file's
metadata tells where in the parameter it starts. KIND is "model", "ema", "exp_avg" or "exp_avg_sq".
All is written to 0001000.partial, which gets its name when every rank is done; then `latest` is
replaced. So a folder that has its name is whole, and so is the one that `latest` names.

In order: writing (`write_safetensors`, `write_share`, `write_state`, `commit`), then reading
(`latest_sharded`, `ShardedCheckpoint`). Nothing here can run code when read, and nothing needs the
model whole.
"""

import json
import math
import os
import shutil
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT, VERSION = "dit-moe-sharded", 1
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}


class Fragment(NamedTuple):
    """A piece of one parameter, flattened."""

    name: str  # of the parameter
    start: int  # first element within the flattened parameter
    tensor: Tensor  # (numel,) fp32


# ---------------------------------------------------------------- writing


def write_safetensors(
    path: Path, shapes: Mapping[str, Iterable[int]], tensors: Mapping[str, Tensor], **metadata: str
) -> None:
    """Write a .safetensors file tensor by tensor, so that a lazy mapping is never whole in memory.

    Args:
        path: to write; not atomic.
        shapes: of all tensors.
        tensors: floats, written as float32, or uint8 where `shapes` has a name that starts with
            "rng/".
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, shape in shapes.items():
        code, width = ("U8", 1) if name.startswith("rng/") else ("F32", 4)
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            tensor = tensors[name].detach().cpu()
            tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            assert DTYPES[tensor.dtype] == header[name]["dtype"], name
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def partial_folder(run_dir: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before `commit` gives it its name."""
    return Path(run_dir) / "checkpoints" / f"{step:07d}.partial"


def write_share(
    folder: Path,
    rank: int,
    kinds: Mapping[str, Iterable[Fragment]],
    rng: Mapping[str, Tensor],
) -> None:
    """Write what one rank holds.

    Args:
        folder: of the checkpoint.
        rank: of the writer.
        kinds: fragments by kind.
        rng: uint8 generator states by device.

    Raises:
        OSError: naming the file.
    """
    tensors = {f"rng/{device}": state for device, state in rng.items()}
    starts = {}
    for kind, fragments in kinds.items():
        for name, start, tensor in fragments:
            tensors[f"{kind}/{name}"], starts[name] = tensor, start
    path = _share_path(folder, rank)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_safetensors(path, shapes, tensors, starts=json.dumps(starts))
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what is the same on all ranks; plain JSON values."""
    content = {"format": FORMAT, "version": VERSION, **state}
    _write_text(folder / "state.json", json.dumps(content, indent=2, sort_keys=True))


def commit(partial: Path, keep_last: int) -> Path:
    """Make a checkpoint, whose files are all on disk, the latest; then delete the oldest ones.

    Args:
        partial: its folder, see `partial_folder`.
        keep_last: number to keep, 0 keeps all; what killed writes left goes too.

    Returns:
        The folder under its final name.
    """
    folder = partial.with_suffix("")
    if folder.exists():  # a run that went back to an older checkpoint passes here again
        shutil.rmtree(folder)
    os.rename(partial, folder)
    mark_latest(folder)
    for leftover in folder.parent.glob("*.partial"):
        shutil.rmtree(leftover)
    for old in _folders(folder.parent)[:-keep_last] if keep_last else []:
        if old != folder:
            shutil.rmtree(old)
    return folder


def mark_latest(checkpoint: Path) -> None:
    """Let `latest` beside a checkpoint name it: a run that went back may hold later steps."""
    pointer = checkpoint.with_name("latest")
    temporary = pointer.with_suffix(".tmp")
    _write_text(temporary, checkpoint.name)
    os.replace(temporary, pointer)


def _folders(checkpoints: Path) -> list[Path]:
    """Return the whole checkpoints in the order of their steps."""
    folders = [item for item in checkpoints.glob("*") if item.is_dir() and item.name.isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name))


def _write_text(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _share_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.safetensors"


# ---------------------------------------------------------------- reading


def latest_sharded(run_dir: str | Path) -> Path | None:
    """Return the folder that `latest` of a run names, None if there is none."""
    pointer = Path(run_dir) / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text().strip()
    if folder.is_dir():
        return folder
    folders = _folders(pointer.parent)
    return folders[-1] if folders else None


class ShardedCheckpoint:
    """A sharded checkpoint, opened: small values in memory, tensors mapped.

    Attributes:
        state: config, settings, step, shapes and what else the trainer saved.
    """

    def __init__(self, folder: Path) -> None:
        """Open all shares.

        Raises:
            FileNotFoundError, ValueError: a share is missing or damaged.
        """
        self.folder = folder
        self.state = json.loads((folder / "state.json").read_text())
        if self.state["version"] > VERSION:
            raise ValueError(
                f"{folder} has version {self.state['version']}, this code reads up to {VERSION}"
            )
        self.shapes: dict[str, list[int]] = self.state["shapes"]
        self._shares = [self._open(rank) for rank in range(self.state["num_ranks"])]
        self._places: dict[str, list[tuple[int, Any]]] = defaultdict(list)  # start, share
        for share in self._shares:
            for name, start in json.loads(share.metadata()["starts"]).items():
                self._places[name].append((start, share))

    def _open(self, rank: int) -> Any:
        path = _share_path(self.folder, rank)
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder} is incomplete: no {path.name}")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Return the generator states that a rank saved, by device."""
        share = self._shares[rank]
        names = [name for name in share.keys() if name.startswith("rng/")]  # noqa: SIM118
        return {name.removeprefix("rng/"): share.get_tensor(name) for name in names}

    def read(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Return `numel` elements of a flattened parameter from `start` on, by default all.

        Raises:
            ValueError: if the shares do not hold them all.
        """
        numel = math.prod(self.shapes[name]) - start if numel is None else numel
        out = torch.empty(numel)
        found = 0
        for place, share in self._places[name]:
            piece = share.get_slice(f"{kind}/{name}")
            low = max(start, place)
            high = min(start + numel, place + piece.get_shape()[0])
            if low < high:
                out[low - start : high - start] = piece[low - place : high - place]
                found += high - low
        if found != numel:
            raise ValueError(f"{self.folder} holds {found} of {numel} elements of {kind}/{name}")
        return out

    def weights(self, kind: str, frozen: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a state dict that assembles each tensor when asked for it.

        Args:
            kind: "model" or "ema".
            frozen: what is not trained, and so in no share.
        """
        return _Weights(self, kind, frozen)


class _Weights(Mapping[str, Tensor]):
    """See `ShardedCheckpoint.weights`."""

    def __init__(
        self, checkpoint: ShardedCheckpoint, kind: str, frozen: Mapping[str, Tensor]
    ) -> None:
        self._checkpoint, self._kind, self._frozen = checkpoint, kind, frozen

    def __getitem__(self, name: str) -> Tensor:
        if name in self._frozen:
            return self._frozen[name]
        return self._checkpoint.read(self._kind, name).view(self._checkpoint.shapes[name])

    def __iter__(self) -> Iterator[str]:
        yield from self._frozen
        yield from self._checkpoint.shapes

    def __len__(self) -> int:
        return len(self._frozen) + len(self._checkpoint.shapes)
