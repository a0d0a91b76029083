"""Turn a dense DiT, or a DiT-MoE, into a DiT-MoE with more experts and the same output.

    python upcycle.py --ckpt DiT-XL-2-256x256.pt --out xl-8E2A --num-experts 8 --dtype bfloat16
    python upcycle.py --ckpt DiT-XL-2-256x256.pt --out xl --config config/recipes/promoe.yaml
    python upcycle.py --ckpt dit_moe_s_8E2A.pt --out s-16E2A --num-experts 16
    torchrun --nproc_per_node=8 train.py --init-from xl-8E2A --data-path IMAGES

Experts keep the form of the source's MLP (SwiGLU, or GELU with biases), so that nothing is
approximated. How E experts come out of E_0 (1 for a dense source):

- Each is copied C = E / (E_0 * G) times; each copy is cut into G = `--granularity` finer experts of
  F / G neurons each, whose sum is the copy. Expert (e * C + c) * G + g is part g of copy c of e.
- The G parts of a copy have the same router row, so a token's K experts are K / G whole copies.
- The rows of a dense source's copies are random. Where the weights of the chosen have a fixed sum
  (--norm-topk-prob, the default), outputs are divided by it, and the result starts exact. Elsewhere
  by its mean over random tokens: the result is exact with `--shared whole` alone, which leaves the
  source's MLP to the shared expert, beside experts whose output begins with zero.
- The unconditional expert is a copy; blocks that stay dense keep their MLP.
- The rows of an expert's copies are its row plus or minus something common to all experts: a random
  direction per copy, `--router-scale` long, decides which copy serves a token. Only for tokens near
  the border between two copies does the output change.

Reads mapped, writes a block at a time, and measures for each block by how much the output of the
new MLP differs from the old one.

Source: Komatsuzaki et al., arXiv:2212.05055 (upcycling); He et al., arXiv:2410.07524 (equal router
rows for the parts of a copy).
"""

import argparse
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.hub import check_new, save_folder
from checkpoint.layouts import block_index, by_block, known_fields
from checkpoint.upcycled import (
    NoisyCopy,
    mlp_difference,
    read_mlps,
    start_router,
    write_experts,
    write_router,
    write_shared,
)
from checkpoint.weights import Weights, add_pos_embed, open_weights, page_out, place
from common import process
from common.errors import FileError, UserError, blamed_on, one_line_errors, printable
from common.flags import FlagGroup, FlagParser, dtype_flag, flag, model_size, number, seed
from common.process import DTYPES
from models import DiT_models, DiTConfig
from training.config_file import FLAG, ConfigParser
from training.flags import add_balance_flag, add_block_flags, add_router_flags
from training.flags import build_parser as training_parser

# What a dense source's flags decide, as in train.py.
MIXTURE = (
    *("affinity", "selection", "capacity", "exact_thresholds", "norm_topk_prob"),
    *("routed_scaling_factor", "balance", "unconditional_expert"),
)
BLOCKS = ("moe_blocks", "first_k_dense_replace")
KEPT = ("affinity", "selection", "balance", "unconditional_expert", *BLOCKS)  # those of DiT-MoE


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = ConfigParser(__doc__)
    parser.passed_over = training_parser(None).spellings
    data = parser.group("Data")
    data.add("--ckpt", required=True, help="Dense DiT or DiT-MoE: published, diffusers or ours.")
    data.add("--out", required=True, help="Folder to write; must not exist.")
    data.add("--ema", default=True, **flag, help="Take the averaged weights.")
    data.add("--dtype", **dtype_flag, help="Type of the new weights. Default: as the source.")
    data.add("--model", **model_size(DiT_models), help="Size of a published file, for its heads.")
    data.add("--num-heads", type=number(int, 1), help="Likewise, for files of other sizes.")
    data.add(
        FLAG,
        default=argparse.SUPPRESS,
        metavar="FILE",
        help="Flags of train.py, as of config/recipes/: those of the mixture are taken, the "
        "command line wins.",
    )
    moe = parser.group("MoE")
    add_mixture_flags(moe)
    add_block_flags(moe)
    add_router_flags(moe)
    add_balance_flag(moe)
    return parser


