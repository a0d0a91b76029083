"""Names of ProMoE's, EC-DiT's and DiffMoE's published weights, to ours and back.

In this order: `is_family` (whether a state dict is one of theirs), `family_to_ours`, `to_family`,
and `family_fields`, the config fields that their own configs and shapes tell.

Their MoE blocks keep everything under `blocks.i.mlp`, one tensor per expert, the unconditional
expert being the last one; ours are `blocks.i.moe` with stacked experts.

Shape letters: D hidden, F expert hidden, E experts.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

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
        state: names to tensors in our layout, of a model whose config `family_of` knows.
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
