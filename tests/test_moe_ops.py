"""The routed layer against a loop over single tokens, with both ways of the experts' matmuls.

torch's grouped matmul, which only some GPUs have a kernel for, runs on a CPU too, so it is tested
here.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_ops import (
    activate,
    activate_backward,
    exact_linear,
    expert_matmuls,
    grouped_linear,
    rounded_once,
    sort_by_expert,
    swiglu,
    swiglu_experts,
)
from moe_ops.matmul import grouped_outer

M, D, WIDTH, E = 40, 16, 24, 5
Layer = Callable[..., Tensor]


def loop_over_tokens(
    x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, indices: Tensor, weights: Tensor
) -> Tensor:
    """Compute the layer as it is on paper: one token, one expert at a time."""
    out = []
    for token, experts, token_weights in zip(x, indices.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for expert, weight in zip(experts, token_weights, strict=True):
            gate, up = (gate_up_proj[expert] @ token).chunk(2)
            total = total + weight * (down_proj[expert] @ (F.silu(gate) * up))
        out.append(total)
    return torch.stack(out)


def make_inputs(k: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the arguments of the layer; all but the indices require gradients."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul(std).to(dtype).requires_grad_()

    x, gate_up, down = randn(M, D), randn(E, 2 * WIDTH, D, std=0.3), randn(E, D, WIDTH, std=0.3)
    indices = torch.rand(M, E, generator=generator).topk(k).indices
    weights = torch.rand(M, k, generator=generator).to(dtype).requires_grad_()
    return [x, gate_up, down, indices, weights]


def run(layer: Layer, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the output of the layer and the gradients of all inputs that require one."""
    out = layer(*inputs)
    direction = torch.linspace(-1, 1, out.numel()).view_as(out).to(out.dtype)
    return [out, *torch.autograd.grad(out, [i for i in inputs if i.requires_grad], direction)]


