"""The images of sample.py's picture: `draw` makes them, `arrange` puts them in rows."""

import argparse
import math
import os

import torch
from torch import Tensor

from common import process
from common.errors import UserError
from common.flags import sampling_options
from sampling.opening import DrawingRun


def draw(run: DrawingRun, y: Tensor, args: argparse.Namespace, device: torch.device) -> Tensor:
    """Draw an image for each of the labels (N,); returns (N, C, S, S) in [-1, 1] on the CPU.

    Raises:
        UserError: an image is not finite.
    """
    config = run.config
    generator = torch.Generator().manual_seed(args.seed)
    shape = (len(y), config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, generator=generator)
    images = []
    for start in range(0, len(y), args.batch_size):
        part = slice(start, start + args.batch_size)
        latents = run.diffusion.sample(
            run.model,
            noise[part].to(device),
            y[part].to(device),
            **sampling_options(args),
            null_label=config.null_label,
            guide=run.guide,
            generator=generator,
            progress=os.environ.get("RANK", "0") == "0",
        )
        images.append(run.vae.decode(latents).cpu())
        if not images[-1].isfinite().all():
            raise UserError(
                f"the model drew NaN in {process.long_name(run.model.dtype)}: try --dtype "
                f"fp32, or a --cfg-scale below {args.cfg_scale:g}"
            )
    return torch.cat(images)


def arrange(images: Tensor, num_labels: int, width: int) -> Tensor:
    """Bring images whose classes take turns to rows in which each class has `width` columns.

    Args:
        images: (n L, C, S, S), image i of class i % L.
        num_labels: L.
        width: of each class.

    Returns:
        (R L width, C, S, S), with black images in the gaps of the last row.
    """
    rows = math.ceil(len(images) / num_labels / width)
    gaps = rows * width * num_labels - len(images)
    images = torch.cat([images, images.new_full((gaps, *images.shape[1:]), -1.0)])
    by_row = images.unflatten(0, (rows, width, num_labels))
    return by_row.transpose(1, 2).flatten(0, 2)  # (rows, L, width, ...)
