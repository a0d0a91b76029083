"""Sampling's compiled steps: the same pictures, one graph."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import TINY, random_model
from torch._dynamo.testing import CompileCounterWithBackend

from checkpoint.state import save_safetensors
from common.errors import UserError
from sample import build_parser
from sampling.flags import drawing_options
from sampling.grid import draw
from sampling.opening import open_run

DEEP = dataclasses.replace(TINY, depth=12, in_channels=1, qk_norm=False)
CPU = torch.device("cpu")


@pytest.mark.parametrize("flags, graphs", [((), 1), (("--cfg-interval", "0.2", "0.7"), 2)])
def test_guided_compiled_steps_of_twelve_blocks_are_a_graph_a_batch_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], graphs: int
):
    path = tmp_path / "model.safetensors"
    told = {"objective": "rf", "vae_path": "none"}
    save_safetensors(path, random_model(DEEP, std=0.1).state_dict(), DEEP, told)
    given = ["--ckpt", str(path), "--dtype", "fp32", "--num-sampling-steps", "6", *flags]
    labels = torch.tensor([0, 1, 2, 0])
    pictures = []
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    for switch in ("False", "True"):
        args = build_parser().parse_args([*given, "--compile", switch, "--batch-size", "2"])
        run = open_run(args.ckpt, device=CPU, **drawing_options(args))
        pictures.append(draw(run, labels, args, CPU))
    assert torch.equal(*pictures)
    draw(run, labels, args, CPU)  # another picture of the same shape
    assert backend.frame_count == graphs


@pytest.mark.parametrize("other", [("--quantize", "int8"), ("--offload", "disk")])
def test_compile_is_refused_with_blocks_that_come_or_are_stored_otherwise(
    tmp_path: Path, other: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sampling.opening.check_options", lambda *_, **__: None)  # torchao or not
    path = tmp_path / "model.safetensors"
    save_safetensors(path, random_model(DEEP).state_dict(), DEEP, {"objective": "rf"})
    args = build_parser().parse_args(["--ckpt", str(path), "--compile", *other])
    with pytest.raises(UserError, match="--compile goes with neither"):
        open_run(args.ckpt, device=CPU, **drawing_options(args))
