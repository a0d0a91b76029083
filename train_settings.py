"""The flags of a training run, and the settings they become once the data is known.

In order: `build_parser` (the flags that both trainers share), `TrainSettings` (every default filled
in; frozen, and what checkpoints and args.json keep), `resolve` (flags to settings), and
`default_run_name`.
"""

import argparse
import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from common import process
from common.errors import FileError, UserError
from common.flags import FlagParser, dtype_flag, flag, in_groups, model_size, number, seed
from common.process import Runtime
from data import FolderImages, ImageDataset
from data.latent_cache import CachedLatents
from models import DiT_models

# Flags that a run may change on its way, but then it is not the run that it would have been.
WARN_IF_CHANGED = (
    *("data_path", "vae_path", "flip", "seed", "global_batch_size", "lr", "warmup_steps"),
    *("weight_decay", "clip_grad", "ema_decay", "aux_loss_weight", "precision"),
)
# Embedded data, and the sizes that fit them; to folders DiT-S/2 does.
FITTING_SIZES = {"digits": "DiT-Ti/1 or DiT-Ti/2", "fashion-mnist": "DiT-Ti/4"}


# ------------------------------------------------------------------------------ flags


def build_parser(docstring: str | None) -> FlagParser:
    """Return the parser of the flags that both trainers share."""
    parser = FlagParser(docstring)
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimization_flags(parser)
    _add_run_flags(parser)
    return parser


def _add_data_flags(parser: FlagParser) -> None:
    data = parser.group("Data")
    data.add(
        "--data-path",
        required=True,
        metavar="DATA",
        help="What to train on: a folder with one subfolder of images per class, what "
        "encode_latents.py made of one, or the embedded sets digits and fashion-mnist.",
    )
    data.add(
        "--image-size",
        type=number(int, 1, 16_384),
        metavar="PIXELS",
        help="Side in pixels that images of a folder are cropped to. Default: 256; embedded sets "
        "and latents have their own.",
    )
    data.add(
        "--fashion-mnist-root",
        metavar="FOLDER",
        help="Folder of Fashion-MNIST's four idx files. Default: where Debian's package "
        "dataset-fashion-mnist puts them, else a download to ./downloads.",
    )
    data.add(
        "--flip",
        **flag,
        help="Mirror half of the images at random. Default: on for folders, off for embedded sets.",
    )
    data.add(
        "--vae-path",
        metavar="VAE",
        help="Folder or hub id of the autoencoder whose latents are modelled; none trains on "
        "pixels. Default: stabilityai/sd-vae-ft-ema for folders, none for embedded sets.",
    )
    data.add(
        "--skip-broken",
        default=False,
        **flag,
        help="Let the next image stand in for one that cannot be read, and log it; else the run "
        "ends.",
    )
    data.add(
        "--num-workers",
        type=number(int, 0, 1024),
        metavar="N",
        help="Number of processes per rank that load images. Default: 4 for folders and latents, "
        "0 for embedded sets.",
    )


def _add_model_flags(parser: FlagParser) -> None:
    model = parser.group("Model")
    model.add(
        "--model",
        **model_size(DiT_models),
        help=f"Size and patch of the network, one of {in_groups(DiT_models)}; to be given.",
    )
    model.add(
        "--num-classes",
        type=number(int, 1, 100_000),
        metavar="N",
        help="Number of labels, without the null label. Default: the data's own.",
    )
    model.add(
        "--class-dropout-prob",
        type=number(float, 0, 1),
        default=0.1,
        metavar="P",
        help="Share of labels replaced by the null label, which guidance needs.",
    )
    model.add(
        "--qk-norm",
        **flag,
        help="Normalise queries and keys of the attention. Default: on for XL and G.",
    )
    model.add(
        "--flash-attn",
        default=False,
        **flag,
        help="Use the flash-attn package (CUDA) for attention, not PyTorch's own kernels.",
    )
    model.add(
        "--init-from",
        metavar="CKPT",
        help="Checkpoint of any accepted layout whose averaged weights a fresh run starts from.",
    )

    moe = parser.group("MoE")
    moe.add(
        "--num-experts",
        type=number(int, 0, 4096),
        metavar="E",
        help="Number of routed experts in a block; 0 makes it dense. Default: 16 for G, else 8.",
    )
    moe.add(
        "--num-experts-per-tok",
        type=number(int, 1, 4096),
        metavar="K",
        help="Number of routed experts that each token uses. Default: 2.",
    )
    moe.add(
        "--num-shared-experts",
        type=number(int, 0, 1024),
        metavar="N",
        help="Hidden width of the expert that all tokens use, in units of the model's width; 0 "
        "leaves it out. Default: 2.",
    )
    moe.add(
        "--mlp-ratio",
        type=number(float, 0.01, 1024),
        metavar="RATIO",
        help="Hidden width of a routed expert, in units of the model's width. Default: 4.",
    )
    moe.add(
        "--aux-loss-weight",
        type=number(float, 0),
        default=0.005,
        metavar="WEIGHT",
        help="Weight of each layer's load balancing loss beside the objective's loss.",
    )


