"""Draw a grid of images from a checkpoint.

    python sample.py --ckpt results/demo
    python sample.py --ckpt results/demo --labels 3 7 --num-per-class 20 --out 37.png
    python sample.py --model DiT-XL/2 --ckpt dit_moe_xl_8E2A.pt --vae-path V --cfg-scale 1.5
    python sample.py --ckpt G-16E2A --vae-path V --quantize int8  # or --offload disk
    torchrun --nproc_per_node=8 sample.py --ckpt G-16E2A --vae-path V --expert-parallel 8

Our checkpoints say everything about the model, the objective and the data; for published files the
flags do.
"""

import argparse
import math
import zlib
from pathlib import Path

from common.errors import UserError, one_line_errors
from common.flags import FlagParser, number, sampling_flags
from common.labels import label_numbers
from common.names import PICTURES
from sampling.flags import drawing_flags, drawing_options

IMAGENET_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # DiT's own picture
NUM_IMAGES = 40  # about, by default


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", required=True, help="Checkpoint, run folder (its latest) or published file.")
    data.add(
        "--out",
        metavar="FILE",
        help=f"Picture to write, {', '.join(PICTURES)}. Default: samples/ in the run's folder, "
        "named by checkpoint and flags.",
    )
    data.add("--vae-path", help="Folder or hub id of the autoencoder. Default: the checkpoint's.")
    data.add(
        "--image-size", type=number(int, 1), metavar="PIXELS", help="Checked with the checkpoint."
    )
    data.add(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="Numbers or names of the classes to draw. Default: the first 10, or 8 of ImageNet.",
    )
    data.add(
        "--num-per-class",
        type=number(int, 1),
        metavar="N",
        help=f"Images of each class. Default: about {NUM_IMAGES} in all.",
    )
    drawing_flags(parser, ranks=True)
    sampling_flags(parser)
    return parser


# ------------------------------------------------------------------------------ what to draw


def choose_labels(given: list[str] | None, num_classes: int, class_names: list[str]) -> list[int]:
    """Return the classes to draw, one a column.

    Args:
        given: what `--labels` says.
        num_classes: of the model.
        class_names: of its data, [] if they have none.

    Raises:
        UserError: a label is neither a known name nor in range.
    """
    if given is not None:
        return label_numbers(given, num_classes, class_names)
    return IMAGENET_LABELS if num_classes > max(IMAGENET_LABELS) else [*range(num_classes)][:10]


def columns_per_class(num_labels: int, per_class: int) -> int:
    """Return how many columns each class takes, so that the grid is as square as it can be."""
    low = max(1, math.isqrt(per_class // num_labels))

    def longer_than_wide(width: int) -> int:
        return abs(math.ceil(per_class / width) - width * num_labels)

    return min((low, low + 1), key=longer_than_wide)


def plan_grid(num_per_class: int | None, num_labels: int) -> tuple[int, int]:
    """Return the number of images of each class, and of the columns that they fill."""
    if num_per_class is not None:
        return num_per_class, columns_per_class(num_labels, num_per_class)
    per_class = max(NUM_IMAGES // num_labels, 1)
    width = columns_per_class(num_labels, per_class)
    return per_class - per_class % width, width  # no gaps in the last row


def default_out(args: argparse.Namespace, path: Path) -> Path:
    """Name the picture by all that decides it, beside its checkpoint.

    Args:
        args: of the script.
        path: of the checkpoint.
    """
    in_a_run = path.parent.name == "checkpoints"
    folder = (path.parents[1] if in_a_run else path.parent) / "samples"
    name = path.stem if path.suffix in (".pt", ".safetensors") else path.name
    parts = {True: [name], False: [name, "trained"]}.get(args.ema, [name, f"ema{args.ema}"])
    if args.labels is not None:
        labels = "-".join("".join(c if c.isalnum() else "_" for c in text) for text in args.labels)
        whole = f"{zlib.crc32(' '.join(args.labels).encode()):08x}"
        parts.append(labels if len(labels) <= 40 else f"{labels[:31]}-{whole}")
    parts += [f"{args.num_per_class}each"] if args.num_per_class else []
    parts += [args.sampler] if args.sampler else []
    parts += [f"{args.num_sampling_steps}steps"] if args.num_sampling_steps else []
    low, high = args.cfg_interval
    parts += [f"cfg{args.cfg_scale:g}"] + ([f"t{low:g}-{high:g}"] if (low, high) != (0, 1) else [])
    parts += [f"{args.cfg_channels}channels"] if args.cfg_channels else []
    parts += [f"rescale{args.cfg_rescale:g}"] if args.cfg_rescale else []
    parts += [f"shift{args.time_shift:g}"] if args.time_shift else []
    parts += [f"guide{zlib.crc32(args.guide_ckpt.encode()):08x}"] if args.guide_ckpt else []
    parts += [choice for choice in (args.dtype, args.quantize) if choice]
    return folder / f"{'-'.join(parts)}-seed{args.seed}.png"


def main(args: argparse.Namespace) -> None:
    """Draw the images and write the picture."""
    # Here, since torch takes seconds to import: --help and a mistyped flag need none of it.
    import torch

    from common import process
    from common.pictures import check_grid, check_picture_path, save_grid
    from sampling.grid import arrange, draw
    from sampling.opening import open_run

    if args.out:
        check_picture_path(args.out)
    rt = process.setup()
    if rt.world_size > 1 and args.expert_parallel is None:
        raise UserError(
            "sample.py draws in one process: start it without torchrun, or give --expert-parallel "
            f"{rt.world_size}"
        )
    # a model that fills the memory must not keep what its loading freed
    process.keep_freed_memory(args.quantize is None and args.offload is None)
    run = open_run(args.ckpt, device=rt.device, **drawing_options(args))
    out = check_picture_path(args.out or default_out(args, run.path))
    labels = choose_labels(args.labels, run.config.num_classes, run.class_names)
    per_class, width = plan_grid(args.num_per_class, len(labels))
    columns, count = width * len(labels), per_class * len(labels)
    check_grid(out, count, run.image_size, columns, f"--num-per-class {per_class}")
    images = draw(run, torch.tensor(labels).repeat(per_class), args, rt.device)
    if not rt.is_main:  # all have drawn the same
        process.finish()
        return
    known = dict(enumerate(run.class_names))
    names = [name for i in labels for name in (known.get(i, str(i)), *[""] * (width - 1))]
    save_grid(arrange(images, len(labels), width), out, columns=columns, column_names=names)
    order = "one class a column" if width == 1 else f"each class in {width} columns"
    dtype = process.long_name(run.model.dtype)
    print(f"{count} images, {order}, {run.diffusion.objective}, {dtype}: {out}")
    process.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
