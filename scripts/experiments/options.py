"""Turn the finished runs of options.sh into the table of docs/RESULTS.md.

    python scripts/experiments/options.py --results results/options

Puts the table into docs/RESULTS.md; the values of every seed go to docs/results/options.json.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.files import atomic_write

PAGE = Path(__file__).parents[2] / "docs/RESULTS.md"
BEGIN, END = "<!-- options: written by options.py -->", "<!-- end of options -->"
MEASURES = {
    "loss on test images": ("loss on test images", 4),
    "FD (classifier features)": ("FD", 1),
    "read as the class asked for": ("read right", 4),
}
# What is asked, and the variants that answer it; the first one is what the others differ from.
QUESTIONS = {
    "rate": ["base", "cosine", "wsd"],
    "optimizer": ["base", "muon"],
    "DDPM's prediction": ["ddpm", "v"],
    "time shift": ["base", "shift3", "shift3-sampling"],
    "sampler": ["base", "euler50", "sde25", "sde50"],
    "guidance": ["base", "cfg2", "cfg2-rescaled", "autoguidance2"],
    "length of the average": ["base", "ema0.9", "ema0.999"],
    "alignment": ["base", "repa"],
}
# Losses of other objectives, times and weights are other quantities.
OWN_LOSS = {"ddpm", "v", "shift3", "shift3-sampling"}


def collect(results: Path) -> dict[str, dict[str, list[float]]]:
    """Return the values by variant and measure, one a seed."""
    values: dict[str, dict[str, list[float]]] = {}
    for path in sorted(results.glob("judged/*-seed*/metrics.json")):
        variant = re.sub(r"-seed\d+$", "", path.parent.name)
        metrics = json.loads(path.read_text())
        row = {**next(iter(metrics["values"].values())), **metrics["facts"]}
        for name in MEASURES.keys() & row.keys():
            values.setdefault(variant, {}).setdefault(name, []).append(row[name])
    return values


def cell(values: list[float], digits: int) -> str:
    """Write mean and standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def table(values: dict[str, dict[str, list[float]]]) -> str:
    """Return the Markdown table."""
    heads = ["question", "variant", *(name for name, _ in MEASURES.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for question, variants in QUESTIONS.items():
        for variant in (name for name in variants if name in values):
            cells = [question if variant == variants[0] else "", variant]
            for name, (_, digits) in MEASURES.items():
                own = name.startswith("loss") and variant in OWN_LOSS
                text = cell(values[variant].get(name, []), digits)
                cells.append(f"({text})" if own and text else text)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Write the table into the page, and the values."""
    values = collect(args.results)
    lines = table(values)
    print(lines)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    with atomic_write(PAGE) as temp:
        temp.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{rest.partition(END)[2]}")
    args.docs.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (args.docs / "options.json").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/options"))
    parser.add_argument("--docs", type=Path, default=Path("docs/results"))
    main(parser.parse_args())
