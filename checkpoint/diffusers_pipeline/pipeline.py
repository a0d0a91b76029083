"""A DiT-MoE as a diffusers pipeline: class labels to images, as sample.py draws them.

pipe = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
pipe([207, 360], num_inference_steps=50, seed=0).images[0].save("dog.png")
"""

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Tensor

DECODE_CHUNK_PIXELS = 16 * 32 * 32  # latent pixels of 8 x 8 decoded at once, as sample.py does


class DiTMoEPipeline(DiffusionPipeline):
    """Class-conditional images from a DiT-MoE and, unless it works on pixels, a VAE."""

    transformer: Any
    vae: Any
    config: Any
    _optional_components = ["vae"]  # noqa: RUF012, diffusers declares it so

    def __init__(
        self,
        transformer: Any,
        vae: Any = None,
        objective: str = "rf",
        class_names: list[str] | None = None,  # diffusers knows no Sequence
        time_scale: float | None = None,
        decoding: dict[str, Any] | None = None,
        time_shift: float | None = None,
        prediction: str | None = None,
        zero_terminal_snr: bool = False,
    ) -> None:
        """Put the parts together.

        Args:
            transformer: a `DiTMoE`.
            vae: an autoencoder, None for a model of pixels.
            objective: "rf" or "ddpm".
            class_names: names that labels may be given by.
            time_scale, time_shift: of rectified flow; None: 1.
            decoding: how latents become the VAE's codes: norms of channels, scale, shift.
            prediction, zero_terminal_snr: of DDPM; None: epsilon.
        """
        super().__init__()
        if vae is not None:
            # in float32, as sample.py; with gradients torch decodes in other kernels
            vae.float().requires_grad_(False)
        self.register_modules(transformer=transformer, vae=vae)
        self.register_to_config(
            objective=objective,
            class_names=class_names or [],
            time_scale=time_scale,
            decoding=decoding or {},
            time_shift=time_shift,
            prediction=prediction,
            zero_terminal_snr=zero_terminal_snr,
        )
        diffusion = importlib.import_module("dit_moe.diffusion")
        learn_sigma = transformer.dit.config.learn_sigma
        x0_range = (-1.0, 1.0) if vae is None else None  # of pixels; latents have no bounds
        self.diffusion = diffusion.create_diffusion(
            objective,
            learn_sigma=learn_sigma,
            x0_range=x0_range,
            time_scale=time_scale,
            time_shift=time_shift,
            prediction=prediction,
            zero_terminal_snr=zero_terminal_snr,
        )

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int | str],
        *,
        guidance_scale: float = 1.5,
        num_inference_steps: int | None = None,
        sampler: str | None = None,
        seed: int = 0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Draw one image for each label.

        Args:
            class_labels: numbers or names.
            guidance_scale: 1 = off.
            num_inference_steps: default: the sampler's own.
            sampler: euler, heun, sde (rf); ddpm, ddim, dpm++ (ddpm).
            seed: of the noise, as sample.py's, for all images together.
            generator: on the CPU, instead of a seed.
            output_type: "pil", "np" (N, S, S, C) in [0, 1] or "pt" (N, C, S, S) in [-1, 1].

        Raises:
            ValueError: unknown label, or a setting outside its range.
        """
        config, device = self.transformer.dit.config, self._execution_device
        y = torch.tensor([self._label(label, config.num_classes) for label in class_labels])
        generator = generator or torch.Generator().manual_seed(seed)
        shape = (len(y), config.in_channels, config.input_size, config.input_size)
        latents = self.diffusion.sample(
            self.transformer,
            torch.randn(shape, generator=generator).to(device),
            y.to(device),
            sampler=sampler,
            num_steps=num_inference_steps,
            cfg_scale=guidance_scale,
            null_label=config.null_label,
            generator=generator,
            progress=not getattr(self, "_progress_bar_config", {}).get("disable", False),
        )
        images = self._decode(latents)
        if output_type == "pt":
            return ImagePipelineOutput(images)  # type: ignore[arg-type]
        array = ((images + 1) / 2).permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(array if output_type == "np" else to_pil(array))

    def _label(self, label: int | str, num_classes: int) -> int:
        names = self.config.class_names
        number = names.index(label) if label in names else label
        if not isinstance(number, int) or not 0 <= number < num_classes:
            raise ValueError(
                f"class_labels {label!r}: expected a number in [0, {num_classes - 1}]"
                + (f" or one of {', '.join(names[:20])}" if names else "")
            )
        return number

    def _decode(self, latents: Tensor) -> Tensor:
        """Return (N, C, S, S) fp32 images in [-1, 1] on the CPU."""
        if self.vae is None:
            return latents.clamp(-1, 1).cpu()
        how, codes = self.config.decoding, latents
        for norm in how["norms"]:
            mean, std = (
                torch.tensor(norm[name], dtype=codes.dtype, device=codes.device).view(-1, 1, 1)
                for name in ("mean", "std")
            )
            codes = codes * std + mean
        codes = codes / how["scale"] + how["shift"]
        pixels = codes[0, 0].numel() * how["downsample"] ** 2
        parts = codes.split(max(1, DECODE_CHUNK_PIXELS * 8**2 // pixels))
        images = torch.cat(
            [self.vae.decode(part.to(self.vae.dtype)).sample.float() for part in parts]
        )
        return (images if how["low"] else 2 * images - 1).clamp(-1, 1).cpu()


def to_pil(images: np.ndarray) -> list[Image.Image]:
    """Turn (N, S, S, C) in [0, 1] into pictures, gray ones for C = 1."""
    pixels = (images * 255 + 0.5).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
