"""Errors that a user can mend become one line and exit code 2; everything else keeps its traceback.

with one_line_errors():
    main(build_parser().parse_args())
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """What a user can mend: the message names the flag or file, the value and the fix."""


class FileError(UserError, OSError):
    """A file that cannot be read or written; the message names it."""


@contextmanager
def blamed_on(source: str) -> Iterator[None]:
    """Turn a ValueError of the body into a `UserError` that starts with its source.

    For values whose check lives below `common`, such as a `DiTConfig` made of flags.

    Args:
        source: flag or file, such as "--mlp-ratio 0.3" or a path.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the script with one line for a `UserError` or an `OSError`, which names a file.

    Ranks but the first put their number before it. The exit code is 2, and 130 after Ctrl-C.
    """
    script = Path(sys.argv[0]).name
    rank = os.environ.get("RANK", "0")
    where = script if rank == "0" else f"{script} (rank {rank})"
    try:
        yield
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (UserError, OSError) as error:
        print(f"{where}: error: {printable(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{where}: interrupted", file=sys.stderr)
        sys.exit(130)


def printable(text: str) -> str:
    """Escape what would control a terminal: names in files and folders are other people's."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
