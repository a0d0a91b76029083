"""The settings of a training run: what its flags become once the data is known.

In order: `TrainSettings` (every default filled in; frozen, and what checkpoints and args.json
keep), `check_flags` and `resolve` (flags to settings), and `default_run_name`.
"""

import argparse
import dataclasses
import hashlib
import logging
import os
import re
from pathlib import Path
from typing import Any

from checkpoint.layouts import known_fields
from checkpoint.weights import open_weights
from common import process
from common.errors import FileError, UserError, blamed_on
from common.process import Runtime
from data import ImageDataset, LatentNorm
from diffusion import OBJECTIVE_SETTINGS, create_diffusion
from training.flags import build_parser

# Flags that a run may change on its way, but then it is not the run that it would have been.
WARN_IF_CHANGED = (
    *("data_path", "vae_path", "flip", "seed", "global_batch_size", "lr", "warmup_steps"),
    *("lr_schedule", "min_lr", "decay_steps", "adam_betas", "adam_eps"),
    *("weight_decay", "clip_grad", "ema_decay", "ema_decays", "aux_loss_weight", "precision"),
    *("contrastive_loss_weight", "z_loss_weight", "capacity_loss_weight"),
    *("bias_update_rate", "aux_loss_scope", "freeze", "lr_scale"),
    *("time_shift", "time_sampling", "min_snr_gamma", "repa", "repa_block", "repa_loss_weight"),
)
# Fields of the network that a flag may leave to the model's size or the file of --init-from.
NETWORK_FLAGS = (
    *("num_experts", "num_experts_per_tok", "num_shared_experts", "mlp_ratio", "mlp_type"),
    *("moe_blocks", "first_k_dense_replace", "dense_mlp_ratio", "unconditional_expert"),
    *("affinity", "selection", "capacity", "exact_thresholds", "norm_topk_prob"),
    *("routed_scaling_factor", "balance", "qk_norm", "qk_norm_eps", "rope", "norm"),
)
# Embedded data, and the sizes that fit them; to folders DiT-S/2 does.
FITTING_SIZES = {"digits": "DiT-Ti/1 or DiT-Ti/2", "fashion-mnist": "DiT-Ti/4"}


