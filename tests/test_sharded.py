"""Sharded checkpoints on disk: whole or not there, never mixed, and nothing in them is believed."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import GOLDEN, SETTINGS, TINY, tiny_model

from checkpoint import sharded
from checkpoint.sharded import (
    Fragment,
    ShardedCheckpoint,
    commit,
    partial_folder,
    write_share,
    write_state,
)
from checkpoint.state import checkpoint_to_resume, latest_checkpoint, verify_checkpoint
from checkpoint.weights import load_model
from common.errors import FileError
from common.files import DamagedFileError, seal


def save(run: Path, step: int, seed: int = 0, **options: Any) -> Path:
    """Write what two ranks hold of a tiny model, each half of every parameter."""
    state = dict(tiny_model(seed).named_parameters())
    trained = {name: p.detach().flatten() for name, p in state.items() if p.requires_grad}
    partial = partial_folder(run, step)
    for rank in range(2):
        pieces = [
            Fragment(name, rank * (len(flat) // 2), flat.tensor_split([len(flat) // 2])[rank])
            for name, flat in trained.items()
        ]
        write_share(
            partial,
            rank,
            dict.fromkeys(sharded.KINDS, pieces),
            {"cpu": torch.zeros(1, dtype=torch.uint8)},
        )
    write_state(
        partial,
        {
            "config": TINY.to_dict(),
            "settings": SETTINGS,
            "shapes": {name: list(state[name].shape) for name in trained},
            "num_ranks": 2,
            "step": step,
            "adam_step": float(step),
            "loss_scale": {},
        },
    )
    return commit(partial, **{"keep_last": 0, **options})


def change_state(folder: Path, **changes: Any) -> None:
    """Give state.json other values, with a right checksum: as someone hostile would."""
    path = folder / "state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes, "crc32": "00000000"}))
    seal(path)


def flip_a_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_share_and_its_state_carry_their_checksums(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert sorted(os.listdir(folder)) == ["00000.safetensors", "00001.safetensors", "state.json"]
    verify_checkpoint(folder)
    checkpoint = ShardedCheckpoint(folder)
    expected = tiny_model(0).state_dict()
    for name in checkpoint.shapes:
        assert torch.equal(checkpoint.read("ema", name), expected[name].flatten())


@pytest.mark.parametrize(
    ("name", "place"), [("00001.safetensors", -5), ("00000.safetensors", 3000), ("state.json", 90)]
)
def test_a_flipped_bit_in_any_file_makes_a_run_go_back(
    name: str, place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, last = save(tmp_path, 1), save(tmp_path, 2)
    flip_a_bit(last / name, place)
    assert checkpoint_to_resume(tmp_path) == older
    assert f"{last}" in caplog.text and "damaged" in caplog.text and not last.exists()
    assert len(list(last.parent.glob("0000002.*.damaged"))) == 1


@pytest.mark.parametrize("name", ["00001.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty"])
def test_a_missing_or_cut_file_makes_a_run_go_back(
    name: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, last = save(tmp_path, 1), save(tmp_path, 2)
    if how == "missing":
        (last / name).unlink()
    else:
        os.truncate(last / name, 100 if how == "cut" else 0)
    assert latest_checkpoint(tmp_path) == older
    reason = f"is incomplete: no {name}" if how == "missing" else f"{name} is damaged"
    assert f"{last}" in caplog.text and reason in caplog.text


@pytest.mark.parametrize("name", ["00001.safetensors", "state.json"])
def test_a_file_that_cannot_be_read_is_an_error(name: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    (last / name).unlink()
    (last / name).symlink_to("/proc/self/mem")
    for find in (latest_checkpoint, checkpoint_to_resume):
        with pytest.raises(FileError, match=rf"cannot read {last / name}: Input/output error"):
            find(tmp_path)
    assert last.exists()


def test_shares_of_two_checkpoints_do_not_mix(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 2, seed=0), save(tmp_path / "b", 2, seed=1)
    shutil.copy(second / "00001.safetensors", first / "00001.safetensors")
    with pytest.raises(DamagedFileError, match=r"00001\.safetensors .*share of another checkpoint"):
        ShardedCheckpoint(first)


def test_two_writers_of_one_step_have_folders_of_their_own(tmp_path: Path) -> None:
    ours, theirs = partial_folder(tmp_path, 5), partial_folder(tmp_path, 5)
    assert ours != theirs and ours.parent == theirs.parent


def test_writing_a_step_again_replaces_it_and_keeps_one_folder(tmp_path: Path) -> None:
    save(tmp_path, 5, seed=0)
    folder = save(tmp_path, 5, seed=1)
    assert sorted(os.listdir(folder.parent)) == ["0000005", "latest"]
    name = "final_layer.linear.weight"
    expected = tiny_model(1).state_dict()[name].flatten()
    assert torch.equal(ShardedCheckpoint(folder).read("model", name), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "one"}, "version is 'one', not a number"),
        ({"version": True}, "version is True, not a number"),
        ({"version": 99}, "has version 99, this code reads up to 1"),
        ({"num_ranks": 10**15}, "incomplete: no 00002.safetensors"),
        ({"num_ranks": -1}, "num_ranks is -1, not a number of ranks"),
        ({"num_ranks": "../../x"}, "num_ranks is '../../x', not a number of ranks"),
        ({"num_ranks": 0}, "num_ranks is 0, not"),
        ({"step": 1.5}, "step is 1.5, not a number of steps"),
        ({"step": None}, "step is None"),
        ({"adam_step": "7"}, "adam_step is '7'"),
        ({"config": []}, r"config is \[\], not the fields of a model"),
        ({"settings": None}, "settings is None"),
        ({"loss_scale": 3}, "loss_scale is 3"),
        ({"shapes": {"a": [-1]}}, "shapes is .*not a shape for each name"),
        ({"shapes": {"a": ["x"]}}, "shapes is .*not a shape for each name"),
        ({"shapes": {"../../a": [10**6, 10**9]}}, "hold 0 elements of ../../a"),
        ({"shapes": {"final_layer.linear.bias": [10**30]}}, "elements of final_layer.linear.bias"),
        ({"shares": 3}, "shares is not a list"),
        ({"shares": [1, {}]}, "share of another checkpoint"),
        ({"format": "other"}, "has no format 'dit-moe-sharded'"),
    ],
)
def test_hostile_states_are_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    if changes.get("num_ranks") == 10**15:  # without the list, which has two
        changes = {**changes, "shares": None}
        content = json.loads((folder / "state.json").read_text())
        del content["shares"], changes["shares"]
        (folder / "state.json").write_text(json.dumps(content))
    change_state(folder, **changes)
    with pytest.raises(FileError, match=message) as raised:
        ShardedCheckpoint(folder)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000, "\x00"])
def test_a_state_that_is_no_object_is_one_line(content: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(content)
    with pytest.raises(DamagedFileError, match=r"state\.json is damaged"):
        ShardedCheckpoint(folder)


def test_old_shares_without_checksums_are_read(tmp_path: Path) -> None:
    old = GOLDEN / "e811b6b" / "zero" / "checkpoints" / "0000007"
    verify_checkpoint(old)
    shutil.copytree(old, tmp_path / "old")
    (tmp_path / "old" / "00001.safetensors").unlink()
    with pytest.raises(DamagedFileError, match="incomplete"):
        load_model(tmp_path / "old")
