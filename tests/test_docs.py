"""What Markdown files promise: links and pictures that are in git, commands that are understood."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from common.flags import FlagParser

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


def test_every_picture_of_the_docs_has_one_script_that_makes_it():
    listing = ["bash", str(ROOT / "scripts/figures.sh"), "--list"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    makers = [line.split() for line in listed.splitlines()]
    assert len(makers) > 5 and all((ROOT / script).is_file() for _, script in makers)
    for picture in (file for file in tracked_files() if file.suffix == ".png"):
        name = picture.relative_to(ROOT)
        if name.parts[0] == "docs":
            assert sum(name.match(pictures) for pictures, _ in makers) == 1, name


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


def blocks() -> list[tuple[str, str]]:
    """Return page and text of every bash block of the README and of docs/."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    of_bash = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(page.name, block) for page in pages for block in of_bash.findall(page.read_text())]


def commands() -> list[tuple[str, str]]:
    """Return page and text of every command in their blocks."""
    found = []
    for page, block in blocks():
        lines = re.sub(r"(\\|\|)\n\s*", " ", block).splitlines()
        found += [(page, line) for line in lines if line and not line.startswith("#")]
    return found


def parser_of(script: str) -> FlagParser:
    """Return a script's parser; the trainers share theirs."""
    module = importlib.import_module(script)
    if script == "train":
        return module.build_parser(None)
    name = "build_deepspeed_parser" if script == "train_deepspeed" else "build_parser"
    return getattr(module, name)()


def test_every_command_of_readme_and_docs_is_one_that_the_scripts_understand():
    checked = 0
    for page, line in commands():
        words = shlex.split(line, comments=True)
        scripts = [k for k, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)]
        if not scripts or "..." in words:
            continue
        try:
            parser_of(words[scripts[0]].removesuffix(".py")).parse_args(words[scripts[0] + 1 :])
        except SystemExit:
            pytest.fail(f"{page}: {line}")
        checked += 1
    assert checked > 20


def test_every_script_that_readme_and_docs_name_in_a_command_exists():
    for page, line in commands():
        for word in shlex.split(line, comments=True):
            if re.fullmatch(r"(scripts|config|tests)/[\w/.-]+\.\w+", word):
                assert (ROOT / word).exists(), f"{page}: {line}"
