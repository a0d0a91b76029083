"""Weights of every layout: opened without reading them, or loaded as a model.

1. `open_weights`: names to tensors that are mapped when used, their config and settings;
   `verify_weights` compares the files with their checksums.
2. `empty_model`, `read_blocks`: the model without memory, and its tensors in our layout, each
   checked when its turn comes.
3. `load_model`, `build_model`, `is_exact`, `place`, `add_pos_embed`: to a `DiT` in the right dtype
   on the right device; `page_out` for those who read a block at a time.
4. `load_settings`, `find_objective`, `find_vae_path`, `find_latent_norm`: what else a file says.
5. `_open` and below: which layout it is. The names inside published files are in layouts.py.
"""

import argparse
import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoint.described import (
    check_fields,
    parse_json,
    read_config,
    read_description,
    read_json,
    read_settings,
)
from checkpoint.download import find_weights
from checkpoint.families import FAMILY_SETTINGS, family_fields, is_family, published_fields
from checkpoint.layouts import StateDict, block_index, by_block, infer_config, to_ours
from checkpoint.sharded import ShardedCheckpoint
from checkpoint.state import (
    ACCEPTED,
    describe,
    is_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    load_torch,
)
from common.errors import FileError, UserError, blamed_on
from common.files import verify_file
from common.process import check_memory
from data import LatentNorm
from models import DiT, DiTConfig, sincos_pos_embed

MADV_PAGEOUT = 21  # Linux
DEFAULT_VAE = "stabilityai/sd-vae-ft-ema"  # of published files, which name none


class _Source(NamedTuple):
    """What a file or folder holds."""

    path: Path  # of what was opened: a run's latest checkpoint
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
    path: Path  # what was opened: for a run folder, its latest checkpoint
    kind: str = ""  # "averaged" or "trained"; "" where the file does not tell


def open_weights(
    path: str | Path,
    *,
    ema: bool | float = True,
    config: DiTConfig | None = None,
    known: Mapping[str, Any] | None = None,
) -> Weights:
    """Find the weights at `path` and their config; tensors are mapped from the file when used.

    Args:
        path, ema, config, known: as in `load_model`.

    Raises: as `load_model`.
    """
    source = _open(find_weights(path))
    kinds: tuple[str, ...] = ("ema", "model") if ema else ("model",)
    if not isinstance(ema, bool):  # the first of a run's averages is its "ema"
        is_first = ema == source.settings.get("ema_decay")
        kinds = ("ema",) if is_first else (average_name(ema),)
    found = [kind for kind in kinds if kind in source.weights]
    if not found:
        decay = source.settings.get("ema_decay")
        where = f", of which ema has the decay {decay}" if decay and "ema" in source.weights else ""
        held = sorted(source.weights)
        raise UserError(f"ema={ema}: {path} holds only the weights {held}{where}")
    state, config = source.weights[found[0]], config or source.config
    told = source.weights.get("ema") is not source.weights.get("model")
    kind = ("trained" if found[0] == "model" else "averaged") if told else ""
    indices = {name: block_index(name) for name in state}
    blocks = {index for index in indices.values() if index is not None}
    if config is None:
        telling = {None, 0, *([1] if is_family(state) else [])}  # the second one has experts
        first = {name: state[name] for name, i in indices.items() if i in telling}
        told_by_names = family_fields(state) if is_family(state) else {}
        given = check_fields({**told_by_names, **source.known, **(known or {})}, path)
        with blamed_on(str(path)):
            config = infer_config(dict(to_ours(first)), {"depth": len(blocks), **given})
    # before a model of so many blocks is built, even without memory
    if len(blocks) != config.depth or max(blocks) != config.depth - 1:
        numbers = f", numbered up to {max(blocks)}" if blocks else ""
        raise FileError(
            f"{path} holds {len(blocks)} blocks{numbers}; its config says {config.depth}, from 0 on"
        )
    family = FAMILY_SETTINGS if is_family(state) else {}
    return Weights(state, config, {**family, **source.settings}, source.path, kind)


def verify_weights(weights: Weights) -> None:
    """Read a checkpoint, optimizer and all, and compare it with its checksums.

    Files of weights alone are left to `read_blocks`, which compares them whenever they are read.

    Raises:
        DamagedFileError: a file is not what was written; it is named.
        FileError: a file cannot be read.
    """
    if isinstance(weights.state, SafetensorsWeights):
        return
    path = weights.path
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        verify_file(file)


def empty_model(config: DiTConfig) -> DiT:
    """Return a model on the meta device, in eval mode."""
    with torch.device("meta"):
        return DiT(config).eval()


