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
from typing import Any

import torch

import runtime
from checkpoint import load_settings
from data import load_vae, save_grid
from diffusion import Diffusion, create_diffusion
from flags import FlagParser, flag, number
from models import DiT, DiT_models, DiTConfig
from offload import load_for_sampling

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
    model.add("--num-experts-per-tok", type=number(int, 1), help="checked likewise")
    model.add("--rf", default=None, **flag, help="objective of a published file; ours tell")
    model.add("--ema", default=True, **flag, help="averaged weights")
    model.add("--dtype", choices=list(runtime.DTYPES), help="of the weights; default: by hardware")
    model.add("--quantize", choices=["int8"], help="weights of the experts (needs torchao)")
    model.add("--offload", choices=["cpu", "disk"], help="where blocks wait for their turn")

    sampling = parser.group("Sampling")
    sampling.add("--sampler", help="euler, heun (rf); ddpm, ddim, dpm++ (ddpm)")
    sampling.add("--num-sampling-steps", type=number(int, 1), help="default: the sampler's own")
    sampling.add("--cfg-scale", type=number(float, 0), default=1.5, help="guidance; 1 = off")
    sampling.add("--cfg-channels", type=number(int, 1), help="guided; default: ddpm 3, rf all")
    sampling.add(
        "--cfg-interval", nargs=2, type=number(float, 0, 1), default=[0.0, 1.0], help="guided t"
    )
    sampling.add("--seed", type=int, default=0, help="of the noise")
    sampling.add("--batch-size", type=number(int, 1), default=64, help="images at once")
    return parser


def find_objective(args: argparse.Namespace, settings: dict[str, Any], model: DiT) -> Diffusion:
    """Return the objective of the checkpoint, or of `--rf` for a file that does not tell.

    Published files: those with QK norm (XL, G) are rectified flow, the others DDPM.

    Raises:
        ValueError: if `--rf` contradicts the checkpoint.
    """
    known = settings.get("objective")
    asked = None if args.rf is None else ("rf" if args.rf else "ddpm")
    if known and asked and known != asked:
        raise ValueError(f"--rf {args.rf}: {args.ckpt} was trained with {known}")
    objective = known or asked or ("rf" if model.config.qk_norm else "ddpm")
    return create_diffusion(objective, learn_sigma=model.config.learn_sigma)


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


def pick_dtype(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return `--dtype`, by default bf16 where it is native; float16 on a CPU becomes bf16 or fp32.

    Matmuls in float16 run 1000 times slower than in bfloat16 on CPUs without a kernel for it.
    """
    name = args.dtype or runtime.default_precision(device)
    if runtime.DTYPES[name] == torch.float16 and device.type == "cpu":
        name = runtime.default_precision(device)
        print(f"--dtype float16 has no fast kernels on a CPU: computing in {name}")
    return runtime.DTYPES[name]


def main(args: argparse.Namespace) -> None:
    """Sample and write the picture."""
    device = runtime.pick_device()
    try:
        settings = load_settings(args.ckpt)
        model = load_for_sampling(
            args.ckpt,
            ema=args.ema,
            dtype=pick_dtype(args, device),
            device=device,
            quantize=args.quantize,
            offload=args.offload,
        )
        config = model.config
        diffusion = find_objective(args, settings, model)
        vae_path = args.vae_path or settings.get("vae_path") or "stabilityai/sd-vae-ft-ema"
        vae = load_vae(vae_path, device=device)
        if vae.channels not in (None, config.in_channels):
            raise ValueError(
                f"--vae-path {vae_path} makes {vae.channels} latent channels, {args.ckpt} has "
                f"{config.in_channels}"
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
                sampler=args.sampler,
                num_steps=args.num_sampling_steps,
                cfg_scale=args.cfg_scale,
                null_label=config.null_label,
                cfg_channels=args.cfg_channels,
                cfg_interval=tuple(args.cfg_interval),
                generator=generator,
                progress=True,
            )
            images.append(vae.decode(latents).cpu())
        save_grid(torch.cat(images), Path(args.out), columns=len(labels))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"sample.py: error: {error}")
    print(f"{len(y)} images, one class a column, {diffusion.objective}: {args.out}")


if __name__ == "__main__":
    main(build_parser().parse_args())
