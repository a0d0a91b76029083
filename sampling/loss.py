"""The objective's loss on real images, at the same times and noise for every checkpoint."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from common import process
from data import VAE, ImageDataset, Pixels
from diffusion import Diffusion

BATCH_SIZE = 100


def generator(*seeds: int) -> torch.Generator:
    """Return a generator that depends on all of some numbers."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@torch.no_grad()
def loss_on_images(
    model: nn.Module,
    diffusion: Diffusion,
    dataset: ImageDataset,
    vae: VAE | Pixels,
    rt: process.Runtime,
    *,
    num_images: int,
    num_draws: int,
) -> float:
    """Return the mean loss on some images of a data set, the same times and noise every time.

    All ranks share the work and make equally many forward passes, which are collective where
    weights are sharded. The global generators are left alone.

    Args:
        model: in eval mode.
        diffusion: its objective.
        dataset: images or latents; the same ones are chosen every time.
        vae: of the model.
        rt: this process.
        num_images: how many, if there are as many.
        num_draws: times and noises of each.
    """
    total = torch.zeros(2, dtype=torch.float64)
    chosen = torch.randperm(len(dataset), generator=generator(0))[:num_images]
    batches = [(d, part) for d in range(num_draws) for part in chosen.split(BATCH_SIZE)]
    devices = [rt.device] if rt.device.type == "cuda" else []
    for turn in range(math.ceil(len(batches) / rt.world_size)):
        number = turn * rt.world_size + rt.rank
        d, part = batches[number % len(batches)]
        images, labels = dataset.__getitems__([(int(index), False) for index in part])
        draws = generator(1, d, int(part[0]))
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(part[0]))  # of the noise of an autoencoder's latents
            latents = dataset.latents(images.to(rt.device), vae)
        t = diffusion.draw_t(latents, draws)
        noise = torch.randn(latents.shape, generator=draws).to(latents.device)

        def predict(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            return model(*inputs), torch.zeros(())

        out = diffusion.training_loss(predict, latents, labels.to(rt.device), t=t, noise=noise)
        if number < len(batches):  # else it is another rank's, done for company
            total += torch.stack(
                [out.per_sample.sum().cpu().double(), torch.tensor(float(len(part)))]
            )
    total = process.sum_over_ranks(total.to(rt.device)).cpu()
    return (total[0] / total[1]).item()
