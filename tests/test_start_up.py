"""What scripts import before they read their flags: nothing that takes a second."""

import subprocess
import sys

import pytest
from launch import REPO

from common import names, pictures, process
from models import BALANCE_TERMS, DiT_models

HEAVY = {"torch", "numpy", "diffusers", "torchvision", "matplotlib", "timm", "PIL", "deepspeed"}
HEAVY |= {"huggingface_hub", "safetensors", "transformers", "tensorboard", "sklearn", "scipy"}


@pytest.mark.parametrize("script", ["sample", "train", "train_deepspeed"])
@pytest.mark.parametrize("flags, code", [(["--help"], 0), (["--modle", "DiT-S/2"], 2)])
def test_help_and_a_mistyped_flag_import_neither_torch_nor_anything_else_that_is_slow(
    script: str, flags: list[str], code: int
):
    run = f"""
import runpy, sys
sys.argv = {[f"{script}.py", *flags]!r}
try:
    runpy.run_path("{script}.py", run_name="__main__")
except SystemExit as ended:
    assert ended.code == {code}, ended.code
print("imported:", *sorted({HEAVY!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", run], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["imported:"], done.stderr


def test_names_that_flags_accept_without_torch_are_those_of_what_they_name():
    assert list(names.MODELS) == list(DiT_models)
    assert names.BALANCE_TERMS == BALANCE_TERMS
    assert list(names.PICTURES) == list(pictures.FORMATS)
    assert {name: process.long_name(dtype) for name, dtype in process.DTYPES.items()} == (
        names.DTYPES
    )
