"""One block's MLP upcycled: neurons of a dense MLP, or experts, to more experts and their router.

In this order: `Neurons` (read from a source), what is written from them (experts, shared expert,
router), and by how much the new MLP's output differs. `upcycle.py` says how it is used.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import DiTBlock, DiTConfig, TopKRouter, initialize_parameter


class Neurons(NamedTuple):
    """Hidden neurons of an MLP: the sum of what each adds to the output, plus a bias."""

    inputs: tuple[Tensor, ...]  # gate, up (F, D) of a SwiGLU; weight (F, D), bias (F,) of a GELU
    down: Tensor  # (D, F)
    bias: Tensor | None  # (D,), GELU only

    def select(self, start: int, stop: int) -> "Neurons":
        """Return neurons [start, stop), without a copy; the bias stays whole."""
        inputs = tuple(tensor[start:stop] for tensor in self.inputs)
        return Neurons(inputs, self.down[:, start:stop], self.bias)


def read_mlps(tensors: dict[str, Tensor], config: DiTConfig) -> list[Neurons]:
    """Return a block's dense MLP as a list of one, or its experts."""
    if config.num_experts == 0 and config.mlp_type == "gelu":
        up, down = (
            (tensors[f"mlp.{fc}.weight"], tensors[f"mlp.{fc}.bias"]) for fc in ("fc1", "fc2")
        )
        return [Neurons(up, *down)]
    if config.num_experts == 0:
        halves = tensors["mlp.gate_up_proj.weight"].chunk(2)
        return [Neurons(halves, tensors["mlp.down_proj.weight"], None)]
    prefix = "moe.experts."
    if config.mlp_type == "gelu":
        names = ("up_proj", "up_bias", "down_proj", "down_bias")
        experts = zip(*(tensors[prefix + name] for name in names), strict=True)
        return [Neurons((up, up_bias), down, bias) for up, up_bias, down, bias in experts]
    experts = zip(tensors[prefix + "gate_up_proj"], tensors[prefix + "down_proj"], strict=True)
    return [Neurons(gate_up.chunk(2), down, None) for gate_up, down in experts]


class NoisyCopy:
    """Copies a tensor into another, with noise on a random share of its entries."""

    def __init__(self, noise: float, share: float, generator: torch.Generator) -> None:
        self.noise, self.share, self.generator = noise, share, generator

    def __call__(self, target: Tensor, source: Tensor, scale: float = 1.0) -> None:
        """Write scale * (source + noise) to `target`; the noise is relative to source's std."""
        if self.noise:
            mask = torch.rand(source.shape, generator=self.generator) < self.share
            noise = torch.randn(source.shape, generator=self.generator) * mask
            source = source.float()
            source = source + noise * (self.noise * source.std())
        target.copy_(source if scale == 1.0 else source.float() * scale)


def write_experts(
    mlps: Sequence[Neurons],
    config: DiTConfig,
    parts: int,
    dtype: torch.dtype,
    copy: NoisyCopy,
    scale: float = 1.0,
) -> dict[str, Tensor]:
    """Return the stacked experts: copies of each MLP, each cut into `parts`.

    A part gets 1 / parts of its copy's weight, so `down` is `parts` times as large; the biases of
    the parts, with those weights, add up to the bias. The unconditional expert, whose weight is 1,
    is the first part as it is.

    Args:
        mlps: of the source.
        config: of the result.
        parts: finer experts per copy.
        dtype: of the result.
        copy: how weights are copied.
        scale: of all outputs: one over the weight that a token's experts have together, or 0.
    """
    num_copies, width = config.num_experts // (len(mlps) * parts), config.mlp_hidden_size

    def stack(*shape: int) -> Tensor:
        return torch.empty(len(mlps), num_copies, parts, *shape, dtype=dtype)

    down = stack(config.hidden_size, width)
    if config.mlp_type == "gelu":
        bias = stack(config.hidden_size)
        inputs = [stack(width, config.hidden_size), stack(width)]
        names = {"up_proj": inputs[0], "up_bias": inputs[1], "down_proj": down, "down_bias": bias}
    else:
        gate_up = stack(2 * width, config.hidden_size)
        inputs = list(gate_up.chunk(2, dim=3))  # views
        names = {"gate_up_proj": gate_up, "down_proj": down}
    for e, mlp in enumerate(mlps):
        for c in range(num_copies):
            for g in range(parts):
                part = mlp.select(g * width, (g + 1) * width)
                for target, tensor in zip(inputs, part.inputs, strict=True):
                    copy(target[e, c, g], tensor)
                copy(down[e, c, g], part.down, scale=parts * scale)
                if part.bias is not None:
                    copy(bias[e, c, g], part.bias, scale=scale)
    experts = {name: tensor.flatten(0, 2) for name, tensor in names.items()}
    if config.unconditional_expert:
        part = mlps[0].select(0, width)
        ins = (torch.cat(part.inputs),) if part.bias is None else part.inputs
        outs = [t * bool(scale) for t in (part.down, part.bias) if t is not None]
        for name, tensor in zip(names, (*ins, *outs), strict=True):
            experts[name] = torch.cat([experts[name], tensor.to(dtype)[None]])
    return {f"moe.experts.{name}": tensor for name, tensor in experts.items()}


