"""Experts on several ranks train as on one: gloo ranks against DDP and against one process."""

import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed_worker import engine_file
from expert_parallel_worker import CASES, NUM_UPDATES, make_updates
from launch import REPO, TINY_RUN, Process, descendants, torchrun
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import convert
import train_deepspeed
from checkpoint.sharded import ShardedCheckpoint
from checkpoint.state import latest_checkpoint
from checkpoint.weights import load_model
from common import process
from common.errors import UserError
from moe_ops import ExpertGroup, check_expert_parallel
from train_deepspeed import build_deepspeed_parser
from training.expert_parallel import IGNORE_BY_DDP
from training.flags import build_parser
from training.job import prepare
from training.reporter import draw_grid

NUM_BLOCKS, HIDDEN, NUM_EXPERTS = 4, 96, 4  # of DiT-Ti


def launch_worker(folder: Path, nproc: int, *sizes: str) -> dict[Any, Any]:
    worker = [str(REPO / "tests/expert_parallel_worker.py"), str(folder / "out.pt"), str(folder)]
    Process(torchrun(*worker, *sizes, nproc=nproc), folder / "log.txt").wait(seconds=900)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("two"), 2, "2")


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("four"), 4, "2", "4")


def assert_same_updates(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) == NUM_UPDATES
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ equal to DDP


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_experts_train_as_ddp_and_as_one_process(
    case: str, on_two_ranks: dict[Any, Any]
) -> None:
    flags = CASES[case] if case != "accumulated" else ("--balance", "none")  # 1x4 for 2x2
    assert_same_updates(on_two_ranks[case, "2"], on_two_ranks[case, ""])
    assert_same_updates(on_two_ranks[case, "2"], make_updates(*flags))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), itertools.product(("2", "4"), CASES))
def test_four_ranks_as_one_group_and_as_two_replicas_train_as_ddp_and_as_one_process(
    size: str, case: str, on_four_ranks: dict[Any, Any]
) -> None:
    flags = CASES[case] if case != "accumulated" else ("--balance", "none")
    assert_same_updates(on_four_ranks[case, size], on_four_ranks[case, ""])
    assert_same_updates(on_four_ranks[case, size], make_updates(*flags))


def check_few_experts(results: dict[Any, Any], size: str, case: str) -> None:
    """Compare runs that use two experts, or on each rank two that are another rank's."""
    found, expected = results[case, size], results[case, ""]
    used = torch.stack(found["counts"]).sum(dim=1) > 0  # (ranks, E)
    experts = [[0, 1]] * len(used) if case == "one" else [[2, 3], [0, 1]] * (len(used) // 2)
    assert [row.nonzero().flatten().tolist() for row in used] == experts
    found, expected = ({n: v for n, v in r.items() if n != "counts"} for r in (found, expected))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["one", "others"])
def test_ranks_that_receive_nothing_and_experts_without_tokens_make_20_steps_of_ddp(
    case: str, on_two_ranks: dict[Any, Any]
) -> None:
    check_few_experts(on_two_ranks, "2", case)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), itertools.product(("2", "4"), ("one", "others")))
def test_four_ranks_of_which_some_receive_nothing_make_20_steps_of_ddp(
    size: str, case: str, on_four_ranks: dict[Any, Any]
) -> None:
    check_few_experts(on_four_ranks, size, case)


def test_a_run_starts_from_the_weights_of_one_process(on_two_ranks: dict[Any, Any]) -> None:
    assert on_two_ranks["initial", "2"] == 0.0


def test_another_trainer_goes_on_from_the_shares_bit_for_bit(on_two_ranks: dict[Any, Any]) -> None:
    ours, again = on_two_ranks["resumed", "2"]
    assert_close(again, ours, rtol=0, atol=0)


