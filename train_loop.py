"""The training loop of both trainers: batches, the loss, progress bar, curves, sample grids.

In this order: `Reporter` (what a run shows), `draw_grid`, `Trainer` (what a script supplies), the
loss of a micro-batch, and the loop around it, `launch` and `fit`.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import process
from common.files import atomic_write
from common.pictures import save_grid
from data import make_loader
from resume import find_resume
from routing import LoadCounter, dead_experts, load_entropy, max_violation
from train_settings import TrainSettings
from train_utils import Job, describe, prepare

GRID_COLUMNS, GRID_ROWS = 10, 6

# ------------------------------------------------------------------------------ curves and grids


class Reporter:
    """Progress bar, TensorBoard curves and the log of a run; files on the main process only.

    All ranks call `add` and `log`, since the means go over ranks.
    """

    def __init__(self, job: Job, start_step: int) -> None:
        self.settings, self.rt, self.run_dir = job.settings, job.rt, job.run_dir
        self.counter = LoadCounter(job.model, job.rt.device)
        self.bar = tqdm(
            initial=start_step,
            total=self.settings.max_steps,
            desc="train",
            unit="step",
            disable=not self.rt.is_main,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,  # seconds; a log file needs fewer
        )
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()
        self._reset()
        if not self.rt.is_main:
            return
        from torch.utils.tensorboard import SummaryWriter

        (self.run_dir / "samples").mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_dir / "args.json") as temp:
            temp.write_text(json.dumps(self.settings.to_dict(), indent=2, sort_keys=True) + "\n")
        logging.getLogger().addHandler(logging.FileHandler(self.run_dir / "log.txt"))
        # Steps after the checkpoint are done again: this hides their first points.
        self.writer = SummaryWriter(str(self.run_dir), purge_step=start_step + 1)
        logging.info("\n%s", describe(job))

    def _reset(self) -> None:
        self.counter.counts.zero_()
        self._sums: dict[str, Tensor] = {}
        self._num_steps = 0
        self._since = time.monotonic()

    def add(self, **values: Tensor) -> None:
        """Take one step's values, each () and averaged over this rank's part of the batch."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_steps += 1
        self.bar.update()

    def log(self, step: int, lr: float) -> None:
        """Write the means since the last call, over steps and ranks, as one point of each curve.

        Raises:
            FloatingPointError: if the loss or the gradient, and so the model, is no longer a
                number; checkpoints are left alone.
        """
        sums = process.sum_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        per = self._num_steps * self.rt.world_size
        scalars = {name: value / per for name, value in zip(self._sums, sums, strict=True)}
        seconds = (time.monotonic() - self._since) / self._num_steps
        scalars |= {"lr": lr, "images_per_second": self.settings.global_batch_size / seconds}
        scalars |= load_scalars(self.counter)
        self._reset()
        # The fp16 scaler skips the steps whose gradient overflows.
        checked = ("loss",) if self.settings.precision == "fp16" else ("loss", "grad_norm")
        for name in checked:
            if not math.isfinite(scalars[name]):
                raise FloatingPointError(
                    f"the {name} is {scalars[name]} after step {step}; the checkpoints in "
                    f"{self.run_dir} are from before. Try a lower --lr, --clip-grad, --qk-norm or "
                    "--precision fp32"
                )
        if self.rt.is_main:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            shown = ("loss", "aux_loss", "grad_norm", "images_per_second", "experts/max_vio")
            text = {
                name.split("/")[-1]: f"{scalars[name]:.4g}" for name in shown if name in scalars
            }
            self.bar.set_postfix(text)
            logging.info("step %d: %s", step, ", ".join(f"{k} {v}" for k, v in text.items()))

    def close(self) -> None:
        """Finish the bar and flush the curves."""
        self.bar.close()
        self._redirect.__exit__(None, None, None)
        if self.rt.is_main:
            self.writer.close()


def load_scalars(counter: LoadCounter) -> dict[str, float]:
    """Sum the expert load over all ranks and return its curves, on average and by layer."""
    counts = process.sum_over_ranks(counter.counts.clone()).cpu()
    scalars: dict[str, float] = {}
    measures = {"entropy": load_entropy, "max_vio": max_violation, "dead": dead_experts}
    for name, measure in measures.items() if len(counts) else ():
        values = measure(counts).float()  # (L,)
        scalars[f"experts/{name}"] = values.mean().item()
        for layer, value in enumerate(values.tolist()):
            scalars[f"experts_{name}/layer_{layer:02d}"] = value
    return scalars


