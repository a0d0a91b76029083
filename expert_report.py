"""Write one HTML file to explore routing data in a browser: pick layer, class, step and picture.

    python expert_report.py --data results/routing.npz --out results/routing.html

The file holds the data and plotly.js: it needs no server and no network. `#layer=3&step=10` behind
its address opens it there. The page itself is routing/report.html.
"""

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from plotly.offline import get_plotlyjs

from common.errors import FileError, one_line_errors, printable
from common.files import atomic_write, make_writable
from common.flags import FlagParser, number
from routing.figures import (
    FAINT,
    LOAD_COLORS,
    OVERLAY,
    expert_colors,
    relative_load,
    unconditional_note,
)
from routing.tables import (
    FACTORS,
    HALVES,
    MEANINGS,
    SUFFIXES,
    RoutingData,
    measure_all,
    refuse_foreign,
)

NOTHING = 65535  # the page draws no colour there
TEMPLATE = Path(__file__).with_name("routing") / "report.html"
TITLE = b"<title>What the experts learned</title>"  # every report has it


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    report = parser.group("Report")
    report.add("--data", required=True, metavar="NPZ", help="File of expert_data.py to show.")
    report.add("--out", default="results/routing.html", help="Page to write, .html.")
    report.add(
        "--max-pictures",
        type=number(int, 0),
        default=20,
        metavar="N",
        help="Number of pictures in the page, at most.",
    )
    report.add(
        "--max-steps",
        type=number(int, 1),
        default=50,
        metavar="N",
        help="Number of steps shown over a picture, at most.",
    )
    return parser


def encode(array: np.ndarray) -> str:
    """Return an array's bytes in base64, little endian."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def load_table(data: RoutingData, factor: str, halves: list[str]) -> dict[str, Any]:
    """Return the relative load (halves, L, X, E) in thousandths, `NOTHING` where none was counted.

    Loads above 65 are shown as 65: few models have so many experts for each that a token uses.
    """
    routed = data.config.num_experts
    load = np.stack([relative_load(data.counts(factor, half), routed) for half in halves])
    thousandths = np.nan_to_num((load * 1000).round().clip(max=NOTHING - 1), nan=NOTHING)
    return {"shape": load.shape, "data": encode(thousandths.astype("<u2"))}


def color_scale(most: float) -> list[tuple[float, str]]:
    """Return `figures.LOAD_COLORS` for plotly, with its middle at the even load of 1."""
    points = np.linspace(0, 1, 21)
    positions = np.where(points < 0.5, 2 * points, 1 + (2 * points - 1) * (most - 1)) / most
    rgb = (np.array(colormaps[LOAD_COLORS](points))[:, :3] * 255).round().astype(int)
    names = ["rgb({},{},{})".format(*color) for color in rgb]
    return list(zip(positions.tolist(), names, strict=True))


def page_data(data: RoutingData, max_pictures: int, max_steps: int) -> dict[str, Any]:
    """Collect what the page shows, ready for JSON."""
    numbers = measure_all(data)
    halves = [half for half in HALVES if any(row["half"] == half for row in numbers)]
    _, num_steps, _, num_patches, _ = data.traced_ids.shape
    last = num_steps - 1
    shown_steps = np.unique(np.linspace(0, last, min(num_steps, max_steps)).round().astype(int))
    pictures = data.traced_images[:max_pictures].permute(0, 2, 3, 1).numpy()  # (R, H, W, C)
    pictures = np.broadcast_to(pictures, (*pictures.shape[:3], 3))
    ids = data.traced_ids[:max_pictures, shown_steps, :, :, 0]  # (R, S, L, T)
    most = max(data.config.num_experts / data.config.experts_per_token, 1.01)
    colors = expert_colors(data.num_experts)
    return {
        "title": data.title,
        "halves": halves,
        "layers": data.layers,
        "expert_names": data.expert_names,
        "unconditional_note": unconditional_note(data),
        "num_patches": num_patches,
        "most": most,
        "colorscale": color_scale(most),
        "expert_rgb": [[round(255 * part) for part in to_rgb(color)] for color in colors],
        "class_names": data.class_names,
        "class_names_drawn": [data.class_names[i] for i in data.drawn_classes.tolist()],
        "times": data.times.tolist(),
        "tables": {factor: load_table(data, factor, halves) for factor in FACTORS},
        "numbers": numbers,
        "meanings": MEANINGS | SUFFIXES,
        "overlay": OVERLAY,
        "faint": [255 * level for level in FAINT],
        "sample_classes": data.traced_labels[:max_pictures].tolist(),
        "shown_steps": shown_steps.tolist(),
        "shown_times": data.times[shown_steps].tolist(),
        "ids": encode(ids.numpy().astype("<u2")),
        "picture_shape": list(pictures.shape[:3]),
        "pictures": encode(pictures),
    }


def build_page(data: RoutingData, max_pictures: int = 20, max_steps: int = 50) -> str:
    """Return the whole page."""
    content = json.dumps(page_data(data, max_pictures, max_steps))
    content = content.replace("<", "\\u003c")  # no name may end the script or begin a comment
    page = TEMPLATE.read_text(encoding="utf-8")
    before, rest = page.split("/*PLOTLY*/")
    between, after = rest.split("/*DATA*/null")
    return "".join([before, get_plotlyjs(), between, content, after])


def check_out(path: str | Path) -> None:
    """Refuse a file that can't be written, or is no report of ours, before any work.

    Raises:
        FileError: naming the file.
    """
    path = Path(path)
    if path.suffix not in (".html", ".htm"):
        raise FileError(f"--out {path}: expected .html")
    refuse_foreign(path, TITLE)
    make_writable(path.parent, "--out")


def main(args: argparse.Namespace) -> None:
    """Write the page."""
    check_out(args.out)
    page = build_page(RoutingData.load(args.data), args.max_pictures, args.max_steps)
    with atomic_write(args.out) as temp:
        temp.write_text(page, encoding="utf-8")
    print(printable(f"{len(page) / 1e6:.1f} MB, open in a browser: {args.out}"))


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
