"""Autoencoders of every class that diffusers has for images: scale, cache, normed latents."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import refusal, run_main, save_autoencoder, save_image_folder
from PIL import Image
from torch.testing import assert_close

import convert
import encode_latents
import sample
from checkpoint.state import checkpoint_path, load_checkpoint
from common.errors import UserError
from data import VAE, draw_latents, load_dataset, load_vae, make_loader, open_data
from data.latent_cache import CachedLatents
from data.latent_index import cache_index, write_index
from models import DiT_models
from sampling.grid import draw
from sampling.opening import open_run
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.loop import launch

KINDS = ("kl16", "kl4", "dc", "tiny")
DETERMINISTIC = ("dc", "tiny")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/CLASS/*.png and an autoencoder of each kind."""
    folder = tmp_path_factory.mktemp("inputs")
    save_image_folder(folder / "images", 2, 5, lambda *_: (20, 16))
    for kind in KINDS:
        save_autoencoder(folder / kind, kind)
    return folder


def encode(inputs: Path, kind: str, out: Path) -> CachedLatents:
    """Run encode_latents.py, once a folder."""
    if not out.exists():
        flags = ("--image-size", 16, "--dtype", "float32", "--num-workers", 0, "--shard-size", 4)
        source = ("--data-path", inputs / "images", "--vae-path", inputs / kind)
        run_main(encode_latents, *source, *flags, "--out", out)
    return CachedLatents(out)


