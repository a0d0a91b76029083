"""Pixels to latents: data sets, the stateless training stream, autoencoders, latent caches.

In the order data flows: `image_files` (which files are images), `datasets` and `collections`,
`class_images` (real images for a checkpoint), `stream` (which samples come when), `vae_files` and
`autoencoders`, `latent_cache` (encoded images, and `open_data`, all that a run learns from in one
call), `latent_features` beside it and `latent_index` (what a cache is of). Knows `common` only.
"""

from data.autoencoders import VAE, LatentNorm, Pixels, draw_latents, load_vae, vae_identity
from data.collections import HubImages, TarImages
from data.datasets import FolderImages, ImageDataset, Key, TensorImages, load_dataset
from data.latent_cache import CachedLatents, Data, open_data
from data.latent_index import cache_index
from data.stream import TrainBatches, TrainLoader, make_loader

__all__ = [
    "VAE",
    "CachedLatents",
    "Data",
    "FolderImages",
    "HubImages",
    "ImageDataset",
    "Key",
    "LatentNorm",
    "Pixels",
    "TarImages",
    "TensorImages",
    "TrainBatches",
    "TrainLoader",
    "cache_index",
    "draw_latents",
    "load_dataset",
    "load_vae",
    "make_loader",
    "open_data",
    "vae_identity",
]
