"""Expert load and its measures: counts by hooks, entropy, MaxVio, dead experts, information.

One implementation for training curves, analysis and figures. In order: `LoadCounter` (counts while
a model runs; `models.py` itself records nothing), `RoutingRecorder` (counts by class, step and
patch while a sampler runs), then the measures of a table of counts.

Shapes: L layers, E experts, K experts per token, M tokens; N images, T tokens per image, S sampling
steps, R images whose choices are traced. X stands for classes, steps or patches. The axis of
length 2 is conditional, unconditional.
"""

import math
from collections.abc import Callable
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from models import DiT, Routing

PROB_UNIT = 2.0**-24  # probabilities are summed as integers, so that no order of adding matters
_counter_numbers = count()


def mixtures_of(model: DiT) -> list[nn.Module]:
    """Return the mixtures of experts in order; dense blocks have none.

    Whichever child of a mixture returns a `Routing` is its router.
    """
    return [cast(nn.Module, block.moe) for block in model.blocks if block.is_moe]


class LoadCounter:
    """Count the tokens each expert of each layer gets while the model runs.

    It follows compiled blocks too: all layers have one and the same hook, which finds the layer's
    row of `counts` at the module. A hook that knew its layer would be another program for each.

    With gradient checkpointing the blocks run twice in training and every count doubles, which
    leaves all measures as they are.

    Attributes:
        counts: (L, E) int64 on the model's device; L = 0 for a dense model.
        layers: numbers of the L blocks with experts.
        num_routed: experts that a router chooses from, the first of E: not the unconditional one.
    """

    def __init__(self, model: DiT, device: torch.device | None = None) -> None:
        """Hook into the mixtures.

        Args:
            model: in which to count.
            device: it runs on; by default that of its parameters.
        """
        mixtures = mixtures_of(model)
        self.layers = [index for index, block in enumerate(model.blocks) if block.is_moe]
        self.num_routed = model.config.num_experts
        device = device or next(model.parameters()).device
        shape = (len(mixtures), model.config.num_all_experts)
        self.counts = torch.zeros(shape, dtype=torch.int64, device=device)
        self._name = f"load_counter_{next(_counter_numbers)}"  # another counter is not disturbed
        self._hooks = []
        hook = _load_hook(self._name)
        for mixture, row in zip(mixtures, self.counts, strict=True):
            for child in mixture.children():
                setattr(child, self._name, row)
                self._hooks.append(child.register_forward_hook(hook))

    def reset(self) -> None:
        """Start counting from zero."""
        self.counts.zero_()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()


def _load_hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
    """Return a forward hook that adds to the row of counts that a module has under `name`."""

    def hook(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Routing):
            row = getattr(module, name)
            row.add_(tokens_per_expert(output.expert_indices, len(row)))

    return hook


