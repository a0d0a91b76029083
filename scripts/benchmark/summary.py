"""Set what `all.sh` measured beside what is aimed at, as the tables of docs/PERFORMANCE.md.

    python scripts/benchmark/summary.py results/benchmark
    python scripts/benchmark/summary.py results/benchmark --publish docs

In this order: `Measured`, the rows of all files; the table of aims; two more tables; publishing:
files are copied to docs/performance/, tables put between two marks of the page.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
from common.errors import FileError, one_line_errors
from common.files import atomic_write
from common.flags import FlagParser

BEFORE = {"operators": 161, "bytes_per_token": 444_945, "saved_bytes_per_token": 53_920}
MARKS = "<!-- measured: python scripts/benchmark/summary.py -->", "<!-- /measured -->"
PEERS = ("transformers eager", "transformers grouped_mm")
BOTH = "forward+backward"


class Measured:
    """The rows of the files of a folder, by the file's name; those not yet made have none."""

    def __init__(self, folder: Path) -> None:
        """Read the files.

        Raises:
            FileError: there is none.
        """
        self.paths = sorted(folder.glob("*.json"))
        if not self.paths:
            raise FileError(f"{folder} has no files of scripts/benchmark/all.sh")
        contents = {path.stem: json.loads(path.read_text()) for path in self.paths}
        self.machine = next(iter(contents.values()))["machine"]
        self.rows: dict[str, list[dict[str, Any]]] = {n: c["rows"] for n, c in contents.items()}

    def ms(self, file: str, contestant: str, dtype: str, what: str = BOTH) -> float | None:
        """Return a contestant's median."""
        for row in self.rows.get(file, []):
            if (row["contestant"], row["dtype"], row.get("what")) == (contestant, dtype, what):
                return row["ms"]
        return None

    def ratio(self, file: str, ours: str, other: str, dtype: str, what: str = BOTH) -> float | None:
        """Return the time of one contestant over another's."""
        times = [self.ms(file, name, dtype, what) for name in (ours, other)]
        return times[0] / times[1] if times[0] and times[1] else None

    def best_peer(self, dtype: str) -> float | None:
        """Return the time of the fastest other layer over ours."""
        ratios = [self.ratio("s2_layer", peer, "ours", dtype) for peer in PEERS]
        return min((ratio for ratio in ratios if ratio), default=None)

    def count(self, name: str) -> float | None:
        """Return what traffic.py counts."""
        return next((row[name] for row in self.rows.get("s2_traffic", [])), None)

    def share(self, name: str) -> float | None:
        """Return what it counts over what it was before."""
        counted = self.count(name)
        return None if counted is None else counted / BEFORE[name]


class Aim(NamedTuple):
    """A row of the table."""

    what: str
    aim: float
    found: float | None
    at_least: bool = False

    def cells(self) -> list[str]:
        """Return its text, aim, what was found, and whether that is enough."""
        aim = f"{'above ' if self.at_least else ''}{self.aim:g}"
        if self.found is None:
            return [self.what, aim, "-", "not measured"]
        enough = self.found > self.aim if self.at_least else self.found <= self.aim
        shown = f"{self.found:.0f}" if self.aim >= 10 else f"{self.found:.2f}"
        return [self.what, aim, shown, "yes" if enough else "no"]


