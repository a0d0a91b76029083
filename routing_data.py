"""The routing data of a model as a file: exact counts with what made them, merged and measured.

`RoutingData` is one .npz that `expert_data.py` writes and the figures read; `measure` turns it into
the table beside the pictures.

Shapes: L layers, E experts, K experts per token, T tokens per image, S sampling steps, R images
kept whole; the axis of length 2 is conditional, unconditional (see `HALVES`).
"""

import csv
import dataclasses
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import atomic_write
from models import DiTConfig
from routing import (
    dead_experts,
    load_entropy,
    max_violation,
    normalized_mutual_information,
    pair_counts,
    pair_usage,
)

FORMAT, VERSION = "dit-moe-routing", 1
HALVES = ("conditional", "unconditional")
FACTORS = ("class", "step", "patch")
ADDED = ("by_class", "by_step", "by_patch", "pairs", "probs", "rows")  # tables that a merge adds
KEPT = ("raw_ids", "raw_labels", "raw_images")  # tables that a merge puts one after the other


@dataclasses.dataclass
class RoutingData:
    """Counts of the experts chosen, and how they were made.

    Attributes:
        meta: config, checkpoint, objective, source, sampler, guidance, class_names, and `runs`: one
            entry per run merged in, with its seed, labels and images done.
        times: (S,) fp64 t of each step, 0 = data, 1 = noise.
        raw_labels: (R,) int64 classes of the images whose choices are kept whole.
        raw_images: (R, C, H, W) uint8, those images.
        others: see `routing.RoutingRecorder.tables`.
    """

    meta: dict[str, Any]
    times: Tensor
    by_class: Tensor
    by_step: Tensor
    by_patch: Tensor
    pairs: Tensor
    probs: Tensor
    rows: Tensor
    raw_ids: Tensor
    raw_labels: Tensor
    raw_images: Tensor

    @property
    def config(self) -> DiTConfig:
        """The model's."""
        return DiTConfig.from_dict(self.meta["config"])

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, numbers where the checkpoint has none."""
        return self.meta["class_names"] or [str(i) for i in range(self.by_class.shape[1])]

    @property
    def images_done(self) -> int:
        """Images counted so far, over all runs."""
        return sum(run["images_done"] for run in self.meta["runs"])

    @property
    def title(self) -> str:
        """Say in a line what was counted."""
        config, meta = self.config, self.meta
        how = f"{meta['sampler']}, {meta['num_steps']} steps, guidance {meta['cfg_scale']:g}"
        source = f"{self.images_done:,} samples ({how})"
        if meta["source"] == "real":
            source = f"{self.images_done:,} real images at {meta['num_steps']} noise levels"
        experts = f"{config.num_experts} experts, {config.num_experts_per_tok} per token"
        return (
            f"{Path(meta['checkpoint']['path']).name}: {config.depth} layers, {experts}; {source}"
        )

    def counts(self, factor: str, half: str = "conditional") -> Tensor:
        """Return one table layer first, (L, X, E); classes that were not drawn are left out.

        Raises:
            ValueError: if that half was not run.
        """
        index = HALVES.index(half)
        if self.rows[index].sum() == 0:
            raise ValueError(f"--half {half}: no image was routed without its class here")
        table = getattr(self, f"by_{factor}")[index].transpose(0, 1)
        return table[:, self.drawn_classes] if factor == "class" else table

    @property
    def drawn_classes(self) -> Tensor:
        """Numbers of the classes with at least one image."""
        return self.by_class.sum(dim=(0, 2, 3)).nonzero().flatten()

    def mean_probs(self, half: str = "conditional") -> Tensor:
        """Return the mean router probability of each expert, (L, E) fp64."""
        total = self.probs[HALVES.index(half)].sum(dim=0).double()
        return total / total.sum(dim=-1, keepdim=True).clamp(min=1)

    def save(self, path: str | Path) -> None:
        """Write the .npz, all of it or nothing."""
        arrays = {name: getattr(self, name).numpy() for name in ("times", *ADDED, *KEPT)}
        with atomic_write(path) as temp, open(temp, "wb") as file:
            np.savez_compressed(file, meta=json.dumps(self.meta), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingData":
        """Read a file of `save`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is something else, or newer than this code.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no such file: {path}")
        try:
            with np.load(path, allow_pickle=False) as file:
                meta = json.loads(str(file["meta"]))
                arrays = {name: torch.from_numpy(file[name]) for name in ("times", *ADDED, *KEPT)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is no routing data of expert_data.py: {error}") from error
        if meta.get("format") != FORMAT or meta["version"] > VERSION:
            raise ValueError(
                f"{path} has format {meta.get('format')} version {meta.get('version')}, "
                f"expected {FORMAT} up to version {VERSION}"
            )
        return cls(meta, **arrays)


def comparable(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the metadata in which data that are added up must agree."""
    checkpoint = {key: value for key, value in meta["checkpoint"].items() if key != "path"}
    return {key: value for key, value in meta.items() if key != "runs"} | {"checkpoint": checkpoint}


def merge(parts: Sequence[RoutingData]) -> RoutingData:
    """Add up runs of one model that differ in seed or labels only.

    Raises:
        ValueError: if they differ in anything else, or the same images would count twice.
    """
    first, *others = parts
    runs = list(first.meta["runs"])
    for other in others:
        wanted, found = comparable(first.meta), comparable(other.meta)
        if different := [key for key in wanted if wanted[key] != found.get(key)]:
            key = different[0]
            raise ValueError(f"--merge: {key} differs: {wanted[key]} and {found.get(key)}")
        if not torch.equal(first.times, other.times):
            raise ValueError(f"--merge: times differ: {first.times} and {other.times}")
        for run in other.meta["runs"]:
            twins = [one for one in runs if one["seed"] == run["seed"]]
            if any(set(one["labels"]) & set(run["labels"]) for one in twins):
                raise ValueError(f"--merge: seed {run['seed']} is there twice with the same labels")
            runs.append(run)
    tables = {
        name: torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in ADDED
    }
    tables |= {name: torch.cat([getattr(part, name) for part in parts]) for name in KEPT}
    return RoutingData({**first.meta, "runs": runs}, first.times, **tables)


# ------------------------------------------------------------------------------ the table


def measure(data: RoutingData, half: str = "conditional") -> list[dict[str, Any]]:
    """Measure each layer, one row a layer.

    Columns: `nmi_X`, how much X tells about the expert; `entropy`, `max_vio`, `dead` of the layer's
    whole load, and `entropy_X`, `max_vio_X`, `dead_X` averaged over the single classes, steps and
    patches; `entropy_early`, `_middle` and `_late` over the first quarter of the steps that this
    half ran in, the middle half and the last quarter; with K > 1 `pair_usage`, the share of expert
    pairs ever chosen, and `pair_entropy`, how evenly.
    """
    K = data.config.num_experts_per_tok
    steps = data.counts("step", half)  # (L, S, E)
    steps = steps[:, steps.sum(dim=(0, 2)) > 0]  # guidance may be off in the others
    num_steps = steps.shape[1]
    load = steps.sum(dim=1)
    columns: dict[str, Tensor] = {}
    for factor in FACTORS:
        columns[f"nmi_{factor}"] = normalized_mutual_information(data.counts(factor, half), K)
    for name, measured in (
        ("entropy", load_entropy),
        ("max_vio", max_violation),
        ("dead", dead_experts),
    ):
        columns[name] = measured(load)
        for factor in FACTORS:
            counts = steps if factor == "step" else data.counts(factor, half)
            columns[f"{name}_{factor}"] = measured(counts).double().mean(dim=1)
    by_step = load_entropy(steps)  # (L, S)
    quarter = max(num_steps // 4, 1)
    middle = slice(min(quarter, num_steps - 1), max(num_steps - quarter, quarter + 1))
    columns["entropy_early"] = by_step[:, :quarter].mean(dim=1)
    columns["entropy_middle"] = by_step[:, middle].mean(dim=1)
    columns["entropy_late"] = by_step[:, -quarter:].mean(dim=1)
    if K > 1:
        pairs = data.pairs[HALVES.index(half)]
        columns["pair_usage"] = pair_usage(pairs)
        columns["pair_entropy"] = load_entropy(pair_counts(pairs))
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"half": half, "layer": layer, **dict(zip(columns, row, strict=True))}
        for layer, row in enumerate(values)
    ]


def measure_all(data: RoutingData) -> list[dict[str, Any]]:
    """Measure every half that was run."""
    run = [half for half, rows in zip(HALVES, data.rows, strict=True) if rows.sum() > 0]
    return [row for half in run for row in measure(data, half)]


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> str:
    """Lay out some columns of `measure` for a terminal, with their means below."""
    width = {name: max(len(name), 6) for name in columns}
    lines = ["layer  " + "  ".join(f"{name:>{width[name]}}" for name in columns)]
    for row in rows:
        cells = (f"{row[name]:{width[name]}.3f}" for name in columns)
        lines.append(f"{row['layer']:>5}  " + "  ".join(cells))
    means = (np.mean([row[name] for row in rows]) for name in columns)
    cells = (f"{mean:{width[name]}.3f}" for name, mean in zip(columns, means, strict=True))
    return "\n".join([*lines, " mean  " + "  ".join(cells)])


def save_table(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Write the rows as PATH.csv and PATH.json, PATH being without its suffix."""
    with atomic_write(Path(path).with_suffix(".csv")) as temp, open(temp, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(Path(path).with_suffix(".json")) as temp:
        temp.write_text(json.dumps(list(rows), indent=1))
