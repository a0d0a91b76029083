"""What is on disk: training checkpoints, and the weights of every published layout.

1. `save_checkpoint`, `load_checkpoint`, `latest_checkpoint`, `prune_checkpoints`: training state.
2. `open_weights`, `load_model`, `load_settings`, `save_safetensors`: weights and their config.
3. `main`: the command line.

    python checkpoint.py convert dit_moe_xl_8E2A.pt XL-folder
    python checkpoint.py convert results/RUN published.pt

Nothing read here can run code: torch files are opened with `weights_only=True`. Everything
is written under a temporary name first, so a file that has its name is whole.
The names inside the published files are in layouts.py.
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

from layouts import StateDict, block_index, infer_config, to_ours
from models import DiT, DiTConfig, sincos_pos_embed

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
FLOAT32_NAMES = ("pos_embed", "moe.router.weight")  # computed in float32 whatever the rest is in


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
    content = _load_torch(Path(path))
    if not _is_ours(content):
        raise ValueError(f"{path} can't be resumed: it has {_describe(content)}, not {FORMAT} keys")
    if (version := content.get("version", 0)) > VERSION:
        raise ValueError(f"{path} has version {version}, this code reads up to {VERSION}")
    if missing := [key for key in CHECKPOINT_KEYS if key not in content]:
        raise ValueError(f"{path} lacks {missing}, found {sorted(content)}")
    return content


def latest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the checkpoint with the highest step, skipping files without a proper end."""
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

    weights: dict[str, StateDict]  # "model" and / or "ema", in the layout of the file
    config: DiTConfig | None = None
    settings: Mapping[str, Any] = {}
    known: Mapping[str, Any] = {}  # config fields that the file tells apart from its tensors


class SafetensorsWeights(Mapping[str, Tensor]):
    """Names to tensors of some files; each access maps its tensor anew, to be freed with it.

    So a model that is read once, a block at a time, never takes more memory than a block.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files  # name -> its file

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


class Weights(NamedTuple):
    """Weights that are open but not read."""

    state: StateDict  # in the layout of the file, see layouts.to_ours
    config: DiTConfig
    settings: Mapping[str, Any]


def open_weights(
    path: str | Path,
    *,
    ema: bool = True,
    config: DiTConfig | None = None,
    known: Mapping[str, Any] | None = None,
) -> Weights:
    """Find the weights at `path` and their config; tensors are mapped from the file when used.

    Args:
        path, ema, config: as in `load_model`.
        known: config fields that neither the file nor its shapes tell.

    Raises: as `load_model`.
    """
    source = _open(Path(path))
    kinds = ("ema", "model") if ema else ("model",)
    found = [source.weights[kind] for kind in kinds if kind in source.weights]
    if not found:
        raise ValueError(f"ema={ema}: {path} holds only the weights {sorted(source.weights)}")
    config = config or source.config
    if config is None:
        indices = {name: block_index(name) for name in found[0]}
        depth = 1 + max((i for i in indices.values() if i is not None), default=0)
        first = {name: found[0][name] for name, i in indices.items() if not i}  # None or block 0
        given = {"depth": depth, **source.known, **(known or {})}
        try:
            config = infer_config(dict(to_ours(first)), given)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return Weights(found[0], config, source.settings)


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
        path: our .pt, .safetensors or folder of them, a run folder (its latest checkpoint), a
            published .pt, or a diffusers DiTTransformer2DModel folder.
        ema: take the averaged weights where the file has both; False insists on the others.
            A file with one unnamed set of weights serves both.
        dtype: of the parameters, except `FLOAT32_NAMES`; None for that of the file.
        device: of the parameters.
        config: needed where shapes don't tell it all (see `infer_config`), else left out.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged, wants to run code, or is of no known layout; the weights
            asked for are absent, or don't fit the config.
    """
    weights = open_weights(path, ema=ema, config=config)
    try:
        tensors = to_ours(weights.state)
        state = {name: place(name, tensor, device, dtype) for name, tensor in tensors}
        add_pos_embed(state, weights.config, device)
        with torch.device("meta"):
            model = DiT(weights.config)
        model.load_state_dict(state, assign=True)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return model.eval()


def place(
    name: str,
    tensor: Tensor,
    device: str | torch.device,
    dtype: torch.dtype | None,
    copy: bool = False,
) -> Tensor:
    """Bring a parameter to its device and dtype: `dtype`, or float32 for `FLOAT32_NAMES`."""
    if dtype is not None and name.endswith(FLOAT32_NAMES):
        dtype = torch.float32
    return tensor.to(device, dtype, copy=copy)


