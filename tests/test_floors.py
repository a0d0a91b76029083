"""The house's floors: who may import whom, and that no files import each other in a circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each floor and the floors it may import; see CONTRIBUTING.md. Scripts may import them all.
BELOW_CHECKPOINT = {"common", "data", "models", "moe_ops", "diffusion"}
BELOW_SAMPLING = BELOW_CHECKPOINT | {"routing", "checkpoint"}
FLOORS: dict[str, set[str]] = {
    "moe_ops": set(),
    "models": {"moe_ops"},
    "diffusion": set(),
    "common": set(),
    "data": {"common"},
    "routing": {"common", "models"},
    "checkpoint": BELOW_CHECKPOINT,
    "sampling": BELOW_SAMPLING,
    "evaluation": {"common", "data"},
    "training": BELOW_SAMPLING | {"sampling", "evaluation"},
    "page": BELOW_SAMPLING | {"sampling"},
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - set(FLOORS)
# Carried into pipeline folders, where `dit_moe` is what models.py and its floors are here.
TEMPLATES = {"checkpoint/diffusers_pipeline"}


def source_files() -> list[Path]:
    """Return our Python files but tests, experiments and templates, relative to the root."""
    folders = [ROOT / name for name in FLOORS if (ROOT / name).is_dir()]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    found = [path.relative_to(ROOT) for path in paths]
    return [path for path in found if str(path.parent) not in TEMPLATES]


def modules() -> dict[str, Path]:
    """Return the files by their dotted names."""
    names = {path: ".".join(path.with_suffix("").parts) for path in source_files()}
    return {name.removesuffix(".__init__"): path for path, name in names.items()}


def imports(path: Path) -> set[str]:
    """Return the dotted names of our modules that a file imports, at any depth of its code."""
    ours, found = modules(), set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(ours)


@pytest.mark.parametrize("path", source_files(), ids=str)
def test_a_file_imports_only_from_its_own_floor_and_those_below(path: Path):
    floor = path.parts[0].removesuffix(".py")
    allowed = FLOORS[floor] | {floor} if floor in FLOORS else set(FLOORS)
    upwards = {name for name in imports(path) if name.split(".")[0] not in allowed}
    assert not upwards


def test_no_files_import_each_other_in_a_circle():
    reached = {name: imports(path) - {name} for name, path in modules().items()}
    for _ in reached:  # each round makes paths longer
        for name, onward in reached.items():
            reached[name] = onward.union(*(reached[other] for other in onward))
    assert not [name for name, onward in reached.items() if name in onward]


def test_the_root_has_the_network_and_scripts_only():
    assert len(SCRIPTS) <= 12
    for name in SCRIPTS:
        assert '__name__ == "__main__"' in (ROOT / f"{name}.py").read_text(), name


def test_each_folder_says_its_duty_and_that_of_each_of_its_files():
    for name in FLOORS:
        if (ROOT / name).is_dir():
            said = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
            files = {path.stem for path in (ROOT / name).glob("*.py")} - {"__init__"}
            assert not {file for file in files if f"`{file}`" not in said}, name
