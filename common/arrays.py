"""The header of a .npy file, read without its values."""

import math
from typing import BinaryIO, NamedTuple

import numpy as np


class ArrayHeader(NamedTuple):
    """What the values after a header are."""

    shape: tuple[int, ...]
    dtype: np.dtype
    column_major: bool
    offset: int  # bytes of the file before the values

    @property
    def end(self) -> int:
        """Bytes of the file up to the last value."""
        return self.offset + math.prod(self.shape) * self.dtype.itemsize


def array_header(file: BinaryIO) -> ArrayHeader:
    """Read the header of a .npy file from where `file` is, up to its first value.

    Raises:
        ValueError: that is no .npy file, or it holds Python objects.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, column_major, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded")
    return ArrayHeader(shape, dtype, column_major, file.tell())
