"""DDPM: learn the noise in x_t and the variance of one step back, on a chain of 1000 noise levels.

Or v = signal_scale * eps - noise_scale * x_0 instead of the noise; a chain may end in noise alone.

In order: the chain's coefficients, the objective, the updates of the samplers, Gaussian terms of
the bound. Coefficients are computed in float64.

Shapes: N batch, C latent channels, H W latent size, K levels of a chain.
Timesteps 0..999 are the model's time; a chain of fewer levels keeps the original numbers.

Source: DDPM, arXiv:2006.11239; learned variance and respacing from iDDPM, arXiv:2102.09672.
"""

import math
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from diffusion.base import Diffusion, Generators, Predict, Steps, mean_flat, randn

NUM_TIMESTEPS = 1000
BETA_START, BETA_END = 1e-4, 0.02


class NoiseLevels(NamedTuple):
    """Coefficients of a chain, least noise first: every field is (K,) float64, or as picked."""

    signal_scale: Tensor  # sqrt(alpha_bar_t); x_t = signal_scale * x_0 + noise_scale * eps
    noise_scale: Tensor  # sqrt(1 - alpha_bar_t)
    signal_scale_prev: Tensor  # the same of the level below, 1 and 0 at the lowest
    noise_scale_prev: Tensor
    posterior_x0: Tensor  # mean of q(x_{t-1} | x_t, x_0) = posterior_x0 * x_0 + posterior_xt * x_t
    posterior_xt: Tensor
    posterior_log_variance: Tensor  # log of its variance, the least a step back can have
    log_beta: Tensor  # the most

    @classmethod
    def from_alpha_bar(cls, alpha_bar: Tensor) -> "NoiseLevels":
        """Derive all coefficients from alpha_bar (K,) float64, decreasing in [0, 1).

        Source: DDPM eq. 4 and 7; beta_t = 1 - alpha_bar_t / alpha_bar_{t-1} of any subset of the
        levels, iDDPM eq. 19.
        """
        alpha_bar_prev = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / alpha_bar_prev
        posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # It is 0 at the lowest level: the one above stands in, so that the log is finite.
        posterior_variance[0] = torch.cat([posterior_variance, beta])[1]
        return cls(
            signal_scale=alpha_bar.sqrt(),
            noise_scale=(1 - alpha_bar).sqrt(),
            signal_scale_prev=alpha_bar_prev.sqrt(),
            noise_scale_prev=(1 - alpha_bar_prev).sqrt(),
            posterior_x0=beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_xt=(1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar),
            posterior_log_variance=posterior_variance.log(),
            log_beta=beta.log(),
        )

    def at(self, index: int) -> "NoiseLevels":
        """Pick one level for all samples: every field is ()."""
        return NoiseLevels(*(field[index] for field in self))


