"""Parameters by name: which ones are frozen, and the groups in which the optimizer has the others.

In order: `freeze`, `optimizer_groups`, then an optimizer's state on disk, which knows no groups:
`optimizer_state`, `load_optimizer`, `saved_order`.

A PATTERN of `--freeze` and `--lr-scale` is a part of a parameter's name; * stands for any text.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from models import DiT
from training.settings import TrainSettings


def freeze(model: DiT, patterns: Sequence[str]) -> None:
    """Leave the parameters whose names match as they are, without gradient and optimizer state.

    Raises:
        UserError: a pattern matches nothing, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    for pattern in patterns:
        for name in _matching(named, pattern, "--freeze"):
            named[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in named.values()):
        raise UserError(f"--freeze {' '.join(patterns)}: nothing is left to train")


def _matching(names: Iterable[str], pattern: str, flag: str) -> list[str]:
    """Return the names that a pattern matches.

    Raises:
        UserError: it matches none; it says which is near.
    """
    names = list(names)
    found = [name for name in names if fnmatchcase(name, f"*{pattern}*")]
    if not found:
        near = difflib.get_close_matches(pattern, names, 1, 0) or names[:1]
        raise UserError(f"{flag} {pattern}: no parameter has that in its name, such as {near[0]}")
    return found


def optimizer_groups(
    named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups of one rate and decay, as optimizers take them.

    Each group has "names" of its parameters and "lr_scale", by which
    `set_learning_rate` multiplies the rate.

    Args:
        named: the model's parameters; frozen ones are left out.
        settings: whose `--lr-scale` counts; of two patterns that match, the later one.

    Raises:
        UserError: a pattern matches nothing.
    """
    trained = {name: parameter for name, parameter in named if parameter.requires_grad}
    scale, decay = dict.fromkeys(trained, 1.0), settings.weight_decay
    for text in settings.lr_scale or ():
        pattern, _, factor = text.rpartition("=")
        scale |= dict.fromkeys(_matching(trained, pattern, "--lr-scale"), float(factor))
    kinds = {name: (scale[name], decay if is_decayed(name) else 0.0) for name in trained}
    return [
        {
            "params": [trained[name] for name in trained if kinds[name] == kind],
            "names": [name for name in trained if kinds[name] == kind],
            "lr_scale": kind[0],
            "weight_decay": kind[1],
        }
        for kind in dict.fromkeys(kinds.values())
    ]


def is_decayed(name: str) -> bool:
    """Tell whether weight decay acts on a parameter: not on biases, norms, routers and tables.

    A decayed router makes the choice of experts ever more alike, and a table's row of a class that
    comes rarely would shrink without ever being used.
    """
    left_alone = ("bias", "norm.weight", "embedding_table.weight")
    return not name.endswith(left_alone) and ".router." not in name


def optimizer_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Any]:
    """Return its `state_dict` as if the parameters had been given in one order, in whatever groups.

    Args:
        optimizer: of `optimizer_groups`.
        names: the order, see `saved_order`.
    """
    saved = optimizer.state_dict()
    number: dict[int, int] = {}  # torch's -> ours
    for group in saved["param_groups"]:
        ours = [names.index(name) for name in group.pop("names")]
        number |= dict(zip(group["params"], ours, strict=True))
        group["params"] = ours
    return {**saved, "state": {number[i]: state for i, state in saved["state"].items()}}


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Give each parameter the state it was saved with, whatever its group was.

    Rates, decay and groups stay those of the optimizer. A parameter that was frozen starts anew.

    Args:
        optimizer: of `optimizer_groups`.
        saved: `optimizer_state`, or torch's of an optimizer with one group.
        names: as there.

    Raises:
        ValueError: the state is of other parameters.
    """
    numbers = [i for group in saved["param_groups"] for i in group["params"]]
    if any(not 0 <= i < len(names) for i in (*numbers, *saved["state"])):
        raise ValueError(f"its optimizer has other parameters than the {len(names)} of the model")
    now = optimizer.state_dict()
    order = [names.index(name) for group in now["param_groups"] for name in group["names"]]
    state = {i: saved["state"][n] for i, n in enumerate(order) if n in saved["state"]}
    optimizer.load_state_dict({"state": state, "param_groups": now["param_groups"]})


def saved_order(model: DiT) -> list[str]:
    """Return the names of all parameters that can be trained, by which states are numbered."""
    return [name for name, _ in model.named_parameters() if name != "pos_embed"]