def add_pos_embed(
    state: dict[str, Tensor], config: DiTConfig, device: str | torch.device = "cpu"
) -> None:
    """Add the frozen position table where the layout, diffusers', does not save it."""
    if "pos_embed" not in state:
        table = sincos_pos_embed(config.input_size // config.patch_size, config.hidden_size)
        state["pos_embed"] = table.to(device)


def load_settings(path: str | Path) -> dict[str, Any]:
    """Return the `settings` saved with our weights, {} for published files."""
    return dict(_open(Path(path)).settings)


def save_safetensors(
    path: str | Path, model_state: StateDict, config: DiTConfig, settings: Mapping[str, Any]
) -> None:
    """Write weights alone, with config and settings as JSON in the file's metadata."""
    metadata = {"config": json.dumps(config.to_dict()), "settings": json.dumps(dict(settings))}
    tensors = {name: tensor.detach().contiguous() for name, tensor in model_state.items()}
    with atomic_write(path) as temp:
        save_file(tensors, temp, metadata={"format": "pt", **metadata})


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
    """Open the latest checkpoint of a run, a folder of our safetensors, or a diffusers model."""
    if (latest := latest_checkpoint(folder)) is not None:
        return _open(latest)
    if (folder / "model_index.json").is_file():  # a whole diffusers pipeline
        folder = folder / "transformer"
    config_path = folder / "config.json"
    config = json.loads(config_path.read_text()) if config_path.is_file() else {}
    if "hidden_size" in config:
        return _open_safetensors(*_shards(folder, "model"))
    if config.get("_class_name") != "DiTTransformer2DModel":
        found = config.get("_class_name") or sorted(item.name for item in folder.iterdir())[:5]
        raise ValueError(f"{folder} is a folder with {found}; {ACCEPTED}")
    if config["activation_fn"] != "gelu-approximate":
        raise ValueError(f"{folder}: activation_fn {config['activation_fn']} is no DiT's")
    source = _open_safetensors(*_shards(folder, "diffusion_pytorch_model"))
    known = {"num_heads": config["num_attention_heads"], "input_size": config["sample_size"]}
    return source._replace(known=known)


def _shards(folder: Path, stem: str) -> list[Path]:
    """Return STEM.safetensors or, by the index beside them, all of STEM-0000i-of-0000n."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not (folder / f"{stem}.safetensors").is_file():
            raise ValueError(f"{folder} has a config.json but no {stem}.safetensors")
        return [folder / f"{stem}.safetensors"]
    return [
        folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
    ]


def _open_safetensors(*paths: Path) -> _Source:
    """Open files of one model; its config may also lie beside them as config.json."""
    metadata: dict[str, str] = {}
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata |= file.metadata() or {}
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    beside = paths[0].with_name("config.json")
    fields = json.loads(metadata["config"]) if "config" in metadata else None
    if fields is None and beside.is_file():
        fields = json.loads(beside.read_text())
    config = DiTConfig.from_dict(fields) if fields and "_class_name" not in fields else None
    weights = SafetensorsWeights(files)
    return _Source(
        {"model": weights, "ema": weights}, config, json.loads(metadata.get("settings", "{}"))
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


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the subcommands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="write weights in another layout")
    convert.add_argument("src", help=ACCEPTED)
    convert.add_argument(
        "dst", help=".safetensors (ours), .pt (published layout) or a folder (ours, sharded)"
    )
    convert.add_argument("--pipeline", action="store_true", help="DST: a diffusers pipeline folder")
    convert.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="else as SRC")
    convert.add_argument("--no-ema", action="store_true", help="take the weights before averaging")
    convert.add_argument("--num-heads", type=int, help="for files that do not tell")
    convert.add_argument(
        "--attention", choices=["qkv", "Wqkv"], help="names in a .pt; default Wqkv with QK norm"
    )
    convert.add_argument(
        "--vae-path", help="of the pipeline; default: the one SRC was trained with"
    )
    return parser


def main(args: argparse.Namespace) -> None:
    """Run one subcommand."""
    from hub import convert

    try:
        print({"convert": convert}[args.command](args))
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint.py {args.command}: error: {error}")


if __name__ == "__main__":
    main(build_parser().parse_args())
