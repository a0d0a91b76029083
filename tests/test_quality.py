"""Samples judged on the way: as on one rank, without a trace in training, the best one kept."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refusal, run_main, save_image_folder
from launch import TINY_RUN, Process, torchrun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

import evaluate
import sample
from checkpoint import run_folder
from checkpoint.state import checkpoint_path, load_checkpoint
from common.errors import FileError, UserError
from training import quality
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch

JUDGED = ("--max-steps", "4", "--ckpt-every", "4", "--eval-every", "2", "--eval-samples", "30")


@pytest.fixture(autouse=True)
def references(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep classifiers and statistics in a folder of the tests'."""
    folder = tmp_path_factory.getbasetemp() / "references"
    monkeypatch.setattr(quality, "REFERENCES", str(folder))
    return folder


def train(results: Path, *flags: str) -> Path:
    words = [*TINY_RUN, "--results-dir", str(results), *flags]
    launch(build_parser(None).parse_args(words), DdpTrainer)
    return results / "run"


def curves(run: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("eval/")]
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in tags}


def test_judged_samples_are_curves_and_leave_no_trace_in_training(tmp_path: Path) -> None:
    judged, plain = train(tmp_path / "a", *JUDGED), train(tmp_path / "b", *JUDGED[:4])
    found = curves(judged)
    assert {"eval/FD", "eval/precision", "eval/recall", "eval/read_right"} <= found.keys()
    assert all([step for step, _ in points] == [2, 4] for points in found.values())
    ours, theirs = (load_checkpoint(checkpoint_path(run, 4)) for run in (judged, plain))
    for part in ("model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_the_distance_is_that_of_evaluate(tmp_path: Path, references: Path) -> None:
    run = train(tmp_path, *JUDGED)
    flags = ("--num-samples", "30", "--cfg-scale", "1.5", "--dtype", "fp32", "--seed", "0")
    place = ("--cache", str(references), "--out", str(tmp_path / "out"))
    run_main(evaluate, "--ckpt", str(run), *flags, *place)
    values = json.loads((tmp_path / "out" / "metrics.json").read_text())["values"]["seed 0"]
    last = {name: points[-1][1] for name, points in curves(run).items()}
    assert last["eval/FD"] == pytest.approx(values["FD (classifier features)"], rel=1e-4)
    assert last["eval/read_right"] == pytest.approx(values["read as the class asked for"])


def test_the_best_checkpoint_is_kept_and_drawn_from_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distances = iter([5.0, 3.0, 4.0, 6.0])
    measured = {"FD": 0.0}

    def measure(*_: Any) -> dict[str, float]:
        return measured | {"FD": next(distances)}

    monkeypatch.setattr(quality.Quality, "measure", measure)
    flags = ("--ckpt-every", "3", "--keep-last", "1", "--eval-every", "1", "--keep-best")
    run = train(tmp_path, *flags, "--max-steps", "3")
    train(tmp_path, *flags, "--max-steps", "4")  # knows what was best
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["0000002.pt", "0000004.pt", "best.pt", "latest"]
    best = run / "checkpoints" / "best.pt"
    assert best.resolve().name == "0000002.pt"
    assert run_folder.list_checkpoints(run)[0].name == "0000004.pt"
    found = run_folder.read_best(run)
    assert found is not None and (found["step"], found["distance"]) == (2, 3.0)
    out = tmp_path / "best.png"
    run_main(sample, "--ckpt", str(best), "--out", str(out), "--num-sampling-steps", "1")
    assert out.exists()


def test_two_ranks_judge_as_one_does(tmp_path: Path) -> None:
    images = save_image_folder(tmp_path / "images", 3, 6, lambda *_: (8, 8))
    data = ("--data-path", str(images), "--vae-path", "none", "--image-size", "8")
    pytest.importorskip("timm")
    weights = save_test_network(tmp_path / "network.pt")
    start = train(tmp_path / "start", *data, "--max-steps", "4")
    flags = [*data, "--init-from", str(start), "--lr", "1e-12", "--max-steps", "1"]
    flags += ["--eval-every", "1", "--eval-samples", "150", "--eval-features", weights]
    one = curves(train(tmp_path / "one", *flags))
    command = torchrun("train.py", *TINY_RUN, *flags, "--results-dir", str(tmp_path / "two"))
    Process(command, tmp_path / "two.log").wait()
    two = curves(tmp_path / "two" / "run")
    assert one.keys() == two.keys() and "eval/FD" in one
    for name, points in one.items():
        assert [v for _, v in points] == pytest.approx(
            [v for _, v in two[name]], rel=1e-3, abs=1e-3
        )


def save_test_network(path: Path) -> str:
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", pretrained=False).state_dict(), path)
    return f"timm:test_resnet:{path}"


def test_keep_best_without_a_measure_is_refused() -> None:
    line = refusal("train.py", *TINY_RUN, "--keep-best")
    assert "--keep-best: give --eval-every STEPS" in line


def test_what_judging_lacks_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--inception-weights: .*no such file"):
        train(
            tmp_path, *JUDGED, "--eval-features", "inception", "--inception-weights", "/no/file.pth"
        )
    assert not (tmp_path / "run").exists()


def test_a_damaged_note_of_the_best_is_said_at_the_start_not_at_the_first_measure(
    tmp_path: Path,
) -> None:
    run = train(tmp_path, *JUDGED, "--keep-best")
    (run / "best.json").write_text('{"step": "2"}')
    before = (run / "checkpoints/latest").read_text()
    with pytest.raises(FileError, match=r"best\.json does not say which checkpoint is the best"):
        train(tmp_path, *JUDGED, "--keep-best", "--max-steps", "9")
    assert (run / "checkpoints/latest").read_text() == before