def aims(found: Measured) -> list[Aim]:
    """Return every aim with what was measured, in times over times."""
    layer = "layer over bare matmuls, 2048 tokens"
    dense = "layer over dense of equal FLOPs, 2048 tokens"
    step = "training step over dense"
    state = "bf16 mixed"
    return [
        Aim(f"{layer}: fp32", 1.05, found.ratio("s2_layer", "ours", "bare", "fp32")),
        Aim(f"{layer}: bf16", 1.08, found.ratio("s2_layer", "ours", "bare", "bf16")),
        Aim(f"{dense}: fp32", 1.08, found.ratio("s2_layer", "ours", "dense", "fp32")),
        Aim(f"{dense}: bf16", 1.15, found.ratio("s2_layer", "ours", "dense", "bf16")),
        Aim("the same, 8192: bf16", 1.08, found.ratio("s2_layer_8192", "ours", "dense", "bf16")),
        Aim(f"{step}: S/2 fp32", 1.06, found.ratio("s2_step", "ours", "dense", "fp32", "step")),
        Aim(f"{step}: S/2 bf16", 1.20, found.ratio("s2_step", "ours", "dense", state, "step")),
        Aim(f"{step}: B/2 bf16", 1.08, found.ratio("b2_step", "ours", "dense", state, "step")),
        Aim(
            "passes over the state over a bare copy of one pass's bytes",
            1.3,
            found.ratio("s2_state", "ours", "bare copy", state, "state"),
        ),
        Aim(
            "the same over the published optimizer and EMA, and casts",
            0.6,
            found.ratio("s2_state", "ours", "naive", state, "state"),
        ),
        Aim("operators a block, GPU path, eager", 110, found.count("operators")),
        Aim("the same, compiled, without matmuls", 40, found.count("other_kernels_compiled")),
        Aim("bytes a token, not matmuls', over before", 0.6, found.share("bytes_per_token")),
        Aim("bytes a token kept, over before", 0.75, found.share("saved_bytes_per_token")),
        Aim("best of transformers' layers over ours: fp32", 1.0, found.best_peer("fp32"), True),
        Aim("best of transformers' layers over ours: bf16", 1.0, found.best_peer("bf16"), True),
        Aim(
            "E = 64, 4096 tokens, fp32: layer over bare",
            1.10,
            found.ratio("s2_ends", "E=64 K=2 M=4096", "bare E=64 K=2 M=4096", "fp32"),
        ),
    ]


# ------------------------------------------------------------------------------ tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def step_table(found: Measured) -> str:
    """Return the parts of a training step, in ms."""
    parts, rows = ("forward", "backward", "optimizer", "ema", "step"), []
    for file in ("s2_step", "b2_step"):
        names = [(r["contestant"], r["dtype"]) for r in found.rows.get(file, [])]
        for name, dtype in dict.fromkeys(names):
            times = [found.ms(file, name, dtype, part) for part in parts]
            size = file.split("_")[0].upper().replace("2", "/2")
            cells = ["-" if time is None else f"{time:.0f}" for time in times]
            rows.append([f"{size} {name} {dtype.removesuffix(' mixed')}", *cells])
    return table(["", "forward", "backward", "optimizer", "EMA", "step"], rows)


def family_table(found: Measured) -> str:
    """Return the time of each recipe's layer over its dense MLP's."""
    rows = found.rows.get("families", [])
    names = dict.fromkeys(r["contestant"] for r in rows if not r["contestant"].endswith(" dense"))
    shown, dtypes = [], list(dict.fromkeys(row["dtype"] for row in rows))
    for name in names:
        ratios = [found.ratio("families", name, f"{name} dense", dtype) for dtype in dtypes]
        shown.append([name, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
    return table(["layer over dense", *dtypes], shown)


def report(found: Measured) -> str:
    """Return all tables, and where they were measured."""
    about = found.machine
    load = f"{about['load'][0]:.1f}"
    where = f"{about['gpu'] or about['cpu']}, {about['cores']} cores, {about['threads']} threads"
    said = f"Measured on {about['time'][:10]}: {where}, torch {about['torch']}, load {load}."
    rows = [aim.cells() for aim in aims(found)]
    tables = [table(["what", "at most", "measured", ""], rows), step_table(found)]
    return "\n\n".join([said, *tables, family_table(found)])


# ------------------------------------------------------------------------------ script


def publish(found: Measured, text: str, docs: Path) -> None:
    """Copy the files to performance/ of a folder and put the tables on its page.

    Raises:
        FileError: the page has no place for them.
    """
    page = docs / "PERFORMANCE.md"
    old = page.read_text()
    between = re.compile(f"{re.escape(MARKS[0])}.*{re.escape(MARKS[1])}", re.DOTALL)
    if not between.search(old):
        raise FileError(f"{page} lacks the marks {MARKS[0]} and {MARKS[1]}")
    new = "\n\n".join([MARKS[0], text, MARKS[1]])
    for path in found.paths:
        shutil.copy(path, docs / "performance" / path.name)
    with atomic_write(page) as temp:
        temp.write_text(between.sub(lambda _: new, old))


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    parser.add_argument("folder", type=Path, help="of the files that all.sh made")
    group = parser.group("Run")
    group.add("--publish", type=Path, metavar="DOCS", help="folder of PERFORMANCE.md to write to")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the tables, and publish them if asked to."""
    found = Measured(args.folder)
    text = report(found)
    print(text)
    if args.publish:
        publish(found, text, args.publish)


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
