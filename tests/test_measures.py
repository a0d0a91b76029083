"""Measures of routing tables against facts known on paper, and the table they are printed as."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from counting import L, count, save_model

from routing import (
    mutual_information,
    normalized_mutual_information,
    pair_usage,
)
from routing.tables import RoutingData, format_table, measure


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(ckpt: str, tmp_path_factory: pytest.TempPathFactory) -> RoutingData:
    return count(ckpt, tmp_path_factory.mktemp("data") / "routing.npz")


def test_information_is_nothing_for_equal_rows_and_everything_for_rows_of_their_own():
    equal, own = torch.tensor([[4, 2], [4, 2]]), torch.tensor([[6, 0], [0, 6]])
    assert mutual_information(equal).item() == pytest.approx(0, abs=1e-12)
    assert mutual_information(own).item() == pytest.approx(math.log(2))
    assert normalized_mutual_information(torch.stack([equal, own]), 1).tolist() == pytest.approx(
        [0, 1]
    )


def test_information_is_complete_when_each_row_has_k_experts_of_its_own():
    counts = torch.tensor([[5, 5, 0, 0], [0, 0, 5, 5]])  # K = 2: each row knows its pair
    assert normalized_mutual_information(counts, 2).item() == pytest.approx(1)
    assert normalized_mutual_information(counts[:1], 2).item() == 0  # nothing to tell apart


def test_information_follows_its_formula_on_an_uneven_table():
    joint = np.array([[1, 2, 3], [3, 1, 0]]) / 10
    rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    ratio = np.where(joint > 0, joint / (rows * columns), 1)
    expected = (joint * np.log(ratio)).sum()
    found = mutual_information(torch.tensor([[1, 2, 3], [3, 1, 0]]))
    assert found.item() == pytest.approx(expected)


def test_pair_usage_counts_pairs_not_single_experts():
    pairs = torch.diag(torch.tensor([4, 4, 4]))
    pairs[0, 1] = pairs[1, 0] = 4
    assert pair_usage(pairs).item() == pytest.approx(1 / 3)


def test_early_middle_and_late_steps_are_measured_apart(data: RoutingData):
    even, one = [3, 3, 3, 3], [6, 6, 0, 0]
    for num_steps, by_step in ((8, [one] * 2 + [even] * 4 + [one] * 2), (1, [one]), (2, [one] * 2)):
        tables = {**vars(data), "by_step": torch.tensor(by_step)[None, :, None].repeat(2, 1, L, 1)}
        row = measure(RoutingData(**tables))[0]
        ends = (row["entropy_early"], row["entropy_late"])
        assert ends == pytest.approx((0.5, 0.5))
        assert row["entropy_middle"] == pytest.approx(1.0 if num_steps == 8 else 0.5)


def test_the_table_is_printed_and_saved_with_a_row_per_layer_and_half(ckpt: str, tmp_path: Path):
    data = count(ckpt, tmp_path / "a.npz")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["half"], row["layer"]) for row in rows] == [
        *(("conditional", "0"), ("conditional", "1")),
        *(("unconditional", "0"), ("unconditional", "1")),
    ]
    measured = measure(data)
    assert float(rows[1]["nmi_patch"]) == pytest.approx(measured[1]["nmi_patch"])
    table = format_table(measured, ["nmi_class", "entropy"]).splitlines()
    assert table[0].split() == ["layer", "nmi_class", "entropy"]
    assert table[-1].split()[0] == "mean"
    probabilities = data.mean_probs()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(L, dtype=torch.float64))
