"""Rectified flow: learn the velocity of a straight line from data to noise, follow it back.

Shapes: N batch, C latent channels, H W latent size. t: 0 = data, 1 = noise; the model gets
`time_scale` times that.

Source: Liu et al., arXiv:2209.03003; t as in Esser et al., arXiv:2403.03206, sec. 3.1.
"""

from functools import partial
from itertools import pairwise
from typing import ClassVar

from torch import Generator, Tensor

from diffusion.base import Diffusion, Generators, Predict, Steps, mean_flat, randn


class RectifiedFlow(Diffusion):
    """x_t = (1 - t) latents + t noise; the model's first C channels predict its velocity dx/dt."""

    objective = "rf"
    default_num_steps: ClassVar = {"euler": 50, "heun": 25}
    default_cfg_channels = None

    def __init__(self, *, time_scale: float = 1.0) -> None:
        """Choose the model's unit of time: 1 for DiT-MoE, 1000 for ProMoE, EC-DiT and DiffMoE.

        Raises:
            ValueError: if it is not positive.
        """
        if not time_scale > 0:
            raise ValueError(f"time_scale must be positive, got {time_scale}")
        self.time_scale = time_scale

    def draw_t(self, latents: Tensor, generator: Generator | None) -> Tensor:
        """Draw t = sigmoid(normal), (N,), scaled: most weight where prediction is hardest."""
        return self.time_scale * randn(latents.shape[:1], latents.device, generator).sigmoid()

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
        """Return the updates from t = 1 to t = 0 in even steps; nothing is drawn."""
        step, scale = {"euler": euler_step, "heun": heun_step}[sampler], self.time_scale

        def at_scale(predict: Predict, x: Tensor, t: float, t_next: float) -> Tensor:
            return step(lambda x, t: predict(x, scale * t), x, t, t_next)

        times = [(num_steps - done) / num_steps for done in range(num_steps + 1)]
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