def read_blocks(
    weights: Weights, *, check_values: bool = True
) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Yield (None, tensors outside all blocks), then (i, tensors of block i), in our layout.

    Args:
        weights: of any layout; read as the groups are asked for.
        check_values: look for NaN and infinity, 0.05 s a GB, and compare .safetensors files with
            their checksums, 0.2 s a GB, before the first group.

    Raises:
        FileError: a tensor is missing, unknown, of another shape than the config says, or holds
            NaN or infinity.
    """
    model, path = empty_model(weights.config), weights.path
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if check_values and isinstance(weights.state, SafetensorsWeights):
        for file in sorted(set(weights.state.files.values())):
            verify_file(file)
    with blamed_on(str(path)):
        for index, tensors in by_block(weights.state):
            if index is None:
                add_pos_embed(tensors, weights.config)
            expected = {name for name in shapes if block_index(name) == index}
            if missing := sorted(expected - set(tensors)):
                raise FileError(f"{path} lacks {missing[0]}, one of {len(missing)} tensors")
            for name, tensor in tensors.items():
                _check_tensor(name, tensor, shapes.get(name), path, check_values)
            yield index, tensors


def _check_tensor(
    name: str, tensor: Tensor, shape: torch.Size | None, path: Path, check_values: bool
) -> None:
    if shape is None:
        raise FileError(f"{path}: its config has no tensor {name}")
    if tensor.shape != shape:
        raise FileError(
            f"{path}: {name} has shape {tuple(tensor.shape)}, its config says {tuple(shape)}"
        )
    if not tensor.is_floating_point():
        raise FileError(f"{path}: {name} holds {tensor.dtype}, not floats")
    if check_values and not torch.stack(tensor.aminmax()).isfinite().all():
        raise FileError(
            f"{path}: {name} holds NaN or infinity, so it would draw noise: it is damaged, or the "
            "training diverged; take an earlier checkpoint"
        )


def load_model(
    path: str | Path,
    *,
    ema: bool | float = True,
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
            published .pt, a diffusers DiTTransformer2DModel folder, or a hub id of one of them,
            OWNER/NAME or OWNER/NAME/FILE.
        ema: take the averaged weights where the file has both; False insists on the others.
            A file with one unnamed set of weights serves both.
        dtype: of the parameters, except those of `is_exact`; None for that of the file.
        device: of the parameters.
        config: needed where shapes don't tell it all (see `infer_config`), else left out.
        known: config fields that neither the file nor its shapes tell (see `known_fields`);
            ignored where a file brings its config.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        UserError: the file is damaged, wants to run code, or is of no known layout; the weights
            asked for are absent, are no numbers, or don't fit the config.
    """
    weights = open_weights(path, ema=ema, config=config, known=known)
    return build_model(weights, dtype=dtype, device=device)


