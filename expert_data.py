"""Count which experts a checkpoint uses, by class, layer, step and patch.

    python expert_data.py --ckpt results/demo --out results/routing.npz
    torchrun --nproc_per_node 8 expert_data.py --ckpt dit_moe_s_8E2A.pt --num-per-class 50
    python expert_data.py --ckpt results/demo --real --out results/real.npz
    python expert_data.py --ckpt results/demo --image a.png b.png --labels 3 7 --out ab.npz
    python expert_data.py --merge a.npz b.npz --out all.npz

Counts are exact integers, the same for any number of ranks, and take no more room for more images.
The file is written after every batch of every rank; the same command continues where it stopped.
heatmap_class.py, heatmap_layer.py and expert_report.py draw it.
"""

import argparse
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint.state import checkpoint_hash, resolve_checkpoint
from common import process
from common.errors import FileError, UserError, blamed_on, one_line_errors, printable
from common.files import make_writable
from common.flags import FlagParser, flag, number, sampling_flags, sampling_options
from common.labels import label_numbers
from data import ImageDataset
from data.class_images import first_of_each, open_pictures, open_with_classes
from data.latent_cache import vae_identity
from diffusion import Diffusion
from routing import RoutingRecorder
from routing.tables import (
    ADDED,
    FORMAT,
    MEANINGS,
    TABLES,
    VERSION,
    RoutingData,
    comparable,
    format_table,
    measure,
    measure_all,
    merge,
    refuse_foreign,
    save_table,
)
from sampling.drawing import model_time
from sampling.flags import drawing_flags, drawing_options
from sampling.opening import DrawingRun, open_run

PRINTED = (
    *("nmi_class", "nmi_step", "nmi_patch", "entropy", "entropy_early", "entropy_middle"),
    *("entropy_late", "max_vio", "max_vio_step", "dead", "pair_usage", "pair_entropy"),
)


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", help="Checkpoint, run folder (its latest) or published weights to look at.")
    data.add("--merge", nargs="+", metavar="NPZ", help="Add up these files of this script instead.")
    data.add(
        "--out",
        default="results/routing.npz",
        metavar="NPZ",
        help="File to write, .npz; its table is written beside it as .csv and .json.",
    )
    data.add(
        "--labels",
        nargs="+",
        metavar="CLASS",
        help="Numbers or names of the classes to draw, or of the class of each --image. Default: "
        "all that have a name or images.",
    )
    data.add(
        "--num-per-class",
        type=number(int, 1),
        default=50,
        metavar="N",
        help="Number of images of each class.",
    )
    data.add(
        "--traced-samples",
        "--raw-samples",
        "--raw_samples",
        type=number(int, 0),
        default=10,
        metavar="N",
        help="Number of images of which picture and every choice are kept, for --by sample.",
    )
    data.add("--vae-path", help="Folder or hub id of the autoencoder. Default: the checkpoint's.")

    real = parser.group("Real images")
    real.add("--real", default=False, **flag, help="Route noised data instead of sampling.")
    real.add("--image", nargs="+", metavar="FILE", help="Route these pictures, cut to a square.")
    real.add(
        "--data-path",
        help="Image folder, digits or fashion-mnist; the classes of a folder are found by name. "
        "Default: the checkpoint's.",
    )
    real.add(
        "--fashion-mnist-root", help="Folder of the four idx files. Default: the checkpoint's."
    )
    real.add(
        "--times",
        nargs="+",
        type=number(float, 0, 1),
        metavar="T",
        help="Noise levels t, 0 = picture and 1 = noise. Default: those of the sampler's steps.",
    )

    drawing_flags(parser, quantize=False, offload=False, guide=False)
    sampling = sampling_flags(parser)
    sampling.add("--max-batches", type=number(int, 1), metavar="N", help="Stop after N per rank.")
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that do not go together and names of files that are taken, before any work.

    Raises:
        UserError: naming the flag.
    """
    out = Path(args.out)
    if (args.ckpt is None) == (args.merge is None):
        raise UserError("--ckpt or --merge: give one of them")
    if out.suffix != ".npz":
        raise UserError(f"--out {out}: expected a name that ends in .npz; .csv and .json go beside")
    if args.merge and out.exists():
        raise FileError(f"--out {out} exists; choose another name or delete it")
    for suffix, marker in TABLES.items():
        refuse_foreign(out.with_suffix(suffix), marker)
    make_writable(out.parent, "--out")
    if args.real and args.image:
        raise UserError("--real or --image: give one of them")
    if args.times and not (args.real or args.image):
        raise UserError("--times: only with --real or --image; sampling takes the sampler's own")
    if args.image and len(args.labels or []) not in (1, len(args.image)):
        raise UserError(
            f"--image needs --labels: one class for all or one for each of {len(args.image)} files"
        )
    low, high = args.cfg_interval
    if low > high:
        raise UserError(f"--cfg-interval {low:g} {high:g}: expected LOW <= HIGH")


# ------------------------------------------------------------------------------ what to run


def model_times(args: argparse.Namespace, diffusion: Diffusion) -> list[float]:
    """Return the model time of each step, falling: `--times`, else the sampler's."""
    if args.times:
        return [model_time(diffusion, t) for t in sorted(args.times, reverse=True)]
    with blamed_on(f"--num-sampling-steps {args.num_sampling_steps}"):
        return [t for t, _ in diffusion.steps(args.sampler, args.num_sampling_steps, None)]


