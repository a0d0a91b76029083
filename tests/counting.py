"""A tiny model whose routing depends on class and step, and small runs of expert_data.py on it."""

from pathlib import Path

import torch
from helpers import TINY_DIGITS, random_model, run_main

import expert_data
from checkpoint.state import save_safetensors
from routing.tables import ADDED, RoutingData

T, L, E, K = 4, TINY_DIGITS.depth, TINY_DIGITS.num_experts, TINY_DIGITS.num_experts_per_tok
SETTINGS = {"objective": "rf", "vae_path": "none", "data_path": "digits", "image_size": 8}
SETTINGS["class_names"] = list("0123456789")
STEPS = 3


def save_model(folder: Path, objective: str = "rf") -> str:
    """Write a model whose blocks do something, so that routing depends on class and step."""
    model = random_model(TINY_DIGITS, std=0.3)
    path = folder / f"{objective}.safetensors"
    save_safetensors(path, model.state_dict(), TINY_DIGITS, {**SETTINGS, "objective": objective})
    return str(path)


def command(ckpt: str, out: Path, *more: str) -> list[str]:
    """Return the flags of a small run: 3 images of each of 4 classes in batches of 5."""
    size = ("--num-per-class", "3", "--labels", "0", "2", "5", "9", "--batch-size", "5")
    steps = ("--num-sampling-steps", str(STEPS), "--dtype", "fp32")
    return ["--ckpt", ckpt, "--out", str(out), *size, *steps, *more]


def count(ckpt: str, out: Path, *more: str) -> RoutingData:
    """Run expert_data.py in this process."""
    run_main(expert_data, *command(ckpt, out, *more))
    return RoutingData.load(out)


def assert_same(one: RoutingData, other: RoutingData) -> None:
    for name in (*ADDED, "traced_ids", "traced_labels", "traced_images", "times"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
