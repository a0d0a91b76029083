"""Every command of README and docs/, as a reader pastes it: it ends well, or is marked.

    python -m pytest -m slow -s tests/test_docs_run.py

In a copy of the repository, page after page, shortened: the flags of `SHORT` are added, where the
last one counts, and sizes become DiT-Ti. What the pages call D, V and so on is there, small. A mark
is a comment that begins with "needs" (GPUs, the hub) or "takes" (an hour): behind a command, or as
the first line of a block for all of it.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers import save_autoencoder, save_image_folder, save_tiny_vae
from test_docs import ROOT, blocks, tracked_files

SHORT = {
    "scripts/demo.sh": "--max-steps 2",
    "train.py": "--max-steps 2 --global-batch-size 4 --sample-every 0",
    "train_deepspeed.py": "--dry-run",
    "sample.py": "--num-sampling-steps 2",
    "evaluate.py": "--num-sampling-steps 2 --num-samples 20",
    "expert_data.py": "--num-sampling-steps 2 --num-per-class 1",
    "encode_latents.py": "--image-size 64",
}
OF_THIS_SUITE = "bash scripts/test.sh"
MARK = re.compile(r"#\s*(needs|takes) ")


def runnable() -> list[tuple[str, str]]:
    """Return page and text of every command without a mark."""
    found = []
    for page, block in blocks():
        if MARK.match(block):
            continue
        lines = re.sub(r"\\\n\s*", " ", block).splitlines()
        found += [(page, line) for line in lines if line and not line.startswith("#")]
    return [(page, line) for page, line in found if not MARK.search(line)]


def shortened(line: str) -> str:
    """Return a command that does little: the flags of its script, the smallest model."""
    line = re.sub(r"DiT-(S|B|L|XL|G)/", "DiT-Ti/", line.partition("  #")[0]).strip()
    for script, flags in SHORT.items():
        if re.search(rf"(^|\s){re.escape(script)}(\s|$)", line):
            line += f" {flags}"
    needs_vae = (
        re.search(r"train\.py .*--data-path (D|IMAGES)\b", line) and "--vae-path" not in line
    )
    return f"{line} --vae-path V" if needs_vae else line


def lay_out(folder: Path) -> None:
    """Copy the repository, and make what the pages' letters stand for."""
    for path in sorted(tracked_files()):
        if path.is_file():
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    (folder / ".venv").symlink_to(sys.prefix)
    if (kept := ROOT / "results/references").is_dir():  # classifiers, which take minutes to train
        shutil.copytree(kept, folder / "results/references")
    save_tiny_vae(folder / "V")
    save_autoencoder(folder / "DC-AE-F32", "dc")
    for name in ("D", "IMAGES"):
        save_image_folder(folder / name, num_classes=3, per_class=40, size=lambda *_: (64, 64))
    with tarfile.open(folder / "SHARDS", "w") as archive:
        for path in sorted((folder / "D").glob("*/*.png")):
            archive.add(path, path.relative_to(folder / "D"))


@pytest.mark.slow
def test_every_command_that_is_not_marked_runs_as_it_stands(tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    lay_out(folder)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run = "python train.py --model DiT-Ti/2 --rf --data-path D --image-size 64 --run-name RUN"
    commands = [("what the pages call RUN", run), *runnable()]
    failed = []
    for page, line in commands:
        if line.startswith(OF_THIS_SUITE):
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", shortened(line)],
            cwd=folder, env={**os.environ, "PATH": path}, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1200,
        )  # fmt: skip
        print(f"{page}: {done.returncode} {shortened(line)}", flush=True)
        if done.returncode:
            failed.append(f"{page}: {shortened(line)}\n{done.stdout[-1500:]}")
    assert len(commands) > 20
    assert not failed, "\n\n".join(failed)
