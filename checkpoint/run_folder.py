"""The checkpoints of a run: which there are, in which order, and what a new one puts aside.

    RUN_DIR/checkpoints/0001000.pt    of train.py, see checkpoint/state.py
    RUN_DIR/checkpoints/0001000/      of train_deepspeed.py, see checkpoint/sharded.py
    RUN_DIR/checkpoints/latest        names in the order of writing, the last one first

A run that goes back to an older checkpoint starts another course: `latest` then names the new
checkpoint and what led to it. Those of the abandoned course stay until others need their place.
A name that has another ending, `0001000.HEX.partial` or `.HEX.damaged`, is no checkpoint.

1. `list_checkpoints`: the order.  2. `make_latest`: a new one, and pruning.  3. `mark_best`: one
that stays.  4. `set_aside`.
Only the process that holds the run's lock (checkpoint/run_lock.py) may write here.
"""

import json
import logging
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

from checkpoint.described import read_json
from checkpoint.run_lock import check_not_taken
from common.errors import FileError
from common.files import atomic_write

CHECKPOINT = re.compile(r"([0-9]{1,18})(\.pt)?", re.ASCII)
# What killed writers leave, of this version and of those that used one name for all.
LEFTOVER = re.compile(
    r"(latest|best|best\.pt|[0-9]+(\.pt)?)(\.[0-9a-f]{8})?\.(tmp|partial|old)", re.ASCII
)


def checkpoint_folder(run_dir: str | Path) -> Path:
    """Return where a run keeps its checkpoints."""
    return Path(run_dir) / "checkpoints"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name tells."""
    found = CHECKPOINT.fullmatch(path.name)
    assert found is not None, path
    return int(found[1])


def list_checkpoints(run_dir: str | Path) -> list[Path]:
    """Return all checkpoints of a run by their names, the one to continue from first.

    First the run's course as `latest` lists it, from the last one back; then what `latest` does
    not list: steps before its first, then, from an abandoned course, steps after it.

    Raises:
        FileError: the folder is there, but cannot be read.
    """
    folder = checkpoint_folder(run_dir)
    try:
        with os.scandir(folder) as entries:
            names = {e.name for e in entries if (m := CHECKPOINT.fullmatch(e.name)) and (
                m[2] or e.is_dir())}  # fmt: skip
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"cannot read {folder}: {error.strerror}") from error
    course = [folder / name for name in _read_latest(folder) if name in names]
    head = step_of(course[0]) if course else 10**18
    rest = [folder / name for name in names - {path.name for path in course}]
    return course + sorted(rest, key=lambda path: (step_of(path) > head, -step_of(path)))


def make_latest(path: Path, keep_last: int, resumed: str | None = None) -> None:
    """Make a checkpoint, whose files are all on disk, the latest; then delete the oldest ones.

    Args:
        path: of the checkpoint.
        keep_last: number to keep, 0 keeps all; what killed writers left goes too.
        resumed: `--resume`; if that is a checkpoint of this run it stays, so that the same
            command works again.

    Raises:
        FileError: `latest` could not be written.
        UserError: another process trains this run now; nothing is changed.
    """
    run_dir = path.parents[1]
    check_not_taken(run_dir)
    course = [name for name in _read_latest(path.parent) if CHECKPOINT.fullmatch(name)]
    before = [name for name in course if step_of(Path(name)) < step_of(path)]
    with atomic_write(path.with_name("latest")) as temp:
        temp.write_text("\n".join([path.name, *before[:1000]]) + "\n")
    kept = {Path(resumed).resolve()} if resumed else set()
    kept |= {link.resolve() for link in best_links(run_dir) if link.is_symlink()}
    leftovers = [item for item in path.parent.iterdir() if LEFTOVER.fullmatch(item.name)]
    for item in leftovers + (list_checkpoints(run_dir)[keep_last:] if keep_last else []):
        if item.resolve() not in kept:
            remove(item)


def best_links(run_dir: Path) -> tuple[Path, Path]:
    """Return the names that the best checkpoint has besides its own: of a file, of a folder."""
    return checkpoint_folder(run_dir) / "best.pt", checkpoint_folder(run_dir) / "best"


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """Return step, distance and features of the best checkpoint by `--keep-best`; None: none yet.

    Raises:
        FileError: what says it cannot be read.
    """
    path = run_dir / "best.json"
    if not path.exists():
        return None
    found = read_json(path)
    if not (type(found.get("step")) is int and type(found.get("distance")) is float):
        raise FileError(f"{path} does not say which checkpoint is the best; delete it")
    return found


def mark_best(run_dir: Path, step: int, distance: float, features: str) -> None:
    """Let `best.pt`, or `best` of a sharded run, point to a step's checkpoint; it is not pruned.

    Args:
        run_dir: of the run.
        step: whose checkpoint is there.
        distance: of its samples from real images.
        features: what tells the network that sees them apart.

    Raises:
        OSError: the folder cannot be written.
    """
    for link in best_links(run_dir):
        target = Path(f"{step:07d}{link.suffix}")
        if (link.parent / target).exists():
            temp = link.with_name(f"{link.name}.{uuid.uuid4().hex[:8]}.tmp")
            temp.symlink_to(target)
            temp.replace(link)
        else:  # of before the run went on with another kind of checkpoint
            link.unlink(missing_ok=True)
    content = {"step": step, "distance": distance, "features": features}
    with atomic_write(run_dir / "best.json") as temp:
        temp.write_text(json.dumps(content) + "\n")


def remove(path: Path) -> None:
    """Delete a file or folder; one that cannot be deleted costs only its place."""
    try:
        if path.is_dir() and not path.is_symlink():
            if CHECKPOINT.fullmatch(path.name):  # a half deleted one must not look like one
                path = path.rename(path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.old"))
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        logging.warning("could not delete %s: %s", path, error.strerror)


def set_aside(path: Path) -> Path:
    """Give a damaged checkpoint a name under which nothing writes over or deletes it.

    Raises:
        FileError: the folder cannot be written.
    """
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.damaged")
    try:
        return path.rename(aside)
    except OSError as error:
        raise FileError(f"cannot rename {path}: {error.strerror}") from error


def _read_latest(folder: Path) -> list[str]:
    """Return the lines of `latest`; none if it is empty or not there."""
    try:
        text = (folder / "latest").read_text(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"cannot read {folder / 'latest'}: {error.strerror}") from error
    return list(dict.fromkeys(text.split()))
