"""The weights that a run starts from: drawn from its seed, or those of `--init-from` made to fit.

In order: `open_initial`, `check_same_network` (what no fitting can change), `Start` and
`plan_start` (what is taken and what is not, from shapes and names alone), `initial_weights`.

Shape letters: D hidden, C channels, P patch.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from checkpoint.layouts import known_fields
from checkpoint.weights import Weights, empty_model, open_weights, read_blocks
from common.errors import UserError
from models import DiTConfig, initialize_parameter
from training.settings import TrainSettings

# Fields of a config that weights can be computed with otherwise than they were trained.
COMPUTED = (
    *("class_dropout_prob", "num_experts_per_tok", "capacity", "exact_thresholds"),
    *("norm_topk_prob", "routed_scaling_factor", "balance", "qk_norm_eps"),
)
# Fields that the data decide, to which weights are made to fit.
FITTED = ("input_size", "patch_size", "in_channels", "num_classes", "learn_sigma")
POSITIONS, LABELS = "pos_embed", "y_embedder.embedding_table.weight"
PATCHES = "x_embedder.proj.weight"
OUTPUT = ("final_layer.linear.weight", "final_layer.linear.bias")
MAX_LISTED = 10  # class names in a line


def open_initial(settings: TrainSettings) -> Weights:
    """Open the weights of `--init-from`; a published file is of the size that `--model` names."""
    assert settings.init_from is not None
    return open_weights(settings.init_from, known=known_fields(settings.model))


def check_same_network(settings: TrainSettings, config: DiTConfig, initial: DiTConfig) -> None:
    """Compare the model that the flags describe with that of `--init-from`.

    Raises:
        UserError: naming the first field that differs in more than what is computed, or, with
            `--init-strict`, in what the data decide.
    """
    free = {*COMPUTED, *(() if settings.init_strict else FITTED)}
    ours, given = config.to_dict(), initial.to_dict()
    for name in sorted(set(ours) - free):
        if ours[name] != given[name]:
            raise UserError(
                f"--init-from {settings.init_from} has {name} {given[name]}, this run "
                f"{ours[name]}: choose --model (now {settings.model}), the data and the MoE flags "
                "as it has them"
            )


class Start(NamedTuple):
    """How the weights of `--init-from` become those of a run."""

    rows: dict[int, int]  # labels of the run that the file knows -> their rows there
    anew: dict[str, str]  # tensor that is not taken whole -> what becomes of it
    num_taken: int  # tensors taken whole


def label_rows(
    names: Sequence[str], num_classes: int, their_names: Sequence[str], their_num: int
) -> dict[int, int]:
    """Return which label is which: by name if both sides have names, else by equal numbers.

    Args:
        names: of the run's classes.
        num_classes: rows of the run but the null label's, which always is the last.
        their_names: of the file's classes, [] if it tells none.
        their_num: rows of the file.
    """
    if names and their_names:
        known = {name: row for row, name in enumerate(their_names[:their_num])}
        rows = {row: known[name] for row, name in enumerate(names) if name in known}
    else:
        rows = {row: row for row in range(num_classes if num_classes == their_num else 0)}
    return {**rows, num_classes: their_num}


def plan_start(settings: TrainSettings, config: DiTConfig, initial: Weights) -> Start:
    """Say what of `--init-from` is taken, without reading a tensor.

    Raises:
        UserError: `--init-strict`, and a label of the run is not in the file.
    """
    given = initial.config
    theirs = initial.settings.get("class_names") or []
    names = settings.class_names
    rows = label_rows(names, config.num_classes, theirs, given.num_classes)
    ours, found = (
        {name: tensor.shape for name, tensor in empty_model(one).state_dict().items()}
        for one in (config, given)
    )
    anew = {}
    for name, shape in ours.items():
        if name == LABELS and rows != {row: row for row in range(config.num_classes + 1)}:
            anew[name] = _tell_rows(rows, names, config.num_classes)
        elif name not in found:
            anew[name] = "the file has none: zeros"
        elif shape == found[name]:
            continue
        elif name == POSITIONS:
            side = config.input_size // config.patch_size
            anew[name] = f"computed for {side} x {side} patches"
        elif name == PATCHES or name in OUTPUT:
            anew[name] = _tell_channels(config, given)
    if settings.init_strict and LABELS in anew:
        raise UserError(f"--init-from {settings.init_from}: --init-strict, but {LABELS}: "
                        f"{anew[LABELS]}")  # fmt: skip
    return Start(rows, anew, len(ours) - len(anew))


def _tell_rows(rows: Mapping[int, int], names: Sequence[str], num_classes: int) -> str:
    known = dict(enumerate(names))
    new = [known.get(row, str(row)) for row in range(num_classes) if row not in rows]
    if not new:
        return "its rows put in the order of this run's classes"
    listed = ", ".join(new[:MAX_LISTED]) + (", …" if len(new) > MAX_LISTED else "")
    taken = f"{len(rows) - 1} rows taken by name, " if len(rows) > 1 else ""
    return f"{taken}the null label's row taken, {len(new)} drawn anew: {listed}"


def _tell_channels(config: DiTConfig, given: DiTConfig) -> str:
    if config.patch_size != given.patch_size:
        return f"drawn anew for patch size {config.patch_size} (the file: {given.patch_size})"
    if config.in_channels == given.in_channels:
        return "the mean's channels taken" + ("" if given.learn_sigma else ", the variance's zero")
    shared = min(config.in_channels, given.in_channels)
    new = config.in_channels - shared
    return f"channels 0 to {shared - 1} taken" + (f", {new} more drawn anew" if new else "")


def listing(settings: TrainSettings, start: Start) -> list[str]:
    """Return the lines that tell what a run starts from, before its first step."""
    lines = [f"initial weights: {start.num_taken} tensors of {settings.init_from} as they are"]
    return lines + [f"  {name}: {what}" for name, what in sorted(start.anew.items())]


def initial_weights(
    settings: TrainSettings, config: DiTConfig, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's first value, from `--init-from` or drawn from `--seed`.

    One at a time and the same on every rank, so that a rank can keep its share of each and no
    rank has to hold them all.

    Args:
        settings: of the run.
        config: of its model.
        shapes: of all parameters and of what else is saved.

    Raises:
        UserError: if the file of `--init-from` is damaged.
    """
    generator = torch.Generator().manual_seed(settings.seed)

    def drawn(name: str) -> Tensor:
        value = torch.empty(shapes[name])
        initialize_parameter(name, value, generator)
        return value

    if not settings.init_from:
        yield from ((name, drawn(name)) for name in shapes)
        return
    initial = open_initial(settings)
    start = plan_start(settings, config, initial)
    fresh = {name: drawn(name) for name in sorted(start.anew) if name in shapes}
    for _, tensors in read_blocks(initial):
        for name, value in tensors.items():
            if name in fresh:
                value = fitted(name, fresh.pop(name), value.float(), start, config, initial.config)
            if name in shapes:  # a bias that this run does not balance by is left
                yield name, value.float()
    yield from fresh.items()


def fitted(
    name: str, fresh: Tensor, value: Tensor, start: Start, config: DiTConfig, given: DiTConfig
) -> Tensor:
    """Return a tensor of the run, with what fits of the file's; `fresh` is written to."""
    if name == LABELS:
        ours, theirs = map(list, zip(*start.rows.items(), strict=True))
        fresh[ours] = value[theirs]
    elif name == PATCHES and config.patch_size == given.patch_size:
        shared = min(config.in_channels, given.in_channels)
        fresh[:, :shared] = value[:, :shared]  # (D, C, P, P)
    elif name in OUTPUT and config.patch_size == given.patch_size:
        halves = 1 + (config.learn_sigma and given.learn_sigma)
        channels = min(config.in_channels, given.in_channels)
        part = _by_channel(fresh, config)[:, :halves, :channels]
        part.copy_(_by_channel(value, given)[:, :halves, :channels])
    return fresh


def _by_channel(output: Tensor, config: DiTConfig) -> Tensor:
    """View the output layer's rows (P*P*C_out, ...) as (P*P, mean and variance, C, ...)."""
    return output.unflatten(0, (config.patch_size**2, 1 + config.learn_sigma, config.in_channels))
