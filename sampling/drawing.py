"""Draw a few pictures step by step and keep which expert took which patch on the way.

`DrawingPlan` says what to draw and `check_plan` what of it this machine allows; `draw` draws it,
`route_picture` sends a photo through the network instead. Both make a `Drawing`: what the network
saw at every step, and what its routers decided.

Shapes: S steps, N pictures, C channels, H W latent size, A side of a picture in pixels.
"""

import math
import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import process
from common.errors import UserError, blamed_on
from data.class_images import open_pictures
from data.image_files import size_of
from diffusion import Diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from models import DiTConfig
from routing.tables import UNCONDITIONAL
from routing.tracing import RoutingTracer, layers_of, trace_bytes
from sampling.opening import DrawingRun


class Limits(NamedTuple):
    """What one request may cost."""

    pictures: int = 8
    steps: int = 250
    trace_bytes: int = 2**27
    upload_bytes: int = 10 * 2**20
    upload_pixels: int = 2**25


class DrawingPlan(NamedTuple):
    """What to draw."""

    label: int
    num_pictures: int = 1
    seed: int = 0
    cfg_scale: float = 1.5
    cfg_interval: tuple[float, float] = (0.0, 1.0)
    sampler: str | None = None  # None: the objective's own
    num_steps: int | None = None  # None: the sampler's own

    def command(self, ckpt: str, class_names: list[str]) -> str:
        """Return the command line that draws the same pictures."""
        name = str(self.label)
        if (
            self.label < len(class_names)
            and class_names.index(class_names[self.label]) == self.label
        ):
            name = class_names[self.label]
        low, high = self.cfg_interval
        words = ["python", "sample.py", "--ckpt", ckpt, "--labels", name]
        words += ["--num-per-class", str(self.num_pictures), "--seed", str(self.seed)]
        words += ["--cfg-scale", f"{self.cfg_scale:g}"]
        words += ["--cfg-interval", f"{low:g}", f"{high:g}"] if (low, high) != (0, 1) else []
        words += ["--sampler", self.sampler] if self.sampler else []
        words += ["--num-sampling-steps", str(self.num_steps)] if self.num_steps else []
        return shlex.join(words)


class Drawing:
    """Pictures on their way from noise, and how they were routed.

    Attributes:
        run: that drew them.
        times: t of each of the S steps, 1 = noise, 0 = picture.
        latents: at most S + 1 of (N, C, H, W) on the CPU: what the network saw at each step, then
            the result.
        trace: of the routers.
        of_photo: whether the steps are noise levels of a photo.
    """

    def __init__(
        self, run: DrawingRun, tracer: RoutingTracer, times: list[float], of_photo: bool = False
    ) -> None:
        self.run, self.times, self.trace, self.of_photo = run, times, tracer.trace, of_photo
        self.latents: list[Tensor] = []
        self._decoded: dict[int, np.ndarray] = {}

    def pictures_at(self, step: int) -> np.ndarray:
        """Return the pictures of a step: after it, or of a photo, as the network saw them then."""
        return self.pictures(step if self.of_photo else step + 1)

    @property
    def steps_done(self) -> int:
        """Return how many steps have been made."""
        return len(self.latents) - 1

    @property
    def is_done(self) -> bool:
        """Return whether the result is there."""
        return self.steps_done == len(self.times)

    def pictures(self, index: int) -> np.ndarray:
        """Return `latents[index]` as (N, A, A, 1 or 3) uint8; -1 is the last there is."""
        index = index % len(self.latents)
        if index not in self._decoded:
            images = self.run.vae.decode(self.latents[index].to(self.run.device)).cpu()
            pixels = ((images.nan_to_num(0) + 1) * 127.5).round().to(torch.uint8)
            self._decoded[index] = pixels.permute(0, 2, 3, 1).numpy()
        return self._decoded[index]


# ------------------------------------------------------------------------------ what a run has


