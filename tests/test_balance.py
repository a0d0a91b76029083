"""What balances experts against facts known on paper: contrastive loss, z-loss, loss-free bias."""

import math

import pytest
import torch
from torch import Tensor

from models import DiTConfig, TopKRouter, contrastive_loss, router_z_loss

BIASED = DiTConfig(
    input_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3, num_experts=4,
    affinity="sigmoid", balance=("bias",),
)  # fmt: skip


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_contrastive_loss_is_log_of_the_active_experts_when_all_means_agree():
    sums, counts = torch.ones(4, 8), torch.tensor([3.0, 1.0, 0.0, 2.0])
    loss = contrastive_loss(randn(4, 8), sums * counts[:, None], counts)
    assert loss.item() == pytest.approx(math.log(3))


def test_contrastive_loss_is_nothing_for_less_than_two_active_experts_and_has_finite_gradients():
    prototypes, sums = randn(4, 8).requires_grad_(), torch.zeros(3, 4, 8).requires_grad_()
    counts = torch.tensor([[0.0, 0, 0, 0], [5, 0, 0, 0], [1, 1, 0, 0]])
    loss = contrastive_loss(prototypes, sums, counts)
    assert loss[:2].tolist() == [0.0, 0.0] and loss[2] > 0
    loss.sum().backward()
    assert prototypes.grad is not None and prototypes.grad.isfinite().all()
    assert sums.grad is not None and sums.grad.isfinite().all()


def test_contrastive_loss_pulls_a_prototype_towards_its_own_mean():
    means = torch.eye(4)
    own = contrastive_loss(means, means, torch.ones(4))
    other = contrastive_loss(means.roll(1, 0), means, torch.ones(4))
    assert own.item() == pytest.approx(math.log(1 + 3 * math.exp(-1 / 0.07)), abs=1e-6)
    assert other.item() == pytest.approx(1 / 0.07, rel=1e-3)


def test_z_loss_is_the_squared_log_of_the_experts_for_logits_of_zero():
    assert router_z_loss(torch.zeros(5, 4)).item() == pytest.approx(math.log(4) ** 2)
    routed = torch.tensor([True, False])
    assert router_z_loss(torch.tensor([[0.0, 0.0], [9.0, 9.0]]), routed).item() == pytest.approx(
        math.log(2) ** 2
    )


def bias_after(load: list[float]) -> Tensor:
    router = TopKRouter(BIASED)
    router._see("load", torch.tensor(load))
    router.update_state(bias_rate=0.1)
    return router.expert_bias


def test_an_even_load_leaves_the_bias_where_it_is():
    assert torch.equal(bias_after([5.0, 5.0, 5.0, 5.0]), torch.zeros(4))


def test_bias_moves_against_the_load_and_keeps_its_mean():
    torch.testing.assert_close(
        bias_after([7.0, 4.0, 4.0, 5.0]), torch.tensor([-0.1, 0.1, 0.1, 0.0]) - 0.025
    )