def test_an_expert_that_overflows_on_one_rank_makes_all_ranks_skip_the_step(
    on_two_ranks: dict[Any, Any],
) -> None:
    assert on_two_ranks["overflow", "2"] == [(0, 1, 0.0)] * 2


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_on_the_wire_are_those_of_the_formula(
    precision: str, on_two_ranks: dict[Any, Any]
) -> None:
    ranks = on_two_ranks["bytes", "2", precision]
    choices = torch.stack(ranks[0]["counts of choices"])  # (ranks, L, E)
    elsewhere = choices[0, :, 2:].sum() + choices[1, :, :2].sum()  # rows
    width = 4 if precision == "fp32" else 2
    assert sum(r["rows"] for r in ranks) == 4 * elsewhere * HIDDEN * width
    assert all(r["counts"] == NUM_BLOCKS * 2 * 4 for r in ranks)  # of two experts, int32


def test_the_memory_plan_is_what_each_rank_holds(on_two_ranks: dict[Any, Any]) -> None:
    for rank in on_two_ranks["memory", "2"]:
        assert rank["found"] == rank["expected"]


# ------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize(("size", "fitting"), [(3, "1 or 2 or 4"), (8, "1 or 2 or 4")])
def test_a_number_that_does_not_divide_experts_and_ranks_is_refused_with_those_that_do(
    size: int, fitting: str
) -> None:
    with pytest.raises(ValueError, match=rf"8 experts and 4 ranks: {fitting} would do"):
        check_expert_parallel(size, 8, 4)
    with pytest.raises(ValueError, match="has no experts"):
        check_expert_parallel(1, 0, 4)


def test_every_expert_is_held_once_and_the_unconditional_one_by_the_last_rank() -> None:
    group = object.__new__(ExpertGroup)
    group.size = 4
    assert [group.experts_of(m, 13) for m in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 13)]


def test_torch_still_lets_ddp_leave_parameters_out() -> None:
    assert callable(getattr(DistributedDataParallel, IGNORE_BY_DDP))


# ------------------------------------------------------------------------------ commands

CKPT_EVERY, MAX_STEPS = 3, 9
RUN = (*TINY_RUN, "--ckpt-every", str(CKPT_EVERY), "--log-every", "1", "--expert-parallel")
FULL_RUN = (*RUN, "2", "--max-steps", str(MAX_STEPS))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:07d}"


def losses(log: str) -> dict[int, float]:
    """Return the loss by step from a run's log."""
    return {int(s): float(v) for s, v in re.findall(r"step (\d+): loss ([\d.]+)", log)}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two ranks with half of the experts each to the end, which draws a grid."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = ("--sample-every", str(MAX_STEPS), "--keep-last", "2", "--results-dir", str(folder))
    Process(torchrun("train.py", *FULL_RUN, *flags), folder / "log.txt").wait()
    return folder / "run"


