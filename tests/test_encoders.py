"""Encoders of timm as eyes: their features, weights in a file, and a reader of any classes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import random_model, run_main
from PIL import Image
from torch.testing import assert_close

import evaluate
from checkpoint.state import save_safetensors
from common.errors import UserError
from data import load_dataset
from evaluation.encoders import TimmExtractor, open_encoder, train_reader
from evaluation.sample_files import read_object
from models import DiTConfig

pytest.importorskip("timm")
CPU = torch.device("cpu")
NAME = "test_convnext"  # timm's own, for tests
CONFIG = DiTConfig(
    input_size=16, patch_size=4, in_channels=3, hidden_size=32, depth=12, num_heads=2,
    num_classes=3, num_experts=4, mlp_ratio=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a file of random weights of the encoder, its head included."""
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save(timm.create_model(NAME, num_classes=1000).state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three classes that their colours tell apart."""
    folder, rng = tmp_path_factory.mktemp("data") / "images", np.random.default_rng(0)
    for label, name in enumerate(["blue", "green", "red"]):
        (folder / name).mkdir(parents=True)
        for index in range(40):
            pixels = rng.integers(0, 60, (16, 16, 3))
            pixels[..., 2 - label] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def test_an_encoder_sees_what_timm_sees(weights: str) -> None:
    import timm
    from timm.data import resolve_model_data_config

    encoder = open_encoder(f"timm:{NAME}:{weights}", CPU)
    network: Any = timm.create_model(NAME, num_classes=1000)
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.reset_classifier(0)
    data = resolve_model_data_config(network)
    size = data["input_size"][-1]
    images = torch.rand(2, 3, size, size)
    mean, std = (torch.tensor(data[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = network.eval()((images - mean) / std)
    assert_close(encoder.features(images * 2 - 1), expected, rtol=1e-4, atol=1e-5)
    gray = TimmExtractor(encoder, CPU)(torch.zeros(2, 1, 16, 16, dtype=torch.uint8))
    assert gray.pool.shape == expected.shape and gray.spatial.shape == gray.logits.shape == (2, 0)


def test_weights_of_other_names_load_in_their_order_and_of_other_shapes_never(
    weights: str, tmp_path: Path
) -> None:
    state = torch.load(weights, weights_only=True)
    renamed = {f"{i}": value for i, value in enumerate(state.values())}
    torch.save(renamed, tmp_path / "renamed.pt")
    first, again = (
        open_encoder(f"timm:{NAME}:{p}", CPU) for p in (weights, tmp_path / "renamed.pt")
    )
    assert first.identity == again.identity
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"timm:NAME:FILE: .*other\.pt is of another network"):
        open_encoder(f"timm:{NAME}:{tmp_path}/other.pt", CPU)
    with pytest.raises(UserError, match="timm:resnet_51: timm has no such network; near: resnet"):
        open_encoder("timm:resnet_51", CPU)


def test_a_reader_learns_the_classes_of_a_folder_once(
    coloured: Path, weights: str, tmp_path: Path
) -> None:
    encoder = open_encoder(f"timm:{NAME}:{weights}", CPU)
    dataset = load_dataset(coloured, image_size=16)
    reader = train_reader(dataset, encoder, CPU, tmp_path, "colours")
    assert reader.accuracy > 0.9
    images, labels = dataset.__getitems__([(i, False) for i in range(0, 120, 7)])
    assert (reader.model(images).argmax(1) == labels).float().mean() > 0.9
    (kept,) = tmp_path.glob("reader-*.npz")
    written = kept.stat().st_mtime_ns
    again = train_reader(dataset, encoder, CPU, tmp_path, "colours")
    assert again.accuracy == reader.accuracy and kept.stat().st_mtime_ns == written
    assert_close(again.model(images), reader.model(images), rtol=0, atol=0)


@pytest.mark.parametrize("features", ["classifier", "timm"])
def test_samples_of_a_model_of_any_folder_are_judged(
    coloured: Path, weights: str, tmp_path: Path, features: str
) -> None:
    model = random_model(CONFIG, std=0.1)
    settings = {
        "objective": "rf", "vae_path": "none", "data_path": str(coloured),
        "class_names": ["red", "blue", "green"], "image_size": 16,
    }  # fmt: skip
    save_safetensors(tmp_path / "w.safetensors", model.state_dict(), model.config, settings)
    eyes = f"timm:{NAME}:{weights}"
    flags = ("--features", features if features == "classifier" else eyes, "--backbone", eyes)
    sizes = ("--num-samples", 12, "--num-sampling-steps", 2, "--dtype", "fp32", "--cfg-scale", 1)
    where = ("--cache", tmp_path / "cache", "--out", tmp_path / "out")
    run_main(evaluate, "--ckpt", tmp_path / "w.safetensors", *flags, *sizes, *where)
    result = read_object(tmp_path / "out" / "metrics.json")
    values = result["values"]["seed 0"]
    assert values[f"FD ({NAME} features)"] > 0 and "FID" not in str(values)
    assert 0 <= values["precision"] <= 1 and not any("sFD" in name for name in values)
    if features == "classifier":
        assert 0 <= values["read as the class asked for"] <= 1
        assert result["facts"]["real test images read right"] > 0.9
