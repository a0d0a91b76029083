"""A diffusers pipeline folder of any model and recipe draws what sample.py draws."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
from launch import REPO
from PIL import Image
from torch import Tensor

import convert
import sample
from checkpoint.state import checkpoint_path, save_checkpoint, save_safetensors
from checkpoint.weights import load_model, load_settings, open_weights
from models import DiT, DiTConfig
from training.flags import build_parser
from training.job import prepare

TINY = dataclasses.replace(helpers.TINY, in_channels=1)
SETTINGS = {"objective": "rf", "vae_path": "none", "class_names": ["a", "b", "c"]}


def random_model(config: DiTConfig = TINY) -> DiT:
    return helpers.random_model(config, frozen=True)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def run(*arguments: object) -> None:
    """Run `python convert.py ARGUMENTS` in this process."""
    helpers.run_main(convert, *arguments)


def saved(folder: Path) -> Path:
    save_safetensors(folder / "ours.safetensors", random_model().state_dict(), TINY, SETTINGS)
    return folder / "ours.safetensors"


DRAW = """
import sys, torch
from diffusers import DiffusionPipeline
assert "models" not in sys.modules
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    options = dict(num_inference_steps=3, guidance_scale=2.0, seed=7)
    torch.save(pipe([0, 1, 2, "a"], output_type="pt", **options).images, folder + ".pt")
    pipe(["a"], num_inference_steps=1).images[0].save(folder + ".png")
    half = DiffusionPipeline.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert half.vae is None or half.vae.dtype == torch.float32
    for name, tensor in half.transformer.dit.state_dict().items():
        exact = name == "pos_embed" or "moe.router." in name
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
"""


def draw_by_pipelines(folders: list[Path], home: Path) -> list[Tensor]:
    """Draw in a process that knows nothing of this repository."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", DRAW, *map(str, folders)]
    subprocess.run(command, check=True, cwd=home, env=environment)
    return [torch.load(f"{folder}.pt", weights_only=True) for folder in folders]


def tiny_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae: Any = AutoencoderKL(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8,) * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
    )  # fmt: skip
    vae.save_pretrained(folder)
    return folder


def draw_by_sample(source: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return the images that sample.py puts in its grid."""
    grids: list[Tensor] = []
    monkeypatch.setattr("common.pictures.save_grid", lambda images, *_, **__: grids.append(images))
    flags = ["--dtype", "float32", "--num-sampling-steps", "3", "--cfg-scale", "2", "--seed", "7"]
    labels = ["--labels", "0", "1", "2", "a", "--num-per-class", "1"]
    helpers.run_main(sample, "--ckpt", source, *flags, *labels)
    return grids[0]


def pixels(images: Tensor) -> Tensor:
    return (images * 127.5 + 127.5).round().byte()


def set_router_state(model: DiT) -> bool:
    """Give biases and thresholds values that change choices; says whether there are any."""
    state = [t for n, t in model.named_buffers() if n.endswith(("expert_bias", "thresholds"))]
    for tensor in state:
        tensor.copy_(torch.linspace(0.3, 0.7, len(tensor)))
    return bool(state)


def save_run(folder: Path, model: DiT, settings: dict[str, Any]) -> Path:
    """Write a run of one checkpoint whose averaged weights are the model's."""
    save_checkpoint(
        checkpoint_path(folder, 1), config=model.config, settings=settings, step=1,
        model=DiT(model.config).state_dict(), ema=model.state_dict(), optimizer={}, scaler=None,
        rng=[],
    )  # fmt: skip
    return folder


def plain_sources(folder: Path) -> list[Path]:
    """Return files of pixels and latents, of both objectives, of later options and their norm."""
    sources: list[Path] = []
    vae = str(tiny_vae(folder / "vae"))
    stats = {"mean": [0.1, -0.2, 0.3, 0.0], "std": [0.5, 1.0, 2.0, 1.5]}
    for vae_path, channels, objective, fields, more in (
        ("none", 1, "rf", {}, {}),
        ("none", 1, "ddpm", {}, {}),
        (vae, 4, "rf", {}, {}),
        (vae, 4, "rf", {"rope": True, "norm": "rms"}, {"latent_stats": stats, "time_scale": 1e3}),
    ):
        config = DiTConfig.from_dict({**TINY.to_dict(), "in_channels": channels, **fields})
        sources.append(folder / f"{len(sources)}.safetensors")
        settings = {**SETTINGS, "vae_path": vae_path, "objective": objective, **more}
        save_safetensors(sources[-1], random_model(config).state_dict(), config, settings)
    return sources


def recipe_sources(folder: Path) -> list[Path]:
    """Return a run of twelve blocks of each recipe, with biases and thresholds that matter."""
    sources: list[Path] = []
    for path in sorted((REPO / "config" / "recipes").glob("*.yaml")):
        words = ["--data-path", "digits", "--model", "DiT-Ti/2", "--config", str(path)]
        job = prepare(build_parser(None).parse_args(words), meta=True)
        later: dict[str, Any] = (
            {"rope": True, "norm": "rms"} if path.stem in ("dsmoe", "diffmoe") else {}
        )
        config = dataclasses.replace(
            job.model.config, hidden_size=32, num_heads=2, depth=12, **later
        )
        model = random_model(config)
        assert set_router_state(model) == (path.stem in ("dsmoe", "diffmoe"))
        settings = {**job.settings.to_dict(), "class_names": [*"abcdefghij"]}
        sources.append(save_run(folder / path.stem, model, settings))
    return sources


@pytest.mark.parametrize(
    "sources_of", [plain_sources, pytest.param(recipe_sources, marks=pytest.mark.slow)]
)
def test_pipeline_folders_draw_the_same_pixels_as_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sources_of: Callable[[Path], list[Path]]
) -> None:
    folders: list[Path] = []
    expected: list[Tensor] = []
    for source in sources_of(tmp_path):
        folders.append(tmp_path / f"pipeline{len(folders)}")
        run(source, folders[-1], "--pipeline")
        expected.append(draw_by_sample(source, monkeypatch))
    for images, grid, folder in zip(
        draw_by_pipelines(folders, tmp_path), expected, folders, strict=True
    ):
        assert torch.equal(pixels(images), pixels(grid))
        assert (images - grid).abs().max() < 1e-5
        assert images.amax() - images.amin() > 0.1
        assert Image.open(f"{folder}.png").size == images.shape[:1:-1]


