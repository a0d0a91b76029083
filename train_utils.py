"""What both trainers need and nobody else: flags, the run folder, logging, EMA, sample grids.

In the order a run uses them: `build_parser`, `prepare` (flags to a `Job`: data, objective, model),
`find_resume`, `Ema`, `Reporter` (progress bar, curves), `draw_grid`, and the loop itself, `launch`
and `fit`, around the `Trainer` that each script brings.
"""

import argparse
import copy
import json
import logging
import math
import re
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

import runtime
from checkpoint import atomic_write, latest_checkpoint, load_model, open_weights
from data import (
    VAE,
    FolderImages,
    ImageDataset,
    Pixels,
    load_dataset,
    load_vae,
    make_loader,
    save_grid,
)
from diffusion import Diffusion, create_diffusion
from flags import FlagParser, flag, number
from models import DiT, DiT_models, DiTConfig
from routing import LoadCounter, dead_experts, load_entropy, max_violation
from runtime import Runtime

GRID_COLUMNS, GRID_ROWS = 10, 6
# Flags that a run may change on its way, but then it is not the run that it would have been.
COURSE = (
    *("data_path", "vae_path", "flip", "seed", "global_batch_size", "lr", "warmup_steps"),
    *("weight_decay", "clip_grad", "ema_decay", "aux_loss_weight", "precision"),
)


# ------------------------------------------------------------------------------ flags


def build_parser(docstring: str | None) -> FlagParser:
    """Return the parser of the flags that both trainers share."""
    parser = FlagParser(docstring)
    count, share = number(int, 1), number(float, 0, 1)

    data = parser.group("Data")
    data.add("--data-path", required=True, help="image folder, 'digits' or 'fashion-mnist'")
    data.add("--image-size", type=count, help="pixels; default 256, or the embedded data's own")
    data.add("--fashion-mnist-root", help="folder of the idx files; default: Debian's, ./data")
    data.add("--flip", default=None, **flag, help="mirror at random; default: only image folders")
    data.add("--vae-path", help="folder or hub id; 'none' = pixels, the embedded data's default")
    data.add("--num-workers", type=number(int, 0), help="loaders per rank; default 4 for folders")

    model = parser.group("Model")
    model.add("--model", choices=list(DiT_models), default="DiT-XL/2", help="size/patch")
    model.add("--num-classes", type=count, help="default: the data's own number")
    model.add("--class-dropout-prob", type=share, default=0.1, help="labels dropped for CFG")
    model.add("--qk-norm", default=None, **flag, help="normalise q and k; default: by size")
    model.add("--flash-attn", default=False, **flag, help="use the flash-attn package (CUDA)")
    model.add("--init-from", help="checkpoint whose (EMA) weights a fresh run starts from")

    moe = parser.group("MoE")
    moe.add("--num-experts", type=number(int, 0), help="routed; default: by size; 0 = dense")
    moe.add("--num-experts-per-tok", type=count, help="K, experts each token uses")
    moe.add("--num-shared-experts", type=number(int, 0), help="width of the shared expert / D")
    moe.add("--mlp-ratio", type=number(float, 0.01), help="hidden width of an expert / D")
    moe.add("--aux-loss-weight", type=number(float, 0), default=0.005, help="per layer, paper's")

    train = parser.group("Optimization")
    train.add("--rf", default=False, **flag, help="rectified flow instead of DDPM")
    train.add("--global-batch-size", "--train_batch_size", type=count, default=256, help="images")
    train.add("--micro-batch-size", type=count, help="images per rank and pass; default: all")
    train.add("--accum-steps", "--accum_iter", type=count, help="passes a step; default: by sizes")
    train.add("--lr", type=number(float, 0), default=1e-4, help="AdamW, constant after warm-up")
    train.add("--warmup-steps", type=number(int, 0), default=0, help="steps of linear warm-up")
    train.add("--weight-decay", type=number(float, 0), default=0.0, help="AdamW, decoupled")
    train.add("--clip-grad", type=number(float, 0), default=1.0, help="norm; 0 = off")
    train.add("--ema-decay", type=share, default=0.9999, help="per step")
    train.add("--precision", choices=("bf16", "fp16", "fp32"), help="default: bf16 if native")
    train.add("--grad-checkpointing", default=False, **flag, help="recompute blocks, save memory")
    train.add("--compile", default=False, **flag, help="torch.compile every block")

    run = parser.group("Run")
    run.add("--results-dir", default="results", help="folder of all runs")
    run.add("--run-name", help="folder of this run; default: from model, objective and data")
    run.add("--resume", default="auto", help="'auto' = this run's last, 'never', or a file")
    run.add("--epochs", type=count, default=1400, help="passes over the data")
    run.add("--max-steps", type=count, help="optimizer steps; ends earlier than --epochs")
    run.add("--seed", "--global-seed", "--global_seed", type=number(int, 0), default=0,
            help="of all draws")  # fmt: skip
    run.add("--log-every", type=count, default=100, help="steps")
    run.add("--ckpt-every", type=count, default=5000, help="steps; the last step is saved too")
    run.add("--keep-last", type=number(int, 0), default=3, help="checkpoints kept; 0 = all")
    run.add("--sample-every", type=number(int, 0), default=5000, help="steps; 0 = no grids")
    run.add("--sample-cfg-scale", type=number(float, 0), default=1.5, help="of the grids")
    run.add("--dry-run", default=False, **flag, help="print settings and parameters, then stop")
    return parser


