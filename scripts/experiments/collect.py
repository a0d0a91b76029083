"""Turn finished experiments into the tables and pictures of docs/RESULTS.md.

    python scripts/experiments/collect.py claims --results results/claims
    python scripts/experiments/collect.py samplers --results results/samplers
    python scripts/experiments/collect.py cache --results results/cache

Prints Markdown tables; writes their figures as JSON, and pictures, to docs/results.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[2]))
import routing.figures  # noqa: F401  sets the style of every figure

FD, LOSS, READ = "FD (classifier features)", "loss on test images", "read as the class asked for"
CLAIMS = {  # claim -> its variants, the first one is what the others are compared with
    "dense": ["moe", "dense"],
    "objective": ["moe", "ddpm"],
    "shared": ["moe", "noshared"],
    "experts": ["moe", "experts4", "experts16"],
    "balance": ["moe", "balance0", "balance0.01", "balance0.05"],
    "upcycled": ["moe", "upcycled"],
}
MEASURES = {
    LOSS: "loss on test images",
    FD: "FD",
    READ: "read right",
    "max_vio": "MaxVio",
    "dead": "dead experts",
}


def main(args: argparse.Namespace) -> None:
    """Collect one experiment."""
    args.docs.mkdir(parents=True, exist_ok=True)
    found = {"claims": claims, "samplers": samplers, "cache": cache}[args.experiment](
        args.results, args.docs
    )
    text = json.dumps(found, indent=2) + "\n"
    (args.docs / f"{args.experiment}.json").write_text(text)


# ------------------------------------------------------------------------------ claims


def claims(results: Path, docs: Path) -> dict[str, dict[str, list[float]]]:
    """Print a row per variant, draw loss curves and samples; returns the values of every seed."""
    values: dict[str, dict[str, list[float]]] = {}
    curves: dict[str, list[tuple[list[int], list[float]]]] = {}
    for path in sorted(results.glob("*-seed*/metrics.json")):
        variant = re.sub(r"-seed\d+$", "", path.parent.name)
        metrics = json.loads(path.read_text())
        row = {**next(iter(metrics["values"].values())), **metrics["facts"]}
        events = read_events(path.parent)
        scalars = set(events.Tags()["scalars"])
        for name in ("max_vio", "dead"):
            if f"experts/{name}" in scalars:
                points = events.Scalars(f"experts/{name}")
                row[name] = statistics.mean(p.value for p in points[len(points) // 2 :])
        for name in MEASURES.keys() & row.keys():
            values.setdefault(variant, {}).setdefault(name, []).append(row[name])
        loss = events.Scalars("train/loss")
        curves.setdefault(variant, []).append(([p.step for p in loss], [p.value for p in loss]))
    for claim, variants in CLAIMS.items():
        print(f"\n| {claim} | " + " | ".join(MEASURES.values()) + " |")
        print("|---" * (1 + len(MEASURES)) + "|")
        for variant in (name for name in variants if name in values):
            cells = [spread(values[variant].get(name, [])) for name in MEASURES]
            print(f"| {variant} | " + " | ".join(cells) + " |")
    draw_curves(curves, docs / "claims.png")
    first = {name: results / f"{name}-seed0" / "seed0.npz" for name in values}
    files = {name: file for name, file in first.items() if file.exists()}
    draw_samples(files, docs / "claims_samples.png")
    return values


def read_events(run: Path) -> EventAccumulator:
    """Open a run's curves, every point of them."""
    return EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()


