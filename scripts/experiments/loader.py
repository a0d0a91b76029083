"""How fast training data comes from images and from their latent cache, in samples a second.

python scripts/experiments/loader.py --data-path IMAGES LATENTS --vae-path V
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from common import process
from data import VAE, ImageDataset, Pixels, cache_index, load_dataset, load_vae, make_loader
from data.latent_cache import CachedLatents


def rates(
    dataset: ImageDataset, vae: VAE | Pixels | None, args: argparse.Namespace
) -> Iterator[float]:
    """Yield the samples per second of each round of batches; with a VAE, latents ready to use."""
    loader = iter(
        make_loader(
            dataset,
            micro_batch_size=args.batch_size,
            accum_steps=1,
            rank=0,
            world_size=1,
            seed=0,
            num_workers=args.num_workers,
        )
    )
    device = process.pick_device()
    for step in range(args.rounds + 1):
        began = time.monotonic()
        for batch, _ in itertools.islice(loader, args.num_batches):
            if vae is not None:
                dataset.latents(batch.to(device), vae)
        if step:  # the first round warms up
            yield args.num_batches * args.batch_size / (time.monotonic() - began)


def main(args: argparse.Namespace) -> None:
    """Measure every path, with and without the VAE's part, in turn."""
    process.setup()
    print(f"{args.num_workers} workers, {torch.get_num_threads()} threads, batch {args.batch_size}")
    vae = load_vae(args.vae_path, device=process.pick_device())
    for path in args.data_path:
        cached = cache_index(path) is not None
        dataset = (
            CachedLatents(Path(path)) if cached else load_dataset(path, image_size=args.image_size)
        )
        for stage, used in (("read", None), ("read and make latents", vae)):
            found = list(rates(dataset, used, args))
            spread = f"{min(found):.0f} - {max(found):.0f}"
            print(f"{path:30} {stage:22} {statistics.median(found):9.1f} a second [{spread}]")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-path", nargs="+", required=True, help="image folders and caches")
    parser.add_argument("--vae-path", required=True, help="folder or hub id")
    parser.add_argument("--image-size", type=int, default=256, help="pixels, of image folders")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--num-batches", type=int, default=4, help="a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-workers", type=int, default=2)
    main(parser.parse_args())
