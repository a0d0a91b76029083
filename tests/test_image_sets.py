"""Sets of images read a batch at a time, and the .npz that ADM's evaluation reads."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import FileError
from data import load_dataset
from evaluation.image_sets import DatasetSet, FolderSet, NpzSet, Spread, save_npz

IMAGES = torch.arange(5 * 3 * 4 * 4).reshape(5, 3, 4, 4).to(torch.uint8)


def test_an_npz_written_in_batches_is_what_numpy_reads(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    save_npz(path, 5, iter(IMAGES.split(2)), torch.arange(5))
    with np.load(path) as file:
        np.testing.assert_array_equal(file["arr_0"], IMAGES.permute(0, 2, 3, 1))
        np.testing.assert_array_equal(file["arr_1"], range(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_an_npz_is_mapped_and_gives_any_range(tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", 5, iter(IMAGES.split(2)), torch.arange(5))
    found = NpzSet(tmp_path / "samples.npz")
    assert len(found) == 5 and isinstance(found.array, np.memmap)
    assert torch.equal(found.images(1, 4), IMAGES[1:4])
    assert torch.equal(found.images(4, 9), IMAGES[4:])


def test_some_images_of_a_set_are_spread_over_it(tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", 5, iter(IMAGES.split(2)), torch.arange(5))
    found = Spread(NpzSet(tmp_path / "samples.npz"), 3)
    assert len(found) == 3 and torch.equal(found.images(0, 9), IMAGES[[0, 2, 4]])
    assert torch.equal(found.images(1, 2), IMAGES[2:3])
    assert len(Spread(NpzSet(tmp_path / "samples.npz"), 9)) == 5


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_files_of_numpy_open_too(save, tmp_path: Path) -> None:
    save(tmp_path / "samples.npz", IMAGES.permute(0, 2, 3, 1).numpy())
    assert torch.equal(NpzSet(tmp_path / "samples.npz").images(0, 5), IMAGES)


def test_a_file_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="no images arr_0"):
        NpzSet(tmp_path / "other.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"arr_0 is float64 \(2, 4, 4, 3\), not uint8 \(n, S, S"):
        NpzSet(tmp_path / "floats.npz")
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="no images arr_0"):
        NpzSet(tmp_path / "broken.npz")


def test_broken_arrays_of_an_npz_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    shapes = ((0, 4, 4, 3), (2, 4, 4, 2), (4, 4, 3))
    arrays = [*(np.zeros(shape, np.uint8) for shape in shapes), np.array([{}] * 3)]
    for array in arrays:
        np.savez(path, array)
        with pytest.raises(FileError, match="arr_0") as caught:
            NpzSet(path)
        assert "\n" not in str(caught.value)
    save_npz(path, 5, iter([IMAGES]), torch.arange(5))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(5, 4, 4, 3)", b"(9, 4, 4, 3)"))
    with pytest.raises(FileError, match=r"368 bytes, not those of \(9, 4, 4, 3\)"):
        NpzSet(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(FileError, match=r"samples\.npz: no images arr_0 in it"):
        NpzSet(path)


def test_an_npz_that_unpacks_to_a_thousandfold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evaluation.image_sets.MAX_UNPACKED", 2**16)
    np.savez_compressed(tmp_path / "bomb.npz", np.zeros((10, 256, 256, 3), np.uint8))
    with pytest.raises(FileError, match=r"bytes unpack to 1,966,208"):
        NpzSet(tmp_path / "bomb.npz")


def test_a_folder_of_loops_pipes_and_16_bits_is_read_once_and_right(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(tmp_path / "white.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    found = FolderSet(tmp_path)
    assert len(found) == 1 and (found.images(0, 1) == 255).all()


def test_an_unfinished_npz_has_not_its_name(tmp_path: Path) -> None:
    def broken():
        yield IMAGES[:2]
        raise RuntimeError("no more")

    with pytest.raises(OSError, match="no more"):
        save_npz(tmp_path / "samples.npz", 5, broken(), torch.arange(5))
    assert not (tmp_path / "samples.npz").exists()


def test_a_large_npz_keeps_the_header_that_numpy_expects(tmp_path: Path) -> None:
    save_npz(tmp_path / "samples.npz", 5, iter([IMAGES]), torch.arange(5))
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for index, image in enumerate(IMAGES):
        folder = tmp_path / ("a" if index < 3 else "b")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    found = FolderSet(tmp_path)
    assert len(found) == 5 and torch.equal(found.images(2, 5), IMAGES[2:])


def test_a_folder_with_a_broken_or_a_larger_image_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no image files"):
        FolderSet(tmp_path)
    for index, size in enumerate((4, 5)):
        Image.new("RGB", (size, size)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match=r"1\.png has 5 x 5 pixels.*--image-size S crops them"):
        FolderSet(tmp_path)
    assert FolderSet(tmp_path, 4).images(0, 2).shape == (2, 3, 4, 4)
    (tmp_path / "0.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot read the image file .*0\.png"):
        FolderSet(tmp_path)
    with pytest.raises(ValueError, match=r"is no folder of images and no \.npz"):
        FolderSet(tmp_path / "0.png")


def test_a_data_set_gives_its_pixels_unflipped() -> None:
    dataset = load_dataset("digits", split="test")
    found = DatasetSet(dataset, "digits test")
    assert len(found) == 300
    expected = ((dataset.__getitems__([(299, False)])[0] + 1) * 127.5).round()
    assert torch.equal(found.images(299, 400).float(), expected)
