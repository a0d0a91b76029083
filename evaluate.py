"""Draw many samples of a checkpoint and say how close they are to real images.

    python evaluate.py --ckpt results/fashion --cfg-scale 3 --num-samples 1000
    torchrun --nproc_per_node=8 evaluate.py --ckpt results/RUN --num-sampling-steps 250 \\
      --reference VIRTUAL_imagenet256_labeled.npz --inception-weights inception.pth
    python evaluate.py --images samples.npz --reference imagenet/train --image-size 256

Every class gets the same number of samples (to within one). A sample's noise depends on --seed and
its number only, so the samples do not depend on the ranks. They are written as they come, and the
same command goes on where it stopped; then they are one .npz (arr_0) as ADM's evaluation reads it.

FID, sFID and IS need Inception's features. Digits and Fashion-MNIST are judged by those of a
classifier trained on them, and the distance is then called FD: compare it with nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.state import checkpoint_hash, resolve_checkpoint
from common import process
from common.errors import UserError, one_line_errors
from common.files import atomic_write, make_writable
from common.flags import FlagParser, number, sampling_flags, sampling_options
from data import ImageDataset, load_dataset
from data.latent_cache import vae_identity
from evaluation.classifiers import EPOCHS
from evaluation.comparison import (
    Look,
    Witness,
    check_enough,
    check_source,
    classified_right,
    collect,
    describe_source,
    floor_distance,
    open_images,
    reference_statistics,
)
from evaluation.encoders import DEFAULT_BACKBONE
from evaluation.features import find_inception_weights
from evaluation.flags import REFERENCES, features_flag
from evaluation.image_sets import DatasetSet, FolderSet, ImageSet, NpzSet
from evaluation.judging import features_for, open_eyes
from evaluation.metrics import Statistics, compare
from evaluation.sample_files import SampleFiles, read_object, write_object
from sampling.flags import drawing_flags, drawing_options
from sampling.loss import loss_on_images
from sampling.numbered import draw_numbered
from sampling.opening import open_run

LOSS_IMAGES = 2000  # real images whose loss is measured, LOSS_DRAWS times each
LOSS_DRAWS = 4


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", help="Checkpoint, run folder or published weights whose samples to judge.")
    data.add(
        "--images",
        help="Folder of images or .npz to judge instead. A folder's are cropped by --image-size.",
    )
    data.add(
        "--num-samples",
        type=number(int, 2, 10**7),
        default=50000,
        metavar="N",
        help="Number of samples of each seed, spread evenly over the classes.",
    )
    data.add(
        "--num-seeds",
        type=number(int, 1, 1000),
        default=1,
        metavar="N",
        help="How often to repeat, with --seed, --seed + 1 and so on.",
    )
    data.add(
        "--out", help="Folder of the results. Default: one in results/evaluation named by all this."
    )
    data.add("--vae-path", help="Folder or hub id of the autoencoder. Default: the checkpoint's.")
    data.add(
        "--fashion-mnist-root",
        help="Folder of the four idx files. Default: the checkpoint's, Debian's or ./downloads.",
    )
    _reference_flags(parser)
    drawing_flags(parser, offload=False, ranks=True)
    sampling_flags(parser, batch_size=100)
    return parser


def _reference_flags(parser: FlagParser) -> None:
    real = parser.group("Real images")
    real.add(
        "--reference",
        help="Real images to compare with: data set, class folder or .npz. Default: what the "
        "model learnt from.",
    )
    real.add(
        "--test-data",
        help="Other real images, whose distance is the floor. Default: the data's test split.",
    )
    real.add(
        "--image-size",
        type=number(int, 1, 8192),
        metavar="S",
        help="Pixels to which images of folders are cropped. Default: the checkpoint's; without "
        "one 256, and those of --images stay as they are.",
    )
    real.add(
        "--features",
        type=features_flag,
        metavar="NETWORK",
        help="Network whose features are compared: inception, timm:NAME or timm:NAME:FILE for any "
        "encoder of timm, or classifier, trained on the reference. Default: classifier for "
        "digits and fashion-mnist, else inception.",
    )
    real.add(
        "--backbone",
        default=DEFAULT_BACKBONE,
        metavar="timm:NAME",
        help="Encoder of timm that --features classifier reads other data with.",
    )
    real.add("--inception-weights", help="File of torch-fidelity. Default: it is downloaded.")
    real.add(
        "--cache",
        default=REFERENCES,
        help="Folder of trained classifiers and of the statistics of references.",
    )


def check_flags(args: argparse.Namespace) -> None:
    """Refuse what can be known to be wrong before a network is loaded.

    Raises:
        UserError: naming the flag.
    """
    if (args.ckpt is None) == (args.images is None):
        raise UserError("--ckpt or --images: give one of them")
    if args.images and args.reference is None:
        raise UserError("--reference: give the real images; nothing here says them")
    if args.cfg_interval[0] > args.cfg_interval[1]:
        raise UserError(f"--cfg-interval {args.cfg_interval}: the second is less than the first")
    for flag, path in (("--reference", args.reference), ("--test-data", args.test_data)):
        if path is not None:
            check_source(path, flag)
    weights = args.inception_weights
    if weights is not None and not Path(weights).is_file():
        raise UserError(f"--inception-weights: {weights} does not load: no such file")
    judged_by = args.features or (args.reference and features_for(args.reference))
    if judged_by == "inception" and weights is None:
        find_inception_weights()


# ------------------------------------------------------------------------------ samples


class SampleRun:
    """A checkpoint ready to draw any of its samples."""

    def __init__(self, args: argparse.Namespace, rt: process.Runtime) -> None:
        """Load the checkpoint; fills in what `args` leave to it.

        Of a run that still trains, all ranks load the checkpoint that the main one finds, and
        `args.ckpt` becomes its path.

        Raises:
            UserError: a flag does not fit the checkpoint.
            FileNotFoundError: there is no such checkpoint.
        """
        self.args, self.rt = args, rt
        given, found = Path(args.ckpt), process.call_on_main(resolve_checkpoint, args.ckpt)
        self.name = given.stem if found == given else f"{given.name}-{found.stem}"
        args.ckpt = str(found)
        self.opened = open_run(args.ckpt, device=rt.device, **drawing_options(args))
        # Once, since a run that trains deletes its old checkpoints.
        self.hash = process.call_on_main(checkpoint_hash, self.opened.path)
        self.guide_hash = args.guide_ckpt and process.call_on_main(checkpoint_hash, args.guide_ckpt)
        diffusion = self.opened.diffusion
        args.sampler = args.sampler or diffusion.default_sampler
        if args.sampler not in diffusion.samplers:
            accepted = ", ".join(diffusion.samplers)
            raise UserError(f"--sampler {args.sampler}: {args.ckpt} takes one of {accepted}")
        steps = diffusion.default_num_steps.get(args.sampler)
        args.num_sampling_steps = args.num_sampling_steps or steps
        args.image_size = self.opened.image_size
        self.labels = torch.arange(args.num_samples) % self.opened.config.num_classes

    def identity(self, seed: int) -> dict[str, Any]:
        """Return all that decides the samples of a seed."""
        names = (
            *("ema", "num_samples", "batch_size", "sampler", "num_sampling_steps"),
            *("cfg_scale", "cfg_channels", "cfg_interval", "quantize"),
        )
        x0_range = self.opened.diffusion.x0_range
        later = {
            "cfg_rescale": self.args.cfg_rescale,
            "time_shift": self.args.time_shift,
            "guide": self.guide_hash,
            "compile": self.args.compile,
        }
        return {
            "checkpoint": self.hash,
            "vae": vae_identity(self.opened.vae),
            "seed": seed,
            "dtype": str(self.opened.model.dtype),
            "x0_range": list(x0_range) if x0_range else None,
            **{name: getattr(self.args, name) for name in names},
            **{name: value for name, value in later.items() if value},  # else as before them
        }

    def draw(self, seed: int, first: int, stop: int) -> Tensor:
        """Draw samples first..stop-1 of a seed, (N, C, S, S) uint8 on the CPU."""
        opened = self.opened
        return draw_numbered(
            opened.model, opened.config, opened.diffusion, opened.vae, self.labels[first:stop],
            seed=seed, first=first, device=self.rt.device, guide=opened.guide,
            **sampling_options(self.args),
        )  # fmt: skip


def draw_samples(samples: SampleRun, seed: int, out: Path) -> tuple[Path, float]:
    """Draw what is lacking of a seed's samples, over all ranks.

    Returns:
        Their .npz and the seconds that one of them took on the main rank, the median over batches.

    Raises:
        UserError: there are samples of another command.
    """
    args, rt = samples.args, samples.rt
    files, identity = SampleFiles(out, seed), samples.identity(seed)
    seconds = files.check(identity)
    process.barrier()  # all have looked
    if process.from_main(files.npz.exists()):
        return files.npz, process.from_main(seconds)
    if rt.is_main:
        write_object(files.claim, identity)
    starts = range(0, args.num_samples, args.batch_size)
    lacking = process.from_main([first for first in starts if not files.part(first).exists()])
    mine = process.turns(lacking, rt, together=args.expert_parallel is not None)
    laps: list[float] = []
    for first in tqdm(mine, desc=f"samples, seed {seed}", unit="batch", disable=not rt.is_main):
        if first is None:  # only the experts here are needed
            samples.draw(seed, starts[0], starts[0] + 1)
        else:
            began = time.monotonic()
            images = samples.draw(seed, first, first + args.batch_size)
            laps.append((time.monotonic() - began) / len(images))
            with atomic_write(files.part(first)) as temp, open(temp, "wb") as file:
                np.save(file, images.numpy())
    process.barrier()
    seconds = statistics.median(laps) if laps else seconds
    if rt.is_main:
        classes = samples.opened.config.num_classes
        files.join(starts, samples.labels, classes if classes <= 20 else 10)
        write_object(files.claim, identity | {"seconds_per_sample": seconds})
    process.barrier()
    return files.npz, process.from_main(seconds)


def loss_of(samples: SampleRun, dataset: ImageDataset) -> float:
    """Return the objective's mean loss on real images, with the same times and noise every time."""
    opened, counts = samples.opened, {"num_images": LOSS_IMAGES, "num_draws": LOSS_DRAWS}
    return loss_on_images(opened.model, opened.diffusion, dataset, opened.vae, samples.rt, **counts)


