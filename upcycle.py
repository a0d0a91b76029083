"""Turn a dense DiT, or a DiT-MoE, into a DiT-MoE with more experts and the same output.

    python upcycle.py --ckpt DiT-XL-2-256x256.pt --out xl-8E2A --num-experts 8 --dtype bfloat16
    python upcycle.py --ckpt dit_moe_s_8E2A.pt --out s-16E2A --num-experts 16
    torchrun --nproc_per_node=8 train.py --init-from xl-8E2A --data-path IMAGES

Experts keep the form of the source's MLP (SwiGLU, or GELU with biases), so that nothing is
approximated. How E experts come out of E_0 (1 for a dense source):

- Each is copied C = E / (E_0 * G) times; each copy is cut into G = `--granularity` finer experts of
  F / G neurons each, whose sum is the copy. Expert (e * C + c) * G + g is part g of copy c of e.
- The G parts of a copy have the same router row, so a token's K experts are K / G whole copies.
- The rows of a dense source's copies are random, and the weights of the chosen sum to 1.
- The rows of an expert's copies are its row plus or minus something common to all experts: a random
  direction per copy, `--router-scale` long, decides which copy serves a token. Only for tokens near
  the border between two copies does the output change.

Reads mapped, writes a block at a time, and measures for each block by how much the output of the
new MLP differs from the old one.

Source: Komatsuzaki et al., arXiv:2212.05055 (upcycling); He et al., arXiv:2410.07524 (equal router
rows for the parts of a copy).
"""

import argparse
import math
import shutil
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint.hub import check_new, save_folder
from checkpoint.layouts import block_index, by_block, known_fields
from checkpoint.weights import Weights, add_pos_embed, open_weights, page_out, place
from common import process
from common.errors import FileError, UserError, blamed_on, one_line_errors, printable
from common.flags import FlagGroup, FlagParser, dtype_flag, flag, model_size, number, seed
from common.process import DTYPES
from models import DiT_models, DiTBlock, DiTConfig

MIXTURE = ("affinity", "selection", "balance", "unconditional_expert")
BLOCKS = ("moe_blocks", "first_k_dense_replace")


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", required=True, help="Dense DiT or DiT-MoE: published, diffusers or ours.")
    data.add("--out", required=True, help="Folder to write; must not exist.")
    data.add("--ema", default=True, **flag, help="Take the averaged weights.")
    data.add("--dtype", **dtype_flag, help="Type of the new weights. Default: as the source.")
    data.add("--model", **model_size(DiT_models), help="Size of a published file, for its heads.")
    data.add("--num-heads", type=number(int, 1), help="Likewise, for files of other sizes.")
    add_mixture_flags(parser.group("MoE"))
    return parser


def add_mixture_flags(moe: FlagGroup) -> None:
    """Add the flags that say what becomes of the experts."""
    moe.add("--num-experts", type=number(int, 1), default=8, help="Number of experts, E.")
    moe.add(
        "--num-experts-per-tok",
        type=number(int, 1),
        help="Experts that a token uses, K. Default: 2 G of a dense source, else its K times G.",
    )
    finer = "Number of finer experts, G, that each copy is cut into."
    moe.add("--granularity", type=number(int, 1), default=1, help=finer)
    width = "Width of the shared expert of a dense source, in D. Default: 0."
    moe.add("--num-shared-experts", type=number(int, 0), help=width)
    moe.add(
        "--shared",
        choices=["zero", "split"],
        default="zero",
        help="The shared expert begins with an output of zero, or with neurons of the source.",
    )
    std, length = number(float, 0, 1000), number(float, 0, 10**6)
    moe.add("--noise", type=std, default=0.0, help="Noise on the copies, in their weights' std.")
    moe.add("--noise-share", type=number(float, 0, 1), default=0.5, help="Share that gets noise.")
    moe.add(
        "--router-scale",
        type=length,
        default=64.0,
        help="Length of what tells a MoE's copies apart.",
    )
    moe.add("--seed", type=seed, default=0, help="Seed of router, noise and shared expert.")
    moe.add(
        "--check-tokens",
        type=number(int, 0, 100_000),
        default=64,
        help="Random tokens on which old and new MLP of each block are compared; 0 = none.",
    )


# ------------------------------------------------------------------------------ the plan


class Plan(NamedTuple):
    """What becomes of the source's experts."""

    num_experts_per_tok: int
    num_shared_experts: int
    width: int  # of a copy before it is cut, in neurons


def plan_config(args: argparse.Namespace, source: DiTConfig) -> DiTConfig:
    """Return the config of the result.

    Raises:
        UserError: naming the flag that does not fit the source.
    """
    parts = args.granularity
    units = max(source.num_experts, 1) * parts
    if args.num_experts % units:
        raise UserError(
            f"--num-experts {args.num_experts} must be a multiple of {units}: the source's experts "
            f"({max(source.num_experts, 1)}) x --granularity {parts}"
        )
    plan = plan_mixture(args, source) if source.num_experts else plan_dense(args, source)
    if plan.width % (8 * parts):  # see DiTConfig
        raise UserError(
            f"--granularity {parts} does not divide the {plan.width} neurons of an MLP into "
            "experts whose width is a multiple of 8"
        )
    with blamed_on(f"--ckpt {args.ckpt}"):
        return replace(
            source,
            num_experts=args.num_experts,
            num_experts_per_tok=plan.num_experts_per_tok,
            num_shared_experts=plan.num_shared_experts,
            norm_topk_prob=source.norm_topk_prob if source.num_experts else True,
            mlp_ratio=plan.width / parts / source.hidden_size,
        )


