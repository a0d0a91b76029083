"""The tables of docs/PERFORMANCE.md, made of what all.sh measured."""

import json
import re
from pathlib import Path

import pytest
import summary
from launch import REPO

from common.errors import FileError

ALL = (REPO / "scripts/benchmark/all.sh").read_text()
MACHINE = {"cpu": "x", "gpu": None, "cores": 2, "threads": 2, "torch": "2", "load": [0.1, 0, 0],
           "time": "2026-01-02 03:04:05"}  # fmt: skip


def write(folder: Path, name: str, *rows: tuple[str, str, str, float]) -> None:
    """Write a file of medians: contestant, dtype, part of the run, ms."""
    names = ("contestant", "dtype", "what", "ms")
    content = {"machine": MACHINE, "rows": [dict(zip(names, row, strict=True)) for row in rows]}
    (folder / f"{name}.json").write_text(json.dumps(content))


def verdicts(folder: Path) -> dict[str, list[str]]:
    """Return the aim, what was found and the verdict by the text of each row."""
    return {
        row[0]: row[1:] for row in map(summary.Aim.cells, summary.aims(summary.Measured(folder)))
    }


def test_ratios_of_medians_are_compared_with_the_aims(tmp_path: Path) -> None:
    both = "forward+backward"
    write(
        tmp_path,
        "s2_layer",
        *(("ours", "fp32", both, 104.0), ("bare", "fp32", both, 100.0)),
        *(("ours", "fp32", "forward", 90.0), ("dense", "fp32", both, 80.0)),
        *(("transformers eager", "fp32", both, 130.0),),
        *(("transformers grouped_mm", "fp32", both, 102.0),),
    )
    write(
        tmp_path,
        "b2_step",
        ("ours", "bf16 mixed", "step", 9.0),
        ("dense", "bf16 mixed", "step", 8.0),
    )
    rows = verdicts(tmp_path)
    assert rows["layer over bare matmuls, 2048 tokens: fp32"] == ["1.05", "1.04", "yes"]
    assert rows["layer over dense of equal FLOPs, 2048 tokens: fp32"] == ["1.08", "1.30", "no"]
    assert rows["training step over dense: B/2 bf16"] == ["1.08", "1.12", "no"]
    assert rows["best of transformers' layers over ours: fp32"] == ["above 1", "0.98", "no"]
    assert rows["training step over dense: S/2 fp32"] == ["1.06", "-", "not measured"]
    assert "2026-01-02: x, 2 cores, 2 threads" in summary.report(summary.Measured(tmp_path))


def test_publishing_changes_the_page_between_its_marks_only(tmp_path: Path) -> None:
    measured, docs = tmp_path / "measured", tmp_path / "docs"
    measured.mkdir()
    (docs / "performance").mkdir(parents=True)
    write(measured, "families", ("a", "fp32", "forward+backward", 3.0),
          ("a dense", "fp32", "forward+backward", 2.0))  # fmt: skip
    page = docs / "PERFORMANCE.md"
    page.write_text("before\n")
    args = summary.build_parser().parse_args([str(measured), "--publish", str(docs)])
    with pytest.raises(FileError, match="lacks the marks"):
        summary.main(args)
    page.write_text(f"before\n{summary.MARKS[0]}\nold\n{summary.MARKS[1]}\nafter\n")
    summary.main(args)
    first = page.read_text()
    assert first.startswith(f"before\n{summary.MARKS[0]}\n\nMeasured on 2026-01-02")
    assert first.endswith(f"{summary.MARKS[1]}\nafter\n") and "old" not in first
    assert "| a | 1.50 |" in first and (docs / "performance/families.json").is_file()
    summary.main(args)
    assert page.read_text() == first


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"no files of scripts/benchmark/all\.sh"):
        summary.Measured(tmp_path)


def test_every_file_that_the_tables_read_is_made_by_all_sh() -> None:
    made = set(re.findall(r"^run (\w+) ", ALL, re.MULTILINE))
    read = set(re.findall(r'"(s2_\w+|b2_\w+|families)"', Path(summary.__file__).read_text()))
    assert read == made
    page = (REPO / "docs/PERFORMANCE.md").read_text()
    assert all(page.count(mark) == 1 for mark in summary.MARKS)