# ------------------------------------------------------------------------------ settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Everything that decides a run, as `build_parser` describes it, with every default filled in.

    None means that the model's size decides (`NETWORK_FLAGS`), or that there is none. Fields with
    a default came later: it is what checkpoints without them were trained with.
    """

    # data
    data_path: str
    image_size: int  # pixels
    fashion_mnist_root: str | None
    flip: bool | None
    vae_path: str  # "none": the model works on pixels
    latent_norm: str = "none"  # or "channel"
    latent_stats: dict[str, list[float]] | None = None  # by which "channel" divides
    skip_broken: bool
    num_workers: int
    class_names: list[str]
    data_fingerprint: dict[str, Any]  # see `ImageDataset.fingerprint`
    val_path: str | None = None
    val_fraction: float = 0.0
    val_every: int = 1000

    # model
    model: str
    num_classes: int
    class_dropout_prob: float
    qk_norm: bool | None
    flash_attn: bool
    init_from: str | None
    init_strict: bool = False
    freeze: list[str] | None = None  # parts of parameters' names
    num_experts: int | None
    num_experts_per_tok: int | None
    num_shared_experts: int | None
    mlp_ratio: float | None
    qk_norm_eps: float | None = None
    rope: bool | None = None
    norm: str | None = None
    mlp_type: str | None = None
    moe_blocks: str | None = None
    first_k_dense_replace: int | None = None
    dense_mlp_ratio: float | None = None
    unconditional_expert: bool | None = None
    affinity: str | None = None
    selection: str | None = None
    capacity: float | None = None
    exact_thresholds: bool | None = None
    norm_topk_prob: bool | None = None
    routed_scaling_factor: float | None = None
    balance: list[str] | None = None  # [] = none

    # auxiliary losses and router state
    aux_loss_weight: float
    contrastive_loss_weight: float = 1.0
    z_loss_weight: float = 1e-3
    capacity_loss_weight: float = 0.01
    bias_update_rate: float = 1e-3
    aux_loss_scope: str = "global"  # or "rank"

    # optimization
    objective: str  # "rf" or "ddpm"
    time_scale: float | None = None  # of rectified flow; None: 1, and for DDPM
    time_shift: float | None = None  # None: 1
    time_sampling: list[str] | None = None  # law and numbers; None: lognormal 0 1
    repa: str | None = None  # timm:NAME, whose features a block's tokens learn
    repa_block: int | None = None  # from 1; None: the eighth or, of few, the half
    repa_loss_weight: float = 0.5
    prediction: str | None = None  # of DDPM: "v"; None: epsilon
    zero_terminal_snr: bool = False
    min_snr_gamma: float | None = None
    global_batch_size: int  # = micro_batch_size * accum_steps * ranks
    micro_batch_size: int
    accum_steps: int
    lr: float
    lr_scale: list[str] | None = None  # PATTERN=FACTOR, see training/parameters.py
    warmup_steps: int
    lr_schedule: str = "constant"  # or "cosine", "wsd"
    min_lr: float = 0.0
    decay_steps: int | None = None  # before max_steps; None: constant
    optimizer: str = "adamw"  # or "muon"
    adam_betas: list[float] = dataclasses.field(default_factory=lambda: [0.9, 0.999])
    adam_eps: float = 1e-8
    weight_decay: float
    clip_grad: float  # 0 = off
    ema_decay: float
    ema_decays: list[float] | None = None  # all of several, ema_decay first
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
    stop_after: float | None = None  # hours
    seed: int
    log_every: int
    ckpt_every: int
    keep_last: int  # 0 = all
    sample_every: int  # 0 = never
    sample_cfg_scale: float
    eval_every: int = 0  # 0 = never
    eval_samples: int = 1000
    eval_features: str | None = None  # None: by the data
    inception_weights: str | None = None
    keep_best: bool = False
    tracker: list[str] = dataclasses.field(default_factory=lambda: ["tensorboard"])
    deepspeed_config: str | None = None  # of train_deepspeed.py
    expert_parallel: int | None = None  # ranks that hold a layer's experts together

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
        UserError: no `--model`, or flags that mean nothing together.
        FileError: `--resume` names nothing.
    """
    if args.model is None:
        fitting = FITTING_SIZES.get(args.data_path, "DiT-S/2")
        raise UserError(f"--model is required; for --data-path {args.data_path} take {fitting}")
    check_objective(args)
    if "none" in (args.balance or ()) and len(args.balance) > 1:
        raise UserError(f"--balance {' '.join(args.balance)}: none goes with no other")
    check_schedule(args)
    if args.keep_best and not args.eval_every:
        raise UserError("--keep-best: give --eval-every STEPS, by which the best is found")
    cut = hasattr(args, "deepspeed_config") or getattr(args, "expert_parallel", None)
    if len(set(args.ema_decay)) < len(args.ema_decay):
        raise UserError(f"--ema-decay {' '.join(map(str, args.ema_decay))}: two are the same")
    if len(args.ema_decay) > 1 and getattr(args, "expert_parallel", None):
        raise UserError("--ema-decay: with --expert-parallel one average only")
    if args.repa and (cut or args.compile):
        raise UserError("--repa: train.py has it, without --compile and cut experts")
    if args.optimizer == "muon" and cut:
        raise UserError("--optimizer muon needs whole matrices: take train.py, without cut experts")
    if args.val_path and args.val_fraction:
        raise UserError("--val-path and --val-fraction: give one of them")
    if args.val_path == "test" and args.data_path not in FITTING_SIZES:
        raise UserError(f"--val-path test: --data-path {args.data_path} has no test split")
    run_dir = Path(args.results_dir) / (args.run_name or default_run_name(args))
    known = args.resume in ("auto", "never") or Path(args.resume).exists()
    if not known and not run_dir.exists():  # else the run may have gone on without that file
        raise FileError(f"--resume {args.resume}: no such file")


def check_objective(args: argparse.Namespace) -> None:
    """Refuse flags of the objective that mean nothing together or are out of range.

    Raises:
        UserError: naming the flag.
    """
    ours, other, where = ("rf", "ddpm", "with") if args.rf else ("ddpm", "rf", "without")
    for name in OBJECTIVE_SETTINGS[other]:
        if value := getattr(args, name):
            text = " ".join(value) if isinstance(value, list) else f"{value}".removesuffix(".0")
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} {text} means nothing {where} --rf")
    own = {name: getattr(args, name) for name in OBJECTIVE_SETTINGS[ours]}
    if args.init_from and not args.prediction:  # it may come from there
        own.pop("zero_terminal_snr", None)
    with blamed_on("flags"):
        create_diffusion(ours, **own)


