"""Two ranks train every family as one rank with all the images: balance, thresholds and all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families_worker import BY_RANK
from test_families import FAMILIES


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what every rank of one and of two has after its updates."""
    out = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).with_name("families_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(worker.parents[1])}
    for world_size in (1, 2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        flags = ["--nproc-per-node", str(world_size), str(worker), str(out)]
        subprocess.run([*launcher, *flags], check=True, timeout=300, env=environment)
    return {path.stem: torch.load(path, weights_only=True) for path in out.glob("*.pt")}


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_train_as_one_with_twice_the_batch(states: dict[str, Any], family: str) -> None:
    one, first, second = (states[name][family] for name in ("1_0", "2_0", "2_1"))
    for name, expected in one.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("family", BY_RANK)
def test_statistics_by_rank_depend_on_their_number_as_published(
    states: dict[str, Any], family: str
) -> None:
    one, first = (states[name][f"{family} by rank"] for name in ("1_0", "2_0"))
    expected = states["1_0"][family]
    assert all(torch.equal(one[name], expected[name]) for name in expected)
    assert max((first[name] - one[name]).abs().max() for name in one) > 1e-4
