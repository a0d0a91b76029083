"""What a run leaves beside its checkpoints: log, curves and grids, on full disks too."""

import errno
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import spoil_gradients
from launch import TINY_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from checkpoint.state import checkpoint_path, load_checkpoint
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch


def train(results: Path, *flags: str) -> Path:
    """Train in this process; returns the run folder."""
    arguments = [*TINY_RUN, "--results-dir", str(results), *flags]
    launch(build_parser(None).parse_args(arguments), DdpTrainer)
    return results / "run"


def test_the_log_has_dates_attempts_and_what_resuming_said(tmp_path: Path) -> None:
    run = train(tmp_path, "--max-steps", "1")
    train(tmp_path, "--max-steps", "2", "--lr", "0.5")
    lines = (run / "log.txt").read_text().splitlines()
    attempts = [line for line in lines if re.match(r"\[\d{4}-\d\d-\d\d [\d:]{8}\] attempt", line)]
    assert [line.split()[3] for line in attempts] == ["1:", "2:"]
    later = lines[lines.index(attempts[1]) :]
    assert any("resumed" in line and "at step 1" in line for line in later)
    assert any("--lr was 0.001, is 0.5" in line for line in later)


GRID_RUN = ("--model", "DiT-Ti/8", "--sample-every", "2", "--max-steps", "2")


def test_a_grid_that_a_kill_prevented_is_drawn_by_the_next_attempt(tmp_path: Path) -> None:
    run = train(tmp_path, *GRID_RUN)
    grid = run / "samples" / "0000002.png"
    drawn = grid.read_bytes()
    grid.unlink()
    train(tmp_path, *GRID_RUN)
    assert grid.read_bytes() == drawn
    events = EventAccumulator(str(run)).Reload()
    assert [image.step for image in events.Images("samples")] == [2, 2]


def test_a_full_disk_at_a_grid_or_a_curve_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.reporter.save_grid", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    run = train(tmp_path, *GRID_RUN, "--log-every", "1")
    assert "no grid of step 2: [Errno 28] No space left" in caplog.text
    assert caplog.text.count("no curves from here on") == 1
    assert load_checkpoint(checkpoint_path(run, 2))["step"] == 2


def test_a_run_ended_by_nan_has_its_curves_until_then_and_no_hooks_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr("training.ddp.clip_grad_norm_", spoil_gradients)
    arguments = [*TINY_RUN, "--results-dir", str(tmp_path), "--max-steps", "9", "--log-every", "9"]

    def make(job: Any) -> DdpTrainer:
        made.append(DdpTrainer(job))
        return made[0]

    with pytest.raises(FloatingPointError):
        launch(build_parser(None).parse_args(arguments), make)
    assert not any(module._forward_hooks for module in made[0].model.modules())
    assert not any("log.txt" in str(handler) for handler in logging.getLogger().handlers)
    assert len(EventAccumulator(str(tmp_path / "run")).Reload().Tags()["scalars"]) == 0
