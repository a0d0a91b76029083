"""The training loop of both trainers: `Trainer` (what a script supplies), the loss, the loop.

In this order: `Trainer`, the loss of a micro-batch, which both scripts share, the batches, and the
loop around it all, `launch` and `fit`.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from checkpoint.run_lock import lock_run
from common import process
from common.stopping import ON_PURPOSE, StopRequest, stop_name
from data import make_loader
from moe_ops import expert_matmuls
from sampling.loss import loss_on_images
from training.job import Job, autocast, describe, prepare
from training.optimization import learning_rate
from training.quality import Quality
from training.repa import Encoder
from training.reporter import DivergedError, Reporter, draw_grid, grid_path, run_log
from training.resume import find_resume

Batch = tuple[Tensor, Tensor, dict[str, Any]]  # latents, labels, more arguments of training_loss


VAL_IMAGES, VAL_DRAWS = 1000, 2  # of the curve val/loss: images, and times and noises of each


class Trainer(Protocol):
    """What a script supplies: the wrapped model and who owns its updates and checkpoints."""

    job: Job
    step: int  # optimizer steps done
    skipped: int  # batches whose gradient overflowed float16, so that no step came of them

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches; returns () values to log.

        A gradient that overflows float16 changes nothing but the loss scale and `skipped`.
        """

    def is_finite(self) -> bool:
        """Tell whether all weights and averages are numbers; called on every rank."""

    def save(self) -> None:
        """Write a checkpoint of this step; called on every rank."""

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint."""

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Lend the model with averaged weights, in eval mode; called, and used, on every rank."""


# ------------------------------------------------------------------------------ one step


# The model's auxiliary losses as curves name them; with _weight after it, as settings do.
AUX_LOSSES = {
    "switch": "aux_loss",
    "contrastive": "contrastive_loss",
    "z_loss": "z_loss",
    "capacity": "capacity_loss",
    "repa": "repa_loss",
}


class MicroLoss(NamedTuple):
    """Losses of one micro-batch, each () fp32."""

    total: Tensor  # to differentiate: loss + the weighted auxiliary losses, summed over layers
    # Detached, to be logged: "loss" of the objective and, by `AUX_LOSSES`, those that the model
    # has, per layer and not weighted; aux_loss is 1.0 where the load is even.
    parts: dict[str, Tensor]


def micro_loss(job: Job, model: nn.Module, batch: Batch) -> MicroLoss:
    """Run the objective on a micro-batch through the wrapped model."""
    latents, labels, given = batch
    with autocast(job):
        out = job.diffusion.training_loss(model, latents, labels, **given)
    total = out.per_sample.mean()
    parts = {"loss": total.detach()}
    config = job.model.config
    num_layers = sum(config.is_moe_block(index) for index in range(config.depth))
    for kind, aux_loss in out.aux_losses.items():
        name = AUX_LOSSES[kind]
        total = total + getattr(job.settings, f"{name}_weight") * aux_loss
        parts[name] = aux_loss.detach() / (1 if kind == "repa" else num_layers)
    return MicroLoss(total, parts)


def mean_losses(losses: list[MicroLoss]) -> dict[str, Tensor]:
    """Average what a step logs over its micro-batches."""
    names = losses[0].parts
    return {name: torch.stack([micro.parts[name] for micro in losses]).mean() for name in names}


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Tell whether no element is infinite or no number, by the sums: nothing of a model's size."""
    return bool(torch.stack([tensor.detach().sum() for tensor in tensors]).isfinite().all())


def require_loss_scale(scale: float, step: int) -> None:
    """Give up a float16 run whose gradients overflow at any scale of the loss.

    Raises:
        DivergedError: the scale that the last overflow left is below 1.
    """
    if scale < 1:
        raise DivergedError(
            f"after step {step} the gradient overflows float16 whatever the loss is scaled by: the "
            "model diverged. Go on from an older checkpoint with a lower --lr or --precision fp32"
        )


# ------------------------------------------------------------------------------ the loop


