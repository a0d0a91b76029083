"""Two trainings never write one run folder; the lock of a killed one is no obstacle."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launch import REPO
from test_checkpoint import save_tiny

from checkpoint import run_lock
from checkpoint.run_lock import check_not_taken, lock_path, lock_run
from checkpoint.state import checkpoint_path, commit_checkpoint
from common.errors import FileError, UserError

HOLDER = (
    "import sys, time\n"
    "from checkpoint import run_lock\n"
    "with run_lock.lock_run(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(100)"
)


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("SILENCE", 0.5), ("DYING", 0.2)):
        monkeypatch.setattr(run_lock, f"{name}_SECONDS", seconds)


def hold(run: Path) -> subprocess.Popen[str]:
    """Start another process that holds the lock of a run."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run)], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def write_lock(run: Path, **changes: Any) -> None:
    """Write the lock of another process."""
    run.mkdir(exist_ok=True)
    holder = {**run_lock._identity(), "token": "1234", **changes}
    lock_path(run).write_text(json.dumps(holder))


def test_a_second_process_is_told_who_trains_a_run_and_a_killed_one_leaves_it_free(
    tmp_path: Path,
) -> None:
    holder = hold(tmp_path)
    try:
        message = rf"{tmp_path} is trained by process {holder.pid} on .* since .*--run-name"
        with pytest.raises(UserError, match=message), lock_run(tmp_path):
            pass
        with pytest.raises(UserError, match="this run stops and leaves it alone"):
            check_not_taken(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    check_not_taken(tmp_path)
    with lock_run(tmp_path):
        check_not_taken(tmp_path)
        assert json.loads(lock_path(tmp_path).read_text())["pid"] == os.getpid()
    assert not lock_path(tmp_path).exists()


def test_a_process_that_is_killed_but_not_reaped_holds_nothing(tmp_path: Path) -> None:
    holder = hold(tmp_path)
    holder.kill()
    while run_lock._start_of(holder.pid) is not None:  # a zombie from then on
        time.sleep(0.01)
    with lock_run(tmp_path):
        pass
    holder.wait()


def test_another_process_with_the_pid_of_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    write_lock(tmp_path, started=1)
    with lock_run(tmp_path):
        pass


def test_the_lock_of_another_machine_counts_while_it_is_touched(tmp_path: Path) -> None:
    write_lock(tmp_path, host="far", machine="far away", pid=77)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import os, sys, time\n"
         "while True: os.utime(sys.argv[1]); time.sleep(0.05)", lock_path(tmp_path)]
    )  # fmt: skip
    try:
        time.sleep(0.3)
        message = rf"trained by process 77 on far .*; if it is over, remove {lock_path(tmp_path)}"
        with pytest.raises(UserError, match=message), lock_run(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lock_run(tmp_path):  # silent: its machine or process is gone
        assert json.loads(lock_path(tmp_path).read_text())["pid"] == os.getpid()


def test_a_holder_touches_its_lock(tmp_path: Path) -> None:
    with lock_run(tmp_path):
        os.utime(lock_path(tmp_path), (1, 1))
        deadline = time.monotonic() + 10
        while lock_path(tmp_path).stat().st_mtime < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff", b"null"])
def test_an_unreadable_lock_is_replaced(content: bytes, tmp_path: Path) -> None:
    lock_path(tmp_path).write_bytes(content)
    with lock_run(tmp_path):
        pass


def test_a_run_that_lost_its_lock_changes_nothing(tmp_path: Path) -> None:
    theirs = save_tiny(checkpoint_path(tmp_path, 1))
    commit_checkpoint(theirs, keep_last=0)
    ours = save_tiny(checkpoint_path(tmp_path, 2))
    with lock_run(tmp_path):
        write_lock(tmp_path, host="far", machine="far away")
        with pytest.raises(UserError, match=r"on far .*this run stops"):
            commit_checkpoint(ours, keep_last=1)
        before = theirs.read_bytes()
        with pytest.raises(UserError, match=r"on far .*this run stops"):
            save_tiny(theirs, seed=5)
        assert theirs.read_bytes() == before
    assert theirs.exists() and ours.with_name("latest").read_text() == "0000001.pt\n"
    assert lock_path(tmp_path).exists()  # it is the other one's


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"cannot write .*file/run/run\.lock: Not a directory"),
        lock_run(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.slow
def test_of_many_processes_that_start_at_once_one_gets_the_lock(tmp_path: Path) -> None:
    write_lock(tmp_path, pid=2**22 + 1)  # left over from a dead one
    script = (
        "import sys, time\n"
        "from checkpoint import run_lock\n"
        "run_lock.DYING_SECONDS = 1.0\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "try:\n"
        "    with run_lock.lock_run(sys.argv[1]): time.sleep(4); print('won')\n"
        "except ValueError: print('lost')"
    )
    start = str(time.time() + 8)
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), start],
                         cwd=REPO, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]  # fmt: skip
    said = sorted(run.communicate()[0].strip() for run in runs)
    assert said == ["lost", "lost", "lost", "won"]
