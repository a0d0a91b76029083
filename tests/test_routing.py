"""Expert counts against a recount, and the measures on tables known by heart."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from launch import TINY_RUN
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from models import DiT, DiTBlock, DiTConfig, Routing, TopKRouter
from routing import (
    LoadCounter,
    RoutingRecorder,
    dead_experts,
    load_entropy,
    max_violation,
    tokens_per_expert,
)
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch

TINY = DiTConfig(
    input_size=4,
    hidden_size=16,
    depth=2,
    num_heads=2,
    num_classes=3,
    num_experts=4,
    num_experts_per_tok=2,
)
DENSE = DiTConfig(**{**TINY.to_dict(), "num_experts": 0})
DEEP = DiTConfig(**{**TINY.to_dict(), "depth": 12})  # dynamo compiles a function 8 times at most
EVEN, HALF, COLLAPSED = [5, 5, 5, 5], [10, 10, 0, 0], [0, 0, 20, 0]


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 4, 4, 4, generator=generator), torch.rand(3, generator=generator)
    return x, t, torch.tensor([0, 1, 2])


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
    counter = LoadCounter(DiT(DENSE))
    assert counter.counts.shape[0] == 0


def test_two_counters_of_a_model_count_for_themselves(model: DiT):
    first = LoadCounter(model)
    model(*inputs())
    second = LoadCounter(model)
    model(*inputs())
    assert torch.equal(first.counts, 2 * second.counts)
    second.remove()
    model(*inputs())
    assert torch.equal(first.counts, 3 * second.counts)


class LastExpertsRouter(nn.Module):
    """Send every token to the last two of four experts."""

    def forward(self, x: Tensor, is_null: Tensor | None = None) -> Routing:
        num_tokens = x.shape[0] * x.shape[1]
        probs = x.new_tensor([0.0, 0.0, 0.25, 0.75]).expand(num_tokens, 4)
        indices = torch.tensor([2, 3]).expand(num_tokens, 2)
        return Routing(indices, probs[:, 2:], probs, {}, None)


def with_other_routers(model: DiT) -> DiT:
    for block in model.blocks:
        block.moe.router = LastExpertsRouter()  # type: ignore[union-attr]
    return model


def test_a_router_of_any_class_is_counted(model: DiT):
    counter = LoadCounter(with_other_routers(model))
    model(*inputs())
    assert counter.counts.tolist() == [[0, 0, 12, 12]] * 2  # N * T tokens for both


def test_a_router_of_any_class_is_recorded(model: DiT):
    recorder = RoutingRecorder(with_other_routers(model), num_steps=1, num_traced=3)
    recorder.begin(torch.tensor([0, 1, 2]), first_index=0)
    model(*inputs())
    assert recorder.tables["by_step"][0, 0].tolist() == [[0, 0, 12, 12]] * 2
    assert recorder.tables["traced_ids"].unique(dim=-2).flatten().tolist() == [3, 2] * 6
    recorder.remove()


# -- compiled blocks


def interleaved(model: DiT) -> DiT:
    """Make every second block dense."""
    for layer in range(0, len(model.blocks), 2):
        model.blocks[layer] = DiTBlock(DENSE)
    return model


def run_every_way(model: DiT, counter: LoadCounter) -> dict[str, tuple[Tensor, Tensor]]:
    """Return prediction and counts of a training step, evaluation and a guided grid's step."""
    (x, t, y), found = inputs(), {}
    for way in ("train", "eval", "grid"):
        counter.reset()
        model.train(way == "train")
        if way == "train":
            out, aux_losses = model(x, t, y, torch.zeros(3, dtype=torch.bool))
            sum(aux_losses.values(), out.square().mean()).backward()
        else:
            copies = 2 if way == "grid" else 1
            with torch.no_grad():
                out = model(x.repeat(copies, 1, 1, 1), t.repeat(copies), y.repeat(copies))
        found[way] = (out.detach(), counter.counts.clone())
    return found


@pytest.mark.parametrize(
    ("kinds", "grad_checkpointing", "dtype"),
    [
        (1, False, torch.float32),
        pytest.param(1, False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, True, torch.float32, marks=pytest.mark.slow),
        pytest.param(2, True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_all_blocks_of_a_shape_are_one_graph_with_a_counter_on(
    kinds: int, grad_checkpointing: bool, dtype: torch.dtype
):
    torch.manual_seed(0)
    model = interleaved(DiT(DEEP)) if kinds == 2 else DiT(DEEP)
    model.grad_checkpointing = grad_checkpointing
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    counter = LoadCounter(model)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        expected = run_every_way(model, counter)
        torch.compiler.reset()
        backend = CompileCounterWithBackend("eager")
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
        found = run_every_way(model, counter)
    assert backend.frame_count == 3 * kinds  # train, eval, and a batch of any other size
    for way, (out, counts) in expected.items():
        assert counts.shape == (12 // kinds, 4) and counts.sum(dim=1).unique().numel() == 1
        assert torch.equal(found[way][0], out) and torch.equal(found[way][1], counts), way


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


@pytest.mark.slow
def test_a_training_run_of_twelve_blocks_compiles_one_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    backend = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    flags = [*TINY_RUN, "--model", "DiT-S/8", "--compile", "--max-steps", "2", "--log-every", "1"]
    launch(build_parser(None).parse_args([*flags, "--results-dir", str(tmp_path)]), DdpTrainer)
    assert backend.frame_count == 1
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "max_vio" in log and "done:" in log