def resolve(args: argparse.Namespace, run: DrawingRun, images: ImageDataset | None) -> None:
    """Replace what `args` leaves to the checkpoint: sampler, number of steps, class numbers.

    Args:
        args: flags.
        run: the checkpoint.
        images: to route, None to sample.

    Raises:
        UserError: naming the flag that does not fit.
    """
    diffusion, num_classes = run.diffusion, run.config.num_classes
    args.sampler = args.sampler or diffusion.default_sampler
    if args.sampler not in diffusion.samplers:
        accepted = ", ".join(diffusion.samplers)
        raise UserError(f"--sampler {args.sampler}: {diffusion.objective} accepts {accepted}")
    default_steps = diffusion.default_num_steps[args.sampler]
    args.num_sampling_steps = args.num_sampling_steps or default_steps
    if args.labels is None:
        present = images.labels.unique().tolist() if images is not None else None
        args.labels = present or list(range(min(len(run.class_names) or num_classes, num_classes)))
        return
    labels = label_numbers(args.labels, num_classes, run.class_names)
    if args.image:
        labels *= len(args.image) // len(labels)
    elif twice := [label for i, label in enumerate(labels) if label in labels[:i]]:
        raise UserError(f"--labels: class {twice[0]} is there twice; expected different classes")
    args.labels = labels


def describe(
    args: argparse.Namespace, run: DrawingRun, checkpoint: dict[str, str]
) -> dict[str, Any]:
    """Return the metadata of this run, before its first image."""
    images = {"seed": args.seed, "labels": args.labels, "batch_size": args.batch_size}
    images |= {"num_images": args.num_per_class * len(args.labels), "images_done": 0}
    if args.image:
        hashes = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in args.image]
        images |= {"pictures": hashes, "num_images": len(hashes)}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": run.config.to_dict(),
        "checkpoint": checkpoint | {"ema": args.ema, "dtype": str(run.model.dtype)},
        "objective": run.diffusion.objective,
        "source": "real" if args.real or args.image else "samples",
        "vae": vae_identity(run.vae),
        "data_path": args.data_path if args.real else None,
        "sampler": args.sampler,
        "num_steps": len(model_times(args, run.diffusion)),
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "cfg_interval": list(args.cfg_interval),
        "cfg_rescale": args.cfg_rescale or None,  # as in files from before there was one
        "class_names": run.class_names,
        "runs": [images],
    }


def open_data(path: str, empty: RoutingData) -> RoutingData:
    """Return what an interrupted run of the same command wrote, else the empty tables.

    Raises:
        FileError: if the file is of another command, or of something else.
    """
    if not Path(path).exists():
        return empty
    found = RoutingData.load(path)
    wanted = comparable(empty.meta) | {"run": empty.meta["runs"][0] | {"images_done": 0}}
    has = comparable(found.meta) | {"run": found.meta["runs"][0] | {"images_done": 0}}
    different = [key for key in wanted if wanted[key] != has.get(key)]
    if not different and not torch.equal(found.times, empty.times):
        different = ["times"]
    if different or len(found.meta["runs"]) > 1 or found.traced_ids.shape != empty.traced_ids.shape:
        key = different[0] if different else "the number of runs or traced samples"
        raise FileError(f"--out {path} exists and {key} differs; choose another name or delete it")
    return found


# ------------------------------------------------------------------------------ running it


