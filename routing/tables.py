"""The routing data of a model as a file: exact counts with what made them, merged and measured.

`RoutingData` is one .npz that `expert_data.py` writes and the figures read; a file may come from
anybody, so `load` looks at all of it before it believes any. `measure` turns it into the table
beside the pictures.

Shapes: X classes, L layers, E experts, K experts per token, T tokens per image, S sampling steps, R
images traced (C, H, W each); the axis of length 2 is conditional, unconditional (see `HALVES`).
"""

import csv
import dataclasses
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import process
from common.errors import FileError, UserError, printable
from common.files import atomic_write
from models import DiTConfig
from routing.counting import (
    dead_experts,
    load_entropy,
    max_violation,
    normalized_mutual_information,
    pair_counts,
    pair_usage,
)

FORMAT, VERSION = "dit-moe-routing", 2  # 1 called what is traced raw
HALVES = ("conditional", "unconditional")
FACTORS = ("class", "step", "patch")
ADDED = ("by_class", "by_step", "by_patch", "pairs", "probs", "rows")  # tables that a merge adds
TRACED = (
    "traced_ids",
    "traced_labels",
    "traced_images",
)  # tables that a merge puts one after the other
# What a file holds: its arrays, with a letter per axis (see above), and its metadata.
ARRAYS: dict[str, tuple[str, type]] = {  # with the widest type
    "times": ("S", np.float64),
    "by_class": ("2XLE", np.int64),
    "by_step": ("2SLE", np.int64),
    "by_patch": ("2TLE", np.int64),
    "pairs": ("2LEE", np.int64),
    "probs": ("2SLE", np.int64),
    "rows": ("2S", np.int64),
    "traced_ids": ("RSLTK", np.int32),
    "traced_labels": ("R", np.int64),
    "traced_images": ("RCHW", np.uint8),
}
META = {
    **{"config": dict, "checkpoint": dict, "source": str, "sampler": str, "num_steps": int},
    **{"cfg_scale": int | float, "class_names": list, "runs": list},
}
RUN = {"seed": int, "labels": list, "num_images": int, "images_done": int}
MAX_META_BYTES = 2**26
MAX_DEPTH = 10_000
MAX_NAME = 40  # characters of a name in figures and tables
UNCONDITIONAL = "U"  # the expert for images without a class, which has no number
UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)


