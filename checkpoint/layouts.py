"""Names and shapes of DiT weights: published layouts to ours and back, and the config they imply.

Pure functions of state dicts; no file is read here (see checkpoint/weights.py). In this order:

1. `clean_names`: what wrappers (DDP, torch.compile) put in front of names.
2. `to_ours`: the published layouts to ours: DiT-MoE with `qkv/proj` (S, B) or `Wqkv/out_proj`
   (XL, G) and one tensor per expert, dense DiT, diffusers' DiTTransformer2DModel, and those of
   later families (see checkpoint/families.py).
3. `by_block`: any layout to ours, one block at a time, for models that do not fit in memory.
4. `to_published`: ours to the published DiT-MoE layouts.
5. `infer_config`: the DiTConfig from the shapes of our tensors, and what flags tell.

Shape letters: D hidden, F expert hidden, S shared hidden, E experts, P patch, T tokens per image.
"""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.families import family_to_ours, is_family
from common.errors import UserError
from models import DiT_models, DiTConfig

StateDict = Mapping[str, Tensor]

# Heads can't be read from the shape of a packed qkv: these are the published models' (D: heads).
PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1408: 16}
PUBLISHED_EXPERTS_PER_TOK = 2

# Endings of names, published: ours. The two attention spellings pack q, k, v alike.
FLASH_ATTENTION = {
    "attn.Wqkv.weight": "attn.qkv.weight",
    "attn.Wqkv.bias": "attn.qkv.bias",
    "attn.out_proj.weight": "attn.proj.weight",
    "attn.out_proj.bias": "attn.proj.bias",
}
ROUTER = {"moe.gate.weight": "moe.router.weight"}

DIFFUSERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
DIFFUSERS_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}
DIFFUSERS_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def clean_names(state: StateDict) -> StateDict:
    """Drop DDP's `module.` and torch.compile's `_orig_mod.` from the names.

    A state without them is returned as it is, so that a lazy mapping stays lazy.
    """
    if not any(name.startswith("module.") or "_orig_mod." in name for name in state):
        return state
    return {
        name.replace("_orig_mod.", "").removeprefix("module."): tensor
        for name, tensor in state.items()
    }


