"""Biases and thresholds of routers are the same under ZeRO: moved, saved, resumed and exported."""

from typing import Any

import pytest
import torch
from launch import REPO, Process, torchrun
from router_state_worker import CASES, MIXTURES
from torch.testing import assert_close


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("worker")
    worker = str(REPO / "tests/router_state_worker.py")
    Process(torchrun(worker, str(folder / "out.pt"), str(folder)), folder / "log.txt").wait(400)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("case", CASES[1:])
def test_every_stage_moves_them_as_train_py(
    case: str, mixture: str, on_two_ranks: dict[str, Any]
) -> None:
    runs = on_two_ranks["runs"]
    ours, theirs = runs[case, mixture]["state"], runs[None, mixture]["state"]
    assert len(ours) == 4 and all(name.endswith(mixture) and ours[name].any() for name in ours)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("case", CASES)
def test_they_are_saved_and_a_run_goes_on_with_them_bit_for_bit(
    case: str | None, mixture: str, on_two_ranks: dict[str, Any]
) -> None:
    facts = on_two_ranks["runs"][case, mixture]
    for found in (facts["resumed"], facts["loaded"][True], facts["loaded"][False]):
        assert_close(found, facts["state"], rtol=0, atol=0)
    assert facts["goes on the same"]
    assert_close(*facts["state after"], rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_skipped_step_leaves_them_and_is_forgotten(
    case: str | None, on_two_ranks: dict[str, Any]
) -> None:
    before, skipped, after = on_two_ranks["overflows"][case]
    assert_close(skipped, before, rtol=0, atol=0)
    for name, value in after.items():
        assert value.any()
        assert value.abs().max() <= 0.02, name  # of one step
