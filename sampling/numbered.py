"""Samples by their numbers: the noise of each depends on a seed and its number only."""

from typing import Any

import torch
from torch import Tensor, nn

from data import VAE, Pixels
from diffusion import Diffusion
from models import DiTConfig
from sampling.loss import generator


def draw_numbered(
    model: nn.Module,
    config: DiTConfig,
    diffusion: Diffusion,
    vae: VAE | Pixels,
    y: Tensor,
    *,
    seed: int,
    first: int,
    device: torch.device,
    **options: Any,
) -> Tensor:
    """Draw samples first, first + 1 and so on of a seed.

    Args:
        model: in eval mode.
        config: of the model.
        diffusion: its objective.
        vae: of the model.
        y: (N,) int64 labels of these samples.
        seed: of all samples.
        first: number of the first one.
        device: where the model runs.
        **options: of `Diffusion.sample`.

    Returns:
        (N, C, S, S) uint8 on the CPU.
    """
    generators = [generator(seed, index) for index in range(first, first + len(y))]
    shape = (config.in_channels, config.input_size, config.input_size)
    noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
    latents = diffusion.sample(
        model,
        noise.to(device),
        y.to(device),
        null_label=config.null_label,
        generator=generators,
        **options,
    )
    return ((vae.decode(latents) + 1) * 127.5).round().to(torch.uint8).cpu()