def latent_batches(job: Job, num_drawn: int) -> Iterator[Batch]:
    """Yield this rank's endless micro-batches, after those of the first `num_drawn` steps."""
    loader = make_loader(
        job.dataset,
        micro_batch_size=job.settings.micro_batch_size,
        accum_steps=job.settings.accum_steps,
        rank=job.rt.rank,
        world_size=job.rt.world_size,
        seed=job.settings.seed,
        start_step=num_drawn,
        num_workers=job.settings.num_workers,
        pin_memory=job.rt.device.type == "cuda",
    )
    for batch, labels in loader:
        given = {}
        if isinstance(batch, tuple | list):  # a latent cache that has features
            batch, features = batch
            given = {"features": features.to(job.rt.device, non_blocking=True)}
        batch = batch.to(job.rt.device, non_blocking=True)
        if isinstance(job.encoder, Encoder):
            given = {"features": job.encoder(batch)}
        latents = job.dataset.latents(batch, job.vae)
        yield latents, labels.to(job.rt.device, non_blocking=True), given


def timed(batches: Iterator[Batch], reporter: Reporter) -> Iterator[Batch]:
    """Yield the batches, and tell how long they were waited for."""
    while True:
        with reporter.phases.during("data"):
            batch = next(batches)
        yield batch


def launch(
    args: argparse.Namespace,
    make_trainer: Callable[[Job], Trainer],
    *,
    meta: bool = False,
    precision: str | None = None,
    plan: Callable[[Job], str] = describe,
) -> None:
    """Run a training script: build everything, resume, train until `--max-steps`.

    A run that a signal stopped ends with the exit code 128 + its number, 130 or 143: it is not
    done, and the next command of a script must not run as if it were. One that was to be stopped,
    by SIGUSR1 or `--stop-after`, ends with 0.

    Args:
        args: of `build_parser`.
        make_trainer: the script's own part.
        meta, precision: see `prepare`.
        plan: what `--dry-run` prints.

    Raises:
        UserError, OSError: what a user can mend.
    """
    began = time.monotonic()
    job = prepare(args, meta=meta, precision=precision)
    if args.dry_run:
        if job.rt.is_main:
            print(plan(job))
        process.finish()
        return
    with generators_kept(job):  # a classifier may have to be trained
        quality = Quality(job) if job.settings.eval_every else None
    with lock_run(job.run_dir), run_log(job):
        if job.model.config.num_experts:
            dtype = process.DTYPES[job.settings.precision]
            logging.info("experts: %s", expert_matmuls(job.rt.device, dtype))
        checkpoint = find_resume(job.settings)
        trainer = make_trainer(job)
        if checkpoint:
            trainer.resume(checkpoint)
        hours = job.settings.stop_after
        deadline = None if hours is None else began + 3600 * hours
        stopped_by = fit(trainer, deadline, quality)
    process.finish(128 + stopped_by if stopped_by and stopped_by not in ON_PURPOSE else 0)


def fit(trainer: Trainer, deadline: float | None = None, quality: Quality | None = None) -> int:
    """Train from the trainer's step to `--max-steps`, logging, saving and drawing on the way.

    Args:
        trainer: of the run.
        deadline: value of `time.monotonic` after which to stop.
        quality: what samples are judged by, of `--eval-every`.

    Returns:
        What stopped it earlier, with its last step saved, see `StopRequest.agreed`; else 0.

    Raises:
        DivergedError: if the model is no longer made of numbers; that is never saved.
    """
    job, settings = trainer.job, trainer.job.settings
    with Reporter(job, trainer.step) as reporter, StopRequest(job.rt.device, deadline) as stop:
        if grid_is_due(trainer) and process.from_main(not grid_path(job, trainer.step).exists()):
            draw(trainer, reporter)  # a signal came between the save and the grid
        batches = timed(latent_batches(job, trainer.step + trainer.skipped), reporter)
        saved, stopped_by = trainer.step, 0
        while trainer.step < settings.max_steps and not stopped_by:
            before = trainer.step
            with reporter.phases.during("step"):
                values = trainer.train_step(islice(batches, settings.accum_steps))
            stopped_by = stop.agreed()
            if trainer.step == before:  # the gradient overflowed float16
                reporter.skip()
                continue
            reporter.add(**values)
            step = trainer.step
            saves = step % settings.ckpt_every == 0 or step == settings.max_steps
            if saves:
                save(trainer, reporter)
                saved = step
            elif step % settings.log_every == 0:
                reporter.log(step, learning_rate(settings, step))
            if grid_is_due(trainer) and not stopped_by:
                draw(trainer, reporter)
            if not stopped_by:
                judge(trainer, reporter)
                if quality is not None:
                    saved = judge_samples(trainer, reporter, quality, saved)
        if stopped_by and trainer.step > saved:
            save(trainer, reporter)
    if stopped_by:
        logging.info(
            "stopped by %s at step %d, which is saved: the same command continues",
            stop_name(stopped_by), trainer.step,
        )  # fmt: skip
    else:
        logging.info("done: %s is at step %d", job.run_dir, trainer.step)
    return stopped_by