# ------------------------------------------------------------------------------ main


def open_out(args: argparse.Namespace, samples: SampleRun | None) -> Path:
    """Return the folder of the results, to which they can be written.

    Raises:
        UserError: it can't be written to, or has a metrics.json of another program.
    """
    out = Path(args.out or default_out(args, samples))

    def check() -> None:
        make_writable(out, "--out")
        found = out / "metrics.json"
        if found.exists() and not {"flags", "values", "facts"} <= read_object(found).keys():
            raise UserError(f"{found} is not of this script; give another --out")

    process.call_on_main(check)
    return out


def default_out(args: argparse.Namespace, samples: SampleRun | None) -> str:
    """Name the folder by what is judged, and how it is drawn."""
    if samples is None:
        return f"results/evaluation/{Path(args.images).stem}"
    low, high = args.cfg_interval
    interval = "" if (low, high) == (0.0, 1.0) else f"-t{low:g}-{high:g}"
    name = f"{args.sampler}{args.num_sampling_steps}-cfg{args.cfg_scale:g}{interval}"
    name += f"-rescale{args.cfg_rescale:g}" if args.cfg_rescale else ""
    name += f"-shift{args.time_shift:g}" if args.time_shift else ""
    name += f"-guide{samples.guide_hash[:8]}" if samples.guide_hash else ""
    name += f"-{args.quantize}" if args.quantize else ""
    return f"results/evaluation/{samples.name}-{name}-{args.num_samples}"