def assert_agree(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare tensors, relative to the largest entry of each."""
    for a, e in zip(actual, expected, strict=True):
        largest = e.abs().max().item()
        torch.testing.assert_close(a.to(e.dtype), e, atol=tolerance * largest, rtol=0)


@pytest.fixture(params=["a matmul an expert", "one grouped matmul"])
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Layer:
    """Return the routed layer, with the experts' matmuls done one way or the other."""
    if request.param == "one grouped matmul":
        monkeypatch.setattr("moe_ops.matmul._on_host", lambda offsets: False)
    return swiglu_experts


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """Let torch fill new memory with NaN, as it does in this mode: what is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# -- values and gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("k", [1, 2, E])
def test_layer_equals_a_loop_over_tokens_in_values_and_gradients(
    layer: Layer, dtype: torch.dtype, tolerance: float, k: int
):
    inputs = make_inputs(k, dtype)
    exact = [i.detach().float().requires_grad_() if i.requires_grad else i for i in inputs]
    actual = run(layer, inputs)
    assert all(tensor.dtype == dtype for tensor in actual)
    assert_agree(actual, run(loop_over_tokens, exact), tolerance)


def test_experts_without_tokens_get_zero_gradients(layer: Layer, nan_in_new_memory: None):
    x, gate_up, down, _, weights = make_inputs()
    only_1_and_3 = torch.tensor([[1, 3]]).expand(M, 2)
    inputs = [x, gate_up, down, only_1_and_3, weights]
    actual = run(layer, inputs)
    for gradient in actual[2:4]:
        assert torch.equal(gradient[[0, 2, 4]], torch.zeros_like(gradient[[0, 2, 4]]))
    assert_agree(actual, run(loop_over_tokens, inputs), 2e-6)


def test_no_token_is_dropped_when_all_choose_one_expert(layer: Layer):
    x, gate_up, down, _, _ = make_inputs()
    gate, up = F.linear(x, gate_up[3]).chunk(2, dim=-1)
    expected = F.linear(F.silu(gate) * up, down[3])
    actual = layer(x, gate_up, down, torch.full((M, 1), 3), torch.ones(M, 1))
    torch.testing.assert_close(actual, expected)


def test_order_of_a_tokens_choices_does_not_matter(layer: Layer):
    x, gate_up, down, indices, weights = make_inputs(k=3)
    swapped = layer(x, gate_up, down, indices.flip(1), weights.flip(1))
    torch.testing.assert_close(swapped, layer(x, gate_up, down, indices, weights))


def test_values_are_the_same_without_gradients(layer: Layer):
    inputs = make_inputs()
    with torch.inference_mode():
        actual = layer(*inputs)
    torch.testing.assert_close(actual, layer(*inputs).detach())


@pytest.mark.parametrize("trained", [0, 1, 2, 4], ids=["x", "gate_up", "down", "weights"])
def test_each_input_can_be_the_only_one_with_a_gradient(layer: Layer, trained: int):
    inputs = [tensor.detach() for tensor in make_inputs()]
    inputs[trained].requires_grad_()
    assert_agree(run(layer, inputs), run(loop_over_tokens, inputs), 2e-6)


def test_float32_weights_of_a_bfloat16_layer_get_float32_gradients():
    x, gate_up, down, indices, weights = make_inputs()
    inputs = [x.detach().bfloat16().requires_grad_(), gate_up, down, indices, weights]
    actual = run(swiglu_experts, inputs)
    assert [a.dtype for a in actual] == [torch.bfloat16] * 2 + [torch.float32] * 3
    assert_agree(actual, run(loop_over_tokens, [x, *inputs[1:]]), 2e-2)


def test_weights_rounded_once_give_the_bits_of_weights_rounded_at_every_use():
    x, gate_up, down, indices, weights = make_inputs()
    inputs = [x.detach().bfloat16().requires_grad_(), gate_up, down, indices, weights]
    expected = run(swiglu_experts, inputs)
    with rounded_once([gate_up, down], torch.bfloat16):
        within = run(swiglu_experts, inputs)
    for found, wanted in zip(within, expected, strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    with torch.no_grad():
        gate_up.mul_(2.0)
    assert not torch.equal(run(swiglu_experts, inputs)[0], expected[0])  # no copy is left


# -- dispatch


def test_plan_sorts_choices_by_expert_and_keeps_the_order_of_tokens():
    plan = sort_by_expert(torch.tensor([[3, 0], [0, 3], [1, 0]]), num_experts=4)
    assert plan.order.tolist() == [1, 2, 5, 4, 0, 3]
    assert plan.order[plan.inverse].tolist() == list(range(6))
    assert plan.tokens.tolist() == [0, 1, 2, 2, 0, 1]
    assert plan.starts.tolist() == [0, 2, 4]
    assert plan.offsets.tolist() == [3, 4, 4, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_input_gives_equal_bits(layer: Layer, dtype: torch.dtype, nan_in_new_memory: None):
    inputs = make_inputs(dtype=dtype)
    for first, second in zip(run(layer, inputs), run(layer, inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_are_static_and_no_value_is_read_on_the_host(layer: Layer, dtype: torch.dtype):
    inputs = make_inputs(dtype=dtype)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:  # tensors without values
        fakes = [fake.from_tensor(tensor) for tensor in inputs]
        outputs = run(layer, fakes)
    expected = run(layer, inputs)
    assert [o.shape for o in outputs] == [e.shape for e in expected]
    assert [o.stride() for o in outputs] == [e.stride() for e in expected]


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "expected"),
    [
        ("cpu", torch.bfloat16, None, "one matmul an expert"),
        ("cuda", torch.bfloat16, (9, 0), "one grouped matmul for all experts"),
        ("cuda", torch.bfloat16, (10, 3), "one grouped matmul for all experts"),
        ("cuda", torch.float16, (9, 0), "one matmul an expert and a wait for the GPU"),
        ("cuda", torch.float32, (9, 0), "one matmul an expert and a wait for the GPU"),
        ("cuda", torch.bfloat16, (8, 0), "one matmul an expert and a wait for the GPU"),
        ("cuda", torch.bfloat16, (12, 0), "one matmul an expert and a wait for the GPU"),
    ],
)
def test_the_hardware_decides_how_the_experts_matmuls_run(
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    assert expert_matmuls(torch.device(device), dtype) == expected


# -- custom operators


def test_grouped_linear_multiplies_each_segment_by_its_own_matrix():
    x, gate_up, _, _, _ = make_inputs()
    offsets = torch.tensor([7, 7, 20, 33, M], dtype=torch.int32)

    def by_segment(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        segments = rows.tensor_split(offsets[:-1].long())
        return torch.cat([F.linear(s, w) for s, w in zip(segments, weight, strict=True)])

    inputs = [x, gate_up, offsets]
    assert_agree(run(grouped_linear, inputs), run(by_segment, inputs), 2e-6)


def test_exact_linear_has_the_bits_of_a_linear_layer_and_of_its_gradients():
    for rows, inputs, outputs in ((40, 16, 5), (2048, 384, 8), (1, 8, 4), (300, 1152, 16)):
        generator = torch.Generator().manual_seed(rows)
        x = torch.randn(rows, inputs, generator=generator).requires_grad_()
        weight = torch.randn(outputs, inputs, generator=generator).requires_grad_()
        exact, plain = run(exact_linear, [x, weight]), run(F.linear, [x, weight])
        assert all(torch.equal(a, b) for a, b in zip(exact, plain, strict=True))


@pytest.fixture(params=[True, False])
def allow_tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


def test_exact_linear_switches_tf32_off_for_its_matmuls_only(
    allow_tf32: bool, monkeypatch: pytest.MonkeyPatch
):
    found: list[bool] = []
    matmul, plain = torch.backends.cuda.matmul, Tensor.__matmul__

    def spy(a: Tensor, b: Tensor) -> Tensor:
        found.append(matmul.allow_tf32 or matmul.fp32_precision == "tf32")
        return plain(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", spy)
    inputs = [torch.randn(6, 8).requires_grad_(), torch.randn(4, 8).requires_grad_()]
    run(exact_linear, inputs)
    assert found == [False] * 3  # the output and two gradients
    inputs[0] @ inputs[1].t()
    assert found[3] == matmul.allow_tf32 == (matmul.fp32_precision == "tf32") == allow_tf32


@pytest.mark.parametrize("weighted", [True, False])
def test_chunks_of_rows_give_the_values_of_all_at_once(
    weighted: bool, monkeypatch: pytest.MonkeyPatch
):
    generator = torch.Generator().manual_seed(0)
    hidden, grad = (torch.randn(40, n, generator=generator) for n in (2 * WIDTH, WIDTH))
    weights = torch.rand(40, 1, generator=generator) if weighted else None
    whole = [activate(hidden, weights), *activate_backward(grad, hidden, weights)]
    monkeypatch.setattr("moe_ops.fused.CHUNK", 16)  # two and a half
    parts = [activate(hidden, weights), *activate_backward(grad, hidden, weights)]
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


def test_a_swiglu_of_all_tokens_has_the_gradients_of_its_formula():
    x, gate_up, down, _, _ = make_inputs()
    matrices = [gate_up[0].detach().requires_grad_(), down[0].detach().requires_grad_()]

    def formula(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    images = x.detach().view(2, M // 2, D).requires_grad_()
    assert_agree(run(swiglu, [images, *matrices]), run(formula, [images, *matrices]), 2e-6)


def test_the_backward_keeps_tokens_gate_and_up_and_no_more():
    x, *others = (tensor.detach() for tensor in make_inputs())
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        swiglu_experts(x.requires_grad_(), others[0], others[1], others[2], others[3])
    matrices = E * 3 * WIDTH * D
    assert sum(kept.values()) == matrices + M * D + M * 2 * (2 * WIDTH + 1)


@pytest.mark.parametrize(
    "name",
    ["exact_linear", "activate", "activate, no weights", "activate_backward", "grouped_linear",
     "grouped_linear, transposed", "grouped_outer"],
)  # fmt: skip
def test_custom_operators_keep_their_contract_with_torch(name: str):
    x, gate_up, down, indices, _ = make_inputs()
    offsets = sort_by_expert(indices, E).offsets
    hidden, activation = torch.randn(2 * M, 2 * WIDTH), torch.randn(2 * M, WIDTH)
    weights, rows = torch.rand(2 * M, 1), torch.cat([x, x])
    operators: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "exact_linear": (exact_linear, (x, gate_up[0])),
        "activate": (activate, (hidden, weights)),
        "activate, no weights": (activate, (hidden, None)),
        "activate_backward": (activate_backward, (activation, hidden, weights)),
        "grouped_linear": (grouped_linear, (rows, gate_up, offsets)),
        "grouped_linear, transposed": (grouped_linear, (rows, down.transpose(1, 2), offsets)),
        "grouped_outer": (grouped_outer, (hidden, rows.detach(), offsets)),
    }
    torch.library.opcheck(*operators[name])


def test_half_precision_matmuls_take_few_shapes_whatever_the_loads(monkeypatch):
    shapes = set()
    real = torch.mm

    def record(a, b, **out):
        shapes.add((a.shape, b.shape))
        return real(a, b, **out)

    monkeypatch.setattr(torch, "mm", record)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 3, 4, generator=generator).bfloat16()
    for first in range(0, 1025, 5):
        rows = torch.randn(1024, 4, generator=generator).bfloat16()
        offsets = torch.tensor([first, 1024], dtype=torch.int32)
        out = grouped_linear(rows, weight, offsets)
        grads = grouped_outer(out, rows, offsets)
        parts = (slice(0, first), slice(first, 1024))
        naive = torch.cat([real(rows[p], w.t()) for p, w in zip(parts, weight, strict=True)])
        torch.testing.assert_close(out, naive)
        sums = torch.stack([real(out[p].float().t(), rows[p].float()) for p in parts])
        torch.testing.assert_close(grads.float(), sums, rtol=0.02, atol=0.5)
    assert len(shapes) <= 2 * 16 * 6 + 4  # 16 an octave from 16 to 1,024, forward and backward