class RoutingRun:
    """Send batches of images through a model: sample them, or noise real ones.

    The noise of a batch depends on the seed and the number of its first image, so it does not
    matter which rank takes it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        run: DrawingRun,
        recorder: RoutingRecorder,
        images: ImageDataset | None,
    ) -> None:
        self.args, self.model, self.diffusion, self.vae = args, run.model, run.diffusion, run.vae
        self.recorder, self.device = recorder, recorder.device
        self.times = model_times(args, run.diffusion)
        self.dataset = images
        if args.real and images is not None:
            self.indices = first_of_each(images, args.data_path, args.labels, args.num_per_class)
        elif images is not None:
            self.indices = torch.arange(len(images))

    def labels(self, first: int, stop: int) -> Tensor:
        """Return the classes of images first..stop-1: classes take turns."""
        choices = self.args.labels
        return torch.tensor([choices[i % len(choices)] for i in range(first, stop)]).long()

    def route(self, first: int, stop: int, num_traced: int, on_step: Callable[[], Any]) -> Tensor:
        """Route images first..stop-1; returns the first `num_traced`, (R, C, H, W) in [-1, 1].

        Args:
            first: number of the first image among all.
            stop: number after the last one.
            num_traced: R, images to return; the others are not decoded.
            on_step: called once per step.
        """
        seed = int(np.random.SeedSequence([self.args.seed, first]).generate_state(1)[0])
        y = self.labels(first, stop).to(self.device)
        config, generator = self.model.config, torch.Generator().manual_seed(seed)
        shape = (len(y), config.in_channels, config.input_size, config.input_size)
        noise = torch.randn(shape, generator=generator).to(self.device)
        self.recorder.begin(y, first)

        def at_step(step: int, _t: float) -> None:
            self.recorder.at_step(step)
            on_step()

        if self.dataset is None:
            latents = self._sample(noise, y, generator, at_step)[:num_traced]
            return self.vae.decode(latents) if num_traced else latents
        keys = [(int(i), False) for i in self.indices[first:stop]]
        images = self.dataset.__getitems__(keys)[0].to(self.device)
        encoder_generator = torch.Generator(self.device).manual_seed(seed)
        self._route_noised(self.vae.encode(images, encoder_generator), noise, y, at_step)
        return images[:num_traced]

    def _sample(
        self, noise: Tensor, y: Tensor, generator: torch.Generator, at_step: Callable
    ) -> Tensor:
        return self.diffusion.sample(
            self.model,
            noise,
            y,
            **sampling_options(self.args),
            null_label=self.model.config.null_label,
            generator=generator,
            callback=at_step,
        )

    @torch.no_grad()
    def _route_noised(self, latents: Tensor, noise: Tensor, y: Tensor, at_step: Callable) -> None:
        copies, labels = 1, y
        if self.args.cfg_scale != 1.0:
            copies, labels = 2, torch.cat([y, torch.full_like(y, self.model.config.null_label)])
        for step, time in enumerate(self.times):
            at_step(step, time)
            t = torch.full((len(latents),), float(time), device=self.device)
            x_t = self.diffusion.add_noise(latents, noise, t)
            self.model(x_t.repeat(copies, 1, 1, 1), t.repeat(copies), labels)


def collect(routing_run: RoutingRun, data: RoutingData, rt: process.Runtime) -> RoutingData:
    """Route all images that `data` lacks, sharing batches over the ranks; saves as it goes."""
    args, recorder = routing_run.args, routing_run.recorder
    num_images, size = data.meta["runs"][0]["num_images"], args.batch_size
    starts = range(process.from_main(data.images_done), num_images, size)
    rounds = math.ceil(len(starts) / rt.world_size)
    rounds = min(rounds, args.max_batches or rounds)
    tables = recorder.tables | {
        "traced_images": torch.zeros_like(data.traced_images, device=rt.device)
    }
    mine = starts[rt.rank :: rt.world_size][:rounds]
    steps = len(mine) * len(routing_run.times)
    with tqdm(total=steps, desc="routing", unit="step", disable=not rt.is_main) as bar:
        for done in range(rounds):
            if done < len(mine):
                first, stop = mine[done], min(mine[done] + size, num_images)
                num_traced = len(tables["traced_images"][first:stop])
                images = routing_run.route(first, stop, num_traced, bar.update)
                if num_traced:
                    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
                    tables["traced_images"][first : first + num_traced] = pixels
            for name, table in tables.items():
                process.sum_over_ranks(table)
                getattr(data, name).add_(table.cpu())
                table.zero_()
            last = starts[min((done + 1) * rt.world_size, len(starts)) - 1]
            data.meta["runs"][0]["images_done"] = min(last + size, num_images)
            if rt.is_main:
                data.save(args.out)
    return data


def find_checkpoint(ckpt: str) -> dict[str, str]:
    """Return the file or folder that `--ckpt` means now, its hash and what it was called.

    A live run may write another meanwhile: what is hashed is what is loaded, on every rank.
    """
    path = resolve_checkpoint(ckpt)
    if not path.exists():
        raise FileError(f"--ckpt: no such file: {path}")
    return {"path": ckpt, "file": str(path), "sha256": checkpoint_hash(path)}


def count_experts(args: argparse.Namespace, rt: process.Runtime) -> RoutingData:
    """Load the checkpoint, then continue or make the file."""
    found = process.from_main(find_checkpoint(args.ckpt) if rt.is_main else None)
    run = open_run(found["file"], device=rt.device, **drawing_options(args))
    config = run.config
    if config.num_experts == 0:
        raise UserError(f"--ckpt {args.ckpt} is a dense model: it has no experts to count")
    images = open_images(args, run)
    resolve(args, run, images)
    meta = describe(args, run, found)
    num_traced = min(args.traced_samples, meta["runs"][0]["num_images"])
    check_tables(args, run, meta["num_steps"], num_traced)
    recorder = RoutingRecorder(run.model, meta["num_steps"], num_traced)
    routing_run = RoutingRun(args, run, recorder, images)
    tables = {name: recorder.tables[name].clone().cpu() for name in (*ADDED, "traced_ids")}
    empty = RoutingData(
        meta=meta,
        times=torch.tensor(routing_run.times, dtype=torch.float64) / run.diffusion.time_scale,
        traced_labels=routing_run.labels(0, num_traced),
        traced_images=torch.zeros(num_traced, *image_shape(run), dtype=torch.uint8),
        **tables,
    )
    # Every rank opens the file, so that all of them refuse it; where to start, the main one says.
    return collect(routing_run, open_data(args.out, empty), rt)


def image_shape(run: DrawingRun) -> tuple[int, int, int]:
    """Return (C, S, S) of the images that a checkpoint draws."""
    return run.image_channels, run.image_size, run.image_size


def open_images(args: argparse.Namespace, run: DrawingRun) -> ImageDataset | None:
    """Return the images of `--real` or `--image`, None to sample; fills in where the data are."""
    channels, size, _ = image_shape(run)
    if args.image:
        return open_pictures(args.image, size, channels)
    if not args.real:
        return None
    args.data_path = args.data_path or run.settings.get("data_path")
    args.fashion_mnist_root = args.fashion_mnist_root or run.settings.get("fashion_mnist_root")
    if not args.data_path:
        raise UserError("--real needs --data-path: this checkpoint does not say its data")
    images = open_with_classes(
        *(args.data_path, size, run.config.num_classes, run.class_names, args.fashion_mnist_root)
    )
    if images.channels != channels:
        has = f"images of {images.channels} channels, the model {channels}"
        raise UserError(f"--data-path {args.data_path} has {has}")
    return images


def check_tables(
    args: argparse.Namespace, run: DrawingRun, num_steps: int, num_traced: int
) -> None:
    """Refuse tables that this machine has no memory for.

    Raises:
        UserError: naming the flag that makes them large.
    """
    config = run.config
    choices = num_steps * config.depth * config.num_experts_per_tok * config.num_patches  # bytes
    traced = num_traced * (choices + math.prod(image_shape(run)))
    counts = num_steps * config.depth * config.num_experts * 2 * 2 * 8  # by_step, probs; 2 halves
    copies = 2  # of this batch, of all
    process.check_memory(copies * traced, f"--traced-samples {args.traced_samples}")
    process.check_memory(copies * counts, f"--num-sampling-steps {args.num_sampling_steps}")


def print_summary(data: RoutingData, out: str) -> None:
    """Say what was counted, its measures by layer, and what they mean."""
    wanted = sum(part["num_images"] for part in data.meta["runs"])
    print(data.title)
    rows = measure(data)
    print(format_table(rows, [name for name in PRINTED if name in rows[0]]))
    for name, meaning in MEANINGS.items():
        print(f"  {name}: {meaning}")
    print(printable(f"{data.images_done:,} of {wanted:,} images: {out}, .csv and .json beside it"))


def main(args: argparse.Namespace) -> None:
    """Count or merge; print and save the table."""
    rt = process.setup(process.LONG_WAIT)
    check_flags(args)
    if args.merge:
        data = merge([RoutingData.load(path) for path in args.merge])
        if rt.is_main:
            data.save(args.out)
    else:
        data = count_experts(args, rt)
    if rt.is_main:
        save_table(measure_all(data), args.out)
        print_summary(data, args.out)
    process.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
