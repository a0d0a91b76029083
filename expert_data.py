"""Count which experts a checkpoint uses, by class, layer, step and patch.

    python expert_data.py --ckpt results/demo --out results/routing.npz
    torchrun --nproc_per_node 8 expert_data.py --ckpt dit_moe_s_8E2A.pt --num-per-class 50
    python expert_data.py --ckpt results/demo --real --out results/real.npz
    python expert_data.py --merge a.npz b.npz --out all.npz

Counts are exact integers, the same for any number of ranks, and take no more room for more images.
The file is written after every batch of every rank; the same command continues where it stopped.
heatmap_class.py, heatmap_layer.py and expert_report.py draw it.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import checkpoint_hash
from common import process
from common.flags import FlagParser, flag, number, sampling_flags, sampling_options
from data import VAE, ImageDataset, Pixels, load_dataset, load_vae
from diffusion import Diffusion, create_diffusion
from latent_cache import vae_identity
from models import DiT
from routing import RoutingRecorder
from routing_data import (
    ADDED,
    FORMAT,
    VERSION,
    RoutingData,
    comparable,
    format_table,
    measure,
    measure_all,
    merge,
    save_table,
)
from weights import find_objective, load_model, load_settings

PRINTED = (
    *("nmi_class", "nmi_step", "nmi_patch", "entropy", "entropy_early", "entropy_middle"),
    *("entropy_late", "max_vio", "max_vio_step", "dead", "pair_usage", "pair_entropy"),
)


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", help="checkpoint, run folder or published weights")
    data.add("--merge", nargs="+", metavar="NPZ", help="add up these files instead")
    data.add("--out", default="results/routing.npz", help="file to write; its table beside it")
    data.add("--labels", nargs="+", type=number(int, 0), help="class numbers; default: all")
    data.add("--num-per-class", type=number(int, 1), default=50, help="images of each class")
    data.add("--raw-samples", type=number(int, 0), default=10, help="images to keep whole")
    data.add("--vae-path", help="folder or hub id; default: the checkpoint's")

    real = parser.group("Real images")
    real.add("--real", default=False, **flag, help="route noised data instead of sampling")
    real.add("--data-path", help="default: the checkpoint's; folder, digits or fashion-mnist")
    real.add("--fashion-mnist-root", help="folder of the idx files; default: the checkpoint's")
    real.add("--times", nargs="+", type=number(float, 0, 1), help="t; default: the sampler's")

    model = parser.group("Model")
    model.add("--rf", default=None, **flag, help="objective of a published file; ours tell")
    model.add("--ema", default=True, **flag, help="averaged weights")
    model.add("--dtype", choices=list(process.DTYPES), help="of the weights; default: by hardware")

    sampling = sampling_flags(parser)
    sampling.add("--max-batches", type=number(int, 1), help="stop after so many per rank")
    return parser


# ------------------------------------------------------------------------------ what to run


def model_times(args: argparse.Namespace, diffusion: Diffusion) -> list[float]:
    """Return the model time of each step: `--times`, else the sampler's."""
    if args.times:
        scale = diffusion.time_scale
        return [min(round(t * scale), scale - 1) if scale > 1 else t for t in args.times]
    return [t for t, _ in diffusion.steps(args.sampler, args.num_sampling_steps, None)]


def describe(
    args: argparse.Namespace, model: DiT, settings: dict[str, Any], vae: VAE | Pixels
) -> dict[str, Any]:
    """Return the metadata of this run, before its first image; fills in defaults of `args`."""
    config, objective = model.config, find_objective(settings, model.config, args.rf)
    diffusion = create_diffusion(objective, learn_sigma=config.learn_sigma)
    args.sampler = args.sampler or diffusion.default_sampler
    if args.sampler not in diffusion.samplers:
        accepted = ", ".join(diffusion.samplers)
        raise ValueError(f"--sampler {args.sampler}: {objective} accepts {accepted}")
    if args.times and not args.real:
        raise ValueError("--times: only with --real; sampling takes the sampler's own times")
    default_steps = diffusion.default_num_steps[args.sampler]
    args.num_sampling_steps = args.num_sampling_steps or default_steps
    args.labels = args.labels or list(range(config.num_classes))
    if max(args.labels) >= config.num_classes or len(set(args.labels)) < len(args.labels):
        raise ValueError(
            f"--labels {max(args.labels)}: expected different numbers in "
            f"[0, {config.num_classes - 1}]"
        )
    source = {"path": str(args.ckpt), "sha256": checkpoint_hash(args.ckpt), "ema": args.ema}
    run = {"seed": args.seed, "labels": args.labels, "batch_size": args.batch_size}
    run |= {"num_images": args.num_per_class * len(args.labels), "images_done": 0}
    return {
        "format": FORMAT,
        "version": VERSION,
        "config": config.to_dict(),
        "checkpoint": source | {"dtype": str(model.dtype)},
        "objective": objective,
        "source": "real" if args.real else "samples",
        "vae": vae_identity(vae),
        "data_path": (args.data_path or settings.get("data_path")) if args.real else None,
        "sampler": args.sampler,
        "num_steps": len(model_times(args, diffusion)),
        "cfg_scale": args.cfg_scale,
        "cfg_channels": args.cfg_channels,
        "cfg_interval": list(args.cfg_interval),
        "class_names": settings.get("class_names", []),
        "runs": [run],
    }


