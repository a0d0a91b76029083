"""What Markdown files promise: links and pictures that are in git."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tracked_files() -> set[Path]:
    """Return all files that git tracks or that are new and not ignored, and their folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = {ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).exists()}
    return files | {folder for file in files for folder in file.parents}


def test_every_link_and_picture_of_every_markdown_file_is_in_git():
    tracked = tracked_files()
    pages = [file for file in tracked if file.suffix == ".md"]
    assert ROOT / "README.md" in pages
    lost = [
        f"{page.relative_to(ROOT)} -> {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
        if "://" not in link and (page.parent / link).resolve() not in tracked
    ]
    assert not lost, lost


def test_ignored_folders_are_those_at_the_root_only():
    folders = [line for line in (ROOT / ".gitignore").read_text().split() if line.endswith("/")]
    anchored = {"/results/", "/samples/", "/downloads/"}
    assert anchored <= set(folders)
    assert {folder for folder in folders if not folder.startswith("/")} == {
        "__pycache__/",
        ".pytest_cache/",
        ".mypy_cache/",
        ".ruff_cache/",
    }
