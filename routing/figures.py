"""What the routing figures share: flags, colours, a grid of heatmaps with one colour scale, saving.

Shapes: L layers, E experts, X rows of one heatmap.
"""

import argparse
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.colors import TwoSlopeNorm, to_hex, to_rgb

from common.errors import FileError, UserError
from common.files import atomic_write, make_writable
from common.flags import FlagParser, number
from routing.tables import HALVES, UNCONDITIONAL, RoutingData, refuse_foreign

FORMATS = (".png", ".svg", ".pdf")
MAKER = "DiT-MoE routing figure"  # in the metadata of every file, so that it is known again

# Blue: below the even load, white: even, red: above; told apart by every kind of colour vision.
LOAD_COLORS = "RdBu_r"
# Okabe & Ito's eight colours, which stay apart for colour-blind readers.
EXPERT_COLORS = (
    *("#E69F00", "#56B4E9", "#009E73", "#F0E442"),
    *("#0072B2", "#D55E00", "#CC79A7", "#000000"),
)
# The same for lines on white, without the yellow that is too light for them.
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
mpl.use("Agg")
# The style of every figure, here and in scripts/.
mpl.rcParams["text.parse_math"] = False  # a class may be called "$5"
mpl.rcParams["text.usetex"] = False
mpl.rcParams["axes.prop_cycle"] = cycler(color=LINE_COLORS)

OVERLAY = 0.85  # opacity of expert colours over a picture
# Grays of that picture, 0 = black: a narrow range, so that a dark patch makes no other expert.
FAINT = (0.3, 0.7)
MAX_LABELLED_ROWS, MAX_LABELLED_COLUMNS = 18, 8  # beyond that, every so many
NOTE_SIZE, TITLE_SIZE = 8, 11  # points
BAR_LABEL_SIZE = 9  # points
BAR_SHARE = 0.8  # length of the colour bar in the height of all panels
BESIDE_PANELS = 1.5  # inches of a figure's height above and below the panels, without the note
MIN_BAR = 1.0  # inches; the bar of one row of maps is longer
MAX_SIDE = 2**16 - 1  # pixels that matplotlib draws


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


def faint(pictures: np.ndarray) -> np.ndarray:
    """Return the gray of pictures (..., C) uint8 under the colours of experts, (...) in `FAINT`."""
    low, high = FAINT
    return low + (high - low) * pictures.mean(axis=-1) / 255


def add_figure_flags(parser: FlagParser, out: str) -> None:
    """Add the flags that every figure has."""
    data = parser.group("Figure")
    data.add("--data", required=True, metavar="NPZ", help="File of expert_data.py to draw.")
    data.add("--out", default=out, metavar="FILE", help="Figure to write: .png, .svg or .pdf.")
    data.add(
        "--half",
        choices=HALVES,
        default="conditional",
        help="With guidance every picture runs through the network with its class (conditional) "
        "and without: which of the two to draw.",
    )
    data.add(
        "--layers",
        nargs="+",
        type=number(int, 0),
        metavar="L",
        help="Numbers of the layers to draw. Default: all.",
    )
    data.add(
        "--vmax",
        type=number(float, 1.01, 10**6),
        metavar="LOAD",
        help="Top of the colour scale, relative to the even load. Default: every token.",
    )
    data.add("--dpi", type=number(int, 20, 1000), default=110, help="Dots per inch of a PNG.")


def check_out(path: str | Path) -> None:
    """Refuse a file that can't be written, or is not a figure of ours, before any work.

    Raises:
        FileError: naming the file.
    """
    path = Path(path)
    if path.suffix not in FORMATS:
        raise FileError(f"--out {path}: expected .png, .svg or .pdf")
    refuse_foreign(path, MAKER.encode(), b"Matplotlib v")  # as of before MAKER
    make_writable(path.parent, "--out")


def pick_layers(args: argparse.Namespace, data: RoutingData) -> list[int]:
    """Return which of the L layers to draw: those of `--layers`, by default all.

    Raises:
        UserError: if there is no such layer, or it has no experts.
    """
    if args.layers is None:
        return list(range(len(data.layers)))
    for layer in args.layers:
        if layer >= data.config.depth:
            raise UserError(f"--layers {layer}: expected numbers in [0, {data.config.depth - 1}]")
        if layer not in data.layers:
            raise UserError(f"--layers {layer}: that block has no experts")
    return [data.layers.index(layer) for layer in args.layers]


# ------------------------------------------------------------------------------ words


def figure_title(what: str, args: argparse.Namespace, data: RoutingData) -> str:
    """Say what is drawn, of which model, from how many images: three short lines."""
    half = f", {args.half} half" if data.both_halves else ""
    return "\n".join([f"{what}{half}", *data.title.split("; ")])


def half_note(args: argparse.Namespace, data: RoutingData) -> str:
    """Explain the half that is drawn, "" where there is but one."""
    if not data.both_halves:
        return ""
    with_class = "with it" if args.half == "conditional" else "without"
    return (
        "Guidance runs every picture through the network with its class and without; the "
        f"{args.half} half is what happened {with_class}."
    )


def unconditional_note(data: RoutingData) -> str:
    """Explain the expert that has no number, "" where there is none."""
    if not data.config.unconditional_expert:
        return ""
    return (
        f"{UNCONDITIONAL} is the unconditional expert, which serves the images without a class "
        "and no others."
    )


