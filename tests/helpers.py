"""What many tests need: small networks whose weights do something, image folders, scripts run here.

launch.py has what starts other processes. pytest finds both in the tests' folder.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from launch import REPO
from PIL import Image
from torch import nn

from models import DiT, DiTConfig

TINY = DiTConfig(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3, num_experts=4, qk_norm=True
)
TINY_DIGITS = DiTConfig(
    input_size=8,
    patch_size=4,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_ratio=1.0,
    num_classes=10,
    num_experts=4,
    num_experts_per_tok=2,
)


def randomize(module: Any, std: float = 0.1, seed: int | None = 0, frozen: bool = True) -> Any:
    """Replace every parameter by noise: at the published start adaLN-Zero hides most of them.

    Args:
        module: changed in place and returned.
        std: of the noise.
        seed: of the noise; None goes on where torch's generator is.
        frozen: also what is not trained, the table of positions.
    """
    if seed is not None:
        torch.manual_seed(seed)
    for parameter in module.parameters():
        if frozen or parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return module


def random_model(
    config: DiTConfig = TINY, std: float = 0.2, seed: int = 0, frozen: bool = False
) -> DiT:
    """Return a network of random weights in eval mode."""
    torch.manual_seed(seed)
    return randomize(DiT(config).eval(), std, None, frozen)


def moe_of(model: DiT, block: int = 0) -> Any:
    """Return the mixture of a block."""
    return model.get_submodule(f"blocks.{block}.moe")


def run_main(script: ModuleType, *arguments: object) -> None:
    """Run `python SCRIPT ARGUMENTS` in this process; errors come through."""
    script.main(script.build_parser().parse_args([str(argument) for argument in arguments]))


def refusal(script: str, *arguments: object) -> str:
    """Run `python SCRIPT ARGUMENTS`, which must end with code 2; returns the one line it says."""
    command = [sys.executable, script, *map(str, arguments)]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "", ended
    assert ended.stderr.startswith(f"{script}: error: ") and ended.stderr.count("\n") == 1, ended
    return ended.stderr


def save_tiny_vae(folder: Path) -> Path:
    """Write a random AutoencoderKL of 25k parameters: 4 latent channels, 8 times smaller."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    model: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )
    model.save_pretrained(folder)
    return folder


def save_autoencoder(folder: Path, kind: str) -> Path:
    """Write a random autoencoder of one of the classes that diffusers has.

    Args:
        folder: to write.
        kind: "kl16" (16 channels with a shift), "kl4" (a mean and deviation for each channel), "dc"
            or "tiny", which are deterministic. All make latents 4 times smaller.
    """
    import diffusers

    torch.manual_seed(0)
    kl: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8,) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
    }
    scale = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 2.0, 4.0]}
    model: Any
    if kind == "kl16":
        more: dict[str, Any] = {"scaling_factor": 0.3611, "shift_factor": 0.1159}
        more |= {"use_quant_conv": False, "use_post_quant_conv": False}
        model = diffusers.AutoencoderKL(**kl, latent_channels=16, **more)
    elif kind == "kl4":
        model = diffusers.AutoencoderKL(**kl, latent_channels=4, **scale)
    elif kind == "dc":
        three: dict[str, Any] = {
            f"{side}_{name}": value
            for side in ("encoder", "decoder")
            for name, value in {
                "block_out_channels": (8, 8, 16),
                "layers_per_block": (1, 1, 1),
                "qkv_multiscales": ((), (), ()),
            }.items()
        }
        model = diffusers.AutoencoderDC(
            latent_channels=8, attention_head_dim=8, scaling_factor=0.4, **three
        )
    else:
        model = diffusers.AutoencoderTiny(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 3,
            decoder_block_out_channels=(8,) * 3,
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
        )
    model.save_pretrained(folder)
    return folder


def save_image_folder(
    folder: Path, num_classes: int, per_class: int, size: Callable[[int, int], tuple[int, int]]
) -> Path:
    """Write class0/0.png and so on, of random pixels.

    Args:
        folder: to make.
        num_classes: subfolders.
        per_class: images in each.
        size: class and image number -> height, width.
    """
    generator = torch.Generator().manual_seed(0)
    for label in range(num_classes):
        (folder / f"class{label}").mkdir(parents=True)
        for index in range(per_class):
            shape = (*size(label, index), 3)
            pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f"class{label}" / f"{index}.png")
    return folder


def spoil_gradients(parameters: list[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Stand in for clip_grad_norm_: every gradient becomes NaN."""
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.fill_(torch.nan)
    return torch.tensor(torch.nan)
