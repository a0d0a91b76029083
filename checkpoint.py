"""Training state on disk.

1. `save_checkpoint`, `load_checkpoint`, `latest_checkpoint`, `prune_checkpoints`: training state.
2. `write_tensors`, `save_safetensors`, `load_torch`: how files are written and read.

Nothing read here can run code: torch files are opened with `weights_only=True`. Everything
is written under a temporary name first, so a file that has its name is whole.
Weights of any layout are opened in weights.py; what train_deepspeed.py saves is in sharded.py.
"""

import argparse
import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.files import UNSEALED, atomic_write, seal
from layouts import StateDict
from models import DiTConfig
from sharded import latest_sharded, mark_latest

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
    return Path(run_dir) / "checkpoints" / f"{step:07d}.pt"


def save_checkpoint(
    path: str | Path,
    *,
    config: DiTConfig,
    settings: Mapping[str, Any],
    model: StateDict,
    ema: StateDict | None,
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
        optimizer: its state dict.
        scaler: state dict of the loss scaler, None without one.
        step: optimizer steps done.
        rng: one entry per rank, of tensors and plain Python values.

    Raises:
        OSError: not written (disk full, no permission); what had this name before is untouched.
        ValueError: an entry is of a type that `load_checkpoint` would refuse.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "settings": dict(settings),
        "model": dict(model),
        "ema": None if ema is None else dict(ema),
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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file of `save_checkpoint`; tensors are on the CPU, mapped from the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not one of our training checkpoints.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a sharded checkpoint: resume it with train_deepspeed.py, or give "
            "another --run-name and start from it with --init-from"
        )
    content = load_torch(Path(path))
    if not is_checkpoint(content):
        raise ValueError(f"{path} can't be resumed: it has {describe(content)}, not {FORMAT} keys")
    if (version := content.get("version", 0)) > VERSION:
        raise ValueError(f"{path} has version {version}, this code reads up to {VERSION}")
    if missing := [key for key in CHECKPOINT_KEYS if key not in content]:
        raise ValueError(f"{path} lacks {missing}, found {sorted(content)}")
    return content


def checkpoint_hash(path: str | Path) -> str:
    """Return the SHA-256, in hex, of what a path means: a file, a folder's files, a run's last."""
    path = Path(path)
    path = (latest_checkpoint(path) or path) if path.is_dir() else path
    if path.is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(map(checkpoint_hash, files)).encode()).hexdigest()


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the last checkpoint: a sharded one's folder, else the file written last.

    Files without a proper end are skipped.
    """
    if (sharded := latest_sharded(run_dir)) is not None:
        return sharded
    for path in reversed(_checkpoints(run_dir)):
        if zipfile.is_zipfile(path):
            return path
        logging.warning("%s is damaged, looking for an older checkpoint", path)
    return None


def commit_checkpoint(path: Path, keep_last: int) -> None:
    """Make a checkpoint of a run the latest; then delete the oldest ones.

    Args:
        path: of the checkpoint; only the process that writes the run may call this.
        keep_last: number to keep, 0 keeps all; what killed writes left goes too.
    """
    mark_latest(path)
    for leftover in path.parent.glob("*.tmp"):
        leftover.unlink()
    for old in _checkpoints(path.parents[1])[:-keep_last] if keep_last else []:
        old.unlink()


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps, but the one written last, last.

    It has a lower step than others in a run that went back to an older checkpoint.
    """
    folder = Path(run_dir) / "checkpoints"
    pointer = folder / "latest"
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    paths = [path for path in folder.glob("*.pt") if path.stem.isdigit()]
    return sorted(paths, key=lambda path: (path.name == latest, int(path.stem)))


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
    """Read a torch file without running code from it; tensors are mapped where possible."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    with open(path, "rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"
    is_zip = zipfile.is_zipfile(path)  # looks for the end of the file, which a cut one lacks
    if starts_as_zip and not is_zip:
        raise ValueError(
            f"{path} is truncated: {path.stat().st_size} bytes without a zip directory"
        )
    try:
        # The published train.py keeps its flags as a Namespace, a plain holder of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            wanted = re.findall(r"GLOBAL (\S+)", str(error))[0]
            raise ValueError(
                f"{path} is refused: to read it, Python would have to call {wanted}, and a "
                "checkpoint may hold only tensors and plain values"
            ) from error
        raise ValueError(f"{path} is not a readable torch file (damaged?); {ACCEPTED}") from error


def is_checkpoint(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def describe(content: Any) -> str:
    """Say what a torch file holds, for error messages."""
    if isinstance(content, dict):
        return f"a dict with the keys {[str(key) for key in content][:5]}"
    return f"a {type(content).__name__}"