def describe_experts(config: DiTConfig) -> str:
    """Say in a few sentences which experts there are and who chooses whom."""
    layers = layers_of(config)
    if not layers:
        return f"A dense model of {config.depth} blocks: it draws, and has no experts to show."
    blocks = "All" if len(layers) == config.depth else f"{len(layers)} of its"
    k, each = config.experts_per_token, "each patch"
    said = f"{blocks} {config.depth} blocks have {config.num_experts} experts. "
    if config.selection == "token_choice":
        said += f"{each.capitalize()} chooses {k:g} of them."
    else:
        among = "the picture" if config.selection == "expert_choice" else "all pictures together"
        said += f"Experts choose their patches of {among}, about {k:g} for {each}: some get none."
    if config.num_shared_experts:
        said += " Shared experts, which see every patch, are not shown."
    if config.unconditional_expert:
        said += f" {UNCONDITIONAL} is one more, for what has no class."
    return said


def label_in(run: DrawingRun, other: DrawingRun, label: int) -> int:
    """Return the number, in a run, of a class of another one: by its name, where both have names.

    Raises:
        UserError: there is no such class.
    """
    if run.class_names and label < len(other.class_names):
        name = other.class_names[label]
        if name not in run.class_names:
            raise UserError(f"class {name}: the other checkpoint has none of that name")
        return run.class_names.index(name)
    return label


# ------------------------------------------------------------------------------ drawing


def check_plan(run: DrawingRun, plan: DrawingPlan, limits: Limits) -> DrawingPlan:
    """Return a plan that can be drawn, its sampler and steps named.

    Raises:
        UserError: naming what is out of range.
    """
    sampler, num_steps = plan.sampler, plan.num_steps
    if sampler not in (None, *run.diffusion.samplers):
        accepted = ", ".join(run.diffusion.samplers)
        raise UserError(
            f"sampler {sampler}: this checkpoint ({run.diffusion.objective}) has {accepted}"
        )
    sampler = sampler or run.diffusion.default_sampler
    num_steps = run.diffusion.default_num_steps[sampler] if num_steps is None else num_steps
    _check("class", plan.label, 0, run.config.num_classes - 1)
    _check("number of pictures", plan.num_pictures, 1, limits.pictures)
    _check("steps", num_steps, 1, limits.steps)
    _check("seed", plan.seed, 0, 2**63 - 1)
    low, high = plan.cfg_interval
    _check("guidance scale", plan.cfg_scale, 0, 100, kind=float)
    for name, value in (("start", low), ("end", high)):
        _check(f"{name} of the guidance interval", value, 0, 1, kind=float)
    if low > high:
        raise UserError(f"guidance interval: its start {low:g} is above its end {high:g}")
    needed = trace_bytes(run.config, num_steps, plan.num_pictures)
    if needed > limits.trace_bytes:
        raise UserError(
            f"{plan.num_pictures} pictures in {num_steps} steps: their routing takes "
            f"{needed / 2**20:,.0f} MiB, at most {limits.trace_bytes / 2**20:,.0f} are kept; "
            "ask for fewer pictures or steps"
        )
    return plan._replace(sampler=sampler, num_steps=num_steps)


