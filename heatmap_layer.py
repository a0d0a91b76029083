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
import sys
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, NoNorm
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from common.flags import FlagParser, number
from figures import (
    LOAD_COLORS,
    add_color_bar,
    add_figure_flags,
    expert_colors,
    figure_title,
    heatmap_grid,
    load_scale,
    pick_layers,
    relative_load,
    save_figure,
)
from routing import normalized_mutual_information
from routing_data import HALVES, RoutingData

MAP_INCHES = 0.6  # of one layer and expert
MAX_SAMPLE_LAYERS = 8  # rows of the strip unless --layers says otherwise

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
    layer.add("--by", choices=list(FIGURES), default="step", help="see above")
    layer.add("--sample", type=number(int, 0), default=0, help="picture of --by sample")
    layer.add("--num-columns", type=number(int, 1), default=8, help="steps of --by sample")
    return parser


def by_expert(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw layers x experts: what was chosen, and the mean router probability."""
    layers = pick_layers(args, data.config.depth)
    load = data.counts("step", args.half).sum(dim=1)[layers]  # (layers, E)
    probs = data.mean_probs(args.half)[layers]
    return heatmap_grid(
        [relative_load(load), np.asarray(probs) * data.config.num_experts],
        ["chosen", "mean router probability"],
        load_scale(args, data),
        title=figure_title("Load of the experts", args, data),
        xlabel="expert",
        ylabel="layer",
        xticks=[str(expert) for expert in range(data.config.num_experts)],
        yticks=[str(layer) for layer in layers],
        color_label="relative to even",
        panel_size=(3.4, max(3.0, 0.16 * len(layers))),
    )


def by_factor(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw a panel per layer: patches or steps x experts."""
    layers = pick_layers(args, data.config.depth)
    counts = data.counts(args.by, args.half)[layers]
    nmi = normalized_mutual_information(counts, data.config.num_experts_per_tok)
    rows = {
        "patch": ("patch, row by row from the top left", map(str, range(counts.shape[1]))),
        "step": ("t of the step: 1 = noise, 0 = picture", (f"{t:.2f}" for t in data.times)),
    }
    ylabel, yticks = rows[args.by]
    return heatmap_grid(
        relative_load(counts),
        [f"layer {layer} · NMI {value:.3f}" for layer, value in zip(layers, nmi, strict=True)],
        load_scale(args, data),
        title=figure_title(f"Experts by {args.by}", args, data),
        xlabel="expert",
        ylabel=ylabel,
        xticks=[str(expert) for expert in range(data.config.num_experts)],
        yticks=list(yticks),
        color_label=f"load of the expert within the {args.by}, relative to even",
        panel_size=(1.9, 2.2),
    )


def by_map(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw a little map for each layer (rows) and expert (columns), laid out as the image."""
    layers = pick_layers(args, data.config.depth)
    load = relative_load(data.counts("patch", args.half)[layers])  # (layers, T, E)
    (L, T, E), norm = load.shape, load_scale(args, data)
    side = math.isqrt(T)
    cell = side + max(side // 8, 1)  # a gap between maps
    blocks = np.array_split(np.arange(L), max(1, round(math.sqrt(L / E))))  # side by side
    size = (len(blocks) * E * MAP_INCHES + 3, len(blocks[0]) * MAP_INCHES + 1.4)
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
        axis.set_xticks([middle + cell * e for e in range(E)], [str(e) for e in range(E)])
        names = [str(layers[row]) for row in block]
        axis.set_yticks([middle + cell * row for row in range(rows)], names)
        axis.tick_params(length=0)
        axis.set(xlabel="expert", ylabel="layer")
    figure.suptitle(figure_title("Experts by patch", args, data), fontsize=11)
    label = "load of the expert at the patch, relative to even"
    add_color_bar(figure, image, norm, label, most=load.max(), axes=axes)
    return figure


def by_pair(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw experts x experts for each layer: tokens that chose both, relative to even pairs.

    Raises:
        ValueError: if a token has one expert only.
    """
    if data.config.num_experts_per_tok < 2:
        raise ValueError("--by pair: num_experts_per_tok is 1 here, there are no pairs")
    layers = pick_layers(args, data.config.depth)
    data.counts("step", args.half)  # that half was run
    pairs = data.pairs[HALVES.index(args.half)][layers].double().numpy()
    E = pairs.shape[1]
    pairs[:, np.arange(E), np.arange(E)] = np.nan  # an expert with itself
    even = np.nansum(pairs, axis=(1, 2), keepdims=True) / (E * (E - 1))
    names = [str(expert) for expert in range(E)]
    return heatmap_grid(
        pairs / np.maximum(even, 1e-9),
        [f"layer {layer}" for layer in layers],
        load_scale(args, data),
        title=figure_title("Experts chosen together", args, data),
        xlabel="expert",
        ylabel="expert",
        xticks=names,
        yticks=names,
        color_label="tokens that chose both, relative to an even use of all pairs",
        panel_size=(2.1, 2.1),
    )


def by_sample(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw one picture with the first expert of each patch over it, layers x steps.

    Raises:
        ValueError: if the file keeps no such picture.
    """
    num_raw, num_steps = data.raw_ids.shape[:2]
    if args.sample >= num_raw:
        raise ValueError(
            f"--sample {args.sample}: this file keeps {num_raw} pictures; more: "
            "expert_data.py --raw-samples"
        )
    depth, E = data.config.depth, data.config.num_experts
    shown = np.unique(np.linspace(0, depth - 1, min(depth, MAX_SAMPLE_LAYERS)).round().astype(int))
    layers = pick_layers(args, depth) if args.layers else shown.tolist()
    last = num_steps - 1
    steps = np.unique(np.linspace(0, last, min(num_steps, args.num_columns)).round().astype(int))
    picture = data.raw_images[args.sample].permute(1, 2, 0).numpy()  # (H, W, C)
    picture = np.broadcast_to(picture, (*picture.shape[:2], 3))
    faint = (picture.mean(axis=2) * 0.6 + 60).astype(np.uint8)
    experts = data.raw_ids[args.sample, ..., 0].numpy()  # (S, L, T)
    side, colors = math.isqrt(experts.shape[-1]), ListedColormap(expert_colors(E))
    figure, axes = plt.subplots(
        *(len(layers), len(steps) + 1),
        figsize=(1.25 * (len(steps) + 1) + 1.2, 1.25 * len(layers) + 1.3),
        squeeze=False,
        layout="constrained",
    )
    extent = (0, picture.shape[1], picture.shape[0], 0)
    for row, layer in enumerate(layers):
        axes[row, 0].imshow(picture, extent=extent)
        axes[row, 0].set_ylabel(f"layer {layer}", fontsize=9)
        for axis, step in zip(axes[row, 1:], steps, strict=True):
            axis.imshow(faint, cmap="gray", vmin=0, vmax=255, extent=extent)
            chosen = experts[step, layer].reshape(side, side)
            axis.imshow(chosen, colors, alpha=0.6, extent=extent, norm=NoNorm())
            if side <= MAX_NUMBERED_SIDE:
                scale = picture.shape[0] / side
                for (y, x), expert in np.ndenumerate(chosen):
                    centre = ((x + 0.5) * scale, (y + 0.5) * scale)
                    axis.text(*centre, str(expert), ha="center", va="center", **NUMBER_STYLE)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    axes[0, 0].set_title("picture", fontsize=9)
    for axis, step in zip(axes[0, 1:], steps, strict=True):
        axis.set_title(f"t = {data.times[step]:.2f}", fontsize=9)
    legend = [Patch(color=colors(e), label=str(e)) for e in range(E)]
    figure.legend(handles=legend, loc="outside right center", title="expert", fontsize=9)
    name = data.class_names[int(data.raw_labels[args.sample])]
    figure.suptitle(f"First expert of each patch of one picture, class: {name}", fontsize=11)
    return figure


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
    try:
        data = RoutingData.load(args.data)
        figure = FIGURES[args.by](args, data)
        save_figure(figure, args.out, args.dpi)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"heatmap_layer.py: error: {error}")
    print(f"experts by {args.by}: {args.out}")


if __name__ == "__main__":
    main(build_parser().parse_args())