def open_data(path: str, empty: RoutingData) -> RoutingData:
    """Return what an interrupted run of the same command wrote, else the empty tables.

    Raises:
        ValueError: if the file is of another command.
    """
    if not Path(path).exists():
        return empty
    found = RoutingData.load(path)
    wanted = comparable(empty.meta) | {"run": empty.meta["runs"][0] | {"images_done": 0}}
    has = comparable(found.meta) | {"run": found.meta["runs"][0] | {"images_done": 0}}
    different = [key for key in wanted if wanted[key] != has.get(key)]
    if not different and not torch.equal(found.times, empty.times):
        different = ["times"]
    if different or len(found.meta["runs"]) > 1 or found.raw_ids.shape != empty.raw_ids.shape:
        key = different[0] if different else "the number of runs or raw samples"
        raise ValueError(f"--out {path} exists and {key} differs; choose another name or delete it")
    return found


# ------------------------------------------------------------------------------ running it


class Router:
    """Send batches of images through a model: sample them, or noise real ones.

    The noise of a batch depends on the seed and the number of its first image, so it does not
    matter which rank takes it.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        model: DiT,
        diffusion: Diffusion,
        recorder: RoutingRecorder,
        vae: VAE | Pixels,
    ) -> None:
        self.args, self.model, self.diffusion = args, model, diffusion
        self.recorder, self.vae, self.device = recorder, vae, recorder.device
        self.times = model_times(args, diffusion)
        if args.real:
            size = model.config.input_size * vae.downsample
            self.dataset = load_dataset(
                args.data_path, image_size=size, fashion_mnist_root=args.fashion_mnist_root
            )
            self.indices = pick_images(self.dataset, args)

    def labels(self, first: int, stop: int) -> Tensor:
        """Return the classes of images first..stop-1: classes take turns."""
        choices = self.args.labels
        return torch.tensor([choices[i % len(choices)] for i in range(first, stop)])

    def run(self, first: int, stop: int, num_raw: int, on_step: Callable[[], Any]) -> Tensor:
        """Route images first..stop-1; returns the first `num_raw`, (R, C, H, W) in [-1, 1].

        Args:
            first: number of the first image among all.
            stop: number after the last one.
            num_raw: R, images to return; the others are not decoded.
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

        if not self.args.real:
            latents = self._sample(noise, y, generator, at_step)[:num_raw]
            return self.vae.decode(latents) if num_raw else latents
        keys = [(int(i), False) for i in self.indices[first:stop]]
        images = self.dataset.__getitems__(keys)[0].to(self.device)
        encoder_generator = torch.Generator(self.device).manual_seed(seed)
        self._route_noised(self.vae.encode(images, encoder_generator), noise, y, at_step)
        return images[:num_raw]

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


def pick_images(dataset: ImageDataset, args: argparse.Namespace) -> Tensor:
    """Return the first images of each class in the order of `Router.labels`, as indices.

    Raises:
        ValueError: if a class has too few.
    """
    columns = []
    for label in args.labels:
        found = (dataset.labels == label).nonzero().flatten()
        if len(found) < args.num_per_class:
            raise ValueError(
                f"--num-per-class {args.num_per_class}: class {label} of {args.data_path} has "
                f"{len(found)} images"
            )
        columns.append(found[: args.num_per_class])
    return torch.stack(columns, dim=1).flatten()


