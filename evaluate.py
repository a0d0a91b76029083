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
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import checkpoint_hash
from classifiers import EPOCHS, Classifier, load_classifier, predict
from common import process
from common.files import atomic_write
from common.flags import FlagParser, number, sampling_flags, sampling_options
from common.pictures import save_grid
from data import ImageDataset, cache_index, load_dataset
from diffusion import Diffusion
from image_sets import DatasetSet, FolderSet, ImageSet, NpzSet, Spread, save_npz
from latent_cache import vae_identity
from metrics import (
    ClassifierExtractor,
    Extractor,
    InceptionExtractor,
    Statistics,
    StatisticsBuilder,
    compare,
    frechet_distance,
)
from sampling.opening import drawing_flags, drawing_options, open_run

LOSS_IMAGES = 2000  # real images whose loss is measured, LOSS_DRAWS times each
LOSS_DRAWS = 4


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", help="checkpoint, run folder or published weights")
    data.add("--images", help="judge this folder or .npz instead")
    data.add("--num-samples", type=number(int, 2), default=50000, help="spread over the classes")
    data.add("--num-seeds", type=number(int, 1), default=1, help="repeat with seed, seed + 1, ...")
    data.add("--out", help="folder; default: results/evaluation/ and the name of all this")
    data.add("--vae-path", help="folder or hub id; default: the checkpoint's")
    data.add("--fashion-mnist-root", help="folder of the idx files; default: Debian's, ./data")

    real = parser.group("Real images")
    real.add("--reference", help="data set, folder or .npz; default: what the model learnt from")
    real.add("--test-data", help="other real images, for the floor; default: the data's test split")
    real.add("--image-size", type=number(int, 1), help="of folders; default: the checkpoint's, 256")
    real.add("--features", choices=["inception", "classifier"], help="default: by the data")
    real.add("--inception-weights", help="torch-fidelity's file; default: download")
    real.add("--cache", default="results/references", help="classifiers, reference statistics")

    drawing_flags(parser, offload=False)
    sampling_flags(parser, batch_size=100)
    return parser


# ------------------------------------------------------------------------------ samples


class Sampler:
    """A checkpoint ready to draw any of its samples."""

    def __init__(self, args: argparse.Namespace, run: process.Runtime) -> None:
        """Load the checkpoint; fills in what `args` leave to it.

        Raises:
            ValueError: a flag does not fit the checkpoint.
            FileNotFoundError: there is no such checkpoint.
        """
        self.args, self.run = args, run
        opened = open_run(args.ckpt, device=run.device, **drawing_options(args))
        self.path, self.settings = opened.path, opened.settings
        self.model, self.diffusion, self.vae = opened.model, opened.diffusion, opened.vae
        self.vae_identity = vae_identity(self.vae)
        args.sampler = args.sampler or self.diffusion.default_sampler
        steps = self.diffusion.default_num_steps.get(args.sampler)
        args.num_sampling_steps = args.num_sampling_steps or steps
        args.image_size = self.image_size = opened.image_size
        self.labels = torch.arange(args.num_samples) % opened.config.num_classes

    def identity(self, seed: int) -> dict[str, Any]:
        """Return all that decides the samples of a seed."""
        names = (
            *("ema", "num_samples", "batch_size", "sampler", "num_sampling_steps"),
            *("cfg_scale", "cfg_channels", "cfg_interval", "quantize"),
        )
        chosen = {name: getattr(self.args, name) for name in names}
        return {
            "checkpoint": checkpoint_hash(self.path),
            "vae": self.vae_identity,
            "seed": seed,
            "dtype": str(self.model.dtype),
            "x0_range": list(self.diffusion.x0_range) if self.diffusion.x0_range else None,
            **chosen,
        }

    def draw(self, seed: int, first: int, stop: int) -> Tensor:
        """Draw samples first..stop-1 of a seed, (N, C, S, S) uint8 on the CPU."""
        config, y = self.model.config, self.labels[first:stop]
        generators = [_generator(seed, index) for index in range(first, first + len(y))]
        shape = (config.in_channels, config.input_size, config.input_size)
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators])
        latents = self.diffusion.sample(
            self.model,
            noise.to(self.run.device),
            y.to(self.run.device),
            **sampling_options(self.args),
            null_label=config.null_label,
            generator=generators,
        )
        return ((self.vae.decode(latents) + 1) * 127.5).round().to(torch.uint8).cpu()


