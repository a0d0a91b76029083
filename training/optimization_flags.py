"""The flags of schedule and optimizer that came after the recipe of the paper; off by default."""

from common.flags import FlagGroup, number


def add_schedule_flags(train: FlagGroup) -> None:
    """Add the flags of how the learning rate falls."""
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
