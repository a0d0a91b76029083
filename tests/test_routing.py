"""Expert counts against a recount, and the measures on tables known by heart."""

import math

import pytest
import torch
from torch import Tensor

from models import DiT, DiTConfig, Routing, TopKRouter
from routing import LoadCounter, dead_experts, load_entropy, max_violation, tokens_per_expert

TINY = DiTConfig(
    input_size=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    num_experts=4,
    num_experts_per_tok=2,
)
EVEN, HALF, COLLAPSED = [5, 5, 5, 5], [10, 10, 0, 0], [0, 0, 20, 0]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 4, 4, generator=generator), torch.rand(3), torch.tensor([0, 1, 2])


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    return DiT(TINY).eval()


def test_tokens_per_expert_counts_every_choice():
    indices = torch.tensor([[0, 3], [3, 1], [3, 0]])
    assert tokens_per_expert(indices, 5).tolist() == [2, 1, 0, 3, 0]


def test_counter_agrees_with_a_recount_of_every_layer(model: DiT):
    counter, recount = LoadCounter(model), torch.zeros(2, 4, dtype=torch.int64)
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]

    def recount_by_hand(router: TopKRouter, _args: object, routing: Routing) -> None:
        for expert in routing.expert_indices.flatten().tolist():
            recount[routers.index(router), expert] += 1

    for router in routers:
        router.register_forward_hook(recount_by_hand)
    model(*inputs())
    model(*inputs())
    assert torch.equal(counter.counts, recount)
    assert counter.counts.sum(dim=1).tolist() == [2 * 3 * 4 * 2] * 2  # calls * N * T * K


def test_counter_starts_again_after_reset_and_stops_after_remove(model: DiT):
    counter = LoadCounter(model)
    model(*inputs())
    counter.reset()
    assert counter.counts.sum() == 0
    model(*inputs())
    once = counter.counts.clone()
    counter.remove()
    model(*inputs())
    assert once.sum() == 2 * 3 * 4 * 2
    assert torch.equal(counter.counts, once)


def test_gradient_checkpointing_doubles_the_counts_and_keeps_the_measures(model: DiT):
    counter = LoadCounter(model.train())
    counts = []
    for model.grad_checkpointing in (False, True):
        counter.reset()
        model(*inputs(), torch.zeros(3, dtype=torch.bool))[0].sum().backward()
        counts.append(counter.counts.clone())
    assert torch.equal(counts[1], 2 * counts[0])
    assert torch.equal(max_violation(counts[1]), max_violation(counts[0]))


def test_a_dense_model_has_an_empty_table():
    counter = LoadCounter(DiT(DiTConfig(**{**TINY.to_dict(), "num_experts": 0})))
    assert counter.counts.shape[0] == 0


@pytest.mark.parametrize(
    ("counts", "entropy", "violation", "dead"),
    [(EVEN, 1.0, 0.0, 0), (HALF, 0.5, 1.0, 2), (COLLAPSED, 0.0, 3.0, 3)],
)
def test_measures_know_even_half_used_and_collapsed_loads(
    counts: list[int], entropy: float, violation: float, dead: int
):
    table = torch.tensor(counts)
    assert load_entropy(table).item() == pytest.approx(entropy)
    assert max_violation(table).item() == pytest.approx(violation)
    assert dead_experts(table).item() == dead


def test_measures_follow_their_formulas_on_an_uneven_load():
    table = torch.tensor([1, 2, 5])
    entropy = -sum(share * math.log(share) for share in (1 / 8, 2 / 8, 5 / 8)) / math.log(3)
    assert load_entropy(table).item() == pytest.approx(entropy)
    assert max_violation(table).item() == pytest.approx(5 / (8 / 3) - 1)


def test_measures_work_layer_by_layer():
    table = torch.tensor([EVEN, HALF, COLLAPSED])
    torch.testing.assert_close(load_entropy(table), torch.tensor([1.0, 0.5, 0.0]))
    torch.testing.assert_close(max_violation(table), torch.tensor([0.0, 1.0, 3.0]))
    assert dead_experts(table).tolist() == [0, 2, 3]
