"""Images to latents and back: frozen autoencoders, opened from a folder or the hub.

`Pixels` (no autoencoder) and `VAE`, then `load_vae` and how it finds the files. The scale of the
latents is applied here and nowhere else.

Shape letters: N batch, C channels, S image size, H W latent size.
"""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.errors import UserError
from common.network import why_unreachable
from common.quiet import silence_torchao

DECODE_CHUNK_PIXELS = 16 * 32 * 32  # latent pixels decoded at once: 16 images of 256 px


class Pixels:
    """No VAE: the model works on the images themselves."""

    channels: int | None = None  # those of the images
    downsample = 1
    x0_range: tuple[float, float] | None = (-1.0, 1.0)  # bounds of what the model draws

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the images, (N, C, S, S) in [-1, 1]."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """Return (N, C, S, S) fp32 images, clamped to [-1, 1]."""
        return latents.float().clamp(-1, 1)


class VAE:
    """A frozen diffusers AutoencoderKL; the only place that knows the latent scale."""

    x0_range: tuple[float, float] | None = None  # latents have no bounds

    def __init__(self, model: Any, dtype: torch.dtype):
        """Wrap an AutoencoderKL.

        Args:
            model: the autoencoder, in float32 on its device.
            dtype: precision of `encode`; `decode` is always float32.
        """
        self.model, self.dtype = model.eval().requires_grad_(False), dtype
        self.scale: float = model.config.scaling_factor
        self.shift: float = model.config.shift_factor or 0.0
        self.image_channels: int = model.config.in_channels
        self.channels: int = model.config.latent_channels
        self.downsample: int = 2 ** (len(model.config.block_out_channels) - 1)

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of the latents, scaled, each (N, C, H, W) fp32.

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
        with torch.autocast(images.device.type, self.dtype, enabled=low_precision):
            posterior = self.model.encode(images.float()).latent_dist
        mean, std = posterior.mean.float(), posterior.std.float()
        return (mean - self.shift) * self.scale, std * self.scale

    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw scaled latents (N, C, H, W) fp32 from the posterior of images (N, 3, S, S).

        Args:
            images: in [-1, 1].
            generator: on the images' device; default: its global one.
        """
        return draw_latents(*self.moments(images), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Return images (N, 3, S, S) fp32 in [-1, 1] of scaled latents (N, C, H, W)."""
        codes = latents.float() / self.scale + self.shift
        chunk = max(1, DECODE_CHUNK_PIXELS // codes[0, 0].numel())
        with torch.autocast(codes.device.type, enabled=False):
            images = [self.model.decode(part).sample for part in codes.split(chunk)]
        return torch.cat(images).clamp(-1, 1)


def draw_latents(mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw latents (N, C, H, W) fp32 from their mean and deviation, with fresh noise."""
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


def vae_identity(vae: VAE | Pixels) -> str:
    """Return a hash of a VAE's weights and latent scale, the same wherever it is stored.

    "none" where the model works on pixels.
    """
    if isinstance(vae, Pixels):
        return "none"
    digest = hashlib.sha256(repr((vae.scale, vae.shift)).encode())
    for name, tensor in sorted(vae.model.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def load_vae(
    vae_path: str | Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    model_channels: int | None = None,
) -> VAE | Pixels:
    """Load a frozen VAE, or `Pixels` for "none".

    Args:
        vae_path: local folder or hub id of a diffusers AutoencoderKL, or of a pipeline that has
            one in its folder "vae"; or "none".
        device: where it runs.
        dtype: precision of `encode`; `decode` is always float32.
        model_channels: latent channels of the checkpoint it is for, where there is one.

    Raises:
        UserError: nothing there, it does not load completely, is of a class or has a scale that
            is not supported, or it makes other latents.
    """
    if str(vae_path) == "none":
        return Pixels()
    files = _find_vae(str(vae_path))
    _check_config(files.config, vae_path)
    silence_torchao()
    from diffusers import AutoencoderKL

    options: dict[str, Any] = {"low_cpu_mem_usage": False, "output_loading_info": True}
    try:
        model, info = AutoencoderKL.from_pretrained(
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
    vae = VAE(model.float().to(device), dtype)
    if model_channels not in (None, vae.channels):
        raise UserError(
            f"--vae-path {vae_path} makes {vae.channels} latent channels, the checkpoint has "
            f"{model_channels}"
        )
    return vae


def _check_config(config: Any, vae_path: str | Path) -> None:
    """Refuse what would load with another meaning, or not at all, naming it."""
    if not isinstance(config, dict):
        raise UserError(f"--vae-path {vae_path} does not load: its config.json is no object")
    name = config.get("_class_name")
    if name != "AutoencoderKL":
        raise UserError(
            f"--vae-path {vae_path} is of class {name}; only AutoencoderKL is supported"
        )
    for entry in ("latents_mean", "latents_std"):
        if config.get(entry) is not None:
            raise UserError(
                f"--vae-path {vae_path} has {entry}, a scale for each channel, which is not "
                "supported; one scaling_factor and shift_factor are"
            )
    for entry in ("scaling_factor", "shift_factor"):
        value = config.get(entry)
        number = isinstance(value, int | float) and math.isfinite(value)
        if (value is not None and not number) or (value == 0 and entry == "scaling_factor"):
            raise UserError(f"--vae-path {vae_path}: its config.json has {entry} {value!r}")


class _VaeFiles(NamedTuple):
    """Where a VAE is in a folder or hub repository."""

    subfolder: str  # "" or, in a pipeline, "vae"
    config: Any  # what its config.json says
    downloaded: bool  # before: nothing is to be asked of the hub


def _find_vae(vae_path: str) -> _VaeFiles:
    if Path(vae_path).is_dir():
        for subfolder in ("", "vae"):
            if (file := Path(vae_path, subfolder, "config.json")).is_file():
                return _VaeFiles(subfolder, _read_json(file, vae_path), True)
        raise UserError(
            f"--vae-path {vae_path} does not load: no config.json in it, nor in {vae_path}/vae"
        )
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", vae_path) is None:
        raise UserError(
            f"--vae-path {vae_path} is not a folder; it accepts a folder saved by diffusers "
            "(config.json and weights), a hub id such as stabilityai/sd-vae-ft-mse, or none"
        )
    return _find_on_hub(vae_path)


def _read_json(file: str | Path, vae_path: str) -> Any:
    try:
        return json.loads(Path(file).read_text())
    except (ValueError, RecursionError) as error:
        raise UserError(f"--vae-path {vae_path}: {file} is damaged: {error}") from error


def _find_on_hub(vae_path: str) -> _VaeFiles:
    """Find config.json; without a network, what was downloaded before counts.

    Raises:
        UserError: neither downloaded nor to be had now.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    tried = f"--vae-path {vae_path}: no such folder, and as a hub id"
    instead = "give a folder saved by diffusers (config.json and weights), or none"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    why = why or why_unreachable(constants.ENDPOINT)
    files = {subfolder: f"{subfolder}/config.json".lstrip("/") for subfolder in ("", "vae")}
    for subfolder, name in files.items() if why else ():
        if isinstance(file := try_to_load_from_cache(vae_path, name), str):
            return _VaeFiles(subfolder, _read_json(file, vae_path), True)
    if why:
        raise UserError(f"{tried} it can't be downloaded ({why}): {instead}")
    for subfolder, name in files.items():
        try:
            file = hf_hub_download(vae_path, name)
            return _VaeFiles(subfolder, _read_json(file, vae_path), False)
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{tried} it can't be downloaded ({reason}): {instead}") from error
    raise UserError(f"{tried} it has no config.json, nor one in vae: {instead}")