def open_vae(path: Path, **options: Any) -> VAE:
    vae = load_vae(path, device="cpu", **options)
    assert isinstance(vae, VAE)
    return vae


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_is_scaled_as_its_config_says_and_back(inputs: Path, kind: str) -> None:
    vae = open_vae(inputs / kind)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    channels = {"kl16": 16, "kl4": 4, "dc": 8, "tiny": 4}[kind]
    expected: tuple[torch.Tensor, ...]
    with torch.no_grad():
        out = vae.model.encode(images)
        if kind == "kl16":
            code, factor = out.latent_dist, torch.tensor(0.3611)
            expected = ((code.mean - 0.1159) * factor, code.std * factor)
        elif kind == "kl4":  # diffusers' pipelines: (z - mean) * scaling_factor / std
            code = out.latent_dist
            mean = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(4, 1, 1)
            factor = 0.18215 / torch.tensor([0.5, 1.0, 2.0, 4.0]).view(4, 1, 1)
            expected = ((code.mean - mean) * factor, code.std * factor)
        else:
            expected = (out.latent * 0.4,) if kind == "dc" else (out.latents,)
        code = out[0] if kind in DETERMINISTIC else out.latent_dist.mean
        pictures = vae.model.decode(code).sample.clamp(-1, 1)
    moments = vae.moments(images)
    assert (vae.channels, vae.downsample, vae.deterministic) == (channels, 4, kind in DETERMINISTIC)
    assert_close(moments, expected)
    assert_close(vae.decode(moments[0]), pictures, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_the_cache_is_training_on_the_images(
    inputs: Path, tmp_path: Path, kind: str
) -> None:
    cache = encode(inputs, kind, tmp_path / "cache")
    vae = open_vae(inputs / kind)
    images = load_dataset(inputs / "images", image_size=16)
    shape = cache.moments([(0, False)]).shape
    assert shape == (1, 1 if kind in DETERMINISTIC else 2, vae.channels, 4, 4)
    drawn = []
    for dataset in (images, cache):
        loader = make_loader(
            dataset, micro_batch_size=4, accum_steps=1, rank=0, world_size=1, seed=0
        )
        torch.manual_seed(0)
        batch, labels = next(iter(loader))
        drawn.append((dataset.latents(batch, vae), labels, torch.rand(())))
    assert_close(drawn[1], drawn[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["kl16", "dc"])
def test_normed_latents_have_mean_0_and_deviation_1_in_each_channel(
    inputs: Path, tmp_path: Path, kind: str
) -> None:
    cache = encode(inputs, kind, tmp_path / "cache")
    vae = open_vae(inputs / kind)
    vae.norm = open_data(str(tmp_path / "cache"), device="cpu").latent_norm()
    keys = [(index, flip) for index in range(len(cache)) for flip in (False, True)]
    mean, *std = vae.normalize(cache.moments(keys).double().unbind(1))
    second = mean**2 + sum(part**2 for part in std)
    assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(vae.channels).double(), rtol=0, atol=1e-6)
    assert_close(second.mean(dim=(0, 2, 3)), torch.ones(vae.channels).double(), rtol=0, atol=1e-5)
    latents = draw_latents(vae.normalize(cache.moments(keys).unbind(1)))
    base = open_vae(inputs / kind)
    codes = draw_latents(base.moments(torch.zeros(1, 3, 16, 16)))
    assert latents.shape[1:] == codes.shape[1:]
    shown = vae.decode(vae.normalize((codes,))[0])  # undone where pictures are made
    assert_close(shown, base.decode(codes), rtol=1e-4, atol=1e-4)


def test_a_finished_cache_of_before_learns_its_norm_by_the_same_command(
    inputs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "cache"
    cache = encode(inputs, "tiny", out)
    known = cache.index["latent_norm"]
    write_index(out, {**cache.index, "latent_norm": None})
    with pytest.raises(UserError, match="--latent-norm channel: --data-path has no mean"):
        open_data(str(out), device="cpu").latent_norm()
    flags = ("--image-size", 16, "--dtype", "float32", "--num-workers", 0, "--shard-size", 4)
    source = ("--data-path", inputs / "images", "--vae-path", inputs / "tiny")
    run_main(encode_latents, *source, *flags, "--out", out)
    index = cache_index(out)
    assert index is not None and index["latent_norm"] == known


def training_flags(data: Path, results: Path, *more: str) -> argparse.Namespace:
    words = ("--data-path", str(data), "--model", "DiT-Ti/1", "--num-experts", "4", "--rf")
    run = ("--results-dir", str(results), "--run-name", "run", "--precision", "fp32")
    small = (
        "--mlp-ratio",
        "0.5",
        "--global-batch-size",
        "4",
        "--sample-every",
        "0",
        "--lr",
        "0.01",
    )
    return build_parser(None).parse_args([*words, *run, *small, *more])


@pytest.mark.parametrize("kind", ["kl16", "dc"])
def test_a_model_of_normed_latents_draws_the_same_pixels_by_every_reader(
    inputs: Path, tmp_path: Path, kind: str
) -> None:
    from diffusers import DiffusionPipeline

    cache = encode(inputs, kind, tmp_path / "cache")
    args = training_flags(
        tmp_path / "cache", tmp_path, "--latent-norm", "channel", "--max-steps", "3"
    )
    launch(args, DdpTrainer)
    run = tmp_path / "run"
    content = load_checkpoint(checkpoint_path(run, 3))
    assert content["settings"]["latent_stats"] == cache.index["latent_norm"]
    flags = ("--num-per-class", 1, "--labels", 0, 1, "--num-sampling-steps", 3)
    run_main(sample, "--ckpt", run, *flags, "--out", tmp_path / "a.png", "--dtype", "fp32")
    run_main(convert, run, tmp_path / "pipe", "--pipeline")
    pipe: Any = DiffusionPipeline.from_pretrained(str(tmp_path / "pipe"), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    images = pipe([0, 1], seed=0, num_inference_steps=3, output_type="pt").images
    opened = open_run(run, device=torch.device("cpu"), dtype="fp32")
    args = sample.build_parser().parse_args(["--ckpt", str(run), "--num-sampling-steps", "3"])
    ours = draw(opened, torch.tensor([0, 1]), args, torch.device("cpu"))
    assert_close(images, ours, rtol=0, atol=0)
    without = open_vae(inputs / kind)
    assert isinstance(opened.vae, VAE) and opened.vae.norm is not None
    assert without.norm is None
    assert Image.open(tmp_path / "a.png").size[1] >= 16


def test_a_run_keeps_the_norm_it_began_with_and_fine_tuning_keeps_the_file_s(
    inputs: Path, tmp_path: Path
) -> None:
    cache = encode(inputs, "tiny", tmp_path / "cache")
    normed = ("--latent-norm", "channel")
    launch(training_flags(tmp_path / "cache", tmp_path, *normed, "--max-steps", "1"), DdpTrainer)
    with pytest.raises(UserError, match="was trained with another latent_stats"):
        launch(training_flags(tmp_path / "cache", tmp_path, "--max-steps", "2"), DdpTrainer)
    flags = ("--init-from", str(tmp_path / "run"), "--image-size", "16")
    words = ("--vae-path", str(inputs / "tiny"))
    job = prepare(training_flags(inputs / "images", tmp_path / "b", *flags, *words), meta=True)
    assert job.settings.latent_norm == "channel"
    assert job.settings.latent_stats == cache.index["latent_norm"]
    said = refusal("train.py", "--data-path", "digits", "--model", "DiT-Ti/2", *normed)
    assert "--latent-norm channel: --data-path has no mean and deviation" in said


def test_an_autoencoder_without_a_norm_where_there_should_be_one_is_refused(
    inputs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny"
    save_autoencoder(folder, "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderKLWan"}))
    with pytest.raises(UserError, match="is of class AutoencoderKLWan; supported are Auto"):
        load_vae(folder, device="cpu")


def test_every_size_has_patches_of_one_latent_pixel() -> None:
    for size in ("Ti", "S", "B", "L", "XL", "G"):
        with torch.device("meta"):
            config = DiT_models[f"DiT-{size}/1"](input_size=16, in_channels=32).config
        assert (config.patch_size, config.num_patches) == (1, 256)


def test_a_representation_autoencoder_reads_and_draws_images_of_its_one_size(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    model: Any = AutoencoderRAE(
        encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_hidden_size=32,
        decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32,
        patch_size=8, encoder_input_size=28, scaling_factor=0.5,
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    vae = open_vae(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    (latents,) = vae.moments(images)
    assert (vae.channels, vae.downsample, vae.image_size) == (64, 8, 16)
    assert latents.shape == (2, 64, 2, 2)
    with torch.no_grad():
        assert_close(latents, vae.model.encode((images + 1) / 2).latent)
        expected = 2 * vae.model.decode(latents).sample - 1
    assert_close(vae.decode(latents), expected.clamp(-1, 1))
    with pytest.raises(UserError, match="--image-size 32: this autoencoder takes 16 only"):
        vae.check_size(32)
