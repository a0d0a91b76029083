"""Training objectives and samplers: scripts need only `create_diffusion` and `Diffusion`."""

from diffusion.base import Diffusion, TrainingLoss
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.rectified_flow import RectifiedFlow

__all__ = ["Diffusion", "TrainingLoss", "create_diffusion"]


def create_diffusion(
    objective: str, *, learn_sigma: bool = True, x0_range: tuple[float, float] | None = None
) -> Diffusion:
    """Build the objective a model is trained with and sampled from.

    Args:
        objective: "rf" (rectified flow) or "ddpm".
        learn_sigma: whether the model has 2C output channels. DDPM then learns its variance with
            the second half; rectified flow ignores that half either way.
        x0_range: range of the data if it has one, as pixels do and latents do not: DDPM's samplers
            stay within it. Rectified flow needs no bounds.

    Raises:
        ValueError: if `objective` is neither.
    """
    if objective == "rf":
        return RectifiedFlow()
    if objective == "ddpm":
        return GaussianDiffusion(learn_sigma=learn_sigma, x0_range=x0_range)
    raise ValueError(f"objective must be one of rf, ddpm; got {objective!r}")