def resolve_batch(args: argparse.Namespace, world_size: int) -> None:
    """Fill in `micro_batch_size` and `accum_steps`, so that global = micro * accum * ranks.

    Raises:
        ValueError: if the three numbers given do not fit together.
    """
    per_rank, rest = divmod(args.global_batch_size, world_size)
    if rest:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size} ranks"
        )
    if args.micro_batch_size is None:
        args.micro_batch_size = per_rank // (args.accum_steps or 1)
    if args.accum_steps is None:
        args.accum_steps = per_rank // args.micro_batch_size
    if args.micro_batch_size * args.accum_steps != per_rank:
        raise ValueError(
            f"--global-batch-size {args.global_batch_size} is not --micro-batch-size "
            f"{args.micro_batch_size} x --accum-steps {args.accum_steps} x {world_size} ranks"
        )


def resolve_settings(args: argparse.Namespace, rt: Runtime, dataset: ImageDataset) -> None:
    """Fill in every default that depends on the data, the machine or other flags.

    Raises:
        ValueError: naming the flag, if a value does not fit the data or the ranks.
    """
    resolve_batch(args, rt.world_size)
    args.objective = "rf" if args.rf else "ddpm"
    args.image_size = dataset.image_size
    args.class_names = dataset.class_names
    args.num_classes = args.num_classes or dataset.num_classes
    if args.num_classes < dataset.num_classes:
        raise ValueError(
            f"--num-classes {args.num_classes} is less than the {dataset.num_classes} classes of "
            f"--data-path {args.data_path}"
        )
    if args.vae_path is None:
        folder = isinstance(dataset, FolderImages)
        args.vae_path = "stabilityai/sd-vae-ft-ema" if folder else "none"
    if args.precision is None:
        args.precision = runtime.default_precision(rt.device)
    if args.precision == "fp16" and rt.device.type == "cpu":
        logging.warning("--precision fp16 has no fast kernels on a CPU: expect a crawl")
    if args.num_workers is None:
        args.num_workers = 4 if isinstance(dataset, FolderImages) else 0
    steps_per_epoch = max(len(dataset) // args.global_batch_size, 1)
    args.max_steps = min(args.epochs * steps_per_epoch, args.max_steps or 10**12)


class Job(NamedTuple):
    """What a run trains, built from its flags alone."""

    args: argparse.Namespace  # every default filled in
    rt: Runtime
    dataset: ImageDataset
    vae: VAE | Pixels
    diffusion: Diffusion
    model: DiT
    run_dir: Path


def prepare(args: argparse.Namespace) -> Job:
    """Join the process group, open the data and build the model; no file is written.

    Raises:
        ValueError, FileNotFoundError: naming the flag whose value does not fit.
    """
    rt = runtime.setup()
    level = logging.INFO if rt.is_main else logging.WARNING
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    dataset = load_dataset(
        args.data_path,
        image_size=args.image_size,
        fashion_mnist_root=args.fashion_mnist_root,
        flip=args.flip,
    )
    resolve_settings(args, rt, dataset)
    vae = load_vae(args.vae_path, device=rt.device)
    torch.manual_seed(args.seed)  # the same initial weights on every rank
    with torch.device("meta" if args.dry_run else "cpu"):
        model = build_model(args, vae.channels or dataset.channels, vae.downsample)
    torch.manual_seed(args.seed + 1 + rt.rank)  # other noise, times and label drops on each
    diffusion = create_diffusion(args.objective, learn_sigma=model.config.learn_sigma)
    run_dir = Path(args.results_dir) / (args.run_name or default_run_name(args))
    return Job(args, rt, dataset, vae, diffusion, model, run_dir)


def build_model(args: argparse.Namespace, latent_channels: int, downsample: int) -> DiT:
    """Build the model that the flags describe, with the weights of `--init-from` if given.

    What flags leave open about the MLPs is then as in that file.

    Raises:
        ValueError: if a size does not fit, or the initial weights are of another model.
    """
    if args.image_size % downsample:
        raise ValueError(f"--image-size {args.image_size} is not a multiple of {downsample}")
    optional = ("num_experts", "num_experts_per_tok", "num_shared_experts", "mlp_ratio", "qk_norm")
    overrides = {name: value for name in optional if (value := getattr(args, name)) is not None}
    initial = open_weights(args.init_from).config if args.init_from else None
    if initial is not None:
        fields = (*optional, "mlp_type", "norm_topk_prob")
        overrides = {name: getattr(initial, name) for name in fields} | overrides
    model = DiT_models[args.model](
        input_size=args.image_size // downsample,
        in_channels=latent_channels,
        num_classes=args.num_classes,
        class_dropout_prob=args.class_dropout_prob,
        **overrides,
    )
    model.grad_checkpointing = args.grad_checkpointing
    if args.flash_attn:
        model.use_flash_attn()
    if initial is not None:
        check_same_shapes(args, model.config, initial)
        if not args.dry_run:
            model.load_state_dict(load_model(args.init_from).state_dict())
    return model


def check_same_shapes(args: argparse.Namespace, config: DiTConfig, initial: DiTConfig) -> None:
    """Compare the model that the flags describe with that of `--init-from`.

    Raises:
        ValueError: naming the first field that differs in more than what is computed.
    """
    free = ("class_dropout_prob", "num_experts_per_tok")
    ours, given = config.to_dict(), initial.to_dict()
    for name in sorted(set(ours) - set(free)):
        if ours[name] != given[name]:
            raise ValueError(
                f"--init-from {args.init_from} has {name} {given[name]}, this run {ours[name]}: "
                f"choose --model (now {args.model}), the data and the MoE flags as it has them"
            )


# ------------------------------------------------------------------------------ run folder


def default_run_name(args: argparse.Namespace) -> str:
    """Name a run by what it trains, so that the same command finds its own checkpoints."""
    experts = "" if args.num_experts is None else f"-{args.num_experts}E"
    data = Path(args.data_path).name
    return re.sub(r"[^\w.-]+", "-", f"{args.model}{experts}-{args.objective}-{data}")


def find_resume(args: argparse.Namespace, run_dir: Path) -> Path | None:
    """Return the checkpoint to continue from by `--resume`, None to start fresh.

    Raises:
        ValueError: if `--resume never` would write over a run.
        FileNotFoundError: if `--resume FILE`, or this node's copy of the run, is not there.
    """
    if args.resume == "auto":
        latest = runtime.from_main(latest_checkpoint(run_dir))
        if latest is not None and not latest.exists():
            raise FileNotFoundError(
                f"--results-dir {args.results_dir}: no {latest} here, but on the main node; "
                "the nodes must share it"
            )
        return latest
    if args.resume == "never":
        if latest_checkpoint(run_dir) is not None:
            raise ValueError(f"--resume never: {run_dir} has checkpoints; give another --run-name")
        return None
    if not Path(args.resume).exists():
        raise FileNotFoundError(f"--resume {args.resume}: no such file")
    return Path(args.resume)


def check_resumable(job: Job, path: Path, config: dict[str, Any], settings: dict[str, Any]) -> None:
    """Compare a checkpoint with the flags; warn where the run goes on in another way.

    Args:
        job: of the flags.
        path: of the checkpoint, for messages.
        config: of its model.
        settings: saved with it.

    Raises:
        ValueError: naming what differs, if it is of another model or objective.
    """
    ours = {**job.model.config.to_dict(), "objective": job.args.objective}
    theirs = {**config, "objective": settings["objective"]}
    if differing := [name for name in ours if theirs.get(name) != ours[name]]:
        raise ValueError(
            f"--resume: {path} was trained with another {', '.join(differing)}; "
            "give the same flags, or another --run-name to start anew"
        )
    for name in COURSE:
        if (before := settings.get(name)) != (now := getattr(job.args, name)):
            logging.warning("%s: --%s was %s, is %s", path, name.replace("_", "-"), before, now)


def describe(job: Job) -> str:
    """Return the settings and parameter counts that `--dry-run` prints."""
    total, activated = job.model.num_parameters()
    settings = {k: v for k, v in vars(job.args).items() if k != "class_names"}
    lines = [
        json.dumps(settings, indent=2, sort_keys=True),
        f"data: {len(job.dataset):,} images, {job.dataset.num_classes} classes",
        f"ranks: {job.rt.world_size} on {job.rt.device.type}",
        f"run folder: {job.run_dir}",
        f"parameters: {total:,} total, {activated:,} activated",
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ EMA


class Ema:
    """Exponential moving average of a model's trained parameters, in float32.

    `model` is a frozen copy in eval mode, ready to sample from.
    """

    def __init__(self, model: DiT, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self._averages, self._parameters = zip(*trained, strict=True)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model, in one fused pass: ema += (1 - decay)(p - ema)."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self.decay)


# ------------------------------------------------------------------------------ curves and grids


class Reporter:
    """Progress bar, TensorBoard curves and the log of a run; files on the main process only.

    All ranks call `add` and `log`, since the means go over ranks.
    """

    def __init__(self, job: Job, start_step: int) -> None:
        self.args, self.rt, self.run_dir = job.args, job.rt, job.run_dir
        self.counter = LoadCounter(job.model)
        self.bar = tqdm(
            initial=start_step,
            total=self.args.max_steps,
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
            temp.write_text(json.dumps(vars(self.args), indent=2, sort_keys=True) + "\n")
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
        sums = runtime.sum_over_ranks(torch.stack(list(self._sums.values()))).tolist()
        per = self._num_steps * self.rt.world_size
        scalars = {name: value / per for name, value in zip(self._sums, sums, strict=True)}
        seconds = (time.monotonic() - self._since) / self._num_steps
        scalars |= {"lr": lr, "images_per_second": self.args.global_batch_size / seconds}
        scalars |= load_scalars(self.counter)
        self._reset()
        # The fp16 scaler skips the steps whose gradient overflows.
        checked = ("loss",) if self.args.precision == "fp16" else ("loss", "grad_norm")
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
    counts = runtime.sum_over_ranks(counter.counts.clone()).cpu()
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
        model: EMA model in eval mode.
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
        cfg_scale=job.args.sample_cfg_scale,
        null_label=config.null_label,
        generator=generator,
    )
    path = job.run_dir / "samples" / f"{step:07d}.png"
    save_grid(job.vae.decode(latents), path, columns=columns)
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


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """Return the rate of the step after `step`: linear warm-up, then constant."""
    return args.lr * min(1.0, (step + 1) / max(args.warmup_steps, 1))


def latent_batches(job: Job, start_step: int) -> Iterator[Batch]:
    """Yield this rank's endless micro-batches, from optimizer step `start_step` on."""
    loader = make_loader(
        job.dataset,
        micro_batch_size=job.args.micro_batch_size,
        accum_steps=job.args.accum_steps,
        rank=job.rt.rank,
        world_size=job.rt.world_size,
        seed=job.args.seed,
        start_step=start_step,
        num_workers=job.args.num_workers,
        pin_memory=job.rt.device.type == "cuda",
    )
    for images, labels in loader:
        images = images.to(job.rt.device, non_blocking=True)
        yield job.vae.encode(images), labels.to(job.rt.device, non_blocking=True), {}


def launch(args: argparse.Namespace, make_trainer: Callable[[Job], Trainer]) -> None:
    """Run a training script: build everything, resume, train until `--max-steps`."""
    try:
        job = prepare(args)
        if args.dry_run:
            if job.rt.is_main:
                print(describe(job))
            runtime.finish()
            return
        checkpoint = find_resume(args, job.run_dir)
        trainer = make_trainer(job)
        if checkpoint:
            trainer.resume(checkpoint)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    fit(trainer)
    runtime.finish()


def fit(trainer: Trainer) -> None:
    """Train from the trainer's step to `--max-steps`, logging, saving and drawing on the way."""
    job, args = trainer.job, trainer.job.args
    reporter = Reporter(job, trainer.step)
    batches = latent_batches(job, trainer.step)
    while trainer.step < args.max_steps:
        reporter.add(**trainer.train_step(islice(batches, args.accum_steps)))
        step, last = trainer.step, trainer.step == args.max_steps
        saves = step % args.ckpt_every == 0 or last
        if step % args.log_every == 0 or saves:  # it also checks that the model is worth saving
            reporter.log(step, learning_rate(args, step))
        if saves:
            trainer.save()
        if args.sample_every and (step % args.sample_every == 0 or last):
            trainer.draw()
    logging.info("done: %s is at step %d", job.run_dir, trainer.step)
    reporter.close()
