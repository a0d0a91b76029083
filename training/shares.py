"""Checkpoints of a run that no rank holds whole: every rank writes its share, see sharded.py.

Both sharded trainers, ZeRO's and the expert-parallel one, save and go on by these two functions, so
a run may go on with the other one.
"""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint.sharded import (
    Fragment,
    ShardedCheckpoint,
    commit,
    latest_sharded,
    partial_folder,
    write_share,
    write_state,
)
from checkpoint.state import check_shapes
from common import process
from common.errors import FileError, UserError
from training.job import Job
from training.resume import check_resumable


def save_shares(
    job: Job,
    kinds: Mapping[str, Iterable[Fragment]],
    buffers: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    """Write a checkpoint, called on all ranks at once, then drop the oldest ones.

    Args:
        job: of the run.
        kinds: this rank's fragments by kind, of which no element is another rank's too.
        buffers: what all ranks have whole: routers' state and frozen parameters.
        state: what is the same on all ranks, beside config, settings and the number of ranks.

    Raises:
        UserError: on all ranks, if one could not write; the last checkpoint is untouched.
    """
    partial = partial_folder(job.run_dir, state["step"])
    error = None
    try:
        write_share(
            partial, job.rt.rank, kinds, process.rng_state(), buffers if job.rt.is_main else {}
        )
        if job.rt.is_main:
            common = {
                "config": job.model.config.to_dict(),
                "settings": job.settings.to_dict(),
                "num_ranks": job.rt.world_size,
            }
            write_state(partial, common | {**state})
    except OSError as failure:
        error = str(failure)
    errors = process.from_main([e for e in process.gather_on_main(error) if e])
    if errors:
        if job.rt.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        last = latest_sharded(job.run_dir)
        raise FileError(f"{errors[0]}; the last whole checkpoint is {last}, free some space")
    kept = (job.settings.keep_last, job.settings.resume)
    logging.info("checkpoint: %s", process.call_on_main(commit, partial, *kept))


def open_shares(
    job: Job,
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    buffers: Mapping[str, Sequence[int]],
) -> ShardedCheckpoint:
    """Open a checkpoint of this model, of any number of ranks and either trainer.

    Args:
        job: of the run.
        path: of the checkpoint.
        shapes, buffers: of the whole trained parameters, and of what `save_shares` calls so.

    Raises:
        ValueError: it is damaged, of another model, or not sharded.
    """
    if not (path / "state.json").is_file():
        raise UserError(
            f"--resume: {path} is no sharded checkpoint; give another --run-name, and "
            "--init-from to start from its weights"
        )
    checkpoint = ShardedCheckpoint(path)
    settings = checkpoint.state["settings"]
    check_resumable(job, path, checkpoint.state["config"], settings)
    if (settings.get("freeze") or []) != (job.settings.freeze or []):
        raise UserError(
            f"--freeze: {path} has no shards of what it froze: "
            f"{' '.join(settings.get('freeze') or ['nothing'])}; give the same, or "
            "another --run-name and --init-from"
        )
    check_shapes(path, checkpoint.shapes, shapes)
    found = {name: buffer.shape for name, buffer in checkpoint.buffers().items()}
    check_shapes(path, found, buffers)
    return checkpoint
