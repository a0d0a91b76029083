"""The model card, README.md, of a folder of weights: what the model is and how it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.weights import empty_model
from models import DiTConfig

TRAINING = (  # settings that a reader asks for, in this order
    *("objective", "prediction", "time_shift", "time_sampling", "image_size", "vae_path"),
    *("global_batch_size", "max_steps", "optimizer", "lr", "lr_schedule", "weight_decay"),
    *("ema_decay", "class_dropout_prob", "precision", "seed"),
)
HEAD = """---
library_name: {library}
tags:
- dit-moe
- mixture-of-experts
- class-conditional-image-generation
---

# {title}

A diffusion transformer whose MLPs are mixtures of experts (DiT-MoE, arXiv:2407.11633): {depth}
blocks of width {hidden_size}, patches of {patch_size} x {patch_size} on {channels} channels of
{size} x {size}.
{experts}
"""
FOLDER = """
## Use

With the repository of DiT-MoE on the path:

```python
import torch
from diffusion import create_diffusion
from models import DiT

model = DiT.from_pretrained("FOLDER_OR_HUB_ID")
diffusion = create_diffusion(model.settings, learn_sigma=model.config.learn_sigma)
noise = torch.randn(4, {channels}, {size}, {size})
labels, null = torch.arange(4) % {classes}, model.config.null_label
latents = diffusion.sample(model, noise, labels, cfg_scale=1.5, null_label=null)
```
"""
PIPELINE = """
## Use

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER_OR_HUB_ID", trust_remote_code=True)
pipe([0], seed=0).images[0].save("image.png")
```
"""
TAIL = """
## To be filled in

What it is meant for, the licence and the origin of the images, what it must not be used for. It
draws what its training images show, with their bias; it knows no safety filter.
"""


def model_card(config: DiTConfig, settings: Mapping[str, Any], *, pipeline: bool = False) -> str:
    """Return the text of a README.md.

    Args:
        config: of the model.
        settings: of its training, {} if they are not known.
        pipeline: for a diffusers pipeline, not for `DiT.from_pretrained`.
    """
    total, activated = empty_model(config).num_parameters()
    experts = "It is dense"
    if config.num_experts:
        experts = (
            f"A block's mixture has {config.num_experts} experts, {config.experts_per_token:g} of "
            "which a token uses"
        )
        if config.num_shared_experts:
            experts += ", beside one that all tokens use"
    experts += f": {total:,} parameters, {activated:,} activated."
    head = HEAD.format(
        library="diffusers" if pipeline else "dit-moe",
        title=settings.get("run_name") or settings.get("model") or "DiT-MoE",
        depth=config.depth,
        hidden_size=config.hidden_size,
        patch_size=config.patch_size,
        channels=config.in_channels,
        size=config.input_size,
        experts=experts,
    )
    use = FOLDER.format(
        channels=config.in_channels, size=config.input_size, classes=config.num_classes
    )
    return head + _training(config, settings) + (PIPELINE if pipeline else use) + TAIL


def _training(config: DiTConfig, settings: Mapping[str, Any]) -> str:
    """Return a table of how the model was trained; no paths, which are somebody's own."""
    rows = {"classes": f"{config.num_classes}"}
    if data := settings.get("data_path"):
        rows["data"] = Path(data).name
    for name in TRAINING:
        value = settings.get(name)
        if name == "vae_path" and value and Path(value).is_absolute():
            value = Path(value).name
        if value not in (None, [], ""):
            rows[name.replace("_", " ")] = f"{value}"
    if names := settings.get("class_names"):
        shown = ", ".join(names[:20])
        rows["class names"] = shown + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["\n## Training\n", "| | |", "|---|---|", *lines, ""])
