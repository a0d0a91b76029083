"""Images to latents and back: frozen autoencoders, opened from a folder or the hub.

`Pixels` (no autoencoder); `LatentNorm`, `KINDS` and `VAE`; `load_vae`. The scale of the latents is
applied here and nowhere else.

Shape letters: N batch, C channels, S image size, H W latent size.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.quiet import silence_torchao
from data.vae_files import check_config, find_vae

DECODE_CHUNK_PIXELS = 16 * 32 * 32  # latent pixels of 8 x 8 decoded at once: 16 images of 256 px


class Pixels:
    """No VAE: the model works on the images themselves."""

    channels: int | None = None  # those of the images
    downsample = 1
    x0_range: tuple[float, float] | None = (-1.0, 1.0)  # bounds of what the model draws

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images, (N, C, S, S) in [-1, 1]."""
        return images

    def normalize(self, moments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return them: pixels have no scale."""
        return moments

    def decode(self, latents: Tensor) -> Tensor:
        """Return (N, C, S, S) fp32 images, clamped to [-1, 1]."""
        return latents.float().clamp(-1, 1)


class LatentNorm(NamedTuple):
    """What brings latents to mean 0 and deviation 1 in each channel: (latents - mean) / std."""

    mean: tuple[float, ...]  # (C,)
    std: tuple[float, ...]  # (C,)

    def tensors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return both as (C, 1, 1), of the type and on the device of latents."""
        mean, std = (
            torch.tensor(part, dtype=like.dtype, device=like.device).view(-1, 1, 1) for part in self
        )
        return mean, std


class _Kind(NamedTuple):
    """What differs between diffusers' classes."""

    code: str  # where `encode` returns the code, or its distribution
    levels: str  # config entry that lists the resolutions; each halves the last
    low: float = -1.0  # of the images that it reads and draws, up to 1
    scales_itself: bool = False


KINDS = {
    "AutoencoderKL": _Kind("latent_dist", "block_out_channels"),
    "AutoencoderDC": _Kind("latent", "encoder_block_out_channels"),
    "AutoencoderTiny": _Kind("latents", "num_encoder_blocks"),
    "AutoencoderRAE": _Kind("latent", "", 0.0, True),
}


class VAE:
    """A frozen autoencoder of diffusers; the only place that knows the latents' scale."""

    x0_range: tuple[float, float] | None = None  # latents have no bounds

    def __init__(self, model: Any, dtype: torch.dtype, norm: LatentNorm | None = None):
        """Wrap an autoencoder.

        Args:
            model: of a class in `KINDS`, in float32 on its device.
            dtype: precision of `encode`; `decode` is always float32.
            norm: of the latents that a network was trained with, in units of the scaled ones.
        """
        self.model, self.dtype = model.eval().requires_grad_(False), dtype
        self.norm = norm
        self.kind = KINDS[type(model).__name__]
        config = model.config
        self.deterministic = self.kind.code != "latent_dist"
        self.scale: float = 1.0 if self.kind.scales_itself else config.scaling_factor
        self.shift: float = config.get("shift_factor") or 0.0
        self.image_size: int | None = None  # pixels, of one that takes no other
        if type(model).__name__ == "AutoencoderRAE":
            self.image_channels, self.channels = config.num_channels, config.encoder_hidden_size
            self.downsample = config.patch_size
            self.image_size = model.decoder_image_size
        else:
            self.image_channels, self.channels = config.in_channels, config.latent_channels
            self.downsample = 2 ** (len(config[self.kind.levels]) - 1)
        self.own_norm = _own_norm(config, self.scale) if not self.kind.scales_itself else None

    def check_size(self, image_size: int) -> None:
        """Refuse images that do not become whole latents.

        Raises:
            UserError: naming the size.
        """
        if image_size % self.downsample:
            raise UserError(f"--image-size {image_size} is not a multiple of {self.downsample}")
        if self.image_size not in (None, image_size):
            raise UserError(
                f"--image-size {image_size}: this autoencoder takes {self.image_size} only"
            )

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return mean and standard deviation of the latents, scaled, each (N, C, H, W) fp32.

        A deterministic autoencoder has no deviation: there is one tensor, the latents.

        Args:
            images: (N, 3, S, S) in [-1, 1].

        Raises:
            UserError: the images do not have the VAE's channels.
        """
        if images.shape[1] != self.image_channels:
            raise UserError(
                f"--vae-path: this VAE takes {self.image_channels}-channel images, the data has "
                f"{images.shape[1]}; use --vae-path none"
            )
        low_precision = self.dtype != torch.float32
        inputs = images.float() if self.kind.low else (images.float() + 1) / 2
        with torch.autocast(images.device.type, self.dtype, enabled=low_precision):
            code = getattr(self.model.encode(inputs), self.kind.code)
        parts = (code,) if self.deterministic else (code.mean, code.std)
        mean = (parts[0].float() - self.shift) * self.scale
        scaled = (mean, *(std.float() * self.scale for std in parts[1:]))
        return self.normalize(_apply(self.own_norm, scaled))

    def normalize(self, moments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return scaled moments, each (N, C, H, W), as the network is to see them."""
        return _apply(self.norm, moments)

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents (N, C, H, W) fp32 from the posterior of images (N, 3, S, S).

        Args:
            images: in [-1, 1].
            generator: on the images' device; default: its global one.
        """
        return draw_latents(self.moments(images), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, S, S) fp32 in [-1, 1] of scaled latents (N, C, H, W)."""
        codes = latents.float()
        for norm in (self.norm, self.own_norm):
            if norm is not None:
                mean, std = norm.tensors(codes)
                codes = codes * std + mean
        codes = codes / self.scale + self.shift
        pixels = codes[0, 0].numel() * self.downsample**2
        chunk = max(1, DECODE_CHUNK_PIXELS * 8**2 // pixels)
        with torch.autocast(codes.device.type, enabled=False):
            images = torch.cat([self.model.decode(part).sample for part in codes.split(chunk)])
        return (images if self.kind.low else 2 * images - 1).clamp(-1, 1)


def _own_norm(config: Any, scale: float) -> LatentNorm | None:
    """Return what an AutoencoderKL's `latents_mean` and `latents_std` say, None without them."""
    if config.get("latents_mean") is None:
        return None
    means = tuple(scale * mean for mean in config["latents_mean"])
    return LatentNorm(means, tuple(map(float, config["latents_std"])))


def _apply(norm: LatentNorm | None, moments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if norm is None:
        return moments
    mean, std = norm.tensors(moments[0])
    return ((moments[0] - mean) / std, *(part / std for part in moments[1:]))


def draw_latents(moments: Sequence[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Draw latents (N, C, H, W) fp32 from their mean and deviation, with fresh noise.

    A mean alone is all there is of a deterministic autoencoder: nothing is drawn.
    """
    mean, *deviations = moments
    for std in deviations:
        mean = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)
    return mean


def vae_identity(vae: VAE | Pixels) -> str:
    """Return a hash of a VAE's weights and own latent scale, the same wherever it is stored.

    "none" where the model works on pixels.
    """
    if isinstance(vae, Pixels):
        return "none"
    digest = hashlib.sha256(repr((vae.scale, vae.shift)).encode())
    digest.update(repr(vae.own_norm).encode() if vae.own_norm else b"")
    for name, tensor in sorted(vae.model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_vae(
    vae_path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    model_channels: int | None = None,
    norm: LatentNorm | None = None,
) -> VAE | Pixels:
    """Load a frozen VAE, or `Pixels` for "none".

    Args:
        vae_path: local folder or hub id of an autoencoder of diffusers of a class in `KINDS`, or
            of a pipeline that has one in its folder "vae"; or "none".
        device: where it runs.
        dtype: precision of `encode`; `decode` is always float32.
        model_channels: latent channels of the checkpoint it is for, where there is one.
        norm: of that checkpoint's latents.

    Raises:
        UserError: nothing there, it does not load completely, is of a class or has a scale that
            is not supported, or it makes other latents.
    """
    if str(vae_path) == "none":
        return Pixels()
    files = find_vae(str(vae_path))
    name = check_config(files.config, vae_path, KINDS)
    silence_torchao()
    import diffusers

    options: dict[str, Any] = {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            str(vae_path),
            subfolder=files.subfolder or None,
            local_files_only=files.downloaded,
            **options,
        )
    except Exception as error:  # of many types, by what is wrong in the files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--vae-path {vae_path} does not load: {reason}") from error
    if info["missing_keys"]:  # diffusers would go on with random weights
        raise UserError(f"--vae-path {vae_path} lacks the weights {info['missing_keys'][:3]} ...")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"--vae-path {vae_path}: {name} is not finite")
    vae = VAE(model.float().to(device), dtype, norm)
    if model_channels not in (None, vae.channels):
        raise UserError(
            f"--vae-path {vae_path} makes {vae.channels} latent channels, the checkpoint has "
            f"{model_channels}"
        )
    return vae
