"""index.json of a latent cache: what the cache is of, checked entry by entry when it is read.

format, version  which code reads it
data_path, files the image folder (absolute), a hash of its files' names
class_names, num_images, image_size
vae_path, vae    where the VAE came from, a hash of its weights; scale and shift are in that hash
latent_shape     [C, H, W]; dtype; shard_size, images a shard
num_moments      2, mean and deviation; 1 of a deterministic autoencoder; 2 before version 3
latent_norm      {"mean": [C], "std": [C]} of all latents; none before version 3
unreadable       [{"index": number of the image, "error": why}]
checksums        {file: its CRC-32} of all shards, labels.npy and, since version 3, keys.npy; none
                 before version 2
complete         false until all is there
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import FileError
from common.files import atomic_write

FORMAT, VERSION = "dit-moe latents", 3
LABELS, KEYS = "labels.npy", "keys.npy"
DTYPES = ("float16", "bfloat16", "float32")


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _place(value: Any) -> bool:
    if _text(value) and value.startswith("hf:"):
        return True
    path = Path(value.removeprefix("tar:")) if _text(value) else Path()
    return path.is_absolute() and ".." not in path.parts


def _list_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _problem(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("index")) is int and _text(value.get("error"))


ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data_path": (_place, 'an absolute path without ".."'),
    "files": (_text, "a text"),
    "num_images": (_count, "a positive integer"),
    "image_size": (_count, "a positive integer"),
    "class_names": (_list_of(_text), "a list of names"),
    "vae_path": (_text, "a text"),
    "vae": (_text, "a text"),
    "latent_shape": (lambda v: _list_of(_count)(v) and len(v) == 3, "three positive integers"),
    "dtype": (lambda v: _text(v) and v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "shard_size": (_count, "a positive integer"),
    "num_moments": (_count, "1 or 2"),
    "complete": (lambda v: isinstance(v, bool), "true or false"),
    "unreadable": (_list_of(_problem), 'a list of {"index", "error"}'),
}


def is_norm(value: Any, channels: int) -> bool:
    """Tell whether a value is {"mean": [C], "std": [C]} of numbers, the second ones positive."""
    if not isinstance(value, dict) or value.keys() != {"mean", "std"}:
        return False
    return all(
        isinstance(part, list)
        and len(part) == channels
        and all(isinstance(x, int | float) and math.isfinite(x) for x in part)
        for part in value.values()
    ) and all(x > 0 for x in value["std"])


def shard_path(folder: Path, shard: int) -> Path:
    """Return the file of a shard."""
    return folder / f"shard-{shard:05d}.npy"


def shard_rows(index: dict[str, Any], shard: int) -> range:
    """Return the numbers of the images in a shard."""
    size, count = index["shard_size"], index["num_images"]
    return range(shard * size, min((shard + 1) * size, count))


def num_shards(index: dict[str, Any]) -> int:
    """Return how many shards the finished cache has."""
    return -(-index["num_images"] // index["shard_size"])


def cache_index(path: str | Path) -> dict[str, Any] | None:
    """Return the index of a latent cache, None for any other path.

    Raises:
        FileError: index.json is damaged, has wrong entries or is of a newer version.
    """
    file = Path(path) / "index.json"
    try:
        index = json.loads(file.read_text()) if file.is_file() else None
    except (ValueError, RecursionError) as error:
        raise FileError(f"--data-path {path}: index.json is damaged: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        return None
    if not _count(index.get("version")) or index["version"] > VERSION:
        raise FileError(
            f"{file}: version {index.get('version')!r}, this code reads 1 to {VERSION}; encode anew"
        )
    if "bad" in index:  # version 1
        index["unreadable"] = index.pop("bad")
    index.setdefault("num_moments", 2)
    _check(index, file)
    return index


def _check(index: dict[str, Any], file: Path) -> None:
    for name, (valid, meaning) in ENTRIES.items():
        if not valid(index.get(name)):
            shown = repr(index.get(name))[:80]
            raise FileError(f"{file}: {name} is {shown}, not {meaning}")
    outside = [e["index"] for e in index["unreadable"] if not 0 <= e["index"] < index["num_images"]]
    if outside:
        raise FileError(f"{file}: unreadable names image {outside[0]} of {index['num_images']}")
    if index["num_moments"] > 2:
        raise FileError(f"{file}: num_moments is {index['num_moments']}, not 1 or 2")
    norm, channels = index.get("latent_norm"), index["latent_shape"][0]
    if norm is not None and not is_norm(norm, channels):
        raise FileError(f"{file}: latent_norm is not mean and std of {channels} channels")
    checksums = index.get("checksums", {})
    if not isinstance(checksums, dict) or not all(map(_text, checksums.values())):
        raise FileError(f"{file}: checksums is not an object of texts")
    # Every name must be one of ours, so that none such as "../x" is opened.
    names = {shard_path(Path(), shard).name for shard in range(min(num_shards(index), 10**6))}
    expected = {*names, LABELS, *([KEYS] if index["version"] > 2 else [])}
    if checksums and checksums.keys() != expected:
        different = sorted(checksums.keys() ^ expected)
        raise FileError(f"{file}: checksums has, or lacks, {different[0]!r}")


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write index.json."""
    with atomic_write(folder / "index.json") as temp:
        temp.write_text(json.dumps(index, indent=1) + "\n")