def build_model(
    weights: Weights, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> DiT:
    """Return the model of open weights; see `load_model`."""
    state: dict[str, Tensor] = {}
    for _, tensors in read_blocks(weights):
        state |= {name: place(name, t, device, dtype) for name, t in tensors.items()}
    model = empty_model(weights.config)
    model.load_state_dict(state, assign=True)
    model.settings = dict(weights.settings)
    return model


def is_exact(name: str) -> bool:
    """Tell whether a parameter is float32 whatever the rest is in: routers and positions."""
    return name == "pos_embed" or "moe.router." in name


def place(
    name: str,
    tensor: Tensor,
    device: str | torch.device,
    dtype: torch.dtype | None,
    copy: bool = False,
) -> Tensor:
    """Bring a parameter to its device and dtype: `dtype`, or float32 for those of `is_exact`."""
    if dtype is not None and is_exact(name):
        dtype = torch.float32
    return tensor.to(device, dtype, copy=copy)


def add_pos_embed(
    state: dict[str, Tensor], config: DiTConfig, device: str | torch.device = "cpu"
) -> None:
    """Add the frozen position table where the layout, diffusers', does not save it."""
    if "pos_embed" not in state:
        size = 4 * config.num_patches * config.hidden_size
        check_memory(4 * size, f"input_size {config.input_size}")  # in float64 on the way
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
    return dict(_open(find_weights(path)).settings)


def find_vae_path(settings: Mapping[str, Any], vae_path: str | None) -> str:
    """Return the flag `--vae-path`, by default that of a checkpoint's settings."""
    return vae_path or settings.get("vae_path") or DEFAULT_VAE


def find_latent_norm(settings: Mapping[str, Any]) -> LatentNorm | None:
    """Return what `--latent-norm channel` trained with; None where latents are only scaled."""
    stats = settings.get("latent_stats")
    return LatentNorm(tuple(stats["mean"]), tuple(stats["std"])) if stats else None


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
        raise UserError(f"--rf {rf}: the checkpoint was trained with {known}; leave --rf out")
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
        ours = read_config(content["config"], path)
        averages = {average_name(d): state for d, state in content.get("averages", {}).items()}
        weights = {**_wrapped(content), **averages}
        return _Source(path, weights, ours, read_settings(content["settings"], path))
    config, settings = read_description(path)
    if isinstance(content, dict) and (weights := _wrapped(content)):
        args = content.get("args")
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        args = args if isinstance(args, dict) else {}
        known = {name: args[name] for name in ("num_experts_per_tok",) if name in args}
        if isinstance(published := content.get("published_config"), dict):
            with blamed_on(str(path)):
                known |= published_fields(published, str(content.get("kind", "")))
        return _Source(path, weights, config, settings, known)
    if _is_state_dict(content):
        return _Source(path, {"model": content, "ema": content}, config, settings)
    raise FileError(f"{path} has {describe(content)}; {ACCEPTED}")


def average_name(decay: float) -> str:
    """Return what the averaged weights of a decay, beside a run's first, are called here."""
    return f"ema {decay:g}"


def average_kinds(settings: Mapping[str, Any]) -> dict[float, str]:
    """Return what a run's averaged weights are called, by their decays."""
    first, several = settings.get("ema_decay"), settings.get("ema_decays") or []
    return {d: "ema" if d == first else average_name(d) for d in (several or [first]) if d}


def _wrapped(content: dict[str, Any]) -> dict[str, StateDict]:
    """Return the state dicts under "model" and "ema", as whoever wrote the file calls them."""
    spellings = {"model": "model", "model_state_dict": "model", "ema": "ema"}
    spellings["ema_model_state_dict"] = "ema"
    found = {k: content[n] for n, k in spellings.items() if _is_state_dict(content.get(n))}
    if not found and _is_state_dict(only := content.get("state_dict")):
        found = {"model": only, "ema": only}
    return found


def _open_folder(folder: Path) -> _Source:
    """Open the latest checkpoint of a run, a folder of our safetensors, or a diffusers model."""
    if (folder / "state.json").is_file():
        return _open_sharded(folder)
    if (latest := latest_checkpoint(folder)) is not None:
        return _open(latest)
    path = folder
    if (folder / "model_index.json").is_file():  # a whole diffusers pipeline
        folder = folder / "transformer"
    config_path = folder / "config.json"
    config = read_json(config_path) if config_path.is_file() else {}
    if "hidden_size" in config:
        return _open_safetensors(*_shards(folder, "model"))._replace(path=path)
    if config.get("_class_name") != "DiTTransformer2DModel":
        found = config.get("_class_name") or sorted(item.name for item in folder.iterdir())[:5]
        raise FileError(f"{folder} is a folder with {found}; {ACCEPTED}")
    if config.get("activation_fn") != "gelu-approximate":
        raise FileError(f"{folder}: activation_fn {config.get('activation_fn')} is no DiT's")
    source = _open_safetensors(*_shards(folder, "diffusion_pytorch_model"))
    names = {"num_attention_heads": "num_heads", "sample_size": "input_size"}
    known = {ours: config[theirs] for theirs, ours in names.items() if theirs in config}
    return source._replace(path=path, known=check_fields(known, config_path))


def _open_sharded(folder: Path) -> _Source:
    """Open a checkpoint of train_deepspeed.py; tensors are assembled when asked for."""
    checkpoint = ShardedCheckpoint(folder)
    config = read_config(checkpoint.state["config"], folder / "state.json")
    settings = read_settings(checkpoint.state["settings"], folder / "state.json")
    table = sincos_pos_embed(config.input_size // config.patch_size, config.hidden_size)
    frozen = {"pos_embed": table, **checkpoint.buffers()}  # what is not trained is in no fragment
    kinds = ("model", "ema", *average_kinds(settings).values())
    weights = {kind: checkpoint.weights(kind, frozen) for kind in kinds}
    return _Source(folder, weights, config, settings)


def _shards(folder: Path, stem: str) -> list[Path]:
    """Return STEM.safetensors or, by the index beside them, all of STEM-0000i-of-0000n."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        if not (folder / f"{stem}.safetensors").is_file():
            raise FileError(f"{folder} has a config.json but no {stem}.safetensors")
        return [folder / f"{stem}.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise FileError(f"{index}: weight_map names no files")
    if outside := [name for name in names if Path(name).name != name]:
        raise FileError(f"{index} names {outside[0]!r}, which is not in its folder")
    return [folder / name for name in sorted(set(names))]


def _open_safetensors(*paths: Path) -> _Source:
    """Open files of one model; its config may also lie beside them as config.json."""
    index = paths[0].with_name("model.safetensors.index.json")  # huggingface_hub's settings
    metadata: dict[str, Any] = {}
    if index.is_file() and isinstance(told := read_json(index).get("metadata"), dict):
        metadata |= told
    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata |= file.metadata() or {}
                files |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise FileError(f"{path} is damaged or no safetensors file: {error}") from error
    beside, fields = paths[0].with_name("config.json"), None
    if "config" in metadata:
        fields = parse_json(str(metadata["config"]), f"config of {paths[0]}")
    elif beside.is_file():
        fields = read_json(beside)
    config = read_config(fields, paths[0]) if fields and "_class_name" not in fields else None
    settings = parse_json(str(metadata.get("settings", "{}")), f"settings of {paths[0]}")
    weights = SafetensorsWeights(files)
    sets = {"model": weights, "ema": weights}
    return _Source(paths[0], sets, config, read_settings(settings, paths[0]))


def _is_state_dict(content: Any) -> bool:
    """Tell whether these are names and tensors, each with a place in the file for every value.

    A tensor may claim any shape of few bytes, and would fill the memory once it is copied.
    """
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and _is_stored(tensor) for name, tensor in content.items())


def _is_stored(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
        return False
    return tensor.nbytes <= tensor.untyped_storage().nbytes()
