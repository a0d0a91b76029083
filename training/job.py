"""What both trainers need before the first step: the job that the settings describe, and the EMA.

In the order a run uses them: `prepare` (flags to a `Job`: data, objective, model),
`describe`, `Ema`. The flags are in training/settings.py, the first weights in training/initial.py,
going on with a run in training/resume.py, the steps in training/loop.py.
"""

import argparse
import copy
import json
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint.layouts import known_fields
from checkpoint.weights import find_latent_norm, open_weights
from common import process
from common.errors import UserError, blamed_on
from common.process import Runtime
from data import VAE, Data, ImageDataset, LatentNorm, Pixels, open_data
from data.class_images import open_validation
from data.datasets import hold_out
from data.latent_cache import CachedLatents
from data.latent_features import CachedFeatures
from diffusion import OBJECTIVE_SETTINGS, Diffusion, create_diffusion
from models import DiT, DiT_models
from moe_ops import check_expert_parallel
from training.initial import (
    check_same_network,
    initial_weights,
    listing,
    open_initial,
    plan_start,
)
from training.parameters import freeze, optimizer_groups
from training.repa import Encoder, check_repa
from training.settings import NETWORK_FLAGS, TrainSettings, check_flags, resolve
from training.trackers import check_trackers


class Job(NamedTuple):
    """What a run trains, built from its flags alone."""

    settings: TrainSettings
    rt: Runtime
    dataset: ImageDataset
    vae: VAE | Pixels
    diffusion: Diffusion
    model: DiT
    num_parameters: tuple[int, int]  # total, activated
    start: list[str]  # lines that tell what of --init-from is taken
    encoder: Encoder | CachedFeatures | None = None  # of --repa
    val: ImageDataset | None = None  # not learnt from

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return self.settings.run_dir


def prepare(args: argparse.Namespace, *, meta: bool = False, precision: str | None = None) -> Job:
    """Join the process group, open the data and build the model; no file is written.

    Args:
        args: of `build_parser`.
        meta: leave the model without memory, for a trainer that cuts it into shards.
        precision: that the trainer's engine prescribes, else the flag's or the hardware's.

    Raises:
        UserError: naming the flag whose value does not fit.
    """
    check_flags(args)
    check_trackers(args.tracker)
    rt = process.setup()
    level = logging.INFO if rt.is_main else logging.WARNING
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
    data = open_data(
        args.data_path,
        device=rt.device,
        vae_path=args.vae_path,
        image_size=args.image_size,
        flip=args.flip,
        fashion_mnist_root=args.fashion_mnist_root,
        skip_broken=args.skip_broken,
    )
    _, vae, vae_path = data
    dataset, val = split_validation(args, data)
    norm = find_norm(args, data)
    settings = resolve(args, rt, dataset, vae_path=vae_path, precision=precision, latent_norm=norm)
    if isinstance(vae, VAE):
        vae.norm = norm
        vae.check_size(settings.image_size)
    model = build_model(settings, vae.channels or dataset.channels, vae.downsample)
    if (size := settings.expert_parallel) is not None:
        planned = size if args.dry_run and rt.world_size == 1 else rt.world_size
        with blamed_on(f"--expert-parallel {size}"):
            check_expert_parallel(size, model.config.num_experts, planned)
    if not meta and not args.dry_run:
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = model.to_empty(device="cpu").state_dict()
        for name, value in initial_weights(settings, model.config, shapes):
            state[name].copy_(value)
    torch.manual_seed(settings.seed + 1 + rt.rank)  # other noise, times and label drops on each
    diffusion = create_diffusion(
        settings.objective,
        learn_sigma=model.config.learn_sigma,
        x0_range=vae.x0_range,
        **{name: getattr(settings, name) for name in OBJECTIVE_SETTINGS[settings.objective]},
    )
    counts, start = model.num_parameters(), told_start(settings, model)
    encoder: Encoder | CachedFeatures | None = None
    if settings.repa is not None:
        check_repa(settings.repa, settings.repa_block, model)
        grid = model.config.input_size // model.config.patch_size
        if isinstance(dataset, CachedLatents):
            encoder = CachedFeatures(dataset.folder, dataset.index, settings.repa, grid)
            dataset.features = encoder
        elif not args.dry_run:
            encoder = Encoder(settings.repa, grid, rt.device)
    return Job(settings, rt, dataset, vae, diffusion, model, counts, start, encoder, val)


