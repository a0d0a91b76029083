"""Weights mapped from a file are read when used and given back; test_checkpoint.py has layouts."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights import SafetensorsWeights, page_out

MEGABYTE = 1_000_000


def resident(path: Path) -> int:
    """Return how many bytes of a file this process has mapped and in memory."""
    found, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping's head: its addresses, ..., its file
            is_file = rest[-1] == str(path)
        elif is_file and first == "Rss:":
            found += int(rest[0]) * 1024
    return found


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, Tensor]:
    """Write a tensor of 8 MB; returns the file and the tensor mapped from it."""
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(2 * MEGABYTE)}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not on disk yet stays in memory
    return path, SafetensorsWeights({"weight": path})["weight"]


def test_a_mapped_tensor_takes_memory_when_it_is_used(mapped: tuple[Path, Tensor]) -> None:
    path, tensor = mapped
    before = resident(path)
    tensor.sum()
    assert before < MEGABYTE and resident(path) >= tensor.nbytes


def test_paging_out_gives_the_memory_back_and_the_values_are_read_again(
    mapped: tuple[Path, Tensor],
) -> None:
    path, tensor = mapped
    expected = tensor.clone()
    page_out([tensor])
    assert resident(path) < MEGABYTE
    assert torch.equal(tensor, expected)
    assert resident(path) >= tensor.nbytes


def test_paging_out_what_no_file_holds_loses_nothing() -> None:
    tensors = [torch.randn(MEGABYTE), torch.randn(3), torch.randn(0)]
    expected = [tensor.clone() for tensor in tensors]
    neighbours = torch.randn(100_000)
    part, whole = neighbours[7:90_000], neighbours.clone()
    page_out([*tensors, part])
    for tensor, values in zip([*tensors, neighbours], [*expected, whole], strict=True):
        assert torch.equal(tensor, values)
