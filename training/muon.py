"""The optimizer that `--optimizer` names, and Muon for the matrices of the blocks.

In order: `build_optimizer`, `matrices` (which are there in a parameter), `MuonAndAdamW`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.optimization import adam_arguments
from training.parameters import optimizer_groups
from training.settings import TrainSettings

# Weights that map tokens to tokens. The routers' are few rows, and the conditioning's see hardly
# more than as many directions as there are classes: made orthogonal, noise would fill the others.
HIDDEN = ("attn.qkv.weight", "attn.proj.weight", "fc1.weight", "fc2.weight")
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")  # of stacked experts, or .weight of an MLP


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings
) -> torch.optim.Optimizer:
    """Return the optimizer of the trained ones of these parameters, all in this process."""
    groups = optimizer_groups(named, settings)
    if settings.optimizer == "muon":
        return MuonAndAdamW(groups, adam_arguments(settings))
    return torch.optim.AdamW(groups, **adam_arguments(settings), fused=True)


def matrices(name: str, tensor: Tensor) -> list[Tensor]:
    """Return views of the matrices that Muon updates in a parameter: of each expert its own.

    Queries, keys and values are three, and so are gate and up two; none of what AdamW has.
    """
    if not name.startswith("blocks.") or ".router." in name:
        return []
    if not name.removesuffix(".weight").endswith(PROJECTIONS) and not name.endswith(HIDDEN):
        return []
    parts = 3 if name.endswith("qkv.weight") else 2 if "gate_up_proj" in name else 1
    stacked = tensor.unbind(0) if tensor.dim() == 3 else [tensor]
    return [part for matrix in stacked for part in matrix.chunk(parts)]


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for the matrices of the blocks, its AdamW for all other parameters.

    States are kept by parameter, as AdamW's are: of one that stacks matrices, one momentum of its
    shape. Muon's steps have the size of AdamW's, so one rate and one decay serve both.

    Source: Jordan et al., kellerjordan.github.io/posts/muon; the size, Liu et al.,
    arXiv:2502.16982, sec. 2.2.
    """

    def __init__(self, groups: list[dict[str, Any]], adam: dict[str, Any]) -> None:
        """Divide the parameters of groups, which have their "names", between the two."""
        super().__init__(groups, {**adam, "fused": True})  # so that steps are loaded where needed
        self._views: dict[Tensor, tuple[str, list[Tensor]]] = {}
        of_adam, of_muon = [], []
        for group in self.param_groups:
            named = list(zip(group["names"], group["params"], strict=True))
            views = {p: (name, matrices(name, p.detach())) for name, p in named}
            self._views |= {p: found for p, found in views.items() if found[1]}
            rest = [p for _, p in named if p not in self._views]
            of_adam.append({**group, "params": rest})
            of_muon.append({"params": [view for _, found in views.values() for view in found]})
        self._adam = torch.optim.AdamW(of_adam, **adam, fused=True)
        self._muon = torch.optim.Muon(of_muon, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one step; the gradients stay."""
        assert closure is None
        inner = zip(self._adam.param_groups, self._muon.param_groups, strict=True)
        for ours, both in zip(self.param_groups, inner, strict=True):
            for group in both:
                group["lr"], group["weight_decay"] = ours["lr"], ours["weight_decay"]
        for parameter, (name, views) in self._views.items():
            assert parameter.grad is not None
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = matrices(name, self.state[parameter]["momentum_buffer"])
            gradients = matrices(name, parameter.grad)
            for view, gradient, part in zip(views, gradients, momentum, strict=True):
                view.grad = gradient
                self._muon.state[view] = {"momentum_buffer": part}
        self._adam.state = self.state
        self._adam.step()
        self._muon.step()
        for _, views in self._views.values():
            for view in views:
                view.grad = None
