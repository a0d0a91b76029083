"""How the weights are moved: the learning rate of a step, and what Adam is told."""

import math
from typing import Any

import torch

from training.settings import TrainSettings


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the rate of the step after `step`.

    A linear warm-up, then `--lr` until the last `decay_steps` of the run, over which it falls to
    `min_lr`: along half a cosine, or in a line (warm-up, stable, decay).

    Source: cosine of SGDR, arXiv:1608.03983, eq. 5, without restarts; wsd of MiniCPM,
    arXiv:2404.06395, sec. 4, with a line as in arXiv:2405.18392.
    """
    rate = settings.lr * min(1.0, (step + 1) / max(settings.warmup_steps, 1))
    if settings.decay_steps is None:
        return rate
    start = settings.max_steps - settings.decay_steps
    fallen = min(max((step - start) / settings.decay_steps, 0.0), 1.0)  # 0 to 1
    if settings.lr_schedule == "cosine":
        fallen = (1 - math.cos(math.pi * fallen)) / 2
    return (1 - fallen) * rate + fallen * settings.min_lr


def adam_arguments(settings: TrainSettings) -> dict[str, Any]:
    """Return what the flags tell AdamW, beside its parameters."""
    return {
        "lr": settings.lr,
        "betas": tuple(settings.adam_betas),
        "eps": settings.adam_eps,
        "weight_decay": settings.weight_decay,
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the rate of the next step."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
