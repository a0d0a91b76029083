"""Pixels to latents: data sets, the stateless training stream, autoencoders, latent caches.

`datasets` are labelled images, `image_files` what of a folder is one, `latent_cache` encoded images
and `latent_index` what they are of. Knows `common` only.
"""

from data.datasets import (
    VAE,
    FolderImages,
    ImageDataset,
    Key,
    Pixels,
    TensorImages,
    TrainBatches,
    TrainLoader,
    draw_latents,
    load_dataset,
    load_vae,
    make_loader,
)
from data.latent_cache import CachedLatents, Data, open_data, vae_identity
from data.latent_index import cache_index

__all__ = [
    "VAE",
    "CachedLatents",
    "Data",
    "FolderImages",
    "ImageDataset",
    "Key",
    "Pixels",
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
