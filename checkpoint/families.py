"""Names of ProMoE's, EC-DiT's and DiffMoE's published weights, to ours and back.

In this order: `is_family` (whether a state dict is one of theirs), `family_to_ours`, `to_family`,
`mixture_difference` and `has_family` (whether they know a config), `family_fields` and
`published_fields`, the config fields that names and their own configs tell.

Their MoE blocks keep everything under `blocks.i.mlp`, one tensor per expert, the unconditional
expert being the last one; ours are `blocks.i.moe` with stacked experts.

Shape letters: D hidden, F expert hidden, E experts.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from models import FAMILIES, DiTConfig

StateDict = Mapping[str, Tensor]

# Below `blocks.i.`, published: ours.
NAMES = {
    "mlp.cluster_centers": "moe.router.prototypes",
    "mlp.gate_weight": "moe.router.weight",
    "mlp.expert_threshold": "moe.router.thresholds",
    "mlp.capacity_predictor.0.weight": "moe.router.capacity_predictor.fc1.weight",
    "mlp.capacity_predictor.0.bias": "moe.router.capacity_predictor.fc1.bias",
    "mlp.capacity_predictor.2.weight": "moe.router.capacity_predictor.fc2.weight",
    "mlp.capacity_predictor.2.bias": "moe.router.capacity_predictor.fc2.bias",
    "mlp.shared_expert.up_proj.weight": "moe.shared_experts.fc1.weight",
    "mlp.shared_expert.up_proj.bias": "moe.shared_experts.fc1.bias",
    "mlp.shared_expert.down_proj.weight": "moe.shared_experts.fc2.weight",
    "mlp.shared_expert.down_proj.bias": "moe.shared_experts.fc2.bias",
}
# An expert's tensors: ours, stacked, to its name in ProMoE and in the other two.
EXPERT = {
    "up_proj": ("up_proj.weight", "fc1.weight"),
    "up_bias": ("up_proj.bias", "fc1.bias"),
    "down_proj": ("down_proj.weight", "fc2.weight"),
    "down_bias": ("down_proj.bias", "fc2.bias"),
}
# What their code does that no file says: t in 0..1000.
FAMILY_SETTINGS = {"objective": "rf", "time_scale": 1000.0}
THRESHOLD_DECAY = 0.95  # DiffMoE saves it beside the thresholds; the paper's value


def is_family(state: StateDict) -> bool:
    """Say whether a state dict has a router as ProMoE, EC-DiT or DiffMoE name it."""
    return any(name.endswith(("mlp.cluster_centers", "mlp.gate_weight")) for name in state)


def family_to_ours(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in our layout, experts stacked.

    Raises:
        KeyError: an expert lacks a tensor.
        ValueError: the decay of the thresholds is not the paper's.
    """
    for name, tensor in state.items():
        match = re.fullmatch(r"(blocks\.\d+)\.(mlp\..+)", name)
        if match is None:
            yield name, tensor
        elif match[2] in NAMES:
            yield f"{match[1]}.{NAMES[match[2]]}", tensor
        elif match[2] == "mlp.ema_decay":
            if not torch.allclose(tensor.float(), torch.tensor(THRESHOLD_DECAY)):
                raise ValueError(f"{name} is {tensor.tolist()}, only {THRESHOLD_DECAY} is known")
        elif expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", match[2]):
            if expert[1] == "0" and expert[2].endswith(("up_proj.weight", "fc1.weight")):
                yield from _stack(state, match[1], expert[2] == "fc1.weight")
        else:
            yield name, tensor  # a dense block's