@dataclasses.dataclass
class RoutingData:
    """Counts of the experts chosen, and how they were made.

    Attributes:
        meta: config, checkpoint, objective, source, sampler, guidance, class_names, and `runs`: one
            entry per run merged in, with its seed, labels and images done.
        times: (S,) fp64 t of each step, 0 = data, 1 = noise.
        traced_labels: (R,) int64 classes of the images whose choices are traced.
        traced_images: (R, C, H, W) uint8, those images.
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
    traced_ids: Tensor
    traced_labels: Tensor
    traced_images: Tensor

    @property
    def config(self) -> DiTConfig:
        """The model's."""
        return DiTConfig.from_dict(self.meta["config"])

    @property
    def num_experts(self) -> int:
        """E, all of them."""
        return self.by_step.shape[-1]

    @property
    def expert_names(self) -> list[str]:
        """What figures call the experts: numbers, and `UNCONDITIONAL`."""
        names = [str(expert) for expert in range(self.config.num_experts)]
        return [*names, UNCONDITIONAL] if self.config.unconditional_expert else names

    @property
    def layers(self) -> list[int]:
        """Numbers of the blocks that have experts, one for each L."""
        return [block for block in range(self.config.depth) if self.config.is_moe_block(block)]

    @property
    def has_pairs(self) -> bool:
        """Whether a token may have more than one expert."""
        return self.config.selection != "token_choice" or self.config.num_experts_per_tok > 1

    @property
    def class_names(self) -> list[str]:
        """Names of the classes as they may be shown, numbers where the checkpoint has none."""
        names, num_classes = self.meta["class_names"], self.by_class.shape[1]
        if not names:
            return [str(i) for i in range(num_classes)]
        more = [f"class {i}" for i in range(len(names), num_classes)]  # --num-classes was larger
        return [*map(shown, names[:num_classes]), *more]

    @property
    def both_halves(self) -> bool:
        """Whether images were routed without their class too, as guidance does."""
        return bool(self.rows[1].sum() > 0)

    @property
    def images_done(self) -> int:
        """Images counted so far, over all runs."""
        return sum(run["images_done"] for run in self.meta["runs"])

    @property
    def title(self) -> str:
        """Say in a line what was counted."""
        config, meta = self.config, self.meta
        sampler = shown(meta["sampler"])
        how = f"{sampler}, {meta['num_steps']} steps, guidance {meta['cfg_scale']:g}"
        source = f"{self.images_done:,} samples ({how})"
        if meta["source"] == "real":
            source = f"{self.images_done:,} real images at {meta['num_steps']} noise levels"
        more = " and one unconditional" if config.unconditional_expert else ""
        experts = f"{config.num_experts} experts{more}, {config.experts_per_token:g} per token"
        name = shown(Path(meta["checkpoint"]["path"]).name)
        return f"{name}: {config.depth} layers, {experts}; {source}"

    def counts(self, factor: str, half: str = "conditional") -> Tensor:
        """Return one table layer first, (L, X, E); classes that were not drawn are left out.

        Raises:
            UserError: if that half was not run.
        """
        index = HALVES.index(half)
        if self.rows[index].sum() == 0:
            without = "without" if index else "with"
            raise UserError(f"--half {half}: no image was routed {without} its class here")
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
        arrays = {name: getattr(self, name).numpy() for name in ARRAYS}
        with atomic_write(path) as temp, open(temp, "wb") as file:
            np.savez_compressed(file, meta=json.dumps(self.meta), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "RoutingData":
        """Read a file of `save`; the largest t comes first, whatever the file's order.

        Raises:
            FileError: there is none, it is something else, damaged, or newer than this code.
        """
        if not Path(path).is_file():
            raise FileError(f"no such file: {path}")
        try:
            with zipfile.ZipFile(path) as archive:
                meta = _read_meta(archive)
                names = {name: _name_in(meta, name) for name in ARRAYS}
                _check_shapes(meta, {name: _read_header(archive, name, names) for name in ARRAYS})
            with np.load(path, allow_pickle=False) as file:
                found = {name: file[names[name]] for name in ARRAYS}
            arrays = {
                name: torch.from_numpy(array if array.size else array.astype(ARRAYS[name][1]))
                for name, array in found.items()
            }
            meta["version"] = VERSION
            data = cls(meta, **arrays)
            _check_values(data)
        except UNREADABLE as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise FileError(f"{path} is no routing data of expert_data.py: {reason}") from error
        return data.noise_first()

    def noise_first(self) -> "RoutingData":
        """Return the same data with the steps in the order of sampling, t falling."""
        order = self.times.argsort(descending=True, stable=True)
        axes = {name: axes.index("S") for name, (axes, _) in ARRAYS.items() if "S" in axes}
        sorted_ = {name: getattr(self, name).index_select(i, order) for name, i in axes.items()}
        return dataclasses.replace(self, **sorted_)


# ------------------------------------------------------------------------------ reading a file


def _read_meta(archive: zipfile.ZipFile) -> dict[str, Any]:
    """Return the metadata after a look at the type of all that is used.

    Raises:
        ValueError, KeyError: what is wrong.
    """
    if archive.getinfo("meta.npy").file_size > MAX_META_BYTES:
        raise ValueError("its metadata are too large")
    with archive.open("meta.npy") as file:
        meta = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(f"its metadata do not say format {FORMAT}")
    version = meta.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"it has version {version}, expected up to {VERSION}")
    _check_types(meta, META, "its metadata")
    _check_types(meta["checkpoint"], {"path": str}, "checkpoint")
    if not all(isinstance(name, str) for name in meta["class_names"]):
        raise ValueError("class_names are not all text")
    for run in meta["runs"]:
        _check_types(run, RUN, "runs")
        if not all(isinstance(label, int) for label in run["labels"]):
            raise ValueError("labels of a run are not all numbers")
    if not meta["runs"]:
        raise ValueError("it has no runs")
    return meta


def _check_types(found: Any, wanted: dict[str, Any], where: str) -> None:
    if not isinstance(found, dict):
        raise ValueError(f"{where} has no fields")
    for key, kind in wanted.items():
        if not isinstance(found[key], kind):
            raise ValueError(f"{where}: {key} is a {type(found[key]).__name__}")


def _name_in(meta: dict[str, Any], name: str) -> str:
    """Return what a file of that version calls an array."""
    return name.replace("traced_", "raw_") if meta["version"] == 1 else name


