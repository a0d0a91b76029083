"""Weights for others to read: folders of safetensors, published .pt files, diffusers pipelines.

In this order: `new_folder` (all of a folder or nothing), `save_folder` (our layout, in shards with
an index, as `DiT.from_pretrained` and `load_model` read it), `save_published`, `save_pipeline`, and
`export` and `convert`, the subcommands of checkpoint.py.
"""

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint import save_safetensors, write_tensors
from common.files import atomic_write
from data import VAE, load_vae
from layouts import by_block, to_ours, to_published
from models import DiT, DiTConfig
from sharded import write_safetensors
from weights import Weights, add_pos_embed, find_objective, open_weights, place

SHARD_BYTES = 2**28  # a block that is larger gets its own file
ROOT = Path(__file__).parent
PIPELINE_CODE = ("models.py", "moe_ops.py", "diffusion")  # what a pipeline folder carries along
PIPELINE_PACKAGE = "dit_moe"
PIPELINE_REQUIREMENTS = {"torch", "diffusers", "huggingface_hub", "safetensors"}
PIPELINE_REQUIREMENTS |= {"numpy", "pillow", "tqdm"}


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that becomes `path` on success and else disappears.

    Raises:
        FileExistsError: there is something at `path`.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(f"{path} exists already; give another name or remove it")
    temp = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temp, ignore_errors=True)  # what a killed run left
    temp.mkdir(parents=True)
    try:
        yield temp
        os.replace(temp, path)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


# ------------------------------------------------------------------------------ our layout


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
        FileExistsError: there is something at `path`.
    """
    metadata = {"config": json.dumps(config.to_dict()), "settings": json.dumps(dict(settings))}
    with new_folder(path) as folder:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        shards: list[list[str]] = []  # the names in each
        total_size = 0
        for shard in _fill_shards(groups):
            file = folder / f"{len(shards)}.safetensors"
            write_tensors(file, shard, metadata)
            with open(file, "rb") as written:
                os.fsync(written.fileno())
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


def our_blocks(weights: Weights, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """Yield the weights in our layout, a block at a time."""
    for index, tensors in by_block(weights.state):
        if index is None:
            add_pos_embed(tensors, weights.config)
        yield {name: place(name, tensor, "cpu", dtype) for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------ published layouts


def save_published(
    path: str | Path, weights: Weights, *, flash_attention: bool, dtype: torch.dtype | None
) -> None:
    """Write the .pt that the published code reads.

    Args:
        path: file that does not exist yet.
        weights: a DiT-MoE, or a dense DiT (whose published names are ours).
        flash_attention: as the XL and G files, flat with `attn.Wqkv/out_proj`; else as S and B,
            `{"ema": ...}` with `attn.qkv/proj`, or flat for a dense DiT.
        dtype: None keeps that of the source.

    Raises:
        FileExistsError: there is something at `path`.
        ValueError: the published code has no such network.
    """
    config = weights.config
    if Path(path).exists():
        raise FileExistsError(f"{path} exists already; give another name or remove it")
    has = f"this model has mlp_type={config.mlp_type!r}"
    if config.num_experts and (config.mlp_type != "swiglu" or config.norm_topk_prob):
        raise ValueError(
            f"{path}: the published DiT-MoE has SwiGLU experts without renormalised weights, "
            f"{has}, norm_topk_prob={config.norm_topk_prob}; write a .safetensors or a folder"
        )
    if not config.num_experts and (config.mlp_type != "gelu" or config.qk_norm):
        raise ValueError(
            f"{path}: the published dense DiT has GELU MLPs and no QK norm, {has}, "
            f"qk_norm={config.qk_norm}; write a .safetensors or a folder"
        )
    ours = dict(to_ours(weights.state))
    add_pos_embed(ours, config)
    published = to_published(ours, flash_attention=flash_attention)
    state = {name: tensor.to(dtype).contiguous() for name, tensor in published}
    is_wrapped = config.num_experts > 0 and not flash_attention
    with atomic_write(path) as temp:
        torch.save({"ema": state} if is_wrapped else state, temp)


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
        FileExistsError: there is something at `path`.
        ValueError: nothing at `vae_path`.
    """
    vae = load_vae(vae_path, device="cpu")
    config, settings = weights.config, weights.settings
    objective = find_objective(settings, config, rf=None)
    with new_folder(path) as folder:
        transformer = folder / "transformer"
        save_folder(transformer, our_blocks(weights, dtype), config, settings)
        _copy_code(transformer / PIPELINE_PACKAGE)
        shutil.copy(ROOT / "diffusers_pipeline" / "modeling.py", transformer)
        shutil.copy(ROOT / "diffusers_pipeline" / "pipeline.py", folder)
        if isinstance(vae, VAE):
            vae.model.save_pretrained(folder / "vae")
        model_index = {
            "_class_name": ["pipeline", "DiTMoEPipeline"],
            "objective": objective,
            "class_names": settings.get("class_names") or [],
            "transformer": ["modeling", "DiTMoE"],
            "vae": ["diffusers", "AutoencoderKL"] if isinstance(vae, VAE) else [None, None],
        }
        (folder / "model_index.json").write_text(json.dumps(model_index, indent=2) + "\n")
        lines = (ROOT / "requirements.txt").read_text().splitlines(keepends=True)
        needed = [line for line in lines if line.split(">=")[0] in PIPELINE_REQUIREMENTS]
        (folder / "requirements.txt").write_text("".join(needed))


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
            target.write_text(code)


