"""Labelled images in other containers: tar shards, and data sets of Hugging Face's `datasets`.

`TarImages` (webdataset's layout) and `HubImages`. Both give any sample by its number, so the
stateless stream of training batches is that of an image folder.

Shape letters: N batch, S image size.
"""

import hashlib
import importlib.util
import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import torch
from torch import Tensor

from common.errors import FileError, UserError
from data.datasets import OPENERS, ImageDataset, hash_all
from data.image_files import EXTENSIONS, square_of_bytes


class _Member(NamedTuple):
    """Where an image is in a tar file."""

    shard: int
    offset: int
    size: int
    name: str  # in the file, without ending


class TarImages(ImageDataset):
    """Tar shards of NAME.png with NAME.cls beside it, a class's number, or CLASS/NAME.png."""

    def __init__(self, path: Path, image_size: int, flip: bool) -> None:
        """List what is in the files; nothing is unpacked.

        Args:
            path: a .tar file or a folder of them, in the order of their names.
            image_size: S, pixels.
            flip: whether training mirrors half of the images.

        Raises:
            UserError: no tar files, or an image without a class.
            FileError: one is damaged.
        """
        self.shards = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not self.shards:
            raise UserError(f"--data-path tar:{path}: no .tar files in it")
        self.members: list[_Member] = []
        classes: dict[str, str] = {}  # member's name -> its class
        for shard, file in enumerate(self.shards):
            self._list(shard, file, classes)
        found = [
            classes.get(f"{m.shard}/{m.name}", m.name.rpartition("/")[0]) for m in self.members
        ]
        if "" in found:
            lost = self.members[found.index("")]
            raise UserError(
                f"{self.shards[lost.shard]}: {lost.name} has no {lost.name}.cls, and no folder "
                "that says its class"
            )
        numbers = all(name.isdecimal() for name in found)
        names = sorted(set(found), key=(lambda name: (int(name), name)) if numbers else None)
        known = {name: label for label, name in enumerate(names)}
        labels = torch.tensor([known[name] for name in found], dtype=torch.long)
        super().__init__(labels, names, 3, image_size, flip)

    def _list(self, shard: int, file: Path, classes: dict[str, str]) -> None:
        try:
            with tarfile.open(file, "r:") as archive:
                for item in archive:
                    name, ending = os.path.splitext(item.name.removeprefix("./"))
                    if not item.isfile():
                        continue
                    if ending.lower() in EXTENSIONS:
                        member = _Member(shard, item.offset_data, item.size, name)
                        self.members.append(member)
                    elif ending == ".cls":
                        content = archive.extractfile(item)
                        assert content is not None
                        classes[f"{shard}/{name}"] = content.read(1000).decode().strip()
        except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
            raise FileError(f"{file} cannot be read as a tar file: {error}") from error

    def _digest(self) -> str:
        """Hash the members' names and classes."""
        names = "\n".join(member.name for member in self.members)
        content = names.encode() + self.labels.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:32]

    def keys(self) -> Any:
        """Hash each member's name."""
        return hash_all(member.name.encode() for member in self.members)

    def _take(self, chosen: Tensor) -> None:
        self.members = [self.members[i] for i in chosen.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the (N, 3, S, S) uint8 pixels of N members."""
        return torch.stack([self._read(self.members[i]) for i in indices.tolist()])

    def _read(self, member: _Member) -> Tensor:
        shard = self.shards[member.shard]
        with open(shard, "rb") as file:
            file.seek(member.offset)
            content = file.read(member.size)
        array = square_of_bytes(content, f"{shard}/{member.name}", self.image_size)
        return torch.from_numpy(array).permute(2, 0, 1)


class HubImages(ImageDataset):
    """A data set of `datasets`: a hub id, a folder of parquet files, or an imagefolder."""

    def __init__(self, text: str, image_size: int, flip: bool) -> None:
        """Open it, downloaded if it must be.

        Args:
            text: NAME?split=train&image=image&label=label, of which NAME is enough.
            image_size: S, pixels.
            flip: whether training mirrors half of the images.

        Raises:
            UserError: no `datasets`, no such data, split or column.
        """
        if importlib.util.find_spec("datasets") is None:
            raise UserError(f"--data-path hf:{text} needs: pip install datasets")
        import datasets

        name, _, query = text.partition("?")
        options = {"split": "train", "image": "image", "label": "label", **dict(parse_qsl(query))}
        if unknown := options.keys() - {"split", "image", "label"}:
            raise UserError(f"--data-path hf:{text}: unknown {min(unknown)}; split, image, label")
        try:
            table: Any = datasets.load_dataset(name, split=options["split"])
        except Exception as error:  # of many types, by what is wrong there
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"--data-path hf:{text} does not load: {reason}") from error
        for column in (options["image"], options["label"]):
            if column not in table.column_names:
                there = ", ".join(table.column_names)
                raise UserError(f"--data-path hf:{text}: no column {column!r}; there are {there}")
        self.text, self.column = name, options["image"]
        self.table = table.cast_column(self.column, datasets.Image(decode=False))
        values = table[options["label"]][:]
        feature = table.features[options["label"]]
        names = getattr(feature, "names", None) or [str(v) for v in sorted(set(values))]
        known = {value: i for i, value in enumerate(sorted(set(values)))}
        is_class = hasattr(feature, "names")
        labels = torch.tensor([v if is_class else known[v] for v in values], dtype=torch.long)
        self.rows = torch.arange(len(labels))
        super().__init__(labels, list(names), 3, image_size, flip)

    def _digest(self) -> str:
        """Hash name, columns and labels: contents would take as long as reading them all."""
        content = json.dumps([self.text, sorted(self.table.column_names)]).encode()
        return hashlib.sha256(content + self.labels.numpy().tobytes()).hexdigest()[:32]

    def keys(self) -> Any:
        """Hash each row's number."""
        return hash_all(str(row).encode() for row in self.rows.tolist())

    def _take(self, chosen: Tensor) -> None:
        self.rows = self.rows[chosen]

    def pixels(self, indices: Tensor) -> Tensor:
        """Return the (N, 3, S, S) uint8 pixels of N rows."""
        return torch.stack([self._read(row) for row in self.rows[indices].tolist()])

    def _read(self, row: int) -> Tensor:
        image = self.table[row][self.column]
        content = image["bytes"]
        if content is None:
            with open(image["path"], "rb") as file:
                content = file.read()
        array = square_of_bytes(content, f"row {row} of hf:{self.text}", self.image_size)
        return torch.from_numpy(array).permute(2, 0, 1)


def _open_tars(place: str, image_size: int, flip: bool) -> TarImages:
    if not Path(place).exists():
        raise UserError(f"--data-path tar:{place}: no such file or folder")
    return TarImages(Path(place), image_size, flip)


OPENERS |= {"tar:": _open_tars, "hf:": HubImages}
