"""Draw a grid of images from a checkpoint.

    python sample.py --ckpt results/DiT-Ti-1-rf-digits
    python sample.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path V --cfg-scale 1.5
    python sample.py --ckpt G-16E2A --vae-path V --quantize int8  # or --offload disk

Our checkpoints say everything about the model, the objective and the data; for published files the
flags do.
"""

import argparse
import sys
from pathlib import Path

import torch

from common import process
from common.flags import FlagParser, flag, number, sampling_flags, sampling_options
from common.pictures import save_grid
from data import load_vae
from diffusion import create_diffusion
from models import DiT_models, DiTConfig
from offload import load_for_sampling
from weights import find_objective, load_settings

IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # DiT's own picture


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", required=True, help="checkpoint, run folder or published weights")
    data.add("--out", default="samples/sample.png", help="PNG to write")
    data.add("--vae-path", help="folder or hub id; default: the checkpoint's")
    data.add("--image-size", type=number(int, 1), help="pixels; checked against the checkpoint")
    data.add("--labels", nargs="+", help="class numbers or names; default: all, or 8 of ImageNet")
    data.add("--num-per-class", type=number(int, 1), help="images of each label; default by count")

    model = parser.group("Model")
    model.add("--model", choices=list(DiT_models), help="checked against the checkpoint")
    model.add("--num-classes", type=number(int, 1), help="checked against the checkpoint")
    model.add("--num-experts", type=number(int, 0), help="checked against the checkpoint")
    model.add("--num-experts-per-tok", type=number(int, 1), help="K of a published file; ours tell")
    model.add("--rf", default=None, **flag, help="objective of a published file; ours tell")
    model.add("--ema", default=True, **flag, help="averaged weights")
    model.add("--dtype", choices=list(process.DTYPES), help="of the weights; default: by hardware")
    model.add("--quantize", choices=["int8"], help="weights of the experts (needs torchao)")
    model.add("--offload", choices=["cpu", "disk"], help="where blocks wait for their turn")

    sampling_flags(parser)
    return parser


def parse_labels(args: argparse.Namespace, config: DiTConfig, class_names: list[str]) -> list[int]:
    """Turn `--labels` into class numbers.

    Raises:
        ValueError: for a label that is neither a known name nor in range.
    """
    if args.labels is None:
        many = config.num_classes > max(IMAGENET_LABELS)
        return IMAGENET_LABELS if many else list(range(min(config.num_classes, 10)))
    labels = []
    for text in args.labels:
        label = class_names.index(text) if text in class_names else None
        label = int(text) if label is None and text.isdigit() else label
        if label is None or label >= config.num_classes:
            raise ValueError(
                f"--labels {text}: expected a number in [0, {config.num_classes - 1}]"
                + (f" or one of {', '.join(class_names[:20])}" if class_names else "")
            )
        labels.append(label)
    return labels


def check_flags(args: argparse.Namespace, config: DiTConfig, image_size: int) -> None:
    """Compare flags that describe the model with what the checkpoint holds.

    Raises:
        ValueError: naming the first flag that contradicts it.
    """
    expected = {
        "num_classes": config.num_classes,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "image_size": image_size,
    }
    if args.model:
        with torch.device("meta"):
            built = DiT_models[args.model]().config
        for name in ("hidden_size", "depth", "patch_size"):
            if getattr(built, name) != getattr(config, name):
                raise ValueError(
                    f"--model {args.model} has {name} {getattr(built, name)}, "
                    f"{args.ckpt} has {getattr(config, name)}"
                )
    for name, value in expected.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise ValueError(f"--{name.replace('_', '-')} {given}: {args.ckpt} has {value}")


def main(args: argparse.Namespace) -> None:
    """Sample and write the picture."""
    device = process.pick_device()
    # A model that fills the memory must not keep what its loading freed.
    process.keep_freed_memory(args.quantize is None and args.offload is None)
    try:
        settings = load_settings(args.ckpt)
        model = load_for_sampling(
            args.ckpt,
            ema=args.ema,
            dtype=process.pick_dtype(args.dtype, device),
            device=device,
            quantize=args.quantize,
            offload=args.offload,
            known={"num_experts_per_tok": experts} if (experts := args.num_experts_per_tok) else {},
        )
        config = model.config
        objective = find_objective(settings, config, args.rf)
        vae_path = args.vae_path or settings.get("vae_path") or "stabilityai/sd-vae-ft-ema"
        vae = load_vae(vae_path, device=device, model_channels=config.in_channels)
        diffusion = create_diffusion(
            objective, learn_sigma=config.learn_sigma, x0_range=vae.x0_range
        )
        check_flags(args, config, config.input_size * vae.downsample)
        labels = parse_labels(args, config, settings.get("class_names", []))
        per_class = args.num_per_class or max(40 // len(labels), 1)
        y = torch.tensor(labels).repeat(per_class)
        shape = (len(y), config.in_channels, config.input_size, config.input_size)
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(shape, generator=generator)
        images = []
        for start in range(0, len(y), args.batch_size):
            part = slice(start, start + args.batch_size)
            latents = diffusion.sample(
                model,
                noise[part].to(device),
                y[part].to(device),
                **sampling_options(args),
                null_label=config.null_label,
                generator=generator,
                progress=True,
            )
            images.append(vae.decode(latents).cpu())
        save_grid(torch.cat(images), Path(args.out), columns=len(labels))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: error: {error}")
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{len(y)} images, one class a column, {diffusion.objective}, {dtype}: {args.out}")


if __name__ == "__main__":
    main(build_parser().parse_args())
