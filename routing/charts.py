"""Small charts of a page as SVG text: they fit any width and take the page's colour of text.

`load_bars`, `pair_table` and `weight_table`; experts have the colours of `figures.expert_colors`.

Shapes: T patches, E experts, S steps.
"""

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

WIDTH = 360  # units of every chart, shown about as many pixels wide
FONT = 12
ROW = 20  # height of a bar
LEFT = 34  # room for an expert's number
SHADE = (0, 114, 178)  # of a table's cells, over the page's own background
MAX_TICKS = 8


def load_bars(counts: Tensor, even: float, colors: Sequence[str], names: Sequence[str]) -> str:
    """Draw how many patches each expert has.

    Args:
        counts: (E,) patches.
        even: what each would have if all had as many; a dashed line.
        colors: of the experts, as `#rrggbb`.
        names: of the experts.
    """
    most = max(int(counts.max()), math.ceil(even), 1)
    room = WIDTH - LEFT - 44  # for the number behind the longest bar
    parts = []
    for expert, (count, color) in enumerate(zip(counts.tolist(), colors, strict=True)):
        top, length = expert * ROW, room * count / most
        parts.append(_label(names[expert], top, ROW))
        parts.append(_box(LEFT, top + 2, length, ROW - 4, f'fill="{color}" {OUTLINE}'))
    height, x = len(counts) * ROW, LEFT + room * even / most
    parts.append(
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="currentColor" '
        'stroke-dasharray="3 3"/>'
    )
    parts.append(_text(x, height + FONT, f"even: {even:.3g}", "middle"))
    for expert, count in enumerate(counts.tolist()):  # over the line, and legible there
        parts.append(_text(LEFT + room * count / most + 6, (expert + 0.5) * ROW, str(count)))
    described = ", ".join(f"expert {i}: {count}" for i, count in enumerate(counts.tolist()))
    return _svg(parts, height + FONT + 10, f"Patches of each expert. {described}")


def pair_table(pairs: Tensor, names: Sequence[str]) -> str:
    """Draw how many patches chose both of two experts: (E, E) counts, each pair once."""
    num_experts = len(pairs)
    size = (WIDTH - LEFT) / num_experts
    height = min(size, 30)
    off_diagonal = pairs.tril(-1)
    most = max(int(off_diagonal.max()), 1)
    parts = []
    for row in range(1, num_experts):
        top = (row - 1) * height
        parts.append(_label(names[row], top, height))
        for column in range(row):
            count = int(pairs[row, column])
            parts.append(_cell(LEFT + column * size, top, size, height, count / most, str(count)))
    bottom = (num_experts - 1) * height
    for column in range(num_experts - 1):
        parts.append(_text(LEFT + (column + 0.5) * size, bottom + FONT, names[column], "middle"))
    return _svg(parts, bottom + FONT + 10, "Patches that chose both of two experts")


def weight_table(weights: Tensor, step: int, times: Sequence[float], names: Sequence[str]) -> str:
    """Draw the weights that one patch gave each expert at each step.

    Args:
        weights: (S, E), NaN where the expert was not chosen.
        step: the one to frame.
        times: t of each step.
        names: of the experts.
    """
    num_steps, num_experts = weights.shape
    width = (WIDTH - LEFT - 2) / num_steps
    most = max(float(weights.nan_to_num(0).abs().max()), 1e-9)
    parts = []
    for expert in range(num_experts):
        top = expert * ROW
        parts.append(_label(names[expert], top, ROW))
        parts.append(
            _box(LEFT, top + 1, WIDTH - LEFT - 2, ROW - 2, 'fill="currentColor" opacity="0.06"')
        )
        for column, weight in enumerate(weights[:, expert].tolist()):
            if not math.isnan(weight):
                text = f"{weight:.2f}" if width >= 34 else ""
                share = abs(weight) / most
                parts.append(_cell(LEFT + column * width, top + 1, width, ROW - 2, share, text))
    height = num_experts * ROW
    frame = f'fill="none" stroke="{FRAME}" stroke-width="2.5"'
    parts.append(_box(LEFT + step * width, 1, max(width, 3), height - 2, frame))
    for column in {0, num_steps - 1, *range(0, num_steps, math.ceil(num_steps / MAX_TICKS))}:
        near_end = num_steps - 1 - column < math.ceil(num_steps / MAX_TICKS) / 2
        if column in (0, num_steps - 1) or not near_end:
            anchor = "end" if column == num_steps - 1 and num_steps > 1 else "middle"
            x = LEFT + (column + (1 if anchor == "end" else 0.5)) * width
            parts.append(_text(x, height + FONT, f"{times[column]:.2g}", anchor))
    parts.append(_text(0, height + FONT, "t"))
    return _svg(parts, height + FONT + 10, "Weights of one patch's experts over the steps")


# ------------------------------------------------------------------------------ shapes

OUTLINE = 'stroke="currentColor" stroke-width="0.5"'
FRAME = "#D55E00"
# What is behind a text is parted from it by the colour of the page, which Gradio names so.
HALO = 'style="paint-order:stroke;stroke:var(--body-background-fill,white);stroke-width:3px"'


def _svg(parts: Sequence[str], height: float, description: str) -> str:
    style = f"width:100%;max-width:{WIDTH * 1.5:g}px;height:auto;display:block"
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:g}" style="{style}" font-size="{FONT}" '
        f'fill="currentColor" role="img" aria-label="{escape(description)}">'
        f"{''.join(parts)}</svg>"
    )


def _box(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" {style}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = "currentColor") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central"'
    halo = HALO if fill == "currentColor" else ""
    return f'<text {place} fill="{fill}" {halo}>{escape(text)}</text>'


def _label(name: str, top: float, height: float) -> str:
    """Write an expert's name before its row."""
    return _text(LEFT - 6, top + height / 2, name, "end")


def _cell(x: float, y: float, width: float, height: float, share: float, text: str) -> str:
    """Draw a cell whose shade says a share in [0, 1], and a number in it if there is room."""
    shade = "rgb({},{},{})".format(*SHADE)
    box = _box(x, y, width, height, f'fill="{shade}" fill-opacity="{0.08 + 0.92 * share:.3f}"')
    if not text or width < FONT * 0.62 * len(text) or height < FONT:
        return box
    color = "white" if share > 0.5 else "inherit"
    return box + _text(x + width / 2, y + height / 2, text, "middle", color)