def _read_header(archive: zipfile.ZipFile, name: str, names: dict[str, str]) -> tuple[int, ...]:
    """Return the shape of an array, without reading it, by its name and that in the file.

    Raises:
        ValueError: it has another type, or its bytes are not as many as its shape says.
    """
    info, wanted = archive.getinfo(f"{names[name]}.npy"), np.dtype(ARRAYS[name][1])
    with archive.open(info) as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        fits = dtype.kind in wanted.kind + "u" and np.can_cast(dtype, wanted)
        if not fits and 0 not in shape:  # of nothing, older files say float32
            raise ValueError(f"{name} is {dtype}, expected {wanted}")
        if file.tell() + dtype.itemsize * math.prod(shape) != info.file_size:
            raise ValueError(f"{name} is cut")
    return shape


def _check_shapes(meta: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Compare the shapes with the config and with each other.

    Raises:
        ValueError: naming the array that does not fit, or how much memory all would need.
    """
    config = DiTConfig.from_dict(meta["config"])
    sizes = {"2": 2, "X": config.num_classes, "E": config.num_all_experts, "S": meta["num_steps"]}
    sizes |= {"K": config.num_experts_per_tok, "T": config.num_patches}
    sizes |= {"L": sum(config.is_moe_block(block) for block in range(min(config.depth, MAX_DEPTH)))}
    for name, shape in shapes.items():
        axes = ARRAYS[name][0]
        # R, C, H and W are what the first array with that axis has
        same = len(axes) == len(shape) and all(
            sizes.setdefault(axis, size) == size for axis, size in zip(axes, shape, strict=True)
        )
        if not same:
            expected = ", ".join(str(sizes.get(axis, axis)) for axis in axes)
            raise ValueError(f"{name} is {shape}, expected ({expected})")
    if min(size for axis, size in sizes.items() if axis != "R") < 1 or sizes["C"] not in (1, 3):
        raise ValueError(f"it has axes of length {sizes}")
    needed = sum(
        math.prod(shape) * np.dtype(ARRAYS[name][1]).itemsize for name, shape in shapes.items()
    )
    process.check_memory(needed, "it")


def _check_values(data: "RoutingData") -> None:
    """Look at the numbers that are used to find others.

    Raises:
        ValueError: naming the array.
    """
    if not ((data.times >= 0) & (data.times <= 1)).all():
        raise ValueError("times are not all in [0, 1]")
    if any(getattr(data, name).min() < 0 for name in ADDED):
        raise ValueError("it has counts below 0")
    for name, end in (
        ("traced_ids", data.num_experts + 1),
        ("traced_labels", data.by_class.shape[1]),
    ):
        table = getattr(data, name)
        if table.numel() and not 0 <= int(table.min()) <= int(table.max()) < end:
            raise ValueError(f"{name} are not all in [0, {end - 1}]")
    if data.by_class[0].sum() == 0 or data.rows[0].sum() == 0:
        raise ValueError("it has no counts")


def shown(name: str) -> str:
    """Return a name, which may be another's, as a line that is safe to print and not too long."""
    name = printable(name).replace("\n", "\\n")
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"


def refuse_foreign(path: str | Path, *markers: bytes) -> None:
    """Refuse to replace what is not ours.

    Args:
        path: of a file that is about to be written.
        markers: bytes of which every file has one that our scripts write, or wrote, there.

    Raises:
        FileError: there is something else, or no place for a file.
    """
    path = Path(path)
    content = path.read_bytes() if path.is_file() else b""
    if content and not any(marker in content for marker in markers):
        raise FileError(f"--out: {path} exists and is none of ours; choose another name or move it")
    if path.exists() and not path.is_file():
        raise FileError(f"--out {path} is not a file")


# ------------------------------------------------------------------------------ merging


def comparable(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the metadata in which data that are added up must agree."""
    whole = {key: value for key, value in meta.items() if key != "runs"}
    whole["config"] = DiTConfig.from_dict(meta["config"]).to_dict()  # with fields new since then
    checkpoint = meta["checkpoint"].items()
    whole["checkpoint"] = {key: value for key, value in checkpoint if key not in ("path", "file")}
    return whole


def merge(parts: Sequence[RoutingData]) -> RoutingData:
    """Add up runs of one model that differ in seed or labels only.

    Raises:
        UserError: if they differ in anything else, or the same images would count twice.
    """
    first, *others = parts
    runs = list(first.meta["runs"])
    for other in others:
        wanted, found = comparable(first.meta), comparable(other.meta)
        if different := [key for key in wanted if wanted[key] != found.get(key)]:
            key = different[0]
            raise UserError(f"--merge: {key} differs: {wanted[key]} and {found.get(key)}")
        if not torch.equal(first.times, other.times):
            raise UserError(f"--merge: times differ: {first.times} and {other.times}")
        for name in ("traced_ids", "traced_images"):
            one, two = (getattr(part, name).shape[1:] for part in (first, other))
            if one != two:
                raise UserError(f"--merge: {name} differ in shape: {tuple(one)} and {tuple(two)}")
        for run in other.meta["runs"]:
            twins = [one for one in runs if one["seed"] == run["seed"]]
            if any(_images(one) & _images(run) for one in twins):
                raise UserError(f"--merge: seed {run['seed']} is there twice with the same images")
            runs.append(run)
    tables = {
        name: torch.stack([getattr(part, name) for part in parts]).sum(dim=0) for name in ADDED
    }
    tables |= {name: torch.cat([getattr(part, name) for part in parts]) for name in TRACED}
    return RoutingData({**first.meta, "runs": runs}, first.times, **tables)


def _images(run: dict[str, Any]) -> set[Any]:
    """Return what tells the images of a run from those of others with its seed."""
    return set(run.get("pictures") or run["labels"])


# ------------------------------------------------------------------------------ the table

TABLES = {".csv": b"half,layer,", ".json": b'"half": '}  # what each has near its start
MEANINGS = {
    "nmi": "how much class, step or patch tell about the expert: 0 = nothing, 1 = they decide "
    "(normalised mutual information)",
    "entropy": "how even the load of the experts is: 1 = even, 0 = one expert takes everything",
    "max_vio": "how far the busiest expert is above the even load: 0 = even, 1 = twice as much",
    "dead": "experts that were never chosen",
    "pair_usage": "share of all pairs of experts that some token chose together",
    "pair_entropy": "how evenly the pairs are used: 1 = all alike",
}
SUFFIXES = {
    "_class, _step, _patch": "the mean over single classes, steps or patches",
    "_early, _middle, _late": "the first quarter of the steps (noise), the middle half, the last "
    "quarter (picture)",
}


def measure(data: RoutingData, half: str = "conditional") -> list[dict[str, Any]]:
    """Measure each layer, one row a layer.

    Columns: `nmi_X`, how much X tells about the expert; `entropy`, `max_vio`, `dead` of the layer's
    whole load, and `entropy_X`, `max_vio_X`, `dead_X` averaged over the single classes, steps and
    patches; `entropy_early`, `_middle` and `_late` over the first quarter of the steps that this
    half ran in, the middle half and the last quarter; where a token may have several experts
    `pair_usage`, the share of expert pairs ever chosen, and `pair_entropy`, how evenly.

    The conditional half is that of the routed experts: the unconditional one cannot serve there.
    """
    K = data.config.experts_per_token
    serving = data.config.num_experts if half == "conditional" else data.num_experts
    tables = {factor: data.counts(factor, half)[..., :serving] for factor in FACTORS}
    steps = tables["step"]  # (L, S, E)
    steps = steps[:, steps.sum(dim=(0, 2)) > 0]  # guidance may be off in the others
    num_steps = steps.shape[1]
    load = steps.sum(dim=1)
    columns: dict[str, Tensor] = {}
    for factor in FACTORS:
        columns[f"nmi_{factor}"] = normalized_mutual_information(tables[factor], K)
    for name, measured in (
        ("entropy", load_entropy),
        ("max_vio", max_violation),
        ("dead", dead_experts),
    ):
        columns[name] = measured(load)
        for factor in FACTORS:
            counts = steps if factor == "step" else tables[factor]
            columns[f"{name}_{factor}"] = measured(counts).double().mean(dim=1)
    by_step = load_entropy(steps)  # (L, S)
    quarter = max(num_steps // 4, 1)
    middle = slice(min(quarter, num_steps - 1), max(num_steps - quarter, quarter + 1))
    columns["entropy_early"] = by_step[:, :quarter].mean(dim=1)
    columns["entropy_middle"] = by_step[:, middle].mean(dim=1)
    columns["entropy_late"] = by_step[:, -quarter:].mean(dim=1)
    if data.has_pairs:
        pairs = data.pairs[HALVES.index(half), :, :serving, :serving]
        columns["pair_usage"] = pair_usage(pairs)
        columns["pair_entropy"] = load_entropy(pair_counts(pairs))
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    return [
        {"half": half, "layer": layer, **dict(zip(columns, row, strict=True))}
        for layer, row in zip(data.layers, values, strict=True)
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
    """Write the rows as PATH.csv and PATH.json, PATH being without its suffix .npz."""
    with atomic_write(Path(path).with_suffix(".csv")) as temp, open(temp, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with atomic_write(Path(path).with_suffix(".json")) as temp:
        temp.write_text(json.dumps(list(rows), indent=1))
