"""ZeRO with experts on several ranks trains as one process: the real engine on gloo ranks."""

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_worker import engine_file
from expert_parallel_worker import CASES, NUM_UPDATES, make_updates
from launch import REPO, TINY_RUN, Process, torchrun
from test_expert_parallel import kill_a_rank
from torch.testing import assert_close
from train_worker import State
from zero_experts_worker import RUNS

import convert
from checkpoint.weights import load_model
from common.errors import UserError
from train_deepspeed import build_deepspeed_parser
from training.job import prepare
from training.zero_trainer import plan_stages

STAGES = ("stage 0", "stage 1", "stage 2")


def launch_worker(folder: Path, nproc: int) -> dict[Any, Any]:
    worker = [str(REPO / "tests/zero_experts_worker.py"), str(folder / "out.pt"), str(folder)]
    Process(torchrun(*worker, nproc=nproc), folder / "log.txt").wait(seconds=900)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("four"), 4)


@functools.cache
def on_one_process(*flags: str) -> list[State]:
    return make_updates(*flags)


def check_updates(found: list[Any], case: str, further: tuple[str, ...]) -> None:
    """Compare with one process that has the whole batch at once."""
    flags = CASES[case] if case != "accumulated" else ("--balance", "none")  # 1x4 for 2x2
    expected = on_one_process(*flags, *further)
    assert len(found) == len(expected) == NUM_UPDATES
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("stage", "case", "further"), RUNS)
def test_two_ranks_with_half_of_the_experts_make_the_updates_of_one_process_at_every_stage(
    stage: str, case: str, further: tuple[str, ...], on_two_ranks: dict[Any, Any]
) -> None:
    check_updates(on_two_ranks[stage, case, further], case, further)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "case", "further"), RUNS)
def test_four_ranks_as_two_replicas_make_the_updates_of_one_process_at_every_stage(
    stage: str, case: str, further: tuple[str, ...], on_four_ranks: dict[Any, Any]
) -> None:
    check_updates(on_four_ranks[stage, case, further], case, further)


def check_resumed(results: dict[Any, Any], source: str) -> None:
    """Compare trainers that went on from one checkpoint with the one that wrote it."""
    first, *others = results["resumed", source]
    for other in others:
        for name, value in first.items():
            if name.startswith("saved/"):
                assert torch.equal(other[name], value), name
            else:
                assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    if source in STAGES:  # the first of the others is the same trainer
        assert_close(others[0], first, rtol=0, atol=0)


@pytest.mark.parametrize("source", [*STAGES, "train.py", "without"])
def test_another_stage_trainer_and_number_of_experts_a_rank_go_on_from_a_checkpoint(
    source: str, on_two_ranks: dict[Any, Any]
) -> None:
    check_resumed(on_two_ranks, source)


@pytest.mark.slow
@pytest.mark.parametrize("source", [*STAGES, "train.py", "without"])
def test_four_ranks_go_on_from_a_checkpoint_of_another_stage_and_trainer(
    source: str, on_four_ranks: dict[Any, Any]
) -> None:
    check_resumed(on_four_ranks, source)


@pytest.mark.parametrize("stage", STAGES)
def test_an_expert_that_overflows_on_one_rank_makes_all_ranks_skip_the_step_at_every_stage(
    stage: str, on_two_ranks: dict[Any, Any]
) -> None:
    assert on_two_ranks["overflow", stage] == [(0, 1, 0.0)] * 2


@pytest.mark.parametrize("stage", ["stage 0", "stage 2"])
def test_the_memory_plan_of_zero_with_cut_experts_is_what_each_rank_holds(
    stage: str, on_two_ranks: dict[Any, Any]
) -> None:
    for rank in on_two_ranks["memory", stage]:
        for name, expected in rank["expected"].items():
            assert rank["found"][name] == pytest.approx(expected, rel=1e-3), name


def test_deepspeed_still_has_every_private_name_of_its_experts(
    on_two_ranks: dict[Any, Any],
) -> None:
    assert on_two_ranks["missing names"] == []


# ------------------------------------------------------------------------------ commands


def command(folder: Path, stage: str, *flags: str) -> list[str]:
    """Return torchrun's command of a run in `folder` of two ranks with half of the experts."""
    engine = ("--deepspeed-config", engine_file(stage, folder), "--results-dir", str(folder))
    run = (*TINY_RUN, "--ckpt-every", "3", "--log-every", "1", "--max-steps", "9")
    return torchrun("train_deepspeed.py", *run, *engine, "--expert-parallel", "2", *flags)


@pytest.mark.slow
def test_a_killed_run_reaches_the_same_bits_and_every_script_reads_its_shares(
    tmp_path: Path,
) -> None:
    ends = []
    for name in ("undisturbed", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        launched = Process(command(folder, "stage 2", "--sample-every", "9"), folder / "log.txt")
        if name == "killed":
            kill_a_rank(launched, folder / "run", "random")
            assert launched.popen.wait(60) != 0
            launched = Process(command(folder, "stage 2", "--sample-every", "9"), folder / "2.txt")
            assert "resumed" in launched.wait()
        launched.wait()
        shares = sorted((folder / "run/checkpoints/0000009").glob("*.safetensors"))
        ends.append([share.read_bytes() for share in shares])
    assert len(ends[0]) == 2 and ends[0] == ends[1]
    run, out = tmp_path / "killed/run", tmp_path / "ema.safetensors"
    convert.main(convert.build_parser().parse_args([str(run), str(out)]))
    expected = load_model(out).state_dict()
    for name, value in load_model(run).state_dict().items():
        assert torch.equal(value, expected[name])
    drawn = ("sample.py", "--ckpt", str(run), "--num-sampling-steps", "2", "--out")
    Process([sys.executable, *drawn, str(tmp_path / "1.png")], tmp_path / "1.txt").wait()
    assert (tmp_path / "1.png").is_file() and (run / "samples/0000009.png").is_file()


def test_dry_run_plans_cut_experts_and_refuses_ranks_that_do_not_fit(
    tmp_path: Path,
) -> None:
    flags = [*TINY_RUN, "--expert-parallel", "4", "--dry-run", "--results-dir", str(tmp_path)]
    args = build_deepspeed_parser().parse_args(flags)
    job = prepare(args, meta=True)
    rows = plan_stages(job, [8]).partition("with --expert-parallel 4:\n")[2].splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["8", "0"], ["8", "2"]]
    with pytest.raises(UserError, match="--plan-ranks 6: --expert-parallel 4 must divide it"):
        plan_stages(job, [8, 6])