def _add_optimization_flags(parser: FlagParser) -> None:
    train = parser.group("Optimization")
    train.add(
        "--rf",
        default=False,
        **flag,
        help="Train with rectified flow, not with DDPM's noise prediction.",
    )
    train.add(
        "--global-batch-size",
        "--train_batch_size",
        type=number(int, 1, 10_000_000),
        default=256,
        metavar="N",
        help="Number of images in an optimizer step, over all ranks.",
    )
    train.add(
        "--micro-batch-size",
        type=number(int, 1, 1_000_000),
        metavar="N",
        help="Number of images in a rank's forward pass. Default: a step's share of the rank "
        "divided by --accum-steps.",
    )
    train.add(
        "--accum-steps",
        "--accum_iter",
        type=number(int, 1, 1_000_000),
        metavar="N",
        help="Number of forward passes of a rank in an optimizer step. Default: as many as "
        "--micro-batch-size needs, 1 without it.",
    )
    train.add(
        "--lr",
        type=number(float, 0, 1000),
        default=1e-4,
        metavar="RATE",
        help="Learning rate of AdamW, constant after the warm-up.",
    )
    train.add(
        "--warmup-steps",
        type=number(int, 0),
        default=0,
        metavar="STEPS",
        help="Optimizer steps over which the learning rate rises linearly from 0.",
    )
    train.add(
        "--weight-decay",
        type=number(float, 0, 1000),
        default=0.0,
        metavar="DECAY",
        help="Decoupled weight decay of AdamW.",
    )
    train.add(
        "--clip-grad",
        type=number(float, 0),
        default=1.0,
        metavar="NORM",
        help="Largest norm of a step's gradient, which is scaled down to it; 0 turns it off.",
    )
    train.add(
        "--ema-decay",
        type=number(float, 0, 1),
        default=0.9999,
        metavar="DECAY",
        help="Share of the averaged weights that a step keeps.",
    )
    train.add(
        "--precision",
        **dtype_flag,
        help="Format of matrix products; master weights stay in fp32. Default: bf16 where the "
        "hardware has it, else fp32.",
    )
    train.add(
        "--grad-checkpointing",
        default=False,
        **flag,
        help="Compute every block again in the backward pass, which saves memory and costs time.",
    )
    train.add("--compile", default=False, **flag, help="Compile every block with torch.compile.")


def _add_run_flags(parser: FlagParser) -> None:
    run = parser.group("Run")
    run.add(
        "--results-dir", default="results", metavar="FOLDER", help="Folder that all runs are in."
    )
    run.add(
        "--run-name",
        metavar="NAME",
        help="Folder of this run in --results-dir. Default: from the model, the data, the seed, "
        "the rate and whatever else makes it another run.",
    )
    run.add(
        "--resume",
        default="auto",
        metavar="FROM",
        help="Checkpoint to go on from: auto takes the run's last, never insists on a new run, "
        "and a file or folder goes back to that one.",
    )
    run.add(
        "--allow-new-data",
        default=False,
        **flag,
        help="Go on with a run although its images or classes are not those it began with.",
    )
    run.add(
        "--epochs",
        type=number(int, 1),
        default=1400,
        metavar="N",
        help="Number of passes over the data after which the run ends.",
    )
    run.add(
        "--max-steps",
        type=number(int, 1),
        metavar="STEPS",
        help="Optimizer steps after which the run ends, if --epochs does not end it before. "
        "Default: no limit.",
    )
    run.add(
        "--seed",
        "--global-seed",
        "--global_seed",
        type=seed,
        default=0,
        metavar="N",
        help="Seed of the weights, the order of the images, noise, times and label drops.",
    )
    run.add(
        "--log-every",
        type=number(int, 1),
        default=100,
        metavar="STEPS",
        help="Optimizer steps between two points of the curves.",
    )
    run.add(
        "--ckpt-every",
        type=number(int, 1),
        default=5000,
        metavar="STEPS",
        help="Optimizer steps between two checkpoints; the last step is saved too.",
    )
    run.add(
        "--keep-last",
        type=number(int, 0),
        default=3,
        metavar="N",
        help="Number of checkpoints kept, the last ones; 0 keeps all.",
    )
    run.add(
        "--sample-every",
        type=number(int, 0),
        default=5000,
        metavar="STEPS",
        help="Optimizer steps between two grids of samples; 0 draws none.",
    )
    run.add(
        "--sample-cfg-scale",
        type=number(float, 0),
        default=1.5,
        metavar="SCALE",
        help="Scale of classifier-free guidance in these grids; 1 turns it off.",
    )
    run.add(
        "--dry-run",
        default=False,
        **flag,
        help="Print the settings and the number of parameters, then stop; nothing is written.",
    )