def write_shared(
    neurons: Neurons | None, config: DiTConfig, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the shared expert of a dense source: these neurons, or random ones of zero output.

    An output bias that these neurons lack is with the routed experts.
    """
    width, hidden_size = config.num_shared_experts * config.hidden_size, config.hidden_size
    if neurons is None:

        def draw() -> Tensor:
            limit = math.sqrt(6 / (width + hidden_size))  # xavier-uniform
            return (torch.rand(width, hidden_size, generator=generator) * 2 - 1) * limit

        inputs = (draw(), torch.zeros(width) if config.mlp_type == "gelu" else draw())
        neurons = Neurons(inputs, torch.zeros(hidden_size, width), None)
    if config.mlp_type == "gelu":
        (weight, bias), down = neurons.inputs, neurons.down
        shared = {"fc1.weight": weight, "fc1.bias": bias, "fc2.weight": down}
        shared["fc2.bias"] = torch.zeros(hidden_size) if neurons.bias is None else neurons.bias
    else:
        shared = {"gate_up_proj.weight": torch.cat(neurons.inputs)}
        shared["down_proj.weight"] = neurons.down
    return {f"moe.shared_experts.{name}": t.to(dtype).clone() for name, t in shared.items()}


def write_router(
    rows: Tensor | None, config: DiTConfig, parts: int, scale: float, generator: torch.Generator
) -> Tensor:
    """Return the router (E, D) fp32: random rows for a dense source, else those of each copy.

    A softmax over e and c of (row_e + direction_c) x is the product of the softmax over e alone
    and that over c alone; the latter is almost 0 or 1 if directions are long.

    Args:
        rows: (E_0, D) router of the source, None for a dense one.
        config: of the result.
        parts: finer experts per copy, which share a row.
        scale: length of the directions.
        generator: of directions and random rows.
    """
    if rows is None:
        num_copies = config.num_experts // parts
        bound = 1 / math.sqrt(config.hidden_size)  # kaiming-uniform with a = sqrt 5
        draws = torch.rand(1, num_copies, config.hidden_size, generator=generator)
        by_copy = (draws * 2 - 1) * bound  # (1, C, D); of prototypes only the direction counts
    else:
        num_copies = config.num_experts // (len(rows) * parts)
        directions = torch.zeros(num_copies, config.hidden_size)
        if num_copies > 1:
            directions = torch.randn(num_copies, config.hidden_size, generator=generator)
            directions -= directions.mean(dim=0)  # what copies have in common decides nothing
            directions *= scale / directions.norm(dim=1, keepdim=True)
        by_copy = rows.float()[:, None] + directions  # (E_0, C, D)
    by_part = by_copy[:, :, None].expand(-1, -1, parts, -1)  # (E_0, C, G, D)
    return by_part.flatten(0, 2)


def start_router(
    matrix: Tensor, config: DiTConfig, generator: torch.Generator
) -> tuple[dict[str, Tensor], float]:
    """Return a router's tensors, and the weight that a token's experts have together.

    The latter is exact where weights are normalised, else the mean of random tokens'; thresholds
    are such that as many of those are above them as experts take in training.

    Args:
        matrix: (E, D), rows or prototypes.
        config: of the result.
        generator: of the tokens and the capacity predictor.
    """
    kind = "prototypes" if config.affinity == "cosine" else "weight"
    with torch.device("meta"):
        router = TopKRouter(config).train()
    state = {name: torch.zeros(tensor.shape) for name, tensor in router.state_dict().items()}
    for name, tensor in state.items():
        if name.startswith("capacity_predictor"):
            initialize_parameter(f"router.{name}", tensor, generator)
    state[kind] = matrix
    total = config.routed_scaling_factor
    exact = config.norm_topk_prob and config.selection == "token_choice"
    if not exact:
        router.load_state_dict(state, assign=True)
        tokens = torch.randn(16, 64, config.hidden_size, generator=generator)
        with torch.no_grad():
            total = router(tokens).expert_weights.sum(dim=1).mean().item()
        router.update_state(bias_rate=0.0, decay=0.0)
        state = dict(router.state_dict())
    return {f"moe.router.{name}": tensor for name, tensor in state.items()}, total


@torch.no_grad()
def mlp_difference(
    old: dict[str, Tensor],
    source: DiTConfig,
    new: dict[str, Tensor],
    config: DiTConfig,
    tokens: Tensor,
    is_null: bool = False,
) -> float:
    """Return how far the new MLP's output is from the old one's, relative to it, in float32.

    Args:
        old: tensors of the source's block.
        source: its config.
        new: tensors of the result's block.
        config: its config.
        tokens: (M, D) inputs of the MLP, of one image.
        is_null: that has no class.
    """
    pairs = ((old, source), (new, config))
    expected, found = (run_mlp(*pair, tokens, is_null) for pair in pairs)
    return ((found - expected).norm() / expected.norm()).item()


def run_mlp(
    tensors: dict[str, Tensor], config: DiTConfig, tokens: Tensor, is_null: bool = False
) -> Tensor:
    """Run (M, D) tokens through the MLP of a block given by its tensors, in float32."""
    mixtures = [index for index in range(config.depth) if config.is_moe_block(index)]
    with torch.device("meta"):
        block: nn.Module = DiTBlock(config, *mixtures[:1]).eval()
    mlp = block.get_submodule("moe" if config.num_experts else "mlp")
    prefix = "moe." if config.num_experts else "mlp."
    state = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    mlp.load_state_dict(state, assign=True)
    if not config.num_experts:
        return mlp(tokens)
    return mlp(tokens[None], torch.tensor([is_null]))[0][0]
