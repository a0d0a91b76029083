"""Draw which experts each layer uses: overall, by patch, by denoising step, in pairs, in a picture.

    python heatmap_layer.py --data results/routing.npz --by step --out results/step.png

--by expert  layers x experts: the load, and the router's mean probability beside it
--by patch   a panel per layer, patches x experts
--by map     a little map per layer and expert, laid out as the image (the paper's figure 6)
--by step    a panel per layer, denoising steps x experts (the paper's figure 7)
--by pair    a panel per layer, experts x experts: which are chosen together
--by sample  which expert took which patch of one picture, layer by layer and step by step

Source: arXiv:2407.11633, figures 6 and 7.
"""

import argparse
import math
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, NoNorm
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from common.errors import UserError, one_line_errors, printable
from common.flags import FlagParser, number
from routing import normalized_mutual_information
from routing.figures import (
    LOAD_COLORS,
    OVERLAY,
    TITLE_SIZE,
    add_color_bar,
    add_figure_flags,
    add_note,
    check_out,
    expert_colors,
    faint,
    figure_title,
    half_note,
    heatmap_grid,
    load_scale,
    nmi_note,
    pick_layers,
    relative_load,
    save_figure,
    unconditional_note,
    wrap,
)
from routing.tables import HALVES, RoutingData

MAP_INCHES = 0.6  # of one layer and expert
MIN_INCHES = 4.5  # width that a title needs
MAX_SAMPLE_LAYERS = 8  # rows of the strip unless --layers says otherwise

MAX_LEGEND_ROWS = 24
MAX_NUMBERED_SIDE = 8  # patches a side up to which experts are also written, not only coloured
NUMBER_STYLE: Any = {
    "fontsize": 6,
    "color": "white",
    "path_effects": [withStroke(linewidth=1.2, foreground="black")],
}


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    add_figure_flags(parser, "results/layer.png")
    layer = parser.group("Layers")
    layer.add("--by", choices=list(FIGURES), default="step", help="What to draw, see above.")
    layer.add(
        "--sample",
        type=number(int, 0),
        default=0,
        metavar="I",
        help="Number of the picture of --by sample.",
    )
    layer.add(
        "--num-columns",
        type=number(int, 1, 50),
        default=8,
        metavar="N",
        help="Number of steps that --by sample shows.",
    )
    return parser


