"""Representation alignment: a block's tokens learn to tell what an image encoder sees.

In order: `check_repa`, `Encoder` (images to features on the model's grid of tokens),
`alignment_loss`, `Aligned` (the model that is trained, with a projector that no checkpoint of
weights has).

Source: Yu et al. (REPA), arXiv:2410.06940.
"""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.state import load_torch
from common.errors import UserError
from models import DiT

HIDDEN = 2048  # of the projector
DEFAULT = "timm:vit_base_patch14_dinov2.lvd142m"


def split_name(text: str, flag: str = "--repa") -> tuple[str, str | None]:
    """Return the network and, if given, the file of its weights, of timm:NAME or timm:NAME:FILE.

    Raises:
        UserError: it is neither, or there is no such file or network, or no timm.
    """
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"{flag} {text} needs a package that is not here: pip install timm")
    import timm

    kind, _, rest = text.partition(":")
    name, _, file = rest.partition(":")
    if kind != "timm" or not name:
        raise UserError(f"{flag} {text} is not timm:NAME or timm:NAME:FILE, such as {DEFAULT}")
    if not timm.is_model(name):
        raise UserError(f"{flag} {text}: timm knows no {name}")
    if file and not Path(file).is_file():
        raise UserError(f"{flag} {text}: no such file: {file}")
    return name, file or None


def check_repa(name: str, block: int | None, model: DiT) -> int:
    """Return the block, from 1, whose tokens are aligned: the flag's, else the eighth or the half.

    Raises:
        UserError: there is no such block, or no such encoder.
    """
    split_name(name)
    depth = model.config.depth
    chosen = block or max(min(8, depth // 2), 1)
    if chosen > depth:
        raise UserError(f"--repa-block {chosen}: the model has {depth} blocks")
    return chosen


class Encoder(nn.Module):
    """A frozen network of timm, as images to features at each token of a grid.

    Attributes:
        width: of the features.
    """

    def __init__(self, name: str, grid: int, device: torch.device) -> None:
        """Load it, by `split_name`.

        Args:
            name: of `--repa`.
            grid: tokens in a row of the model, and in a column.
            device: where it runs.

        Raises:
            UserError: its weights cannot be had.
        """
        super().__init__()
        import timm

        network, file = split_name(name)
        options: dict[str, Any] = {"num_classes": 0}
        if "vit" in network or "dino" in network:
            options["dynamic_img_size"] = True
        try:
            create: Any = timm.create_model  # whose networks have more than their type says
            self.network = create(network, pretrained=file is None, **options)
        except (OSError, RuntimeError) as error:  # no connection
            raise UserError(f"--repa {name}: its weights cannot be had: {error}") from error
        if file is not None:
            load_in_order(self.network, load_torch(Path(file)), f"--repa {name}")
        self.network.eval().requires_grad_(False).to(device)
        config = self.network.pretrained_cfg
        mean, std = (torch.tensor(config[n], device=device).view(3, 1, 1) for n in ("mean", "std"))
        self.mean, self.std, self.grid = mean, std, grid
        if "dynamic_img_size" in options:  # as many patches as tokens
            self.side = grid * self.network.patch_embed.patch_size[0]
        elif self.network.default_cfg.get("fixed_input_size"):
            self.side = config["input_size"][-1]
        else:  # convolutions: as many places as tokens
            self.side = grid * self.network.feature_info[-1]["reduction"]
        self.width: int = self.network.num_features

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, S, S) in [-1, 1], of one channel or three, to (N, T, width) fp32."""
        pixels = (images.float() + 1) / 2
        pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
        size = (self.side, self.side)
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
        with torch.autocast(images.device.type, enabled=False):
            features = self.network.forward_features((pixels - self.mean) / self.std)
        if features.dim() == 3:  # (N, tokens, width), the first ones of the whole image
            features = features[:, self.network.num_prefix_tokens :].transpose(1, 2)
            features = features.unflatten(2, (math.isqrt(features.shape[2]), -1))
        if features.shape[-2:] != (self.grid, self.grid):
            features = F.interpolate(
                features, (self.grid, self.grid), mode="bilinear", align_corners=False
            )
        return features.flatten(2).transpose(1, 2)


def load_in_order(network: nn.Module, state: Any, source: str) -> None:
    """Load weights by their names or, where these are another library's, in the same order.

    Raises:
        UserError: they are of another network.
    """
    ours = network.state_dict()
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        kept = {name: value for name, value in state.items() if name in ours}
        if kept.keys() != ours.keys():  # a file may also have the classifier, which comes last
            kept = dict(zip(ours, state.values(), strict=False))
        if len(kept) == len(ours) and all(kept[n].shape == ours[n].shape for n in ours):
            network.load_state_dict(kept)
            return
    raise UserError(f"{source}: the file has weights of another network")


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return minus the mean cosine of tokens and features, (N, T, D) both, in float32: ()."""
    with torch.autocast(projected.device.type, enabled=False):
        return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


class Aligned(nn.Module):
    """A model in training whose losses have "repa", the alignment of one block's tokens."""

    def __init__(self, model: DiT, block: int, width: int, seed: int) -> None:
        """Add a projector; the global random state is left alone.

        Args:
            model: in training mode.
            block: whose tokens are aligned, from 1.
            width: of the features.
            seed: of the projector's weights.
        """
        super().__init__()
        self.model = model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(
                *(nn.Linear(model.config.hidden_size, HIDDEN), nn.SiLU()),
                *(nn.Linear(HIDDEN, HIDDEN), nn.SiLU()),
                nn.Linear(HIDDEN, width),
            )
        self._tokens: Tensor | None = None
        model.blocks[block - 1].register_forward_hook(self._keep)

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._tokens = output[0] if self.model.training else None

    def forward(
        self, *inputs: Tensor, features: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the model; features (N, T, width) are what the tokens are aligned with."""
        prediction, losses = self.model(*inputs, **options)
        tokens, self._tokens = self._tokens, None
        if features is None:
            return prediction, losses
        assert tokens is not None
        return prediction, {**losses, "repa": alignment_loss(self.projector(tokens), features)}