def spread(values: list[float]) -> str:
    """Write mean and standard deviation."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    digits = 1 if values[0] > 100 else 4  # FD, else shares and losses
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def draw_curves(curves: dict[str, list[tuple[list[int], list[float]]]], path: Path) -> None:
    """Draw each claim's training losses, mean and range over seeds, from a third of the run on."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (claim, variants) in zip(axes.flat, CLAIMS.items(), strict=True):
        for variant in (name for name in variants if name in curves):
            steps = curves[variant][0][0]
            runs = [losses[: len(steps)] for _, losses in curves[variant]]
            columns = list(zip(*runs, strict=True))
            shown = slice(len(steps) // 3, None)
            mean = [statistics.mean(column) for column in columns]
            (line,) = axis.plot(steps[shown], mean[shown], label=variant)
            low, high = [min(c) for c in columns], [max(c) for c in columns]
            axis.fill_between(
                steps[shown], low[shown], high[shown], alpha=0.2, color=line.get_color()
            )
        axis.set(title=claim, xlabel="training step", ylabel="training loss")
        axis.legend()
    figure.savefig(path, dpi=80)


def draw_samples(files: dict[str, Path], path: Path) -> None:
    """Draw a row of each file's first ten samples, one class a column."""
    figure, axis = plt.subplots(figsize=(8, 0.65 * len(files)), layout="constrained")
    rows = []
    for file in files.values():
        with np.load(file) as content:
            rows.append(np.concatenate([*content["arr_0"][:10, :, :, 0]], axis=1))
    axis.imshow(np.concatenate(rows), cmap="gray")
    side = len(rows[0])
    axis.set(xticks=[], yticks=[side * (i + 0.5) for i in range(len(rows))])
    axis.set_yticklabels(list(files))
    figure.savefig(path, dpi=100, bbox_inches="tight")


# ------------------------------------------------------------------------------ samplers


def samplers(results: Path, docs: Path) -> dict[str, dict[str, float]]:
    """Print a row per sampler, draw samples of each; returns the values."""
    rows: dict[str, dict[str, float]] = {}
    files: dict[str, Path] = {}
    head = ["sampler", "steps", "guidance", "trained", "FD", "precision", "recall", "read right"]
    print("| " + " | ".join([*head, "ms a sample"]) + " |")
    print("|---" * 9 + "|")
    for path in sorted(results.glob("*/metrics.json"), key=sampler_order):
        metrics = json.loads(path.read_text())
        flags, name = metrics["flags"], path.parent.name
        row = next(iter(metrics["values"].values()))
        rows[name] = row
        low, high = flags["cfg_interval"]
        guidance = f"{flags['cfg_scale']:g}" if flags["cfg_scale"] != 1 else "off"
        guidance += "" if (low, high) == (0.0, 1.0) else f", t in [{low:g}, {high:g}]"
        trained = "3,500" if name.endswith("-3500") else "2,250"  # samplers.sh names them so
        cells = [flags["sampler"], str(flags["num_sampling_steps"]), guidance, trained]
        cells += [f"{row[FD]:.2f}"]
        cells += [f"{row[key]:.3f}" for key in ("precision", "recall", READ)]
        print("| " + " | ".join([*cells, f"{1000 * row['seconds per sample']:.0f}"]) + " |")
        files[name] = path.parent / f"seed{flags['seed']}.npz"
    draw_samples(files, docs / "samplers.png")
    return rows


def sampler_order(path: Path) -> tuple[int, int, str]:
    """Order by kind, then by falling steps."""
    name, steps = re.match(r"(.+?)-(\d+)", path.parent.name).groups()  # type: ignore[union-attr]
    order = ["euler", "heun", "ddpm", "ddim", "dpm++"]
    return order.index(name), -int(steps), path.parent.name


# ------------------------------------------------------------------------------ latent cache


def cache(results: Path, docs: Path) -> dict[str, list[float]]:
    """Draw the loss curves of training from images and from caches; print how far they differ."""
    curves = {
        name: read_events(results / f"from-{name}").Scalars("loss")
        for name in ("images", "float32", "float16")
    }
    losses = {name: [point.value for point in points] for name, points in curves.items()}
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for (name, points), style in zip(curves.items(), ("-", "--", ":"), strict=True):
        axis.plot([p.step for p in points], losses[name], style, label=name, linewidth=2)
        far = max(abs(a - b) for a, b in zip(losses[name], losses["images"], strict=True))
        print(f"{name}: loss {losses[name][-1]:.6f}, at most {far:.1e} from training from images")
    axis.set(xlabel="training step", ylabel="training loss", title="images and latent caches")
    axis.legend()
    figure.savefig(docs / "cache.png", dpi=80)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", choices=["claims", "samplers", "cache"])
    parser.add_argument("--results", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--docs", type=Path, default=Path("docs/results"), help="folder to write")
    main(parser.parse_args())
