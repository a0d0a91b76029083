"""Draw many samples of a checkpoint and let an independent classifier read them.

    python evaluate.py --ckpt results/DiT-Ti-1-rf-digits --num-samples 500

The classifier is trained on the real images the model learnt from, never on samples, and its
accuracy on real test images is printed beside the share of samples read as the class asked for.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import runtime
from checkpoint import atomic_write
from data import ImageDataset, load_dataset, load_vae
from diffusion import create_diffusion
from flags import FlagParser, number, sampling_flags, sampling_options
from weights import load_model, load_settings


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    data = parser.group("Data")
    data.add("--ckpt", required=True, help="checkpoint or run folder of ours")
    data.add("--num-samples", type=number(int, 1), default=500, help="spread evenly over classes")
    data.add("--classifier-cache", default="results/classifiers", help="folder of the classifiers")
    sampling_flags(parser, batch_size=100)
    return parser


# ------------------------------------------------------------------------------ classifiers


def load_all(dataset: ImageDataset) -> tuple[Tensor, Tensor]:
    """Return all images (n, C, S, S) in [-1, 1] and labels (n,), unflipped."""
    return dataset.__getitems__([(index, False) for index in range(len(dataset))])


def digits_classifier() -> tuple[Any, float]:
    """Fit scikit-learn's support vector classifier on real digits; returns (predict, accuracy)."""
    from sklearn.svm import SVC

    train_images, train_labels = load_all(load_dataset("digits", split="train"))
    test_images, test_labels = load_all(load_dataset("digits", split="test"))
    classifier = SVC(C=10, gamma="scale").fit(train_images.flatten(1).numpy(), train_labels.numpy())

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(classifier.predict(images.flatten(1).numpy()))

    return predict, (predict(test_images) == test_labels).float().mean().item()


class SmallCNN(nn.Sequential):
    """Classifier of small gray images (N, 1, 32, 32) -> (N, num_classes) logits."""

    def __init__(self, num_classes: int) -> None:
        def stage(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]

        head = [nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 16, num_classes)]
        super().__init__(*stage(1, 32), *stage(32, 64), *stage(64, 128), *head)


def fashion_mnist_classifier(cache: Path, root: str | None) -> tuple[Any, float]:
    """Train `SmallCNN` on Fashion-MNIST (3 epochs), or read it from the cache."""
    test_images, test_labels = load_all(
        load_dataset("fashion-mnist", split="test", fashion_mnist_root=root)
    )
    path = cache / "fashion-mnist.pt"
    model = SmallCNN(10)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        images, labels = load_all(
            load_dataset("fashion-mnist", split="train", fashion_mnist_root=root)
        )
        train_classifier(model, images, labels, num_epochs=3)
        with atomic_write(path) as temp:
            torch.save(model.state_dict(), temp)
    model.eval()

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        return torch.cat([model(part).argmax(dim=1) for part in images.split(500)])

    return predict, (predict(test_images) == test_labels).float().mean().item()


def train_classifier(model: nn.Module, images: Tensor, labels: Tensor, num_epochs: int) -> None:
    """Train with AdamW, one-cycle learning rate and random mirroring, batch 128."""
    generator = torch.Generator().manual_seed(0)
    steps = num_epochs * (len(images) // 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    with tqdm(total=steps, desc="classifier") as bar:
        for _ in range(num_epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in order[: len(order) // 128 * 128].split(128):
                batch = images[index]
                flip = torch.rand(len(batch), generator=generator) < 0.5
                batch = torch.where(flip[:, None, None, None], batch.flip(-1), batch)
                loss = F.cross_entropy(model(batch), labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()


def load_classifier(settings: dict[str, Any], cache: Path) -> tuple[Any, float]:
    """Return (predict, accuracy on real test images) for the data a checkpoint was trained on.

    Raises:
        ValueError: if there is no classifier for that data.
    """
    data_path = settings.get("data_path")
    if data_path == "digits":
        return digits_classifier()
    if data_path == "fashion-mnist":
        return fashion_mnist_classifier(cache, settings.get("fashion_mnist_root"))
    raise ValueError(
        f"--ckpt was trained on {data_path}; there are classifiers for digits and fashion-mnist"
    )


# ------------------------------------------------------------------------------ main


def main(args: argparse.Namespace) -> None:
    """Sample, classify, print."""
    device = runtime.pick_device()
    torch.manual_seed(0)
    try:
        settings = load_settings(args.ckpt)
        model = load_model(args.ckpt, device=device)
        predict, accuracy = load_classifier(settings, Path(args.classifier_cache))
        config = model.config
        diffusion = create_diffusion(settings["objective"], learn_sigma=config.learn_sigma)
        vae = load_vae(settings["vae_path"], device=device)
        labels = torch.arange(args.num_samples) % config.num_classes
        generator = torch.Generator().manual_seed(args.seed)
        shape = (config.in_channels, config.input_size, config.input_size)
        images = []
        for y in tqdm(labels.split(args.batch_size), desc="samples", unit="batch"):
            latents = diffusion.sample(
                model,
                torch.randn(len(y), *shape, generator=generator).to(device),
                y.to(device),
                **sampling_options(args),
                null_label=config.null_label,
                generator=generator,
            )
            images.append(vae.decode(latents).cpu())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    right = (predict(torch.cat(images)) == labels).numpy()
    print(f"classifier: {accuracy:.1%} of real test images read correctly")
    for label, name in enumerate(settings["class_names"]):
        print(f"  {name:>12}: {np.mean(right[labels.numpy() == label]):.1%}")
    print(f"{right.sum()} of {len(right)} samples read as the class asked for ({right.mean():.1%})")


if __name__ == "__main__":
    main(build_parser().parse_args())