# ------------------------------------------------------------------------------ command line


def export(args: argparse.Namespace) -> str:
    """Write a run's or checkpoint's weights as one .safetensors; returns a line that says so.

    Memory: the largest tensor, since the sources are mapped and the file is written in order.

    Raises:
        FileNotFoundError, ValueError: as `load_model`; or the source is not a checkpoint of ours.
        OSError: not written.
    """
    weights = open_weights(args.run, ema=args.ema)
    if not weights.settings:
        raise ValueError(f"{args.run} has no settings of ours; export takes a run or a checkpoint")
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in DiT(weights.config).state_dict().items()}
    config, settings = json.dumps(weights.config.to_dict()), json.dumps(dict(weights.settings))
    with atomic_write(args.out) as temp:
        write_safetensors(temp, shapes, weights.state, config=config, settings=settings)
    return f"{args.out}: {'averaged' if args.ema else 'trained'} weights of {args.run}"


def convert(args: argparse.Namespace) -> str:
    """Write SRC in the layout that DST and the flags ask for; returns a line that says so."""
    names = ("num_heads", "num_experts_per_tok")
    known = {name: value for name in names if (value := getattr(args, name)) is not None}
    weights = open_weights(args.src, ema=args.ema, known=known)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    suffix = Path(args.dst).suffix
    if args.pipeline:
        vae_path = args.vae_path or weights.settings.get("vae_path") or "stabilityai/sd-vae-ft-ema"
        save_pipeline(args.dst, weights, vae_path, dtype)
        return f"{args.dst}: diffusers pipeline, VAE {vae_path}"
    if suffix == ".pt":
        flash = weights.config.qk_norm if args.attention is None else args.attention == "Wqkv"
        save_published(args.dst, weights, flash_attention=flash, dtype=dtype)
        return f"{args.dst}: published layout, attn.{'Wqkv/out_proj' if flash else 'qkv/proj'}"
    if suffix == ".safetensors":
        if Path(args.dst).exists():
            raise FileExistsError(f"{args.dst} exists already; give another name or remove it")
        tensors = {name: t for block in our_blocks(weights, dtype) for name, t in block.items()}
        save_safetensors(args.dst, tensors, weights.config, weights.settings)
        return f"{args.dst}: our layout"
    save_folder(args.dst, our_blocks(weights, dtype), weights.config, weights.settings)
    return f"{args.dst}: our layout, folder for DiT.from_pretrained"
