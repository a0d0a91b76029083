"""Sampling's conditioning, computed once, and its compiled steps: same pictures, one graph."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, random_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from checkpoint.state import save_safetensors
from common.errors import UserError
from diffusion import create_diffusion
from sample import build_parser
from sampling.conditions import evaluation_times, known_conditions
from sampling.flags import drawing_options
from sampling.grid import draw
from sampling.opening import open_run

DEEP = dataclasses.replace(TINY, depth=12, in_channels=1, qk_norm=False)
CPU = torch.device("cpu")
SAMPLERS = [
    *(("rf", name) for name in ("euler", "heun", "sde")),
    *(("ddpm", name) for name in ("ddpm", "ddim", "dpm++")),
]


@pytest.mark.parametrize("objective, sampler", SAMPLERS)
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_times_of_a_sampler_are_those_its_model_is_called_with(
    objective: str, sampler: str, learn_sigma: bool
):
    diffusion = create_diffusion(objective, learn_sigma=learn_sigma and objective == "ddpm")
    config = dataclasses.replace(DEEP, depth=1, learn_sigma=learn_sigma)
    model, seen = random_model(config, std=0.1), set()

    def record(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.update(t.tolist())
        return model(x, t, y)

    noise, labels = torch.randn(2, 1, config.input_size, config.input_size), torch.tensor([0, 1])
    options: dict[str, Any] = {"sampler": sampler, "num_steps": 7}
    diffusion.sample(record, noise, labels, **options, cfg_scale=2.0, null_label=config.null_label)
    assert set(evaluation_times(diffusion, learn_sigma=learn_sigma, **options)) == seen


@pytest.mark.parametrize("objective, sampler", SAMPLERS)
def test_looking_conditions_up_draws_the_same_latents_at_twelve_blocks(
    objective: str, sampler: str
):
    diffusion = create_diffusion(objective, learn_sigma=DEEP.learn_sigma)
    model, labels = random_model(DEEP, std=0.1).eval(), torch.tensor([2, 0, 2])
    noise = torch.randn(3, 1, DEEP.input_size, DEEP.input_size)
    options: dict[str, Any] = {"sampler": sampler, "num_steps": 5}
    sampled = partial(
        diffusion.sample, model, noise, labels, cfg_scale=2.0, null_label=DEEP.null_label, **options
    )
    expected = sampled(generator=torch.Generator().manual_seed(0))
    times = evaluation_times(diffusion, learn_sigma=DEEP.learn_sigma, **options)
    embedder, calls = model.t_embedder, []
    embedder.register_forward_hook(lambda _m, inputs, _o: calls.append(len(inputs[0])))
    with known_conditions(model, times, [0, 2, DEEP.null_label]):
        actual = sampled(generator=torch.Generator().manual_seed(0))
    assert calls == [len(times)]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert model.t_embedder is embedder
    assert torch.equal(sampled(generator=torch.Generator().manual_seed(0)), expected)


def test_tables_that_would_be_too_large_are_not_made():
    model = random_model(DEEP, std=0.1).eval()
    row = (DEEP.depth * 6 + 2) * DEEP.hidden_size * 4  # bytes
    for most, is_made in ((6 * row, True), (6 * row - 1, False)):
        with known_conditions(model, [0.0, 0.5, 1.0], [0, 1], most_bytes=most):
            is_lent = "StepNumber" in type(model.t_embedder).__name__
        assert is_lent == is_made


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
