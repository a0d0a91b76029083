"""Files that are whole or not there, and checksums that tell when one has changed since.

1. `atomic_write`: a file gets its name when it is complete; `readable`: opened, or a `FileError`.
2. `verify_file`: one call for every kind of file that carries a checksum; `file_crc32` for an index
   that lists the checksums of other files; `UNSEALED` and `seal` for JSON and .safetensors files,
   which carry their own; `check_zip` for a first look.

A checksum is a CRC-32: it finds every flipped bit and, but for one in four billion, every hole, at
about 5 GB/s from the page cache with one thread (SHA-256 1 to 2, BLAKE2b 1), so the disk decides.
It is no protection against someone who changes a file on purpose.
"""

import json
import os
import re
import struct
import tempfile
import uuid
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom, BufferedReader
from pathlib import Path

from common.errors import FileError

# What a file holds until `seal` puts its checksum there: an entry of a JSON object or of the
# metadata of a .safetensors file.
UNSEALED = {"crc32": "00000000"}
_SEAL = re.compile(rb'"crc32": ?"([0-9a-f]{8})"')
# How a file of that name begins if it has no checksum of its own: as JSON, or as a pickle.
_FIRST_BYTES = {".safetensors": b"{", ".json": b"{", ".pt": b"\x80"}
_CHUNK = 2**20  # bytes read at a time
_MAX_HEADER = 2**30  # bytes of JSON that are looked at


OpenFile = BufferedReader | BufferedRandom


