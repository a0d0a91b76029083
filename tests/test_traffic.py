"""What one block of S/2-8E2A does on a GPU in training, counted exactly: no GPU is needed."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from traffic import Traffic, backward, count_compiled, count_eager, fake_gpu, saved_per_token

from models import DiT_models, DiTConfig

IMAGES, TOKENS = 8, 2048


@pytest.fixture(scope="module")
def config() -> DiTConfig:
    with torch.device("meta"):
        return dataclasses.replace(DiT_models["DiT-S/2"]().config, depth=1)


def test_traffic_counts_what_is_known_on_paper() -> None:
    with fake_gpu(), Traffic() as traffic:
        x, weight = torch.empty(6, 4, device="cuda"), torch.empty(3, 4, device="cuda")
        y = x @ weight.t()  # a matmul: no bytes
        y.view(3, 6)[:2].add(1.0)  # reads and writes 12 floats
        x.index_select(0, torch.empty(5, dtype=torch.long, device="cuda"))
        weight[:1].expand(6, 4).exp()  # reads 4 floats' memory, as much as the view's storage has
    assert traffic.operators == {"mm": 1, "add": 1, "index_select": 1, "exp": 1}
    assert traffic.bytes["add"] == 2 * 12 * 4
    assert traffic.bytes["index_select"] == 5 * 8 + 2 * 5 * 4 * 4
    assert traffic.bytes["exp"] == 12 * 4 + 24 * 4


def test_the_backward_of_single_nodes_is_autograds() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 3))
    x = torch.randn(5, 4, requires_grad=True)
    leaves = [x, *model.parameters()]
    h = model(x) + F.pad(x, (0, -1))  # x is used twice
    outs, grads = [h, h.square().sum()], [torch.randn(5, 3), torch.ones(())]
    expected = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
    for found, wanted in zip(backward(outs, grads, leaves), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_block_launches_so_many_operators_and_moves_so_many_bytes(config: DiTConfig) -> None:
    traffic = count_eager(config, IMAGES, torch.bfloat16)
    # before one code for all devices: 159 and 444,945
    assert traffic.operators.total() == 139
    assert round(traffic.bytes.total() / TOKENS) == 264997  # 0.6 of that
    assert traffic.operators["activate"] == traffic.operators["activate_backward"] == 2
    assert traffic.operators["_embedding_bag_forward_only"] == 2


def test_a_block_keeps_so_many_bytes_a_token_for_its_backward(config: DiTConfig) -> None:
    saved = saved_per_token(config, IMAGES, torch.bfloat16)
    assert round(saved) == 30904  # before: 53,920


@pytest.mark.slow
def test_a_compiled_block_is_so_many_kernels(config: DiTConfig) -> None:
    counts = count_compiled(config, IMAGES, torch.bfloat16)
    assert (counts["matmuls"], counts["kernels"]) == (26, 62)
    assert round(counts["bytes"] / TOKENS) == 247645
