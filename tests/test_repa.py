"""Representation alignment against a naive loop; its projector leaves no trace in the weights."""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_main, save_image_folder, save_tiny_vae
from launch import TINY_RUN
from torch import Tensor
from torch.testing import assert_close

import encode_latents
from checkpoint.state import checkpoint_path, load_checkpoint
from checkpoint.weights import load_model
from common.errors import UserError
from data import load_dataset
from data.latent_cache import CachedLatents
from data.latent_features import CachedFeatures
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.loop import latent_batches, launch, micro_loss
from training.repa import Encoder, alignment_loss, load_in_order
from training.settings import check_flags

timm: Any = pytest.importorskip("timm")
NETWORK = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save random weights of a small ViT; returns what `--repa` takes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "vit.pt"
    torch.save(timm.create_model(NETWORK, pretrained=False).state_dict(), path)
    return f"timm:{NETWORK}:{path}"


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, *flags])


def trainer_of(*flags: str) -> DdpTrainer:
    return DdpTrainer(prepare(parse(*flags)))


def train(results: Path, *flags: str) -> Path:
    launch(parse("--results-dir", str(results), *flags), DdpTrainer)
    return results / "run"


def test_the_loss_is_minus_the_mean_cosine_of_each_token_in_float32() -> None:
    tokens, features = torch.randn(2, 2, 3, 5).bfloat16().unbind(0)
    cosines = []
    for n in range(2):
        for t in range(3):
            a, b = tokens[n, t].double().tolist(), features[n, t].double().tolist()
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            cosines.append(dot / math.hypot(*a) / math.hypot(*b))
    with torch.autocast("cpu", torch.bfloat16):
        loss = alignment_loss(tokens, features)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-sum(cosines) / len(cosines), abs=1e-6)


def test_features_are_those_of_timm_one_for_each_token_of_the_model(encoder: str) -> None:
    ours = Encoder(encoder, grid=4, device=torch.device("cpu"))
    gray = torch.rand(2, 1, 64, 64) * 2 - 1
    features = ours(gray)
    assert features.shape == (2, 16, ours.width) and not features.requires_grad
    network: Any = timm.create_model(
        NETWORK, pretrained=False, num_classes=0, dynamic_img_size=True
    )
    network.load_state_dict(torch.load(encoder.split(":")[2]), strict=False)
    pixels = (gray.expand(-1, 3, -1, -1) + 1) / 2  # 4 x 4 patches of 16: as large as they are
    mean, std = (torch.tensor(network.pretrained_cfg[n]).view(3, 1, 1) for n in ("mean", "std"))
    expected = network.eval().forward_features((pixels - mean) / std)[:, 1:]
    assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_features_of_a_convolutional_network_are_those_of_as_many_places_as_tokens(
    tmp_path: Path,
) -> None:
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    renamed = {f"other.{i}": value for i, value in enumerate(network.state_dict().values())}
    torch.save(renamed, tmp_path / "lite0.pth")  # another library's names, in the same order
    name = f"timm:tf_efficientnet_lite0:{tmp_path / 'lite0.pth'}"
    encoder = Encoder(name, grid=4, device=torch.device("cpu"))
    images = torch.rand(1, 3, 128, 128) * 2 - 1  # 4 x 4 places of 32 pixels: as large as they are
    pixels = ((images + 1) / 2 - encoder.mean) / encoder.std
    expected = encoder.network.forward_features(pixels).flatten(2).transpose(1, 2)
    assert_close(encoder(images), expected, atol=1e-5, rtol=1e-4)
    assert encoder(torch.zeros(1, 1, 32, 32)).shape == (1, 16, 1280)
    assert_close(encoder.network.conv_stem.weight, network.state_dict()["conv_stem.weight"])
    with pytest.raises(UserError, match="the file has weights of another network"):
        load_in_order(encoder.network, {"a": torch.zeros(3)}, "--repa x")


def test_alignment_reaches_the_blocks_up_to_the_chosen_one_and_the_projector(encoder: str) -> None:
    trainer = trainer_of("--repa", encoder, "--repa-block", "2", "--aux-loss-weight", "0")
    trainer.settings = trainer.job.settings
    latents, labels, given = next(latent_batches(trainer.job, 0))
    out = trainer.job.diffusion.training_loss(trainer.wrapped, latents, labels, **given)
    assert -1 <= out.aux_losses["repa"].item() <= 1
    out.aux_losses["repa"].backward()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters()}
    moved = [name for name, grad in gradients.items() if grad is not None and grad.any()]
    reached = {name.split(".")[1] for name in moved if name.startswith("blocks.")}
    assert reached == {"0", "1"}
    assert trainer.projector is not None
    assert all(p.grad is not None for p in trainer.projector.parameters())
    losses = micro_loss(trainer.job, trainer.wrapped, (latents, labels, given))
    assert {"loss", "repa_loss"} <= losses.parts.keys()
    extra = losses.total.detach() - losses.parts["loss"]
    assert_close(extra, 0.5 * losses.parts["repa_loss"])


