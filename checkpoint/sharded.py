"""Sharded checkpoints on disk: one file of each rank's share, readable by any number of ranks.

    RUN_DIR/checkpoints/0001000/state.json          config, settings, step, shapes
    RUN_DIR/checkpoints/0001000/00000.safetensors   what rank 0 held

A share is a set of fragments: `KIND/NAME` is a flat fp32 piece of parameter NAME, and the file's
metadata tells where in the parameter it starts. KIND is "model", "ema", "exp_avg" or "exp_avg_sq".
What all ranks have whole, biases and thresholds of routers, is `buffer/NAME` in the first share.
All is written to 0001000.HEX.partial, which gets its name when every rank is done, so a folder that
has its name is whole. Every file carries its checksum, and state.json those of the shares, so that
shares of two checkpoints never mix.

In order: writing (`write_safetensors`, `write_share`, `write_state`, `commit`), then reading
(`ShardedCheckpoint`). Nothing here can run code when read, and nothing needs the model whole.
"""

import json
import math
import os
import struct
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.run_folder import checkpoint_folder, list_checkpoints, make_latest, remove
from checkpoint.run_lock import check_not_taken
from common import process
from common.errors import FileError
from common.files import UNSEALED, DamagedFileError, seal, verify_file

FORMAT, VERSION = "dit-moe-sharded", 1
DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
_SEAL = b'"crc32": "'  # what stands before the digits of a file's checksum


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

    It carries its checksum, as after `common.files.seal`.

    Args:
        path: to write; not atomic.
        shapes: of all tensors.
        tensors: floats, written as float32, or uint8 where `shapes` has a name that starts with
            "rng/".
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **UNSEALED, **metadata}}
    end = 0
    for name, shape in shapes.items():
        code, width = ("U8", 1) if name.startswith("rng/") else ("F32", 4)
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text
    with open(path, "wb") as file:
        file.write(content)
        checksum = zlib.crc32(content)
        for name in shapes:
            tensor = tensors[name].detach().cpu()
            tensor = (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
            assert DTYPES[tensor.dtype] == header[name]["dtype"], name
            data = tensor.view(-1).view(torch.uint8).numpy().data
            file.write(data)
            checksum = zlib.crc32(data, checksum)
        file.seek(content.index(_SEAL) + len(_SEAL))
        file.write(f"{checksum:08x}".encode())
        file.flush()
        os.fsync(file.fileno())


def partial_folder(run_dir: str | Path, step: int) -> Path:
    """Return where all ranks write the checkpoint of a step before `commit` gives it its name.

    Called on all ranks at once: the name is that of this save alone.
    """
    token = process.from_main(uuid.uuid4().hex[:8])
    return checkpoint_folder(run_dir) / f"{step:07d}.{token}.partial"


def write_share(
    folder: Path,
    rank: int,
    kinds: Mapping[str, Iterable[Fragment]],
    rng: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what one rank holds.

    Args:
        folder: of the checkpoint.
        rank: of the writer.
        kinds: fragments by kind.
        rng: uint8 generator states by device.
        buffers: what all ranks have whole, by name; of rank 0 only.

    Raises:
        FileError: naming the file that could not be written.
    """
    tensors = {f"rng/{device}": state for device, state in rng.items()}
    tensors |= {f"buffer/{name}": buffer for name, buffer in (buffers or {}).items()}
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
        raise FileError(f"could not write {path}: {error.strerror or error}") from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what is the same on all ranks; plain JSON values.

    Raises:
        FileError: naming the file that could not be written.
    """
    content = {"format": FORMAT, "version": VERSION, **state, **UNSEALED}
    path = folder / "state.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            file.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
        seal(path)
        with open(path, "rb") as written:
            os.fsync(written.fileno())
    except OSError as error:
        raise FileError(f"could not write {path}: {error.strerror or error}") from error


def commit(partial: Path, keep_last: int, resumed: str | None = None) -> Path:
    """Make a checkpoint, whose files are all on disk, the latest; then delete the oldest ones.

    Args:
        partial: its folder, see `partial_folder`.
        keep_last, resumed: see `make_latest`.

    Returns:
        The folder under its final name.

    Raises:
        FileError: it could not be written.
        UserError: another process trains this run now; nothing is changed.
    """
    folder = partial.with_name(partial.name.split(".")[0])
    check_not_taken(folder.parents[1])
    state = json.loads((partial / "state.json").read_text())
    shares = [_share_path(partial, rank) for rank in range(state["num_ranks"])]
    write_state(partial, state | {"shares": [_checksum(path) for path in shares]})
    if folder.exists():  # a run that went back to an older checkpoint passes here again
        remove(folder)
    try:
        os.rename(partial, folder)
    except OSError as error:
        raise FileError(f"could not write {folder}: {error.strerror}") from error
    make_latest(folder, keep_last, resumed)
    return folder


def _checksum(path: Path) -> str | None:
    """Return the checksum that a .safetensors file carries; None if it carries none."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("crc32")


def _share_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank:05d}.safetensors"


# ---------------------------------------------------------------- reading


def latest_sharded(run_dir: str | Path) -> Path | None:
    """Return the folder to continue a run from by its name, None if there is none."""
    folders = [path for path in list_checkpoints(run_dir) if path.suffix != ".pt"]
    return folders[0] if folders else None


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a sharded checkpoint; its values are of the types that we write.

    Raises:
        DamagedFileError: it is missing, cut short, or has values of other types.
        FileError: it cannot be read, or is of a newer version.
    """
    path = folder / "state.json"
    content = _read_bytes(folder, path.name)
    try:
        state = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise DamagedFileError(f"{path} is damaged: it has no format {FORMAT!r}")
    for name, (expected, is_right) in _STATE.items():
        if not is_right(state.get(name)):
            found = repr(state.get(name, "missing"))[:60]
            raise DamagedFileError(f"{path} is damaged: {name} is {found}, not {expected}")
    if state["version"] > VERSION:
        raise FileError(f"{folder} has version {state['version']}, this code reads up to {VERSION}")
    if "shares" in state and not (
        isinstance(state["shares"], list) and len(state["shares"]) == state["num_ranks"]
    ):
        raise DamagedFileError(f"{path} is damaged: shares is not a list of num_ranks checksums")
    return state


def _read_bytes(folder: Path, name: str, size: int = -1) -> bytes:
    """Read the start of a file of a checkpoint."""
    try:
        with open(folder / name, "rb") as file:
            return file.read(size)
    except FileNotFoundError as error:
        raise DamagedFileError(f"{folder} is incomplete: no {name}") from error
    except OSError as error:
        raise FileError(f"cannot read {folder / name}: {error.strerror}") from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _are_shapes(value: Any) -> bool:
    return _is_dict(value) and all(
        isinstance(shape, list) and all(map(_is_count, shape)) for shape in value.values()
    )


# What state.json must have: what it is called in an error message, and its check.
_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "version": ("a number", _is_count),
    "config": ("the fields of a model", _is_dict),
    "settings": ("the flags of a run", _is_dict),
    "shapes": ("a shape for each name", _are_shapes),
    "num_ranks": ("a number of ranks", lambda value: _is_count(value) and value > 0),
    "step": ("a number of steps", _is_count),
    "adam_step": ("a number of steps", lambda value: isinstance(value, float) and value >= 0),
    "loss_scale": ("the state of a scaler", _is_dict),
}


class ShardedCheckpoint:
    """A sharded checkpoint, opened: small values in memory, tensors mapped.

    Attributes:
        state: config, settings, step, shapes and what else the trainer saved.
    """

    def __init__(self, folder: Path) -> None:
        """Open all shares; see `verify` for what is in them.

        Raises:
            DamagedFileError: something is missing, cut short or of a wrong type.
            FileError: something cannot be read, or is of a newer version.
        """
        self.folder = folder
        self.state = read_state(folder)
        self.shapes: dict[str, list[int]] = self.state["shapes"]
        self._shares = [self._open(rank) for rank in range(self.state["num_ranks"])]
        self._places: dict[str, list[tuple[int, Any]]] = defaultdict(list)  # start, share
        self._find_places()

    def _open(self, rank: int) -> Any:
        path = _share_path(self.folder, rank)
        content = _read_bytes(self.folder, path.name, 8)
        try:
            share = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise DamagedFileError(f"{path} is damaged: {len(content)} bytes, {error}") from error
        checksum = (share.metadata() or {}).get("crc32")
        if "shares" in self.state and self.state["shares"][rank] != checksum:
            raise DamagedFileError(f"{path} is damaged: it is a share of another checkpoint")
        return share

    def _find_places(self) -> None:
        """Find out which part of which parameter each share holds; all of it must be there."""
        found: dict[str, int] = defaultdict(int)  # elements
        for rank, share in enumerate(self._shares):
            try:
                starts = json.loads(share.metadata()["starts"])
                names = set(share.keys())
                for name, start in starts.items():
                    if not _is_count(start) or {f"{kind}/{name}" for kind in KINDS} - names:
                        raise ValueError(name)
                    found[name] += share.get_slice(f"model/{name}").get_shape()[0]
                    self._places[name].append((start, share))
            except (ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
                path = _share_path(self.folder, rank)
                raise DamagedFileError(f"{path} is damaged: it lacks {error}") from error
        for name, shape in self.shapes.items():
            if found[name] != (wanted := math.prod(shape)):
                raise DamagedFileError(
                    f"{self.folder} is damaged: its shares hold {found[name]} elements of {name}, "
                    f"whose shape {str(shape)[:60]} has {wanted}"
                )

    def verify(self) -> None:
        """Read all files once and compare them with their checksums.

        Those of versions before there were checksums pass.

        Raises:
            DamagedFileError: one is not what was written.
            FileError: one cannot be read.
        """
        verify_file(self.folder / "state.json")
        for rank in range(len(self._shares)):
            verify_file(_share_path(self.folder, rank))

    def rng(self, rank: int) -> dict[str, Tensor]:
        """Return the generator states that a rank saved, by device."""
        share = self._shares[rank]
        names = [name for name in share.keys() if name.startswith("rng/")]  # noqa: SIM118
        return {name.removeprefix("rng/"): share.get_tensor(name) for name in names}

    def buffers(self) -> dict[str, Tensor]:
        """Return what all ranks had whole, by name: biases and thresholds of routers."""
        share, prefix = self._shares[0], "buffer/"
        names = [name for name in share.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): share.get_tensor(name) for name in names}

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
