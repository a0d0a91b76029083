"""Experts on several ranks train as on one: gloo ranks against DDP and against one process."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_parallel_worker import CASES, NUM_UPDATES, make_updates
from launch import REPO, Process, torchrun
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from moe_ops import ExpertGroup, check_expert_parallel
from training.expert_parallel import IGNORE_BY_DDP

NUM_BLOCKS, HIDDEN, NUM_EXPERTS = 4, 96, 4  # of DiT-Ti


def launch_worker(folder: Path, nproc: int, *sizes: str) -> dict[Any, Any]:
    worker = [str(REPO / "tests/expert_parallel_worker.py"), str(folder / "out.pt"), str(folder)]
    Process(torchrun(*worker, *sizes, nproc=nproc), folder / "log.txt").wait(seconds=900)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("two"), 2, "2")


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    return launch_worker(tmp_path_factory.mktemp("four"), 4, "2", "4")


def assert_same_updates(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) == NUM_UPDATES
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ equal to DDP


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_half_of_the_experts_train_as_ddp_and_as_one_process(
    case: str, on_two_ranks: dict[Any, Any]
) -> None:
    flags = CASES[case] if case != "accumulated" else ("--balance", "none")  # 1x4 for 2x2
    assert_same_updates(on_two_ranks[case, "2"], on_two_ranks[case, ""])
    assert_same_updates(on_two_ranks[case, "2"], make_updates(*flags))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), itertools.product(("2", "4"), CASES))
def test_four_ranks_as_one_group_and_as_two_replicas_train_as_ddp_and_as_one_process(
    size: str, case: str, on_four_ranks: dict[Any, Any]
) -> None:
    flags = CASES[case] if case != "accumulated" else ("--balance", "none")
    assert_same_updates(on_four_ranks[case, size], on_four_ranks[case, ""])
    assert_same_updates(on_four_ranks[case, size], make_updates(*flags))


def check_few_experts(results: dict[Any, Any], size: str, case: str) -> None:
    """Compare runs that use two experts, or on each rank two that are another rank's."""
    found, expected = results[case, size], results[case, ""]
    used = torch.stack(found["counts"]).sum(dim=1) > 0  # (ranks, E)
    experts = [[0, 1]] * len(used) if case == "one" else [[2, 3], [0, 1]] * (len(used) // 2)
    assert [row.nonzero().flatten().tolist() for row in used] == experts
    found, expected = ({n: v for n, v in r.items() if n != "counts"} for r in (found, expected))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["one", "others"])
def test_ranks_that_receive_nothing_and_experts_without_tokens_make_20_steps_of_ddp(
    case: str, on_two_ranks: dict[Any, Any]
) -> None:
    check_few_experts(on_two_ranks, "2", case)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), itertools.product(("2", "4"), ("one", "others")))
def test_four_ranks_of_which_some_receive_nothing_make_20_steps_of_ddp(
    size: str, case: str, on_four_ranks: dict[Any, Any]
) -> None:
    check_few_experts(on_four_ranks, size, case)


def test_a_run_starts_from_the_weights_of_one_process(on_two_ranks: dict[Any, Any]) -> None:
    assert on_two_ranks["initial", "2"] == 0.0


def test_another_trainer_goes_on_from_the_shares_bit_for_bit(on_two_ranks: dict[Any, Any]) -> None:
    ours, again = on_two_ranks["resumed", "2"]
    assert_close(again, ours, rtol=0, atol=0)


def test_an_expert_that_overflows_on_one_rank_makes_all_ranks_skip_the_step(
    on_two_ranks: dict[Any, Any],
) -> None:
    assert on_two_ranks["overflow", "2"] == [(0, 1, 0.0)] * 2


# ------------------------------------------------------------------------------ bytes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_on_the_wire_are_those_of_the_formula(
    precision: str, on_two_ranks: dict[Any, Any]
) -> None:
    ranks = on_two_ranks["bytes", "2", precision]
    choices = torch.stack(ranks[0]["counts of choices"])  # (ranks, L, E)
    elsewhere = choices[0, :, 2:].sum() + choices[1, :, :2].sum()  # rows
    width = 4 if precision == "fp32" else 2
    assert sum(r["rows"] for r in ranks) == 4 * elsewhere * HIDDEN * width
    assert all(r["counts"] == NUM_BLOCKS * 2 * 4 for r in ranks)  # of two experts, int32


# ------------------------------------------------------------------------------ what fits


@pytest.mark.parametrize(("size", "fitting"), [(3, "1 or 2 or 4"), (8, "1 or 2 or 4")])
def test_a_number_that_does_not_divide_experts_and_ranks_is_refused_with_those_that_do(
    size: int, fitting: str
) -> None:
    with pytest.raises(ValueError, match=rf"8 experts and 4 ranks: {fitting} would do"):
        check_expert_parallel(size, 8, 4)
    with pytest.raises(ValueError, match="has no experts"):
        check_expert_parallel(1, 0, 4)


def test_every_expert_is_held_once_and_the_unconditional_one_by_the_last_rank() -> None:
    group = object.__new__(ExpertGroup)
    group.size = 4
    assert [group.experts_of(m, 13) for m in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 13)]


def test_torch_still_lets_ddp_leave_parameters_out() -> None:
    assert callable(getattr(DistributedDataParallel, IGNORE_BY_DDP))
