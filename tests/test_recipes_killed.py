"""Each recipe trains, is killed, goes on bit for bit, and draws."""

import sys
from pathlib import Path

import pytest
from launch import REPO, Process
from test_kills import contents, same

from checkpoint.state import checkpoint_path

RECIPES = sorted((REPO / "config/recipes").glob("*.yaml"))
MAX_STEPS = 6
FLAGS = (
    *("--data-path", "digits", "--model", "DiT-Ti/2", "--global-batch-size", "8"),
    *("--precision", "fp32", "--max-steps", str(MAX_STEPS), "--ckpt-every", "3"),
    *("--log-every", "1", "--sample-every", "0"),
)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_killed_run_of_a_recipe_ends_with_the_bits_of_an_undisturbed_one_and_draws(
    recipe: Path, tmp_path: Path
) -> None:
    train = [sys.executable, "train.py", "--config", str(recipe), *FLAGS]
    train += ["--results-dir", str(tmp_path), "--run-name"]
    Process([*train, "whole"], tmp_path / "whole.txt").wait()
    process = Process([*train, "killed"], tmp_path / "killed.txt")
    process.kill_at_step(tmp_path / "killed" / "log.txt", 4, 0)
    assert "resumed" in Process([*train, "killed"], tmp_path / "resumed.txt").wait()
    last = [contents(checkpoint_path(tmp_path / run, MAX_STEPS)) for run in ("whole", "killed")]
    assert same(*last)
    out = tmp_path / "grid.png"
    draw = [sys.executable, "sample.py", "--ckpt", str(tmp_path / "killed"), "--out", str(out)]
    few = ("--labels", "0", "1", "--num-sampling-steps", "3")
    Process([*draw, *few], tmp_path / "draw.txt").wait()
    assert out.stat().st_size > 0