def save(trainer: Trainer, reporter: Reporter) -> None:
    """Write a checkpoint of what has been looked at.

    Raises:
        DivergedError: loss, gradient, weights or averages are no numbers.
    """
    reporter.log(trainer.step, learning_rate(trainer.job.settings, trainer.step))
    if not trainer.is_finite():
        raise DivergedError(f"weights are no numbers {reporter.after(trainer.step)}")
    with reporter.phases.during("save"):
        trainer.save()
    reporter.show_load(trainer.step)


def grid_is_due(trainer: Trainer) -> bool:
    """Tell whether the step just done has a sample grid."""
    step, settings = trainer.step, trainer.job.settings
    return bool(settings.sample_every and step) and (
        step % settings.sample_every == 0 or step == settings.max_steps
    )


@contextmanager
def lent(trainer: Trainer, reporter: Reporter, phase: str) -> Iterator[nn.Module]:
    """Lend the averaged model for a phase that leaves no trace in the curves of the load."""
    with reporter.phases.during(phase), reporter.counts_kept(), trainer.averaged() as model:
        yield model


def draw(trainer: Trainer, reporter: Reporter) -> None:
    """Draw a grid with the averaged weights."""
    with lent(trainer, reporter, "draw") as model:
        path = draw_grid(model, trainer.job, trainer.step)
    reporter.show_grid(path, trainer.step)


def judge(trainer: Trainer, reporter: Reporter) -> None:
    """Measure what is due after the step just done: the loss on images that are not learnt from."""
    step, job = trainer.step, trainer.job
    last = step == job.settings.max_steps
    if job.val is not None and (step % job.settings.val_every == 0 or last):
        with lent(trainer, reporter, "validate") as model, autocast(job):
            loss = loss_on_images(
                model, job.diffusion, job.val, job.vae, job.rt,
                num_images=VAL_IMAGES, num_draws=VAL_DRAWS,
            )  # fmt: skip
        reporter.show({"val/loss": loss}, step)


def generators_kept(job: Job) -> AbstractContextManager[None]:
    """Leave the global generators, from which training draws, as they are."""
    devices = [job.rt.device] if job.rt.device.type == "cuda" else []
    return torch.random.fork_rng(devices=devices)


def judge_samples(trainer: Trainer, reporter: Reporter, quality: Quality, saved: int) -> int:
    """Compare samples with real images where that is due after the step just done.

    Args:
        trainer, reporter: of the run.
        quality: what samples are judged by.
        saved: step of the last checkpoint.

    Returns:
        The same, of a checkpoint that was written because it is the best.
    """
    step, settings = trainer.step, trainer.job.settings
    if step % settings.eval_every and step != settings.max_steps:
        return saved
    with lent(trainer, reporter, "evaluate") as model, generators_kept(trainer.job):
        values = quality.measure(model)
    reporter.show({f"eval/{name}": value for name, value in values.items()}, step)
    if settings.keep_best and quality.is_best(step, values):
        if saved < step:
            save(trainer, reporter)
            saved = step
        quality.mark_best(step, values)
    return saved
