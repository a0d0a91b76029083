"""A drawing step by step: sample.py's pictures, what each step saw, a photo's way, and refusals."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY, TINY_DIGITS, random_model, save_tiny_vae
from PIL import Image

import sample
from checkpoint.state import save_safetensors
from common.errors import FileError, UserError
from models import DiTConfig
from routing.tracing import Place
from sampling.drawing import (
    Drawing,
    DrawingPlan,
    Limits,
    check_plan,
    describe_experts,
    draw,
    label_in,
    model_time,
    route_picture,
)
from sampling.grid import draw as grid_images
from sampling.opening import DrawingRun, open_run

CONFIG = dataclasses.replace(TINY_DIGITS, depth=12)
NAMES = ["zero", "one", "two three", *map(str, range(3, 10))]
CPU = torch.device("cpu")


def saved(folder: Path, config: DiTConfig = CONFIG, **settings: Any) -> Path:
    """Write a random network and what its run says."""
    told = {"objective": "rf", "vae_path": "none", "class_names": NAMES} | settings
    path = folder / "model.safetensors"
    save_safetensors(path, random_model(config, std=0.1).state_dict(), config, told)
    return path


def opened(folder: Path, config: DiTConfig = CONFIG, **settings: Any) -> DrawingRun:
    return open_run(saved(folder, config, **settings), device=CPU, dtype="fp32")


def last(steps: Any) -> Drawing:
    """Return the finished drawing."""
    *_, drawing = steps
    return drawing


# ------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize(
    ("objective", "sampler"), [("rf", "euler"), ("rf", "heun"), ("ddpm", "ddpm"), ("ddpm", "ddim")]
)
def test_the_command_of_a_drawing_draws_its_pictures(
    tmp_path: Path, objective: str, sampler: str
) -> None:
    ckpt = saved(tmp_path, objective=objective)
    run = open_run(ckpt, device=CPU, dtype="fp32")
    asked = DrawingPlan(2, 3, 5, 2.0, (0.2, 0.9), sampler, 4)
    drawing = last(draw(run, check_plan(run, asked, Limits())))
    script, *flags = shlex.split(asked.command(str(ckpt), run.class_names))[1:]
    args = sample.build_parser().parse_args(flags)
    assert script == "sample.py" and args.labels == ["two three"]
    images = grid_images(run, torch.tensor([2, 2, 2]), args, CPU)
    expected = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert (drawing.pictures(-1) == expected).all()


def test_each_step_adds_what_the_network_saw_next(tmp_path: Path) -> None:
    run = opened(tmp_path)
    seen: list[torch.Tensor] = []
    run.model.x_embedder.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    plan = check_plan(run, DrawingPlan(4, 2, cfg_scale=1.0, num_steps=3), Limits())
    counts = [(drawing.steps_done, drawing.is_done) for drawing in draw(run, plan)]
    assert counts == [(0, False), (1, False), (2, False), (3, True)]
    drawing = last(draw(run, plan))
    assert drawing.times == pytest.approx([1, 2 / 3, 1 / 3])
    for saw, kept in zip(seen[:3], drawing.latents[:3], strict=True):
        assert torch.equal(saw, kept)


def test_a_drawing_in_latents_shows_pixels_of_its_autoencoder(tmp_path: Path) -> None:
    vae = save_tiny_vae(tmp_path / "vae")
    run = opened(tmp_path, TINY, vae_path=str(vae), class_names=["a", "b", "c"])
    plan = check_plan(run, DrawingPlan(1, 2, num_steps=2), Limits())
    drawing = last(draw(run, plan))
    assert drawing.pictures(0).shape == drawing.pictures(-1).shape == (2, 64, 64, 3)
    assert drawing.pictures(-1) is drawing.pictures(2)  # decoded once


def test_two_drawings_of_one_seed_start_from_the_same_noise(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    first, second = opened(tmp_path), opened(tmp_path / "b", objective="ddpm")
    plans = [
        check_plan(run, DrawingPlan(1, 2, 7, num_steps=2), Limits()) for run in (first, second)
    ]
    noises = [
        next(draw(run, plan)).latents[0] for run, plan in zip((first, second), plans, strict=True)
    ]
    assert torch.equal(*noises)


def test_what_the_model_draws_as_nan_is_said_and_not_shown(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with torch.no_grad():
        run.model.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(UserError, match="drew NaN in float32"):
        last(draw(run, check_plan(run, DrawingPlan(1, num_steps=2), Limits())))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": 10}, r"class: expected a whole number from 0 to 9, got 10"),
        ({"num_pictures": 9}, r"pictures: .* from 1 to 8, got 9"),
        ({"num_pictures": 1.5}, r"pictures: .* got 1.5"),
        ({"seed": None}, "seed: expected a whole number .* got nothing"),
        ({"seed": -1}, "seed: .* from 0 to 9223372036854775807, got -1"),
        ({"cfg_scale": float("nan")}, "guidance scale: .* got nan"),
        ({"cfg_interval": (0.8, 0.2)}, "its start 0.8 is above its end 0.2"),
        ({"cfg_interval": (0.0, 1.5)}, "end of the guidance interval: .* got 1.5"),
        ({"sampler": "ddpm"}, r"sampler ddpm: this checkpoint \(rf\) has euler, heun"),
        ({"num_steps": 0}, "steps: .* got 0"),
        ({"num_steps": 251}, "steps: .* from 1 to 250, got 251"),
        ({"label": "x"}, "class: .* got x"),
    ],
)
def test_a_plan_out_of_range_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run = opened(tmp_path)
    with pytest.raises(UserError, match=message):
        check_plan(run, DrawingPlan(1)._replace(**change), Limits())


def test_a_plan_whose_trace_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with pytest.raises(UserError, match="8 pictures in 250 steps: their routing takes"):
        check_plan(run, DrawingPlan(1, 8, num_steps=250), Limits(trace_bytes=2**18))


# ------------------------------------------------------------------------------ a photo


def photo(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    pixels = np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_a_photo_is_routed_at_the_chosen_noise_and_at_even_levels(
    tmp_path: Path, objective: str
) -> None:
    run = opened(tmp_path, objective=objective)
    path = photo(tmp_path / "photo.jpg")
    drawing, step = route_picture(run, str(path), t=0.33, label=3, num_levels=5)
    assert drawing.times == pytest.approx([1, 0.75, 0.5, 0.33, 0.25, 0]) and step == 3
    assert drawing.is_done and drawing.pictures(-1).shape == (1, 8, 8, 1)
    assert drawing.trace.ran[0].all() and not drawing.trace.ran[1].any()
    assert not drawing.trace.at(Place(step=step, layer=11)).isnan().all()


def test_a_photo_is_routed_as_the_objective_noises_it(tmp_path: Path) -> None:
    run = opened(tmp_path)
    path = photo(tmp_path / "photo.png")
    drawing, step = route_picture(run, str(path), t=0.25, label=None, seed=4)
    clean, noise = drawing.latents[-1], drawing.latents[0]  # at t = 1 it is noise alone
    assert torch.allclose(drawing.latents[step], 0.75 * clean + 0.25 * noise, atol=1e-6)
    seeded = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(noise, seeded)


def test_a_photo_goes_through_the_autoencoder(tmp_path: Path) -> None:
    run = opened(tmp_path, TINY, vae_path=str(save_tiny_vae(tmp_path / "vae")), class_names=[])
    drawing, _ = route_picture(run, str(photo(tmp_path / "photo.webp")), t=0.5, label=1)
    assert drawing.latents[0].shape == (1, 4, 8, 8)
    assert drawing.pictures(-1).shape == (1, 64, 64, 3)


def test_without_a_class_the_unconditional_expert_takes_every_patch(tmp_path: Path) -> None:
    config = dataclasses.replace(
        CONFIG, unconditional_expert=True, affinity="cosine", balance=("contrastive",)
    )
    run = opened(tmp_path, config)
    drawing, step = route_picture(run, str(photo(tmp_path / "a.png")), t=0.5, label=None)
    chosen = ~drawing.trace.at(Place(step=step)).isnan()
    assert chosen[:, -1].all() and not chosen[:, :-1].any()


def test_what_is_no_picture_or_too_large_is_refused(tmp_path: Path) -> None:
    run = opened(tmp_path)
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(FileError, match=r"notes\.png: not JPEG"):
        route_picture(run, str(text), t=0.5, label=1)
    large = photo(tmp_path / "large.png", (300, 200))
    with pytest.raises(UserError, match="300 x 200 pixels; at most"):
        route_picture(run, str(large), t=0.5, label=1, limits=Limits(upload_pixels=10_000))
    with pytest.raises(UserError, match=r"noise t: expected a number from 0 to 1, got 1\.5"):
        route_picture(run, str(photo(tmp_path / "a.png")), t=1.5, label=1)


def test_a_timestep_is_whole_where_the_model_counts_them(tmp_path: Path) -> None:
    ddpm, rf = opened(tmp_path, objective="ddpm"), opened(tmp_path / "b", objective="rf")
    assert [model_time(ddpm.diffusion, t) for t in (0, 0.5004, 1)] == [0, 500, 999]
    assert model_time(rf.diffusion, 0.5004) == 0.5004
    scaled = opened(tmp_path / "c", objective="rf", time_scale=1000.0)
    assert model_time(scaled.diffusion, 0.5004) == pytest.approx(500.4)


# ------------------------------------------------------------------------------ words


def test_the_experts_are_described_for_every_family() -> None:
    assert describe_experts(CONFIG) == (
        "All 12 blocks have 4 experts. Each patch chooses 2 of them. "
        "Shared experts, which see every patch, are not shown."
    )
    dense = describe_experts(dataclasses.replace(CONFIG, num_experts=0))
    assert dense == "A dense model of 12 blocks: it draws, and has no experts to show."
    choosing = dataclasses.replace(
        CONFIG,
        selection="expert_choice",
        balance=(),
        moe_blocks="every_second",
        num_shared_experts=0,
        unconditional_expert=True,
    )
    assert describe_experts(choosing) == (
        "6 of its 12 blocks have 4 experts. Experts choose their patches of the picture, about 2 "
        "for each patch: some get none. U is one more, for what has no class."
    )


def test_a_class_of_another_checkpoint_is_found_by_its_name(tmp_path: Path) -> None:
    first = opened(tmp_path, class_names=["cat", "dog", "owl"])
    (tmp_path / "b").mkdir()
    second = opened(tmp_path / "b", class_names=["owl", "cat"])
    assert label_in(second, first, 2) == 0
    with pytest.raises(UserError, match="class dog: the other checkpoint has none"):
        label_in(second, first, 1)
    assert label_in(first, first._replace(settings={}), 2) == 2