# ------------------------------------------------------------------------------ settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides a run, as `build_parser` describes it, with every default filled in.

    None means that the model's size decides (MoE and `qk_norm`), or that there is none.
    """

    # data
    data_path: str
    image_size: int  # pixels
    fashion_mnist_root: str | None
    flip: bool | None
    vae_path: str  # "none": the model works on pixels
    skip_broken: bool
    num_workers: int
    class_names: list[str]
    data_fingerprint: dict[str, Any]  # see `ImageDataset.fingerprint`

    # model
    model: str
    num_classes: int
    class_dropout_prob: float
    qk_norm: bool | None
    flash_attn: bool
    init_from: str | None
    num_experts: int | None
    num_experts_per_tok: int | None
    num_shared_experts: int | None
    mlp_ratio: float | None
    aux_loss_weight: float

    # optimization
    objective: str  # "rf" or "ddpm"
    global_batch_size: int  # = micro_batch_size * accum_steps * ranks
    micro_batch_size: int
    accum_steps: int
    lr: float
    warmup_steps: int
    weight_decay: float
    clip_grad: float  # 0 = off
    ema_decay: float
    precision: str  # "bf16", "fp16" or "fp32"
    grad_checkpointing: bool
    compile: bool

    # run
    results_dir: str
    run_name: str
    resume: str
    allow_new_data: bool
    epochs: int
    max_steps: int  # --epochs included
    seed: int
    log_every: int
    ckpt_every: int
    keep_last: int  # 0 = all
    sample_every: int  # 0 = never
    sample_cfg_scale: float
    deepspeed_config: str | None = None  # of train_deepspeed.py

    @property
    def run_dir(self) -> Path:
        """Folder of checkpoints, curves and pictures."""
        return Path(self.results_dir) / self.run_name

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, as checkpoints and args.json keep them."""
        return dataclasses.asdict(self)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse, before any work, what needs no more than the flags to be seen.

    Raises:
        UserError: no `--model`.
        FileError: `--resume` names nothing.
    """
    if args.model is None:
        fitting = FITTING_SIZES.get(args.data_path, "DiT-S/2")
        raise UserError(f"--model is required; for --data-path {args.data_path} take {fitting}")
    run_dir = Path(args.results_dir) / (args.run_name or default_run_name(args))
    known = args.resume in ("auto", "never") or Path(args.resume).exists()
    if not known and not run_dir.exists():  # else the run may have gone on without that file
        raise FileError(f"--resume {args.resume}: no such file")


def split_batch(args: argparse.Namespace, world_size: int) -> tuple[int, int]:
    """Return `micro_batch_size` and `accum_steps`, so that global = micro * accum * ranks.

    Raises:
        UserError: if the three numbers given do not fit together.
    """
    per_rank, rest = divmod(args.global_batch_size, world_size)
    if rest:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not a multiple of {world_size} ranks"
        )
    micro = args.micro_batch_size or per_rank // (args.accum_steps or 1)
    if micro == 0:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is less than --accum-steps "
            f"{args.accum_steps} x {world_size} ranks"
        )
    accum = args.accum_steps or per_rank // micro
    if micro * accum != per_rank:
        raise UserError(
            f"--global-batch-size {args.global_batch_size} is not --micro-batch-size "
            f"{micro} x --accum-steps {accum} x {world_size} ranks"
        )
    return micro, accum


def resolve(
    args: argparse.Namespace,
    rt: Runtime,
    dataset: ImageDataset,
    *,
    vae_path: str,
    precision: str | None,
) -> TrainSettings:
    """Fill in every default that depends on the data, the machine or other flags.

    Args:
        args: of `build_parser`; left as they are.
        rt: this process; its device decides the precision, the number of ranks the batch.
        dataset: that `args` name.
        vae_path: the flag, or the data's own.
        precision: the flag, or what the engine prescribes.

    Raises:
        UserError: naming the flag, if a value does not fit the data or the ranks.
    """
    micro_batch_size, accum_steps = split_batch(args, rt.world_size)
    num_classes = args.num_classes or dataset.num_classes
    if num_classes < dataset.num_classes:
        raise UserError(
            f"--num-classes {num_classes} is less than the {dataset.num_classes} classes of "
            f"--data-path {args.data_path}"
        )
    num_workers = 4 if isinstance(dataset, FolderImages | CachedLatents) else 0
    limits = [args.epochs * max(len(dataset) // args.global_batch_size, 1), args.max_steps]
    fields = {field.name for field in dataclasses.fields(TrainSettings)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    resolved = {
        "image_size": dataset.image_size,
        "vae_path": vae_path,
        "num_workers": num_workers if args.num_workers is None else args.num_workers,
        "class_names": dataset.class_names,
        "data_fingerprint": dataset.fingerprint(),
        "num_classes": num_classes,
        "objective": "rf" if args.rf else "ddpm",
        "micro_batch_size": micro_batch_size,
        "accum_steps": accum_steps,
        "precision": resolve_precision(precision or args.precision, rt),
        "run_name": args.run_name or process.from_main(default_run_name(args)),
        "max_steps": min(limit for limit in limits if limit is not None),
    }
    return TrainSettings(**given | resolved)


def resolve_precision(name: str | None, rt: Runtime) -> str:
    """Return the precision to train in, by default the hardware's; warn of one it lacks."""
    fast = process.default_precision(rt.device)
    if rt.device.type == "cpu" and name not in (None, "fp32", fast):
        logging.warning(
            "--precision %s has no fast kernels on this CPU, try fp32: expect a crawl", name
        )
    return name or fast


