"""A picture under the colours of the experts that took its patches, as pixels.

`overlay` paints it, `patch_at` says which patch a click hit, `legend` names the colours in HTML.

Shapes: H W picture, T patches in G rows of G, E experts.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from routing.figures import faint
from routing.tracing import ranked_experts

SIDE = 448  # pixels, about, of what is painted
OPACITY = 0.8  # of the colours
MIN_NUMBERED = 20  # pixels of a patch that has room for its expert's number
CHOSEN = (255, 255, 255)  # the frame of the chosen patch, within a black one
MARGIN = 4  # pixels around each picture of a sheet
FRAMED = (213, 94, 0)  # around the chosen one


def overlay(
    picture: np.ndarray,
    weights: Tensor,
    colors: Sequence[str],
    names: Sequence[str],
    chosen: int | None = None,
) -> np.ndarray:
    """Paint every patch in the colour of its heaviest expert; the next ones are small squares.

    A patch that no expert chose stays gray.

    Args:
        picture: (H, W, C) uint8, square.
        weights: (T, E), NaN where an expert was not chosen.
        colors: of the experts, as `#rrggbb`.
        names: of the experts, written where there is room.
        chosen: patch to frame.

    Returns:
        (side, side, 3) uint8, see `painted_side`.
    """
    grid = math.isqrt(len(weights))
    side = painted_side(len(weights))
    cell = side // grid
    gray = Image.fromarray((255 * faint(picture)).astype(np.uint8))
    image = Image.merge("RGB", [gray.resize((side, side), Image.Resampling.NEAREST)] * 3)
    flat = image.copy()
    draw = ImageDraw.Draw(flat)
    experts = ranked_experts(weights)
    for patch, chosen_experts in enumerate(experts):
        if chosen_experts:
            draw.rectangle(_corners(patch, grid, cell), fill=colors[chosen_experts[0]])
    image = Image.blend(image, flat, OPACITY)
    draw = ImageDraw.Draw(image)
    for patch, chosen_experts in enumerate(experts):
        _mark(draw, _corners(patch, grid, cell), chosen_experts, colors, names)
    if chosen is not None:
        left, top, right, bottom = _corners(chosen, grid, cell)
        draw.rectangle((left, top, right, bottom), outline="black", width=5)
        draw.rectangle((left + 1, top + 1, right - 1, bottom - 1), outline=CHOSEN, width=2)
    return np.array(image)


def painted_side(num_patches: int) -> int:
    """Return the pixels of a side of what `overlay` paints: near `SIDE`, whole for every patch."""
    grid = math.isqrt(num_patches)
    return grid * max(SIDE // grid, 4)


def _corners(patch: int, grid: int, cell: int) -> tuple[int, int, int, int]:
    row, column = divmod(patch, grid)
    return column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1


def _mark(
    draw: ImageDraw.ImageDraw,
    corners: tuple[int, int, int, int],
    experts: Sequence[int],
    colors: Sequence[str],
    names: Sequence[str],
) -> None:
    """Part a patch from the next one, number it, and put the lighter experts along its bottom."""
    left, top, right, bottom = corners
    cell = right - left + 1
    draw.rectangle(corners, outline=(255, 255, 255), width=1)
    if not experts or cell < MIN_NUMBERED:
        return
    font = ImageFont.load_default(size=min(cell * 0.42, 22))
    middle = (left + cell * 0.5, top + cell * 0.36)
    draw.text(middle, names[experts[0]], _ink(colors[experts[0]]), font, anchor="mm")
    small = min(max(cell // 4, 5), 26)
    for rank, expert in enumerate(experts[1 : cell // (small + 2)]):
        x, y = left + 3 + rank * (small + 2), bottom - 2 - small
        draw.rectangle((x, y, x + small, y + small), fill=colors[expert], outline="white")
        if small >= MIN_NUMBERED:
            font, middle = ImageFont.load_default(size=small * 0.55), (x + small / 2, y + small / 2)
            draw.text(middle, names[expert], _ink(colors[expert]), font, anchor="mm")


def _ink(color: str) -> str:
    """Return black or white, whichever is legible on a colour."""
    red, green, blue = to_rgb(color)
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.35 else "white"


def patch_at(x: float, y: float, num_patches: int, side: float) -> int:
    """Return the patch that a click at pixel (x, y) of a square picture hit; edges count in."""
    grid = math.isqrt(num_patches)
    column, row = (min(max(int(at * grid / side), 0), grid - 1) for at in (x, y))
    return row * grid + column


def legend(colors: Sequence[str], names: Sequence[str]) -> str:
    """Name the experts' colours in a line of HTML; names are ours."""
    square = "display:inline-block;width:.9em;height:.9em;border:1px solid;margin:0 .3em 0 .9em"
    items = [
        '<span style="white-space:nowrap">'
        f'<span style="{square};background:{color}"></span>{name}</span>'
        for color, name in zip(colors, names, strict=True)
    ]
    return " ".join(items)


# ------------------------------------------------------------------------------ several pictures


def contact_sheet(pictures: np.ndarray, chosen: int | None = None) -> np.ndarray:
    """Lay pictures out in a square of rows, enlarged by whole numbers to about `SIDE`.

    Args:
        pictures: (N, H, W, C) uint8.
        chosen: the one to frame, where there are several.

    Returns:
        (height, width, 3) uint8.
    """
    count, height, width, _ = pictures.shape
    columns = sheet_columns(count)
    rows = math.ceil(count / columns)
    enlarge = max(1, round((SIDE / columns - 2 * MARGIN) / width))
    pixels = np.broadcast_to(pictures, (*pictures.shape[:3], 3))
    pixels = pixels.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    cell = (height * enlarge + 2 * MARGIN, width * enlarge + 2 * MARGIN)
    sheet = np.full((rows * cell[0], columns * cell[1], 3), 255, np.uint8)
    for index, image in enumerate(pixels):
        top, left = (index // columns) * cell[0], (index % columns) * cell[1]
        if index == chosen and count > 1:
            sheet[top + 1 : top + cell[0] - 1, left + 1 : left + cell[1] - 1] = FRAMED
        sheet[top + MARGIN : top + cell[0] - MARGIN, left + MARGIN : left + cell[1] - MARGIN] = (
            image
        )
    return sheet


def sheet_columns(count: int) -> int:
    """Return how many columns a contact sheet has."""
    return math.ceil(math.sqrt(count))


def picture_at(x: float, y: float, count: int, size: tuple[int, int]) -> int:
    """Return which of `count` pictures a click at (x, y) hit on a sheet of (height, width)."""
    columns = sheet_columns(count)
    rows = math.ceil(count / columns)
    column = min(max(int(x * columns / size[1]), 0), columns - 1)
    row = min(max(int(y * rows / size[0]), 0), rows - 1)
    return min(row * columns + column, count - 1)