def test_the_last_shares_are_kept_and_every_script_reads_them(
    undisturbed: Path, tmp_path: Path
) -> None:
    names = sorted(item.name for item in (undisturbed / "checkpoints").iterdir())
    assert names == ["0000006", "0000009", "latest"]
    assert latest_checkpoint(undisturbed) == checkpoint(undisturbed, MAX_STEPS)
    shares = [p.stat().st_size for p in checkpoint(undisturbed, MAX_STEPS).glob("*.safetensors")]
    assert len(shares) == 2 and max(shares) < 1.01 * min(shares)
    out = tmp_path / "ema.safetensors"
    convert.main(convert.build_parser().parse_args([str(undisturbed), str(out)]))
    model = load_model(out)
    start = (*TINY_RUN, "--init-from", str(undisturbed), "--results-dir", str(tmp_path))
    job = prepare(build_parser(None).parse_args(start))
    assert_close(job.model.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_grid_that_all_ranks_draw_is_that_of_the_exported_averages(
    undisturbed: Path, tmp_path: Path
) -> None:
    job = prepare(build_parser(None).parse_args([*TINY_RUN, "--results-dir", str(tmp_path)]))
    pictures = draw_grid(load_model(undisturbed), job, 1), undisturbed / "samples/0000009.png"
    ours, theirs = (torch.tensor(np.asarray(Image.open(path)).astype(int)) for path in pictures)
    assert (ours - theirs).abs().max() <= 1  # sums in another order


def test_a_single_process_goes_on_with_the_loss_of_two_ranks(
    undisturbed: Path, tmp_path: Path
) -> None:
    start = checkpoint(undisturbed, 6)
    flags = ("--max-steps", "8", "--lr", "0", "--resume", str(start), "--results-dir")
    command = [sys.executable, "train.py", *RUN, "1", *flags, str(tmp_path)]
    output = Process(command, tmp_path / "log.txt").wait()
    assert f"{start} is from 2 ranks, this run has 1" in output
    ours, theirs = ShardedCheckpoint(checkpoint(tmp_path / "run", 8)), ShardedCheckpoint(start)
    for name in theirs.shapes:  # at a rate of zero they stay as they are
        assert torch.equal(ours.read("model", name), theirs.read("model", name))
    expected = losses((undisturbed / "log.txt").read_text())
    assert losses(output)[7] == pytest.approx(expected[7], rel=0.2)


def test_ranks_that_do_not_fit_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = [*RUN, "3", "--results-dir", str(tmp_path / "new")]
    with pytest.raises(UserError, match=r"--expert-parallel 3: .* 4 experts and 1 ranks: 1 would"):
        prepare(build_parser(None).parse_args(given))
    assert not (tmp_path / "new").exists()


def test_zero_3_refuses_to_share_experts_and_says_what_does() -> None:
    file = ("--deepspeed-config", str(REPO / "config/zero3.json"))
    args = build_deepspeed_parser().parse_args([*RUN, "2", *file])
    with pytest.raises(UserError, match=r"--expert-parallel 2: .* has ZeRO stage 3, .*; take st"):
        train_deepspeed.main(args)


def kill_a_rank(launched: Process, run: Path, moment: str) -> int:
    """Kill one of two ranks: at a random moment after the first checkpoint, or while it saves.

    Returns:
        Its id.
    """
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    step, rank = draw.randint(CKPT_EVERY + 1, MAX_STEPS - 3), draw.choice([0, 1])
    print(f"KILL_SEED={seed}: SIGKILL of rank {rank} after step {step}")
    log, saving = run / "log.txt", f"checkpoints/{2 * CKPT_EVERY:07d}.*.partial"
    deadline = time.monotonic() + 180
    while not (
        any(run.glob(saving)) if moment == "saving"
        else log.exists() and f"step {step}:" in log.read_text()
    ):  # fmt: skip
        assert time.monotonic() < deadline and launched.popen.poll() is None
        time.sleep(0.001)
    pid = descendants(launched.popen.pid)[rank]
    os.kill(pid, signal.SIGKILL)
    return pid


def assert_same_end(run: Path, expected: Path) -> None:
    """Compare all that the ranks saved at the end, bit for bit."""
    for rank in range(2):
        name = f"{rank:05d}.safetensors"
        ours, theirs = (checkpoint(r, MAX_STEPS) / name for r in (run, expected))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["random", "saving"])
