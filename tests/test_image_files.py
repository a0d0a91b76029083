"""Which files of a folder are images; what becomes of 16 bits, floats, pipes, loops and bombs."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import FileError, UserError
from data.image_files import (
    UnreadableImageError,
    center_crop,
    list_classes,
    list_images,
    read_image,
    read_square,
    same_size,
)


def png_of_size(path: Path, width: int, height: int) -> Path:
    """Write a PNG of a few bytes whose header promises that many gray pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b""))
    return path


# ------------------------------------------------------------------------------ levels


@pytest.mark.parametrize("ending", ["png", "tif", "ppm"])
def test_16_bit_gray_levels_are_scaled_and_rounded_exactly(ending: str, tmp_path: Path) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / f"gray.{ending}")
    found = np.array(read_image(tmp_path / f"gray.{ending}"))
    expected = np.rint(levels / 65535 * 255).astype(np.uint8)
    assert (found == expected[..., None]).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floating"), (np.int32, "32-bit int")])
def test_pixels_without_a_known_white_are_refused_by_name(dtype, kind: str, tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "raw.tif")
    with pytest.raises(UnreadableImageError, match=rf"raw\.tif: its pixels are {kind}"):
        read_image(tmp_path / "raw.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_8_bit_images_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), "white").convert(mode).save(tmp_path / "white.png")
    assert (np.array(read_image(tmp_path / "white.png")) == 255).all()


# ------------------------------------------------------------------------------ what can't be read


def test_an_image_that_would_fill_the_memory_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    for width, height in ((20_000, 8_000), (60_000, 60_000)):
        bomb = png_of_size(tmp_path / "bomb.png", width, height)
        with pytest.raises(UnreadableImageError, match=r"bomb\.png: .*pixels"):
            read_image(bomb)


def test_an_image_too_narrow_to_be_scaled_is_refused(tmp_path: Path) -> None:
    Image.new("L", (100_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(UnreadableImageError, match="100000 x 1 pixels are too narrow"):
        read_square(tmp_path / "line.png", 256)


def test_a_broken_file_is_told_from_one_that_cannot_be_opened(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    for name, broken in (("cut.png", content[:60]), ("text.png", b"text"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(UnreadableImageError, match=f"cannot read the image file .*{name}: "):
            read_image(tmp_path / name)
    with pytest.raises(FileError, match=r"gone\.png: No such file") as caught:
        read_image(tmp_path / "gone.png")
    assert not isinstance(caught.value, UnreadableImageError)


@pytest.mark.parametrize("ending", ["eps", "psd"])
def test_only_image_formats_are_decoded_whatever_the_name_says(ending: str, tmp_path: Path) -> None:
    start = {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "psd": b"8BPS\0\1"}
    (tmp_path / "image.png").write_bytes(start[ending] + bytes(100))
    with pytest.raises(UnreadableImageError, match="not JPEG, PNG"):
        read_image(tmp_path / "image.png")


def test_images_of_two_sizes_are_found_from_their_headers(tmp_path: Path) -> None:
    paths = [png_of_size(tmp_path / f"{i}.png", 4 + i // 2, 4) for i in range(3)]
    assert same_size(paths[:2]) == (4, 4)
    with pytest.raises(UserError, match=r"2\.png has 5 x 4 pixels, .*0\.png 4 x 4.*--image-size"):
        same_size(paths)


# ------------------------------------------------------------------------------ folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "a/sub/2.JPG", "a/10.png", "b/3.webp"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "images" / "a" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def names(folder: Path, files: list[str]) -> list[str]:
    return [str(Path(file).relative_to(folder)) for file in files]


def test_files_have_the_order_that_torchvision_gives_them(folder: Path) -> None:
    from torchvision.datasets import ImageFolder

    (folder / "a" / "sub" / "deeper").mkdir()
    (folder / "a" / "sub-1").mkdir()
    for name in ("a/sub/deeper/0.png", "a/sub-1/0.png", "b/A.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    classes, samples = list_classes(folder)
    expected = ImageFolder(str(folder))
    assert classes == expected.classes == ["a", "b"] and samples == expected.samples
    assert len(list_images(folder)) == 7


def test_a_loop_of_links_does_not_multiply_images(folder: Path) -> None:
    (folder / "a" / "loop").symlink_to(folder)
    (folder / "a" / "sub" / "up").symlink_to("..")
    (folder / "a" / "0").symlink_to(folder / "a" / "sub")
    expected = ["a/1.png", "a/10.png", "a/sub/2.JPG", "b/3.webp"]
    assert names(folder, list_images(folder)) == expected
    _, samples = list_classes(folder)
    assert names(folder, [path for path, _ in samples]) == expected
    assert [label for _, label in samples] == [0, 0, 0, 1]


def test_a_linked_folder_of_images_is_entered(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "elsewhere" / "0.png")
    assert list_classes(folder)[0] == ["a", "b", "c"]


def test_one_folder_is_not_two_classes(folder: Path) -> None:
    (folder / "c").symlink_to(folder / "a")
    with pytest.raises(UserError, match="'a' and 'c' are one folder, but two classes"):
        list_classes(folder)


def test_pipes_are_no_images_and_a_link_to_nothing_is_named(folder: Path) -> None:
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / "a" / "lost.png").symlink_to("nowhere.png")
    files = list_images(folder / "a")
    assert names(folder, files) == ["a/1.png", "a/10.png", "a/lost.png", "a/sub/2.JPG"]
    with pytest.raises(FileError, match=r"lost\.png: No such file"):
        read_image(files[2])
    with pytest.raises(UnreadableImageError, match="not a regular file"):  # and it does not hang
        read_image(folder / "a" / "pipe.png")


def test_a_class_without_images_is_named(folder: Path) -> None:
    (folder / "cats").mkdir()
    with pytest.raises(UserError, match="no images in the class folder 'cats'"):
        list_classes(folder)
    with pytest.raises(UserError, match="has no class folders"):
        list_classes(folder / "b")


# ------------------------------------------------------------------------------ centre crop


@pytest.mark.parametrize("size", [(32, 32), (100, 40), (33, 200), (20, 10), (257, 65), (64, 63)])
def test_center_crop_gives_a_square_and_keeps_a_constant(size):
    cropped = np.array(center_crop(Image.new("RGB", size, (10, 20, 30)), 32))
    assert cropped.shape == (32, 32, 3)
    assert (cropped == [10, 20, 30]).all()


def test_center_crop_keeps_the_centre_and_the_aspect_ratio():
    array = np.zeros((100, 200), np.uint8)
    array[25:75, 75:125] = 255  # a centred square of half the height
    cropped = np.array(center_crop(Image.fromarray(array), 50))
    expected = np.zeros((50, 50), np.uint8)
    expected[12:38, 12:38] = cropped[12:38, 12:38]
    assert (cropped == expected).all()
    assert (cropped[13:37, 13:37] == 255).all()
    assert (cropped == cropped.T).all()


def test_center_crop_of_an_image_of_that_size_changes_nothing():
    array = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    assert (np.array(center_crop(Image.fromarray(array), 32)) == array).all()


def test_center_crop_averages_when_it_shrinks():
    checkerboard = (np.indices((128, 128)).sum(axis=0) % 2 * 200).astype(np.uint8)
    assert (np.array(center_crop(Image.fromarray(checkerboard), 32)) == 100).all()
