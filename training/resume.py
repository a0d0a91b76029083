"""Going on with a run: which checkpoint, whether it is of this run, and its random state.

In the order a run uses them: `find_resume`, `check_resumable`, `restore_rng`.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint.described import read_config, read_settings
from checkpoint.state import (
    checkpoint_to_resume,
    latest_checkpoint,
    resolve_checkpoint,
    verify_checkpoint,
)
from checkpoint.weights import load_settings
from common import process
from common.errors import FileError, UserError
from training.job import Job
from training.settings import WARN_IF_CHANGED, TrainSettings


def find_resume(settings: TrainSettings) -> Path | None:
    """Return the checkpoint to continue from by `--resume`, None to start fresh.

    A command that goes back to a file and is given again goes on where it stopped, as any other.

    Raises:
        UserError: if `--resume never` would write over a run.
        FileError: if a checkpoint, or this node's copy of the run, cannot be read or is not there.
    """
    run_dir, wanted = settings.run_dir, Path(settings.resume)
    if settings.resume == "never":
        if process.call_on_main(latest_checkpoint, run_dir) is not None:
            raise UserError(f"--resume never: {run_dir} has checkpoints; give another --run-name")
        return None
    latest = process.call_on_main(checkpoint_to_resume, run_dir)
    if latest is not None and not latest.exists():
        raise FileError(
            f"--results-dir {settings.results_dir}: no {latest} here, but on the main node; "
            "the nodes must share it"
        )
    if settings.resume == "auto":
        return latest
    if latest is not None and process.call_on_main(_is_of_this_command, latest, settings):
        logging.warning(
            "%s went back to %s before: going on from %s, its last. To go back once more, give "
            "another --run-name", run_dir, wanted, latest,
        )  # fmt: skip
        return latest
    if not wanted.exists():
        raise FileError(f"--resume {wanted}: no such file")
    wanted = process.call_on_main(resolve_checkpoint, wanted)
    process.call_on_main(verify_checkpoint, wanted)
    return wanted


def _is_of_this_command(latest: Path, settings: TrainSettings) -> bool:
    """Tell whether a checkpoint was written by a run that began with these settings' `--resume`."""
    before, now = with_defaults(load_settings(latest)), settings.to_dict()
    same = ("resume", "objective", "model", *WARN_IF_CHANGED)
    return all(before.get(name) == now[name] for name in same)


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a checkpoint with what later versions added, as it was then."""
    fields, missing = dataclasses.fields(TrainSettings), dataclasses.MISSING
    later = {f.name: f.default for f in fields if f.default is not missing}
    later |= {f.name: f.default_factory() for f in fields if f.default_factory is not missing}
    return {**later, **settings}


def check_resumable(job: Job, path: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare a checkpoint with the flags; warn where the run goes on in another way.

    Args:
        job: of the flags.
        path: of the checkpoint, for messages.
        config: of its model.
        settings: saved with it.

    Raises:
        UserError: naming what differs, if it is of another model, objective or data set, or what
            it holds is no settings.
    """
    settings = with_defaults(read_plain_settings(settings, f"--resume: {path}"))
    if difference := data_difference(settings, job.settings):
        text = f"{path} was trained on other data than --data-path {job.settings.data_path}: "
        if not job.settings.allow_new_data:
            raise UserError(
                f"--resume: {text}{difference}; give the same data, --allow-new-data to go on "
                "with this, or another --run-name to start anew"
            )
        logging.warning("%s%s", text, difference)
    names: tuple[str, ...] = ("objective", "time_scale", "latent_stats")
    names += ("prediction", "zero_terminal_snr", "optimizer")
    ours = {**job.model.config.to_dict(), **{name: getattr(job.settings, name) for name in names}}
    # Read as a config: JSON has lists for tuples, and older versions lack fields that came later.
    theirs = {
        **read_config(config, f"--resume: {path}").to_dict(),
        **{name: settings[name] for name in names},
    }
    if theirs["objective"] == "rf":
        theirs["time_scale"] = theirs["time_scale"] or 1.0  # older ones say nothing of it
    if not (ours["qk_norm"] or theirs["qk_norm"]):
        theirs["qk_norm_eps"] = ours["qk_norm_eps"]  # of nothing
    if differing := [name for name in ours if theirs[name] != ours[name]]:
        raise UserError(
            f"--resume: {path} was trained with another {', '.join(differing)}; "
            "give the same flags, or another --run-name to start anew"
        )
    for name in WARN_IF_CHANGED:
        if (before := settings.get(name)) != (now := getattr(job.settings, name)):
            logging.warning("%s: --%s was %s, is %s", path, name.replace("_", "-"), before, now)


def read_plain_settings(content: Any, source: str) -> dict[str, Any]:
    """Return the settings of a checkpoint, all of which can be compared with those of a run.

    Raises:
        FileError: naming the first entry of another type.
    """
    settings = read_settings(content, source)
    for name, entry in settings.items():
        if not _is_plain(entry):
            raise FileError(f"{source} is damaged: {name} in its settings is {entry!r:.60}")
    if settings.get("objective") is None:
        raise FileError(f"{source} is damaged: its settings lack the objective")
    if not isinstance(entry := settings.get("data_fingerprint", {}), dict):
        raise FileError(f"{source} is damaged: data_fingerprint in its settings is {entry!r:.60}")
    return settings


def _is_plain(value: Any) -> bool:
    """Tell whether a value is as JSON has them."""
    if isinstance(value, list | tuple | dict):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float)


def data_difference(before: dict[str, Any], now: TrainSettings) -> str | None:
    """Say how the data of a run differs from what it was, None if it is the same.

    Args:
        before: settings of a checkpoint; one of before fingerprints tells its classes only.
        now: settings of this run.
    """
    names, ours = before.get("class_names", now.class_names), now.class_names
    if names != ours:
        gone = [repr(name) for name in names if name not in ours]
        new = [repr(name) for name in ours if name not in names]
        parts = {"gone": gone, "new": new}
        lists = [f"{word}: {', '.join(part[:5])}" for word, part in parts.items() if part]
        return f"it had {len(names)} classes, now {len(ours)} ({'; '.join(lists) or 'reordered'})"
    known = before.get("data_fingerprint", now.data_fingerprint)
    if known == now.data_fingerprint:
        return None
    counts = [data.get("num_images") for data in (known, now.data_fingerprint)]
    if counts[0] != counts[1]:
        return f"it had {counts[0]} images, now {counts[1]}"
    return f"as many images, {counts[0]}, but other files or labels"


def restore_rng(
    job: Job, path: Path, step: int, num_ranks: int, read: Callable[[int], dict[str, Tensor]]
) -> None:
    """Restore this rank's generators from a checkpoint, or seed anew if the ranks are others.

    Args:
        job: of this run.
        path: of the checkpoint, for messages.
        step: of the checkpoint.
        num_ranks: of the run that saved it.
        read: returns the `process.rng_state` that a rank saved.
    """
    if num_ranks == job.rt.world_size:
        process.set_rng_state(read(job.rt.rank))
        return
    logging.warning(
        "%s is from %d ranks, this run has %d: noise and label drops go on from new seeds",
        path, num_ranks, job.rt.world_size,
    )  # fmt: skip
    torch.manual_seed(job.settings.seed + 1 + job.rt.rank + 1000 * step)
