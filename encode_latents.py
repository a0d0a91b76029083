"""Encode an image folder once: a latent cache that trains as the images do, without the VAE's time.

    python encode_latents.py --data-path IMAGES --vae-path V --out IMAGES-latents
    torchrun --nproc_per_node=8 encode_latents.py --data-path IMAGES --vae-path V --out LATENTS
    torchrun --nproc_per_node=8 train.py --data-path LATENTS --model DiT-S/2 --rf

Keeps the mean and deviation that the VAE gives for each image and for its mirror (one tensor of a
deterministic one), so that training draws fresh noise and flips as it does from images: the same
seed gives the same batches. Also measures mean and deviation of each channel over all of them, for
`--latent-norm channel`. Ranks share the shards; the same command continues where it stopped.
Unreadable images are listed at the end.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import process
from common.errors import UserError, one_line_errors, printable
from common.files import atomic_write, file_crc32
from common.flags import FlagParser, dtype_flag, number
from common.quiet import silence_worker_count
from data import VAE, ImageDataset, load_dataset, load_vae
from data.datasets import CONTAINERS
from data.image_files import UnreadableImageError
from data.latent_cache import DTYPES, CachedLatents, from_stored, plan, to_stored
from data.latent_features import features_path, read_features_index, write_features_index
from data.latent_index import (
    KEYS,
    LABELS,
    VERSION,
    cache_index,
    num_shards,
    shard_path,
    shard_rows,
    write_index,
)
from training import repa

MEASURED_AT_ONCE = 512  # images
MIN_STD = 1e-6  # of a channel that is the same everywhere
NUM_CHECKED = 8  # images that are encoded again at the end
FLAGS = {  # entry of the index -> flag that decides it
    "files": "--data-path",
    "num_images": "--data-path",
    "image_size": "--image-size",
    "vae": "--vae-path",
    "dtype": "--dtype",
    "shard_size": "--shard-size",
}


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add(
        "--data-path",
        required=True,
        help="Image folder with one subfolder a class, tar:SHARDS or hf:NAME.",
    )
    data.add(
        "--image-size",
        type=number(int, 8, 8192),
        default=256,
        metavar="S",
        help="Pixels to which images are scaled and cropped.",
    )
    data.add(
        "--vae-path",
        default="stabilityai/sd-vae-ft-ema",
        help="Folder or hub id of the autoencoder.",
    )
    data.add("--out", required=True, help="Folder of the cache.")
    data.add("--dtype", **dtype_flag, default="fp16", help="Type that the cache keeps.")
    data.add(
        "--features",
        metavar="ENCODER",
        help="Keep what an encoder sees too, for train.py's --repa of the same name: timm:NAME, or "
        "timm:NAME:FILE of its weights. A finished cache gets them by its same command.",
    )
    data.add(
        "--feature-grid",
        type=number(int, 1, 1024),
        metavar="TOKENS",
        help="Tokens in a row of the model, one feature each. Default: those of patch size 2.",
    )
    data.add(
        "--shard-size",
        type=number(int, 1, 10**9),
        default=4096,
        metavar="N",
        help="Number of images in a file.",
    )

    work = parser.group("Run")
    work.add(
        "--batch-size",
        type=number(int, 1, 10**6),
        default=32,
        metavar="N",
        help="Number of images encoded at once.",
    )
    work.add(
        "--num-workers",
        type=number(int, 0, 256),
        default=4,
        metavar="N",
        help="Number of processes of each rank that read images.",
    )
    return parser


class _Readable(Dataset):
    """The images of a folder in uint8, and for a file that can't be read its error instead."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor | UserError:
        try:
            return self.dataset.pixels(torch.tensor([index]))[0]
        except UserError as error:  # raised here, a worker's traceback would be its message
            return error


def _as_list(batch: list[Any]) -> list[Any]:
    return batch


