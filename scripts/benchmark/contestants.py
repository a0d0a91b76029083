"""Who takes part in `benchmark.py`: the published dispatch and EMA, and a dense model.

Shapes: M tokens, D hidden, F expert hidden, E experts, K experts per token.
"""

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DiT, DiTConfig, MoE, Routing, compute_dtype
from training.job import Ema


class NaiveExpert(nn.Module):
    """One SwiGLU as three matmuls; its parameters are views of stacked matrices."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.detach().chunk(2)
        self.gate, self.up, self.down = (nn.Parameter(w) for w in (gate, up, down.detach()))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class NaiveMoE(nn.Module):
    """A `MoE` with the same weights, dispatched the way the published code does it.

    Source: arXiv:2407.11633's code: boolean masks in training, segments by a host copy otherwise.
    """

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.router = moe.router
        stacked = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
        self.experts = nn.ModuleList(NaiveExpert(gate_up, down) for gate_up, down in stacked)
        shared = moe.shared_experts
        self.shared_experts = shared and NaiveExpert(
            shared.gate_up_proj.weight, shared.down_proj.weight
        )

    def forward(self, x: Tensor, is_null: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Map (N, T, D) tokens as `MoE` does."""
        tokens = x.flatten(0, 1)  # (M, D)
        routing = self.router(x, is_null)
        tokens = tokens.to(compute_dtype(self.router.matrix))
        out = (self._by_masks if self.training else self._by_segments)(tokens, routing)
        if self.shared_experts is not None:
            out = out + self.shared_experts(tokens)
        return out.view_as(x), routing.aux_losses

    def _by_masks(self, tokens: Tensor, routing: Routing) -> Tensor:
        weights = routing.expert_weights.to(tokens.dtype)  # (M, K)
        rows = tokens.repeat_interleave(weights.shape[1], dim=0)  # (R, D)
        chosen = routing.expert_indices.flatten()
        out = torch.empty_like(rows)
        for index, expert in enumerate(self.experts):
            mask = chosen == index
            out[mask] = expert(rows[mask])
        return (out.view(*weights.shape, -1) * weights[..., None]).sum(dim=1).to(tokens.dtype)

    def _by_segments(self, tokens: Tensor, routing: Routing) -> Tensor:
        chosen, num_experts = routing.expert_indices.flatten(), len(self.experts)
        order = chosen.argsort()
        ends = chosen.bincount(minlength=num_experts).cumsum(0).tolist()  # the host waits here
        weights = routing.expert_weights.flatten().to(tokens.dtype)
        out = torch.zeros_like(tokens)
        for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False):
            choices = order[start:end]
            rows = choices // routing.expert_indices.shape[1]
            out.index_add_(0, rows, expert(tokens[rows]) * weights[choices, None])
        return out


def use_naive_experts(model: DiT) -> DiT:
    """Replace every `MoE` of a model by a `NaiveMoE` with the same weights."""
    for block in model.blocks:
        block.moe = NaiveMoE(cast(MoE, block.moe))
    return model


def dense_of_equal_flops(config: DiTConfig) -> DiTConfig:
    """Return the dense model whose MLP is as wide as what one token of a mixture uses: K*F + S."""
    shared = config.num_shared_experts * config.hidden_size
    width = round(config.experts_per_token * config.mlp_hidden_size) + shared
    return dataclasses.replace(
        config,
        num_experts=0,
        mlp_ratio=width / config.hidden_size,
        moe_blocks="all",
        first_k_dense_replace=0,
        unconditional_expert=False,
        selection="token_choice",
        capacity=0.0,
        exact_thresholds=False,
    )


def build_model(config: DiTConfig, device: torch.device, naive: bool = False) -> DiT:
    """Build a model as it is after some training: the layers that start at zero are random."""
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return (use_naive_experts(model) if naive else model).to(device)


class NaiveEma(Ema):
    """The same average, one parameter and one operator after the other."""

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model."""
        for average, parameter in zip(self._averages, self._parameters, strict=True):
            average.mul_(self.decay).add_(parameter, alpha=1 - self.decay)
