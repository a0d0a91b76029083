"""Which mixture beats a dense model of equal activation: the variants, one run, and the page.

    python scripts/experiments/recipes.py list --seeds 0 1 2
    python scripts/experiments/recipes.py run promoe 0 --results results/recipes
    python scripts/experiments/recipes.py page

`recipes.sh` goes through the list. A run trains, draws, measures, and leaves a JSON of its values
and a row of its samples in docs/results/recipes, of which `page` makes the pictures and the table
of docs/RECIPES.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from collect import FD, LOSS, READ, read_events
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter
from PIL import Image

from common import process
from common.errors import UserError, one_line_errors
from common.files import atomic_write
from data import load_dataset
from evaluate import SampleRun, build_parser, loss_of
from models import DiT, DiTConfig, Routing, TopKRouter
from routing.figures import LINE_COLORS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/RECIPES.md"
BEGIN, END = "<!-- measured: written by recipes.py page -->", "<!-- end of measured -->"
DATA, NUM_SAMPLES, NUM_CURVE_POINTS = "fashion-mnist", 2000, 6
COMMON = (  # of all runs; a token passes an MLP 2D wide in each block
    *("--data-path", DATA, "--flip", "--model", "DiT-Ti/8", "--mlp-type", "swiglu"),
    *("--rf", "--time-scale", "1000", "--dense-mlp-ratio", "2"),
    *("--global-batch-size", "64", "--lr", "1e-3", "--warmup-steps", "100"),
    *("--lr-schedule", "wsd", "--weight-decay", "0", "--clip-grad", "1", "--ema-decay", "0.99"),
    *("--precision", "fp32", "--log-every", "50", "--sample-every", "0", "--keep-last", "0"),
)


class Variant(NamedTuple):
    """A model to train."""

    what: str  # for the table
    flags: str


def recipe(name: str, flags: str) -> str:
    """Return the flags of a file of config/recipes at this experiment's widths."""
    return f"--config config/recipes/{name}.yaml {flags}"


FINE = "--num-experts 32 --num-experts-per-tok 2 --mlp-ratio 0.5 --num-shared-experts 1"
HALF = "--num-experts 16 --num-experts-per-tok 1 --mlp-ratio 1 --num-shared-experts 1"
WHOLE = "--num-experts 8 --num-experts-per-tok 1 --mlp-ratio 2 --num-shared-experts 0"
QUARTER = "--num-experts 32 --num-experts-per-tok 4 --mlp-ratio 0.5 --num-shared-experts 0"
EIGHTH = "--num-experts 64 --num-experts-per-tok 8 --mlp-ratio 0.25 --num-shared-experts 0"
PAPER = recipe("dit_moe", FINE)
VARIANTS = {
    # the ends of the headroom
    "dense": Variant("dense, as wide as a token's MLPs: 2D", "--num-experts 0 --mlp-ratio 2"),
    "wide": Variant("dense, as wide as all experts: 17D", "--num-experts 0 --mlp-ratio 17"),
    # config/recipes
    "dit_moe": Variant("32 experts of D/2, 2 a token, D shared", PAPER),
    "promoe": Variant("16 of D, D shared, every second block", recipe("promoe", HALF)),
    "promoe_ec": Variant("16 of D, D shared, every second block", recipe("promoe_ec", HALF)),
    "ec_dit": Variant("8 of 2D, every second block", recipe("ec_dit", WHOLE)),
    "diffmoe": Variant("8 of 2D, every second block", recipe("diffmoe", WHOLE)),
    "dsmoe": Variant("32 of D/2, 2 a token, D shared", recipe("dsmoe", FINE)),
    # towards a best one
    "diffmoe_all": Variant("8 of 2D, all blocks", recipe("diffmoe", f"{WHOLE} --moe-blocks all")),
    "diffmoe_shared": Variant(
        "16 of D, D shared, all blocks", recipe("diffmoe", f"{HALF} --moe-blocks all")
    ),
    "promoe_all": Variant(
        "16 of D, D shared, all blocks", recipe("promoe", f"{HALF} --moe-blocks all")
    ),
    "ec_shared": Variant(
        "16 of D, D shared, all blocks", recipe("ec_dit", f"{HALF} --moe-blocks all")
    ),
    "ec_all": Variant("8 of 2D, all blocks", recipe("ec_dit", f"{WHOLE} --moe-blocks all")),
    "batch_fine": Variant(
        "32 of D/2, 4 a token, all blocks", recipe("diffmoe", f"{QUARTER} --moe-blocks all")
    ),
    "batch_finer": Variant(
        "64 of D/4, 8 a token, all blocks", recipe("diffmoe", f"{EIGHTH} --moe-blocks all")
    ),
    "batch_sigmoid": Variant(
        "8 of 2D by sigmoid, all blocks",
        recipe("diffmoe", f"{WHOLE} --moe-blocks all --affinity sigmoid"),
    ),
    "sigmoid1": Variant(
        "16 of D, 1 a token, raw sigmoid, bias 1e-2, D shared",
        f"{PAPER} {HALF} --affinity sigmoid --balance bias --bias-update-rate 1e-2",
    ),
    # the paper's recipe with one other choice
    "sigmoid": Variant("dit_moe, affinity sigmoid", f"{PAPER} --affinity sigmoid"),
    "cosine": Variant("dit_moe, affinity cosine", f"{PAPER} --affinity cosine"),
    "expert_choice": Variant(
        "dit_moe, experts choose in an image",
        f"{PAPER} --selection expert_choice --balance none",
    ),
    "batch_choice": Variant(
        "dit_moe, experts choose of the batch", f"{PAPER} --selection batch_choice --balance none"
    ),
    "renormalised": Variant("dit_moe, weights sum to 1", f"{PAPER} --norm-topk-prob"),
    "contrastive": Variant(
        "dit_moe, prototypes with the contrastive loss",
        f"{PAPER} --affinity cosine --balance contrastive",
    ),
    "bias": Variant(
        "dit_moe, bias 1e-2 for the loss", f"{PAPER} --balance bias --bias-update-rate 1e-2"
    ),
    "z_loss": Variant("dit_moe, z-loss beside", f"{PAPER} --balance switch z_loss"),
    "none": Variant("dit_moe, nothing balances", f"{PAPER} --balance none"),
    "unshared": Variant(
        "dit_moe, 16 of D, 2 a token, none shared",
        f"{PAPER} --num-experts 16 --mlp-ratio 1 --num-shared-experts 0",
    ),
    "unconditional": Variant("dit_moe, unconditional expert", f"{PAPER} --unconditional-expert"),
    "every_second": Variant("dit_moe, every second block", f"{PAPER} --moe-blocks every_second"),
    "deep_half": Variant("dit_moe, deep half of the blocks", f"{PAPER} --moe-blocks deep_half"),
}
FIRST = [*VARIANTS][: [*VARIANTS].index("sigmoid1") + 1]  # with all seeds before single choices


