"""What a run shows: its log, progress bar, curves by its trackers and sample grids.

In order: `run_log`, `Reporter` with `load_scalars`, `draw_grid`.
"""

import json
import logging
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from common import process
from common.errors import UserError
from common.files import atomic_write
from common.pictures import save_grid
from routing import LoadCounter, dead_experts, load_entropy, max_violation
from training.job import Job, autocast, describe
from training.throughput import Phases, forward_macs, peak_memory, peak_rate
from training.trackers import LoadPicture, Tracker, open_trackers

GRID_COLUMNS, GRID_ROWS = 10, 6
SHOWN = (
    *("train/loss", "train/aux_loss", "train/contrastive_loss", "train/z_loss"),
    *("train/capacity_loss", "train/repa_loss", "train/grad_norm", "system/images_per_second"),
    *("system/tflops_per_second", "system/mfu", "time/data", "time/step"),
)
ATTEMPT = "attempt"  # first word of each attempt's first line in the log


class DivergedError(UserError, FloatingPointError):
    """The model is no longer made of numbers, and training it further is of no use."""


# ------------------------------------------------------------------------------ log


class _LogFile(logging.FileHandler):
    """A log on a disk that may be full: the run goes on, and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's name
        """Give up the file."""
        logging.getLogger().removeHandler(self)
        logging.warning("%s ends here: %s", self.baseFilename, sys.exc_info()[1])


@contextmanager
def run_log(job: Job) -> Iterator[None]:
    """Append what is logged meanwhile to the run's log.txt, on the main process.

    Every attempt starts with a line of its own and, if an error ends it, ends with another.
    """
    if not job.rt.is_main:
        yield
        return
    job.run_dir.mkdir(parents=True, exist_ok=True)
    path = job.run_dir / "log.txt"
    before = path.read_text(errors="replace") if path.exists() else ""
    handler = _LogFile(path)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.info("%s %d: %s", ATTEMPT, before.count(f"] {ATTEMPT} ") + 1, shlex.join(sys.argv))
    try:
        yield
    except BaseException as error:
        handler.handle(logging.makeLogRecord({"msg": f"{type(error).__name__}: {error}"}))
        raise
    finally:
        root.removeHandler(handler)
        handler.close()


# ------------------------------------------------------------------------------ curves


class Reporter:
    """Progress bar, curves and settings of a run; files on the main process only.

    All ranks call `add` and `log`, since the means go over ranks.
    """

    def __init__(self, job: Job, start_step: int) -> None:
        self.settings, self.rt, self.run_dir = job.settings, job.rt, job.run_dir
        self._job, self._start_step = job, start_step
        self._trackers: list[Tracker] = []
        self.load_picture = LoadPicture()
        self.flops = 6 * sum(forward_macs(job.model.config))  # of an image, forward and backward
        self.peak_rate = peak_rate(job.rt.device, job.settings.precision)

    def __enter__(self) -> "Reporter":
        with ExitStack() as stack:
            self.counter = LoadCounter(self._job.model, self.rt.device)
            stack.callback(self.counter.remove)
            self.bar = stack.enter_context(
                tqdm(
                    initial=self._start_step,
                    total=self.settings.max_steps,
                    desc="train",
                    unit="step",
                    disable=not self.rt.is_main,
                    mininterval=1.0 if sys.stderr.isatty() else 30.0,  # a log file needs fewer
                )
            )
            stack.enter_context(logging_redirect_tqdm())
            self._reset()
            if self.rt.is_main:
                self._open_files()
                stack.callback(self._write, lambda tracker: tracker.close())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _open_files(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.run_dir / "args.json") as temp:
            temp.write_text(json.dumps(self.settings.to_dict(), indent=2, sort_keys=True) + "\n")
        self._trackers = open_trackers(
            self.settings, self.run_dir, self._start_step, self.counter.layers
        )
        logging.info("\n%s", describe(self._job))

    def _write(self, write: Callable[[Tracker], None]) -> None:
        """Write to the curves, as long as that works: they are not worth ending a run."""
        for tracker in list(self._trackers):
            try:
                write(tracker)
            except OSError as error:
                logging.warning("no curves from here on: %s", error)
                self._trackers.remove(tracker)

    def _reset(self) -> None:
        self.counter.counts.zero_()
        self.phases = Phases()
        self._sums: dict[str, Tensor] = {}
        self._num_steps = self._num_skipped = 0
        self._since = time.monotonic()

    def add(self, **values: Tensor) -> None:
        """Take one step's values, each () and averaged over this rank's part of the batch."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._num_steps += 1
        self.bar.update()

    def skip(self) -> None:
        """Take a step whose gradient overflowed float16, so that nothing came of it."""
        self._num_skipped += 1

    def log(self, step: int, lr: float) -> None:
        """Write the means since the last call, over steps and ranks, as one point of each curve.

        Raises:
            DivergedError: if the loss or the gradient, and so the model, is no longer a number;
                checkpoints are left alone.
        """
        if not self._num_steps:
            return
        sums = process.sum_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        per = self._num_steps * self.rt.world_size
        names = (f"train/{name}" for name in self._sums)
        scalars = {name: value / per for name, value in zip(names, sums, strict=True)}
        seconds = (time.monotonic() - self._since) / (self._num_steps + self._num_skipped)
        scalars["train/lr"] = lr
        if self.settings.precision == "fp16":
            scalars["train/skipped_steps"] = self._num_skipped
        scalars["system/images_per_second"] = self.settings.global_batch_size / seconds
        rate = self.flops * self.settings.global_batch_size / seconds / self.rt.world_size
        scalars["system/tflops_per_second"] = rate / 1e12  # of a device
        if self.peak_rate is not None:
            scalars["system/mfu"] = rate / self.peak_rate
        scalars["system/peak_memory_gib"] = peak_memory(self.rt.device)
        for phase, spent in self.phases.seconds.items():  # a step, since the last point
            scalars[f"time/{phase}"] = spent / self._num_steps
        counts = total_load(self.counter)
        self.load_picture.add(counts)
        scalars |= load_measures(counts, self.counter.layers)
        self._reset()
        for name in ("loss", "grad_norm"):
            if not math.isfinite(value := scalars[f"train/{name}"]):
                raise DivergedError(f"the {name} is {value} {self.after(step)}")
        if self.rt.is_main:
            self._show(step, scalars)

    def after(self, step: int) -> str:
        """Say what is left of a run that diverged, and what to try."""
        return (
            f"after step {step}; the checkpoints in {self.run_dir} are from before. Try a lower "
            "--lr, --clip-grad, --qk-norm or --precision fp32"
        )

    def _show(self, step: int, scalars: dict[str, float]) -> None:
        self._write(lambda tracker: tracker.scalars(scalars, step))
        shown = [name for name in (*SHOWN, "experts/max_vio") if name in scalars]
        text = {name.split("/")[-1]: f"{scalars[name]:.4g}" for name in shown}
        self.bar.set_postfix(text)
        logging.info("step %d: %s", step, ", ".join(f"{k} {v}" for k, v in text.items()))

    @contextmanager
    def counts_kept(self) -> Iterator[None]:
        """Leave no trace in the curves of the load: a trainer may lend the counted model."""
        counts = self.counter.counts.clone()
        yield
        self.counter.counts.copy_(counts)

    def show(self, scalars: dict[str, float], step: int) -> None:
        """Write points of other curves, and log them."""
        if self.rt.is_main:
            self._write(lambda tracker: tracker.scalars(scalars, step))
            text = ", ".join(f"{name} {value:.4g}" for name, value in scalars.items())
            logging.info("step %d: %s", step, text)

    def show_grid(self, path: Path, step: int) -> None:
        """Put a sample grid, where it is there, beside the curves."""
        if self.rt.is_main and path.exists():
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))  # (height, width, 3)
            self._write(lambda tracker: tracker.picture("samples", pixels, step))

    def show_load(self, step: int) -> None:
        """Put the load of all experts over the steps so far beside the curves."""
        pixels = self.load_picture.pixels()
        if self.rt.is_main and pixels is not None:
            self._write(lambda tracker: tracker.picture("experts/load", pixels, step))