def _generator(*seeds: int) -> torch.Generator:
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def draw_samples(sampler: Sampler, seed: int, out: Path) -> tuple[Path, float]:
    """Draw what is lacking of a seed's samples, over all ranks.

    Returns:
        Their .npz and the seconds that one of them took on the main rank, the median over batches.

    Raises:
        ValueError: there are samples of another command.
    """
    args, run = sampler.args, sampler.run
    path, parts, identity = out / f"seed{seed}.npz", out / f"seed{seed}", sampler.identity(seed)
    claim = out / f"seed{seed}.json"
    found = json.loads(claim.read_text()) if claim.exists() else identity
    seconds = found.pop("seconds_per_sample", 0.0)
    if different := [name for name in identity if found.get(name) != identity[name]]:
        name = different[0]
        raise ValueError(
            f"--out {out} holds samples with {name} {found.get(name)}, this command has "
            f"{identity[name]}: give another --out, or delete it"
        )
    process.barrier()  # all have looked
    if run.is_main and not path.exists():
        _write_json(claim, identity)
    if process.from_main(path.exists()):
        return path, process.from_main(seconds)
    starts = range(0, args.num_samples, args.batch_size)
    mine = list(starts)[run.rank :: run.world_size]
    laps: list[float] = []
    for first in tqdm(mine, desc=f"samples, seed {seed}", unit="batch", disable=not run.is_main):
        part = parts / f"{first:08d}.npy"
        if not part.exists():
            began = time.monotonic()
            images = sampler.draw(seed, first, first + args.batch_size)
            laps.append((time.monotonic() - began) / len(images))
            with atomic_write(part) as temp, open(temp, "wb") as file:
                np.save(file, images.numpy())
    process.barrier()
    seconds = statistics.median(laps) if laps else seconds
    if run.is_main:
        batches = (torch.from_numpy(np.load(parts / f"{first:08d}.npy")) for first in starts)
        save_npz(path, args.num_samples, batches, sampler.labels)
        _write_json(claim, identity | {"seconds_per_sample": seconds})
        shutil.rmtree(parts)
        picture = NpzSet(path).images(0, min(100, args.num_samples)).float() / 127.5 - 1
        classes = sampler.model.config.num_classes
        save_grid(picture, path.with_suffix(".png"), columns=classes if classes <= 20 else 10)
    process.barrier()
    return path, process.from_main(seconds)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomic_write(path) as temp:
        temp.write_text(json.dumps(content, indent=2) + "\n")


@torch.no_grad()
def loss_of(sampler: Sampler, dataset: ImageDataset) -> float:
    """Return the objective's mean loss on real images, with the same times and noise every time."""
    run, total = sampler.run, torch.zeros(2, dtype=torch.float64)
    chosen = torch.randperm(len(dataset), generator=_generator(0))[:LOSS_IMAGES]
    batches = [(d, part) for d in range(LOSS_DRAWS) for part in chosen.split(100)]
    for d, part in batches[run.rank :: run.world_size]:
        images, labels = dataset.__getitems__([(int(index), False) for index in part])
        generator = _generator(1, d, int(part[0]))
        latents = sampler.vae.encode(images.to(run.device))
        t, noise = _times_and_noise(sampler.diffusion, latents, generator)
        out = sampler.diffusion.training_loss(
            lambda *inputs: (sampler.model(*inputs), torch.zeros(())),
            latents, labels.to(run.device), t=t, noise=noise,
        )  # fmt: skip
        total += torch.stack([out.per_sample.sum().cpu(), torch.tensor(float(len(part)))])
    total = process.sum_over_ranks(total.to(run.device)).cpu()
    return (total[0] / total[1]).item()