def main(args: argparse.Namespace) -> None:
    """List, run, or write the page."""
    if args.command == "list":
        print("\n".join(f"{name} {seed}" for name, seed in in_order(args.seeds)))
    elif args.command == "run":
        run(args)
    else:
        write_page(args.docs)


def in_order(seeds: list[int]) -> list[tuple[str, int]]:
    """Return all runs, the most telling first: a seed of the recipes at a time, then choices."""
    choices = [name for name in VARIANTS if name not in FIRST]
    return [(name, seed) for names in (FIRST, choices) for seed in seeds for name in names]


# ------------------------------------------------------------------------------ one run


def train_flags(variant: str, seed: int, steps: int) -> list[str]:
    """Return the flags of `train.py` that decide a run."""
    course = ["--max-steps", str(steps), "--decay-steps", str(max(1, steps * 3 // 10))]
    saved = ["--ckpt-every", str(max(1, steps // NUM_CURVE_POINTS)), "--seed", str(seed)]
    return [*COMMON, *VARIANTS[variant].flags.split(), *course, *saved]


def run(args: argparse.Namespace) -> None:
    """Train, draw and measure; nothing where the values are there already.

    Raises:
        UserError: training or drawing failed, see the log.
    """
    name = f"{args.variant}-seed{args.seed}"
    folder, out = args.results / name, args.docs / f"{name}.json"
    if out.exists():
        return
    flags = train_flags(args.variant, args.seed, args.steps)
    log = args.results / f"{name}.log"
    place = ["--results-dir", str(args.results), "--run-name", name]
    call(["train.py", *flags, *place], log)
    drawing = ["--num-samples", str(args.num_samples), "--sampler", "euler", "--cfg-scale", "1"]
    drawing += ["--num-sampling-steps", "25", "--dtype", "fp32"]
    call(["evaluate.py", "--ckpt", str(folder), "--out", str(folder), *drawing], log)
    values = {"variant": args.variant, "seed": args.seed, "flags": flags, **measure(folder)}
    if args.seed == 0:
        save_row(folder / "seed0.npz", out.with_suffix(".png"))
    with atomic_write(out) as temp:
        temp.write_text(json.dumps(values, indent=1) + "\n")
    for checkpoint in sorted((folder / "checkpoints").glob("*.pt"))[:-1]:
        checkpoint.unlink()
    print(f"{name}: test loss {last(values):.4f}, FD {values['fd']:.1f}", flush=True)


def call(command: list[str], log: Path) -> None:
    """Run one of our scripts.

    Raises:
        UserError: it failed.
    """
    with open(log, "a") as file:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    if done.returncode:
        end = log.read_text().strip().splitlines()[-1:]
        raise UserError(f"{command[0]} ended with {done.returncode}, see {log}: {' '.join(end)}")


def measure(folder: Path) -> dict[str, Any]:
    """Return the values of a run that is trained and drawn."""
    rt = process.setup()
    test, curve = load_dataset(DATA, split="test"), {}
    for path in sorted((folder / "checkpoints").glob("*.pt")):
        flags = ["--ckpt", str(path), "--dtype", "fp32"]
        drawn = SampleRun(build_parser().parse_args(flags), rt)
        chosen = count_experts(drawn.opened.model)
        curve[str(int(path.stem))] = loss_of(drawn, test)
    model = drawn.opened.model
    metrics = json.loads((folder / "metrics.json").read_text())
    judged = next(iter(metrics["values"].values()))
    events = read_events(folder)
    loads = {}
    for name in ("max_vio", "dead"):
        if f"experts/{name}" in events.Tags()["scalars"]:
            points = events.Scalars(f"experts/{name}")
            loads[name] = statistics.mean(p.value for p in points[len(points) // 2 :])
    if chosen:
        loads["experts_per_token"] = statistics.mean(chosen)
    return {
        "width": activated_width(model.config),
        "parameters": model.num_parameters()[0],
        "test_loss": curve,
        "loss_of_evaluate": metrics["facts"][LOSS],
        "num_samples": metrics["flags"]["num_samples"],
        "fd": judged[FD],
        "read_right": judged[READ],
        "facts": metrics["facts"],
        **loads,
    }


def count_experts(model: DiT) -> list[float]:
    """Return a list that gets the mean number of routed experts of a token at every forward.

    Where experts choose of the batch it is not fixed: in sampling, thresholds decide.
    """
    found: list[float] = []

    def count(router: TopKRouter, _inputs: Any, routing: Routing) -> None:
        filled = routing.expert_indices < router.num_experts  # (M, S)
        found.append(filled.sum(dim=1).float().mean().item())

    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(count)
    return found


def activated_width(config: DiTConfig) -> float:
    """Return the hidden width of the MLPs that a token passes in a block, mean, in units of D."""
    mixed = config.experts_per_token * config.mlp_hidden_size / config.hidden_size
    widths = {True: mixed + config.num_shared_experts, False: config.dense_hidden_size}
    widths[False] /= config.hidden_size
    return statistics.mean(widths[config.is_moe_block(i)] for i in range(config.depth))


def save_row(file: Path, path: Path) -> None:
    """Write the first 20 samples of an .npz side by side, two of each class."""
    with np.load(file) as content:
        Image.fromarray(np.concatenate([*content["arr_0"][:20, :, :, 0]], axis=1)).save(path)


# ------------------------------------------------------------------------------ the page


Runs = dict[str, dict[int, dict[str, Any]]]  # variant -> seed -> values


def read_runs(docs: Path) -> Runs:
    """Read the values of all runs, in the order of `VARIANTS`."""
    runs: Runs = {name: {} for name in VARIANTS}
    for path in sorted(docs.glob("*-seed*.json")):
        values = json.loads(path.read_text())
        runs[values["variant"]][values["seed"]] = values
    return runs


def last(values: dict[str, Any]) -> float:
    """Return the test loss of a run's end."""
    return values["test_loss"][max(values["test_loss"], key=int)]


def headroom_share(runs: Runs, name: str) -> float | None:
    """Return how far a variant comes from dense (0) to wide (1), over the seeds of all three."""
    seeds = runs[name].keys() & runs["dense"].keys() & runs["wide"].keys()
    if not seeds:
        return None
    dense, wide, own = (
        statistics.mean(last(runs[one][seed]) for seed in seeds) for one in ("dense", "wide", name)
    )
    return (dense - own) / (dense - wide)


def spread(values: list[float], digits: int) -> str:
    """Write mean and, of several, the standard deviation; nothing for none."""
    if not values or values[0] is None:
        return ""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def table(runs: Runs) -> list[str]:
    """Return a row of Markdown for every variant; those not run yet say so."""
    heads = ["variant", "what", "width / D", "parameters", "seeds", "test loss", "below dense, in "
             "deviations", "share of headroom", "FD", "FD / dense", "read right", "experts a token",
             "MaxVio", "dead a layer"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, of_seeds in runs.items():
        rows = [of_seeds[seed] for seed in sorted(of_seeds)]
        if not rows:
            lines.append(
                f"| {name} | {VARIANTS[name].what} | not run yet " + "| " * (len(heads) - 3) + "|"
            )
            continue
        share = headroom_share(runs, name)
        seeds = of_seeds.keys() & runs["dense"].keys()
        ratio = [of_seeds[seed]["fd"] / runs["dense"][seed]["fd"] for seed in sorted(seeds)]
        cells = [
            f"{rows[0]['width']:g}", f"{rows[0]['parameters'] / 1e6:.2f}M", str(len(rows)),
            spread([last(row) for row in rows], 4), deviations(runs, name),
            "" if share is None else f"{share:.0%}", spread([row["fd"] for row in rows], 1),
            spread(ratio, 2), spread([row["read_right"] for row in rows], 3),
            *(spread([row[key] for row in rows if key in row], 2)
              for key in ("experts_per_token", "max_vio", "dead")),
        ]  # fmt: skip
        lines.append(f"| {name} | {VARIANTS[name].what} | " + " | ".join(cells) + " |")
    return lines


def deviations(runs: Runs, name: str) -> str:
    """Write how far the loss is below dense's, in the larger standard deviation of the two."""
    losses = [[last(values) for values in runs[one].values()] for one in ("dense", name)]
    if name == "dense" or min(map(len, losses)) < 2:
        return ""
    below = statistics.mean(losses[0]) - statistics.mean(losses[1])
    return f"{below / max(map(statistics.stdev, losses)):.1f}"


def write_page(docs: Path) -> None:
    """Draw the pictures beside the JSON and put the table into docs/RECIPES.md."""
    runs = read_runs(docs)
    lines = table(runs)
    print("\n".join(lines))
    done = {name: of_seeds for name, of_seeds in runs.items() if of_seeds}
    if 0 in done.get("dense", {}):
        draw_curves(done, docs.parent / "recipes_curves.png")
        draw_rows(docs, [*done], docs.parent / "recipes_samples.png")
        lines += ["", "![test losses over steps](results/recipes_curves.png)"]
        lines += ["", "![samples of seed 0](results/recipes_samples.png)"]
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    with atomic_write(PAGE) as temp:
        temp.write_text("\n".join([before + BEGIN, "", *lines, "", END + after]))


def draw_curves(runs: Runs, path: Path) -> None:
    """Draw test losses over steps, and how they compare with dense's of the same seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    styles = ["-", "--", ":", "-."]
    for index, (name, of_seeds) in enumerate(runs.items()):
        row, column = divmod(index, len(LINE_COLORS))
        look = {"color": LINE_COLORS[column], "linestyle": styles[row], "label": name}
        curves = {seed: values["test_loss"] for seed, values in of_seeds.items()}
        steps = sorted(next(iter(curves.values())), key=int)
        mean = [statistics.mean(curve[step] for curve in curves.values()) for step in steps]
        left.plot([*map(int, steps)], mean, **look)
        paired = [seed for seed in curves if seed in runs["dense"]]
        dense = {seed: runs["dense"][seed]["test_loss"] for seed in paired}
        if paired:
            ratio = [statistics.mean(curves[s][n] / dense[s][n] for s in paired) for n in steps]
            right.plot([*map(int, steps)], ratio, **look)
    left.set(xlabel="training step", ylabel="loss on test images", yscale="log")
    right.set(xlabel="training step", ylabel="loss on test images / dense's of the same seed")
    for axis in (left.yaxis, right.yaxis):  # without mathtext, which figures here don't parse
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    left.legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def draw_rows(docs: Path, names: list[str], path: Path) -> None:
    """Draw the rows of samples one below the other."""
    files = {name: docs / f"{name}-seed0.png" for name in names}
    rows = {name: np.array(Image.open(file)) for name, file in files.items() if file.exists()}
    figure, axis = plt.subplots(figsize=(13, 0.62 * len(rows) + 0.2), layout="constrained")
    axis.imshow(np.concatenate([*rows.values()]), cmap="gray")
    side = len(next(iter(rows.values())))
    axis.set(xticks=[], yticks=[side * (i + 0.5) for i in range(len(rows))])
    axis.set_yticklabels([*rows])
    figure.savefig(path, dpi=80)
    plt.close(figure)


def build_flags() -> argparse.ArgumentParser:
    """Return the parser of this script's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list").add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    one, page = commands.add_parser("run"), commands.add_parser("page")
    one.add_argument("variant", choices=VARIANTS)
    one.add_argument("seed", type=int)
    one.add_argument("--steps", type=int, default=2000)
    one.add_argument("--num-samples", type=int, default=NUM_SAMPLES)
    one.add_argument("--results", type=Path, default=Path("results/recipes"))
    for command in (one, page):
        command.add_argument("--docs", type=Path, default=ROOT / "docs/results/recipes")
    return parser


if __name__ == "__main__":
    with one_line_errors():
        main(build_flags().parse_args())
