"""What the routing figures share: flags, colours, a grid of heatmaps with one colour scale, saving.

Shapes: L layers, E experts, X rows of one heatmap.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm, to_hex, to_rgb

from common.files import atomic_write
from common.flags import FlagParser, number
from routing_data import HALVES, RoutingData

mpl.use("Agg")

# Blue: below the even load, white: even, red: above; told apart by every kind of colour vision.
LOAD_COLORS = "RdBu_r"
# Okabe & Ito's eight colours, which stay apart for colour-blind readers.
EXPERT_COLORS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442"),
    *("#0072B2", "#D55E00", "#CC79A7", "#000000"),
)
MAX_LABELLED_ROWS, MAX_LABELLED_COLUMNS = 18, 8  # beyond that, every so many


def expert_colors(num_experts: int) -> list[str]:
    """Return a colour per expert in hex; past eight, the eight again in lighter shades."""
    shades = math.ceil(num_experts / len(EXPERT_COLORS))
    colors = []
    for expert in range(num_experts):
        shade, index = divmod(expert, len(EXPERT_COLORS))
        white = 0.8 * shade / shades
        rgb = np.array(to_rgb(EXPERT_COLORS[index])) * (1 - white) + white
        colors.append(to_hex(tuple(rgb)))
    return colors


def add_figure_flags(parser: FlagParser, out: str) -> None:
    """Add the flags that every figure has."""
    data = parser.group("Figure")
    data.add("--data", required=True, help=".npz of expert_data.py")
    data.add("--out", default=out, help="file to write: .png, .svg or .pdf")
    data.add("--half", choices=HALVES, default="conditional", help="half of the guided batch")
    data.add("--layers", nargs="+", type=number(int, 0), help="layers to draw; default: all")
    data.add("--vmax", type=number(float, 1.01), help="top of the scale; default: every token")
    data.add("--dpi", type=number(int, 20), default=110, help="dots per inch of a PNG")


def pick_layers(args: argparse.Namespace, depth: int) -> list[int]:
    """Return `--layers`, by default all.

    Raises:
        ValueError: if there is no such layer.
    """
    layers = args.layers or list(range(depth))
    if max(layers) >= depth:
        raise ValueError(f"--layers {max(layers)}: expected numbers in [0, {depth - 1}]")
    return layers


def figure_title(what: str, args: argparse.Namespace, data: RoutingData) -> str:
    """Say what is drawn, of which model, from how many images: three short lines."""
    return "\n".join([f"{what}, {args.half} half", *data.title.split("; ")])


def relative_load(counts: Any, axis: int = -1) -> np.ndarray:
    """Divide counts by the even load along an axis: 1 = even, 0 = never, E / K = every token.

    NaN where nothing was counted, as at steps without guidance in the unconditional half.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=axis, keepdims=True)
    return np.where(total > 0, counts / np.maximum(total, 1), np.nan) * counts.shape[axis]


def load_scale(args: argparse.Namespace, data: RoutingData) -> TwoSlopeNorm:
    """Return the colour scale of all figures: 0 = never, 1 = even, `--vmax` or E / K = every token.

    It does not depend on the counts, so figures of one model can be compared.
    """
    config = data.config
    most = args.vmax or max(config.num_experts / config.num_experts_per_tok, 1.01)
    return TwoSlopeNorm(vmin=0, vcenter=1, vmax=most)


def tick_step(count: int, most: int) -> int:
    """Return the distance of labels, 1, 2 or 5 times 10^n, so that there are at most `most`."""
    nice = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    return next(step for step in nice if count <= step * most)


def grid_columns(count: int) -> int:
    """Return how many panels to put side by side: a wide grid with the fewest holes."""
    root = math.sqrt(count)
    choices = range(math.ceil(root), math.ceil(2 * root) + 1)
    return min(choices, key=lambda columns: (-count % columns, abs(columns - 1.4 * root)))


def heatmap_grid(
    panels: Sequence[np.ndarray] | np.ndarray,
    titles: Sequence[str],
    norm: TwoSlopeNorm,
    *,
    title: str,
    xlabel: str,
    ylabel: str,
    xticks: Sequence[str],
    yticks: Sequence[str],
    color_label: str,
    panel_size: tuple[float, float],
) -> plt.Figure:
    """Draw heatmaps side by side on one colour scale, NaN in grey.

    Args:
        panels: (X, E) each.
        titles: one per panel.
        norm: the colour scale.
        title: of the figure.
        xlabel: meaning of the columns.
        ylabel: meaning of the rows.
        xticks: name of each column.
        yticks: name of each row.
        color_label: meaning of the colours.
        panel_size: inches.
    """
    columns = grid_columns(len(panels))
    rows = math.ceil(len(panels) / columns)
    size = (columns * panel_size[0] + 2.4, rows * panel_size[1] + 1.5)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    colors = plt.get_cmap(LOAD_COLORS).with_extremes(bad="0.75")
    for axis, panel, name in zip(axes.flat, panels, titles, strict=False):
        image = axis.imshow(panel, norm=norm, cmap=colors, aspect="auto", interpolation="nearest")
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=7, length=2)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    set_ticks(axes[0, 0].set_xticks, xticks, MAX_LABELLED_COLUMNS)
    set_ticks(axes[0, 0].set_yticks, yticks, MAX_LABELLED_ROWS)
    for column in range(columns):  # the lowest panel of each column, also of short columns
        lowest = axes[(len(panels) - 1 - column) // columns, column]
        lowest.tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize=10)
    figure.supylabel(ylabel, fontsize=10)
    most = max(np.nanmax(panel) for panel in panels)
    add_color_bar(
        figure, image, norm, color_label, most=most, axes=[a for a in axes.flat if a.figure]
    )
    figure.suptitle(title, fontsize=11)
    return figure


def set_ticks(setter: Callable, names: Sequence[str], most: int) -> None:
    """Label the rows or columns of a heatmap, or every so many of them."""
    chosen = range(0, len(names), tick_step(len(names), most))
    setter(list(chosen), [names[i] for i in chosen])


def add_color_bar(
    figure: plt.Figure, image: Any, norm: TwoSlopeNorm, label: str, *, most: float, axes: Any
) -> None:
    """Add the one colour bar, with ticks that say what 0, 1 and the top mean.

    Its end is an arrow if `most`, the greatest value drawn, lies above the scale.
    """
    top = float(norm.vmax or 1)
    extend = "max" if most > top * 1.001 else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend, shrink=0.8, pad=0.02, aspect=30)
    ticks = [0, 0.5, 1, (1 + top) / 2, top]
    bar.set_ticks(ticks, labels=["0 never", "0.5", "1 even", *(f"{t:.2g}" for t in ticks[3:])])
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9)


def save_figure(figure: plt.Figure, path: str | Path, dpi: int) -> None:
    """Write the figure in the format of its suffix, all of it or nothing.

    Raises:
        ValueError: if the suffix is of no known format.
    """
    suffix = Path(path).suffix[1:]
    accepted = figure.canvas.get_supported_filetypes()
    if suffix not in accepted:
        raise ValueError(f"--out {path}: expected .png, .svg or .pdf")
    with atomic_write(path) as temp:
        figure.savefig(temp, format=suffix, dpi=dpi)
    plt.close(figure)
