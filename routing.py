"""Expert load and its measures: counts by hooks, entropy, MaxVio, dead experts.

One implementation for training curves, analysis and figures. In order: `LoadCounter` (counts while
a model runs; `models.py` itself records nothing), then the measures of a table of counts.

Shapes: L layers, E experts, K experts per token, M tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models import Routing, TopKRouter


class LoadCounter:
    """Count the tokens each expert of each layer gets while the model runs.

    With gradient checkpointing the blocks run twice in training and every count doubles, which
    leaves all measures as they are.

    Attributes:
        counts: (L, E) int64 on the model's device; L = 0 for a dense model.
    """

    def __init__(self, model: nn.Module, device: torch.device | None = None) -> None:
        """Hook into the routers.

        Args:
            model: in which to count.
            device: it runs on; by default that of its parameters.
        """
        routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
        num_experts = routers[0].num_experts if routers else 0
        device = device or next(model.parameters()).device
        self.counts = torch.zeros(len(routers), num_experts, dtype=torch.int64, device=device)
        self._hooks = [
            router.register_forward_hook(self._make_hook(layer))
            for layer, router in enumerate(routers)
        ]

    def _make_hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Routing) -> None:
            self.counts[layer] += tokens_per_expert(routing.expert_indices, self.counts.shape[1])

        return hook

    def reset(self) -> None:
        """Start counting from zero."""
        self.counts.zero_()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def tokens_per_expert(expert_indices: Tensor, num_experts: int) -> Tensor:
    """Count how often each expert was chosen: (M, K) indices -> (E,) int64, without a host sync."""
    experts = torch.arange(num_experts, device=expert_indices.device)
    return (expert_indices.flatten()[:, None] == experts).sum(dim=0)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the load over its maximum: 1.0 when even, 0.0 when one expert takes all.

    Args:
        counts: (..., E) tokens per expert.

    Returns:
        (...) fp32, in [0, 1].
    """
    share = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(dim=-1)
    return entropy / torch.tensor(max(counts.shape[-1], 2)).log()


def max_violation(counts: Tensor) -> Tensor:
    """MaxVio: how far the busiest expert is above the even load, 0.0 when even, E - 1 at worst.

    Args:
        counts: (..., E) tokens per expert.

    Returns:
        (...) fp32.

    Source: arXiv:2408.15664, sec. 3.
    """
    even = counts.sum(dim=-1).clamp(min=1) / counts.shape[-1]
    return counts.amax(dim=-1) / even - 1


def dead_experts(counts: Tensor) -> Tensor:
    """Count the experts that got no token: (..., E) -> (...)."""
    return (counts == 0).sum(dim=-1)
