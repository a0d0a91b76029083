"""Rectified flow: learn the velocity of a straight line from data to noise, follow it back.

Shapes: N batch, C latent channels, H W latent size. t: 0 = data, 1 = noise; the model gets
`time_scale` times that.

Source: Liu et al., arXiv:2209.03003; t as in Esser et al., arXiv:2403.03206, sec. 3.1.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

from torch import Generator, Tensor

from diffusion.base import Diffusion, Generators, Predict, Steps, mean_flat, randn
from diffusion.times import TimeLaw, shifted


class RectifiedFlow(Diffusion):
    """x_t = (1 - t) latents + t noise; the model's first C channels predict its velocity dx/dt."""

    objective = "rf"
    default_num_steps: ClassVar = {"euler": 50, "heun": 25, "sde": 250}
    default_cfg_channels = None

    def __init__(
        self,
        *,
        time_scale: float = 1.0,
        time_shift: float = 1.0,
        time_sampling: Sequence[Any] = ("lognormal",),
    ) -> None:
        """Choose the model's unit of time, and which times count how much.

        Args:
            time_scale: 1 for DiT-MoE, 1000 for ProMoE, EC-DiT and DiffMoE.
            time_shift: of the times of training and of sampling, see `shifted`; 1 leaves them.
            time_sampling: law of the training times and its numbers, see `TimeLaw.parse`. The
                default, t = sigmoid(normal), has most weight where prediction is hardest.

        Raises:
            ValueError: if one of them is out of range.
        """
        if not time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {time_scale}")
        if not time_shift > 0:
            raise ValueError(f"time_shift must be positive, got {time_shift}")
        self.time_scale, self.time_shift = time_scale, time_shift
        self.law = TimeLaw.parse(time_sampling)

    def draw_t(self, latents: Tensor, generator: Generator | None) -> Tensor:
        """Draw (N,) times of the law, shifted and scaled."""
        t = self.law.draw(len(latents), latents.device, generator)
        return self.time_scale * shifted(t, self.time_shift)

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t = (1 - t) latents + t noise, (N, C, H, W), of scaled times (N,)."""
        t = t.view(-1, 1, 1, 1) / self.time_scale
        return (1 - t) * latents + t * noise

    def loss_terms(
        self, prediction: Tensor, x_t: Tensor, latents: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Return the squared error of the velocity noise - latents."""
        velocity = prediction[:, : latents.shape[1]]
        return {"mse": mean_flat((velocity - (noise - latents)).square())}

    def steps(self, sampler: str, num_steps: int, generator: Generators) -> Steps:
        """Return the updates from t = 1 to t = 0 in even, then shifted steps; "sde" draws noise."""
        step: Any = {
            "euler": euler_step,
            "heun": heun_step,
            "sde": partial(sde_step, generator=generator),
        }[sampler]
        scale = self.time_scale

        def at_scale(predict: Predict, x: Tensor, t: float, t_next: float) -> Tensor:
            return step(lambda x, t: predict(x, scale * t), x, t, t_next)

        even = [(num_steps - done) / num_steps for done in range(num_steps + 1)]
        times = [shifted(t, self.time_shift) for t in even]
        return [(scale * t, partial(at_scale, t=t, t_next=t_next)) for t, t_next in pairwise(times)]


def euler_step(predict: Predict, x: Tensor, t: float, t_next: float) -> Tensor:
    """Follow the velocity at t; exact where it is constant."""
    return x + (t_next - t) * predict(x, t)[:, : x.shape[1]]


def heun_step(predict: Predict, x: Tensor, t: float, t_next: float) -> Tensor:
    """Follow the mean of the velocities at both ends: two model calls, second order.

    Source: Karras et al., arXiv:2206.00364, alg. 1, with time as the noise level.
    """
    velocity = predict(x, t)[:, : x.shape[1]]
    x_next = x + (t_next - t) * velocity
    velocity_next = predict(x_next, t_next)[:, : x.shape[1]]
    return x + (t_next - t) * (velocity + velocity_next) / 2


def sde_step(predict: Predict, x: Tensor, t: float, t_next: float, generator: Generators) -> Tensor:
    """Follow velocity v and score s with new noise, whose variance grows by w = t a unit of time.

    dx = (v - w s / 2) dt + sqrt(w) dW back in time has the marginals of dx = v dt for any w. On a
    straight line the noise in x is n = x + (1 - t) v, so s = -n / t, and w = t has no pole. The
    last step takes the mean of the data that x and v imply, x - t v.

    Source: Ma et al. (SiT), arXiv:2401.08740, eq. 6 and 9, with w_t = sigma_t.
    """
    velocity = predict(x, t)[:, : x.shape[1]]
    if t_next == 0:
        return x - t * velocity
    noise = x + (1 - t) * velocity
    mean = x + (t_next - t) * (velocity + noise / 2)
    return mean + (t * (t - t_next)) ** 0.5 * randn(x.shape, x.device, generator)