# ------------------------------------------------------------------------------ run name

# Flags that make another run, by how the name shows them; those that are as by default are left
# out. Model, experts, objective, data, rate and seed are always there, machine and limits never.
NAMED_FLAGS = {
    "image_size": "px",
    "flip": "flip",
    "num_classes": "classes",
    "class_dropout_prob": "drop",
    "qk_norm": "qknorm",
    "num_shared_experts": "shared",
    "mlp_ratio": "mlp",
    "aux_loss_weight": "aux",
    "global_batch_size": "batch",
    "warmup_steps": "warmup",
    "weight_decay": "decay",
    "clip_grad": "clip",
    "ema_decay": "ema",
    "precision": "",
}
HASHED_FLAGS = ("data_path", "fashion_mnist_root", "vae_path", "init_from")  # paths, too long
MAX_NAME_BYTES = 200  # file systems allow 255


def default_run_name(args: argparse.Namespace) -> str:
    """Name a run by what it trains, so that the same command finds its own checkpoints.

    DiT-S-2-8E2A-rf-photos-lr0.0001-seed0-batch512-3f9c01ab: what other flags change follows the
    seed, and paths are in the hash at the end, since two folders may share a name.

    Args:
        args: of `build_parser`, as given: what the machine decides is not in the name.
    """
    default = build_parser(None).get_default
    experts = "" if args.num_experts is None else f"{args.num_experts}E"
    active = "" if args.num_experts_per_tok is None else f"{args.num_experts_per_tok}A"
    parts = [args.model, experts + active, "rf" if args.rf else "ddpm"]
    parts += [Path(args.data_path).name[:40], f"lr{args.lr}", f"seed{args.seed}"]
    for name, label in NAMED_FLAGS.items():
        if (value := getattr(args, name)) != default(name):
            on_or_off = {True: label, False: f"no{label}"}
            parts.append(on_or_off[value] if isinstance(value, bool) else f"{label}{value}")
    if args.vae_path == "none" and args.data_path not in FITTING_SIZES:
        parts.append("pixels")
    paths = [_whole_path(getattr(args, name)) for name in HASHED_FLAGS]
    if any(paths):
        parts.append(_short_hash(paths))
    name = "-".join(re.sub(r"[^\w.-]+", "-", part).strip("-") for part in parts if part)
    if len(name.encode()) > MAX_NAME_BYTES:
        name = name.encode()[: MAX_NAME_BYTES - 9].decode(errors="ignore") + f"-{_short_hash(name)}"
    return name


def _whole_path(path: str | None) -> str:
    """Return what a path means wherever the command runs; a hub id or embedded set as it is."""
    if path is None or path in FITTING_SIZES or path == "none":
        return ""
    return os.path.abspath(path) if os.path.exists(path) else path


def _short_hash(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