def collect(router: Router, data: RoutingData, run: process.Runtime) -> RoutingData:
    """Route all images that `data` lacks, sharing batches over the ranks; saves as it goes."""
    args, recorder = router.args, router.recorder
    num_images, size = data.meta["runs"][0]["num_images"], args.batch_size
    starts = list(range(process.from_main(data.images_done), num_images, size))
    rounds = math.ceil(len(starts) / run.world_size)
    rounds = min(rounds, args.max_batches or rounds)
    tables = recorder.tables | {"raw_images": torch.zeros_like(data.raw_images, device=run.device)}
    mine = starts[run.rank :: run.world_size][:rounds]
    with tqdm(
        total=len(mine) * len(router.times), desc="routing", unit="step", disable=not run.is_main
    ) as bar:
        for done in range(rounds):
            if done < len(mine):
                first, stop = mine[done], min(mine[done] + size, num_images)
                raw = len(tables["raw_images"][first:stop])
                images = router.run(first, stop, raw, bar.update)
                if raw:
                    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
                    tables["raw_images"][first : first + raw] = pixels
            for name, table in tables.items():
                process.sum_over_ranks(table)
                getattr(data, name).add_(table.cpu())
                table.zero_()
            last = starts[min((done + 1) * run.world_size, len(starts)) - 1]
            data.meta["runs"][0]["images_done"] = min(last + size, num_images)
            if run.is_main:
                data.save(args.out)
    return data


def count_experts(args: argparse.Namespace, run: process.Runtime) -> RoutingData:
    """Load the checkpoint, then continue or make the file."""
    settings = load_settings(args.ckpt)
    dtype = process.pick_dtype(args.dtype, run.device)
    model = load_model(args.ckpt, ema=args.ema, dtype=dtype, device=run.device)
    config = model.config
    if config.num_experts == 0:
        raise ValueError(f"--ckpt {args.ckpt} is a dense model: it has no experts to count")
    args.data_path = args.data_path or settings.get("data_path")
    args.fashion_mnist_root = args.fashion_mnist_root or settings.get("fashion_mnist_root")
    if args.real and not args.data_path:
        raise ValueError("--real needs --data-path: this checkpoint does not say its data")
    vae_path = args.vae_path or settings.get("vae_path") or "stabilityai/sd-vae-ft-ema"
    vae = load_vae(vae_path, device=run.device, model_channels=config.in_channels)
    meta = describe(args, model, settings, vae)
    diffusion = create_diffusion(
        meta["objective"], learn_sigma=config.learn_sigma, x0_range=vae.x0_range
    )
    num_raw = min(args.raw_samples, meta["runs"][0]["num_images"])
    recorder = RoutingRecorder(model, meta["num_steps"], num_raw)
    router = Router(args, model, diffusion, recorder, vae)
    channels = vae.image_channels if isinstance(vae, VAE) else config.in_channels
    pixels = config.input_size * vae.downsample
    tables = {name: recorder.tables[name].clone().cpu() for name in (*ADDED, "raw_ids")}
    empty = RoutingData(
        meta=meta,
        times=torch.tensor(router.times, dtype=torch.float64) / diffusion.time_scale,
        raw_labels=router.labels(0, num_raw),
        raw_images=torch.zeros(num_raw, channels, pixels, pixels, dtype=torch.uint8),
        **tables,
    )
    # Every rank opens the file, so that all of them refuse it; where to start, the main one says.
    return collect(router, open_data(args.out, empty), run)


def main(args: argparse.Namespace) -> None:
    """Count or merge; print and save the table."""
    run = process.setup(process.LONG_WAIT)
    try:
        if (args.ckpt is None) == (args.merge is None):
            raise ValueError("--ckpt or --merge: give one of them")
        if args.merge:
            if Path(args.out).exists():
                raise ValueError(f"--out {args.out} exists; choose another name or delete it")
            data = merge([RoutingData.load(path) for path in args.merge])
            data.save(args.out)
        else:
            data = count_experts(args, run)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"expert_data.py: error: {error}")
    if run.is_main:
        save_table(measure_all(data), args.out)
        wanted = sum(part["num_images"] for part in data.meta["runs"])
        print(data.title)
        rows = measure(data)
        print(format_table(rows, [name for name in PRINTED if name in rows[0]]))
        print(f"{data.images_done:,} of {wanted:,} images: {args.out}, .csv and .json beside it")
    process.finish()


if __name__ == "__main__":
    main(build_parser().parse_args())
