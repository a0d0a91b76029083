"""What is on disk: training checkpoints, and the weights of every published layout.

    python checkpoint.py export results/RUN model.safetensors --ema

1. `save_checkpoint`, `load_checkpoint`, `latest_checkpoint`, `prune_checkpoints`: training state.
2. `load_model`, `load_settings`, `save_safetensors`: weights and the config they belong to.

Nothing read here can run code: torch files are opened with `weights_only=True`. Everything
is written under a temporary name first, so a file that has its name is whole.
The names inside the published files are in layouts.py, what train_deepspeed.py saves in sharded.py.
"""

import argparse
import json
import logging
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from flags import FlagParser, flag
from layouts import StateDict, infer_config, to_ours
from models import DiT, DiTConfig, sincos_pos_embed
from sharded import ShardedCheckpoint, latest_sharded, write_safetensors

FORMAT, VERSION = "dit-moe", 1
CHECKPOINT_KEYS = (
    *("format", "version", "config", "settings"),
    *("model", "ema", "optimizer", "scaler", "step", "rng"),
)
ACCEPTED = (
    "accepted are: our .pt or .safetensors, a run folder, a published DiT-MoE or DiT .pt (flat, "
    '{"ema"}, or {"model", "ema", "opt", "args"}), a diffusers DiTTransformer2DModel folder'
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
    content = _load_torch(Path(path))
    if not _is_ours(content):
        raise ValueError(f"{path} can't be resumed: it has {_describe(content)}, not {FORMAT} keys")
    if (version := content.get("version", 0)) > VERSION:
        raise ValueError(f"{path} has version {version}, this code reads up to {VERSION}")
    if missing := [key for key in CHECKPOINT_KEYS if key not in content]:
        raise ValueError(f"{path} lacks {missing}, found {sorted(content)}")
    return content


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the last checkpoint: a sharded one's folder, else the whole file of the highest step.

    Files without a proper end are skipped.
    """
    if (sharded := latest_sharded(run_dir)) is not None:
        return sharded
    for path in reversed(_checkpoints(run_dir)):
        if zipfile.is_zipfile(path):
            return path
        logging.warning("%s is damaged, looking for an older checkpoint", path)
    return None


def prune_checkpoints(run_dir: str | Path, keep_last: int) -> None:
    """Delete all but the last `keep_last` checkpoints (0 keeps all), and what killed writes left.

    Args:
        run_dir: run folder; only the process that writes it may prune it.
        keep_last: >= 0.
    """
    for leftover in (Path(run_dir) / "checkpoints").glob("*.tmp"):
        leftover.unlink()
    for path in _checkpoints(run_dir)[:-keep_last] if keep_last else []:
        path.unlink()


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run in the order of their steps."""
    paths = (Path(run_dir) / "checkpoints").glob("*.pt")
    return sorted((path for path in paths if path.stem.isdigit()), key=lambda path: int(path.stem))


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success the file written there becomes `path`.

    Raises:
        OSError: the write failed; the message names `path`, whose former content is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f"{path.name}.tmp")
    try:
        yield temp
        with open(temp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        hidden = None if isinstance(error, OSError) else error.__context__  # torch hides the reason
        raise OSError(f"could not write {path}: {hidden or error}") from error
    finally:
        temp.unlink(missing_ok=True)


# ---------------------------------------------------------------- weights


class _Source(NamedTuple):
    """What a file or folder holds."""

    weights: Mapping[str, StateDict]  # "model" and / or "ema", in the layout of the file
    config: DiTConfig | None = None
    settings: Mapping[str, Any] = {}
    known: Mapping[str, Any] = {}  # config fields that the file tells apart from its tensors


def load_model(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    config: DiTConfig | None = None,
) -> DiT:
    """Build the model that a file describes, in eval mode, with its weights.

    The model is built without memory and the tensors become its parameters: there is no second
    copy. On the CPU, tensors which need no cast stay mapped from the file until written to.

    Args:
        path: our .pt or .safetensors, a run folder (its latest checkpoint), a published .pt, or
            a diffusers DiTTransformer2DModel folder.
        ema: take the averaged weights where the file has both; False insists on the others.
            A file with one unnamed set of weights serves both.
        dtype: of the parameters, None for that of the file.
        device: of the parameters.
        config: needed where shapes don't tell it all (see `infer_config`), else left out.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged, wants to run code, or is of no known layout; the weights
            asked for are absent, or don't fit the config.
    """
    source = _open(Path(path))
    weights = _choose(source, path, ema)
    try:
        state = {name: tensor.to(device, dtype) for name, tensor in to_ours(weights)}
        config = config or source.config or infer_config(state, source.known)
        if "pos_embed" not in state:  # diffusers doesn't save it
            table = sincos_pos_embed(config.input_size // config.patch_size, config.hidden_size)
            state["pos_embed"] = table.to(device, dtype)
        with torch.device("meta"):
            model = DiT(config)
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval()


def stream_weights(path: str | Path, *, ema: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that `load_model` would load, one (name, tensor) at a time.

    Tensors are mapped from the file, or made as they come, so the model is never in memory whole.

    Raises:
        FileNotFoundError, ValueError: as `load_model`.
    """
    yield from to_ours(_choose(_open(Path(path)), path, ema))


def load_settings(path: str | Path) -> dict[str, Any]:
    """Return the `settings` saved with our weights, {} for published files."""
    return dict(_open(Path(path)).settings)


def find_objective(settings: Mapping[str, Any], config: DiTConfig, rf: bool | None) -> str:
    """Return the objective of a checkpoint: "rf" or "ddpm".

    Args:
        settings: of `load_settings`.
        config: of the model. Published files with QK norm (XL, G) are rectified flow, others DDPM.
        rf: the flag `--rf`, for files that do not tell.

    Raises:
        ValueError: if `--rf` contradicts the checkpoint.
    """
    known = settings.get("objective")
    asked = None if rf is None else ("rf" if rf else "ddpm")
    if known and asked and known != asked:
        raise ValueError(f"--rf {rf}: the checkpoint was trained with {known}; leave --rf out")
    return known or asked or ("rf" if config.qk_norm else "ddpm")


def save_safetensors(
    path: str | Path, model_state: StateDict, config: DiTConfig, settings: Mapping[str, Any]
) -> None:
    """Write weights alone, with config and settings as JSON in the file's metadata."""
    metadata = {"config": json.dumps(config.to_dict()), "settings": json.dumps(dict(settings))}
    tensors = {name: tensor.contiguous() for name, tensor in model_state.items()}
    with atomic_write(path) as temp:
        save_file(tensors, temp, metadata={"format": "pt", **metadata})


def export(path: str | Path, out: str | Path, *, ema: bool) -> None:
    """Write the weights of a run or checkpoint of ours as one .safetensors that every script reads.

    Memory: the largest tensor, since the sources are mapped and the file is written in order.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; or the source is not a checkpoint of ours.
        OSError: not written.
    """
    source = _open(Path(path))
    weights = _choose(source, path, ema)
    if source.config is None:
        raise ValueError(f"{path} has no config of ours; export takes a run or its checkpoints")
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT(source.config).state_dict().items()}
    with atomic_write(out) as temp:
        write_safetensors(
            temp,
            shapes,
            weights,
            config=json.dumps(source.config.to_dict()),
            settings=json.dumps(dict(source.settings)),
        )


def _choose(source: _Source, path: str | Path, ema: bool) -> StateDict:
    """Return the averaged weights of a source if wanted and there, else the others."""
    for kind in ("ema", "model") if ema else ("model",):
        if kind in source.weights:
            return source.weights[kind]
    raise ValueError(f"ema={ema}: {path} holds only the weights {sorted(source.weights)}")


def _open(path: Path) -> _Source:
    """Find out what is at `path`; tensors are mapped, not read."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    content = _load_torch(path)
    if _is_ours(content):
        content = load_checkpoint(path)
        weights = {kind: content[kind] for kind in ("model", "ema") if content[kind] is not None}
        return _Source(weights, DiTConfig.from_dict(content["config"]), content["settings"])
    if isinstance(content, dict) and (weights := _wrapped(content)):
        args = content.get("args") or {}
        args = args if isinstance(args, dict) else vars(args)
        names = ("num_experts_per_tok",)
        return _Source(weights, known={name: args[name] for name in names if name in args})
    if _is_state_dict(content):
        return _Source({"model": content, "ema": content})
    raise ValueError(f"{path} has {_describe(content)}; {ACCEPTED}")


def _wrapped(content: dict[str, Any]) -> dict[str, StateDict]:
    """Return the state dicts under "model" and "ema"."""
    return {kind: content[kind] for kind in ("model", "ema") if _is_state_dict(content.get(kind))}


def _open_folder(folder: Path) -> _Source:
    """Open the latest checkpoint of a run, or a diffusers model."""
    if (folder / "state.json").is_file():
        return _open_sharded(folder)
    if (latest := latest_checkpoint(folder)) is not None:
        return _open(latest)
    if (folder / "model_index.json").is_file():  # a whole diffusers pipeline
        folder = folder / "transformer"
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    if config.get("_class_name") != "DiTTransformer2DModel":
        found = config.get("_class_name") or sorted(item.name for item in folder.iterdir())[:5]
        raise ValueError(f"{folder} is a folder with {found}; {ACCEPTED}")
    if config["activation_fn"] != "gelu-approximate":
        raise ValueError(f"{folder}: activation_fn {config['activation_fn']} is no DiT's")
    whole = folder / "diffusion_pytorch_model.safetensors"
    shards = sorted(folder.glob("diffusion_pytorch_model-*-of-*.safetensors"))
    if not whole.is_file() and not shards:
        raise ValueError(f"{folder} has a config.json but no {whole.name}")
    state: dict[str, Tensor] = {}
    for file in [whole] if whole.is_file() else shards:
        state |= _open_safetensors(file).weights["model"]
    known = {"num_heads": config["num_attention_heads"], "input_size": config["sample_size"]}
    return _Source({"model": state, "ema": state}, known=known)


def _open_sharded(folder: Path) -> _Source:
    """Open a checkpoint of train_deepspeed.py; tensors are assembled when asked for."""
    checkpoint = ShardedCheckpoint(folder)
    config = DiTConfig.from_dict(checkpoint.state["config"])
    table = sincos_pos_embed(config.input_size // config.patch_size, config.hidden_size)
    frozen = {"pos_embed": table}  # no share holds what is not trained
    weights = {kind: checkpoint.weights(kind, frozen) for kind in ("model", "ema")}
    return _Source(weights, config, checkpoint.state["settings"])


def _open_safetensors(path: Path) -> _Source:
    """Open one file; its config may also lie beside it as config.json."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    beside = path.with_name("config.json")
    fields = json.loads(metadata["config"]) if "config" in metadata else None
    if fields is None and beside.is_file() and "_class_name" not in beside.read_text():
        fields = json.loads(beside.read_text())
    config = None if fields is None else DiTConfig.from_dict(fields)
    return _Source(
        {"model": state, "ema": state}, config, json.loads(metadata.get("settings", "{}"))
    )


def _load_torch(path: Path) -> Any:
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


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and content.get("format") == FORMAT


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(tensor, Tensor) for tensor in content.values())


def _describe(content: Any) -> str:
    """Say what a torch file holds, for error messages."""
    if isinstance(content, dict):
        return f"a dict with the keys {[str(key) for key in content][:5]}"
    return f"a {type(content).__name__}"


# ---------------------------------------------------------------- command line


def build_parser() -> FlagParser:
    """Return the parser of `python checkpoint.py`."""
    parser = FlagParser(__doc__)
    group = parser.group("Export")
    parser.add_argument("command", choices=["export"], help="write the weights as one file")
    parser.add_argument("run", help="run folder (its latest checkpoint) or a checkpoint")
    parser.add_argument("out", help=".safetensors to write")
    group.add("--ema", default=False, **flag, help="the averaged weights, else the trained ones")
    return parser


def main(args: argparse.Namespace) -> None:
    """Do what the command line asks."""
    try:
        export(args.run, args.out, ema=args.ema)
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint.py: error: {error}")
    print(f"{args.out}: {'averaged' if args.ema else 'trained'} weights of {args.run}")


if __name__ == "__main__":
    main(build_parser().parse_args())
