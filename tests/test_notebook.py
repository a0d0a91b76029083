"""From a notebook: the README's lines as written, and the card of every folder of weights."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_main
from huggingface_hub import ModelCard
from launch import REPO, TINY_RUN
from PIL import Image
from torch.testing import assert_close

import convert
from checkpoint.weights import load_model
from diffusion import create_diffusion
from models import DiT
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two steps, with a shift that the samplers must know of."""
    results = tmp_path_factory.mktemp("runs")
    flags = ("--model", "DiT-Ti/4", "--max-steps", "2", "--ckpt-every", "1", "--time-shift", "3")
    words = [*TINY_RUN, "--results-dir", str(results), *flags]
    launch(build_parser(None).parse_args(words), DdpTrainer)
    return results / "run"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_lines_of_the_readme_draw_as_written(run: Path) -> None:
    (code,) = (
        b for b in python_blocks((REPO / "README.md").read_text()) if "from_pretrained(" in b
    )
    *lines, last = code.replace("results/fashion", str(run)).strip().splitlines()
    assert len(lines) < 13
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)  # what a reader pastes
    shown = eval(last, names)
    assert isinstance(shown, Image.Image) and shown.width == 10 * (8 + 2) + 2
    assert names["diffusion"].time_shift == 3.0 and not names["model"].training
    torch.manual_seed(0)
    noise = torch.randn(10, 1, 8, 8)
    expected = create_diffusion("rf", time_shift=3.0).sample(
        load_model(run), noise, torch.arange(10), cfg_scale=3.0, null_label=10
    )
    assert_close(names["images"], expected)


def test_a_run_is_loaded_with_its_latest_averages_and_goes_back_with_the_run(run: Path) -> None:
    model = DiT.from_pretrained(run)
    assert_close(model.state_dict(), load_model(run).state_dict(), rtol=0, atol=0)
    assert model.settings["class_names"] == [*"0123456789"]
    latest = run / "checkpoints" / "latest"
    before = latest.read_text()
    latest.write_text("../../elsewhere.pt\n0000001.pt\n")  # looks nowhere else
    shutil.copy(run / "checkpoints" / "0000002.pt", run.parent / "elsewhere.pt")
    older = DiT.from_pretrained(run).state_dict()
    latest.write_text(before)
    assert_close(older, load_model(run / "checkpoints" / "0000001.pt").state_dict(), rtol=0, atol=0)


def test_a_run_of_shards_or_without_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=rf"{tmp_path} has no checkpoint: make a folder"):
        DiT.from_pretrained(tmp_path)
    (tmp_path / "checkpoints" / "0000003").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("0000003\n")
    with pytest.raises(ValueError, match=rf"has shards only: .*convert.py {tmp_path} FOLDER"):
        DiT.from_pretrained(tmp_path)


def test_settings_of_a_model_tell_the_objective_of_its_pixels() -> None:
    settings = {"objective": "ddpm", "prediction": "v", "vae_path": "none", "time_shift": None}
    diffusion: Any = create_diffusion(settings, learn_sigma=False)
    assert diffusion.predicts_v and diffusion.x0_range == (-1.0, 1.0)
    assert create_diffusion({**settings, "vae_path": "some/vae"}).x0_range is None
    with pytest.raises(ValueError, match="objective must be one of rf, ddpm; got ''"):
        create_diffusion({})


def test_a_folder_has_a_card_whose_lines_draw_as_written(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    run_main(convert, run, folder)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict()["library_name"] == "dit-moe" and "dit-moe" in card.data.tags
    total, activated = DiT.from_pretrained(folder).num_parameters()
    assert f"4 experts, 2 of which a token uses, beside one that all tokens use: {total:,}" in (
        card.text.replace("\n", " ")
    )
    assert f"{activated:,} activated" in card.text and "| time shift | 3.0 |" in card.text
    assert "| data | digits |" in card.text and str(run.parent) not in card.text
    (code,) = python_blocks(card.text)
    names: dict[str, Any] = {}
    exec(code.replace("FOLDER_OR_HUB_ID", str(folder)), names)
    assert names["latents"].shape == (4, 1, 8, 8) and names["latents"].isfinite().all()


def test_a_pipeline_has_a_card_of_its_own(run: Path, tmp_path: Path) -> None:
    run_main(convert, run, tmp_path / "pipe", "--pipeline")
    card = ModelCard.load(tmp_path / "pipe" / "README.md")
    assert card.data.to_dict()["library_name"] == "diffusers"
    assert "DiffusionPipeline.from_pretrained" in card.text
    index = (tmp_path / "pipe" / "model_index.json").read_text()
    assert '"time_shift": 3.0' in index
