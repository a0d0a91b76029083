"""What both objectives share: the training loss, classifier-free guidance and the sampling loop.

An objective supplies four things (`draw_t`, `add_noise`, `loss_terms`, `steps`); the rest is here.
`sample` returns what is drawn, `trajectory` every step towards it.
t is 0 for data and 1 for noise. A model gets `time_scale * t`: t itself for rectified flow (1000 t
in later families), the timestep 0..999 for DDPM. Arithmetic is float32 whatever the model's dtype.

Shapes: N batch, C latent channels, H W latent size, C_out = C, or 2C with a learned variance.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor
from tqdm import tqdm

Generators = Generator | Sequence[Generator] | None  # one for all, one a sample, the global one
Model = Callable[..., Any]  # (x, t, y) -> prediction; in training (prediction, aux_losses)
Predict = Callable[[Tensor, float], Tensor]  # x (N, C, H, W), model time -> (N, C_out, H, W) fp32
Update = Callable[[Predict, Tensor], Tensor]  # one sampling step: predict, x -> the next x
Steps = Sequence[tuple[float, Update]]  # model time and update of each, from noise to data


def randn(shape: torch.Size, device: torch.device, generator: Generators) -> Tensor:
    """Draw float32 normal noise where the generator lives: a CPU seed gives the same anywhere.

    Given one generator a sample, each draws its own.
    """
    if isinstance(generator, Sequence):
        return torch.stack([randn(shape[1:], device, one) for one in generator])
    source = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=source).to(device)


def mean_flat(x: Tensor) -> Tensor:
    """Average everything but the batch: (N, ...) -> (N,)."""
    return x.flatten(1).mean(dim=1)


@dataclass(frozen=True)
class GuidedModel:
    """A model with classifier-free guidance, as a float32 function of latents and model time.

    Source: Ho & Salimans, arXiv:2207.12598, eq. 6 with cfg_scale = 1 + w; the interval is from
    Kynkäänniemi et al., arXiv:2404.07724, a guide from Karras et al., arXiv:2406.02507, and the
    rescaling from Lin et al., arXiv:2305.08891, eq. 15 and 16.
    """

    model: Model
    y: Tensor  # (N,) int64
    cfg_scale: float  # 1.0 = off
    null_label: int | None
    cfg_channels: int  # the first ones are guided; the others stay the conditional prediction
    cfg_interval: tuple[float, float]  # of t in [0, 1]; the conditional prediction outside it
    time_scale: float
    guide: Model | None = None  # a worse model; its prediction stands for the unconditional one
    cfg_rescale: float = 0.0  # share of the guided prediction that gets the conditional's deviation

    def __post_init__(self) -> None:
        """Reject settings outside their range."""
        low, high = self.cfg_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"cfg_interval must be 0 <= low <= high <= 1, got {low}, {high}")
        if self.cfg_channels < 1:
            raise ValueError(f"cfg_channels must be at least 1, got {self.cfg_channels}")
        if not 0.0 <= self.cfg_rescale <= 1.0:
            raise ValueError(f"cfg_rescale must be in [0, 1], got {self.cfg_rescale}")
        if self.cfg_scale != 1.0 and self.null_label is None and self.guide is None:
            raise ValueError(f"cfg_scale {self.cfg_scale} needs null_label; without it only 1.0")

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """Predict from latents x (N, C, H, W), all at model time t; returns (N, C_out, H, W)."""
        low, high = self.cfg_interval
        if self.cfg_scale == 1.0 or not low <= t / self.time_scale <= high:
            return self.model(x, x.new_full((len(x),), t), self.y).float()
        cond, worse = self._predict_both(x, t)
        ours, rest = cond[:, : self.cfg_channels], cond[:, self.cfg_channels :]
        worse = worse[:, : self.cfg_channels]
        guided = worse + self.cfg_scale * (ours - worse)
        if self.cfg_rescale:
            dims = tuple(range(1, x.dim()))
            deviations = [part.std(dim=dims, keepdim=True) for part in (ours, guided)]
            rescaled = guided * (deviations[0] / deviations[1].clamp(min=1e-12))
            guided = guided + self.cfg_rescale * (rescaled - guided)
        return torch.cat([guided, rest], dim=1)

    def _predict_both(self, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """Return the conditional prediction and the one to move away from, fp32 both."""
        if self.guide is not None:
            times = x.new_full((len(x),), t)
            return self.model(x, times, self.y).float(), self.guide(x, times, self.y).float()
        assert self.null_label is not None
        labels = torch.cat([self.y, torch.full_like(self.y, self.null_label)])
        both = self.model(torch.cat([x, x]), x.new_full((2 * len(x),), t), labels).float()
        cond, uncond = both.chunk(2)
        return cond, uncond


class TrainingLoss(NamedTuple):
    """Loss of a batch; the objective is `per_sample.mean()` plus the weighted `aux_losses`."""

    per_sample: Tensor  # (N,) fp32, the sum of `terms`
    aux_losses: dict[str, Tensor]  # name -> (), as the model returned them: unweighted
    terms: dict[str, Tensor]  # name -> (N,) fp32, detached, for logging


class Diffusion(ABC):
    """A training objective and the samplers that invert it."""

    objective: ClassVar[str]
    default_num_steps: ClassVar[dict[str, int]]  # sampler -> steps; the first one is the default
    default_cfg_channels: ClassVar[int | None]  # how many channels guidance acts on; None = all C
    time_scale: float  # the model's time is `time_scale * t`
    x0_range: tuple[float, float] | None = None  # bounds of what is drawn, where a sampler needs it

    @property
    def samplers(self) -> tuple[str, ...]:
        """Names that `sample` accepts."""
        return tuple(self.default_num_steps)

    @property
    def default_sampler(self) -> str:
        """The sampler that `sample` uses unless told otherwise."""
        return self.samplers[0]

    @abstractmethod
    def draw_t(self, latents: Tensor, generator: Generator | None) -> Tensor:
        """Draw a training time for each sample, (N,) fp32, in the model's units."""

    @abstractmethod
    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mix latents and noise, both (N, C, H, W), to x_t at the model times t (N,)."""

    @abstractmethod
    def loss_terms(
        self, prediction: Tensor, x_t: Tensor, latents: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return the terms of the loss, each (N,) and with gradient; their sum is the loss."""

    @abstractmethod
    def steps(self, sampler: str, num_steps: int, generator: Generators) -> Steps:
        """Return the model time and the update of each sampling step, from noise to data."""

    def training_loss(
        self,
        model: Model,
        latents: Tensor,
        y: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator | None = None,
        **model_kwargs: Any,
    ) -> TrainingLoss:
        """Noise the latents, run the model once and compare.

        Args:
            model: called as `model(x_t, t, y, **model_kwargs)`, returns (prediction,
                aux_losses).
            latents: (N, C, H, W) clean latents.
            y: (N,) int64 labels.
            t: (N,) model times: [0, 1] for "rf", 0..999 for "ddpm". Drawn if missing.
            noise: (N, C, H, W) standard normal. Drawn if missing, after t.
            generator: source of both draws; without it the global one of the latents' device.

        Returns:
            The loss of each sample, the model's `aux_losses` and the named terms.
        """
        latents = latents.float()
        t = self.draw_t(latents, generator) if t is None else t.float()
        noise = randn(latents.shape, latents.device, generator) if noise is None else noise.float()
        x_t = self.add_noise(latents, noise, t)
        prediction, aux_losses = model(x_t, t, y, **model_kwargs)
        terms = self.loss_terms(prediction.float(), x_t, latents, noise, t)
        per_sample = torch.stack(list(terms.values())).sum(dim=0)
        detached = {name: term.detach() for name, term in terms.items()}
        return TrainingLoss(per_sample, aux_losses, detached)

    @torch.no_grad()
    def sample(
        self,
        model: Model,
        noise: Tensor,
        y: Tensor,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        cfg_scale: float = 1.0,
        null_label: int | None = None,
        cfg_channels: int | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cfg_rescale: float = 0.0,
        guide: Model | None = None,
        generator: Generators = None,
        progress: bool = False,
        callback: Callable[[int, float], None] | None = None,
    ) -> Tensor:
        """Turn noise into latents of the given classes.

        Args:
            model: in eval mode; called as `model(x, t, y)`, returns the prediction.
            noise: (N, C, H, W) standard normal.
            y: (N,) int64 labels.
            sampler: one of `samplers`; None for `default_sampler`.
            num_steps: at least 1; None for `default_num_steps[sampler]`.
            cfg_scale: guidance scale; 1.0 = off.
            null_label: the label that stands for "no class"; needed with guidance by it only.
            cfg_channels: how many first channels are guided; None: 3 for "ddpm" (as DiT), else C.
            cfg_interval: guidance acts while t lies in this closed interval within [0, 1].
            cfg_rescale: how far, 0 to 1, guided predictions get the conditional ones' deviation.
            guide: worse model whose predictions guidance leaves, not the unconditional ones.
            generator: of the noise that "ddpm" and "sde" add at each step, or one a sample.
            progress: show a progress bar.
            callback: called as `callback(step, t)`, t in [0, 1], before a step's model calls, which
                see N rows, or 2N when guided without a guide: first those with their class.

        Returns:
            (N, C, H, W) float32 latents.

        Raises:
            ValueError: for an argument outside its range.
        """
        sampler, num_steps = self.chosen(sampler, num_steps)
        trajectory = self.trajectory(
            model, noise, y, sampler=sampler, num_steps=num_steps, cfg_scale=cfg_scale,
            null_label=null_label, cfg_channels=cfg_channels, cfg_interval=cfg_interval,
            cfg_rescale=cfg_rescale, guide=guide, generator=generator, callback=callback,
        )  # fmt: skip
        bar = tqdm(trajectory, desc=sampler, total=num_steps, disable=not progress)
        return deque(bar, maxlen=1).pop()

    def trajectory(
        self,
        model: Model,
        noise: Tensor,
        y: Tensor,
        *,
        sampler: str | None = None,
        num_steps: int | None = None,
        cfg_scale: float = 1.0,
        null_label: int | None = None,
        cfg_channels: int | None = None,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cfg_rescale: float = 0.0,
        guide: Model | None = None,
        generator: Generators = None,
        callback: Callable[[int, float], None] | None = None,
    ) -> Iterator[Tensor]:
        """Yield the latents (N, C, H, W) after each step of `sample`, whose arguments these are.

        Raises:
            ValueError: for an argument outside its range, at once.
        """
        sampler, num_steps = self.chosen(sampler, num_steps)
        channels = self.default_cfg_channels if cfg_channels is None else cfg_channels
        channels = noise.shape[1] if channels is None else min(channels, noise.shape[1])
        predict = GuidedModel(
            model,
            y,
            cfg_scale,
            null_label,
            channels,
            cfg_interval,
            self.time_scale,
            guide,
            cfg_rescale,
        )
        steps = self.steps(sampler, num_steps, generator)
        return follow(steps, predict, noise.float(), callback, self.time_scale)

    def chosen(self, sampler: str | None, num_steps: int | None) -> tuple[str, int]:
        """Return the sampler and its number of steps, the defaults for None.

        Raises:
            ValueError: there is no such sampler, or the number is below 1.
        """
        sampler = self.default_sampler if sampler is None else sampler
        if sampler not in self.samplers:
            raise ValueError(f"sampler must be one of {', '.join(self.samplers)}; got {sampler!r}")
        num_steps = self.default_num_steps[sampler] if num_steps is None else num_steps
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        return sampler, num_steps


@torch.no_grad()
def follow(
    steps: Steps,
    predict: Predict,
    x: Tensor,
    callback: Callable[[int, float], None] | None,
    time_scale: float,
) -> Iterator[Tensor]:
    """Yield x (N, C, H, W) after each step; gradients are off during a step, not between two."""
    for step, (t, update) in enumerate(steps):
        if callback is not None:
            callback(step, t / time_scale)
        x = update(predict, x)
        yield x