def check_schedule(args: argparse.Namespace) -> None:
    """Refuse flags of the learning rate that mean nothing together.

    Raises:
        UserError: naming the flag.
    """
    if args.lr_schedule == "constant":
        for flag, value in (("--min-lr", args.min_lr), ("--decay-steps", args.decay_steps)):
            if value:
                raise UserError(f"{flag} {value:g} means nothing with --lr-schedule constant")
    elif args.min_lr > args.lr:
        raise UserError(f"--min-lr {args.min_lr:g} is more than --lr {args.lr:g}")


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
    latent_norm: LatentNorm | None = None,
) -> TrainSettings:
    """Fill in every default that depends on the data, the machine or other flags.

    Args:
        args: of `build_parser`; left as they are.
        rt: this process; its device decides the precision, the number of ranks the batch.
        dataset: that `args` name.
        vae_path: the flag, or the data's own.
        precision: the flag, or what the engine prescribes.
        latent_norm: of `find_norm`.

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
    num_workers = 0 if dataset.in_memory else 4
    limits = [args.epochs * max(len(dataset) // args.global_batch_size, 1), args.max_steps]
    max_steps = min(limit for limit in limits if limit is not None)
    fields = {field.name for field in dataclasses.fields(TrainSettings)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    resolved = {
        "image_size": dataset.image_size,
        "vae_path": vae_path,
        "latent_norm": "channel" if latent_norm else "none",
        "latent_stats": latent_norm and {n: list(v) for n, v in latent_norm._asdict().items()},
        "num_workers": num_workers if args.num_workers is None else args.num_workers,
        "class_names": dataset.class_names,
        "data_fingerprint": dataset.fingerprint(),
        "num_classes": num_classes,
        "balance": args.balance and [term for term in args.balance if term != "none"],
        "objective": "rf" if args.rf else "ddpm",
        **resolve_objective(args),
        "micro_batch_size": micro_batch_size,
        "accum_steps": accum_steps,
        "precision": resolve_precision(precision or args.precision, rt),
        "run_name": args.run_name or process.from_main(default_run_name(args)),
        "ema_decay": args.ema_decay[0],
        "ema_decays": args.ema_decay if len(args.ema_decay) > 1 else None,
        "max_steps": max_steps,
        "decay_steps": resolve_decay_steps(args, max_steps),
    }
    return TrainSettings(**given | resolved)


def resolve_decay_steps(args: argparse.Namespace, max_steps: int) -> int | None:
    """Return over how many steps the rate falls, None if it does not: see `learning_rate`."""
    if args.lr_schedule == "constant":
        return None
    fitting = {"cosine": max_steps - args.warmup_steps, "wsd": max_steps // 5}
    return args.decay_steps or max(fitting[args.lr_schedule], 1)


def resolve_objective(args: argparse.Namespace) -> dict[str, Any]:
    """Return what flags, or else `--init-from`, say of what the model is to predict and when.

    Raises: as `open_weights`.
    """
    initial: Any = {}
    if args.init_from:
        initial = open_weights(args.init_from, known=known_fields(args.model)).settings

    def pick(name: str, default: Any) -> Any:
        value = getattr(args, name)
        value = initial.get(name) if value is None else value
        return None if value in (None, default) else value

    if args.rf:
        return {
            "time_scale": pick("time_scale", 1.0) or 1.0,
            "time_shift": pick("time_shift", 1.0),
            "zero_terminal_snr": False,
        }
    found = {
        "prediction": pick("prediction", "epsilon"),
        "zero_terminal_snr": bool(pick("zero_terminal_snr", False)),
    }
    with blamed_on("--zero-terminal-snr"):
        create_diffusion("ddpm", **found)
    return found


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
    "latent_norm": "norm",
    "val_fraction": "val",
    "num_classes": "classes",
    "class_dropout_prob": "drop",
    "qk_norm": "qknorm",
    "num_shared_experts": "shared",
    "mlp_ratio": "mlp",
    "mlp_type": "",
    "moe_blocks": "",
    "first_k_dense_replace": "first",
    "dense_mlp_ratio": "dense",
    "unconditional_expert": "unconditional",
    "affinity": "",
    "selection": "",
    "capacity": "capacity",
    "exact_thresholds": "exact",
    "norm_topk_prob": "norm",
    "routed_scaling_factor": "scale",
    "balance": "",
    "qk_norm_eps": "eps",
    "rope": "rope",
    "norm": "",
    "aux_loss_weight": "aux",
    "contrastive_loss_weight": "contrastive",
    "z_loss_weight": "z",
    "capacity_loss_weight": "predictor",
    "bias_update_rate": "bias",
    "aux_loss_scope": "by",
    "time_scale": "time",
    "time_shift": "shift",
    "time_sampling": "",
    "prediction": "",
    "zero_terminal_snr": "zerosnr",
    "min_snr_gamma": "minsnr",
    "repa": "repa",
    "repa_block": "block",
    "repa_loss_weight": "repaweight",
    "global_batch_size": "batch",
    "warmup_steps": "warmup",
    "lr_schedule": "",
    "min_lr": "min",
    "decay_steps": "over",
    "optimizer": "",
    "adam_betas": "betas",
    "adam_eps": "adameps",
    "weight_decay": "decay",
    "clip_grad": "clip",
    "ema_decay": "ema",
    "precision": "",
    "freeze": "freeze",
    "lr_scale": "lrscale",
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
        if name == "qk_norm_eps" and args.qk_norm is False:
            continue  # of nothing
        if (value := getattr(args, name)) != default(name):
            on_or_off = {True: label, False: f"no{label}"}
            text = f"{label}{value}"
            if isinstance(value, list):
                numbers = isinstance(value[0], float)
                glue = label if numbers or not label else f"{label}-"
                text = glue + "-".join(map(str, value))
            parts.append(on_or_off[value] if isinstance(value, bool) else text)
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
