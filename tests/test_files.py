"""A file is written whole or not at all, and one that changed since is found out."""

import io
import json
import random
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import FileError
from common.files import UNSEALED, DamagedFileError, file_crc32, seal, verify_file


def write_zip(path: Path) -> Path:
    torch.save({"a": torch.randn(1000), "b": [1, 2]}, path)
    return path


def write_safetensors(path: Path) -> Path:
    save_file({"a": torch.randn(1000)}, path, metadata={"format": "pt", **UNSEALED})
    seal(path)
    return path


def write_json(path: Path) -> Path:
    path.write_text(json.dumps({"step": 7, "names": ['"crc32": "00000000"'], **UNSEALED}, indent=2))
    seal(path)
    return path


FILES = {"x.pt": write_zip, "x.safetensors": write_safetensors, "state.json": write_json}


@pytest.fixture(params=list(FILES))
def sealed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return FILES[request.param](tmp_path / request.param)


def payload(path: Path) -> list[int]:
    """Return the bytes that mean something: the zip format has padding and comments."""
    if path.suffix != ".pt":
        inside_key = path.read_bytes().rindex(b'"crc32"')  # the one place that hides the checksum
        return [i for i in range(path.stat().st_size) if not inside_key <= i < inside_key + 7]
    data = path.read_bytes()
    places: list[int] = []
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            content = archive.read(record)
            start = data.index(content, record.header_offset)
            places += range(start, start + len(content))
    return places


def test_a_whole_file_is_found_to_have_a_checksum(sealed: Path) -> None:
    assert verify_file(sealed) is True


def test_every_flipped_bit_is_found(sealed: Path) -> None:
    before = sealed.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(payload(sealed), 60):
        changed = bytearray(before)
        changed[place] ^= 1 << draw.randrange(8)
        sealed.write_bytes(changed)
        with pytest.raises(DamagedFileError, match=f"{sealed} is damaged: "):
            verify_file(sealed)


def test_a_hole_of_zeros_is_found(sealed: Path) -> None:
    size = sealed.stat().st_size
    before = sealed.read_bytes()
    for start in (0, size // 3, size // 2):
        sealed.write_bytes(before[:start] + bytes(50) + before[start + 50 :])
        with pytest.raises(DamagedFileError, match="damaged"):
            verify_file(sealed)


def test_a_cut_file_is_found(sealed: Path) -> None:
    before = sealed.read_bytes()
    for size in (1, len(before) // 2, len(before) - 1):
        sealed.write_bytes(before[:size])
        with pytest.raises(DamagedFileError, match=f"{sealed} is damaged: "):
            verify_file(sealed)


def test_files_without_a_checksum_are_said_to_have_none(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"depth": 3}')
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    torch.save(torch.ones(3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in tmp_path.iterdir():
        assert verify_file(path) is False


def test_an_index_can_list_checksums(tmp_path: Path) -> None:
    path = tmp_path / "shard.npy"
    path.write_bytes(b"123456789")
    assert file_crc32(path) == "cbf43926"  # the check value of CRC-32
    assert verify_file(path, "cbf43926")
    path.write_bytes(b"123456780")
    with pytest.raises(DamagedFileError, match=r"its CRC-32 is [0-9a-f]{8}, was cbf43926"):
        verify_file(path, "cbf43926")


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "io.pt").symlink_to("/proc/self/mem")  # reading its start is an I/O error
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    for name, reason in (("io", "Input/output"), ("loop", "symbolic links"), ("none", "No such")):
        with pytest.raises(FileError, match=rf"cannot read .*{name}\.pt: .*{reason}") as raised:
            verify_file(tmp_path / f"{name}.pt")
        assert not isinstance(raised.value, DamagedFileError)


def test_a_compressed_zip_is_not_unpacked(tmp_path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", bytes(10**6))
    (tmp_path / "bomb.pt").write_bytes(content.getvalue())
    with pytest.raises(DamagedFileError, match="compressed"):
        verify_file(tmp_path / "bomb.pt")
