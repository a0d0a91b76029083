"""Each recipe trains, is killed, goes on bit for bit, and is drawn, judged, analysed and converted.

    STEPS=300 python -m pytest -m slow -s tests/test_recipes_killed.py --basetemp=FOLDER

STEPS is the length of a run of 8 images a step, 6 without it; FOLDER keeps runs and pictures.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from helpers import run_main
from launch import REPO, Process
from test_kills import contents, same
from torch import Tensor
from torch.testing import assert_close

import convert
import evaluate
import expert_data
import expert_report
import heatmap_class
import heatmap_layer
import sample
from checkpoint.state import checkpoint_path
from checkpoint.weights import load_model
from common.errors import UserError
from routing.tables import RoutingData

RECIPES = sorted((REPO / "config/recipes").glob("*.yaml"))
STEPS = int(os.environ.get("STEPS", 6))
LONG = 3600  # seconds
FLAGS = (
    *("--data-path", "digits", "--model", "DiT-Ti/2", "--global-batch-size", "8"),
    *("--precision", "fp32", "--max-steps", str(STEPS), "--ckpt-every", str(STEPS // 3)),
    *("--log-every", "1", "--sample-every", "0"),
)
FEW_STEPS = ("--num-sampling-steps", "4")
UNPUBLISHED = ("dsmoe",)  # no code of theirs has released weights


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_killed_run_of_a_recipe_ends_with_the_bits_of_an_undisturbed_one_and_is_analysed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    train = [sys.executable, "train.py", "--config", str(recipe), *FLAGS]
    train += ["--results-dir", str(tmp_path), "--run-name"]
    Process([*train, "whole"], tmp_path / "whole.txt").wait(LONG)
    process = Process([*train, "killed"], tmp_path / "killed.txt")
    process.kill_at_step(tmp_path / "killed" / "log.txt", STEPS // 2 + 1, 0, LONG)
    assert "resumed" in Process([*train, "killed"], tmp_path / "resumed.txt").wait(LONG)
    last = [contents(checkpoint_path(tmp_path / run, STEPS)) for run in ("whole", "killed")]
    assert same(*last)
    draw_and_analyse(tmp_path / "killed", tmp_path)
    convert_there_and_back(tmp_path / "killed", tmp_path, recipe.stem not in UNPUBLISHED)


def draw_and_analyse(run: Path, out: Path) -> None:
    """Let every script that reads a checkpoint read this one; the averages have barely moved."""
    ckpt = ("--ckpt", run, "--ema", "False", *FEW_STEPS)
    run_main(sample, *ckpt, "--out", out / "grid.png", "--num-per-class", 2)
    cache = ("--cache", out.parent / "references", "--out", out / "judged")
    run_main(evaluate, *ckpt, "--num-samples", 20, "--batch-size", 20, *cache)
    run_main(expert_data, *ckpt, "--num-per-class", 4, "--out", out / "routing.npz")
    data = ("--data", out / "routing.npz", "--out")
    run_main(heatmap_class, *data, out / "class.png", "--order", "similarity")
    for kind in heatmap_layer.FIGURES:
        if kind != "pair" or RoutingData.load(out / "routing.npz").has_pairs:
            run_main(heatmap_layer, *data, out / f"{kind}.png", "--by", kind)
    run_main(expert_report, *data, out / "report.html")
    assert all(path.stat().st_size > 0 for path in (out / "grid.png", out / "report.html"))


def convert_there_and_back(run: Path, out: Path, is_published: bool) -> None:
    """Check that written layout -> ours -> written layout is the identity, tensor by tensor."""
    first, ours, second = (out / name for name in ("a.pt", "ours.safetensors", "b.pt"))
    if not is_published:
        with pytest.raises(UserError, match=r"write a \.safetensors or a folder"):
            run_main(convert, run, first)
        first, second = (path.with_suffix(".safetensors") for path in (first, second))
    run_main(convert, run, first)
    run_main(convert, first, ours)
    run_main(convert, ours, second)
    assert_close(tensors_of(second), tensors_of(first), rtol=0, atol=0)
    expected = load_model(run).state_dict()
    assert_close(load_model(ours).state_dict(), expected, rtol=0, atol=0)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Read a file's tensors by the names it gives them."""
    if path.suffix == ".safetensors":
        return load_model(path).state_dict()
    content = torch.load(path, weights_only=True)
    found = {name: part for name, part in content.items() if isinstance(part, dict)}
    return {f"{part}/{n}": t for part, state in found.items() for n, t in state.items()} or content
