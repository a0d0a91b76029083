"""Draw which experts each class uses: one panel per layer, classes x experts.

    python heatmap_class.py --data results/routing.npz --out results/class.png --order similarity

Source: the paper's figure 5, arXiv:2407.11633.
"""

import argparse

import numpy as np
from matplotlib import pyplot as plt
from scipy.cluster.hierarchy import leaves_list, linkage

from common.errors import one_line_errors, printable
from common.flags import FlagParser
from routing import normalized_mutual_information
from routing.figures import (
    add_figure_flags,
    check_out,
    figure_title,
    half_note,
    heatmap_grid,
    load_scale,
    nmi_note,
    pick_layers,
    relative_load,
    save_figure,
    unconditional_note,
)
from routing.tables import RoutingData


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    add_figure_flags(parser, "results/class.png")
    classes = parser.group("Classes")
    classes.add(
        "--order", choices=["label", "similarity"], default="label", help="Order of the rows."
    )
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


def draw(args: argparse.Namespace, data: RoutingData) -> plt.Figure:
    """Draw classes x experts for each layer."""
    layers = pick_layers(args, data)
    counts = data.counts("class", args.half)[layers]  # (layers, X, E)
    load = relative_load(counts, data.config.num_experts)
    order, ylabel = np.arange(load.shape[1]), "class"
    if args.order == "similarity":
        order, ylabel = similarity_order(load), "class, similar ones together"
    nmi = normalized_mutual_information(counts, data.config.experts_per_token)
    return heatmap_grid(
        load[:, order],
        [f"layer {data.layers[i]} · NMI {value:.3f}" for i, value in zip(layers, nmi, strict=True)],
        load_scale(args, data),
        title=figure_title("Experts by class", args, data),
        xlabel="expert",
        ylabel=ylabel,
        xticks=data.expert_names,
        yticks=[data.class_names[i] for i in data.drawn_classes[order].tolist()],
        color_label="load of the expert within the class, relative to even",
        panel_size=(1.9, 2.4),
        notes=(nmi_note("class"), half_note(args, data), unconditional_note(data)),
    )


def main(args: argparse.Namespace) -> None:
    """Draw and save."""
    check_out(args.out)
    data = RoutingData.load(args.data)
    save_figure(draw(args, data), args.out, args.dpi)
    print(printable(f"{len(data.drawn_classes)} classes: {args.out}"))


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
