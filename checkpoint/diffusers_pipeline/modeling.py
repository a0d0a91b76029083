"""The DiT of a diffusers pipeline folder, loaded with the code that lies beside its weights."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

PACKAGE = "dit_moe"


def load_code(folder: Path) -> None:
    """Make the package in `folder` importable, once per process."""
    if PACKAGE in sys.modules:
        return
    init = folder / PACKAGE / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        PACKAGE, init, submodule_search_locations=[str(init.parent)]
    )
    assert spec is not None
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)


class DiTMoE(ModelMixin):
    """A `DiT` as a component that diffusers can load, move and cast."""

    def __init__(self, dit: torch.nn.Module) -> None:
        super().__init__()
        self.dit = dit

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: str, torch_dtype: Any = None, **_: Any
    ) -> "DiTMoE":
        """Load the weights in `folder` with the code in it, in their own dtype if none is given.

        The router and the position table are computed in float32 whatever the rest is in.
        """
        load_code(Path(folder))
        models = importlib.import_module(f"{PACKAGE}.models")
        dit = models.DiT.from_pretrained(folder)
        for name, parameter in dit.named_parameters() if torch_dtype is not None else ():
            if name != "pos_embed" and "moe.router." not in name:
                parameter.data = parameter.data.to(torch_dtype)
        return cls(dit).eval()

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict noise or velocity (N, C_out, H, W) of latents x (N, C, H, W) at times t (N,)."""
        return self.dit(x, t, y)
