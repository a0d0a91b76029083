"""Training state on disk.

1. `save_checkpoint`, `commit_checkpoint`, `load_checkpoint`: training state.
2. `latest_checkpoint`, `checkpoint_to_resume`, `resolve_checkpoint`, `verify_checkpoint`: which one
   a folder means, and whether it is whole.
3. `write_tensors`, `save_safetensors`, `load_torch`: how files are written and read.

Nothing read here can run code: torch files are opened with `weights_only=True`. Everything
is written under a temporary name first, so a file that has its name is whole, and carries its
checksum (common/files.py). A checkpoint that cannot be read is an error; only one that was read and
found damaged is passed over.
Weights of any layout are opened in weights.py; what train_deepspeed.py saves is in sharded.py.
"""

import argparse
import hashlib
import json
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from checkpoint.layouts import StateDict
from checkpoint.run_folder import checkpoint_folder, list_checkpoints, make_latest, set_aside
from checkpoint.run_lock import check_not_taken
from checkpoint.sharded import ShardedCheckpoint
from common.errors import FileError
from common.files import (
    UNSEALED,
    DamagedFileError,
    atomic_write,
    check_zip,
    readable,
    seal,
    verify_file,
)
from models import DiTConfig

FORMAT, VERSION = "dit-moe", 1
CHECKPOINT_KEYS = (
    *("format", "version", "config", "settings"),
    *("model", "ema", "optimizer", "scaler", "step", "rng"),
)
ACCEPTED = (
    "accepted are: our .pt, .safetensors or folder of them, a run folder, a published DiT-MoE or "
    'DiT .pt (flat, {"ema"}, or {"model", "ema", "opt", "args"}), '
    "a diffusers DiTTransformer2DModel folder"
)


# ---------------------------------------------------------------- training checkpoints


def checkpoint_path(run_dir: str | Path, step: int) -> Path:
    """Return where the checkpoint of a step is kept: RUN_DIR/checkpoints/0001000.pt."""
    return checkpoint_folder(run_dir) / f"{step:07d}.pt"


def save_checkpoint(
    path: str | Path,
    *,
    config: DiTConfig,
    settings: Mapping[str, Any],
    model: StateDict,
    ema: StateDict | None,
    averages: Mapping[float, StateDict] | None = None,
    projector: StateDict | None = None,
    optimizer: Mapping[str, Any],
    scaler: Mapping[str, Any] | None,
    step: int,
    rng: Sequence[Any],
) -> None:
    """Write all that a run needs to continue bit for bit.

    Args:
        path: file to write, see `checkpoint_path`.
        config: of the model.
        settings: JSON-able: objective, image_size, vae_path, class_names, training flags.
        model: state dict of the bare model (no DDP prefix).
        ema: state dict of the averaged weights, same names.
        averages: likewise of further decays, by them.
        projector: state dict of `--repa`'s.
        optimizer: its state dict.
        scaler: state dict of the loss scaler, None without one.
        step: optimizer steps done.
        rng: one entry per rank, of tensors and plain Python values.

    Raises:
        FileError: not written (disk full, no permission); what had this name before is untouched.
        UserError: another process trains this run now; nothing is changed.
        ValueError: an entry is of a type that `load_checkpoint` would refuse.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "settings": dict(settings),
        "model": dict(model),
        "ema": None if ema is None else dict(ema),
        **({"projector": dict(projector)} if projector else {}),
        **({"averages": {decay: dict(s) for decay, s in averages.items()}} if averages else {}),
        "optimizer": dict(optimizer),
        "scaler": None if scaler is None else dict(scaler),
        "step": step,
        "rng": list(rng),
    }
    with atomic_write(path) as temp:
        with open(temp, "wb") as file:
            torch.save(content, file)
        if refused := torch.serialization.get_unsafe_globals_in_checkpoint(str(temp)):
            raise ValueError(f"{path}: not written, it could not be read back safely: {refused}")
        check_not_taken(Path(path).parent.parent)


def commit_checkpoint(path: Path, keep_last: int, resumed: str | None = None) -> None:
    """Make a checkpoint of a run the latest; then delete the oldest ones.

    Args:
        path, keep_last, resumed: see `make_latest`.
    """
    make_latest(path, keep_last, resumed)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`; tensors are on the CPU, mapped from the file.

    Raises:
        FileError: there is no such file, it cannot be read, or is not one of our training
            checkpoints.
        DamagedFileError: it is damaged.
    """
    if Path(path).is_dir():
        raise FileError(
            f"{path} is a sharded checkpoint: resume it with train_deepspeed.py or "
            "--expert-parallel, or give another --run-name and start from it with --init-from"
        )
    content = load_torch(Path(path))
    if not is_checkpoint(content):
        raise FileError(f"{path} can't be resumed: it has {describe(content)}, not {FORMAT} keys")
    version = content.get("version", 0)
    if type(version) is not int or version > VERSION:
        raise FileError(f"{path} has version {version!r}, this code reads up to {VERSION}")
    if missing := [key for key in CHECKPOINT_KEYS if key not in content]:
        raise FileError(f"{path} lacks {missing}, found {sorted(map(str, content))}")
    for name, is_right in _TYPES.items():
        if name in content and not is_right(content[name]):
            raise FileError(f"{path} is not a checkpoint of ours: its {name} is of another type")
    return content


