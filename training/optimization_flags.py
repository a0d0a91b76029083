"""Flags of the optimizer, its schedule, the objective beyond the paper's recipe, and tracking."""

from common.flags import FlagGroup, dtype_flag, flag, number
from training.tuning_flags import add_rate_flags

ALMOST_ONE = 1 - 1e-9  # a moment that forgets nothing is none


def add_objective_flags(train: FlagGroup) -> None:
    """Add what the objectives can do otherwise than as published."""
    train.add(
        "--time-sampling",
        nargs="+",
        metavar=("LAW", "NUMBER"),
        help="Law of rectified flow's training times: lognormal MEAN DEVIATION, of their logit, "
        "uniform, or mode SCALE. Default: lognormal 0 1.",
    )
    train.add(
        "--time-shift",
        type=number(float, 0.01, 100),
        metavar="SHIFT",
        help="Shift of rectified flow's times towards noise, in training and sampling: the root of "
        "how many times more values an image has. Default: that of --init-from, else 1, none.",
    )
    train.add(
        "--prediction",
        choices=("epsilon", "v"),
        help="What the model predicts for DDPM: the noise, or v. Default: that of --init-from, "
        "else epsilon.",
    )
    train.add(
        "--zero-terminal-snr",
        **flag,
        help="End DDPM's chain in noise alone; needs --prediction v. Default: as --init-from, else "
        "off.",
    )
    train.add(
        "--min-snr-gamma",
        type=number(float, 1e-3, 1e6),
        metavar="GAMMA",
        help="Weigh DDPM's squared error by the ratio of signal to noise, at most this; 5 is "
        "usual. Default: every step counts the same.",
    )
    train.add(
        "--repa",
        metavar="ENCODER",
        help="Align a block's tokens with what an encoder sees in the images: timm:NAME, such as "
        "timm:vit_base_patch14_dinov2.lvd142m, or timm:NAME:FILE of its weights. Default: none.",
    )
    train.add(
        "--repa-block",
        type=number(int, 1, 10_000),
        metavar="N",
        help="Number of the block, from 1, whose tokens are aligned. Default: 8, or half of fewer "
        "than 16.",
    )
    train.add(
        "--repa-loss-weight",
        type=number(float, 0),
        default=0.5,
        metavar="WEIGHT",
        help="Weight of the alignment beside the objective's loss.",
    )


def add_optimizer_flags(train: FlagGroup) -> None:
    """Add how the weights are moved."""
    train.add(
        "--lr",
        type=number(float, 0, 1000),
        default=1e-4,
        metavar="RATE",
        help="Learning rate of AdamW after the warm-up.",
    )
    add_rate_flags(train)
    train.add(
        "--warmup-steps",
        type=number(int, 0),
        default=0,
        metavar="STEPS",
        help="Optimizer steps over which the learning rate rises linearly from 0.",
    )
    train.add(
        "--weight-decay",
        type=number(float, 0, 1000),
        default=0.0,
        metavar="DECAY",
        help="Decoupled weight decay of matrices; biases, norms, routers and tables have none.",
    )
    train.add(
        "--clip-grad",
        type=number(float, 0),
        default=1.0,
        metavar="NORM",
        help="Largest norm of a step's gradient, which is scaled down to it; 0 turns it off.",
    )
    train.add(
        "--ema-decay",
        type=number(float, 0, 1),
        nargs="+",
        default=[0.9999],
        metavar="DECAY",
        help="Share of the averaged weights that a step keeps. Several make as many averages; "
        "the first is drawn in grids and by default, --ema chooses when sampling.",
    )
    train.add(
        "--precision",
        **dtype_flag,
        help="Format of matrix products; master weights stay in fp32. Default: bf16 where the "
        "hardware has it, else fp32.",
    )
    train.add(
        "--grad-checkpointing",
        default=False,
        **flag,
        help="Compute every block again in the backward pass, which saves memory and costs time.",
    )
    train.add("--compile", default=False, **flag, help="Compile every block with torch.compile.")


def add_schedule_flags(train: FlagGroup) -> None:
    """Add how the learning rate falls, the optimizer and its numbers."""
    train.add(
        "--optimizer",
        choices=("adamw", "muon"),
        default="adamw",
        help="What moves the weights; muon has the matrices of attention, MLPs and experts, each "
        "expert's own, and AdamW the rest; train.py only.",
    )
    train.add(
        "--lr-schedule",
        choices=("constant", "cosine", "wsd"),
        default="constant",
        help="How the rate goes on after the warm-up: as it is, down half a cosine, or as it is "
        "and then down a line (warm-up, stable, decay); both end at --max-steps.",
    )
    train.add(
        "--min-lr",
        type=number(float, 0, 1000),
        default=0.0,
        metavar="RATE",
        help="Learning rate that a falling schedule ends at.",
    )
    train.add(
        "--decay-steps",
        type=number(int, 1),
        metavar="STEPS",
        help="Last optimizer steps of the run, over which the rate falls. Default: all after the "
        "warm-up for cosine, a fifth of the run for wsd.",
    )
    train.add(
        "--adam-betas",
        type=number(float, 0, ALMOST_ONE),
        nargs=2,
        default=[0.9, 0.999],
        metavar=("BETA1", "BETA2"),
        help="Shares of Adam's two moments, of the gradient and of its square, that a step keeps.",
    )
    train.add(
        "--adam-eps",
        type=number(float, 0, 1),
        default=1e-8,
        metavar="EPS",
        help="What Adam adds to the root of the second moment.",
    )


def add_tracker_flags(run: FlagGroup) -> None:
    """Add where curves and pictures go."""
    run.add(
        "--tracker",
        nargs="+",
        choices=("tensorboard", "wandb"),
        default=["tensorboard"],
        help="What keeps curves, grids and settings, one or both; wandb needs its package, and "
        "WANDB_MODE=offline keeps its files in the run's folder.",
    )


def add_stop_flags(run: FlagGroup) -> None:
    """Add when a run ends before its last step."""
    run.add(
        "--stop-after",
        type=number(float, 0),
        metavar="HOURS",
        help="Time after which the run saves its step and ends with code 0, as by SIGUSR1; the "
        "same command goes on. Default: no limit.",
    )