def draw_grid(model: nn.Module, job: Job, step: int) -> Path:
    """Sample a grid, one class a column, always from the same noise; the global RNG is left alone.

    Args:
        model: EMA model in eval mode; sharded, it draws on all ranks, and the main one saves.
        job: whose objective, VAE and run folder to use.
        step: names the picture.
    """
    config, device = job.model.config, job.rt.device
    columns = min(config.num_classes, GRID_COLUMNS)
    classes = torch.linspace(0, config.num_classes - 1, columns).long()
    y = classes.repeat(GRID_ROWS).to(device)
    generator = torch.Generator().manual_seed(0)
    shape = (len(y), config.in_channels, config.input_size, config.input_size)
    latents = job.diffusion.sample(
        model,
        torch.randn(shape, generator=generator).to(device),
        y,
        num_steps=min(50, job.diffusion.default_num_steps[job.diffusion.default_sampler]),
        cfg_scale=job.settings.sample_cfg_scale,
        null_label=config.null_label,
        generator=generator,
    )
    path = job.run_dir / "samples" / f"{step:07d}.png"
    if job.rt.is_main:
        known = dict(enumerate(job.settings.class_names))
        names = [known.get(label, str(label)) for label in classes.tolist()]
        save_grid(job.vae.decode(latents), path, columns=columns, column_names=names)
        logging.info("samples: %s", path)
    return path


# ------------------------------------------------------------------------------ the loop

Batch = tuple[Tensor, Tensor, dict[str, Any]]  # latents, labels, more arguments of training_loss


class Trainer(Protocol):
    """What a script supplies: the wrapped model and who owns its updates and checkpoints."""

    job: Job
    step: int  # optimizer steps done

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches; returns () values to log."""

    def save(self) -> None:
        """Write a checkpoint of this step; called on every rank."""

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint."""

    def draw(self) -> None:
        """Draw the sample grid of this step; called on every rank."""


class MicroLoss(NamedTuple):
    """Losses of one micro-batch, each () fp32."""

    total: Tensor  # to differentiate: loss + aux_loss_weight * (sum of the layers' balance losses)
    loss: Tensor  # of the objective; this and the next are detached, to be logged
    aux_loss: Tensor  # per layer, 1.0 = even


def micro_loss(job: Job, model: nn.Module, batch: Batch) -> MicroLoss:
    """Run the objective on a micro-batch through the wrapped model."""
    latents, labels, given = batch
    out = job.diffusion.training_loss(model, latents, labels, **given)
    loss = out.per_sample.mean()
    total = loss + job.settings.aux_loss_weight * out.aux_loss
    return MicroLoss(total, loss.detach(), out.aux_loss.detach() / job.model.config.depth)


def mean_losses(losses: list[MicroLoss]) -> dict[str, Tensor]:
    """Average what a step logs over its micro-batches."""
    names = ("loss", "aux_loss")
    return {name: torch.stack([getattr(x, name) for x in losses]).mean() for name in names}


def learning_rate(settings: TrainSettings, step: int) -> float:
    """Return the rate of the step after `step`: linear warm-up, then constant."""
    return settings.lr * min(1.0, (step + 1) / max(settings.warmup_steps, 1))


def latent_batches(job: Job, start_step: int) -> Iterator[Batch]:
    """Yield this rank's endless micro-batches, from optimizer step `start_step` on."""
    loader = make_loader(
        job.dataset,
        micro_batch_size=job.settings.micro_batch_size,
        accum_steps=job.settings.accum_steps,
        rank=job.rt.rank,
        world_size=job.rt.world_size,
        seed=job.settings.seed,
        start_step=start_step,
        num_workers=job.settings.num_workers,
        pin_memory=job.rt.device.type == "cuda",
    )
    for batch, labels in loader:
        latents = job.dataset.latents(batch.to(job.rt.device, non_blocking=True), job.vae)
        yield latents, labels.to(job.rt.device, non_blocking=True), {}


def launch(
    args: argparse.Namespace,
    make_trainer: Callable[[Job], Trainer],
    *,
    meta: bool = False,
    plan: Callable[[Job], str] = describe,
) -> None:
    """Run a training script: build everything, resume, train until `--max-steps`.

    Args:
        args: of `build_parser`.
        make_trainer: the script's own part.
        meta: see `prepare`.
        plan: what `--dry-run` prints.
    """
    try:
        job = prepare(args, meta=meta)
        if args.dry_run:
            if job.rt.is_main:
                print(plan(job))
            process.finish()
            return
        checkpoint = find_resume(job.settings)
        trainer = make_trainer(job)
        if checkpoint:
            trainer.resume(checkpoint)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    fit(trainer)
    process.finish()


def fit(trainer: Trainer) -> None:
    """Train from the trainer's step to `--max-steps`, logging, saving and drawing on the way."""
    job, settings = trainer.job, trainer.job.settings
    reporter = Reporter(job, trainer.step)
    batches = latent_batches(job, trainer.step)
    while trainer.step < settings.max_steps:
        reporter.add(**trainer.train_step(islice(batches, settings.accum_steps)))
        step, last = trainer.step, trainer.step == settings.max_steps
        saves = step % settings.ckpt_every == 0 or last
        if step % settings.log_every == 0 or saves:  # it also checks that the model is worth saving
            reporter.log(step, learning_rate(settings, step))
        if saves:
            trainer.save()
        if settings.sample_every and (step % settings.sample_every == 0 or last):
            counts = reporter.counter.counts.clone()  # a trainer may draw with the counted model
            trainer.draw()
            reporter.counter.counts.copy_(counts)
    logging.info("done: %s is at step %d", job.run_dir, trainer.step)
    reporter.close()