def check_shapes(
    path: Path, found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]]
) -> None:
    """Compare the tensors that a checkpoint holds with those that a model takes.

    Args:
        path: of the checkpoint, for the message.
        found, expected: shapes by name.

    Raises:
        FileError: naming the first one that is missing, too many or of another shape.
    """
    for name in sorted({*found, *expected}):
        ours = tuple(found[name]) if name in found else "no such tensor"
        wanted = tuple(expected[name]) if name in expected else "no such tensor"
        if ours != wanted:
            raise FileError(f"{path} can't be resumed: {name} is {ours}, the model has {wanted}")


def _is_state(value: Any) -> bool:
    """Tell whether a value is a state dict."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in value.items()
    )


def _is_rng(value: Any) -> bool:
    """Tell whether a value is what `process.rng_state` returns."""
    return (
        _is_state(value)
        and "cpu" in value
        and all(state.dtype == torch.uint8 for state in value.values())
    )


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


# What `load_checkpoint` checks of each entry, so that whoever continues finds what it looks for;
# config and settings are checked by those who read them.
_TYPES: dict[str, Callable[[Any], bool]] = {
    "model": _is_state,
    "ema": lambda value: value is None or _is_state(value),
    "projector": _is_state,
    "averages": lambda value: (
        _is_dict(value)
        and all(type(decay) is float and _is_state(state) for decay, state in value.items())
    ),
    "optimizer": _is_dict,
    "scaler": lambda value: value is None or _is_dict(value),
    "step": lambda value: type(value) is int and value >= 0,
    "rng": lambda value: isinstance(value, list) and all(map(_is_rng, value)),
}


# ---------------------------------------------------------------- which one, and is it whole


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the checkpoint that a run would continue from, None if it has none; nothing changes.

    One that is cut short or lacks a part is passed over with a warning. Its bytes are not
    compared with their checksums: see `verify_checkpoint`.

    Raises:
        FileError: the last one cannot be read, so it is not known which is the latest; or there
            are checkpoints, and all are damaged.
    """
    return _newest_whole(Path(run_dir), check_complete)[0]


