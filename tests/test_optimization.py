"""How weights are moved: schedules against their formulas, and runs that go on bit for bit."""

import argparse
import math
from pathlib import Path

import pytest
from launch import TINY_RUN
from torch.testing import assert_close

from checkpoint.state import checkpoint_path, load_checkpoint
from common.errors import UserError
from train import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.loop import launch
from training.optimization import learning_rate
from training.settings import TrainSettings, check_flags


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, *flags])


def settings(*flags: str) -> TrainSettings:
    return prepare(parse(*flags), meta=True).settings


def train(results: Path, *flags: str) -> Path:
    launch(parse("--results-dir", str(results), *flags), DdpTrainer)
    return results / "run"


def assert_same_end(run: Path, expected: Path, step: int) -> None:
    """Compare all that a checkpoint holds but the flags, bit for bit."""
    ours, theirs = (load_checkpoint(checkpoint_path(folder, step)) for folder in (run, expected))
    for part in ("step", "model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)


# ------------------------------------------------------------------------------ schedules


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_the_smallest_rate_at_the_end() -> None:
    falling = settings(
        *("--lr", "0.5", "--min-lr", "0.1", "--lr-schedule", "cosine"),
        *("--warmup-steps", "4", "--max-steps", "12"),
    )
    assert falling.decay_steps == 8
    on_paper = [0.125, 0.25, 0.375, 0.5]
    on_paper += [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert [learning_rate(falling, step) for step in range(13)] == pytest.approx(on_paper)
    assert learning_rate(falling, 8) == pytest.approx(0.3)  # half way
    assert learning_rate(falling, 12) == learning_rate(falling, 50) == 0.1


def test_wsd_warms_up_stays_and_falls_in_a_line_over_the_last_fifth() -> None:
    flags = ("--lr", "0.5", "--lr-schedule", "wsd", "--warmup-steps", "2", "--max-steps", "20")
    falling = settings(*flags)
    assert falling.decay_steps == 4
    rates = [learning_rate(falling, step) for step in range(21)]
    assert rates == pytest.approx([0.25] + 16 * [0.5] + [0.375, 0.25, 0.125, 0.0])
    sooner = settings(*flags, "--decay-steps", "10", "--min-lr", "0.25")
    assert [learning_rate(sooner, step) for step in (9, 10, 15, 20)] == [0.5, 0.5, 0.375, 0.25]


def test_a_run_shorter_than_its_warm_up_still_falls_to_the_smallest_rate() -> None:
    for schedule in ("cosine", "wsd"):
        short = settings("--lr-schedule", schedule, "--warmup-steps", "100", "--max-steps", "3")
        rates = [learning_rate(short, step) for step in range(4)]
        assert 0 < rates[0] < short.lr / 50 and rates[3] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-lr", "1e-5"], "--min-lr 1e-05 means nothing with --lr-schedule constant"),
        (["--decay-steps", "9"], "--decay-steps 9 means nothing with --lr-schedule constant"),
        (["--lr-schedule", "wsd", "--min-lr", "1"], "--min-lr 1 is more than --lr 0.001"),
    ],
)
def test_flags_of_the_rate_that_mean_nothing_together_are_refused(
    flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_flags(parse(*flags))


# ------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("flags", [("--lr-schedule", "cosine"), ("--lr-schedule", "wsd")])
def test_a_run_cut_in_two_ends_as_one_in_one_bit_for_bit(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    flags = ("--max-steps", "6", "--ckpt-every", "3", *flags)
    whole = train(tmp_path / "whole", *flags)
    cut = train(tmp_path / "cut", *flags)
    checkpoint_path(cut, 6).unlink()
    train(tmp_path / "cut", *flags)
    assert_same_end(cut, whole, 6)


def test_going_on_to_another_end_says_that_the_rate_falls_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, "--max-steps", "2", "--lr-schedule", "cosine")
    assert "--decay-steps" not in caplog.text
    train(tmp_path, "--max-steps", "3", "--lr-schedule", "cosine")
    assert "--decay-steps was 2, is 3" in caplog.text
