"""Classifiers of digits and Fashion-MNIST, trained on real training images and never on samples.

They read samples as an independent witness, and give the features by which small data sets are
judged where Inception's mean nothing.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from common.errors import FileError, UserError
from common.files import atomic_write, verify_file
from data import ImageDataset, load_dataset

EPOCHS = {"digits": 40, "fashion-mnist": 3}
SIZES = {"digits": 16, "fashion-mnist": 32}  # pixels that the network looks at
FORMAT = 2  # of the cached files


class Features(NamedTuple):
    """What an extractor sees in N images."""

    pool: Tensor  # (N, D) fp32: of the Fréchet distance, precision and recall
    spatial: Tensor  # (N, S) fp32, with positions: of the spatial Fréchet distance
    logits: Tensor  # (N, number of classes) fp32: of the inception score


class SmallCNN(nn.Module):
    """Classifier of small gray images, which are scaled to `size` pixels."""

    def __init__(self, num_classes: int, size: int) -> None:
        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

        super().__init__()
        self.size = size
        self.stages = nn.Sequential(*stage(1, 32), *stage(32, 64), *stage(64, 128))
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(2 * size**2, 128), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, num_classes))

    def features(self, images: Tensor) -> Features:
        """Look at images (N, 1, S, S) in [-1, 1]; 7 of 128 channels are kept with positions."""
        if images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear")
        maps = self.stages(images)  # (N, 128, size / 8, size / 8)
        pool = self.hidden(maps)
        return Features(pool, maps[:, :7].flatten(1), self.head(pool))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, num_classes) of images (N, 1, S, S) in [-1, 1]."""
        return self.features(images).logits


class Classifier(NamedTuple):
    """A trained network and how well it reads real images it has not seen."""

    model: SmallCNN  # in eval mode
    accuracy: float  # share of the test images, in [0, 1]


def load_classifier(name: str, cache: Path, fashion_mnist_root: str | None = None) -> Classifier:
    """Read a classifier from the cache, or train it and keep it there.

    Args:
        name: of the data, "digits" or "fashion-mnist".
        cache: folder of the trained classifiers.
        fashion_mnist_root: see `data.load_dataset`.

    Raises:
        UserError: there is no classifier of that data.
        FileError: the file in the cache is damaged.
    """
    if name not in EPOCHS:
        raise UserError(f"there are classifiers for {' and '.join(EPOCHS)}, not for {name}")
    path = cache / f"{name}.pt"
    model = SmallCNN(10, SIZES[name])
    try:
        saved = torch.load(path, weights_only=True) if path.exists() else {}
        if saved.get("format") == FORMAT:
            verify_file(path)
            model.load_state_dict(saved["model"])
            return Classifier(model.eval(), float(saved["accuracy"]))
    except Exception as error:  # of many types, by what is wrong in the file
        raise FileError(f"{path} is damaged; delete it, and it is trained again") from error

    def split(part: str) -> tuple[Tensor, Tensor]:
        return load_all(load_dataset(name, split=part, fashion_mnist_root=fashion_mnist_root))

    train_classifier(model, *split("train"), num_epochs=EPOCHS[name], shift=name == "digits")
    images, labels = split("test")
    accuracy = (predict(model, images) == labels).float().mean().item()
    saved = {"format": FORMAT, "model": model.state_dict(), "accuracy": accuracy}
    with atomic_write(path) as temp:
        torch.save(saved, temp)
    return Classifier(model, accuracy)


def load_all(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """Return all images (n, C, S, S) in [-1, 1] and labels (n,), unflipped."""
    return dataset.__getitems__([(index, False) for index in range(len(dataset))])


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the classes (n,) that a classifier in eval mode reads in images (n, 1, S, S)."""
    return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])


def train_classifier(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    num_epochs: int,
    shift: bool,
    seed: int = 0,
) -> None:
    """Train with AdamW, a one-cycle rate and batches of 128, changed at random.

    Args:
        model: maps images to logits; left in eval mode.
        images: (n, 1, S, S) in [-1, 1].
        labels: (n,).
        num_epochs: passes over the images.
        shift: move each batch by up to one pixel; else mirror half of the images.
        seed: of the weights, the order and the changes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
    batch_size = min(128, len(images))
    steps = num_epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="classifier") as bar, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of dropout
        for _ in range(num_epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order[: len(order) // batch_size * batch_size].split(batch_size):
                batch = images[index]
                if shift:
                    offsets = torch.randint(-1, 2, (2,), generator=generator).tolist()
                    batch = batch.roll(offsets, dims=(-2, -1))
                else:
                    mirrored = torch.rand(len(batch), 1, 1, 1, generator=generator) < 0.5
                    batch = torch.where(mirrored, batch.flip(-1), batch)
                loss = F.cross_entropy(model(batch), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()
