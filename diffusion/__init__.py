"""Training objectives and samplers: scripts need only `create_diffusion` and `Diffusion`.

`base` is what objectives share: guidance, the loop of sampling; `rectified_flow`, with its `times`,
and `gaussian_diffusion`, DDPM, are the two. Imports nothing of ours.
"""

from collections.abc import Mapping
from typing import Any

from diffusion.base import Diffusion, TrainingLoss
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.rectified_flow import RectifiedFlow

__all__ = ["OBJECTIVE_SETTINGS", "Diffusion", "TrainingLoss", "create_diffusion"]

# Settings of each objective, as runs save them; None is the default of any.
OBJECTIVE_SETTINGS = {
    "rf": ("time_scale", "time_shift", "time_sampling"),
    "ddpm": ("prediction", "zero_terminal_snr", "min_snr_gamma"),
}


def create_diffusion(
    objective: str | Mapping[str, Any],
    *,
    learn_sigma: bool = True,
    x0_range: tuple[float, float] | None = None,
    **settings: Any,
) -> Diffusion:
    """Build the objective a model is trained with and sampled from.

    Args:
        objective: "rf" (rectified flow) or "ddpm"; or the settings saved with a model, such as
            `DiT.settings`, which tell it and whether the data are pixels, in [-1, 1].
        learn_sigma: whether the model has 2C output channels. DDPM then learns its variance with
            the second half; rectified flow ignores that half either way.
        x0_range: range of the data if it has one, as pixels do and latents do not: DDPM's samplers
            stay within it. Rectified flow needs no bounds.
        **settings: of `OBJECTIVE_SETTINGS`, arguments of `RectifiedFlow` or `GaussianDiffusion`;
            what is None or False is as by default, and may be another objective's.

    Raises:
        ValueError: if `objective` is neither, or a setting is out of range or another objective's.
    """
    if isinstance(objective, Mapping):
        told, objective = objective, str(objective.get("objective", ""))
        names = OBJECTIVE_SETTINGS.get(objective) or ()
        own = {name: told.get(name) for name in names}
        settings = {**own, **settings}
        x0_range = x0_range or ((-1.0, 1.0) if told.get("vae_path") == "none" else None)
    if objective not in OBJECTIVE_SETTINGS:
        raise ValueError(f"objective must be one of rf, ddpm; got {objective!r}")
    off = (None, False)
    given = {name: value for name, value in settings.items() if not any(value is o for o in off)}
    other = "rectified flow" if objective == "ddpm" else "DDPM"
    for name, value in given.items():
        if name not in OBJECTIVE_SETTINGS[objective]:
            raise ValueError(f"{name} {value}: only {other} has one, not {objective}")
    if objective == "rf":
        return RectifiedFlow(**given)
    return GaussianDiffusion(learn_sigma=learn_sigma, x0_range=x0_range, **given)
