"""Weights for others to read: .safetensors, folders of them, published .pt files, diffusers.

In this order: `check_new` and `new_folder` (nothing is overwritten, and a folder is whole or not
there), `save_file` and `save_folder` (our layout, as one file or in shards with an index, as
`DiT.from_pretrained` and `load_model` read it), `save_published`, `save_pipeline`. All but the
published file are written a block at a time; convert.py is their command line.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from checkpoint.card import model_card
from checkpoint.described import description_path, save_description
from checkpoint.families import has_family, mixture_difference, to_family
from checkpoint.layouts import to_published
from checkpoint.weights import (
    Weights,
    empty_model,
    find_latent_norm,
    find_objective,
    place,
    read_blocks,
)
from common.errors import FileError, UserError
from common.files import UNSEALED, atomic_write, check_folder, seal
from data import VAE, load_vae
from models import DiTConfig

SAFETENSORS_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
SHARD_BYTES = 2**28  # a block that is larger gets its own file
FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
PIPELINE_CODE = ("models.py", "moe_ops", "diffusion")  # what a pipeline folder carries along
PIPELINE_PACKAGE = "dit_moe"
PIPELINE_REQUIREMENTS = {"torch", "diffusers", "huggingface_hub", "safetensors"}
PIPELINE_REQUIREMENTS |= {"numpy", "pillow", "tqdm"}


def check_new(path: str | Path) -> Path:
    """Return `path`, where there is nothing yet and something can be written.

    Raises:
        FileError: otherwise.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise FileError(f"{path} exists already; give another name or remove it")
    check_folder(path)
    return path


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that becomes `path` on success and else disappears.

    Raises:
        FileError: there is something at `path`, or it could not be written.
    """
    path = check_new(path)
    temp = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temp, ignore_errors=True)  # what a killed run left
    try:
        temp.mkdir(parents=True)
        yield temp
        os.rename(temp, path)
    except UserError:
        raise
    except (OSError, SafetensorError) as error:  # the VAE is written by diffusers
        raise FileError(f"could not write {path}: {error}") from error
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# ------------------------------------------------------------------------------ our layout


def save_file(
    path: str | Path,
    groups: Iterable[Mapping[str, Tensor]],
    config: DiTConfig,
    settings: Mapping[str, Any],
) -> None:
    """Write one .safetensors with config and settings in its metadata.

    Args:
        path: file that does not exist yet.
        groups: parts of the state dict of a model of `config`; one is held at a time.
        config: of the model.
        settings: as in `save_safetensors`.

    Raises:
        FileError: there is something at `path`, or it could not be written.
    """
    shapes = {name: tensor.shape for name, tensor in empty_model(config).state_dict().items()}
    with atomic_write(check_new(path)) as temp:
        _write_safetensors(temp, groups, shapes, config, settings)


def save_folder(
    path: str | Path,
    groups: Iterable[Mapping[str, Tensor]],
    config: DiTConfig,
    settings: Mapping[str, Any],
) -> None:
    """Write config.json and model.safetensors, or several model-0000i-of-0000n and their index.

    Args:
        path: folder that does not exist yet.
        groups: parts of the state dict, such as blocks; only about `SHARD_BYTES` or one part, if
            that is more, are held at a time.
        config: of the model.
        settings: as in `save_safetensors`.

    Raises:
        FileError: there is something at `path`, or it could not be written.
    """
    with new_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        (folder / "README.md").write_text(model_card(config, settings))
        shards: list[list[str]] = []  # the names in each
        total_size = 0
        for shard in _fill_shards(groups):
            file = folder / f"{len(shards)}.safetensors"
            shapes = {name: tensor.shape for name, tensor in shard.items()}
            _write_safetensors(file, [shard], shapes, config, settings)
            shards.append(list(shard))
            total_size += sum(tensor.nbytes for tensor in shard.values())
            del shard  # before the next one is made
        if len(shards) == 1:
            (folder / "0.safetensors").rename(folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(shards):
            file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"{i}.safetensors").rename(folder / file_name)
            weight_map |= dict.fromkeys(names, file_name)
        index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _fill_shards(groups: Iterable[Mapping[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Join groups while they are not more than `SHARD_BYTES` together."""
    shard: dict[str, Tensor] = {}
    for group in groups:
        size = sum(tensor.nbytes for tensor in (*shard.values(), *group.values()))
        if shard and size > SHARD_BYTES:
            yield shard
            shard = {}
        shard |= {name: tensor.contiguous() for name, tensor in group.items()}
    yield shard


