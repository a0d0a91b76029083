"""Write the weights of a run or a file, of any layout, in another layout.

    python convert.py results/RUN model.safetensors          # one file, the averaged weights
    python convert.py results/RUN published.pt               # as the published code reads it
    python convert.py results/RUN folder                     # for DiT.from_pretrained, push_to_hub
    python convert.py results/RUN pipe --pipeline            # for diffusers
    python convert.py results/RUN space --space              # app.py as a Hugging Face Space
    python convert.py dit_moe_xl_8E2A.pt XL-folder

The name of DST says what it becomes. Whatever carries checksums is compared with them, every tensor
with the config; nothing is overwritten.
"""

import argparse
from pathlib import Path

from checkpoint.hub import (
    check_new,
    our_blocks,
    save_file,
    save_folder,
    save_pipeline,
    save_published,
)
from checkpoint.layouts import check_told, known_fields
from checkpoint.space import save_space
from checkpoint.state import ACCEPTED
from checkpoint.weights import Weights, find_vae_path, open_weights, verify_weights
from common.errors import UserError, one_line_errors
from common.flags import FlagParser, average_flag, dtype_flag, model_size, number
from common.process import DTYPES
from models import DiT_models


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    parser.add_argument("src", metavar="SRC", help=ACCEPTED)
    parser.add_argument(
        "dst",
        metavar="DST",
        help="what to write: .safetensors (ours), .pt (published layout, its config beside it as "
        ".json) or a folder (ours, in shards)",
    )
    result = parser.group("Result")
    result.add("--pipeline", action="store_true", help="Make DST a diffusers pipeline folder.")
    result.add("--space", action="store_true", help="Make DST a Hugging Face Space of app.py.")
    result.add(
        "--ema",
        **average_flag,
        help="Take the averaged weights, or those of this decay, if SRC has them.",
    )
    result.add("--dtype", **dtype_flag, help="Of the weights. Default: as SRC has them.")
    result.add(
        "--attention",
        choices=["qkv", "Wqkv"],
        help="Names in a .pt. Default: Wqkv for models with QK norm, as XL and G have it.",
    )
    result.add("--vae-path", help="Of a pipeline or Space. Default: as in training.")

    source = parser.group("What a published SRC does not tell")
    source.add(
        "--model", **model_size(DiT_models), help="Its size, which tells the attention heads."
    )
    source.add("--num-heads", type=number(int, 1), metavar="N", help="Attention heads.")
    source.add(
        "--num-experts-per-tok", type=number(int, 1), metavar="K", help="Active experts, else 2."
    )
    return parser


def check_destination(args: argparse.Namespace) -> None:
    """Refuse a DST that is taken or does not fit the flags, before anything is read.

    Raises:
        UserError: naming it.
    """
    check_new(args.dst)
    suffix = Path(args.dst).suffix
    if args.pipeline and args.space:
        raise UserError("--pipeline and --space write different folders; choose one")
    flag = "--space" if args.space else "--pipeline"
    if (args.pipeline or args.space) and suffix in (".pt", ".safetensors"):
        raise UserError(f"{flag} writes a folder, but {args.dst} is named like a file")
    if args.attention and suffix != ".pt":
        raise UserError(f"--attention {args.attention}: only of a .pt, and DST is {args.dst}")
    if args.vae_path and not (args.pipeline or args.space):
        raise UserError(f"--vae-path {args.vae_path}: only with --pipeline or --space")


def write(args: argparse.Namespace, weights: Weights) -> str:
    """Write DST; returns what it has become."""
    wanted, suffix = DTYPES[args.dtype] if args.dtype else None, Path(args.dst).suffix
    config, settings = weights.config, weights.settings
    if args.pipeline:
        vae_path = find_vae_path(settings, args.vae_path)
        save_pipeline(args.dst, weights, vae_path, wanted)
        return f"diffusers pipeline, VAE {vae_path}"
    if args.space:
        vae_path = find_vae_path(settings, args.vae_path)
        save_space(args.dst, weights, vae_path, wanted)
        return f"Hugging Face Space, VAE {vae_path}; try it: python {args.dst}/app.py"
    if suffix == ".pt":
        flash = config.qk_norm if args.attention is None else args.attention == "Wqkv"
        save_published(args.dst, weights, flash_attention=flash, dtype=wanted)
        return f"published layout, attn.{'Wqkv/out_proj' if flash else 'qkv/proj'}; .json beside it"
    if suffix == ".safetensors":
        save_file(args.dst, our_blocks(weights, wanted), config, settings)
        return "our layout"
    save_folder(args.dst, our_blocks(weights, wanted), config, settings)
    return "our layout, folder for DiT.from_pretrained"


def main(args: argparse.Namespace) -> None:
    """Open, verify, write."""
    check_destination(args)
    told = {"num_heads": args.num_heads, "num_experts_per_tok": args.num_experts_per_tok}
    weights = open_weights(args.src, ema=args.ema, known=known_fields(args.model, **told))
    check_told(args.src, told | {"model": args.model}, weights.config)
    verify_weights(weights)
    result = write(args, weights)
    kind = f"{weights.kind} weights" if weights.kind else "weights"
    print(f"{args.dst}: {kind} of {weights.path}, {result}")


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