def to_ours(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in our layout, whatever known layout `state` has.

    Tensors that only change their name stay the same storage; fused ones are made one at a time,
    so a caller who casts or moves each as it comes never holds a second copy of the model.

    Args:
        state: names to tensors, in our layout or a published one.

    Raises:
        ValueError: `state` is of no known layout, or lacks a tensor of its layout.
    """
    state = clean_names(state)
    is_diffusers = "pos_embed.proj.weight" in state
    if not is_diffusers and "x_embedder.proj.weight" not in state:
        raise ValueError(
            f"no DiT weights: found the names {sorted(state)[:5]}, expected x_embedder.proj.weight "
            "(DiT, DiT-MoE) or pos_embed.proj.weight (diffusers DiTTransformer2DModel)"
        )
    try:
        if is_family(state):
            yield from family_to_ours(state)
        else:
            yield from _diffusers_to_ours(state) if is_diffusers else _published_to_ours(state)
    except KeyError as error:
        raise ValueError(f"incomplete weights: no tensor named {error}") from error


def _published_to_ours(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Rename attention and router, fuse gate with up, stack the experts; ours passes unchanged."""
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.+\.moe\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            if match[2] == "0" and match[3] == "gate":  # this one stands for its whole layer
                yield from _stack_experts(state, match[1])
        elif name.endswith("shared_experts.gate_proj.weight"):
            up = state[name.replace("gate_proj", "up_proj")]
            yield name.replace("gate_proj", "gate_up_proj"), torch.cat([tensor, up])  # (2S, D)
        elif not name.endswith("shared_experts.up_proj.weight"):
            yield _rename_ending(name, FLASH_ATTENTION | ROUTER), tensor


def _stack_experts(state: StateDict, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the stacked (E, 2F, D) gate_up_proj and (E, D, F) down_proj of one layer."""
    num_experts = sum(
        name.startswith(prefix) and name.endswith("gate_proj.weight") for name in state
    )
    gate_up = [
        state[f"{prefix}.{expert}.{half}_proj.weight"]
        for expert in range(num_experts)
        for half in ("gate", "up")
    ]
    yield f"{prefix}.gate_up_proj", torch.cat(gate_up).unflatten(0, (num_experts, -1))
    down = [state[f"{prefix}.{expert}.down_proj.weight"] for expert in range(num_experts)]
    yield f"{prefix}.down_proj", torch.stack(down)


def _diffusers_to_ours(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Rename, fuse q, k, v, and keep one of the embedders of which every block has a copy."""
    for name, tensor in state.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if match is None:
            yield _rename_start(name, DIFFUSERS), tensor
        elif match[2].startswith("norm1.emb."):
            first = f"transformer_blocks.0.{match[2]}.{match[3]}"
            if name == first:
                ours = DIFFUSERS_EMBEDDERS[match[2].removeprefix("norm1.emb.")]
                yield f"{ours}.{match[3]}", tensor
            elif not torch.equal(tensor, state[first]):
                raise ValueError(
                    f"{name} differs from {first}: a DiT has one embedder for all blocks"
                )
        elif match[2] == "attn1.to_q":
            qkv = [state[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            yield f"blocks.{match[1]}.attn.qkv.{match[3]}", torch.cat(qkv)  # (3D, D) or (3D,)
        elif match[2] not in ("attn1.to_k", "attn1.to_v"):
            ours = DIFFUSERS_BLOCK.get(match[2], match[2])
            yield f"blocks.{match[1]}.{ours}.{match[3]}", tensor


def block_index(name: str) -> int | None:
    """Return the number of the block that a tensor of any layout belongs to in ours."""
    if ".norm1.emb." in name:  # diffusers' copies of the embedders
        return None
    match = re.match(r"(?:module\.)?(?:_orig_mod\.)?(?:transformer_)?blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


class _InBlockOrder(Mapping[str, Tensor]):
    """A view of a state dict: first what is in no block, then block after block."""

    def __init__(self, state: StateDict) -> None:
        self.state = state

    def __getitem__(self, name: str) -> Tensor:
        return self.state[name]

    def __iter__(self) -> Iterator[str]:
        found = {name: block_index(name) for name in self.state}
        indices = {name: -1 if index is None else index for name, index in found.items()}
        return iter(sorted(indices, key=indices.__getitem__))

    def __len__(self) -> int:
        return len(self.state)


def by_block(state: StateDict) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Yield (None, tensors outside all blocks), then (i, tensors of block i), in our layout.

    A tensor is asked of `state` when its group's turn comes, so a lazy mapping is read in steps.

    Args:
        state: names to tensors, in our layout or a published one.
    """
    ours = to_ours(_InBlockOrder(state))
    for index, tensors in groupby(ours, lambda item: block_index(item[0])):
        yield index, dict(tensors)


def to_published(state: StateDict, *, flash_attention: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in a published DiT-MoE layout; dense weights keep their names.

    Args:
        state: names to tensors in our layout.
        flash_attention: `attn.Wqkv/out_proj` as the XL and G files, else `attn.qkv/proj` as the
            S and B files.
    """
    renames = ROUTER | FLASH_ATTENTION if flash_attention else ROUTER
    renames = {ours: published for published, ours in renames.items()}
    for name, tensor in state.items():
        prefix, _, ending = name.rpartition(".experts.")
        if prefix:
            for expert, weight in enumerate(tensor):
                halves = weight.chunk(2) if ending == "gate_up_proj" else [weight]
                kinds = ("gate", "up") if ending == "gate_up_proj" else ("down",)
                for kind, half in zip(kinds, halves, strict=True):
                    yield f"{prefix}.experts.{expert}.{kind}_proj.weight", half.clone()
        elif name.endswith("shared_experts.gate_up_proj.weight"):
            for kind, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
                yield name.replace("gate_up", kind), half.clone()
        else:
            yield _rename_ending(name, renames), tensor


def _rename_ending(name: str, renames: Mapping[str, str]) -> str:
    """Replace `a.b.c` of `blocks.i.a.b.c`."""
    block, ending = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
    return f"{block}.{renames[ending]}" if ending in renames else name


def _rename_start(name: str, renames: Mapping[str, str]) -> str:
    """Replace `a.b` of `a.b` or `a.b.weight`; unknown names stay, the model will refuse them."""
    for old, new in renames.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def known_fields(model: str | None = None, **flags: Any) -> dict[str, Any]:
    """Return the config fields that flags tell of a file that brings no config.

    Args:
        model: `--model`, a name in `DiT_models`: tells the number of heads, as shapes do not.
        flags: config fields; those that are None are left out.
    """
    fields = {name: value for name, value in flags.items() if value is not None}
    if model is not None:
        with torch.device("meta"):
            config = DiT_models[model]().config
        fields.setdefault("num_heads", config.num_heads)
        if config.selection != "token_choice":  # ProMoE's two have tensors of the same names
            fields.setdefault("selection", config.selection)
    return fields


def check_told(path: str | Path, told: Mapping[str, Any], config: DiTConfig) -> None:
    """Compare what flags say with the config of a checkpoint.

    Args:
        path: of the checkpoint, for the message.
        told: by flag, "model" or a config field; None says nothing, other names are left alone.
        config: of the checkpoint.

    Raises:
        UserError: naming the first flag that contradicts it.
    """
    if name := told.get("model"):
        with torch.device("meta"):
            size = DiT_models[name]().config
        for field in ("hidden_size", "depth", "patch_size"):
            ours, theirs = getattr(size, field), getattr(config, field)
            if ours != theirs:
                raise UserError(f"--model {name} has {field} {ours}, {path} has {theirs}")
    for name, theirs in config.to_dict().items():
        if told.get(name) not in (None, theirs):
            raise UserError(f"--{name.replace('_', '-')} {told[name]}: {path} has {theirs}")


def infer_config(state: StateDict, known: Mapping[str, Any] | None = None) -> DiTConfig:
    """Read the DiTConfig from the shapes of the tensors.

    Args:
        state: names to tensors in our layout.
        known: config fields known from elsewhere; they win. Shapes never tell
            num_experts_per_tok (2 if unknown), norm_topk_prob (False) and class_dropout_prob;
            num_heads only with QK norm
            or at a published width; input_size only with pos_embed.

    Raises:
        ValueError: num_heads or input_size is neither in the shapes nor in `known`, or a tensor
            of every DiT is missing.
    """
    try:
        fields = _fields_from_shapes({name: tensor.shape for name, tensor in state.items()})
    except KeyError as error:
        raise ValueError(f"incomplete weights: no tensor named {error}") from error
    fields |= dict(known or {})
    for name in ("num_heads", "input_size"):
        if name not in fields:
            raise ValueError(
                f"{name} can't be told from these weights (width {fields['hidden_size']}, known "
                f"widths {sorted(PUBLISHED_HEADS)}): give --model (in Python: config=DiTConfig())"
            )
    return DiTConfig(**fields)


def _fields_from_shapes(shapes: Mapping[str, torch.Size]) -> dict[str, Any]:
    """Return the config fields that shapes tell."""
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["final_layer.linear.weight"][0] // patch_size**2
    fields: dict[str, Any] = {
        "hidden_size": hidden_size,
        "in_channels": in_channels,
        "patch_size": patch_size,
        "depth": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,  # - null label
        "learn_sigma": out_channels == 2 * in_channels,
        "qk_norm": "blocks.0.attn.q_norm.weight" in shapes,
    }
    if fields["qk_norm"]:
        fields["num_heads"] = hidden_size // shapes["blocks.0.attn.q_norm.weight"][0]
    elif hidden_size in PUBLISHED_HEADS:
        fields["num_heads"] = PUBLISHED_HEADS[hidden_size]
    if "pos_embed" in shapes:
        fields["input_size"] = math.isqrt(shapes["pos_embed"][1]) * patch_size
    return fields | _mlp_fields(shapes, hidden_size)


def _mlp_fields(shapes: Mapping[str, torch.Size], hidden_size: int) -> dict[str, Any]:
    """Return the config fields of the first MoE, or of the dense MLP."""
    routers = [name for name in shapes if name.endswith((".router.weight", ".router.prototypes"))]
    if routers:
        prefix, _, kind = routers[0].rpartition(".router.")
        mlp_type = "gelu" if f"{prefix}.experts.up_bias" in shapes else "swiglu"
        shared_down = "fc2" if mlp_type == "gelu" else "down_proj"
        shared = shapes.get(f"{prefix}.shared_experts.{shared_down}.weight", (0, 0))[1]
        num_all_experts, _, width = shapes[f"{prefix}.experts.down_proj"]
        return {
            "num_experts": shapes[routers[0]][0],
            "num_experts_per_tok": PUBLISHED_EXPERTS_PER_TOK,
            "num_shared_experts": shared // hidden_size,
            "mlp_type": mlp_type,
            "mlp_ratio": width / hidden_size,
            "affinity": "cosine" if kind == "prototypes" else "softmax",
            "unconditional_expert": num_all_experts > shapes[routers[0]][0],
        }
    mlp_type = "gelu" if "blocks.0.mlp.fc2.weight" in shapes else "swiglu"
    down_proj = shapes[f"blocks.0.mlp.{'fc2' if mlp_type == 'gelu' else 'down_proj'}.weight"]
    return {"num_experts": 0, "mlp_type": mlp_type, "mlp_ratio": down_proj[1] / hidden_size}
