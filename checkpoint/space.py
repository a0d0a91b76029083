"""A folder that is a Hugging Face Space: app.py with the code it needs, weights, autoencoder.

The page finds `weights` and `vae` beside app.py, so it starts without flags, as a Space does.
"""

import json
import shutil
from pathlib import Path

import torch

from checkpoint.hub import new_folder, our_blocks, save_folder
from checkpoint.weights import Weights, find_objective
from data import VAE, load_vae

ROOT = Path(__file__).parents[1]
SPACE_CODE = (
    *("app.py", "models.py", "moe_ops", "diffusion", "common", "data", "routing", "checkpoint"),
    *("sampling", "page"),
)
# What the page imports, of requirements.txt and, gradio, requirements-app.txt.
SPACE_REQUIREMENTS = {"torch", "diffusers", "safetensors", "huggingface_hub"}
SPACE_REQUIREMENTS |= {"numpy", "pillow", "tqdm", "matplotlib", "gradio"}
WHEELS = "--extra-index-url https://download.pytorch.org/whl/cpu"  # torch without CUDA's GBs
README = """---
title: {title}
emoji: 🎨
colorFrom: gray
colorTo: yellow
sdk: gradio
sdk_version: {sdk_version}
app_file: app.py
pinned: false
license: mit
short_description: Draw with a mixture of experts and watch who draws what
---

Draws step by step with a DiT-MoE, a diffusion transformer whose MLPs are mixtures of experts, and
shows which expert took which patch of the picture. It runs on a CPU. Here or at home:

    pip install -r requirements.txt
    python app.py

The code is that of the repository that wrote this folder; `weights` are in its own layout and load
with `DiT.from_pretrained("weights")` of models.py.
"""


def save_space(
    path: str | Path, weights: Weights, vae_path: str, dtype: torch.dtype | None
) -> None:
    """Write the folder.

    Args:
        path: folder that does not exist yet; its name is the Space's title.
        weights: of any layout.
        vae_path: as in `load_vae`; the autoencoder is carried along.
        dtype: of the weights, None keeps that of the source.

    Raises:
        FileError: there is something at `path`, or it could not be written.
        UserError: nothing at `vae_path`.
    """
    vae = load_vae(vae_path, device="cpu", model_channels=weights.config.in_channels)
    objective = find_objective(weights.settings, weights.config, rf=None)
    settings = {**weights.settings, "objective": objective, "vae_path": vae_path}
    with new_folder(path) as folder:
        save_folder(folder / "weights", our_blocks(weights, dtype), weights.config, settings)
        if isinstance(vae, VAE):
            vae.model.save_pretrained(folder / "vae")
        _copy_code(folder)
        shutil.copy(ROOT / "LICENSE", folder)
        needed = space_requirements()
        (folder / "requirements.txt").write_text("\n".join([WHEELS, *needed.values()]) + "\n")
        sdk = needed["gradio"].removeprefix("gradio>=").split(",")[0] + ".0"
        title = json.dumps(Path(path).name)  # JSON is YAML
        (folder / "README.md").write_text(README.format(title=title, sdk_version=sdk))


def space_requirements() -> dict[str, str]:
    """Return the lines of our requirements that the page needs, by package."""
    files = ("requirements.txt", "requirements-app.txt")
    lines = [line for file in files for line in (ROOT / file).read_text().splitlines()]
    return {name: line for line in lines if (name := line.split(">=")[0]) in SPACE_REQUIREMENTS}


def _copy_code(folder: Path) -> None:
    """Copy scripts and floors, without what belongs to pipelines."""
    for name in SPACE_CODE:
        files = [ROOT / name] if name.endswith(".py") else sorted((ROOT / name).glob("*.py"))
        for file in files:
            target = folder / file.relative_to(ROOT)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
