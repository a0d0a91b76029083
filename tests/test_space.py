"""A written Space: whole, without what it does not need, and its page starts without a flag."""

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TINY, TINY_DIGITS, random_model, run_main, save_tiny_vae

import convert
from checkpoint.space import SPACE_CODE
from checkpoint.state import save_safetensors
from checkpoint.weights import load_model, open_weights
from common.errors import UserError
from models import DiTConfig

CONFIG = dataclasses.replace(TINY_DIGITS, depth=12)


def saved(folder: Path, config: DiTConfig = CONFIG, **settings: Any) -> Path:
    path = folder / "model.safetensors"
    told = {"objective": "rf", "vae_path": "none", "class_names": ["a"]} | settings
    save_safetensors(path, random_model(config).state_dict(), config, told)
    return path


def front_matter(space: Path) -> dict[str, Any]:
    """Return what the hub reads of the README."""
    return yaml.safe_load((space / "README.md").read_text().split("---")[1])


def test_a_space_has_page_weights_requirements_and_front_matter(tmp_path: Path) -> None:
    run_main(convert, saved(tmp_path), tmp_path / "my-space", "--space")
    space = tmp_path / "my-space"
    matter = front_matter(space)
    assert matter["title"] == "my-space" and (space / matter["app_file"]).is_file()
    assert matter["sdk"] == "gradio" and matter["sdk_version"].count(".") == 2
    assert len(matter["short_description"]) <= 60  # the hub's limit
    lines = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("gradio>=") for line in lines)
    expected = random_model(CONFIG).state_dict()
    for name, value in load_model(space / "weights").state_dict().items():
        assert torch.equal(value, expected[name])
    assert not (space / "vae").exists()


def test_a_space_carries_its_autoencoder(tmp_path: Path) -> None:
    vae = save_tiny_vae(tmp_path / "vae-folder")
    run_main(convert, saved(tmp_path, TINY), tmp_path / "s", "--space", "--vae-path", vae)
    assert (tmp_path / "s" / "vae" / "config.json").is_file()
    assert open_weights(tmp_path / "s" / "weights").settings["vae_path"] == str(vae)


def test_a_space_has_every_module_that_its_files_import(tmp_path: Path) -> None:
    run_main(convert, saved(tmp_path), tmp_path / "s", "--space")
    files = list((tmp_path / "s").rglob("*.py"))
    ours = {path.stem for path in Path(convert.__file__).parent.glob("*.py")} | {
        path.parent.name for path in Path(convert.__file__).parent.glob("*/__init__.py")
    }
    copied = {Path(name).stem for name in SPACE_CODE}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                parts = name.split(".")
                assert parts[0] in copied or parts[0] not in ours, f"{file}: {name}"
                if parts[0] in copied and len(parts) > 1:
                    assert (tmp_path / "s").joinpath(*parts).with_suffix(".py").is_file(), name


@pytest.mark.slow
def test_the_code_of_a_space_opens_its_weights_without_the_repository(tmp_path: Path) -> None:
    run_main(convert, saved(tmp_path), tmp_path / "s", "--space")
    code = (
        "import app, torch; from sampling.opening import open_run\n"
        "args = app.build_parser().parse_args([])\n"
        "run = open_run(args.ckpt[0], device=torch.device('cpu'), vae_path=args.vae_path)\n"
        "print(run.config.depth, run.class_names, app.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "s")}
    command = [sys.executable, "-c", code]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == f"12 ['a'] {tmp_path / 's' / 'app.py'}", said.stderr


@pytest.mark.parametrize(
    ("destination", "flags", "message"),
    [
        ("x.safetensors", [], "--space writes a folder"),
        ("x", ["--pipeline"], "--pipeline and --space write different folders"),
    ],
)
def test_a_space_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, destination: str, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_main(convert, tmp_path / "nothing", tmp_path / destination, "--space", *flags)
    assert list(tmp_path.iterdir()) == []