def split_validation(
    args: argparse.Namespace, data: Data
) -> tuple[ImageDataset, ImageDataset | None]:
    """Return the images to learn from, and those by `--val-fraction` or `--val-path`, if any."""
    if args.val_fraction:
        return hold_out(data.dataset, args.val_fraction)
    if args.val_path:
        root = args.fashion_mnist_root
        return data.dataset, open_validation(args.val_path, data, args.data_path, root)
    return data.dataset, None


def find_norm(args: argparse.Namespace, data: Data) -> LatentNorm | None:
    """Return what `--latent-norm` divides by: what `--init-from` learned with, else the cache's.

    Raises:
        UserError: channel, and nothing tells it.
    """
    initial = None
    if args.init_from:
        initial = find_latent_norm(
            open_weights(args.init_from, known=known_fields(args.model)).settings
        )
    if initial and len(initial.mean) != data.vae.channels:
        initial = None
    if (args.latent_norm or ("channel" if initial else "none")) == "none":
        return None
    return initial or data.latent_norm()


def build_model(settings: TrainSettings, latent_channels: int, downsample: int) -> DiT:
    """Build the model that the flags describe, on the meta device: see `initial_weights`.

    What flags leave open about the mixtures is as in the file of `--init-from`, if given.

    Raises:
        UserError: if a size or two choices do not fit, or the initial weights are of another model.
    """
    if settings.image_size % downsample:
        raise UserError(f"--image-size {settings.image_size} is not a multiple of {downsample}")
    values = {name: getattr(settings, name) for name in NETWORK_FLAGS}
    overrides = {name: value for name, value in values.items() if value is not None}
    initial = open_initial(settings) if settings.init_from else None
    if initial is not None:
        overrides = {name: getattr(initial.config, name) for name in NETWORK_FLAGS} | overrides
    with torch.device("meta"), blamed_on(f"--model {settings.model}"):
        model = DiT_models[settings.model](
            input_size=settings.image_size // downsample,
            in_channels=latent_channels,
            num_classes=settings.num_classes,
            class_dropout_prob=settings.class_dropout_prob,
            **overrides,
        )
    model.grad_checkpointing = settings.grad_checkpointing
    model.use_rank_statistics(settings.aux_loss_scope == "rank")
    if settings.flash_attn:
        model.use_flash_attn()
    if initial is not None:
        check_same_network(settings, model.config, initial.config)
    freeze(model, settings.freeze or ())
    optimizer_groups(model.named_parameters(), settings)  # refuses patterns before any work
    return model


def told_start(settings: TrainSettings, model: DiT) -> list[str]:
    """Return the lines about `--init-from`, [] without it."""
    if not settings.init_from:
        return []
    initial = open_initial(settings)
    return listing(settings, plan_start(settings, model.config, initial))


def autocast(job: Job) -> torch.autocast:
    """Return the context of the run's precision."""
    dtype = process.DTYPES[job.settings.precision]
    return torch.autocast(job.rt.device.type, dtype, enabled=dtype != torch.float32)


def describe(job: Job) -> str:
    """Return the settings and parameter counts that `--dry-run` prints."""
    total, activated = job.num_parameters
    long = ("class_names", "latent_stats")
    settings = {k: v for k, v in job.settings.to_dict().items() if k not in long}
    lines = [
        json.dumps(settings, indent=2, sort_keys=True),
        f"data: {len(job.dataset):,} images, {job.dataset.num_classes} classes"
        + (f"; {len(job.val):,} more are held out" if job.val else ""),
        f"ranks: {job.rt.world_size} on {job.rt.device.type}",
        f"run folder: {job.run_dir}",
        f"parameters: {total:,} total, {activated:,} activated",
        *job.start,
    ]
    return "\n".join(lines)


# ------------------------------------------------------------------------------ EMA


class Ema:
    """Exponential moving average of a model's trained parameters, in float32.

    Biases and thresholds of routers, which are not trained, are copied: they go with their loads.
    `model` is a frozen copy in eval mode, ready to sample from.
    """

    def __init__(self, model: DiT, decay: float) -> None:
        self.decay = decay
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        pairs = zip(self.model.parameters(), model.parameters(), strict=True)
        trained = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
        self._averages, self._parameters = zip(*trained, strict=True)
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model, in one fused pass: ema += (1 - decay)(p - ema)."""
        torch._foreach_lerp_(self._averages, self._parameters, 1 - self.decay)
        for copied, buffer in self._buffers:
            copied.copy_(buffer)
