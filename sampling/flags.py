"""The flags of every script that opens a checkpoint for drawing, and what they say."""

import argparse
from typing import Any

from common.flags import (
    FlagGroup,
    FlagParser,
    average_flag,
    dtype_flag,
    flag,
    model_size,
    number,
)
from common.names import MODELS

TOLD = ("model", "num_classes", "num_experts", "num_experts_per_tok", "image_size")


def drawing_flags(
    parser: FlagParser,
    *,
    quantize: bool = True,
    offload: bool = True,
    guide: bool = True,
    ranks: bool = False,
) -> FlagGroup:
    """Add the group of flags that `drawing_options` reads.

    Args:
        parser: of the script.
        quantize: whether it has `--quantize`.
        offload: whether it has `--offload`.
        guide: whether it has `--guide-ckpt`.
        ranks: whether it has `--expert-parallel` and `--compile`, which is for many images.
    """
    group = parser.group("Model")
    group.add(
        "--model",
        **model_size(MODELS),
        help="Size of a published file, which does not tell all of it; of ours it is checked.",
    )
    group.add(
        "--num-experts-per-tok",
        type=number(int, 1),
        metavar="K",
        help="Likewise: experts per token. Default for a published file: 2.",
    )
    group.add("--num-experts", type=number(int, 0), metavar="E", help="Experts; checked.")
    group.add("--num-classes", type=number(int, 1), metavar="N", help="Classes; checked.")
    group.add("--rf", default=None, **flag, help="Objective of a published file; ours tell.")
    group.add(
        "--ema",
        **average_flag,
        help="Take the averaged weights, or those of this decay where a run has several averages.",
    )
    group.add(
        "--dtype",
        **dtype_flag,
        help="Type of the weights and of the arithmetic. Default: bf16 where it is fast.",
    )
    group.add(
        "--time-shift",
        type=number(float, 0.01, 100),
        metavar="SHIFT",
        help="Shift of rectified flow's times towards noise; 1: none. Default: as in training.",
    )
    if guide:
        group.add(
            "--guide-ckpt",
            metavar="CKPT",
            help="Worse model, smaller or trained less, whose predictions guidance moves away from "
            "instead of those without a class.",
        )
    _add_memory_flags(group, quantize=quantize, offload=offload, ranks=ranks)
    return group


def _add_memory_flags(group: FlagGroup, *, quantize: bool, offload: bool, ranks: bool) -> None:
    """Add the ways to draw with a model that is larger than the memory."""
    if quantize:
        group.add(
            "--quantize",
            choices=["int8"],
            help="Keep the experts' weights in a quarter of the memory; needs torchao.",
        )
    if ranks:
        group.add(
            "--expert-parallel",
            type=number(int, 1, 4096),
            metavar="N",
            help="Number of neighbouring ranks, under torchrun, that hold the experts together.",
        )
        group.add(
            "--compile",
            default=False,
            **flag,
            help="Compile every block, once for each shape of a batch: minutes, for many steps.",
        )
    if offload:
        group.add(
            "--offload",
            choices=["cpu", "disk"],
            help="Where the blocks of a model that fits no GPU wait for their turn.",
        )


def drawing_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `open_run` that flags say."""
    names = (
        "expert_parallel",
        "ema",
        "rf",
        "dtype",
        "quantize",
        "offload",
        "compile",
        "vae_path",
        "time_shift",
        "guide_ckpt",
    )
    told = {name: getattr(args, name, None) for name in TOLD}
    return {name: getattr(args, name) for name in names if hasattr(args, name)} | {"told": told}