def plan_mixture(args: argparse.Namespace, source: DiTConfig) -> Plan:
    """Return what becomes of a MoE, which keeps all but the number of its experts."""
    for name in (*MIXTURE, *BLOCKS):
        if (found := getattr(source, name)) != getattr(DiTConfig(), name):
            raise UserError(f"--ckpt {args.ckpt} has {name} {found}: only DiT-MoE is upcycled")
    active = source.num_experts_per_tok * args.granularity
    if args.num_experts_per_tok not in (None, active):
        raise UserError(
            f"--num-experts-per-tok {args.num_experts_per_tok}: a source with "
            f"{source.num_experts_per_tok} active experts and --granularity {args.granularity} "
            f"gives {active}; leave the flag out"
        )
    if args.num_shared_experts not in (None, source.num_shared_experts):
        raise UserError(
            f"--num-shared-experts {args.num_shared_experts}: the source has "
            f"{source.num_shared_experts} and keeps them; leave the flag out"
        )
    return Plan(active, source.num_shared_experts, source.mlp_hidden_size)


def plan_dense(args: argparse.Namespace, source: DiTConfig) -> Plan:
    """Return what becomes of a dense network, which the flags decide."""
    parts, width = args.granularity, source.mlp_hidden_size
    active = args.num_experts_per_tok or min(2 * parts, args.num_experts)
    shared = args.num_shared_experts or 0
    if active % parts or active > args.num_experts:
        raise UserError(
            f"--num-experts-per-tok {active} must be a multiple of --granularity {parts} and "
            f"at most --num-experts {args.num_experts}"
        )
    if args.shared == "split":
        width -= shared * source.hidden_size
        if not shared or width <= 0:
            raise UserError(
                f"--shared split with --num-shared-experts {shared}: expected 1 to "
                f"{math.ceil(source.mlp_ratio) - 1}, as the source's MLP is "
                f"{source.mlp_ratio:g} D wide"
            )
    return Plan(active, shared, width)


def check_room(config: DiTConfig, args: argparse.Namespace) -> None:
    """Refuse experts that no memory holds a block of, or no disk all of.

    Raises:
        UserError: naming the flag.
    """
    matrices = 3 if config.mlp_type == "swiglu" else 2
    itemsize = DTYPES[args.dtype].itemsize if args.dtype else 2  # at least
    weights = matrices * config.hidden_size * config.mlp_hidden_size
    block = config.num_experts * weights * itemsize
    process.check_memory(block, f"--num-experts {args.num_experts}, of which one block")
    free = shutil.disk_usage(Path(args.out).absolute().parent).free
    if config.depth * block > free:
        raise FileError(
            f"--out {args.out}: the experts take {config.depth * block / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} are free there"
        )


# ------------------------------------------------------------------------------ one MLP


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
    mlps: Sequence[Neurons], config: DiTConfig, parts: int, dtype: torch.dtype, copy: NoisyCopy
) -> dict[str, Tensor]:
    """Return the stacked experts: copies of each MLP, each cut into `parts`.

    A part gets 1 / parts of its copy's weight, so `down` is `parts` times as large; the biases of
    the parts, with those weights, add up to the bias.
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
                copy(down[e, c, g], part.down, scale=parts)
                if part.bias is not None:
                    copy(bias[e, c, g], part.bias)
    return {f"moe.experts.{name}": tensor.flatten(0, 2) for name, tensor in names.items()}


def write_shared(
    neurons: Neurons | None, config: DiTConfig, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the shared expert of a dense source: these neurons, or random ones of zero output.

    The routed experts keep the output bias.
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
        shared["fc2.bias"] = torch.zeros(hidden_size)
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
        by_copy = (draws * 2 - 1) * bound  # (1, C, D)
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


# ------------------------------------------------------------------------------ a whole model


def upcycle_block(
    tensors: dict[str, Tensor],
    source: DiTConfig,
    config: DiTConfig,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the tensors of one block of the result.

    Args:
        tensors: of the source's block, named without `blocks.i.`.
        source: config of the source.
        config: config of the result.
        args: flags of this script.
        generator: of everything random in this block.
    """
    wanted, mlps = DTYPES[args.dtype] if args.dtype else None, read_mlps(tensors, source)
    dtype = wanted or mlps[0].down.dtype
    unchanged = {n: place(n, t, "cpu", wanted) for n, t in tensors.items() if not is_mlp(n)}
    shared: dict[str, Tensor] = {}
    if source.num_experts == 0 and config.num_shared_experts:
        neurons, width = None, config.num_shared_experts * config.hidden_size
        if args.shared == "split":
            neurons = mlps[0].select(0, width)
            mlps = [mlps[0].select(width, source.mlp_hidden_size)]
        shared = write_shared(neurons, config, dtype, generator)
    router = write_router(
        tensors.get("moe.router.weight"), config, args.granularity, args.router_scale, generator
    )
    copy = NoisyCopy(args.noise, args.noise_share, generator)
    experts = write_experts(mlps, config, args.granularity, dtype, copy)
    return unchanged | {"moe.router.weight": router} | experts | shared


