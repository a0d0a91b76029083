"""Images as one picture for people: a grid with names above its columns."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from common.errors import FileError, UserError, printable
from common.files import atomic_write, check_folder
from common.process import check_memory

MIN_SIDE = 64  # pixels: smaller images are enlarged by a whole number
FRAME = 2  # pixels around every image
BYTES_PER_PIXEL = 20  # of a picture on its way from the autoencoder to the file


class _Format(NamedTuple):
    """How Pillow writes files of an ending."""

    name: str
    options: dict[str, Any]
    max_side: int  # pixels, of the format


FORMATS = {
    ".png": _Format("png", {}, 2**31 - 1),
    ".jpg": _Format("jpeg", {"quality": 95, "subsampling": 0}, 65_500),
    ".webp": _Format("webp", {"lossless": True}, 16_383),
}


def check_picture_path(path: str | Path) -> Path:
    """Return `path`, to which a picture may be written.

    Raises:
        FileError: its ending is of no format that is written here, it cannot be written, or it
            holds something else than a picture, which stays.
    """
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    if path.suffix not in FORMATS:
        raise FileError(f"{path}: a picture's name ends in one of {', '.join(FORMATS)}")
    if path.exists() and not path.is_file():
        raise FileError(f"{path} is no file; give another name")
    check_folder(path)
    if path.exists() and path.stat().st_size > 0:
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, Image.DecompressionBombError):
            raise FileError(f"{path} exists and is no picture; give another name") from None
    return path


def check_grid(path: Path, count: int, side: int, columns: int, flag: str) -> None:
    """Refuse a grid that no memory or not its format can hold, before its images are drawn.

    Args:
        path: as in `save_grid`.
        count: number of images.
        side: of an image, in pixels.
        columns: images in a row.
        flag: the flag and value that ask for so many.

    Raises:
        UserError: it is too large; the message begins with `flag`.
    """
    cell = side * _enlargement(side) + FRAME
    width, height = columns * cell + FRAME, math.ceil(count / columns) * cell + FRAME
    check_memory(width * height * BYTES_PER_PIXEL, flag)
    format = FORMATS[path.suffix]
    if max(width, height) > format.max_side:
        raise UserError(
            f"{flag}: {width}x{height} pixels are too many for {path}, {format.name} takes "
            f"{format.max_side} a side; take .png or fewer images"
        )


def _enlargement(side: int) -> int:
    """Return by how much images are enlarged whose shorter side has so many pixels."""
    return math.ceil(MIN_SIDE / side)  # 1 from MIN_SIDE on


def save_grid(
    images: Tensor, path: str | Path, *, columns: int, column_names: Sequence[str] = ()
) -> None:
    """Write images (N, C, H, W) in [-1, 1] as one picture, all of it or nothing.

    Args:
        images: 1 or 3 channels; small ones are enlarged, each pixel to a square, to at least
            `MIN_SIDE`. Their pixels stay exact, but in a .jpg.
        path: the file, its format by its ending; missing folders are made.
        columns: images in a row.
        column_names: written above the columns, as many as there are. "" leaves its place to the
            name on its left.

    Raises:
        FileError: see `check_picture_path`; or it could not be written, see `check_grid`.
    """
    from PIL import Image

    assert len(column_names) in (0, columns)
    path = check_picture_path(path)
    columns, column_names = min(columns, len(images)), column_names[: len(images)]
    grid = _frame(_pixels(images), columns)
    width = grid.shape[1]
    if any(column_names):
        heads = _heads(column_names, (width - FRAME) // columns, width)
        grid = np.concatenate([heads, grid])
    format = FORMATS[path.suffix]
    with atomic_write(path) as temp:
        Image.fromarray(grid).save(temp, format.name, **format.options)


def _pixels(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) in [-1, 1] as bytes (N, H, W, 3), enlarged to `MIN_SIDE`."""
    unit = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    pixels = (unit * 255 + 0.5).byte().permute(0, 2, 3, 1).numpy()
    enlarge = _enlargement(min(pixels.shape[1:3]))
    pixels = pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    return np.broadcast_to(pixels, (*pixels.shape[:3], 3))


def _frame(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Lay images (N, H, W, 3) out in rows, with black frames, as one (height, width, 3)."""
    count, height, width, _ = pixels.shape
    rows, height, width = math.ceil(count / columns), height + FRAME, width + FRAME
    grid = np.zeros((rows * height + FRAME, columns * width + FRAME, 3), np.uint8)
    for index, image in enumerate(pixels):
        row, column = divmod(index, columns)
        top, left = row * height + FRAME, column * width + FRAME
        grid[top : top + image.shape[0], left : left + image.shape[1]] = image
    return grid


def _heads(names: Sequence[str], column_width: int, width: int) -> np.ndarray:
    """Draw a line of names, white on black, (height, width, 3); too long ones end in dots."""
    from PIL import Image, ImageDraw, ImageFont

    size = max(12, column_width // 12)  # pixels; five letters and more in the narrowest column
    font = ImageFont.load_default(size=size)
    line = Image.new("RGB", (width, size * 3 // 2))
    draw = ImageDraw.Draw(line)
    for column, name in enumerate(names):
        if not name:
            continue
        following = names[column + 1 :]
        free = next((i for i, other in enumerate(following) if other), len(following))
        room = (1 + free) * column_width - FRAME
        text = name = printable(name).replace("\n", " ")
        while draw.textlength(text, font) > room and name:
            name = name[:-1]
            text = name.rstrip() + "…"
        draw.text((column * column_width + FRAME, size // 6), text, "white", font)
    return np.array(line)