def _write_safetensors(
    path: Path,
    groups: Iterable[Mapping[str, Tensor]],
    shapes: Mapping[str, torch.Size],
    config: DiTConfig,
    settings: Mapping[str, Any],
) -> None:
    """Write tensors as they come, then the header that tells where they are, then its checksum.

    Args:
        path: to write; not atomic.
        groups: the tensors.
        shapes: of all of them, since the header's room is measured before the first.
        config, settings: for the metadata.
    """
    metadata = {"config": json.dumps(config.to_dict()), "settings": json.dumps(dict(settings))}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata, **UNSEALED}}
    most = 8 * sum(map(math.prod, shapes.values()))  # bytes
    for name, shape in shapes.items():  # no entry can be longer
        header[name] = {"dtype": "BF16", "shape": [*shape], "data_offsets": [most, most]}
    room = -(-len(json.dumps(header)) // 8) * 8
    with open(path, "wb") as file:
        file.seek(8 + room)
        end = 0
        for name, tensor in _aligned(groups):
            start, end = end, end + tensor.nbytes
            header[name]["dtype"] = SAFETENSORS_TYPES[tensor.dtype]
            header[name]["data_offsets"] = [start, end]
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.seek(0)
        file.write(struct.pack("<Q", room) + json.dumps(header).encode().ljust(room))
    seal(path)
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def _aligned(groups: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors; last those after which the next would not start at a multiple of 8."""
    odd: list[tuple[str, Tensor]] = []
    for name, tensor in (item for group in groups for item in group.items()):
        if tensor.nbytes % 8:
            odd.append((name, tensor))
        else:
            yield name, tensor
    yield from sorted(odd, key=lambda item: -item[1].itemsize)


def our_blocks(weights: Weights, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Yield the weights in our layout, a block at a time, each checked."""
    for _, tensors in read_blocks(weights):
        yield {name: place(name, tensor, "cpu", dtype) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------ published layouts


def save_published(
    path: str | Path, weights: Weights, *, flash_attention: bool, dtype: torch.dtype | None
) -> None:
    """Write the .pt that the published code reads, and beside it what it has no place for.

    That is NAME.json, with config and settings, by which `open_weights` knows it again.

    Args:
        path: file that does not exist yet.
        weights: a DiT-MoE, ProMoE, EC-DiT or DiffMoE, or a dense DiT, whose published names are
            ours.
        flash_attention: as the XL and G files, flat with `attn.Wqkv/out_proj`; else as S and B,
            `{"ema": ...}` with `attn.qkv/proj`, or flat for a dense DiT. The later families have
            `{"ema_model_state_dict": ...}` and one spelling.
        dtype: None keeps that of the source.

    Raises:
        FileError: there is something at `path` or at NAME.json, or it could not be written.
        UserError: the published code has no such network.
    """
    config = weights.config
    for new in (path, description_path(path)):
        check_new(new)
    if not (family := has_family(config)):
        _check_published(path, config)
    state: dict[str, Tensor] = {}
    for _, ours in read_blocks(weights):
        named = to_family(ours) if family else to_published(ours, flash_attention=flash_attention)
        state |= {name: tensor.to(dtype).contiguous() for name, tensor in named}
    content: dict[str, Any] = state
    if family:
        content = {"ema_model_state_dict": state}
    elif config.num_experts and not flash_attention:
        content = {"ema": state}
    with atomic_write(path) as temp, open(temp, "wb") as file:
        torch.save(content, file)
    save_description(path, config, weights.settings)


def _check_published(path: str | Path, config: DiTConfig) -> None:
    """Refuse a model that the published code of DiT-MoE, or of the dense DiT, does not compute.

    Raises:
        UserError: naming the field.
    """
    has = f"this model has mlp_type={config.mlp_type!r}"
    if config.rope or config.norm != "layer":
        raise UserError(
            f"{path}: the published code knows no rope and no norm but layer, this model has "
            f"rope={config.rope}, norm={config.norm!r}; write a .safetensors or a folder"
        )
    name = mixture_difference(config) if config.num_experts else ""
    if name not in ("", "mlp_type", "norm_topk_prob"):  # those two are told apart below
        raise UserError(
            f"{path}: the published code knows no {name}={getattr(config, name)!r}; "
            "write a .safetensors or a folder"
        )
    if config.num_experts and (config.mlp_type != "swiglu" or config.norm_topk_prob):
        raise UserError(
            f"{path}: the published DiT-MoE has SwiGLU experts without renormalised weights, "
            f"{has}, norm_topk_prob={config.norm_topk_prob}; write a .safetensors or a folder"
        )
    if not config.num_experts and (config.mlp_type != "gelu" or config.qk_norm):
        raise UserError(
            f"{path}: the published dense DiT has GELU MLPs and no QK norm, {has}, "
            f"qk_norm={config.qk_norm}; write a .safetensors or a folder"
        )


# ------------------------------------------------------------------------------ diffusers


def save_pipeline(
    path: str | Path, weights: Weights, vae_path: str, dtype: torch.dtype | None
) -> None:
    """Write a folder for `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`.

    It carries weights, VAE and code; its requirements.txt names the packages it needs, in the
    ranges of ours.

    Args:
        path: folder that does not exist yet.
        weights: of any layout.
        vae_path: as in `load_vae`.
        dtype: of the weights, None keeps that of the source.

    Raises:
        FileError: there is something at `path`, or it could not be written.
        UserError: nothing at `vae_path`.
    """
    check_new(path)
    config, settings = weights.config, weights.settings
    vae = load_vae(vae_path, device="cpu", norm=find_latent_norm(settings))
    objective = find_objective(settings, config, rf=None)
    with new_folder(path) as folder:
        transformer = folder / "transformer"
        save_folder(transformer, our_blocks(weights, dtype), config, settings)
        (folder / "README.md").write_text(model_card(config, settings, pipeline=True))
        _copy_code(transformer / PIPELINE_PACKAGE)
        shutil.copy(FOLDER / "diffusers_pipeline" / "modeling.py", transformer)
        shutil.copy(FOLDER / "diffusers_pipeline" / "pipeline.py", folder)
        if isinstance(vae, VAE):
            vae.model.save_pretrained(folder / "vae")
        model_index: dict[str, Any] = {
            "_class_name": ["pipeline", "DiTMoEPipeline"],
            "objective": objective,
            **{name: settings.get(name) for name in ("time_scale", "time_shift", "prediction")},
            "zero_terminal_snr": bool(settings.get("zero_terminal_snr")),
            "class_names": settings.get("class_names") or [],
            "transformer": ["modeling", "DiTMoE"],
            "vae": [None, None],
        }
        if isinstance(vae, VAE):
            model_index["vae"] = ["diffusers", type(vae.model).__name__]
            model_index["decoding"] = _decoding(vae)
        (folder / "model_index.json").write_text(json.dumps(model_index, indent=2) + "\n")
        lines = (ROOT / "requirements.txt").read_text().splitlines(keepends=True)
        needed = [line for line in lines if line.split(">=")[0] in PIPELINE_REQUIREMENTS]
        (folder / "requirements.txt").write_text("".join(needed))


def _decoding(vae: VAE) -> dict[str, Any]:
    """Return the numbers by which `VAE.decode` makes images of latents, for the pipeline's code."""
    norms = [norm for norm in (vae.norm, vae.own_norm) if norm is not None]
    return {
        "norms": [{"mean": list(norm.mean), "std": list(norm.std)} for norm in norms],
        "scale": vae.scale,
        "shift": vae.shift,
        "low": vae.kind.low,
        "downsample": vae.downsample,
    }


def _copy_code(package: Path) -> None:
    """Copy what the model and its samplers need into a package of their own."""
    package.mkdir()
    (package / "__init__.py").touch()
    ours = "|".join(Path(name).stem for name in PIPELINE_CODE)
    for name in PIPELINE_CODE:
        files = (ROOT / name).glob("*.py") if (ROOT / name).is_dir() else [ROOT / name]
        for file in files:
            target = package / file.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            code = re.sub(
                rf"^from ({ours})\b", rf"from {PIPELINE_PACKAGE}.\1", file.read_text(), flags=re.M
            )
            # Operators of this repository may be registered in the same process.
            target.write_text(code.replace("dit_moe::", "dit_moe_pipeline::"))
