"""Files that are whole or not there."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import FileError


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
        temp.unlink(missing_ok=True)