def checkpoint_to_resume(run_dir: str | Path) -> Path | None:
    """Return the newest checkpoint of a run whose checksums are right, None if it has none.

    For the process that goes on to write the run: damaged ones newer than that are renamed to
    `NAME.HEX.damaged`, so that the run neither writes over nor prunes them.

    Raises:
        FileError: as `latest_checkpoint`; then nothing is renamed.
    """
    found, damaged = _newest_whole(Path(run_dir), verify_checkpoint)
    for path in damaged:
        logging.warning("%s is kept as %s", path, set_aside(path).name)
    return found


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the file or folder that a path means now: of a run folder its latest checkpoint.

    A run that is being trained may have another latest checkpoint at the next call, so who loads
    weights and then names or hashes them calls this once.

    Raises:
        FileError: as `latest_checkpoint`.
    """
    path = Path(path)
    return (latest_checkpoint(path) or path) if path.is_dir() else path


def checkpoint_hash(path: str | Path) -> str:
    """Return the SHA-256, in hex, of a file, or of the hashes of a folder's files.

    Args:
        path: a run folder means its latest checkpoint, which may change: see `resolve_checkpoint`.
    """
    path = resolve_checkpoint(path)
    if path.is_file():
        with readable(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(map(checkpoint_hash, files)).encode()).hexdigest()


def verify_checkpoint(path: str | Path) -> None:
    """Read a checkpoint once and compare it with its checksums, at about 5 GB/s or as disks allow.

    Shares of train_deepspeed.py from before they had checksums are only checked for completeness.

    Raises:
        DamagedFileError: it is not what was written.
        FileError: it cannot be read.
    """
    path = Path(path)
    if path.suffix == ".pt":
        if not verify_file(path):
            raise DamagedFileError(f"{path} is damaged: it does not begin as a torch file")
    else:
        ShardedCheckpoint(path).verify()


def check_complete(path: Path) -> None:
    """Look whether a checkpoint has a proper end and all its parts, without reading it all.

    Raises:
        DamagedFileError, FileError: as `verify_checkpoint`.
    """
    if path.suffix == ".pt":
        check_zip(path)
    else:
        ShardedCheckpoint(path)


def _newest_whole(run_dir: Path, check: Callable[[Path], None]) -> tuple[Path | None, list[Path]]:
    """Return the first checkpoint that passes a check, and the damaged ones before it."""
    paths = list_checkpoints(run_dir)
    damaged: list[Path] = []
    for path in paths:
        try:
            check(path)
        except DamagedFileError as error:
            if not os.path.lexists(path):  # pruned meanwhile: it was not the latest any more
                return _newest_whole(run_dir, check)
            logging.warning("%s; looking for an older checkpoint", error)
            damaged.append(path)
        except FileError:
            if not os.path.lexists(path):
                return _newest_whole(run_dir, check)
            raise
        else:
            return path, damaged
    if damaged:
        raise FileError(
            f"all {len(damaged)} checkpoints of {run_dir} are damaged, the last is {damaged[0]}; "
            "give another --run-name, or move them away to start anew"
        )
    return None, []


# ---------------------------------------------------------------- files


def write_tensors(path: Path, tensors: StateDict, metadata: dict[str, str]) -> None:
    """Write a .safetensors file that carries its checksum, with the permissions of any new file.

    The library's own are its owner's alone, so nobody else on a cluster could read the weights.
    """
    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata, **UNSEALED})
    path.chmod(mode)
    seal(path)


def save_safetensors(
    path: str | Path, model_state: StateDict, config: DiTConfig, settings: Mapping[str, Any]
) -> None:
    """Write weights alone, with config and settings as JSON in the file's metadata."""
    metadata = {"config": json.dumps(config.to_dict()), "settings": json.dumps(dict(settings))}
    tensors = {name: tensor.contiguous() for name, tensor in model_state.items()}
    with atomic_write(path) as temp:
        write_tensors(temp, tensors, metadata)


def load_torch(path: Path) -> Any:
    """Read a torch file without running code from it; tensors are mapped where possible.

    Raises:
        FileError: it cannot be read, or would have to run code to be read.
        DamagedFileError: it is damaged, or no torch file.
    """
    if not path.is_file():
        raise FileError(f"no such file: {path}")
    with readable(path) as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    is_zip = zipfile.is_zipfile(path)  # looks for the end of the file, which a cut one lacks
    if starts_as_zip and not is_zip:
        check_zip(path)
    try:
        # The published train.py keeps its flags as a Namespace, a plain holder of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except MemoryError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            wanted = re.findall(r"GLOBAL (\S+)", str(error))[0]
            raise FileError(
                f"{path} is refused: to read it, Python would have to call {wanted}, and a "
                "checkpoint may hold only tensors and plain values"
            ) from error
        raise DamagedFileError(
            f"{path} is not a readable torch file (damaged?); {ACCEPTED}"
        ) from error


def is_checkpoint(content: Any) -> bool:
    """Tell whether what a torch file holds calls itself a training checkpoint of ours."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def describe(content: Any) -> str:
    """Say what a torch file holds, for error messages."""
    if isinstance(content, dict):
        return f"a dict with the keys {[str(key) for key in content][:5]}"
    return f"a {type(content).__name__}"
