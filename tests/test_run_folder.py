"""Which checkpoint a run continues from, and what a new one may delete."""

import errno
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from test_checkpoint import GOLDEN, save_tiny, tiny_model
from torch.testing import assert_close

from checkpoint import run_folder
from checkpoint.state import (
    checkpoint_hash,
    checkpoint_path,
    checkpoint_to_resume,
    commit_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    resolve_checkpoint,
    verify_checkpoint,
)
from checkpoint.weights import load_model
from common.errors import FileError
from common.files import DamagedFileError


def save(run: Path, *steps: int, keep_last: int = 0, resumed: str | None = None) -> list[Path]:
    """Write and commit checkpoints, as a run does."""
    paths = [checkpoint_path(run, step) for step in steps]
    for path, step in zip(paths, steps, strict=True):
        save_tiny(path, step, step)
        commit_checkpoint(path, keep_last, resumed)
    return paths


def steps_of(run: Path) -> list[int]:
    return [run_folder.step_of(path) for path in run_folder.list_checkpoints(run)]


def flip_a_bit(path: Path) -> None:
    """Change a weight, as a bad disk does."""
    with zipfile.ZipFile(path) as archive:
        weights = archive.read(max(archive.infolist(), key=lambda record: record.file_size))
    content = bytearray(path.read_bytes())
    content[content.index(weights) + len(weights) // 2] ^= 16
    path.write_bytes(content)


# ---------------------------------------------------------------- damaged, or not to be read


def test_a_flipped_bit_makes_a_run_go_back_and_the_damaged_file_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, older, last = save(tmp_path, 1, 2, 3)
    flip_a_bit(last)
    content = last.read_bytes()
    assert checkpoint_to_resume(tmp_path) == older
    assert f"{last} is damaged: the checksum of" in caplog.text
    (aside,) = last.parent.glob("0000003.pt.*.damaged")
    assert f"is kept as {aside.name}" in caplog.text
    save(tmp_path, 3, 4, 5, 6, keep_last=1)
    assert aside.read_bytes() == content and steps_of(tmp_path) == [6]


def test_a_cut_checkpoint_is_passed_over_by_name_and_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, last = save(tmp_path, 1, 2)
    os.truncate(last, 1000)
    assert latest_checkpoint(tmp_path) == older
    assert f"{last} is damaged: cut to 1000 bytes" in caplog.text
    os.truncate(last, 0)
    assert latest_checkpoint(tmp_path) == older and last.exists()


@pytest.mark.parametrize("find", [latest_checkpoint, checkpoint_to_resume])
def test_a_checkpoint_that_cannot_be_read_is_an_error_and_stays(tmp_path: Path, find: Any) -> None:
    _, last = save(tmp_path, 1, 2)
    last.unlink()
    last.symlink_to("/proc/self/mem")  # reading its start is an I/O error
    with pytest.raises(FileError, match=rf"cannot read {last}: Input/output error"):
        find(tmp_path)
    assert last.is_symlink() and steps_of(tmp_path) == [2, 1]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_folder_of_checkpoints_that_cannot_be_listed_is_an_error(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(path: Path) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FileError, match=rf"cannot read .*checkpoints: {os.strerror(code)}"):
        checkpoint_to_resume(tmp_path)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_at_0(tmp_path: Path) -> None:
    paths = save(tmp_path, 1, 2)
    for path in paths:
        os.truncate(path, 100)
    message = f"all 2 checkpoints of {tmp_path} are damaged, the last is {paths[1]}"
    for _ in range(2):
        with pytest.raises(FileError, match=message):
            checkpoint_to_resume(tmp_path)
    assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"0000009.pt\n",
        b"../../other.pt\n",
        b"/etc/passwd",
        b"\xff\xfe",
        b"0" * 5000,
        b"\n" * 9,
    ],
)
def test_a_broken_latest_falls_back_to_the_order_of_steps(content: bytes, tmp_path: Path) -> None:
    save_tiny(tmp_path / "other.pt")
    paths = save(tmp_path / "run", 1, 2)
    paths[0].with_name("latest").write_bytes(content)
    assert latest_checkpoint(tmp_path / "run") == paths[1]