def add_mixture_flags(moe: FlagGroup) -> None:
    """Add the flags that say what becomes of the experts."""
    moe.add("--num-experts", type=number(int, 1), default=8, help="Number of experts, E.")
    moe.add(
        "--num-experts-per-tok",
        type=number(int, 1),
        help="Experts that a token uses, K. Default: 2 G of a dense source, else its K times G.",
    )
    finer = "Number of finer experts, G, that each copy is cut into. Default: by --mlp-ratio, or 1."
    moe.add("--granularity", type=number(int, 1), help=finer)
    width = "Width of an expert, in D. Default: what is left of the source's, over G."
    moe.add("--mlp-ratio", type=number(float, 0.01, 1024), metavar="RATIO", help=width)
    width = "Width of the shared expert of a dense source, in D. Default: 0."
    moe.add("--num-shared-experts", type=number(int, 0), help=width)
    moe.add(
        "--shared",
        choices=["zero", "split", "whole"],
        help="The shared expert begins with an output of zero, with neurons of the source, or with "
        "all of them, and then the others' outputs are zero. Default: split where that leaves "
        "experts of --mlp-ratio, else zero.",
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
    parts: int  # G
    shared: str  # the shared expert of a dense source: zero, split or whole


def make_plan(args: argparse.Namespace, source: DiTConfig) -> Plan:
    """Return what becomes of the source by the flags.

    Raises:
        UserError: naming the flag that does not fit the source.
    """
    plan = plan_mixture(args, source) if source.num_experts else plan_dense(args, source)
    units = max(source.num_experts, 1) * plan.parts
    if args.num_experts % units:
        raise UserError(
            f"--num-experts {args.num_experts} must be a multiple of {units}: the source's experts "
            f"({max(source.num_experts, 1)}) x --granularity {plan.parts}"
        )
    if plan.width % (8 * plan.parts):  # see DiTConfig
        raise UserError(
            f"--granularity {plan.parts} does not divide the {plan.width} neurons of an MLP into "
            "experts whose width is a multiple of 8"
        )
    return plan


def plan_config(args: argparse.Namespace, source: DiTConfig, plan: Plan) -> DiTConfig:
    """Return the config of the result.

    Raises:
        UserError: the flags make no mixture.
    """
    fields: dict[str, Any] = {}
    if source.num_experts == 0:
        given = {name: getattr(args, name) for name in (*MIXTURE, *BLOCKS)}
        given["balance"] = args.balance and [term for term in args.balance if term != "none"]
        fields = {"norm_topk_prob": True, "dense_mlp_ratio": source.mlp_ratio}
        fields |= {name: value for name, value in given.items() if value is not None}
    with blamed_on(f"--ckpt {args.ckpt}"):
        return replace(
            source,
            num_experts=args.num_experts,
            num_experts_per_tok=plan.num_experts_per_tok,
            num_shared_experts=plan.num_shared_experts,
            mlp_ratio=plan.width / plan.parts / source.hidden_size,
            **fields,
        )


def cut(args: argparse.Namespace, width: int, source: DiTConfig) -> int:
    """Return into how many parts a copy of so many neurons is cut, by the flags.

    Raises:
        UserError: --mlp-ratio is no such width.
    """
    if args.mlp_ratio is None:
        return args.granularity or 1
    wanted = round(args.mlp_ratio * source.hidden_size)
    parts = args.granularity or max(width // wanted, 1)
    if wanted * parts != width:
        raise UserError(
            f"--mlp-ratio {args.mlp_ratio:g}: experts are cut from {width / source.hidden_size:g} "
            f"D of the source's MLP, so it must be that over --granularity {args.granularity or ''}"
        )
    return parts


def plan_mixture(args: argparse.Namespace, source: DiTConfig) -> Plan:
    """Return what becomes of a MoE, which keeps all but the number of its experts."""
    for name in KEPT:
        if (found := getattr(source, name)) != getattr(DiTConfig(), name):
            raise UserError(f"--ckpt {args.ckpt} has {name} {found}: only DiT-MoE is upcycled")
    for name in (*MIXTURE, *BLOCKS):
        given, found = getattr(args, name), getattr(source, name)
        given = tuple(given) if isinstance(given, list) else given
        if given not in (None, found):
            said = f"--{name.replace('_', '-')} {given}"
            raise UserError(f"{said}: the source has experts and {name} {found}, and keeps it")
    parts = cut(args, source.mlp_hidden_size, source)
    active = source.num_experts_per_tok * parts
    if args.num_experts_per_tok not in (None, active):
        raise UserError(
            f"--num-experts-per-tok {args.num_experts_per_tok}: a source with "
            f"{source.num_experts_per_tok} active experts and --granularity {parts} "
            f"gives {active}; leave the flag out"
        )
    if args.num_shared_experts not in (None, source.num_shared_experts):
        raise UserError(
            f"--num-shared-experts {args.num_shared_experts}: the source has "
            f"{source.num_shared_experts} and keeps them; leave the flag out"
        )
    return Plan(active, source.num_shared_experts, source.mlp_hidden_size, parts, "zero")


def plan_dense(args: argparse.Namespace, source: DiTConfig) -> Plan:
    """Return what becomes of a dense network, which the flags decide."""
    hidden_size, width = source.hidden_size, source.mlp_hidden_size
    shared = args.num_shared_experts or 0
    left = width - shared * hidden_size
    fits = bool(shared and args.mlp_ratio) and left == round((args.mlp_ratio or 0) * hidden_size)
    kind = args.shared or ("split" if fits else "zero")
    if kind == "whole" and left:
        raise UserError(
            f"--shared whole with --num-shared-experts {shared}: expected "
            f"{width / hidden_size:g}, the width of the source's MLP in D"
        )
    if kind == "split" and not (shared and left > 0):
        raise UserError(
            f"--shared split with --num-shared-experts {shared}: expected 1 to "
            f"{-(-width // hidden_size) - 1}, as the source's MLP is {source.mlp_ratio:g} D wide"
        )
    width = left if kind == "split" else width
    parts = cut(args, width, source)
    active = args.num_experts_per_tok or min(2 * parts, args.num_experts)
    by_token = args.selection in (None, "token_choice") and kind != "whole"
    if (by_token and active % parts) or active > args.num_experts:
        raise UserError(
            f"--num-experts-per-tok {active} must be a multiple of --granularity {parts} and "
            f"at most --num-experts {args.num_experts}"
        )
    return Plan(active, shared, width, parts, kind)


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
    needed = sum(config.is_moe_block(index) for index in range(config.depth)) * block
    if needed > free:
        raise FileError(
            f"--out {args.out}: the experts take {needed / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} are free there"
        )


# ------------------------------------------------------------------------------ a whole model


def upcycle_block(
    tensors: dict[str, Tensor],
    source: DiTConfig,
    config: DiTConfig,
    plan: Plan,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the tensors of one block of the result, of one with experts.

    Args:
        tensors: of the source's block, named without `blocks.i.`.
        source: config of the source.
        config: config of the result.
        plan: see `make_plan`.
        args: flags of this script.
        generator: of everything random in this block.
    """
    wanted, mlps = DTYPES[args.dtype] if args.dtype else None, read_mlps(tensors, source)
    dtype = wanted or mlps[0].down.dtype
    unchanged = {n: place(n, t, "cpu", wanted) for n, t in tensors.items() if not is_mlp(n)}
    shared: dict[str, Tensor] = {}
    if source.num_experts == 0 and config.num_shared_experts:
        neurons, width = None, config.num_shared_experts * config.hidden_size
        if plan.shared == "whole":
            neurons = mlps[0]
        if plan.shared == "split":
            neurons = mlps[0].select(0, width)._replace(bias=None)
            mlps = [mlps[0].select(width, source.mlp_hidden_size)]
        shared = write_shared(neurons, config, dtype, generator)
    rows, alike = tensors.get("moe.router.weight"), 1 if plan.shared == "whole" else plan.parts
    matrix = write_router(rows, config, alike, args.router_scale, generator)
    router, scale = {"moe.router.weight": matrix}, 1.0
    if rows is None:
        router, total = start_router(matrix, config, generator)
        scale = 0.0 if plan.shared == "whole" else 1 / total
    copy = NoisyCopy(args.noise, args.noise_share, generator)
    experts = write_experts(mlps, config, plan.parts, dtype, copy, scale)
    return unchanged | router | experts | shared


def is_mlp(name: str) -> bool:
    """Tell whether upcycling replaces this tensor of a block."""
    return name.startswith(("mlp.", "moe.experts.", "moe.router."))


def upcycle(
    weights: Weights, args: argparse.Namespace
) -> tuple[DiTConfig, list[float], list[float]]:
    """Write the folder `args.out`.

    Args:
        weights: the source.
        args: flags of this script.

    Returns:
        The config of the result, and by how much each block's MLP differs (`mlp_difference`) on an
        image with a class and, where an unconditional expert serves it, on one without.

    Raises:
        UserError: a flag does not fit the source, or its weights are no numbers.
        FileError: there is something at `args.out`, or it can't be written.
    """
    plan = make_plan(args, weights.config)
    config = plan_config(args, weights.config, plan)
    check_room(config, args)
    differences: list[float] = []
    of_null: list[float] = []
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
            if index is None or not config.is_moe_block(index):
                dtype = DTYPES[args.dtype] if args.dtype else None
                yield {name: place(name, t, "cpu", dtype) for name, t in tensors.items()}
                if index is not None:
                    differences.append(0.0)
                    bar.update()
                continue
            prefix = f"blocks.{index}."
            old = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            generator = torch.Generator().manual_seed((args.seed * 10_000 + index) % 2**64)
            new = upcycle_block(old, weights.config, config, plan, args, generator)
            check_numbers(new, f"{weights.path}: block {index}")
            if args.check_tokens:
                tokens = torch.randn(args.check_tokens, config.hidden_size, generator=generator)
                given = (old, weights.config, new, config, tokens)
                differences.append(mlp_difference(*given))
                if config.unconditional_expert:
                    of_null.append(mlp_difference(*given, is_null=True))
            page_out(old.values())
            page_out(mapped.get(index, []))
            bar.update()
            yield {prefix + name: tensor for name, tensor in new.items()}

    settings = {**weights.settings, "upcycled_from": str(weights.path)}
    with tqdm(total=config.depth, desc="upcycle", unit="block") as bar:
        save_folder(args.out, blocks(), config, settings)
    return config, differences, of_null


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
    config, differences, of_null = upcycle(weights, args)
    more = " and an unconditional one" if config.unconditional_expert else ""
    experts = f"{config.num_experts} experts{more}, {config.num_experts_per_tok} active"
    shared = f"{config.num_shared_experts} shared, each {config.mlp_ratio:g} D wide"
    print(printable(f"{args.out}: {experts}, {shared}"))
    if args.check_tokens:
        worst = max(range(len(differences)), key=differences.__getitem__)
        print(
            f"MLP outputs differ from the source's by {differences[worst]:.1e} of their size at "
            f"most (block {worst}, {args.check_tokens} random tokens)"
        )
    if of_null:
        print(f"of images without a class, which the unconditional one serves: {max(of_null):.1e}")


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