@pytest.mark.parametrize(
    "fields", [{"balance": ("bias",), "affinity": "sigmoid"}, {"selection": "batch_choice"}]
)
def test_router_state_and_later_options_pass_through_every_format_of_ours_and_change_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    new: dict[str, Any] = {"balance": (), "depth": 12, "rope": True, "norm": "rms", **fields}
    model = random_model(dataclasses.replace(TINY, **new))
    images = []
    for name in ("zero", "run"):
        source = save_run(tmp_path / name, model, {**SETTINGS, "time_scale": 1000.0})
        images.append(draw_by_sample(source, monkeypatch))
        assert set_router_state(model)
    assert (pixels(images[0]) != pixels(images[1])).float().mean() > 0.1
    chain = [tmp_path / "run"]
    for name in ("folder", "x.safetensors", "again", "pipeline"):
        run(chain[-1], tmp_path / name, *(["--pipeline"] if name == "pipeline" else []))
        chain.append(tmp_path / name)
    for path in chain:
        loaded = load_model(path)
        same(loaded.state_dict(), model.state_dict())
        assert loaded.config == model.config
        assert load_settings(path) == {**SETTINGS, "time_scale": 1000.0}


def test_a_pipeline_folder_names_every_package_it_imports_in_our_tested_range(
    tmp_path: Path,
) -> None:
    run(saved(tmp_path), tmp_path / "pipeline", "--pipeline")
    imported = set()
    for file in (tmp_path / "pipeline").rglob("*.py"):
        found = re.findall(r"^(?:from|import) (\w+)", file.read_text(), re.MULTILINE)
        imported |= set(found) - sys.stdlib_module_names - {"dit_moe"}
    lines = (tmp_path / "pipeline" / "requirements.txt").read_text().splitlines()
    assert {line.split(">=")[0] for line in lines} == imported - {"PIL"} | {"pillow"}
    assert set(lines) < set(
        (Path(convert.__file__).parent / "requirements.txt").read_text().splitlines()
    )


def test_weights_of_a_pipeline_folder_load_as_ours(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "pipeline", "--pipeline")
    same(load_model(tmp_path / "pipeline").state_dict(), random_model().state_dict())
    assert open_weights(tmp_path / "pipeline").settings == SETTINGS