def _check(name: str, value: Any, low: float, high: float, kind: type = int) -> None:
    """Refuse what is no number, no whole one where it should be, or out of range."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high or (kind is int and value != int(value)):
        expected = "a whole number" if kind is int else "a number"
        shown = "nothing" if value is None else value
        raise UserError(f"{name}: expected {expected} from {low} to {high}, got {shown}")


def draw(run: DrawingRun, plan: DrawingPlan) -> Iterator[Drawing]:
    """Draw a plan that `check_plan` returned; yields the same drawing before and after each step.

    The pictures are those of `sample.py` with the same class, number and seed.

    Raises:
        UserError: a picture is not finite.
    """
    config, diffusion = run.config, run.diffusion
    assert plan.sampler is not None and plan.num_steps is not None
    generator = torch.Generator().manual_seed(int(plan.seed))
    shape = (plan.num_pictures, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator)
    with blamed_on("steps"):
        times = [
            t / diffusion.time_scale for t, _ in diffusion.steps(plan.sampler, plan.num_steps, None)
        ]
    tracer = RoutingTracer(run.model, len(times), plan.num_pictures)
    drawing = Drawing(run, tracer, times)
    drawing.latents.append(noise)
    yield drawing
    trajectory = diffusion.trajectory(
        tracer,
        noise.to(run.device),
        torch.full((plan.num_pictures,), plan.label, device=run.device),
        sampler=plan.sampler,
        num_steps=plan.num_steps,
        cfg_scale=plan.cfg_scale,
        null_label=config.null_label,
        cfg_interval=plan.cfg_interval,
        generator=generator,
        callback=tracer.at_step,
    )
    for latents in trajectory:
        if not latents.isfinite().all():
            raise UserError(
                f"the model drew NaN in {process.long_name(run.model.dtype)}: start the page with "
                f"--dtype fp32, or take a guidance scale below {plan.cfg_scale:g}"
            )
        drawing.latents.append(latents.cpu())
        yield drawing


# ------------------------------------------------------------------------------ a photo


def model_time(diffusion: Diffusion, t: float) -> float:
    """Return what the model is told at t in [0, 1], a whole timestep for DDPM."""
    time = diffusion.time_scale * t
    whole = isinstance(diffusion, GaussianDiffusion)
    return min(round(time), diffusion.time_scale - 1) if whole else time


def route_picture(
    run: DrawingRun,
    path: str,
    *,
    t: float,
    label: int | None,
    seed: int = 0,
    num_levels: int = 11,
    limits: Limits | None = None,
) -> tuple[Drawing, int]:
    """Route an image file, cut to its central square and noised.

    Args:
        run: the checkpoint.
        path: of the file.
        t: how noisy, 0 = not at all, 1 = noise alone.
        label: its class; None: without one.
        seed: of the noise, the same at every level.
        num_levels: levels from 1 to 0 that are routed beside t.
        limits: of the file; None: the defaults.

    Returns:
        A drawing of one picture whose steps are the levels, falling, and the step of t.

    Raises:
        FileError: it is no image, or cannot be read.
        UserError: t, label or seed is out of range, or the image too large.
    """
    limits, config, diffusion = limits or Limits(), run.config, run.diffusion
    _check("noise t", t, 0, 1, kind=float)
    _check("seed", seed, 0, 2**63 - 1)
    if label is not None:
        _check("class", label, 0, config.num_classes - 1)
    width, height = size_of(path)
    if width * height > limits.upload_pixels:
        most = f"{limits.upload_pixels / 1e6:.0f} million pixels"
        raise UserError(f"this image has {width} x {height} pixels; at most {most} are taken")
    images = open_pictures([path], run.image_size, run.image_channels)
    levels = {round(float(level), 6) for level in np.linspace(1, 0, num_levels)} | {float(t)}
    times = sorted(levels, reverse=True)
    generator = torch.Generator().manual_seed(int(seed))
    shape = (1, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator).to(run.device)
    encoder_generator = torch.Generator(run.device).manual_seed(int(seed))
    pixels = images.__getitems__([(0, False)])[0].to(run.device)
    latents = run.vae.encode(pixels, encoder_generator)
    tracer = RoutingTracer(run.model, len(times), 1)
    drawing = Drawing(run, tracer, times, of_photo=True)
    y = torch.tensor([config.null_label if label is None else label], device=run.device)
    with torch.no_grad():
        for step, level in enumerate(times):
            tracer.at_step(step)
            time = torch.tensor([float(model_time(diffusion, level))], device=run.device)
            x_t = diffusion.add_noise(latents, noise, time)
            drawing.latents.append(x_t.cpu())
            tracer(x_t, time, y)
    drawing.latents.append(latents.cpu())
    return drawing, times.index(float(t))
