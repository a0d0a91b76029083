"""Encoders of timm as eyes for any data: their features, and a reader of classes trained on them.

In order: `open_encoder` (by name, with weights that are downloaded or in a file), `TimmExtractor`,
`Reader` and `train_reader`, a linear layer on features of real images.

Shape letters: N batch, C channels, S image size, D features.
"""

import difflib
import hashlib
import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import FileError, UserError
from common.files import atomic_write
from data import ImageDataset
from evaluation.classifiers import Features
from evaluation.flags import PREFIX

DEFAULT_BACKBONE = "timm:tf_efficientnet_lite0"
DINO_PIXELS = 224  # that FD-DINOv2 is defined with, arXiv:2306.04675; timm's default is 518
MAX_READ = 20_000  # images that a reader learns from
TEST_EVERY = 10  # one in so many images, by its key, is kept to measure a reader
STEPS, WEIGHT_DECAY = 300, 1e-3  # of the linear layer


class Encoder(NamedTuple):
    """A frozen network of timm and how it wants its images."""

    name: str
    network: Any
    size: int  # pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    identity: str  # a hash of name and weights

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Return features (N, D) fp32 of images (N, C, S, S) in [-1, 1]; gray ones become RGB."""
        rgb = (images.expand(-1, 3, -1, -1).float() + 1) / 2
        if rgb.shape[-1] != self.size:
            size = (self.size, self.size)
            rgb = F.interpolate(rgb, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (
            torch.tensor(part, device=rgb.device).view(3, 1, 1) for part in (self.mean, self.std)
        )
        return self.network((rgb - mean) / std).float()


def split_name(text: str) -> tuple[str, str | None]:
    """Return the name and, if there is one, the file of "timm:NAME" or "timm:NAME:FILE".

    Raises:
        UserError: it is neither.
    """
    kind, _, rest = text.partition(":")
    name, _, file = rest.partition(":")
    if kind != PREFIX[:-1] or not name:
        raise UserError(f"{text} is not timm:NAME or timm:NAME:FILE")
    return name, file or None


def open_encoder(text: str, device: torch.device) -> Encoder:
    """Build an encoder of timm.

    Args:
        text: timm:NAME, such as timm:vit_large_patch14_dinov2.lvd142m, whose weights timm
            downloads, or timm:NAME:FILE with a file of its state dict.
        device: where it runs.

    Raises:
        UserError: timm knows no such network, or the weights are not there or another's.
    """
    if importlib.util.find_spec("timm") is None:
        raise UserError(f"{text} needs a package that is not here: pip install timm")
    import timm
    from timm.data import resolve_model_data_config

    name, weights = split_name(text)
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(f"{text}: timm has no such network; near: {', '.join(near)}")
    options: dict[str, Any] = {"img_size": DINO_PIXELS} if "dinov2" in name else {}
    try:
        network = timm.create_model(name, pretrained=weights is None, num_classes=0, **options)
    except Exception as error:  # of many types, by what fails in the download
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{text}: its weights can't be had ({reason}); give a file of them, timm:NAME:FILE"
        ) from error
    if weights is not None:
        _load(network, weights)
    data = resolve_model_data_config(network)
    digest = hashlib.sha256(name.encode())
    for tensor in network.state_dict().values():
        digest.update(tensor.cpu().float().numpy().tobytes())
    network = network.eval().requires_grad_(False).to(device)
    size, identity = data["input_size"][-1], digest.hexdigest()[:16]
    return Encoder(name, network, size, tuple(data["mean"]), tuple(data["std"]), identity)


def _load(network: nn.Module, weights: str) -> None:
    """Load a state dict by its names, else in its order, without the head of classes.

    Raises:
        UserError: it can't be read, or has other tensors.
    """
    try:
        if weights.endswith(".safetensors"):
            from safetensors.torch import load_file

            found: Mapping[str, Tensor] = load_file(weights)
        else:
            found = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, by what is wrong in the file
        raise UserError(f"timm:NAME:FILE: {weights} does not load: {error}") from error
    ours = network.state_dict()
    if ours.keys() <= found.keys():
        state = {name: found[name] for name in ours}
    else:  # other names, the same network
        state = dict(zip(ours, found.values(), strict=False))
    different = [n for n in ours if n not in state or state[n].shape != ours[n].shape]
    if different:
        raise UserError(
            f"timm:NAME:FILE: {weights} is of another network: {different[0]} does not fit"
        )
    network.load_state_dict(state)


class TimmExtractor:
    """The features of an encoder of timm, as what `evaluation.metrics` compares."""

    def __init__(self, encoder: Encoder, device: torch.device, reader: "Reader | None" = None):
        """Use an encoder; a reader on it gives logits, for the inception score."""
        self.encoder, self.device, self.reader = encoder, device, reader
        self.name = f"{encoder.name} features"
        self.identity = f"timm-{encoder.identity}" + (f"-{reader.identity}" if reader else "")

    def __call__(self, images: Tensor) -> Features:
        """Look at images (N, C, S, S) uint8; there are no features with positions."""
        pool = self.encoder.features(images.to(self.device).float() / 127.5 - 1)
        nothing = pool.new_zeros(len(pool), 0)
        logits = nothing if self.reader is None else self.reader.read(pool)
        return Features(pool.cpu(), nothing.cpu(), logits.cpu())


class Reader(nn.Module):
    """A linear layer on an encoder's features, which tells the classes of a data set apart."""

    def __init__(self, encoder: Encoder, state: Mapping[str, Tensor]) -> None:
        """Use trained values: mean, std (D,), weight (classes, D), bias (classes,)."""
        super().__init__()
        self.encoder = encoder
        for name, value in state.items():
            self.register_buffer(name, value)
        digest = hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values()))
        self.identity = digest.hexdigest()[:8]

    def read(self, features: Tensor) -> Tensor:
        """Return logits (N, classes) of features (N, D)."""
        values = dict(self.named_buffers(recurse=False))
        return F.linear(
            (features - values["mean"]) / values["std"], values["weight"], values["bias"]
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) of images (N, C, S, S) in [-1, 1]."""
        return self.read(self.encoder.features(images))


class ReaderResult(NamedTuple):
    """A trained reader, used as `evaluation.classifiers.Classifier` is."""

    model: Reader
    accuracy: float  # share of the images kept from it that it reads right


def train_reader(
    dataset: ImageDataset, encoder: Encoder, device: torch.device, cache: Path, source: str
) -> ReaderResult:
    """Train a reader on a data set's images, or take the one that is kept; CPU or GPU, one process.

    Args:
        dataset: images and their classes; one in `TEST_EVERY` is kept to measure it.
        encoder: whose features it reads.
        device: where the encoder runs.
        cache: folder of trained readers.
        source: tells this data from any other.

    Raises:
        UserError: too few images.
    """
    key = f"{source} {encoder.identity} {dataset.image_size}"
    path = cache / f"reader-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if path.exists():
        try:
            with np.load(path) as file:
                found = {name: torch.from_numpy(file[name]) for name in file.files}
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise FileError(f"{path} is damaged ({error}); delete it") from error
        accuracy = found.pop("accuracy").item()
        return ReaderResult(Reader(encoder, found).to(device), accuracy)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(dataset), generator=generator)[:MAX_READ]
    features = _all_features(dataset, encoder, device, chosen)
    labels = dataset.labels[chosen]
    kept = torch.from_numpy(dataset.keys()[chosen.numpy()] % np.uint64(TEST_EVERY) == 0)
    if not kept.any() or len(labels[~kept].unique()) < 2:
        raise UserError(f"--features classifier: {len(dataset)} images of it are too few to learn")
    state = _fit_linear(features[~kept], labels[~kept], dataset.num_classes)
    reader = Reader(encoder, state)
    accuracy = (reader.read(features[kept]).argmax(1) == labels[kept]).float().mean().item()
    arrays = {name: value.numpy() for name, value in state.items()}
    with atomic_write(path) as temp, open(temp, "wb") as file:
        np.savez(file, accuracy=np.array(accuracy), **arrays)  # type: ignore[arg-type]
    return ReaderResult(reader.to(device), accuracy)


def _all_features(
    dataset: ImageDataset, encoder: Encoder, device: torch.device, chosen: Tensor
) -> Tensor:
    parts = []
    for part in chosen.split(64):
        images = dataset.pixels(part).to(device).float() / 127.5 - 1
        parts.append(encoder.features(images).cpu())
    return torch.cat(parts)


def _fit_linear(features: Tensor, labels: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Fit a linear layer to standardised features by the whole set at once."""
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-6
    inputs = (features - mean) / std
    weight = torch.zeros(num_classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.02, weight_decay=WEIGHT_DECAY)
    for _ in range(STEPS):
        loss = F.cross_entropy(F.linear(inputs, weight, bias), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"mean": mean, "std": std, "weight": weight.detach(), "bias": bias.detach()}
