"""Training objectives and samplers: scripts need only `create_diffusion` and `Diffusion`."""

from diffusion.base import Diffusion, TrainingLoss
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.rectified_flow import RectifiedFlow

__all__ = ["Diffusion", "TrainingLoss", "create_diffusion"]


def create_diffusion(
    objective: str,
    *,
    learn_sigma: bool = True,
    x0_range: tuple[float, float] | None = None,
    time_scale: float | None = None,
) -> Diffusion:
    """Build the objective a model is trained with and sampled from.

    Args:
        objective: "rf" (rectified flow) or "ddpm".
        learn_sigma: whether the model has 2C output channels. DDPM then learns its variance with
            the second half; rectified flow ignores that half either way.
        x0_range: range of the data if it has one, as pixels do and latents do not: DDPM's samplers
            stay within it. Rectified flow needs no bounds.
        time_scale: what rectified flow multiplies t with for the model; None: 1.

    Raises:
        ValueError: if `objective` is neither, or `time_scale` is not positive or for "ddpm".
    """
    if objective == "rf":
        return RectifiedFlow(time_scale=1.0 if time_scale is None else time_scale)
    if objective == "ddpm" and time_scale is not None:
        raise ValueError(f"time_scale {time_scale}: only rectified flow has one, not {objective}")
    if objective == "ddpm":
        return GaussianDiffusion(learn_sigma=learn_sigma, x0_range=x0_range)
    raise ValueError(f"objective must be one of rf, ddpm; got {objective!r}")