class DamagedFileError(FileError):
    """A file that can be read, but not as it was written: cut short, a flipped bit, a hole."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success the file written there becomes `path`.

    The name is this writer's own, `NAME.HEX.tmp`, so two writers never mix; the last one wins.

    Raises:
        FileError: the write failed; the message names `path`, whose former content is untouched.
    """
    path = Path(path)
    temp = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        with open(temp, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:
        # torch and safetensors wrap the reason, such as a full disk
        hidden = None if isinstance(error, OSError) else error.__context__
        raise FileError(f"could not write {path}: {hidden or error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # not imported: every script comes by here
            raise
        raise FileError(f"could not write {path}: {error}") from error
    finally:
        with suppress(OSError):  # whose message would replace the one above
            temp.unlink(missing_ok=True)


def check_folder(path: str | Path) -> None:
    """Look whether a file can be written at `path`, and write nothing; folders can be made.

    Raises:
        FileError: the folder it would be in is none, or does not let this user write.
    """
    folder = next(folder for folder in Path(path).absolute().parents if folder.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise FileError(f"{path}: {folder} is no folder that this user may write to")


def make_writable(folder: str | Path, flag: str) -> Path:
    """Return a folder that takes new files, made if it is not there: before the work, not after.

    Args:
        folder: its path.
        flag: that gave it, for the message.

    Raises:
        FileError: it can't be made or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise FileError(f"{flag} {folder} can't be written to: {error.strerror}") from error


@contextmanager
def readable(path: str | Path) -> Iterator[BufferedReader]:
    """Open a file for reading; what the system refuses becomes a `FileError` that names it."""
    try:
        with open(path, "rb") as file:
            yield file
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------- checksums


def file_crc32(path: str | Path) -> str:
    """Return the CRC-32 of a file as eight hex digits, for an index that lists files.

    Raises:
        FileError: the file cannot be read.
    """
    with readable(Path(path)) as file:
        return f"{_crc32(file):08x}"


def verify_file(path: str | Path, expected: str | None = None) -> bool:
    """Compare a file with the checksum that an index has for it, or that it carries itself.

    A zip, as `torch.save` writes, carries one for each of its records; a JSON or .safetensors file
    does if `seal` was called on it.

    Args:
        path: of the file, which is read once from start to end.
        expected: its `file_crc32`; None takes the file's own.

    Returns:
        Whether there was a checksum: files of other programs, or of ours before there were any,
        have none.

    Raises:
        DamagedFileError: the file is not what was written.
        FileError: the file cannot be read, so nothing is known about it.
    """
    path = Path(path)
    if expected is not None:
        if (found := file_crc32(path)) != expected:
            raise DamagedFileError(f"{path} is damaged: its CRC-32 is {found}, was {expected}")
        return True
    with readable(path) as file:
        if _starts_as_zip(file) or zipfile.is_zipfile(file):
            _verify_zip(path, file)
            return True
        found_seal = _find_seal(path, file)
        if found_seal is None:
            return False
        place, written = found_seal
        if (found := f"{_crc32(file, place):08x}") != written:
            raise DamagedFileError(f"{path} is damaged: its CRC-32 is {found}, was {written}")
        return True


def seal(path: str | Path) -> None:
    """Put the checksum of a just written JSON or .safetensors file in the place of `UNSEALED`.

    It is the CRC-32 of the file with "00000000" in that place, so the file carries it wherever it
    is copied to.

    Args:
        path: a file whose JSON, or whose metadata, has the entry `UNSEALED`; usually still under
            its temporary name, see `atomic_write`.
    """
    path = Path(path)
    with open(path, "r+b") as file:
        found = _find_seal(path, file)
        assert found is not None, f"{path} has no entry {UNSEALED}"
        place, _ = found
        checksum = _crc32(file, place)
        file.seek(place)
        file.write(f"{checksum:08x}".encode())


def _crc32(file: OpenFile, seal_at: int | None = None) -> int:
    """Return the CRC-32 of an open file, with zeros for the eight digits of its seal."""
    buffer = memoryview(bytearray(_CHUNK))
    file.seek(0)
    checksum = position = 0
    while size := file.readinto(buffer):
        if seal_at is not None:
            low, high = max(seal_at - position, 0), min(seal_at + 8 - position, size)
            if low < high:
                buffer[low:high] = b"0" * (high - low)
        checksum = zlib.crc32(buffer[:size], checksum)
        position += size
    return checksum


def _find_seal(path: Path, file: OpenFile) -> tuple[int, str] | None:
    """Return where the digits of a file's checksum begin, and the digits; None if it has none."""
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(9)
    if head[8:9] == b"{" and head[:1] != b"{":
        start, length = 8, struct.unpack("<Q", head[:8])[0]
    elif head[:1] == b"{":
        start, length = 0, size
    elif path.suffix in _FIRST_BYTES and not head.startswith(_FIRST_BYTES[path.suffix]):
        raise DamagedFileError(f"{path} is damaged: its first bytes are {head!r}")
    else:
        return None
    if start + length > size or length > _MAX_HEADER:
        raise DamagedFileError(f"{path} is damaged: {size} bytes, less than its header says")
    file.seek(start)
    header = file.read(length)
    try:
        content = json.loads(header)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error
    place = content.get("__metadata__") if start else content
    if not isinstance(place, dict) or "crc32" not in place:
        return None
    digits = _SEAL.search(header)
    if digits is None:
        raise DamagedFileError(f"{path} is damaged: its checksum is {place['crc32']!r}")
    return start + digits.start(1), digits[1].decode()


def check_zip(path: str | Path) -> None:
    """Look whether a file of `torch.save` has its end, which tells what is in it.

    Raises:
        DamagedFileError: it was cut short, or does not begin as such a file.
        FileError: it cannot be read.
    """
    path = Path(path)
    with readable(path) as file:
        if not _starts_as_zip(file):
            raise DamagedFileError(f"{path} is damaged: it does not begin as a torch file")
        if not zipfile.is_zipfile(file):
            size = os.fstat(file.fileno()).st_size
            raise DamagedFileError(f"{path} is damaged: cut to {size} bytes, without a directory")
        with _open_zip(path, file):
            pass


def _starts_as_zip(file: OpenFile) -> bool:
    """Tell whether a file begins as a zip; its end is read too, for `zipfile`'s sake."""
    starts = file.read(4) == b"PK\x03\x04"
    file.seek(-min(os.fstat(file.fileno()).st_size, 2**16), os.SEEK_END)
    file.read()  # zipfile takes an I/O error here for "not a zip"
    return starts


def _verify_zip(path: Path, file: OpenFile) -> None:
    """Read all records of a zip and compare them with their checksums."""
    with _open_zip(path, file) as archive:
        if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise DamagedFileError(f"{path} is no torch file: its records are compressed")
        if (damaged := archive.testzip()) is not None:
            raise DamagedFileError(f"{path} is damaged: the checksum of {damaged} is wrong")


@contextmanager
def _open_zip(path: Path, file: OpenFile) -> Iterator[zipfile.ZipFile]:
    """Open a zip; what is found wrong with it is a `DamagedFileError`."""
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        size = os.fstat(file.fileno()).st_size
        raise DamagedFileError(f"{path} is damaged: {size} bytes, {error}") from error
    except OSError:
        raise
    except Exception as error:  # zipfile has no common class for what it finds wrong
        raise DamagedFileError(f"{path} is damaged: {error}") from error