def _times_and_noise(
    diffusion: Diffusion, latents: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    t = diffusion.draw_t(latents, generator)
    return t, torch.randn(latents.shape, generator=generator).to(latents.device)


# ------------------------------------------------------------------------------ real images


def collect(
    images: ImageSet, extractor: Extractor, args: argparse.Namespace, run: process.Runtime
) -> Statistics | None:
    """Look at all images of a set, shared by the ranks; the main one gets the statistics."""
    builder = StatisticsBuilder(len(images))
    starts = list(range(0, len(images), args.batch_size))[run.rank :: run.world_size]
    for first in tqdm(starts, desc="features", unit="batch", disable=not run.is_main, leave=False):
        builder.add(first, extractor(images.images(first, first + args.batch_size)))
    return builder.finish(run)


def open_images(path: str, args: argparse.Namespace, split: str = "train") -> ImageSet:
    """Open real images: a data set by name, a class folder (cropped as in training) or an .npz."""
    if path.endswith(".npz"):
        return NpzSet(Path(path))
    named = path in EPOCHS
    if not named and not Path(path).is_dir():
        raise ValueError(f"{path}: not a folder, an .npz, or one of {', '.join(EPOCHS)}")
    dataset = load_dataset(
        path,
        image_size=None if named else args.image_size,
        split=split,
        fashion_mnist_root=args.fashion_mnist_root,
    )
    return DatasetSet(dataset, f"{path} {split}" if named else path)


def reference_statistics(
    real: ImageSet, extractor: Extractor, args: argparse.Namespace, run: process.Runtime
) -> Statistics | None:
    """Return the statistics of `--reference`, from the cache if they are there; main rank only.

    An .npz that brings its moments, as ADM's do, is used with these.
    """
    path = args.reference
    size = real.dataset.image_size if isinstance(real, DatasetSet) else None
    key = f"{describe_source(path, args)} {len(real)} {size} {extractor.identity}"
    cached = Path(args.cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if process.from_main(cached.exists()):
        return Statistics.load(cached) if run.is_main else None
    found = collect(real, extractor, args, run)
    if found is None:
        return None
    if path.endswith(".npz"):
        with np.load(path) as file:
            if "mu" in file.files:
                if extractor.name:
                    raise ValueError(f"--reference {path}: its moments need --features inception")
                found.pool = {"mu": file["mu"].astype(float), "sigma": file["sigma"].astype(float)}
                found.spatial = {
                    "mu": file["mu_s"].astype(float), "sigma": file["sigma_s"].astype(float)
                }  # fmt: skip
    found.save(cached)
    return found


def describe_source(path: str, args: argparse.Namespace) -> str:
    """Name real images so that changed ones get another name: by the files' place and age."""
    if path in EPOCHS:
        return f"{path} {args.fashion_mnist_root}" if args.fashion_mnist_root else path
    index = cache_index(path)
    root = Path(index["data_path"] if index else path)
    ages = [entry.stat().st_mtime_ns for entry in (root, *root.glob("*/")) if entry.exists()]
    return f"{root.resolve()} {max(ages)} {root.stat().st_size}"


def floor_distance(
    args: argparse.Namespace,
    extractor: Extractor,
    real: Statistics | None,
    run: process.Runtime,
    num_images: int,
) -> dict[str, float]:
    """Return the distance of other real images from the reference: what a perfect model gets.

    Of as many as there are samples, if there are so many, since the distance of few is larger.
    """
    path, split = args.test_data, "train"
    if path is None:
        if args.reference not in EPOCHS:
            return {}
        path, split = args.reference, "test"
    others = Spread(open_images(path, args, split), num_images)
    found = collect(others, extractor, args, run)
    if found is None or real is None:
        return {}
    name = f"FD ({extractor.name})" if extractor.name else "FID"
    return {f"{name} of {found.count} other real images": frechet_distance(found.pool, real.pool)}


# ------------------------------------------------------------------------------ main


def evaluate(args: argparse.Namespace, run: process.Runtime) -> dict[str, Any]:
    """Draw, look, compare; returns what the main rank prints and saves."""
    if (args.ckpt is None) == (args.images is None):
        raise ValueError("--ckpt or --images: give one of them")
    sampler = Sampler(args, run) if args.ckpt else None
    settings = sampler.settings if sampler else {}
    args.reference = args.reference or settings.get("data_path")
    if args.reference is None:
        raise ValueError("--reference: give the real images; nothing here says them")
    args.fashion_mnist_root = args.fashion_mnist_root or settings.get("fashion_mnist_root")
    reference, named = open_images(args.reference, args), args.reference in EPOCHS
    classifier: Classifier | None = None
    if named:
        if run.is_main:  # trains it, if it must
            load_classifier(args.reference, Path(args.cache), args.fashion_mnist_root)
        process.barrier()
        classifier = load_classifier(args.reference, Path(args.cache), args.fashion_mnist_root)
        classifier.model.to(run.device)
    args.features = args.features or ("classifier" if named else "inception")
    if args.features == "classifier":
        if classifier is None:
            raise ValueError(f"--features classifier: none for {args.reference}, only {[*EPOCHS]}")
        extractor: Extractor = ClassifierExtractor(classifier, args.reference, run.device)
    else:
        extractor = InceptionExtractor(args.inception_weights, run.device)
    out = Path(args.out or default_out(args))
    sets: dict[str, ImageSet] = {}
    seconds: dict[str, float] = {}
    if sampler:
        for seed in range(args.seed, args.seed + args.num_seeds):
            path, seconds[f"seed {seed}"] = draw_samples(sampler, seed, out)
            sets[f"seed {seed}"] = NpzSet(path)
    else:
        path = Path(args.images)
        sets[path.name] = NpzSet(path) if path.suffix == ".npz" else FolderSet(path)

    real = reference_statistics(reference, extractor, args, run)
    columns: dict[str, dict[str, float]] = {}
    for name, images in sets.items():
        found = collect(images, extractor, args, run)
        columns[name] = compare(found, real, extractor.name) if found and real else {}
        if sampler and classifier:
            right = classified_right(classifier, images, sampler.labels, args, run)
            columns[name]["read as the class asked for"] = right
        if sampler:
            columns[name]["seconds per sample"] = seconds[name]
    most = max(map(len, sets.values()))
    facts: dict[str, float] = floor_distance(args, extractor, real, run, most)
    if classifier:
        facts["real test images read right"] = classifier.accuracy
        if sampler:
            test = load_dataset(
                args.reference, split="test", fashion_mnist_root=args.fashion_mnist_root
            )
            facts["loss on test images"] = loss_of(sampler, test)
    return {"flags": vars(args), "out": str(out), "values": columns, "facts": facts}


def classified_right(
    classifier: Classifier,
    images: ImageSet,
    labels: Tensor,
    args: argparse.Namespace,
    run: process.Runtime,
) -> float:
    """Return the share of samples that a classifier reads as the class they were asked for."""
    right = torch.zeros((), dtype=torch.float64, device=run.device)
    starts = list(range(0, len(images), args.batch_size))[run.rank :: run.world_size]
    for first in starts:
        stop = first + args.batch_size
        batch = images.images(first, stop).to(run.device).float() / 127.5 - 1
        right += (predict(classifier.model, batch).cpu() == labels[first:stop]).sum().to(run.device)
    return (process.sum_over_ranks(right) / len(images)).item()


def default_out(args: argparse.Namespace) -> str:
    """Name the folder by what is drawn."""
    if not args.ckpt:
        return f"results/evaluation/{Path(args.images).stem}"
    low, high = args.cfg_interval
    interval = "" if (low, high) == (0.0, 1.0) else f"-t{low:g}-{high:g}"
    name = f"{args.sampler}{args.num_sampling_steps}-cfg{args.cfg_scale:g}{interval}"
    name += f"-{args.quantize}" if args.quantize else ""
    return f"results/evaluation/{Path(args.ckpt).stem}-{name}-{args.num_samples}"


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


def main(args: argparse.Namespace) -> None:
    """Evaluate, print the table, save it as metrics.json."""
    run = process.setup(process.LONG_WAIT)
    try:
        result = evaluate(args, run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    if run.is_main:
        _write_json(Path(result["out"]) / "metrics.json", result)
        print("\n".join(format_result(result)))
        print(f"samples, picture and metrics.json: {result['out']}")
    process.finish()


if __name__ == "__main__":
    main(build_parser().parse_args())
