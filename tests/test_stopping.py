"""A run that is told to stop saves its last step; nothing outlives its launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deepspeed_worker import engine_file
from launch import REPO, TINY_RUN, Process, descendants, torchrun
from torch.testing import assert_close

from checkpoint.state import checkpoint_path, latest_checkpoint, load_checkpoint
from common import process, stopping
from common.stopping import StopRequest

MAX_STEPS = 30
RUN = (*TINY_RUN, "--ckpt-every", "1000", "--log-every", "1", "--max-steps", str(MAX_STEPS))


def wait_for_step(run: Path, step: int, launched: Process) -> None:
    deadline = time.monotonic() + 180
    log = run / "log.txt"
    while not (log.exists() and re.search(rf"step {step}:", log.read_text())):
        assert time.monotonic() < deadline and launched.popen.poll() is None, launched.log
        time.sleep(0.005)


def last_step(run: Path) -> int:
    latest = latest_checkpoint(run)
    assert latest is not None
    return int(latest.stem)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    Process(
        [sys.executable, "train.py", *RUN, "--results-dir", str(results)], results / "log.txt"
    ).wait()
    return results / "run"


@pytest.mark.parametrize(("number", "num_workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_ends_a_run_after_its_step_which_is_saved_and_goes_on_bit_for_bit(
    number: signal.Signals, num_workers: int, undisturbed: Path, tmp_path: Path
) -> None:
    flags = (*RUN, "--num-workers", str(num_workers), "--results-dir", str(tmp_path))
    command = [sys.executable, "train.py", *flags]
    launched = Process(command, tmp_path / "stopped.txt", own_group=True)
    wait_for_step(tmp_path / "run", 5, launched)
    os.killpg(launched.popen.pid, number)  # as a terminal does: loaders get it too
    assert launched.popen.wait(60) == 128 + number
    output = launched.log.read_text()
    step = last_step(tmp_path / "run")
    assert 5 <= step < MAX_STEPS and "Traceback" not in output
    said = rf"stopped by {number.name} at step {step}, which is saved: the same command continues"
    assert re.search(said, output) and re.search(said, (tmp_path / "run" / "log.txt").read_text())
    Process(command, tmp_path / "resumed.txt").wait()
    ours, theirs = (
        load_checkpoint(checkpoint_path(r, MAX_STEPS)) for r in (tmp_path / "run", undisturbed)
    )
    for part in ("step", "model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)


@pytest.mark.parametrize(
    "script",
    ["train.py", pytest.param("train_deepspeed.py", marks=pytest.mark.slow)],
)
def test_ranks_whose_launcher_is_told_to_stop_agree_on_the_step_that_they_save(
    script: str, tmp_path: Path
) -> None:
    engine = ("--deepspeed-config", engine_file("stage 3", tmp_path))
    flags = (*RUN, "--results-dir", str(tmp_path), *(engine if "deepspeed" in script else ()))
    launched = Process(torchrun(script, *flags), tmp_path / "stopped.txt")
    wait_for_step(tmp_path / "run", 5, launched)
    launched.popen.terminate()
    assert launched.popen.wait(60) != 0
    step = last_step(tmp_path / "run")
    assert f"stopped by SIGTERM at step {step}, which is saved" in launched.log.read_text()
    output = Process(torchrun(script, *flags), tmp_path / "resumed.txt").wait()
    assert f"at step {step}" in output and "done: " in output


def test_a_run_stopped_on_purpose_ends_with_0_and_goes_on_bit_for_bit(
    undisturbed: Path, tmp_path: Path
) -> None:
    flags = (*RUN, "--num-workers", "2", "--results-dir", str(tmp_path))
    command = [sys.executable, "train.py", *flags]
    launched = Process(command, tmp_path / "stopped.txt", own_group=True)
    wait_for_step(tmp_path / "run", 3, launched)
    os.killpg(launched.popen.pid, signal.SIGUSR1)  # as SLURM does: loaders get it too
    output = launched.wait(60)
    step = last_step(tmp_path / "run")
    assert 3 <= step < MAX_STEPS and f"stopped by SIGUSR1 at step {step}, which is" in output
    for _ in range(2):  # every attempt makes a step at least
        output = Process([*command, "--stop-after", "1e-6"], tmp_path / "again.txt").wait()
        step += 1
        assert f"stopped by --stop-after at step {step}, which is saved" in output
    Process(command, tmp_path / "resumed.txt").wait()
    ours, theirs = (
        load_checkpoint(checkpoint_path(r, MAX_STEPS)) for r in (tmp_path / "run", undisturbed)
    )
    for part in ("step", "model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)


def test_ranks_stopped_on_purpose_agree_on_the_step_and_end_with_0(tmp_path: Path) -> None:
    flags = (*RUN, "--results-dir", str(tmp_path))
    # SLURM signals every process; a launcher that ignores this one leaves it to its ranks
    ignoring = ["bash", "-c", 'trap "" USR1; exec "$@"', "torchrun"]
    launched = Process([*ignoring, *torchrun("train.py", *flags)], tmp_path / "stopped.txt")
    wait_for_step(tmp_path / "run", 3, launched)
    for pid in (launched.popen.pid, *descendants(launched.popen.pid)):
        os.kill(pid, signal.SIGUSR1)
    output = launched.wait(60)
    step = last_step(tmp_path / "run")
    assert f"stopped by SIGUSR1 at step {step}, which is saved" in output
    command = torchrun("train.py", *flags, "--stop-after", "1e-6")
    assert (
        f"stopped by --stop-after at step {step + 1}, which is saved"
        in Process(command, tmp_path / "again.txt").wait()
    )


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    flags = (*RUN, "--max-steps", "100000", "--num-workers", "1", "--results-dir", str(tmp_path))
    launched = Process(torchrun("train.py", *flags), tmp_path / "log.txt")
    wait_for_step(tmp_path / "run", 2, launched)
    started = descendants(launched.popen.pid)
    assert len(started) >= 4  # two ranks, a loader each
    processes = [psutil.Process(pid) for pid in started]
    os.kill(launched.popen.pid, signal.SIGKILL)
    launched.popen.wait()
    gone, alive = psutil.wait_procs(processes, timeout=20)  # loaders look every 5 seconds
    for left in alive:
        left.kill()
    assert not alive and len(gone) == len(started)


def test_a_second_interrupt_ends_at_once_but_not_the_launchers_echo_of_the_first() -> None:
    former = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with it ignored
    with StopRequest(torch.device("cpu")) as stop:
        assert stop.agreed() == 0
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed() == signal.SIGINT
        stop._since -= stopping.ECHO_SECONDS + 1
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is former


def test_one_place_decides_about_tf32_for_every_script() -> None:
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn]
    for backend in backends:
        backend.allow_tf32 = False
    process.pick_device()
    assert all(backend.allow_tf32 for backend in backends)
    found = subprocess.run(
        ["git", "grep", "-l", "allow_tf32\\|float32_matmul_precision", "--", "*.py", ":!tests"],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "common/process.py" in found.stdout.split()
    assert not {"train.py", "sample.py", "evaluate.py"} & set(found.stdout.split())


def test_ranks_wait_a_day_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}
    monkeypatch.setattr(process.dist, "rendezvous", lambda _: iter([(None, 0, 1)]))
    monkeypatch.setattr(process.dist, "PrefixStore", lambda *_: None)
    monkeypatch.setattr(process.dist, "init_process_group", lambda *_, **k: given.update(k))
    monkeypatch.setattr(process.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(process.dist, "get_world_size", lambda: 1)
    monkeypatch.setenv("RANK", "0")
    process.setup()
    assert given["timeout"] == process.LONG_WAIT


def test_the_slurm_script_hands_its_cores_on_to_srun(tmp_path: Path) -> None:
    for name, text in {
        "srun": 'echo "cores $SRUN_CPUS_PER_TASK"',
        "scontrol": "echo node1",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    given = {"SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "4", "SLURM_CPUS_PER_TASK": "64"}
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "x", **given}
    found = subprocess.run(
        ["bash", "scripts/slurm_g_zero3.sh"],
        cwd=REPO, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "cores 64\n"
