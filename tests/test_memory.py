"""The memory plan against facts known on paper; test_train_deepspeed.py has the real engine's."""

import copy
from typing import Any

import pytest
import torch

from models import DiT, DiT_models
from training.memory import (
    GIB,
    expert_memory,
    expert_table,
    expert_wire,
    memory_table,
    rank_memory,
    split_parameters,
)


@pytest.fixture(scope="module")
def giant() -> DiT:
    with torch.device("meta"):
        return DiT_models["DiT-G/2"]()


def test_stage_3_divides_all_but_the_gather(giant: DiT) -> None:
    one, many = (rank_memory(giant, 3, ranks, persistent=0) for ranks in (1, 64))
    for name in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(many, name) == pytest.approx(getattr(one, name) / 64, rel=1e-5)
    assert many.gather == one.gather


def test_one_rank_needs_24_bytes_a_parameter_at_stage_2_and_20_without_zero(giant: DiT) -> None:
    count = sum(p.numel() for p in giant.parameters())
    zero, ddp = rank_memory(giant, 2, 1), rank_memory(giant, 0, 1)
    assert zero.total == pytest.approx(24 * count, rel=1e-3)
    assert ddp.total == pytest.approx(20 * count, rel=1e-3)
    cut = rank_memory(giant, 3, 8, persistent=0)
    assert cut.total - cut.gather == pytest.approx(20 * count / 8, rel=1e-3)


def test_the_largest_gather_is_the_experts_of_one_layer(giant: DiT) -> None:
    assert rank_memory(giant, 3, 8).gather == 4 * 16 * 3 * 1408 * 4 * 1408


def test_stage_2_keeps_all_weights_on_every_rank(giant: DiT) -> None:
    memory = rank_memory(giant, 2, 64)
    assert memory.weights == 4 * 16_503_731_232
    assert memory.total < 67 * GIB


@pytest.mark.parametrize(
    ("name", "overrides", "num_numbers"),
    [
        ("DiT-S/2", {}, 0),
        ("DiT-S/2", {"affinity": "sigmoid", "balance": ("bias",)}, 12 * 8),
        ("DiffMoE-B/2", {}, 6 * 8),
        ("ProMoE-S/2", {"balance": ("contrastive", "bias")}, 6 * 12),
    ],
)
def test_what_routers_keep_is_whole_on_every_rank(
    name: str, overrides: dict[str, Any], num_numbers: int
) -> None:
    with torch.device("meta"):
        model = DiT_models[name](**overrides)
    stateless = copy.deepcopy(model)
    for module in stateless.modules():
        module._buffers.clear()
    for stage in (0, 2, 3):
        found, expected = (rank_memory(each, stage, 8) for each in (model, stateless))
        assert found.weights - expected.weights == 4 * num_numbers
        assert found.ema - expected.ema == (4 * num_numbers if stage == 0 else 0)
        assert found.total - found.ema == expected.total - expected.ema + 4 * num_numbers


def test_the_table_has_a_row_for_every_stage_and_number_of_ranks(giant: DiT) -> None:
    rows = [line.split() for line in memory_table(giant, [8, 64]).splitlines()[2:]]
    assert [row[:2] for row in rows[:4]] == [["8", s] for s in ("0", "2", "3", "3+offload")]
    assert len(rows) == 8 and all(float(row[-1]) > 0 for row in rows if row[1] == "3+offload")


def test_expert_parallelism_divides_the_experts_alone(giant: DiT) -> None:
    (dense, every), (_, part) = (split_parameters(giant, size) for size in (1, 8))
    assert dense + every == 16_503_731_232 and part * 8 == every == 40 * 16 * 3 * 1408 * 5632
    assert expert_memory(giant, 1).total == pytest.approx(20 * (dense + every), rel=1e-3)
    assert expert_memory(giant, 8).total < 60 * GIB < 300 * GIB < expert_memory(giant, 1).total


def test_zero_2_cuts_the_experts_of_a_rank_over_those_that_hold_the_same(giant: DiT) -> None:
    dense, experts = split_parameters(giant, 8)
    one, eight = (rank_memory(giant, 2, ranks, size=8) for ranks in (8, 64))
    assert one.weights == eight.weights == 4 * (dense + experts)
    assert one.ema == pytest.approx(4 * (dense / 8 + experts), rel=1e-4)  # not of the positions
    assert eight.ema == pytest.approx(4 * (dense / 64 + experts / 8), rel=1e-4)
    stage_0, plain = rank_memory(giant, 0, 8, size=8), expert_memory(giant, 8)
    assert stage_0.total == pytest.approx(plain.total, rel=1e-4)
    rows = [line.split() for line in memory_table(giant, [8], 8).splitlines()[2:]]
    assert [row[:2] for row in rows] == [["8", "0"], ["8", "2"]]


def test_bytes_on_the_wire_are_two_rings_of_gradients_and_four_rows_a_choice(giant: DiT) -> None:
    dense, every = split_parameters(giant, 1)
    ddp, sent = (expert_wire(giant, 8, size, 16, 2, False) for size in (1, 8))
    assert ddp == (round(8 * (dense + every) * 7 / 8), 0)
    assert sent == (round(8 * dense * 7 / 8), 4 * 16 * 256 * 2 * 40 * 1408 * 2 * 7 // 8)
    again = expert_wire(giant, 8, 8, 16, 2, True)
    assert again.tokens == sent.tokens * 6 // 4
    rows = expert_table(giant, [8, 64], [1, 8], images=128, width=2, grad_checkpointing=False)
    assert [line.split()[:2] for line in rows.splitlines()[2:]] == [
        ["8", "1"], ["8", "8"], ["64", "1"], ["64", "8"]
    ]  # fmt: skip