def by_expert(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw layers x experts: what was chosen, and the mean router probability."""
    layers = pick_layers(args, data)
    load = data.counts("step", args.half).sum(dim=1)[layers]  # (layers, E)
    probs, routed = data.mean_probs(args.half)[layers], data.config.num_experts
    return heatmap_grid(
        [relative_load(load, routed), np.asarray(probs) * routed],
        ["chosen", "mean router probability"],
        load_scale(args, data),
        title=figure_title("Load of the experts", args, data),
        xlabel="expert",
        ylabel="layer",
        xticks=data.expert_names,
        yticks=[str(data.layers[i]) for i in layers],
        color_label="relative to even",
        panel_size=(3.4, max(3.0, 0.16 * len(layers))),
        notes=(half_note(args, data), unconditional_note(data)),
    )


def by_factor(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw a panel per layer: patches or steps x experts."""
    layers = pick_layers(args, data)
    counts = data.counts(args.by, args.half)[layers]
    nmi = normalized_mutual_information(counts, data.config.experts_per_token)
    rows = {
        "patch": ("patch, row by row from the top left", map(str, range(counts.shape[1]))),
        "step": ("t of the step: 1 = noise, 0 = picture", (f"{t:.2f}" for t in data.times)),
    }
    ylabel, yticks = rows[args.by]
    return heatmap_grid(
        relative_load(counts, data.config.num_experts),
        [f"layer {data.layers[i]} · NMI {value:.3f}" for i, value in zip(layers, nmi, strict=True)],
        load_scale(args, data),
        title=figure_title(f"Experts by {args.by}", args, data),
        xlabel="expert",
        ylabel=ylabel,
        xticks=data.expert_names,
        yticks=list(yticks),
        color_label=f"load of the expert within the {args.by}, relative to even",
        panel_size=(1.9, 2.2),
        notes=(nmi_note(args.by), half_note(args, data), unconditional_note(data)),
    )


def by_map(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw a little map for each layer (rows) and expert (columns), laid out as the image."""
    layers = pick_layers(args, data)
    counts = data.counts("patch", args.half)[layers]
    load = relative_load(counts, data.config.num_experts)  # (layers, T, E)
    (L, T, E), norm = load.shape, load_scale(args, data)
    side = math.isqrt(T)
    cell = side + max(side // 8, 1)  # a gap between maps
    blocks = np.array_split(np.arange(L), max(1, round(math.sqrt(L / E))))  # side by side
    width = len(blocks) * (E * MAP_INCHES + 0.5) + 0.8
    size = (max(width, MIN_INCHES), max(len(blocks[0]) * MAP_INCHES, 1.0) + 1.3)
    figure, axes = plt.subplots(1, len(blocks), figsize=size, squeeze=False, layout="constrained")
    colors = plt.get_cmap(LOAD_COLORS).with_extremes(bad="0.3")
    for axis, block in zip(axes.flat, blocks, strict=True):
        rows = len(block)
        mosaic = np.full((rows, cell, E, cell), np.nan)
        maps = load[block].reshape(rows, side, side, E)
        mosaic[:, :side, :, :side] = maps.transpose(0, 1, 3, 2)
        mosaic = mosaic.reshape(rows * cell, E * cell)[: side - cell, : side - cell]
        image = axis.imshow(mosaic, norm=norm, cmap=colors, interpolation="nearest")
        middle = (side - 1) / 2
        axis.set_xticks([middle + cell * e for e in range(E)], data.expert_names)
        names = [str(data.layers[layers[row]]) for row in block]
        axis.set_yticks([middle + cell * row for row in range(rows)], names)
        axis.tick_params(length=0)
        axis.set(xlabel="expert", ylabel="layer")
    title = figure_title("Experts by patch", args, data)
    figure.suptitle(wrap(title, size[0], TITLE_SIZE), fontsize=TITLE_SIZE)
    label = "load of the expert at the patch, relative to even"
    add_color_bar(figure, image, norm, label, most=np.nanmax(load), axes=axes)
    note = "Each small map is the picture: how often the layer sends that patch to the expert."
    add_note(figure, note, half_note(args, data), unconditional_note(data))
    return figure


def by_pair(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw experts x experts for each layer: tokens that chose both, relative to even pairs.

    Raises:
        UserError: if a token has one expert only.
    """
    if not data.has_pairs:
        raise UserError("--by pair: num_experts_per_tok is 1 here, there are no pairs")
    layers = pick_layers(args, data)
    data.counts("step", args.half)  # that half was run
    pairs = data.pairs[HALVES.index(args.half)][layers].double().numpy()
    E = pairs.shape[1]
    pairs[:, np.arange(E), np.arange(E)] = np.nan  # an expert with itself
    num_pairs = data.config.num_experts * (data.config.num_experts - 1)  # the routed alone
    even = np.nansum(pairs, axis=(1, 2), keepdims=True) / max(num_pairs, 1)
    return heatmap_grid(
        pairs / np.maximum(even, 1e-9),
        [f"layer {data.layers[i]}" for i in layers],
        load_scale(args, data),
        title=figure_title("Experts chosen together", args, data),
        xlabel="expert",
        ylabel="expert",
        xticks=data.expert_names,
        yticks=data.expert_names,
        color_label="tokens that chose both, relative to an even use of all pairs",
        panel_size=(2.1, 2.1),
        notes=(half_note(args, data), unconditional_note(data)),
    )


def by_sample(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw one picture with the first expert of each patch over it, layers x steps.

    Raises:
        UserError: if the file keeps no such picture.
    """
    num_traced, num_steps = data.traced_ids.shape[:2]
    if args.sample >= num_traced:
        raise UserError(
            f"--sample {args.sample}: this file keeps {num_traced} pictures; more: "
            "expert_data.py --traced-samples"
        )
    E = data.num_experts
    layers = pick_layers(args, data) if args.layers else evenly(len(data.layers), MAX_SAMPLE_LAYERS)
    steps = evenly(num_steps, args.num_columns)
    picture = data.traced_images[args.sample].permute(1, 2, 0).numpy()  # (H, W, C)
    experts = data.traced_ids[args.sample, ..., 0].numpy()  # (S, L, T)
    colors = ListedColormap(expert_colors(E))
    width = 1.25 * (len(steps) + 1) + 1.2
    figure, axes = plt.subplots(
        *(len(layers), len(steps) + 1),
        figsize=(width, 1.25 * len(layers) + 1.0),
        squeeze=False,
        layout="constrained",
    )
    for row, layer in enumerate(layers):
        axes[row, 0].imshow(np.broadcast_to(picture, (*picture.shape[:2], 3)))
        axes[row, 0].set_ylabel(f"layer {data.layers[layer]}", fontsize=9)
        for axis, step in zip(axes[row, 1:], steps, strict=True):
            draw_choices(axis, picture, experts[step, layer], colors)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    names = ["picture", *(f"t = {data.times[step]:.2f}" for step in steps)]
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    legend = [Patch(color=colors(e), label=name) for e, name in enumerate(data.expert_names)]
    place: Any = {"loc": "outside right center", "ncols": math.ceil(E / MAX_LEGEND_ROWS)}
    figure.legend(handles=legend, title="expert", fontsize=9, **place)
    name = data.class_names[int(data.traced_labels[args.sample])]
    title = f"First expert of each patch, class: {name}"
    figure.suptitle(wrap(title, width, TITLE_SIZE), fontsize=TITLE_SIZE)
    note = "Colour: the expert with the largest weight. t = 1 is noise, t = 0 the picture."
    nobody = "" if data.config.selection == "token_choice" else "A patch without a colour has none."
    add_note(figure, note, nobody)
    return figure


def evenly(count: int, most: int) -> list[int]:
    """Return at most so many of the numbers 0..count-1, evenly spread, with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()


def draw_choices(axis: Any, picture: np.ndarray, chosen: np.ndarray, colors: Any) -> None:
    """Draw the experts (T,) of the patches over a faint picture (H, W, C)."""
    height, width = picture.shape[:2]
    extent, side = (0, width, height, 0), math.isqrt(len(chosen))
    axis.imshow(faint(picture), cmap="gray", vmin=0, vmax=1, extent=extent)
    chosen = np.ma.masked_equal(chosen.reshape(side, side), colors.N)  # patches without an expert
    axis.imshow(chosen, colors, alpha=OVERLAY, extent=extent, norm=NoNorm())
    if side <= MAX_NUMBERED_SIDE:
        for (y, x), expert in np.ma.ndenumerate(chosen):
            centre = ((x + 0.5) * width / side, (y + 0.5) * height / side)
            axis.text(*centre, str(expert), ha="center", va="center", **NUMBER_STYLE)


FIGURES = {
    "expert": by_expert,
    "patch": by_factor,
    "map": by_map,
    "step": by_factor,
    "pair": by_pair,
    "sample": by_sample,
}


def main(args: argparse.Namespace) -> None:
    """Draw and save."""
    check_out(args.out)
    data = RoutingData.load(args.data)
    save_figure(FIGURES[args.by](args, data), args.out, args.dpi)
    print(printable(f"experts by {args.by}: {args.out}"))


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