class RoutingRecorder:
    """Count which experts a model chooses, by class, step, patch and pair, while it is sampled.

    Call `begin` for each batch, give `at_step` to `Diffusion.sample` as its callback, and let the
    model see the batch as N rows (with their class) or 2N (with, then without), as samplers do.
    All tables are integers, so sums over batches, ranks and runs are exact in any order.

    Attributes:
        tables: on the model's device, int64 but for `traced_ids`:
            by_class (2, num_classes, L, E), by_step (2, S, L, E) and by_patch (2, T, L, E) choices;
            pairs (2, L, E, E) tokens that chose both experts, on the diagonal that chose the one;
            probs (2, S, L, E) router probabilities in `PROB_UNIT`;
            rows (2, S) images the model saw, twice per step for a sampler that calls it twice;
            traced_ids (R, S, L, T, K) uint8 (int32 if E > 255) experts of the conditional half,
                the heaviest K first; E where a token has fewer.
    """

    def __init__(self, model: DiT, num_steps: int, num_traced: int = 0) -> None:
        config = model.config
        mixtures = mixtures_of(model)
        L, E, K = len(mixtures), config.num_all_experts, config.num_experts_per_tok
        self._num_tokens = T = (config.input_size // config.patch_size) ** 2
        self.device, self._num_traced, self._step = next(model.parameters()).device, num_traced, 0
        id_dtype = torch.uint8 if E < 256 else torch.int32  # which nccl adds up too
        self.tables = {
            "by_class": self._zeros(2, config.num_classes, L, E),
            "by_step": self._zeros(2, num_steps, L, E),
            "by_patch": self._zeros(2, T, L, E),
            "pairs": self._zeros(2, L, E, E),
            "probs": self._zeros(2, num_steps, L, E),
            "rows": self._zeros(2, num_steps),
            "traced_ids": self._zeros(num_traced, num_steps, L, T, K, dtype=id_dtype),
        }
        self._ids = self.tables["traced_ids"]
        self._hooks = [
            child.register_forward_hook(self._make_hook(layer))
            for layer, mixture in enumerate(mixtures)
            for child in mixture.children()
        ]

    def _zeros(self, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def begin(self, labels: Tensor, first_index: int) -> None:
        """Announce a batch: labels (N,) and the number of its first image among all."""
        self._labels = labels.to(self.device)
        stop = min(self._num_traced, first_index + len(labels))
        self._traced = slice(first_index, max(first_index, stop))

    def at_step(self, step: int, _t: float = 0.0) -> None:
        """Say which sampling step the next model calls belong to."""
        self._step = step

    def reset(self) -> None:
        """Start counting from zero."""
        for table in self.tables.values():
            table.zero_()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _make_hook(self, layer: int) -> Any:
        def hook(_module: nn.Module, _inputs: Any, routing: Any) -> None:
            if not isinstance(routing, Routing):
                return
            N, T, E = len(self._labels), self._num_tokens, routing.probs.shape[1]
            indices, weights, ids = routing.expert_indices, routing.expert_weights, self._ids
            slots = routing.probs.new_zeros(len(indices), E + 1)  # the last is that of nobody
            chosen = slots.scatter_(1, indices, 1.0)[:, :E]
            probs = (routing.probs / PROB_UNIT).round().long()  # (M, E)
            halves = chosen.view(-1, N, T, E)  # (1 or 2, N, T, E)
            for half, (choices, fixed) in enumerate(
                zip(halves, probs.view_as(halves), strict=True)
            ):
                self._count(half, layer, choices, fixed)
            weights = weights.masked_fill(indices == E, -torch.inf)  # (M, slots)
            order = weights.argsort(dim=1, descending=True)[:, : ids.shape[-1]]
            heaviest = indices.gather(1, order).view(-1, N, T, ids.shape[-1])[0]  # (N, T, K)
            num_traced = self._traced.stop - self._traced.start
            ids[self._traced, self._step, layer] = heaviest[:num_traced].to(ids.dtype)

        return hook

    def _count(self, half: int, layer: int, chosen: Tensor, probs: Tensor) -> None:
        """Add choices (N, T, E), 0.0 or 1.0, and probabilities (N, T, E) to all tables.

        Sums of fewer than 2**24 ones are exact in float32.
        """
        tables, step = self.tables, self._step
        by_image = chosen.sum(dim=1).long()  # (N, E)
        tables["by_class"][half, :, layer].index_add_(0, self._labels, by_image)
        tables["by_step"][half, step, layer] += by_image.sum(dim=0)
        tables["by_patch"][half, :, layer] += chosen.sum(dim=0).long()
        tokens = chosen.flatten(0, 1)  # (N*T, E)
        tables["pairs"][half, layer] += (tokens.T @ tokens).long()
        tables["probs"][half, step, layer] += probs.sum(dim=(0, 1))
        if layer == 0:
            tables["rows"][half, step] += len(chosen)


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


def mutual_information(counts: Tensor) -> Tensor:
    """Information that x (a class, a step, a patch) gives about the expert.

    Args:
        counts: (..., X, E) choices.

    Returns:
        (...) fp64, in nats.
    """
    share = counts.double() / counts.sum(dim=(-2, -1), keepdim=True).clamp(min=1)
    entropy = torch.special.entr
    marginals = entropy(share.sum(dim=-1)).sum(dim=-1) + entropy(share.sum(dim=-2)).sum(dim=-1)
    return (marginals - entropy(share).sum(dim=(-2, -1))).clamp(min=0)


def normalized_mutual_information(counts: Tensor, experts_per_token: float) -> Tensor:
    """Mutual information over the most there could be: 0.0 if x tells nothing, 1.0 if it decides.

    A token's K choices are K different experts, so even a fully known choice leaves log K nats
    about which of them one draws: the most is H(expert) - log K.

    Args:
        counts: (..., X, E) choices.
        experts_per_token: K, or its mean where experts choose.

    Returns:
        (...) fp64, in [0, 1]; 0 where the load leaves nothing to tell.
    """
    share = counts.sum(dim=-2).double() / counts.sum(dim=(-2, -1))[..., None].clamp(min=1)
    most = torch.special.entr(share).sum(dim=-1) - math.log(max(experts_per_token, 1))
    nothing = most < 1e-9
    ratio = mutual_information(counts) / most.masked_fill(nothing, 1.0)
    return ratio.masked_fill(nothing, 0.0).clamp(max=1)


def pair_counts(pairs: Tensor) -> Tensor:
    """Return each pair of experts once: (..., E, E) -> (..., E*(E-1)/2)."""
    first, second = torch.triu_indices(pairs.shape[-1], pairs.shape[-1], offset=1)
    return pairs[..., first, second]


def pair_usage(pairs: Tensor) -> Tensor:
    """Share of all pairs of experts that some token chose together: (..., E, E) -> (...) fp32."""
    return (pair_counts(pairs) > 0).float().mean(dim=-1)
