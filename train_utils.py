"""What both trainers need before the first step: flags, the job they describe, resuming, EMA.

In the order a run uses them: `build_parser`, `prepare` (flags to a `Job`: data, objective, model),
`initial_weights`, `find_resume`, `check_resumable`, `restore_rng`, `describe`, `Ema`. The steps
themselves are in train_loop.py.
"""

import argparse
import copy
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import latent_cache
from checkpoint import latest_checkpoint
from common import process
from common.flags import FlagParser, flag, number
from common.process import Runtime
from data import (
    VAE,
    FolderImages,
    ImageDataset,
    Pixels,
)
from diffusion import Diffusion, create_diffusion
from latent_cache import CachedLatents
from layouts import to_ours
from models import DiT, DiT_models, DiTConfig, initialize_parameter
from weights import open_weights

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
    data.add("--data-path", required=True, help="image folder, its latents, digits, fashion-mnist")
    data.add("--image-size", type=count, help="pixels; default 256, or the embedded data's own")
    data.add("--fashion-mnist-root", help="folder of the idx files; default: Debian's, ./data")
    data.add("--flip", default=None, **flag, help="mirror at random; default: only image folders")
    data.add("--vae-path", help="folder or hub id; 'none' = pixels, the embedded data's default")
    data.add(
        "--skip-broken", default=False, **flag,
        help="the next image stands in for one that is broken, which is logged; else the run ends",
    )  # fmt: skip
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
    fast = process.default_precision(rt.device)
    args.precision = args.precision or fast
    if rt.device.type == "cpu" and args.precision not in ("fp32", fast):
        logging.warning(
            "--precision %s has no fast kernels on this CPU, try fp32: expect a crawl",
            args.precision,
        )
    if args.num_workers is None:
        args.num_workers = 4 if isinstance(dataset, FolderImages | CachedLatents) else 0
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
    num_parameters: tuple[int, int]  # total, activated
    run_dir: Path


def open_data(args: argparse.Namespace, rt: Runtime) -> tuple[ImageDataset, VAE | Pixels]:
    """Open the images, or the latent cache, and the VAE; fills in what `args` leave open."""
    dataset, vae, args.vae_path = latent_cache.open_data(
        args.data_path,
        device=rt.device,
        vae_path=args.vae_path,
        image_size=args.image_size,
        flip=args.flip,
        fashion_mnist_root=args.fashion_mnist_root,
        skip_broken=args.skip_broken,
    )
    resolve_settings(args, rt, dataset)
    return dataset, vae


def prepare(args: argparse.Namespace, *, meta: bool = False) -> Job:
    """Join the process group, open the data and build the model; no file is written.

    Args:
        args: of `build_parser`; defaults that depend on others are filled in.
        meta: leave the model without memory, for a trainer that cuts it into shards.

    Raises:
        ValueError, FileNotFoundError: naming the flag whose value does not fit.
    """
    rt = process.setup()
    level = logging.INFO if rt.is_main else logging.WARNING
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    dataset, vae = open_data(args, rt)
    model = build_model(args, vae.channels or dataset.channels, vae.downsample)
    if not meta and not args.dry_run:
        weights = initial_weights(args, {n: p.shape for n, p in model.named_parameters()})
        state = model.to_empty(device="cpu").state_dict()
        for name, value in weights:
            state[name].copy_(value)
    torch.manual_seed(args.seed + 1 + rt.rank)  # other noise, times and label drops on each
    diffusion = create_diffusion(
        args.objective, learn_sigma=model.config.learn_sigma, x0_range=vae.x0_range
    )
    run_dir = Path(args.results_dir) / (args.run_name or default_run_name(args))
    return Job(args, rt, dataset, vae, diffusion, model, model.num_parameters(), run_dir)


def build_model(args: argparse.Namespace, latent_channels: int, downsample: int) -> DiT:
    """Build the model that the flags describe, on the meta device: see `initial_weights`.

    What flags leave open about the MLPs is as in the file of `--init-from`, if given.

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
    with torch.device("meta"):
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


def compile_blocks(model: DiT) -> None:
    """Compile every block in place, by `--compile`."""
    for block in model.blocks:
        block.compile(fullgraph=True)


def initial_weights(
    args: argparse.Namespace, shapes: Mapping[str, torch.Size]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's first value, from `--init-from` or drawn from `--seed`.

    One at a time and the same on every rank, so that a rank can keep its share of each and no
    rank has to hold them all.

    Args:
        args: of `build_parser`.
        shapes: of all parameters.

    Raises:
        ValueError: if the weights of `--init-from` are of another model.
    """
    if not args.init_from:
        generator = torch.Generator().manual_seed(args.seed)
        for name, shape in shapes.items():
            value = torch.empty(shape)
            initialize_parameter(name, value, generator)
            yield name, value
        return
    missing = set(shapes)
    for name, value in to_ours(open_weights(args.init_from).state):
        if shapes.get(name) != value.shape:
            wanted = tuple(shapes[name]) if name in shapes else "no such tensor"
            raise ValueError(
                f"--init-from {args.init_from}: {name} has shape {tuple(value.shape)}, the model "
                f"that the flags describe has {wanted}"
            )
        missing.remove(name)
        yield name, value.float()
    if "pos_embed" in missing:  # not saved by diffusers
        value = torch.empty(shapes["pos_embed"])
        initialize_parameter("pos_embed", value)
        missing.remove("pos_embed")
        yield "pos_embed", value
    if missing:
        raise ValueError(f"--init-from {args.init_from} lacks {sorted(missing)[:5]}")


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
        latest = process.from_main(latest_checkpoint(run_dir))
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
    torch.manual_seed(job.args.seed + 1 + job.rt.rank + 1000 * step)


def describe(job: Job) -> str:
    """Return the settings and parameter counts that `--dry-run` prints."""
    total, activated = job.num_parameters
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