def _stack(state: StateDict, block: str, by_number: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield one block's experts, stacked."""
    prefix = f"{block}.mlp.experts."
    numbers = {
        int(name.removeprefix(prefix).split(".")[0]) for name in state if name.startswith(prefix)
    }
    for ours, names in EXPERT.items():
        parts = [state[f"{prefix}{number}.{names[by_number]}"] for number in range(len(numbers))]
        yield f"{block}.moe.experts.{ours}", torch.stack(parts)


def to_family(state: StateDict) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) in the published layout: ProMoE's with prototypes, else the others'.

    Args:
        state: names to tensors in our layout, of a model whose config `has_family`.
    """
    by_number = not any(name.endswith("router.prototypes") for name in state)
    theirs = {ours: published for published, ours in NAMES.items()}
    for name, tensor in state.items():
        block, ending = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        if ending in theirs:
            yield f"{block}.{theirs[ending]}", tensor
            if ending == "moe.router.thresholds":
                yield f"{block}.mlp.ema_decay", torch.tensor([THRESHOLD_DECAY])
        elif ending.startswith("moe.experts."):
            names = EXPERT[ending.removeprefix("moe.experts.")]
            for number, part in enumerate(tensor):
                yield f"{block}.mlp.experts.{number}.{names[by_number]}", part.clone()
        else:
            yield name, tensor


# Fields that a published code has a choice of, or that decide nothing in what it computes.
FREE = {
    *("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio"),
    *("num_classes", "class_dropout_prob", "num_experts", "num_experts_per_tok", "learn_sigma"),
    *("qk_norm", "balance"),
}


def mixture_difference(config: DiTConfig, family: str = "") -> str:
    """Return the first field by which a config is none of a family's, "" if there is none.

    Args:
        family: in `FAMILIES`; "" for DiT-MoE.
    """
    free = FREE | ({"num_shared_experts"} if family.startswith("ProMoE") or not family else set())
    if family:
        free |= {"capacity", "moe_blocks", "unconditional_expert"}
        if not family.startswith("ProMoE"):
            free -= {"unconditional_expert"}
    if not config.qk_norm:
        free = free | {"qk_norm_eps"}  # of nothing
    expected = {**DiTConfig().to_dict(), **(FAMILIES[family][0] if family else {})}
    fields = config.to_dict()
    if "bias" in config.balance:
        return "balance"
    if family and config.moe_blocks == "deep_half":
        return "moe_blocks"
    return next((n for n, v in fields.items() if n not in free and v != expected[n]), "")


def has_family(config: DiTConfig) -> bool:
    """Say whether ProMoE's, EC-DiT's or DiffMoE's code computes what this config says."""
    return config.num_experts > 0 and any(not mixture_difference(config, f) for f in FAMILIES)


def family_fields(names: Iterable[str]) -> dict[str, Any]:
    """Return the config fields that the names of published tensors tell.

    ProMoE's two selections have the same names; token choice, which most of its files have, is
    assumed. Where experts choose, they are taken to choose as many tokens as there are.
    """
    names = list(names)
    if any(name.endswith("mlp.cluster_centers") for name in names):
        family = "ProMoE"
    else:
        has_thresholds = any(name.endswith("mlp.expert_threshold") for name in names)
        family = "DiffMoE" if has_thresholds else "EC-DiT"
    left_to_shapes = (
        *("num_experts", "num_shared_experts", "unconditional_expert", "mlp_ratio", "mlp_type"),
        *("learn_sigma", "qk_norm"),
    )
    fields = {n: v for n, v in FAMILIES[family][0].items() if n not in left_to_shapes}
    if any(
        name.endswith(("blocks.0.mlp.cluster_centers", "blocks.0.mlp.gate_weight"))
        for name in names
    ):
        fields["moe_blocks"] = "all"
    return fields


def published_fields(published: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """Return the config fields that a published code's own config tells.

    Args:
        published: its names and values.
        kind: "promoe_ec" tells what the config does not, that experts choose.

    Raises:
        ValueError: it says what our routers do not compute.
    """
    same = ("input_size", "num_heads", "class_dropout_prob")
    fields = {name: published[name] for name in same if name in published}
    mixture = published.get("MoE_config", {})
    if "top_k" in mixture:
        fields["num_experts_per_tok"] = mixture["top_k"]
    if "capacity" in mixture:
        fields["capacity"] = float(mixture["capacity"])
    known: dict[str, Any] = {"norm_topk_prob": False, "router_weight_mode": "identity"}
    for name, value in known.items():
        if mixture.get(name, value) != value:
            raise ValueError(f"published_config: {name} {mixture[name]}, only {value} is known")
    if published.get("use_swiglu"):
        raise ValueError("published_config: use_swiglu True, only GELU experts are known")
    if kind == "promoe_ec":
        fields["selection"] = "expert_choice"
    return fields