def nmi_note(factor: str) -> str:
    """Explain the number above the panels of a figure by class, step or patch."""
    return (
        f"NMI, normalised mutual information: how much the {factor} tells about the expert; "
        f"0 = nothing, 1 = the {factor} decides."
    )


def add_note(figure: plt.Figure, *sentences: str) -> None:
    """Make the figure taller and write sentences below it; panels keep their size."""
    width, height = figure.get_size_inches()
    text = wrap(" ".join(filter(None, sentences)), width - 0.2, NOTE_SIZE)
    if not text:
        return
    inches = (text.count("\n") + 1) * NOTE_SIZE * 1.25 / 72 + 0.15
    figure.set_size_inches(width, height + inches)
    share = inches / (height + inches)
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, share, 1, 1 - share))
    figure.text(0.1 / width, 0.05 / (height + inches), text, fontsize=NOTE_SIZE, color="0.25")


def wrap(text: str, inches: float, points: float) -> str:
    """Break each line so that letters of that size, on average half as wide, stay within."""
    most = max(int(inches * 72 / (0.53 * points)), 10)
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, most))


# ------------------------------------------------------------------------------ heatmaps


def relative_load(counts: Any, num_experts: int | None = None) -> np.ndarray:
    """Divide counts (..., E) by the even load: 1 = even, 0 = never, E / K = every token.

    NaN where nothing was counted, as at steps without guidance in the unconditional half.

    Args:
        counts: how often each expert was chosen.
        num_experts: over which a load can be even, those that are routed; E if absent.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    share = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    return share * (num_experts or counts.shape[-1])


def load_scale(args: argparse.Namespace, data: RoutingData) -> TwoSlopeNorm:
    """Return the colour scale of all figures: 0 = never, 1 = even, `--vmax` or E / K = every token.

    It does not depend on the counts, so figures of one model can be compared.
    """
    config = data.config
    most = args.vmax or max(config.num_experts / config.experts_per_token, 1.01)
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
    notes: Sequence[str] = (),
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
        notes: sentences to write below.
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
    set_ticks(axes[0, 0].set_xticks, xticks, MAX_LABELLED_COLUMNS, always=(UNCONDITIONAL,))
    set_ticks(axes[0, 0].set_yticks, yticks, MAX_LABELLED_ROWS)
    for column in range(columns):  # the lowest panel of each column, also of short columns
        lowest = axes[(len(panels) - 1 - column) // columns, column]
        lowest.tick_params(labelbottom=True)
        lowest.set_xlabel(xlabel, fontsize=9)
    figure.supylabel(ylabel, fontsize=10)
    most = max(np.nanmax(panel) for panel in panels)
    add_color_bar(
        figure, image, norm, color_label, most=most, axes=[a for a in axes.flat if a.figure]
    )
    figure.suptitle(wrap(title, size[0], TITLE_SIZE), fontsize=TITLE_SIZE)
    add_note(figure, *notes)
    return figure


def set_ticks(
    setter: Callable, names: Sequence[str], most: int, always: Sequence[str] = ()
) -> None:
    """Label the rows or columns of a heatmap, or every so many of them, and some in any case."""
    step = tick_step(len(names), most)
    chosen = [i for i, name in enumerate(names) if i % step == 0 or name in always]
    setter(chosen, [names[i] for i in chosen])


def add_color_bar(
    figure: plt.Figure, image: Any, norm: TwoSlopeNorm, label: str, *, most: float, axes: Any
) -> None:
    """Add the one colour bar, with ticks that say what 0, 1 and the top mean.

    Its end is an arrow if `most`, the greatest value drawn, lies above the scale. The label is
    broken into lines that are no longer than the bar.
    """
    top = float(norm.vmax or 1)
    extend = "max" if most > top * 1.001 else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend, shrink=BAR_SHARE, pad=0.02, aspect=30)
    ticks = [0, 0.5, 1, (1 + top) / 2, top]
    bar.set_ticks(ticks, labels=["0 never", "0.5", "1 even", *(f"{t:.2g}" for t in ticks[3:])])
    bar.ax.tick_params(labelsize=8)
    length = max(BAR_SHARE * (figure.get_figheight() - BESIDE_PANELS), MIN_BAR)
    bar.set_label(wrap(label, length, BAR_LABEL_SIZE), fontsize=BAR_LABEL_SIZE)


def save_figure(figure: plt.Figure, path: str | Path, dpi: int) -> None:
    """Write the figure in the format of its suffix, all of it or nothing.

    Raises:
        FileError: it can't be written; see `check_out`.
        UserError: `dpi` makes it larger than a picture can be.
    """
    path = Path(path)
    check_out(path)
    key = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}[path.suffix]
    pixels = int(max(figure.get_size_inches()) * dpi)
    if path.suffix == ".png" and pixels > MAX_SIDE:
        raise UserError(f"--dpi {dpi}: this figure would have {pixels:,} pixels, {MAX_SIDE:,} fit")
    with atomic_write(path) as temp:
        figure.savefig(temp, format=path.suffix[1:], dpi=dpi, metadata={key: MAKER})
    plt.close(figure)
