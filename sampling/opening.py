"""A checkpoint made ready to draw, the same way by every script that draws.

In this order: `DrawingRun`, then `open_run` with its parts; its flags are in flags.py.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.layouts import check_told, known_fields
from checkpoint.weights import (
    Weights,
    find_latent_norm,
    find_objective,
    find_vae_path,
    open_weights,
)
from common import process
from common.errors import UserError, blamed_on
from data import VAE, Pixels, load_vae
from diffusion import OBJECTIVE_SETTINGS, Diffusion, create_diffusion
from models import DiT, DiTConfig
from moe_ops import ExpertGroup, check_expert_parallel, num_ranks
from sampling.offload import build_for_sampling, check_options


class DrawingRun(NamedTuple):
    """A checkpoint that is ready to draw."""

    path: Path  # what was opened: of a run folder, its latest checkpoint
    model: DiT  # in eval mode
    diffusion: Diffusion
    vae: VAE | Pixels
    vae_path: str
    settings: Mapping[str, Any]  # {} for published files
    guide: DiT | None = None  # of `--guide-ckpt`, in eval mode

    @property
    def config(self) -> DiTConfig:
        """Return that of the model."""
        return self.model.config

    @property
    def class_names(self) -> list[str]:
        """Return the names of the classes, [] if the checkpoint has none."""
        return self.settings.get("class_names") or []

    @property
    def device(self) -> torch.device:
        """Return where it draws."""
        return next(self.model.parameters()).device

    @property
    def image_channels(self) -> int:
        """Return the channels of the images, 1 or 3."""
        return self.vae.image_channels if isinstance(self.vae, VAE) else self.config.in_channels

    @property
    def image_size(self) -> int:
        """Return the side of the images, in pixels."""
        return self.config.input_size * self.vae.downsample


def open_run(
    path: str | Path,
    *,
    device: torch.device,
    dtype: str | None = None,
    ema: bool | float = True,
    rf: bool | None = None,
    vae_path: str | None = None,
    quantize: str | None = None,
    offload: str | None = None,
    told: Mapping[str, Any] | None = None,
    time_shift: float | None = None,
    guide_ckpt: str | Path | None = None,
    expert_parallel: int | None = None,
    compile: bool = False,
) -> DrawingRun:
    """Open a checkpoint for drawing; what does not fit is refused before weights are read.

    Args:
        path: as in `load_model`.
        device: of the computation.
        dtype: name in `process.DTYPES`; None: by the hardware.
        ema: as in `load_model`.
        rf: objective of a file that does not tell it.
        vae_path: as in `load_vae`; None: that of the checkpoint.
        quantize: as in `build_for_sampling`.
        offload: likewise.
        told: what flags say (`flags.TOLD`): compared with a config, needed where there is none.
        time_shift: of rectified flow's steps; None: that of the checkpoint.
        guide_ckpt: checkpoint of ours whose model guides, of the same data and objective.
        compile: whether to compile the blocks, for shapes that do not change.
        expert_parallel: ranks that hold the experts together; all must draw equally often then.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        UserError: the checkpoint cannot be read, or a flag contradicts it.
    """
    told = {name: value for name, value in (told or {}).items() if value is not None}
    known = known_fields(told.get("model"), num_experts_per_tok=told.get("num_experts_per_tok"))
    weights = open_weights(path, ema=ema, known=known)
    config, settings = weights.config, weights.settings
    check_told(path, told, config)
    check_options(weights, device, quantize=quantize, offload=offload)
    if compile and (quantize or offload):
        raise UserError("--compile goes with neither --quantize nor --offload")
    options: dict[str, Any] = {"quantize": quantize, "offload": offload}
    if expert_parallel is not None:
        options["group"] = expert_group(expert_parallel, config, alone=not (quantize or offload))
    objective = find_objective(settings, config, rf)
    vae_path = find_vae_path(settings, vae_path)
    norm = find_latent_norm(settings)
    vae = load_vae(vae_path, device=device, model_channels=config.in_channels, norm=norm)
    if told.get("image_size") not in (None, size := config.input_size * vae.downsample):
        raise UserError(f"--image-size {told['image_size']}: {path} has {size}")
    guiding = None if guide_ckpt is None else open_guide(guide_ckpt, weights, ema=ema)
    diffusion = objective_of(objective, config, settings, vae, path, time_shift)
    options |= {"dtype": process.pick_dtype(dtype, device), "device": device}
    model = _build(weights, compile, options)
    guide = None if guiding is None else _build(guiding, compile, options)
    return DrawingRun(weights.path, model, diffusion, vae, vae_path, settings, guide)


def _build(weights: Weights, compile: bool, options: Mapping[str, Any]) -> DiT:
    """Build a model by `build_for_sampling`, its blocks compiled for shapes that do not change."""
    model = build_for_sampling(weights, **options)
    if compile:
        model.compile_blocks(dynamic=False)
    return model


def expert_group(size: int, config: DiTConfig, *, alone: bool) -> ExpertGroup | None:
    """Return the ranks that hold the experts with this one, None if it holds all of them.

    Raises:
        UserError: `size` does not fit the experts or the ranks, or comes with other ways to save
            memory, so that it is not `alone`.
    """
    with blamed_on(f"--expert-parallel {size}"):
        if not alone:
            raise ValueError("it goes with neither --quantize nor --offload")
        check_expert_parallel(size, config.num_experts, num_ranks())
    return ExpertGroup(size) if size > 1 else None


def objective_of(
    objective: str,
    config: DiTConfig,
    settings: Mapping[str, Any],
    vae: VAE | Pixels,
    path: str | Path,
    time_shift: float | None = None,
) -> Diffusion:
    """Build the objective of a checkpoint.

    Args:
        objective: "rf" or "ddpm".
        config: of its model.
        settings: of its training, {} for published files.
        vae: what its latents are of.
        path: of the checkpoint, for messages.
        time_shift: instead of the one it was trained with.

    Raises:
        UserError: its settings are out of range, or it has no shift.
    """
    if time_shift is not None and objective != "rf":
        raise UserError(f"--time-shift {time_shift:g} means nothing for {path}, which is of DDPM")
    own = {name: settings.get(name) for name in OBJECTIVE_SETTINGS[objective]}
    if time_shift is not None:
        own["time_shift"] = time_shift
    with blamed_on(str(path)):
        return create_diffusion(
            objective, learn_sigma=config.learn_sigma, x0_range=vae.x0_range, **own
        )


def open_guide(path: str | Path, weights: Weights, *, ema: bool | float) -> Weights:
    """Open the weights of `--guide-ckpt`, whose predictions can be compared with a model's.

    Args:
        path: as in `load_model`.
        weights: of the model.
        ema: as in `load_model`.

    Raises:
        UserError: it is of other data or another objective.
    """
    guide = open_weights(path, ema=ema is not False)
    sides = [(w.config.to_dict(), w.settings) for w in (weights, guide)]
    fields = ("input_size", "in_channels", "num_classes")
    differing = [name for name in fields if sides[0][0][name] != sides[1][0][name]]
    names = ("objective", "time_scale", "prediction", "zero_terminal_snr")
    differing += [n for n in names if (sides[0][1].get(n) or None) != (sides[1][1].get(n) or None)]
    if differing:
        raise UserError(f"--guide-ckpt {path} was trained with another {', '.join(differing)}")
    return guide