def both_moments(vae: VAE, pixels: Tensor) -> Tensor:
    """Encode images (N, 3, S, S) uint8 and their mirrors; returns (N, 2, M, C, H, W) fp32."""
    images = pixels.float() / 127.5 - 1
    halves = [torch.stack(vae.moments(half), dim=1) for half in (images, images.flip(-1))]
    return torch.stack(halves, dim=1).cpu()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file of any name."""
    with open(path, "wb") as file:
        np.save(file, array)


class Encoder:
    """Writes the shards of one rank."""

    def __init__(
        self,
        args: argparse.Namespace,
        dataset: ImageDataset,
        vae: VAE,
        index: dict[str, Any],
        rt: process.Runtime,
    ) -> None:
        self.args, self.dataset, self.vae, self.index, self.rt = args, dataset, vae, index, rt
        self.folder = Path(args.out)

    def encode_shards(self) -> None:
        """Encode this rank's shards that are not there yet."""
        index, rt = self.index, self.rt
        mine = range(rt.rank, num_shards(index), rt.world_size)
        total = sum(len(shard_rows(index, shard)) for shard in mine)
        with tqdm(total=total, desc="encode", unit="image", disable=not rt.is_main) as bar:
            for shard in mine:
                path = shard_path(self.folder, shard)
                if path.exists() and path.with_suffix(".json").exists():
                    bar.update(len(shard_rows(index, shard)))
                else:
                    self._encode_shard(shard, shard_rows(index, shard), bar)

    def _encode_shard(self, shard: int, rows: Sequence[int], bar: tqdm) -> None:
        shape = (len(rows), 2, self.index["num_moments"], *self.index["latent_shape"])
        out = torch.zeros(shape, dtype=DTYPES[self.index["dtype"]][1]).numpy()
        unreadable = []
        silence_worker_count()
        loader = DataLoader(
            _Readable(self.dataset),
            batch_size=self.args.batch_size,
            sampler=rows,
            collate_fn=_as_list,
            num_workers=min(self.args.num_workers, -(-len(rows) // self.args.batch_size)),
        )
        first = 0
        for batch in loader:
            for position, item in enumerate(batch):
                if isinstance(item, UnreadableImageError):
                    unreadable.append({"index": rows[first + position], "error": str(item)})
                elif isinstance(item, UserError):  # such as a disk that fails: not the image's
                    raise item
            good = [i for i, item in enumerate(batch) if isinstance(item, Tensor)]
            if good:
                pixels = torch.stack([batch[i] for i in good]).to(self.rt.device)
                moments = both_moments(self.vae, pixels)
                out[[first + i for i in good]] = to_stored(moments, self.index["dtype"])
            first += len(batch)
            bar.update(len(batch))
        path = shard_path(self.folder, shard)
        with atomic_write(path) as temp:
            save_array(temp, out)
            note = {"unreadable": unreadable, "checksum": file_crc32(temp)}
            with atomic_write(path.with_suffix(".json")) as temp_note:  # first: then it is done
                temp_note.write_text(json.dumps(note))

    def finish(self) -> None:
        """Join what all ranks found, once all shards are there; main rank only."""
        files = [shard_path(self.folder, shard) for shard in range(num_shards(self.index))]
        notes = {path: json.loads(path.with_suffix(".json").read_text()) for path in files}
        self.index["unreadable"] = [e for note in notes.values() for e in note["unreadable"]]
        if len(self.index["unreadable"]) == len(self.dataset):
            raise UserError(f"--data-path {self.args.data_path}: no image of it can be read")
        checksums = {path.name: note["checksum"] for path, note in notes.items()}
        columns = {LABELS: self.dataset.labels.numpy(), KEYS: self.dataset.keys()}
        for name, column in columns.items():
            with atomic_write(self.folder / name) as temp:
                save_array(temp, column)
            checksums[name] = file_crc32(self.folder / name)
        self.index |= {"version": VERSION, "checksums": checksums}
        self.index["complete"] = True
        write_index(self.folder, self.index)
        for path in files:
            path.with_suffix(".json").unlink()
        self.measure()

    def measure(self) -> None:
        """Write the index with mean and deviation of each channel over all draws of all latents."""
        cache = CachedLatents(self.folder)
        count, sums = 0, torch.zeros(2, self.index["latent_shape"][0], dtype=torch.float64)
        for rows in torch.arange(len(cache)).split(MEASURED_AT_ONCE):
            for flip in (False, True):
                moments = cache.moments([(int(row), flip) for row in rows]).double()
                mean, *std = moments.transpose(0, 1)  # each (N, C, H, W)
                second = mean**2 + sum(part**2 for part in std)
                sums += torch.stack([part.sum(dim=(0, 2, 3)) for part in (mean, second)])
                count += mean[:, 0].numel()
        mean, second = sums / count
        std = (second - mean**2).clamp(min=MIN_STD**2).sqrt()
        self.index["latent_norm"] = {"mean": mean.tolist(), "std": std.tolist()}
        write_index(self.folder, self.index)

    def add_features(self, name: str, grid: int) -> None:
        """Write what `--repa NAME` wants at grid x grid tokens, this rank's shards; collective."""
        index, rt = self.index, self.rt
        found = read_features_index(self.folder)
        if found is not None and (found["encoder"], found["grid"]) != (name, grid):
            raise UserError(
                f"--features {name}: {self.folder} has those of {found['encoder']} on a grid of "
                f"{found['grid']}; delete its features, or give another --out"
            )
        if found is not None and found["complete"]:
            return
        network = repa.Encoder(name, grid, rt.device)
        process.barrier()  # all have looked
        if rt.is_main:
            write_features_index(self.folder, name, grid, network.width)
        bad = {entry["index"] for entry in index["unreadable"]}
        for shard in range(rt.rank, num_shards(index), rt.world_size):
            path, rows = features_path(self.folder, shard), shard_rows(index, shard)
            if path.exists():
                continue
            out = np.zeros((len(rows), 2, grid * grid, network.width), dtype=np.float16)
            good = [place for place, row in enumerate(rows) if row not in bad]
            bar = tqdm(good, desc=f"features, shard {shard}", disable=not rt.is_main, leave=False)
            for first in range(0, len(good), self.args.batch_size):
                places = good[first : first + self.args.batch_size]
                pixels = self.dataset.pixels(torch.tensor([rows[place] for place in places]))
                images = pixels.to(rt.device).float() / 127.5 - 1
                for mirror, half in enumerate((images, images.flip(-1))):
                    out[places, mirror] = network(half).half().cpu().numpy()
                bar.update(len(places))
            with atomic_write(path) as temp:
                save_array(temp, out)
        process.barrier()
        if rt.is_main:
            paths = [features_path(self.folder, shard) for shard in range(num_shards(index))]
            sums = {path.name: file_crc32(path) for path in paths}
            write_features_index(self.folder, name, grid, network.width, sums)
        process.barrier()

    def check(self) -> float:
        """Encode some images again; returns the largest difference from the cache.

        Raises:
            UserError: it is larger than the cache's precision explains.
        """
        cache = CachedLatents(self.folder)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(cache), generator=generator)[:NUM_CHECKED].tolist()
        pixels = self.dataset.pixels(torch.from_numpy(cache.rows[chosen])).to(self.rt.device)
        halves = [cache.moments([(i, flip) for i in chosen]) for flip in (False, True)]
        found, expected = torch.stack(halves, dim=1), both_moments(self.vae, pixels)
        dtype = self.index["dtype"]
        rounded = from_stored(torch.from_numpy(to_stored(expected, dtype)), dtype)
        tolerance = 1e-3 + 2e-2 * expected.abs()  # other batches, other kernels
        if ((found - rounded).abs() > tolerance).any():
            raise UserError(
                f"--out {self.folder}: images encoded again are not what the cache has; delete it "
                "and encode anew"
            )
        return (found - expected).abs().max().item()


def check_out(folder: Path) -> dict[str, Any] | None:
    """Return the index of a cache that was begun, None if a new one can be written.

    Raises:
        UserError: the folder holds something else.
    """
    found = cache_index(folder)
    if found is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--out {folder} exists and is not a latent cache; choose another")
    return found


def open_index(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the index of a cache that was begun, else the one that is wanted.

    Raises:
        UserError: what was begun is not what is wanted.
    """
    found = check_out(folder)
    if found is None:
        return wanted
    for name, name_of_flag in FLAGS.items():
        if found.get(name) != wanted[name]:
            shown = "vae_path" if name == "vae" else name
            raise UserError(
                f"--out {folder} was begun with {shown} {found.get(shown)}, now {name_of_flag} "
                f"means {wanted[shown]}: give another --out, or delete it"
            )
    return found


def encode(args: argparse.Namespace, rt: process.Runtime) -> str:
    """Make or continue the cache; returns what the main rank prints."""
    folder = Path(args.out)
    contained = args.data_path.startswith(CONTAINERS)
    if not contained and (
        not Path(args.data_path).is_dir() or cache_index(args.data_path) is not None
    ):
        raise UserError(f"--data-path {args.data_path} is not an image folder")
    check_out(folder)
    if args.features:
        repa.split_name(args.features, "--features")
    dataset = load_dataset(args.data_path, image_size=args.image_size)
    vae = load_vae(args.vae_path, device=rt.device)
    if not isinstance(vae, VAE):
        raise UserError("--vae-path none: pixels need no cache")
    vae.check_size(args.image_size)
    wanted = plan(
        dataset,
        vae,
        data_path=args.data_path,
        vae_path=args.vae_path,
        dtype=process.long_name(process.DTYPES[args.dtype]),
        shard_size=args.shard_size,
    )
    index = open_index(folder, wanted)
    process.barrier()  # all have looked
    encoder = Encoder(args, dataset, vae, index, rt)
    if not index["complete"]:
        if rt.is_main:
            write_index(folder, index)
        encoder.encode_shards()
        process.barrier()
        if rt.is_main:
            encoder.finish()
    elif index.get("latent_norm") is None and rt.is_main:  # not measured before
        encoder.measure()
    if args.features:
        process.barrier()
        encoder.add_features(args.features, args.feature_grid or index["latent_shape"][1] // 2)
    if not rt.is_main:
        return ""
    lines = [f"checked {NUM_CHECKED} images: largest difference {encoder.check():.1e}"]
    unreadable = index["unreadable"]
    lines += [f"not readable: {entry['error']}" for entry in unreadable]
    good = index["num_images"] - len(unreadable)
    skipped = f", {len(unreadable)} NOT READABLE (above)" if unreadable else ""
    return "\n".join([*lines, f"{good:,} images{skipped}: {folder}"])


def main(args: argparse.Namespace) -> None:
    """Encode and report."""
    rt = process.setup(process.LONG_WAIT)
    report = encode(args, rt)
    if rt.is_main:
        print(printable(report))
    process.finish()


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