def labels_to_read(samples: SampleRun, reference: ImageSet) -> Tensor:
    """Return the number that the reference has for the class of each sample, (n,).

    Raises:
        UserError: the reference lacks a class of the checkpoint.
    """
    names = samples.opened.class_names
    known = reference.dataset.class_names if isinstance(reference, DatasetSet) else names
    if not names or not known or known == names:
        return samples.labels
    if lost := [name for name in names if name not in known]:
        raise UserError(f"--reference: it has no class {lost[0]!r}, which the checkpoint draws")
    return torch.tensor([known.index(name) for name in names])[samples.labels]


class Judged(NamedTuple):
    """A set of images to judge."""

    name: str
    images: ImageSet
    seconds: float | None = None  # that a sample took


def open_judged(path: Path, image_size: int | None) -> list[Judged]:
    """Open `--images`; their sizes are compared here, before a network is loaded."""
    images = NpzSet(path) if path.suffix == ".npz" else FolderSet(path, image_size)
    check_enough(images)
    return [Judged(path.name, images)]


def open_real(args: argparse.Namespace, settings: Any) -> tuple[ImageSet, ImageSet | None]:
    """Open the reference, and other real images if there are any; fills in what `args` leave."""
    args.reference = args.reference or settings.get("data_path")
    if args.reference is None:
        raise UserError("--reference: give the real images; nothing here says them")
    args.fashion_mnist_root = args.fashion_mnist_root or settings.get("fashion_mnist_root")
    check_source(args.reference, "--reference")
    named = args.test_data is None and args.reference in EPOCHS
    wanted = [(args.reference, "train")]
    if others := args.reference if named else args.test_data:
        wanted.append((others, "test" if named else "train"))
    options = {"image_size": args.image_size, "fashion_mnist_root": args.fashion_mnist_root}
    sets = [open_images(path, split=split, **options) for path, split in wanted]
    for images in sets:
        check_enough(images)
    return sets[0], sets[1] if len(sets) == 2 else None