def test_a_latest_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (path,) = save(tmp_path, 1)
    path.with_name("latest").unlink()
    path.with_name("latest").mkdir()
    with pytest.raises(FileError, match=r"cannot read .*latest: Is a directory"):
        latest_checkpoint(tmp_path)


def test_a_checkpoint_pruned_while_a_reader_looks_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    listed, list_now = run_folder.list_checkpoints(tmp_path), run_folder.list_checkpoints
    last = save(tmp_path, 2, keep_last=1)[0]
    answers = iter([listed])
    monkeypatch.setattr(
        "checkpoint.state.list_checkpoints", lambda run: next(answers, None) or list_now(run)
    )
    assert latest_checkpoint(tmp_path) == last


# ---------------------------------------------------------------- courses and pruning


def test_the_checkpoint_that_a_run_went_back_to_outlives_the_abandoned_ones(
    tmp_path: Path,
) -> None:
    old = str(save(tmp_path, 5, 10, 15, 20, keep_last=4)[1])
    remaining = []
    for step in (12, 14, 16, 18):
        save(tmp_path, step, keep_last=3, resumed=old)
        remaining.append(sorted(steps_of(tmp_path)))
    assert remaining == [[5, 10, 12], [10, 12, 14], [10, 12, 14, 16], [10, 14, 16, 18]]


def test_an_abandoned_course_is_not_mixed_into_the_new_one(tmp_path: Path) -> None:
    save(tmp_path, 10, 15, 20)
    save(tmp_path, 12, 14)
    assert steps_of(tmp_path) == [14, 12, 10, 20, 15]
    paths = save(tmp_path, 16, 18)
    assert steps_of(tmp_path) == [18, 16, 14, 12, 10, 15, 20]
    for path in paths:
        os.truncate(path, 100)
    assert latest_checkpoint(tmp_path) == checkpoint_path(tmp_path, 14)  # not 20 or 15


def test_only_what_our_writers_leave_is_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    gone = ["0000001.pt.tmp", "0000001.pt.0123abcd.tmp", "latest.0123abcd.tmp", "latest.tmp"]
    gone += ["0000001.partial", "0000001.0123abcd.partial", "0000001.0123abcd.old"]
    kept = ["best.pt", "notes.tmp", "0000001.pt.0123abcd.damaged", "old.partial", "0000002.pt.bak"]
    for name in (*gone, *kept):
        (folder / name).mkdir(parents=True)
        (folder / name / "x").touch()
    save(tmp_path, 3, 4, keep_last=1)
    assert sorted(os.listdir(folder)) == sorted([*kept, "0000004.pt", "latest"])


def test_what_cannot_be_pruned_does_not_end_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".pt":
            raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    save(tmp_path, 2, keep_last=1)
    assert "could not delete" in caplog.text and steps_of(tmp_path) == [2, 1]


# ---------------------------------------------------------------- what a path means


def test_what_was_resolved_stays_what_is_hashed_while_the_run_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = resolve_checkpoint(tmp_path)
    before = checkpoint_hash(path)
    assert before == checkpoint_hash(tmp_path)
    save(tmp_path, 2)
    assert checkpoint_hash(path) == before != checkpoint_hash(tmp_path)
    assert resolve_checkpoint(path) == path and path.name == "0000001.pt"
    assert resolve_checkpoint("some/file.safetensors") == Path("some/file.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "zero"])
def test_checkpoints_from_before_checksums_still_load_and_are_resumed(kind: str) -> None:
    run = GOLDEN / "e811b6b" / kind
    path = latest_checkpoint(run)
    assert path is not None and checkpoint_to_resume(run) == path
    verify_checkpoint(path)
    for ema, seed in ((True, 1), (False, 0)):
        expected, found = tiny_model(seed).state_dict(), load_model(run, ema=ema).state_dict()
        if kind == "zero":  # holds only what is trained
            del expected["pos_embed"], found["pos_embed"]
        assert_close(found, expected, rtol=0, atol=0)
    if kind == "ddp":
        assert load_checkpoint(path)["step"] == 7


def test_a_flipped_bit_in_an_old_torch_checkpoint_is_found_by_its_zip(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "e811b6b" / "ddp", tmp_path / "run")
    path = checkpoint_path(tmp_path / "run", 7)
    flip_a_bit(path)
    with pytest.raises(DamagedFileError, match="the checksum of"):
        verify_checkpoint(path)
