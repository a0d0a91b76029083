"""Draw which experts each class uses: one panel per layer, classes x experts.

    python heatmap_class.py --data results/routing.npz --out results/class.png --order similarity

Source: the paper's figure 5, arXiv:2407.11633.
"""

import argparse
import sys

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage

from common.flags import FlagParser
from figures import (
    add_figure_flags,
    figure_title,
    heatmap_grid,
    load_scale,
    pick_layers,
    relative_load,
    save_figure,
)
from routing import normalized_mutual_information
from routing_data import RoutingData


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    add_figure_flags(parser, "results/class.png")
    classes = parser.group("Classes")
    classes.add("--order", choices=["label", "similarity"], default="label", help="of the rows")
    return parser


def similarity_order(load: np.ndarray) -> np.ndarray:
    """Order classes so that neighbours use the experts alike.

    Args:
        load: (L, X, E) relative load of X classes.

    Returns:
        (X,) permutation, the leaves of an average-linkage tree.
    """
    features = load.transpose(1, 0, 2).reshape(load.shape[1], -1)
    if len(features) < 3:
        return np.arange(len(features))
    return leaves_list(linkage(features, method="average", optimal_ordering=True))


def main(args: argparse.Namespace) -> None:
    """Draw and save."""
    try:
        data = RoutingData.load(args.data)
        layers = pick_layers(args, data.config.depth)
        counts = data.counts("class", args.half)[layers]  # (layers, X, E)
        load = relative_load(counts)
        order = np.arange(load.shape[1])
        if args.order == "similarity":
            order = similarity_order(load)
        classes = data.drawn_classes[order].tolist()
        nmi = normalized_mutual_information(counts, data.config.num_experts_per_tok)
        figure = heatmap_grid(
            load[:, order],
            [f"layer {layer} · NMI {value:.3f}" for layer, value in zip(layers, nmi, strict=True)],
            load_scale(args, data),
            title=figure_title("Experts by class", args, data),
            xlabel="expert",
            ylabel="class" + (", similar ones together" if args.order == "similarity" else ""),
            xticks=[str(expert) for expert in range(load.shape[2])],
            yticks=[data.class_names[i] for i in classes],
            color_label="load of the expert within the class, relative to even",
            panel_size=(1.9, 2.4),
        )
        save_figure(figure, args.out, args.dpi)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"heatmap_class.py: error: {error}")
    print(f"{len(layers)} layers, {len(order)} classes: {args.out}")


if __name__ == "__main__":
    main(build_parser().parse_args())