def is_mlp(name: str) -> bool:
    """Tell whether upcycling replaces this tensor of a block."""
    return name.startswith(("mlp.", "moe.experts.", "moe.router."))


@torch.no_grad()
def mlp_difference(
    old: dict[str, Tensor],
    source: DiTConfig,
    new: dict[str, Tensor],
    config: DiTConfig,
    tokens: Tensor,
) -> float:
    """Return how far the new MLP's output is from the old one's, relative to it, in float32.

    Args:
        old: tensors of the source's block.
        source: its config.
        new: tensors of the result's block.
        config: its config.
        tokens: (M, D) inputs of the MLP.
    """
    expected, found = (run_mlp(*pair, tokens) for pair in ((old, source), (new, config)))
    return ((found - expected).norm() / expected.norm()).item()


def run_mlp(tensors: dict[str, Tensor], config: DiTConfig, tokens: Tensor) -> Tensor:
    """Run (M, D) tokens through the MLP of a block given by its tensors, in float32."""
    with torch.device("meta"):
        block: nn.Module = DiTBlock(config).eval()
    mlp = block.get_submodule("moe" if config.num_experts else "mlp")
    prefix = "moe." if config.num_experts else "mlp."
    state = {n.removeprefix(prefix): t.float() for n, t in tensors.items() if n.startswith(prefix)}
    mlp.load_state_dict(state, assign=True)
    return mlp(tokens[None])[0][0] if config.num_experts else mlp(tokens)


def upcycle(weights: Weights, args: argparse.Namespace) -> tuple[DiTConfig, list[float]]:
    """Write the folder `args.out`.

    Args:
        weights: the source.
        args: flags of this script.

    Returns:
        The config of the result, and by how much each block's MLP differs (`mlp_difference`).

    Raises:
        UserError: a flag does not fit the source, or its weights are no numbers.
        FileError: there is something at `args.out`, or it can't be written.
    """
    config = plan_config(args, weights.config)
    check_room(config, args)
    differences: list[float] = []
    # Fused tensors, as experts of published files, are copies: what they were made of is paged out
    # too. A safetensors mapping needs none of this, it maps each tensor when it is read.
    mapped: dict[int | None, list[Tensor]] = defaultdict(list)
    if isinstance(weights.state, dict):
        for name, tensor in weights.state.items():
            mapped[block_index(name)].append(tensor)

    def blocks() -> Iterator[dict[str, Tensor]]:
        for index, tensors in by_block(weights.state):
            if index is None:
                add_pos_embed(tensors, weights.config)
                dtype = DTYPES[args.dtype] if args.dtype else None
                yield {name: place(name, t, "cpu", dtype) for name, t in tensors.items()}
                continue
            prefix = f"blocks.{index}."
            old = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            generator = torch.Generator().manual_seed((args.seed * 10_000 + index) % 2**64)
            new = upcycle_block(old, weights.config, config, args, generator)
            check_numbers(new, f"{weights.path}: block {index}")
            if args.check_tokens:
                tokens = torch.randn(args.check_tokens, config.hidden_size, generator=generator)
                difference = mlp_difference(old, weights.config, new, config, tokens)
                differences.append(difference)
            page_out(old.values())
            page_out(mapped.get(index, []))
            bar.update()
            yield {prefix + name: tensor for name, tensor in new.items()}

    settings = {**weights.settings, "upcycled_from": str(weights.path)}
    with tqdm(total=config.depth, desc="upcycle", unit="block") as bar:
        save_folder(args.out, blocks(), config, settings)
    return config, differences


def check_numbers(tensors: dict[str, Tensor], where: str) -> None:
    """Refuse a block that would draw nothing but noise or black.

    Raises:
        UserError: a weight is NaN, or larger than its type can say.
    """
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{where}: {name} has weights that are no {tensor.dtype} numbers")


def main(args: argparse.Namespace) -> None:
    """Upcycle and say how exactly."""
    check_new(args.out)
    known = known_fields(args.model, num_heads=args.num_heads)
    weights = open_weights(args.ckpt, ema=args.ema, known=known)
    config, differences = upcycle(weights, args)
    experts = f"{config.num_experts} experts, {config.num_experts_per_tok} active"
    shared = f"{config.num_shared_experts} shared, each {config.mlp_ratio:g} D wide"
    print(printable(f"{args.out}: {experts}, {shared}"))
    if differences:
        worst = max(range(len(differences)), key=differences.__getitem__)
        print(
            f"MLP outputs differ from the source's by {differences[worst]:.1e} of their size at "
            f"most (block {worst}, {args.check_tokens} random tokens)"
        )


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