def format_result(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table: a row a measure, a column a seed, then mean and deviation."""
    columns = result["values"]
    names = list(columns)
    several = len(names) > 1
    rows = [["", *names, *(["mean", "std"] if several else [])]]
    for measure in columns[names[0]]:
        values = [columns[name][measure] for name in names]
        spread = [statistics.mean(values), statistics.stdev(values)] if several else []
        rows.append([measure, *(f"{value:.4f}" for value in (*values, *spread))])
    width = max(len(row[0]) for row in (*rows, *([name] for name in result["facts"])))
    for row in rows:
        yield row[0].ljust(width) + "".join(text.rjust(12) for text in row[1:])
    for name, value in result["facts"].items():
        yield f"{name.ljust(width)}{value:12.4f}"


def draw_seeds(samples: SampleRun, out: Path) -> list[Judged]:
    """Draw the samples of all seeds."""
    first = samples.args.seed
    seeds = range(first, first + samples.args.num_seeds)
    drawn = {seed: draw_samples(samples, seed, out) for seed in seeds}
    return [
        Judged(f"seed {seed}", NpzSet(path), seconds) for seed, (path, seconds) in drawn.items()
    ]


def measure(
    judged: Judged,
    real: Statistics | None,
    look: Look,
    labels: Tensor | None = None,
    witness: Witness | None = None,
) -> dict[str, float]:
    """Compare a set with real images; the values are the main rank's.

    Args:
        judged: the set.
        real: statistics of the reference, on the main rank.
        look: how images are looked at.
        labels: (n,) the classes that samples were asked for.
        witness: reads them.
    """
    found = collect(judged.images, look)
    values = compare(found, real, look.extractor.name) if found and real else {}
    if labels is not None and witness is not None:
        right = classified_right(witness, judged.images, labels, look)
        values["read as the class asked for"] = right
    if judged.seconds is not None:
        values["seconds per sample"] = judged.seconds
    return values


def facts_of(
    args: argparse.Namespace, samples: SampleRun | None, witness: Witness | None
) -> dict[str, float]:
    """Return what is worth knowing besides the values of each seed."""
    if witness is None:
        return {}
    facts = {"real test images read right": witness.accuracy}
    if samples and args.reference in EPOCHS:
        root = args.fashion_mnist_root
        test = load_dataset(args.reference, split="test", fashion_mnist_root=root)
        facts["loss on test images"] = loss_of(samples, test)
    return facts


def main(args: argparse.Namespace) -> None:
    """Draw, look, compare; print the table, save it as metrics.json."""
    rt = process.setup(process.LONG_WAIT)
    check_flags(args)
    judged = open_judged(Path(args.images), args.image_size) if args.images else []
    samples = SampleRun(args, rt) if args.ckpt else None
    reference, others = open_real(args, samples.opened.settings if samples else {})
    out = open_out(args, samples)
    args.features = args.features or features_for(args.reference)
    witness, look = open_eyes(
        args.features, args.reference, reference, batch_size=args.batch_size,
        backbone=args.backbone, inception_weights=args.inception_weights, cache=args.cache,
        fashion_mnist_root=args.fashion_mnist_root, rt=rt,
    )  # fmt: skip

    judged = draw_seeds(samples, out) if samples else judged
    labels = labels_to_read(samples, reference) if samples and witness else None
    source = describe_source(args.reference, args.fashion_mnist_root)
    real = reference_statistics(reference, look, source=source, cache=Path(args.cache))
    values = {one.name: measure(one, real, look, labels, witness) for one in judged}
    facts: dict[str, float] = {}
    if others:
        most = max(len(one.images) for one in judged)
        facts = floor_distance(others, real, look, num_images=most)
    facts |= facts_of(args, samples, witness)
    if rt.is_main:
        result = {"flags": vars(args), "out": str(out), "values": values, "facts": facts}
        print("\n".join(format_result(result)))
        write_object(out / "metrics.json", result)
        print(f"samples, picture and metrics.json: {out}")
    process.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
