"""A grid keeps its pixels exact, carries names, and overwrites nothing but a picture."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from common.errors import FileError, UserError
from common.pictures import FORMATS, check_grid, save_grid


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def test_a_grid_enlarges_small_images_and_leaves_no_partial_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "grid.png"
    images = torch.linspace(-1, 1, 5).view(5, 1, 1, 1).expand(5, 1, 8, 8)
    save_grid(images, path, columns=3)
    grid = read(path)
    assert grid.shape == (2 * 66 + 2, 3 * 66 + 2, 3)  # 64 pixels each, 2 between
    assert (grid[2:66, 2:66] == 0).all() and (grid[68:132, 68:132] == 255).all()
    assert list(path.parent.iterdir()) == [path]


def test_a_grid_of_large_images_keeps_their_size(tmp_path: Path) -> None:
    save_grid(torch.zeros(2, 3, 80, 80), tmp_path / "grid.png", columns=1)
    assert read(tmp_path / "grid.png").shape == (166, 84, 3)


@pytest.mark.parametrize("side", [8, 100])
def test_names_stand_above_the_columns_and_the_pixels_stay_exact(tmp_path: Path, side: int) -> None:
    images = torch.rand(6, 3, side, side) * 2 - 1
    for suffix in (".png", ".webp"):
        save_grid(images, tmp_path / f"bare{suffix}", columns=3)
        names = ["ant", "bee", "T-shirt/top"]
        save_grid(images, tmp_path / f"named{suffix}", columns=3, column_names=names)
        bare, named = read(tmp_path / f"bare{suffix}"), read(tmp_path / f"named{suffix}")
        head = named[: len(named) - len(bare)]
        assert (named[len(head) :] == bare).all()
        width = (bare.shape[1] - 2) // 3
        assert all(head[:, i * width : (i + 1) * width].max() > 200 for i in range(3))


def test_a_long_name_ends_in_dots_before_the_next_column(tmp_path: Path) -> None:
    names = ["a name much longer than its column", "b", "c"]
    save_grid(torch.zeros(3, 1, 8, 8), tmp_path / "grid.png", columns=3, column_names=names)
    head = read(tmp_path / "grid.png")[: -(64 + 4)]
    assert (head[:, 60:66].max() == 0) or (head[:, 66:68].max() == 0)
    assert head[:, 68:80].max() > 200  # the next one's first letter


def test_an_escape_in_a_name_is_shown_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda _self, _xy, text, *_: drawn.append(text)
    )
    names = ["\x1b[31mred", "two\nlines"]
    save_grid(torch.zeros(2, 1, 200, 200), tmp_path / "x.png", columns=2, column_names=names)
    assert drawn == ["\\x1b[31mred", "two lines"]


@pytest.mark.parametrize(("suffix", "head"), [(".jpg", b"\xff\xd8"), (".webp", b"RIFF")])
def test_the_ending_decides_the_format(tmp_path: Path, suffix: str, head: bytes) -> None:
    save_grid(torch.zeros(1, 3, 64, 64), tmp_path / f"grid{suffix}", columns=1)
    assert (tmp_path / f"grid{suffix}").read_bytes().startswith(head)


@pytest.mark.parametrize("name", ["grid", "grid.pt", "grid.gif"])
def test_an_ending_of_no_format_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: a picture's name ends in one of .png, .jpg"):
        save_grid(torch.zeros(1, 3, 64, 64), tmp_path / name, columns=1)


def test_what_is_no_picture_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    torch.save({"weights": torch.zeros(3)}, path)
    content = path.read_bytes()
    with pytest.raises(FileError, match=r"grid\.png exists and is no picture"):
        save_grid(torch.zeros(1, 3, 64, 64), path, columns=1)
    assert path.read_bytes() == content
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(FileError, match=r"folder\.png is no file"):
        save_grid(torch.zeros(1, 3, 64, 64), tmp_path / "folder.png", columns=1)


def test_a_grid_too_large_for_its_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORMATS, ".webp", FORMATS[".webp"]._replace(max_side=130))
    check_grid(tmp_path / "one.webp", 1, 64, 1, "--flag 1")
    with pytest.raises(UserError, match=r"--flag 2: 134x68 pixels .* for .*two\.webp, webp takes"):
        check_grid(tmp_path / "two.webp", 2, 64, 2, "--flag 2")
    with pytest.raises(UserError, match=r"--flag 10000000 needs [\d,]+ GiB of memory"):
        check_grid(tmp_path / "two.png", 10_000_000, 8, 2, "--flag 10000000")


def test_a_failed_write_keeps_the_old_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "grid.png"
    save_grid(torch.zeros(1, 3, 64, 64), path, columns=1)
    old = path.read_bytes()

    def fail(_image: Image.Image, temp: Path, _format: str) -> None:
        temp.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(FileError, match=r"could not write .*grid\.png: disk full"):
        save_grid(torch.ones(1, 3, 64, 64), path, columns=1)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
