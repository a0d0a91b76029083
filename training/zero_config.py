"""The engine's settings: a DeepSpeed file, which has ZeRO and precision, completed by the flags.

In order: `read_config`, the precision (`resolve_precision`), `engine_config`.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common import process
from common.errors import FileError, UserError
from models import Experts, GeluExperts
from training.settings import TrainSettings

NUM_STAGES = 4
# What the flags own, by its name in a DeepSpeed file.
OWNED_BY_FLAGS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "accum_steps",
    "gradient_clipping": "clip_grad",
}
# Modules whose parameters only matmuls read, which autocast has in half.
HALF_MODULES = [
    f"{c.__module__}.{c.__name__}" for c in (nn.Linear, nn.Conv2d, Experts, GeluExperts)
]


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed file: ZeRO and precision only.

    Raises:
        FileError, UserError: naming what is wrong with the file and what to do.
    """
    where = f"--deepspeed-config {path}"
    if not Path(path).is_file():
        raise FileError(f"{where}: no such file")
    try:
        config = json.loads(Path(path).read_text())
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{where} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{where} has a {type(config).__name__}, not {{...}}")
    zero = _section(config, "zero_optimization", where)
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(
                f"{where} has {section!r}, but the flags own the optimizer and "
                "its rate: remove it and give --lr, --warmup-steps, --weight-decay"
            )
    for section in ("offload_optimizer", "offload_param"):
        device = _section(zero, section, where).get("device", "none")
        if device not in ("none", "cpu"):
            raise UserError(f"{where}: {section} to {device!r}, only to 'cpu'")
    if zero_stage(config) not in range(NUM_STAGES):
        raise UserError(f"{where}: ZeRO stage {zero_stage(config)!r} is none of 0, 1, 2, 3")
    file_precision(config, where)
    return config


def _section(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise UserError(f"{where}: {name} is {section!r}, not {{...}}")
    return section


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration, 0 without ZeRO."""
    return config.get("zero_optimization", {}).get("stage", 0)


def file_precision(config: Mapping[str, Any], where: str) -> str | None:
    """Return the precision that a file names, by torch_autocast, bf16 or fp16; None if none.

    Raises:
        UserError: if it is not one of ours.
    """
    for name in ("bf16", "fp16"):
        if _section(config, name, where).get("enabled") is True:
            return name
    autocast = _section(config, "torch_autocast", where)
    if autocast.get("enabled") is not True:
        return None
    names = {"bfloat16": "bf16", "float16": "fp16", "bf16": "bf16", "fp16": "fp16"}
    if (dtype := autocast.get("dtype")) not in names:
        raise UserError(f"{where}: torch_autocast's dtype is {dtype!r}, not bfloat16 or float16")
    return names[dtype]


def resolve_precision(args: argparse.Namespace, config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the precision that file or flag ask for, and what this hardware has of it.

    Raises:
        UserError: if file and flag contradict each other.
    """
    device = process.pick_device()
    where = f"--deepspeed-config {args.deepspeed_config}"
    given = file_precision(config, where)
    wanted = given or args.precision or process.default_precision(device)
    if args.precision not in (None, wanted):
        raise UserError(
            f"--precision {args.precision}, but {where} enables {given}: drop the flag or that "
            "section of the file"
        )
    if wanted == "bf16" and not process.has_fast_bf16(device):
        return wanted, "fp16" if device.type == "cuda" else "fp32"
    return wanted, wanted


def check_experts(size: int, config: Mapping[str, Any], where: str) -> None:
    """Refuse a file that does not go with experts on different ranks.

    Args:
        size: of `--expert-parallel`.
        config: of the file.
        where: is it, for messages.

    Raises:
        UserError: naming what does.
    """
    if size == 1:
        return
    if zero_stage(config) == 3:
        raise UserError(
            f"--expert-parallel {size}: {where} has ZeRO stage 3, whose expert parallelism in "
            "DeepSpeed (AutoEP) replaces routers and experts by its own, with other parameter "
            "names and no auxiliary losses; take stage 2 (config/zero2.json), or train.py, which "
            "goes on with a run of this script and back"
        )
    zero = _section(config, "zero_optimization", where)
    for name in ("contiguous_gradients", "reduce_scatter"):
        if zero_stage(config) and zero.get(name) is False:
            raise UserError(f"--expert-parallel {size} needs {name}: remove false from {where}")


def engine_config(settings: TrainSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a file with what the flags own.

    Raises:
        UserError: if the file has another value for one of them, or --compile does not fit.
    """
    for key, name in OWNED_BY_FLAGS.items():
        value, ours = config.get(key, "auto"), getattr(settings, name)
        if value not in ("auto", ours):
            raise UserError(
                f"--deepspeed-config {settings.deepspeed_config} has {key} {value}, but "
                f"--{name.replace('_', '-')} is {ours}: remove it from the file"
            )
    stage = zero_stage(config)
    if stage == 3 and settings.compile:
        raise UserError("--compile does not work with ZeRO stage 3: drop it or take stage 2")
    cut = (settings.expert_parallel or 1) > 1
    complete = {
        **config,
        **{key: getattr(settings, name) for key, name in OWNED_BY_FLAGS.items()},
        # Always clipped, if only at infinity: the engine computes the norm, a curve, on the way.
        # With cut experts at stage 0 its norm is wrong: `WholeEngine` clips.
        "gradient_clipping": 0.0 if cut and not stage else settings.clip_grad or float("inf"),
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the CPU too
        "steps_per_print": None,  # never
        "torch_autocast": {
            "enabled": settings.precision != "fp32",
            "dtype": "float16" if settings.precision == "fp16" else "bfloat16",
            "lower_precision_safe_modules": HALF_MODULES if stage == 3 else [],
        },
    }
    for name in ("bf16", "fp16", "data_types"):  # of weights in half
        complete.pop(name, None)
    return complete
