"""An AutoencoderKL: its scale, its posterior, what is said of one that is missing or broken."""

import json
import math
import shutil
import time

import pytest
import torch
from helpers import save_tiny_vae

from common.errors import UserError
from common.network import why_unreachable
from data import (
    autoencoders,
    load_vae,
    vae_files,
)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """Save a small random AutoencoderKL and return its folder."""
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def open_vae(folder, **options):
    """Load the VAE of a folder on the CPU."""
    vae = load_vae(folder, device="cpu", **options)
    assert isinstance(vae, autoencoders.VAE)
    return vae


def test_the_vae_applies_its_scale_once_each_way(vae_folder):
    vae = open_vae(vae_folder)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = vae.model.encode(images).latent_dist
    mean, std = vae.moments(images)
    decoded = vae.decode(mean)
    expected = vae.model.decode(posterior.mean).sample.clamp(-1, 1)
    assert (vae.scale, vae.channels, vae.downsample) == (0.18215, 4, 8)
    assert mean.shape == (2, 4, 4, 4)
    torch.testing.assert_close(mean, posterior.mean * 0.18215)
    torch.testing.assert_close(std, posterior.std * 0.18215)
    torch.testing.assert_close(decoded, expected)


def test_encode_samples_the_posterior_from_the_generator(vae_folder):
    vae = open_vae(vae_folder)
    images = torch.zeros(2, 3, 32, 32)
    first, again, other = (
        vae.encode(images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    mean, std = vae.moments(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first, mean + std * noise)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_decode_is_float32_and_does_not_depend_on_chunks_or_autocast(vae_folder, monkeypatch):
    vae = open_vae(vae_folder, dtype=torch.bfloat16)
    latents = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    at_once = vae.decode(latents)
    monkeypatch.setattr(autoencoders, "DECODE_CHUNK_PIXELS", 16)
    with torch.autocast("cpu", torch.bfloat16):
        one_by_one = vae.decode(latents)
    assert at_once.dtype == one_by_one.dtype == torch.float32
    torch.testing.assert_close(one_by_one, at_once)


def test_bfloat16_encoding_returns_float32_latents_near_the_exact_ones(vae_folder):
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    exact, _ = open_vae(vae_folder).moments(images)
    rounded, _ = open_vae(vae_folder, dtype=torch.bfloat16).moments(images)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_vae_is_frozen_and_refuses_gray_images(vae_folder):
    vae = open_vae(vae_folder)
    assert not vae.model.training
    assert not any(parameter.requires_grad for parameter in vae.model.parameters())
    with pytest.raises(ValueError, match="takes 3-channel images, the data has 1"):
        vae.encode(torch.zeros(1, 1, 32, 32))


def test_a_missing_or_incomplete_vae_folder_is_refused(vae_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    with pytest.raises(ValueError, match=r"--vae-path .*missing is not a folder; it accepts"):
        load_vae(tmp_path / "missing", device="cpu")
    with pytest.raises(ValueError, match=r"does not load: no config\.json in it, nor in .*/vae"):
        load_vae(tmp_path, device="cpu")
    (tmp_path / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    weights = load_file(vae_folder / "diffusion_pytorch_model.safetensors")
    del weights["decoder.conv_in.weight"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights \['decoder\.conv_in\.weight'\]"):
        load_vae(tmp_path, device="cpu")


def changed_vae(vae_folder, to, **entries):
    """Copy a VAE folder with other entries in its config.json."""
    shutil.copytree(vae_folder, to)
    config = json.loads((to / "config.json").read_text()) | entries
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"_class_name": "AutoencoderDC"}, "does not load: "),  # of other weights
        (
            {"_class_name": "VQModel"},
            "is of class VQModel; supported are AutoencoderKL, .*DC, .*Tiny",
        ),
        ({"_class_name": ["x"]}, r"is of class \['x'\]"),
        ({"latents_mean": [0.0, 1.0, 2.0, 3.0]}, "has latents_std None, not one number for each"),
        ({"latents_std": [1.0] * 4}, "has latents_mean None, not one number for each"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 3}, "not one number for each latent"),
        ({"latents_mean": [0.0] * 4, "latents_std": [0.0] * 4}, "no 0, and one of the two"),
        ({"scaling_factor": 0.0}, r"has scaling_factor 0\.0"),
        ({"scaling_factor": "1"}, "has scaling_factor '1'"),
        ({"shift_factor": math.nan}, "has shift_factor nan"),
        ({"block_out_channels": "many"}, "does not load: "),
        ({"latent_channels": 8}, "does not load: "),
    ],
)
def test_a_vae_of_another_class_or_scale_is_refused_in_one_line(
    entries, message, vae_folder, tmp_path
):
    with pytest.raises(UserError, match=message) as caught:
        load_vae(changed_vae(vae_folder, tmp_path / "vae", **entries), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_config_or_weights_file_of_a_vae_is_one_line(vae_folder, tmp_path):
    folder = changed_vae(vae_folder, tmp_path / "vae")
    weights = folder / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="does not load: ") as caught:
        load_vae(folder, device="cpu")
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is damaged"):
        load_vae(folder, device="cpu")
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"its config\.json is no object"):
        load_vae(folder, device="cpu")


def test_a_vae_whose_weights_are_no_numbers_is_refused(vae_folder, tmp_path):
    vae = open_vae(vae_folder)
    next(vae.model.parameters()).data.view(-1)[0] = math.nan
    vae.model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"conv_in\.weight is not finite"):
        load_vae(tmp_path, device="cpu")


def test_the_vae_of_a_pipeline_folder_is_found(vae_folder, tmp_path):
    shutil.copytree(vae_folder, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    found, expected = open_vae(tmp_path / "pipeline"), open_vae(vae_folder)
    images = torch.zeros(1, 3, 32, 32)
    assert torch.equal(found.moments(images)[0], expected.moments(images)[0])


def write_hub_cache(root, repository, files):
    """Lay files out as huggingface_hub keeps what it downloaded."""
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    shutil.copytree(files, folder / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("subfolder", ["", "vae"])
def test_a_downloaded_vae_loads_without_a_network(vae_folder, tmp_path, monkeypatch, subfolder):
    (tmp_path / "files").mkdir()
    shutil.copytree(vae_folder, tmp_path / "files" / subfolder, dirs_exist_ok=True)
    write_hub_cache(tmp_path / "hub", "someone/vae", tmp_path / "files")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(vae_files, "why_unreachable", lambda url: "no network")
    assert open_vae("someone/vae").channels == 4


def test_no_network_says_what_to_give_instead_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(UserError, match=r"someone/vae: .*refused.*: give a folder saved by") as e:
        load_vae("someone/vae", device="cpu")
    assert time.monotonic() - began < 3 and "\n" not in str(e.value)


def test_a_server_that_never_answers_is_given_up_after_the_time_allowed(monkeypatch):
    def wait(*_, **__):
        time.sleep(5)
        raise OSError

    monkeypatch.setattr("urllib.request.urlopen", wait)
    began = time.monotonic()
    assert why_unreachable("http://127.0.0.1:9", seconds=0.1) == "no answer within 0.1 s"
    assert time.monotonic() - began < 1


def test_no_vae_leaves_the_images_as_they_are():
    pixels = load_vae("none", device="cpu")
    assert (pixels.x0_range, autoencoders.VAE.x0_range) == ((-1.0, 1.0), None)
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    assert pixels.downsample == 1
    assert torch.equal(pixels.decode(pixels.encode(images)), images)
