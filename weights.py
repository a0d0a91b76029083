"""Weights of every layout: opened without reading them, or loaded as a model.

1. `open_weights`: names to tensors that are mapped when used, their config and settings.
2. `load_model`, `place`, `add_pos_embed`: to a `DiT` in the right dtype on the right device;
   `page_out` for those who read a block at a time.
3. `load_settings`, `find_objective`: what else a file says.
4. `_open` and below: which layout it is. The names inside published files are in layouts.py.
"""

import ctypes
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint import (
    ACCEPTED,
    describe,
    is_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_torch,
)
from layouts import StateDict, block_index, infer_config, to_ours
from models import DiT, DiTConfig, sincos_pos_embed
from sharded import ShardedCheckpoint

FLOAT32_NAMES = ("pos_embed", "moe.router.weight")  # computed in float32 whatever the rest is in
MADV_PAGEOUT = 21  # Linux


class _Source(NamedTuple):
    """What a file or folder holds."""

    weights: Mapping[str, StateDict]  # "model" and / or "ema", in the layout of the file
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
        path, ema, config, known: as in `load_model`.

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
    known: Mapping[str, Any] | None = None,
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
        known: config fields that neither the file nor its shapes tell; ignored where a file brings
            its config.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: the file is damaged, wants to run code, or is of no known layout; the weights
            asked for are absent, or don't fit the config.
    """
    weights = open_weights(path, ema=ema, config=config, known=known)
    try:
        tensors = to_ours(weights.state)
        state = {name: place(name, tensor, device, dtype) for name, tensor in tensors}
        add_pos_embed(state, weights.config, device)
        with torch.device("meta"):
            model = DiT(weights.config)
        model.load_state_dict(state, assign=True)
        model.settings = dict(weights.settings)
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


def page_out(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of tensors mapped from a file; used again, they are read again."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    for tensor in tensors:
        start = -(-tensor.data_ptr() // page) * page
        length = tensor.data_ptr() + tensor.nbytes - start
        if length > 0:  # MADV_PAGEOUT: never loses data; a refusal costs only the memory
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)


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


# ---------------------------------------------------------------- layouts


def _open(path: Path) -> _Source:
    """Find out what is at `path`; tensors are mapped, not read."""
    if path.is_dir():
        return _open_folder(path)
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    content = load_torch(path)
    if is_checkpoint(content):
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
    raise ValueError(f"{path} has {describe(content)}; {ACCEPTED}")


def _wrapped(content: dict[str, Any]) -> dict[str, StateDict]:
    """Return the state dicts under "model" and "ema"."""
    return {kind: content[kind] for kind in ("model", "ema") if _is_state_dict(content.get(kind))}


def _open_folder(folder: Path) -> _Source:
    """Open the latest checkpoint of a run, a folder of our safetensors, or a diffusers model."""
    if (folder / "state.json").is_file():
        return _open_sharded(folder)
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


def _open_sharded(folder: Path) -> _Source:
    """Open a checkpoint of train_deepspeed.py; tensors are assembled when asked for."""
    checkpoint = ShardedCheckpoint(folder)
    config = DiTConfig.from_dict(checkpoint.state["config"])
    table = sincos_pos_embed(config.input_size // config.patch_size, config.hidden_size)
    frozen = {"pos_embed": table}  # no share holds what is not trained
    weights = {kind: checkpoint.weights(kind, frozen) for kind in ("model", "ema")}
    return _Source(weights, config, checkpoint.state["settings"])


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
    index = paths[0].with_name("model.safetensors.index.json")  # huggingface_hub's settings
    content = json.loads(index.read_text()) if index.is_file() else {}
    metadata: dict[str, Any] = content.get("metadata", {})
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


def _is_state_dict(content: Any) -> bool:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(tensor, Tensor) for tensor in content.values())
