"""One writer per run folder: `lock_run` while a run is trained, `check_not_taken` before a commit.

    RUN_DIR/run.lock        who trains this run: host, process, since when, which command

The lock of a killed run is recognised: on the same machine because its process is gone, from
another machine because the file is no longer touched, which a living run does every few seconds.
`flock` guards only the moment of reading and writing the file; what it reaches differs between
network file systems, and processes forked from a dead run would hold it on.
"""

import fcntl
import json
import logging
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from common import process
from common.errors import FileError, UserError, printable

BEAT_SECONDS = 5.0  # between two touches of the lock by its holder
SILENCE_SECONDS = 60.0  # untouched for so long, the lock of another machine is a dead run's
DYING_SECONDS = 3.0  # a killed process may take so long to give its memory back


def lock_path(run_dir: str | Path) -> Path:
    """Return the lock file of a run."""
    return Path(run_dir) / "run.lock"


@contextmanager
def lock_run(run_dir: str | Path) -> Iterator[None]:
    """Keep every other training out of a run folder, which is made if it is not there.

    All ranks call this; the main one holds the lock, and all raise what it raises.

    Raises:
        UserError: another process trains this run; the message names it.
        FileError: the folder cannot be written.
    """
    path, stop = lock_path(run_dir), threading.Event()
    process.call_on_main(_acquire, path, stop)
    try:
        yield
    finally:
        stop.set()  # nothing to stop or release on the other ranks
        _release(path)


def check_not_taken(run_dir: str | Path) -> None:
    """Make sure that no other process holds the lock of a run that this one is about to change.

    A run that was stopped for long, or whose lock a user removed, may have lost it.

    Raises:
        UserError: another process holds it.
    """
    try:
        holder = _parse(lock_path(run_dir).read_bytes())
    except FileNotFoundError:
        return
    except OSError as error:
        raise FileError(f"cannot read {lock_path(run_dir)}: {error.strerror}") from error
    if holder is not None and not _is_me(holder) and not _is_gone(holder):
        raise UserError(f"{_held(lock_path(run_dir), holder)}; this run stops and leaves it alone")


# ---------------------------------------------------------------- the file


def _acquire(path: Path, stop: threading.Event) -> None:
    """Write this process into the lock file, once no living one is in it, and touch it from now."""
    silent = None  # token of a holder on another machine that is found dead
    deadline = time.monotonic() + DYING_SECONDS
    while True:
        with _guarded(path) as file:
            holder = _parse(file.read())
            if holder is None or holder["token"] == silent or _is_gone(holder):
                if holder is not None:
                    logging.info("%s is left over from a run that was killed", path)
                _write(path, file)
                threading.Thread(target=_beat, args=(path, stop), daemon=True).start()
                return
        if holder["machine"] != _machine():
            logging.warning("%s: waiting whether it is alive", _held(path, holder))
            if _is_touched(path):
                raise UserError(
                    f"{_held(path, holder)}; wait for it or stop it, or give another --run-name; "
                    f"if it is over, remove {path}"
                )
            silent = holder["token"]
        elif time.monotonic() > deadline:
            raise UserError(
                f"{_held(path, holder)}; wait for it or stop it, or give another --run-name"
            )
        else:
            time.sleep(0.1)


def _write(path: Path, file: Any) -> None:
    try:
        file.seek(0)
        file.truncate()
        file.write(json.dumps(_identity() | {"token": uuid.uuid4().hex}).encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:  # such as a full disk
        raise FileError(f"cannot write {path}: {error.strerror}") from error


def _release(path: Path) -> None:
    """Remove the lock file if it is this process's."""
    with suppress(OSError), _guarded(path) as file:
        if _is_me(_parse(file.read())):
            path.unlink()


@contextmanager
def _guarded(path: Path) -> Iterator[Any]:
    """Open the lock file, which nobody else reads or writes meanwhile."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}") from error
        with file:
            with suppress(OSError):  # a file system without: the check before a commit is left
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:  # removed by its holder before we got it
                continue
            if is_current:
                yield file
                return


def _beat(path: Path, stop: threading.Event) -> None:
    """Touch the lock file until told to stop."""
    while not stop.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)


def _is_touched(path: Path) -> bool:
    """Watch the lock file: does its holder on another machine still touch or change it?"""
    before = _last_touch(path)
    deadline = time.monotonic() + SILENCE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, SILENCE_SECONDS / 10))
        if (now := _last_touch(path)) != before:
            return now is not None  # None: released
    return False


def _last_touch(path: Path) -> int | None:
    try:
        with open(path, "rb") as file:  # opening makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return None


# ---------------------------------------------------------------- who


def _identity() -> dict[str, Any]:
    """Return what tells this process from all others."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join(sys.argv)[:500],
    }


@cache
def _machine() -> str:
    """Name what process ids belong to: a host since it was booted, and a container on it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux: whether a holder is alive shows in its touches
        return f"{socket.gethostname()} {uuid.uuid4().hex}"


def _start_of(pid: int) -> int | None:
    """Return when a living process was started, in clock ticks since boot; None without it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _is_me(holder: dict[str, Any] | None) -> bool:
    """Tell whether the holder is this process."""
    me = _identity()
    return holder is not None and all(
        holder.get(key) == me[key] for key in ("machine", "pid", "started")
    )


def _is_gone(holder: dict[str, Any]) -> bool:
    """Tell whether the holder was a process of this machine that has ended."""
    return holder["machine"] == _machine() and _start_of(holder["pid"]) != holder["started"]


def _parse(content: bytes) -> dict[str, Any] | None:
    """Return the holder that a lock file names; None if it is empty or cut."""
    try:
        holder = json.loads(content)
    except ValueError:
        return None
    types = {"host": str, "machine": str, "pid": int, "since": str, "command": str, "token": str}
    if not isinstance(holder, dict):
        return None
    return holder if all(isinstance(holder.get(k), t) for k, t in types.items()) else None


def _held(path: Path, holder: dict[str, Any]) -> str:
    who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return printable(f"{path.parent} is trained by {who} ({holder['command']})")