def load_scalars(counter: LoadCounter) -> dict[str, float]:
    """Sum the load of routed experts over all ranks; its curves, on average and by layer."""
    return load_measures(total_load(counter), counter.layers)


def total_load(counter: LoadCounter) -> Tensor:
    """Return the tokens of all ranks by layer and routed expert, (L, E) on the CPU."""
    return process.sum_over_ranks(counter.counts.clone()).cpu()[:, : counter.num_routed]


def load_measures(counts: Tensor, layers: Sequence[int]) -> dict[str, float]:
    """Return the curves of a load (L, E), on average and by layer, whose numbers are given."""
    scalars: dict[str, float] = {}
    measures = {"entropy": load_entropy, "max_vio": max_violation, "dead": dead_experts}
    for name, measure in measures.items() if len(counts) else ():
        values = measure(counts).float()  # (L,)
        scalars[f"experts/{name}"] = values.mean().item()
        for layer, value in zip(layers, values.tolist(), strict=True):
            scalars[f"experts/{name}/layer_{layer:02d}"] = value
    return scalars


# ------------------------------------------------------------------------------ grids


def grid_path(job: Job, step: int) -> Path:
    """Return where the sample grid of a step is kept."""
    return job.run_dir / "samples" / f"{step:07d}.png"


def draw_grid(model: nn.Module, job: Job, step: int) -> Path:
    """Sample a grid, one class a column, always from the same noise; the global RNG is left alone.

    All ranks draw, row by row in turn, and the main one saves: the same picture on any number of
    them. Each makes equally many forward passes, which are collective where weights are sharded.
    A grid that cannot be written is a warning.

    Args:
        model: EMA model in eval mode; it runs in the precision of the training.
        job: whose objective, VAE and run folder to use.
        step: names the picture.
    """
    config, rt = job.model.config, job.rt
    columns = min(config.num_classes, GRID_COLUMNS)
    classes = torch.linspace(0, config.num_classes - 1, columns).long()
    shape = (GRID_ROWS, columns, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    num_steps = min(50, job.diffusion.default_num_steps[job.diffusion.default_sampler])
    rounds = math.ceil(GRID_ROWS / rt.world_size)
    rows: dict[int, Tensor] = {}
    with (
        tqdm(total=rounds * num_steps, desc="grid", leave=False, disable=not rt.is_main) as bar,
        autocast(job),
    ):
        for turn in range(rounds):
            row = (turn * rt.world_size + rt.rank) % GRID_ROWS  # some draw one that others have
            latents = job.diffusion.sample(
                model,
                noise[row].to(rt.device),
                classes.to(rt.device),
                num_steps=num_steps,
                cfg_scale=job.settings.sample_cfg_scale,
                null_label=config.null_label,
                generator=torch.Generator().manual_seed(row + 1),
                callback=lambda *_: bar.update(),
            )
            rows[row] = job.vae.decode(latents).cpu()
    shares = process.gather_on_main(rows)
    path = grid_path(job, step)
    if rt.is_main:
        drawn = {row: images for share in shares for row, images in share.items()}
        known = dict(enumerate(job.settings.class_names))
        names = [known.get(label, str(label)) for label in classes.tolist()]
        try:
            images = torch.cat([drawn[row] for row in range(GRID_ROWS)])
            save_grid(images, path, columns=columns, column_names=names)
            logging.info("samples: %s", path)
        except OSError as error:
            logging.warning("no grid of step %d: %s", step, error)
    return path