def test_a_run_with_alignment_goes_on_bit_for_bit_and_its_weights_have_no_projector(
    encoder: str, tmp_path: Path
) -> None:
    flags = ("--repa", encoder, "--max-steps", "2", "--ckpt-every", "1", "--model", "DiT-Ti/4")
    whole, cut = train(tmp_path / "whole", *flags), train(tmp_path / "cut", *flags)
    checkpoint_path(cut, 2).unlink()
    train(tmp_path / "cut", *flags)
    ours, theirs = (load_checkpoint(checkpoint_path(run, 2)) for run in (cut, whole))
    for part in ("model", "ema", "optimizer", "projector", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert len(ours["projector"]) == 6
    names = set(load_model(whole).state_dict())
    assert not [name for name in {*names, *ours["model"]} if "projector" in name]
    moved = theirs["projector"]["4.weight"] - first_projector(encoder)["4.weight"]
    assert moved.abs().max() > 0


def first_projector(encoder: str) -> dict[str, Tensor]:
    trainer = trainer_of("--repa", encoder, "--model", "DiT-Ti/4")
    assert trainer.projector is not None
    return {name: value.clone() for name, value in trainer.projector.state_dict().items()}


@pytest.mark.parametrize("checkpointing", ["True", "False"])
def test_twelve_blocks_are_aligned_with_and_without_gradient_checkpointing(
    checkpointing: str, encoder: str
) -> None:
    flags = ("--model", "DiT-S/8", "--grad-checkpointing", checkpointing, "--repa-block", "8")
    trainer = trainer_of(*flags, "--repa", encoder, "--global-batch-size", "2", "--seed", "1")
    values = trainer.train_step([next(latent_batches(trainer.job, 0))])
    assert -1 <= values["repa_loss"].item() <= 1 and values["grad_norm"].isfinite()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--repa", "dino"), "--repa dino is not timm:NAME or timm:NAME:FILE"),
        (("--repa", "timm:nothing"), "--repa timm:nothing: timm knows no nothing"),
        (("--repa", f"timm:{NETWORK}:no.pt"), r"no such file: no\.pt"),
    ],
)
def test_encoders_that_are_none_are_refused(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(parse(*flags))


def test_blocks_that_are_not_there_and_compiled_ones_are_refused(encoder: str) -> None:
    with pytest.raises(UserError, match="--repa-block 9: the model has 4 blocks"):
        prepare(parse("--repa", encoder, "--repa-block", "9"))
    with pytest.raises(UserError, match=r"--repa: train\.py has it, without --compile"):
        check_flags(parse("--repa", encoder, "--compile"))


# ------------------------------------------------------------------------------ latent caches


@pytest.fixture(scope="module")
def cache(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Make an image folder and a cache of its latents that gets features afterwards."""
    folder = tmp_path_factory.mktemp("cache")
    images = save_image_folder(folder / "images", 2, 5, lambda *_: (64, 64))
    (images / "class1" / "2.png").write_bytes(b"broken")
    vae = save_tiny_vae(folder / "vae")
    words = ("--data-path", images, "--vae-path", vae, "--image-size", 64, "--num-workers", 0)
    command = (*words, "--out", folder / "latents", "--shard-size", 4, "--batch-size", 3)
    run_main(encode_latents, *command)
    run_main(encode_latents, *command, "--features", encoder)
    with pytest.raises(
        UserError, match=r"has those of timm:.* on a grid of 4; delete its features"
    ):
        run_main(encode_latents, *command, "--features", encoder, "--feature-grid", 8)
    return images, folder / "latents"


def test_cached_features_are_those_of_the_images_and_their_mirrors(
    cache: tuple[Path, Path], encoder: str
) -> None:
    images, folder = cache
    latents, network = CachedLatents(folder), Encoder(encoder, 4, torch.device("cpu"))
    latents.features = CachedFeatures(folder, latents.index, encoder, 4)
    real = load_dataset(str(images), image_size=64)
    keys = [(0, False), (8, True), (3, True)]  # of nine that can be read; the last row is 9
    (_, features), _ = latents.__getitems__(keys)
    pixels = real.pixels(torch.tensor([0, 9, 3])).float() / 127.5 - 1
    pixels[1:] = pixels[1:].flip(-1)
    assert_close(features, network(pixels), atol=5e-3, rtol=1e-2)  # kept in float16


def test_a_run_on_latents_learns_the_cached_features(
    cache: tuple[Path, Path], encoder: str, tmp_path: Path
) -> None:
    _, folder = cache
    flags = ("--data-path", str(folder), "--repa", encoder, "--global-batch-size", "4")
    for workers in ("0", "1"):
        job = prepare(parse(*flags, "--num-workers", workers))
        latents, _, given = next(latent_batches(job, 0))
        assert latents.shape == (4, 4, 8, 8) and given["features"].shape == (4, 16, 192)
    run = train(tmp_path, *flags, "--max-steps", "2", "--num-workers", "0")
    assert "repa_loss" in (run / "log.txt").read_text()


def test_a_cache_without_fitting_features_says_how_to_make_them(
    cache: tuple[Path, Path], encoder: str, tmp_path: Path
) -> None:
    _, folder = cache
    flags = ("--data-path", str(folder), "--model", "DiT-Ti/4", "--repa", encoder)
    with pytest.raises(
        UserError, match=r"features of timm.* on a grid of 4, the model has 2; run its"
    ):
        prepare(parse(*flags))
    other = tmp_path / "latents"
    shutil.copytree(folder, other)
    (other / "features.json").unlink()
    with pytest.raises(
        UserError, match=r"has no features; run its encode_latents\.py with --features"
    ):
        prepare(parse("--data-path", str(other), "--repa", encoder))