class StepBack(NamedTuple):
    """The model's p(x_{t-1} | x_t), each (N, C, H, W) fp32."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor  # the clean latents that the prediction implies


class GaussianDiffusion(Diffusion):
    """The model's first C channels predict the noise or v; the second C, if learned, the variance.

    Args:
        prediction: "epsilon", or "v", Salimans & Ho, arXiv:2202.00512, app. D.
        zero_terminal_snr: shift the chain so that x_t at t = 999 is noise alone, Lin et al.,
            arXiv:2305.08891, alg. 1; of this epsilon tells nothing about x_0, so it needs "v".
        min_snr_gamma: weigh the squared error as min(SNR, gamma) on x_0 would, Hang et al.,
            arXiv:2303.09556, eq. 5 and 6; None: as it is.
        learn_sigma: train the second C channels by the variational bound and sample with their
            variance; otherwise the variance of a step is beta.
        x0_range: lowest and highest value of the data, to which samplers clamp the predicted x_0:
            at t = 999 an error of the noise is 157 times as large in x_0. None: no bounds.

    Raises:
        ValueError: one is out of range, or two do not fit together.
    """

    objective = "ddpm"
    default_num_steps: ClassVar = {"ddpm": 250, "ddim": 50, "dpm++": 20}
    default_cfg_channels = 3  # as DiT, for comparability
    time_scale = float(NUM_TIMESTEPS)

    def __init__(
        self,
        *,
        learn_sigma: bool = True,
        x0_range: tuple[float, float] | None = None,
        prediction: str = "epsilon",
        zero_terminal_snr: bool = False,
        min_snr_gamma: float | None = None,
    ) -> None:
        if prediction not in ("epsilon", "v"):
            raise ValueError(f"prediction must be epsilon or v, got {prediction!r}")
        if zero_terminal_snr and prediction != "v":
            raise ValueError(f"zero_terminal_snr needs prediction v, got {prediction}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be positive, got {min_snr_gamma}")
        self.learn_sigma, self.x0_range = learn_sigma, x0_range
        self.predicts_v, self.min_snr_gamma = prediction == "v", min_snr_gamma
        self.zero_terminal_snr = zero_terminal_snr
        beta = torch.linspace(BETA_START, BETA_END, NUM_TIMESTEPS, dtype=torch.float64)
        self.alpha_bar = (1 - beta).cumprod(dim=0)
        if zero_terminal_snr:
            self.alpha_bar = with_zero_end(self.alpha_bar)
        self.levels = NoiseLevels.from_alpha_bar(self.alpha_bar)
        self._tables: dict[torch.device, Tensor] = {}  # the levels (fields, K) fp32 on each device

    def levels_at(self, t: Tensor) -> NoiseLevels:
        """Pick a level for each sample at timesteps t (N,) int64: fields are (N, 1, 1, 1) fp32."""
        if t.device not in self._tables:  # copied once: a copy makes the host wait
            self._tables[t.device] = torch.stack(self.levels).float().to(t.device)
        picked = self._tables[t.device][:, t]  # (fields, N)
        return NoiseLevels(*picked.view(len(picked), -1, 1, 1, 1))

    # -- training

    def draw_t(self, latents: Tensor, generator: Generator | None) -> Tensor:
        """Draw timesteps (N,), evenly from 0..999."""
        device = latents.device if generator is None else generator.device
        t = torch.randint(NUM_TIMESTEPS, latents.shape[:1], generator=generator, device=device)
        return t.to(latents.device).float()

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t of q(x_t | x_0), (N, C, H, W). Source: DDPM eq. 4."""
        level = self.levels_at(t.long())
        return level.signal_scale * latents + level.noise_scale * noise

    def loss_terms(
        self, prediction: Tensor, x_t: Tensor, latents: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return the squared error and, for the variance alone, the bound in bits.

        Source: L_hybrid, iDDPM eq. 16. Its weight 0.001 times the sum of 1000 terms of the bound is
        the one term at t with weight 1.
        """
        predicted, level = prediction[:, : latents.shape[1]], self.levels_at(t.long())
        target = noise
        if self.predicts_v:
            target = level.signal_scale * noise - level.noise_scale * latents
        terms = {"mse": mean_flat((target - predicted).square())}
        if self.min_snr_gamma is not None:
            terms["mse"] = terms["mse"] * self.snr_weight(level).flatten()
        if self.learn_sigma:
            frozen = torch.cat([predicted.detach(), prediction[:, latents.shape[1] :]], dim=1)
            terms["vb"] = self.bound(frozen, x_t, latents, t.long())
        return terms

    def snr_weight(self, level: NoiseLevels) -> Tensor:
        """Return what an error of the prediction weighs if min(SNR, gamma) weighs one of x_0.

        An error of epsilon is SNR times one of x_0, squared, and an error of v SNR + 1 times.
        """
        assert self.min_snr_gamma is not None
        snr = (level.signal_scale / level.noise_scale).square()
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped / (snr + 1) if self.predicts_v else capped / snr

    def bound(self, prediction: Tensor, x_t: Tensor, latents: Tensor, t: Tensor) -> Tensor:
        """Return the term of the variational bound at timesteps t, (N,) in bits per dimension.

        Source: DDPM eq. 5: a KL divergence, or the reconstruction at t = 0.
        """
        level = self.levels_at(t)
        back = self.p_mean_variance(level, prediction, x_t)
        true_mean = level.posterior_x0 * latents + level.posterior_xt * x_t
        kl = gaussian_kl(true_mean, level.posterior_log_variance, back.mean, back.log_variance)
        nll = discretized_gaussian_nll(latents, back.mean, 0.5 * back.log_variance)
        return torch.where(t == 0, mean_flat(nll), mean_flat(kl)) / math.log(2.0)

    def p_mean_variance(
        self,
        level: NoiseLevels,
        prediction: Tensor,
        x_t: Tensor,
        x0_range: tuple[float, float] | None = None,
    ) -> StepBack:
        """Read a prediction (N, C_out, H, W) at x_t (N, C, H, W) as a Gaussian one level below.

        Source: DDPM eq. 7 with the predicted x_0, clamped to `x0_range` if given; variance between
        its two bounds, iDDPM eq. 15.
        """
        channels = x_t.shape[1]
        if self.learn_sigma:
            variance = prediction[:, channels:]
            fraction = (variance + 1) / 2  # the model's -1..1 spans the range
            least, most = level.posterior_log_variance, level.log_beta
            log_variance = fraction * most + (1 - fraction) * least
        else:
            # level.log_beta may be a float64 scalar on the CPU
            log_variance = torch.zeros_like(x_t) + level.log_beta
        x0 = self.predicted_x0(level, prediction, x_t)
        if x0_range is not None:
            x0 = x0.clamp(*x0_range)
        mean = level.posterior_x0 * x0 + level.posterior_xt * x_t
        return StepBack(mean, log_variance, x0)

    # -- sampling

    def respace(self, num_steps: int) -> tuple[list[int], NoiseLevels]:
        """Return `num_steps` evenly spaced timesteps, ascending from 0 to 999, and their chain."""
        # Counting down, so that a single step is the one from pure noise.
        timesteps = np.linspace(NUM_TIMESTEPS - 1, 0, num_steps).round().astype(int)[::-1].tolist()
        return timesteps, NoiseLevels.from_alpha_bar(self.alpha_bar[timesteps])

    def steps(self, sampler: str, num_steps: int, generator: Generators) -> Steps:
        """Return the updates from timestep 999 down; only "ddpm" draws noise."""
        if num_steps > NUM_TIMESTEPS:
            raise ValueError(f"num_steps must be in 1..{NUM_TIMESTEPS}, got {num_steps}")
        if sampler == "dpm++":
            return self.dpm_solver_steps(num_steps)
        update = self.ddim_step
        if sampler == "ddpm":
            update = partial(self.ddpm_step, generator=generator)
        timesteps, levels = self.respace(num_steps)
        steps = [
            (float(t), partial(update, t=t, level=levels.at(i))) for i, t in enumerate(timesteps)
        ]
        return steps[::-1]

    def ddpm_step(
        self, predict: Predict, x: Tensor, t: int, level: NoiseLevels, generator: Generators
    ) -> Tensor:
        """Draw x_{t-1} of p(x_{t-1} | x_t); the last step takes its mean. Source: DDPM alg. 2."""
        back = self.p_mean_variance(level, predict(x, t), x, self.x0_range)
        if level.noise_scale_prev == 0:
            return back.mean
        return back.mean + (0.5 * back.log_variance).exp() * randn(x.shape, x.device, generator)

    def ddim_step(self, predict: Predict, x: Tensor, t: int, level: NoiseLevels) -> Tensor:
        """Move to the level below along the same noise. Source: DDIM, arXiv:2010.02502, eq. 12."""
        x0, eps = self.data_and_noise(level, predict(x, t), x)
        return level.signal_scale_prev * x0 + level.noise_scale_prev * eps

    def dpm_solver_steps(self, num_steps: int) -> Steps:
        """Return the steps of DPM-Solver++(2M), arXiv:2211.01095, alg. 2, from diffusers."""
        from diffusers import DPMSolverMultistepScheduler  # seconds to import, one sampler needs it

        scheduler: Any = DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TIMESTEPS,
            beta_start=BETA_START,
            beta_end=BETA_END,
            beta_schedule="linear",
            rescale_betas_zero_snr=self.zero_terminal_snr,
            # at the end of such a chain the noise tells nothing of x_0
            prediction_type="sample" if self.predicts_v else "epsilon",
        )
        # From 999 down for any number of steps; rounding may give arange one entry too many.
        times = np.arange(NUM_TIMESTEPS, 0, -NUM_TIMESTEPS / num_steps)[:num_steps]
        timesteps: list[int] = (times.round().astype(int) - 1).tolist()
        scheduler.set_timesteps(timesteps=timesteps)

        def update(predict: Predict, x: Tensor, t: int) -> Tensor:
            x0, eps = self.data_and_noise(self.levels.at(t), predict(x, t), x)
            return scheduler.step(x0 if self.predicts_v else eps, t, x, return_dict=False)[0]

        return [(float(t), partial(update, t=t)) for t in timesteps]

    def data_and_noise(
        self, level: NoiseLevels, prediction: Tensor, x_t: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return x_0 and the noise, (N, C, H, W) each, of which x_t is made by a prediction."""
        predicted, x0 = prediction[:, : x_t.shape[1]], self.predicted_x0(level, prediction, x_t)
        if self.x0_range is not None:
            x0 = x0.clamp(*self.x0_range)
            return x0, (x_t - level.signal_scale * x0) / level.noise_scale
        if self.predicts_v:
            return x0, level.signal_scale * predicted + level.noise_scale * x_t
        return x0, predicted

    def predicted_x0(self, level: NoiseLevels, prediction: Tensor, x_t: Tensor) -> Tensor:
        """Return x_0 (N, C, H, W): v and x_t are a rotation of the noise and x_0, or by eps."""
        predicted = prediction[:, : x_t.shape[1]]
        if self.predicts_v:
            return level.signal_scale * x_t - level.noise_scale * predicted
        return (x_t - level.noise_scale * predicted) / level.signal_scale


def with_zero_end(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) (K,) so that it ends at 0 and begins as before."""
    scale = alpha_bar.sqrt()
    return ((scale - scale[-1]) * scale[0] / (scale[0] - scale[-1])).square()


# -- Gaussian terms of the bound, elementwise in nats


def gaussian_kl(mean: Tensor, log_variance: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """Return KL(N(mean, exp log_variance) || N(mean2, exp log_variance2))."""
    difference = log_variance - log_variance2
    distance = (mean - mean2).square() * (-log_variance2).exp()
    return 0.5 * (difference.exp() - difference - 1 + distance)


def discretized_gaussian_nll(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return -log of a Gaussian's mass in the bin of width 2/255 around x.

    The bins at -1 and 1 take all beyond; DiT keeps these pixel bins for latents. The tanh form of
    the normal distribution function is that of the published objective.

    Source: DDPM eq. 13.
    """

    def cdf(edge: Tensor) -> Tensor:
        z = (edge - mean) * (-log_std).exp()
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper = torch.where(x > 0.999, 1.0, cdf(x + 1 / 255))
    lower = torch.where(x < -0.999, 0.0, cdf(x - 1 / 255))
    return -(upper - lower).clamp_min(1e-12).log()
