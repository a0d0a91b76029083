"""Who else takes part in the part `layer`: the matmuls alone, and the experts of transformers.

`bare_run` times the segments' own matmuls, same shapes and same weights and nothing else: what no
dispatch can be faster than. `peers` puts the experts of Hugging Face transformers into our layer,
if that package is here (requirements-benchmark.txt): the same weights, router and routing.

Shapes: M tokens, K experts per token, R = M*K rows, E experts, D hidden, F expert hidden.
"""

import copy
from importlib.util import find_spec
from typing import Any

import torch
from measures import PASSES, Precision, Run, Stopwatch
from torch import Tensor, nn

from models import MoE, cast_for
from moe_ops import sort_by_expert

IMPLEMENTATIONS = ("eager", "grouped_mm")  # "batched_mm" copies the weights of every token: 19 GB


class PeerExperts(nn.Module):
    """Experts of a Mixtral-shaped block of transformers, with the weights of ours."""

    def __init__(self, experts: Any, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        num_experts, hidden_size, width = experts.down_proj.shape
        config = MixtralConfig(
            hidden_size=hidden_size, intermediate_size=width, num_local_experts=num_experts
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            self.experts = MixtralExperts(config)
        self.experts.gate_up_proj = experts.gate_up_proj
        self.experts.down_proj = experts.down_proj

    def forward(
        self, x: Tensor, expert_indices: Tensor, expert_weights: Tensor, num_rows: int | None = None
    ) -> Tensor:
        """Send (M, D) tokens through their experts."""
        x = cast_for(self.experts.down_proj, x)
        return self.experts(x, expert_indices, expert_weights.to(x.dtype))


def peers(moe: MoE) -> dict[str, nn.Module]:
    """Return our layer with the experts of transformers, by contestant; none without it."""
    if find_spec("transformers") is None:
        print("no transformers (requirements-benchmark.txt): without its experts")
        return {}
    found: dict[str, nn.Module] = {}
    for name in IMPLEMENTATIONS:
        layer = copy.copy(moe)
        layer._modules = {**moe._modules, "experts": PeerExperts(moe.experts, name)}
        found[f"transformers {name}"] = layer
    return found


def bare_run(moe: MoE, batches: list[Tensor], precision: Precision) -> Run:
    """Time the layer's matmuls alone, forward and backward, at each batch's own loads.

    Args:
        moe: whose weights they have, and whose router chooses.
        batches: (1, M, D) tokens for each round.
        precision: of the arithmetic; weights are as wide.
    """
    moe = moe.to(batches[0].device)
    dtype = Precision(precision.dtype, False).weights

    def half(weight: Tensor) -> Tensor:
        return weight.detach().to(dtype)

    experts: Any = moe.experts
    gate_up, down = half(experts.gate_up_proj), half(experts.down_proj)
    shared: Any = moe.shared_experts
    whole = [half(w) for w in shared.parameters()] if shared is not None else []
    loads = []
    for x in batches:
        with torch.no_grad():
            indices = moe.router(x.to(moe.router.matrix.dtype)).expert_indices
        loads.append(sort_by_expert(indices, len(gate_up)).offsets.tolist())

    flat = half(batches[0][0])
    rows = half(torch.randn(indices.numel(), flat.shape[1], device=flat.device))
    hidden = rows.new_ones(len(rows), gate_up.shape[1])
    activation, out = rows.new_ones(len(rows), down.shape[2]), torch.empty_like(rows)
    grads = torch.empty_like(gate_up), torch.empty_like(down)

    def forward(watch: Stopwatch, name: str, round_: int) -> None:
        with watch.part(name):
            for i, part in enumerate(segments(loads[round_])):
                torch.mm(rows[part], gate_up[i].t(), out=hidden[part])
                torch.mm(activation[part], down[i].t(), out=out[part])
            if whole:
                wide = flat @ whole[0].t()
                wide[:, : whole[1].shape[1]] @ whole[1].t()

    def backward(watch: Stopwatch, round_: int) -> None:
        with watch.part("backward"):
            for i, part in enumerate(segments(loads[round_])):
                torch.mm(rows[part], down[i], out=activation[part])
                torch.mm(rows[part].t(), activation[part], out=grads[1][i])
                torch.mm(hidden[part], gate_up[i], out=out[part])
                torch.mm(hidden[part].t(), rows[part], out=grads[0][i])
            if whole:
                narrow = flat @ whole[1]
                flat.t() @ narrow
                wide = torch.cat([narrow, narrow], dim=1)
                wide @ whole[0]
                wide.t() @ flat

    def run(watch: Stopwatch, round_: int) -> None:
        forward(watch, "inference", round_)
        forward(watch, "forward", round_)
        backward(watch, round_)
        watch.seconds["forward+backward"] = sum(watch.seconds[name] for name in PASSES)

    return run


def segments(ends: list[int]) -> list[slice]:
    """Return the rows of each expert."""
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