def test_a_killed_rank_is_named_within_a_minute_and_the_same_command_reaches_the_same_bits(
    moment: str, undisturbed: Path, tmp_path: Path
) -> None:
    command = torchrun("train.py", *FULL_RUN, "--results-dir", str(tmp_path))
    launched = Process(command, tmp_path / "killed.txt")
    pid, killed = kill_a_rank(launched, tmp_path / "run", moment), time.monotonic()
    assert launched.popen.wait(60) != 0 and time.monotonic() - killed < 60
    said = launched.log.read_text()
    assert re.search(rf"rank +: \d.*\n.*exitcode +: -9 \(pid: {pid}\)", said)
    assert "resumed" in Process(command, tmp_path / "resumed.txt").wait()
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_killed_rank_is_started_again_by_max_restarts(undisturbed: Path, tmp_path: Path) -> None:
    flags = (*FULL_RUN, "--results-dir", str(tmp_path))
    launched = Process(torchrun("--max-restarts=1", "train.py", *flags), tmp_path / "log.txt")
    kill_a_rank(launched, tmp_path / "run", "random")
    assert "resumed" in launched.wait()
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_run_goes_on_with_4_2_and_1_ranks_with_zero_2_and_with_2_again(tmp_path: Path) -> None:
    zero = ("train_deepspeed.py", "--deepspeed-config", engine_file("stage 2", tmp_path))
    legs = [  # ranks, script, --expert-parallel
        (4, ("train.py",), ("--expert-parallel", "4")),
        (2, ("train.py",), ("--expert-parallel", "2")),
        (1, ("train.py",), ("--expert-parallel", "1")),
        (2, zero, ()),
        (2, ("train.py",), ("--expert-parallel", "2")),
    ]
    output = ""
    for i, (ranks, script, flags) in enumerate(legs):
        steps = ("--max-steps", str(10 * (i + 1)), "--log-every", "2", "--ckpt-every", "10")
        rate = ("--results-dir", str(tmp_path), *(("--lr", "0") if i == len(legs) - 1 else ()))
        command = torchrun(*script, *TINY_RUN, *flags, *steps, *rate, nproc=ranks)
        output += Process(command, tmp_path / f"{i}.txt").wait()
    found = losses(output)
    first, last = (torch.tensor([found[s] for s in steps]) for steps in ([2, 4], [42, 44, 46, 48]))
    assert last.mean() < 0.9 * first.mean()
    states = [load_model(checkpoint(tmp_path / "run", s)).state_dict() for s in (40, 50)]
    for name, value in states[0].items():  # at a rate of zero averages go on towards the weights
        assert_close(states[1][name], value, rtol=0, atol=0.02)


def test_ranks_that_share_the_experts_draw_the_picture_of_one_process(
    undisturbed: Path, tmp_path: Path
) -> None:
    drawn = ("sample.py", "--ckpt", str(undisturbed), "--num-sampling-steps", "3", "--out")
    ranks = torchrun(*drawn, str(tmp_path / "2.png"), "--expert-parallel", "2")
    Process([sys.executable, *drawn, str(tmp_path / "1.png")], tmp_path / "1.txt").wait()
    Process(ranks, tmp_path / "2.txt").wait()
    one, two = (np.asarray(Image.open(tmp_path / name)).astype(int) for name in ("1.png", "2.png"))
    tolerance = 1 if process.default_precision(torch.device("cpu")) == "fp32" else 8
    assert one.shape == two.shape and abs(one - two).max() <= tolerance


@pytest.mark.slow
def test_ranks_that_share_the_experts_judge_the_samples_of_one_process(
    undisturbed: Path, tmp_path: Path
) -> None:
    # three batches: the second rank has nothing to draw in the last turn
    flags = ("--num-samples", "50", "--batch-size", "20", "--dtype", "fp32", "--cache")
    judged = ("evaluate.py", "--ckpt", str(undisturbed), *flags, str(tmp_path / "cache"), "--out")
    ranks = torchrun(*judged, str(tmp_path / "2"), "--expert-parallel", "2")
    Process([sys.executable, *judged, str(tmp_path / "1")], tmp_path / "1.txt").wait(900)
    Process(ranks, tmp_path / "2.txt").wait(900)
    one, two = (np.load(tmp_path / n / "seed0.npz")["arr_0"].astype(int) for n in ("1", "2"))
    assert one.shape == two.shape and abs(one - two).max() <= 1
    facts = [json.loads((tmp_path / n / "metrics.json").read_text())["facts"] for n in ("1", "2")]
    losses = [fact["loss on test images"] for fact in facts]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
