"""Many kills at random moments, and many starts of two commands in one folder at once.

    KILLS=20 python -m pytest -m slow -s tests/test_kills.py

KILLS is the number for train.py, train_deepspeed.py gets half of it; KILL_SEED repeats a run.
"""

import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deepspeed_worker import engine_file
from launch import TINY_RUN, Process, descendants, torchrun
from torch.testing import assert_close

from checkpoint import run_folder
from checkpoint.state import load_checkpoint, verify_checkpoint

KILLS = int(os.environ.get("KILLS", 20))
Command = Callable[..., list[str]]  # run folder's parent, then flags


def train_py(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, "train.py", *TINY_RUN, "--results-dir", str(folder), *flags]


def train_deepspeed_py(folder: Path, *flags: str) -> list[str]:
    engine = engine_file("stage 3", folder)
    script = ["train_deepspeed.py", "--deepspeed-config", engine]
    return torchrun(*script, *TINY_RUN, "--results-dir", str(folder), *flags)


def contents(checkpoint: Path) -> Any:
    """Return what a checkpoint holds but the flags, to be compared bit for bit."""
    verify_checkpoint(checkpoint)
    if checkpoint.is_dir():
        return [path.read_bytes() for path in sorted(checkpoint.glob("*.safetensors"))]
    content = load_checkpoint(checkpoint)
    return {part: content[part] for part in ("step", "model", "ema", "optimizer", "rng")}


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, list):
        return ours == theirs
    try:
        assert_close(ours, theirs, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


# ---------------------------------------------------------------- kills


def last_step(run: Path) -> int:
    """Return the last step that a run's log shows."""
    log = run / "log.txt"
    steps = re.findall(r"step (\d+):", log.read_text()) if log.exists() else []
    return int(steps[-1]) if steps else 0


def kill_somewhere(process: Process, run: Path, draw: random.Random) -> str:
    """Kill all of a run, its launcher or one of its ranks, while it starts, steps or saves.

    Returns:
        What was killed when, or "" if the run was over before.
    """
    if draw.random() < 0.2:
        moment, target, delay = "starting", -1, draw.uniform(0.5, 8)
    else:
        moment, target, delay = "", last_step(run) + draw.randint(1, 4), draw.uniform(0, 0.4)
    deadline = time.monotonic() + 180
    while last_step(run) < target:
        if process.popen.poll() is not None:
            return ""
        assert time.monotonic() < deadline, process.log.read_text()[-3000:]
        time.sleep(0.002)
    time.sleep(delay)
    if process.popen.poll() is not None:
        return ""
    below = descendants(process.popen.pid)
    ranks = [pid for pid in below if b"train_deepspeed.py" in command_of(pid)]
    victim = draw.choice(["all", "launcher", "a rank"]) if ranks else "all"
    if victim == "all":
        process.kill()
    else:
        os.kill(process.popen.pid if victim == "launcher" else draw.choice(ranks), signal.SIGKILL)
        process.popen.wait(120)
    return f"{victim} {moment or f'after step {target}'} + {delay:.2f} s"


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kills"),
    [(train_py, KILLS), (train_deepspeed_py, (KILLS + 1) // 2)],
    ids=["train.py", "train_deepspeed.py"],
)
def test_a_run_killed_many_times_ends_with_the_bits_of_an_undisturbed_one(
    command: Command, kills: int, tmp_path: Path
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    steps = 10 * kills + 20
    flags = ("--max-steps", str(steps), "--ckpt-every", "2", "--log-every", "1")
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    Process(command(tmp_path / "undisturbed", *flags), tmp_path / "undisturbed.txt").wait(900)
    run, killed = tmp_path / "killed" / "run", 0
    for attempt in range(3 * kills):
        process = Process(command(tmp_path / "killed", *flags), tmp_path / f"{attempt}.txt")
        if killed == kills:
            process.wait(900)
            break
        what = kill_somewhere(process, run, draw)
        assert what, f"over before kill {killed + 1}: {process.log.read_text()[-2000:]}"
        killed += 1
        print(f"KILL_SEED={seed}: kill {killed} of {kills}: {what}", flush=True)
    ours, theirs = (run_folder.list_checkpoints(tmp_path / n / "run")[0] for n in
                    ("killed", "undisturbed"))  # fmt: skip
    assert run_folder.step_of(ours) == run_folder.step_of(theirs) == steps
    assert same(contents(ours), contents(theirs))
    print(f"{killed} kills, {steps} steps: bit for bit the same")


# ---------------------------------------------------------------- two commands at once


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "rounds"),
    [(train_py, KILLS), (train_deepspeed_py, (KILLS + 9) // 10)],
    ids=["train.py", "train_deepspeed.py"],
)
def test_of_two_different_commands_in_one_folder_one_trains_and_nothing_mixes(
    command: Command, rounds: int, tmp_path: Path
) -> None:
    flags = ("--max-steps", "60", "--ckpt-every", "10", "--log-every", "1", "--keep-last", "0")
    expected: dict[int, dict[int, Any]] = {}
    for seed in (0, 1):
        folder = tmp_path / f"alone{seed}"
        folder.mkdir()
        Process(command(folder, *flags, "--seed", str(seed)), folder / "log.txt").wait()
        found = run_folder.list_checkpoints(folder / "run")[::-1]
        expected[seed] = {run_folder.step_of(path): contents(path) for path in found}
    for round_number in range(rounds):
        folder = tmp_path / str(round_number)
        folder.mkdir()
        both = [
            Process(command(folder, *flags, "--seed", str(seed)), folder / f"{seed}.txt")
            for seed in (0, 1)
        ]
        codes = [process.popen.wait(900) for process in both]
        said = [process.log.read_text() for process in both]
        found = run_folder.list_checkpoints(folder / "run")
        assert sorted(map(run_folder.step_of, found)) == list(expected[0])
        winner = 0 if same(contents(found[-1]), expected[0][run_folder.step_of(found[-1])]) else 1
        for path in found:
            assert same(contents(path), expected[winner][run_folder.step_of(path)]), path
        assert codes[winner] == 0
        refused = "run is trained by process" in said[1 - winner]
        late = codes[1 - winner] == 0 and "resumed" in said[1 - winner]  # when all was done
        assert refused or late, said[1 - winner][-3000:]
        print(
            f"round {round_number + 1} of {rounds}: seed {winner} trained, the other was "
            f"{'refused' if refused else 'late'}",
            flush=True,
        )
