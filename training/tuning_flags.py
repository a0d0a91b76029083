"""Flags of both trainers: what a run starts from and changes, how it is judged on its way."""

import argparse

from common.flags import FlagGroup, flag, number
from evaluation.flags import features_flag


def add_latent_flags(data: FlagGroup) -> None:
    """Add how latents are scaled."""
    data.add(
        "--latent-norm",
        choices=("none", "channel"),
        help="Bring each channel of the latents to mean 0 and deviation 1, as encode_latents.py "
        "measured them, or leave the autoencoder's own scale. Default: as --init-from, else none.",
    )


def add_start_flags(model: FlagGroup) -> None:
    """Add what a run starts from, and what stays as it was."""
    model.add(
        "--init-from",
        metavar="CKPT",
        help="Checkpoint of any accepted layout whose averaged weights a fresh run starts from. "
        "What does not fit the data is drawn anew, and listed: label rows by class name, the "
        "table of positions, patch and output layers by channels.",
    )
    model.add(
        "--init-strict",
        default=False,
        **flag,
        help="Refuse an --init-from of which something would be drawn anew.",
    )
    model.add(
        "--freeze",
        nargs="+",
        metavar="PATTERN",
        help="Parts of names of parameters that are not trained; * is any text: attn, "
        "'blocks.0.*.weight'.",
    )


def lr_scale(text: str) -> str:
    """Check a value of `--lr-scale`, PATTERN=FACTOR; returned as it is."""
    pattern, equals, factor = text.rpartition("=")
    if not (pattern and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FACTOR, such as router=0.1")
    number(float, 0, 1000)(factor)
    return text


def add_rate_flags(train: FlagGroup) -> None:
    """Add the rates of groups of parameters."""
    train.add(
        "--lr-scale",
        type=lr_scale,
        nargs="+",
        metavar="PATTERN=FACTOR",
        help="Factors of --lr for parameters by a part of their names, such as router=0.1; * is "
        "any text, and the last that fits counts.",
    )


def add_validation_flags(data: FlagGroup) -> None:
    """Add the images that are not learnt from."""
    data.add(
        "--val-path",
        metavar="DATA",
        help="Other images of the same classes, or a cache of them, whose loss becomes a curve; "
        "test is the test split of digits and fashion-mnist.",
    )
    data.add(
        "--val-fraction",
        type=number(float, 0, 0.9),
        default=0.0,
        metavar="SHARE",
        help="Share of --data-path to hold out for that instead, chosen by the files' names.",
    )
    data.add(
        "--val-every",
        type=number(int, 1),
        default=1000,
        metavar="STEPS",
        help="Optimizer steps between two points of the curve val/loss, of the averaged weights.",
    )


def add_evaluation_flags(run: FlagGroup) -> None:
    """Add how samples are judged on the way."""
    run.add(
        "--eval-every",
        type=number(int, 0),
        default=0,
        metavar="STEPS",
        help="Optimizer steps between two points of the curves eval/..., for which samples of the "
        "averaged weights are compared with the images of --data-path; 0 judges none.",
    )
    run.add(
        "--eval-samples",
        type=number(int, 2, 10**6),
        default=1000,
        metavar="N",
        help="Number of samples to judge by --eval-every.",
    )
    run.add(
        "--eval-features",
        type=features_flag,
        metavar="NETWORK",
        help="Network whose features are compared then, as evaluate.py --features.",
    )
    run.add(
        "--inception-weights",
        metavar="FILE",
        help="File of torch-fidelity for that. Default: it is downloaded.",
    )
    run.add(
        "--keep-best",
        default=False,
        **flag,
        help="Keep the checkpoint whose samples were nearest, whatever --keep-last; best.pt, or "
        "best of sharded ones, in RUN/checkpoints points to it.",
    )
