"""The network against facts known on paper, in values and gradients."""

import dataclasses
import math
import sys
from types import ModuleType
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import (
    Attention,
    DiT,
    DiTBlock,
    DiTConfig,
    LabelEmbedder,
    MoE,
    SwiGLU,
    TopKRouter,
    load_balancing_loss,
    sincos_pos_embed,
    timestep_embedding,
)
from moe_ops import grouped_linear

TINY = dataclasses.replace(helpers.TINY, num_classes=10)
WITHOUT_QK_NORM = dataclasses.replace(TINY, qk_norm=False)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_model(config: DiTConfig = TINY) -> DiT:
    return randomize(DiT(config))


def tiny_inputs(num_images: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.arange(num_images)
    return randn(num_images, 4, 8, 8), torch.linspace(0.1, 0.9, num_images), y


def training_gradients(model: DiT) -> dict[str, Tensor]:
    """Return the gradients of a loss that every prediction and every balance loss is part of."""
    x, t, y = tiny_inputs()
    model.train().zero_grad()
    prediction, aux_losses = model(x, t, y, torch.tensor([False, True, False]))
    sum(aux_losses.values(), prediction.float().square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected).norm() / expected.norm()).item()


# -- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1 must be at least 1"),
        ({"input_size": 9, "patch_size": 2}, "input_size=9 is not a multiple of patch_size=2"),
        ({"hidden_size": 40, "num_heads": 6}, r"hidden_size=40 must be .*num_heads=6"),
        ({"hidden_size": 6, "num_heads": 2}, "hidden_size=6 must be a multiple of 4"),
        ({"class_dropout_prob": 1.5}, r"class_dropout_prob=1.5 must be in \[0, 1\)"),
        ({"num_experts": -8}, "num_experts=-8 must be 0"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, r"num_experts_per_tok=3 .*num_experts=2\]"),
        ({"hidden_size": 36}, "hidden_size=36 must be a multiple of 8 for experts"),
        (
            {"hidden_size": 384, "mlp_ratio": 0.3},
            "mlp_ratio=0.3 makes experts 115 wide, .* --mlp-ratio 0.291667 makes 112",
        ),
        ({"hidden_size": 48, "mlp_ratio": 0.1}, "experts 5 wide, .* --mlp-ratio 0.166667 makes 8"),
        ({"num_shared_experts": -1}, "num_shared_experts=-1 must be at least 0"),
        ({"num_experts": 0, "mlp_type": "relu"}, "mlp_type='relu' must be 'swiglu' or 'gelu'"),
    ],
)
def test_config_errors_name_the_field_and_its_value(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**fields)


@pytest.mark.parametrize("mlp_ratio", [0.291667, 0.4, 1.13])
def test_widths_that_the_error_asks_for_are_accepted_and_dense_mlps_take_any(mlp_ratio: float):
    assert DiTConfig(num_experts=0, mlp_ratio=mlp_ratio).mlp_hidden_size == round(384 * mlp_ratio)
    try:
        DiTConfig(mlp_ratio=mlp_ratio)
    except ValueError as error:
        mlp_ratio = float(str(error).split("--mlp-ratio ")[1].split()[0])
    config = DiTConfig(mlp_ratio=mlp_ratio)
    assert config.mlp_hidden_size % 8 == 0
    rows = torch.ones(2, config.mlp_hidden_size, dtype=torch.bfloat16)
    offsets = torch.tensor([1, 2], dtype=torch.int32)
    assert grouped_linear(rows, rows[:, None].repeat(1, 8, 1), offsets).shape == (2, 8)


def test_config_survives_a_dict_and_refuses_unknown_fields():
    assert DiTConfig.from_dict(TINY.to_dict()) == TINY
    with pytest.raises(ValueError, match=r"unknown DiTConfig fields \['gate'\]"):
        DiTConfig.from_dict({**TINY.to_dict(), "gate": 1})


# -- embedders


def test_timestep_embedding_has_cosines_then_sines_of_geometric_frequencies():
    embedding = timestep_embedding(torch.tensor([0.0, 3.0]), dim=4, max_period=100.0)
    expected = [math.cos(3), math.cos(0.3), math.sin(3), math.sin(0.3)]
    torch.testing.assert_close(embedding, torch.tensor([[1.0, 1.0, 0.0, 0.0], expected]))


def test_position_table_holds_the_column_in_its_first_half_and_the_row_in_its_second():
    table = sincos_pos_embed(3, 16).view(3, 3, 16)  # (row, column, D)
    column, row = table.chunk(2, dim=-1)
    assert torch.equal(column[0], column[2]) and torch.equal(row[:, 0], row[:, 2])
    torch.testing.assert_close(column[0], row[:, 0])
    torch.testing.assert_close(column[0, 2, [0, 4]], torch.tensor([math.sin(2), math.cos(2)]))


def test_labels_are_dropped_at_the_configured_rate_in_training_only():
    embedder, y = LabelEmbedder(10, 1, dropout_prob=0.1), torch.full((20_000,), 3)
    torch.manual_seed(0)
    nn.init.zeros_(embedder.embedding_table.weight)
    nn.init.ones_(embedder.embedding_table.weight[embedder.null_label].detach())
    assert embedder.train()(y).mean().item() == pytest.approx(0.1, abs=0.01)
    assert embedder.eval()(y).count_nonzero() == 0


def test_dropped_labels_are_null_labels():
    model, (x, t, y) = tiny_model().train(), tiny_inputs()
    dropped = model(x, t, y, torch.tensor([False, True, False]))[0]
    y = torch.tensor([y[0], TINY.null_label, y[2]])
    assert torch.equal(dropped, model(x, t, y, torch.zeros(3, dtype=torch.bool))[0])


def test_unpatchify_puts_each_patch_back_where_it_was():
    latents = randn(2, TINY.out_channels, 8, 8)
    tokens = [
        latents[:, :, row : row + 2, column : column + 2].permute(0, 2, 3, 1).flatten(1)
        for row in range(0, 8, 2)
        for column in range(0, 8, 2)
    ]  # 16 of (N, P*P*C)
    assert torch.equal(DiT(TINY).unpatchify(torch.stack(tokens, dim=1)), latents)


# -- attention


@pytest.mark.parametrize("config", [TINY, WITHOUT_QK_NORM], ids=["qk_norm", "no_qk_norm"])
def test_flash_attention_computes_the_same(config: DiTConfig, monkeypatch: pytest.MonkeyPatch):
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16  # it takes half formats only
        called.append(q)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # from (N, T, heads, d)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    called: list[Tensor] = []
    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    model, inputs = tiny_model(config).eval(), tiny_inputs()
    expected, names = model(*inputs), list(model.state_dict())
    model.use_flash_attn()
    assert all(m.use_flash_attn for m in model.modules() if isinstance(m, Attention))
    torch.testing.assert_close(model(*inputs), expected)
    assert list(model.state_dict()) == names and not called
    model.bfloat16()
    flash = model(*inputs)
    model.use_flash_attn(False)
    torch.testing.assert_close(flash, model(*inputs), atol=0.02, rtol=0.02)
    assert len(called) == config.depth


def test_flash_attention_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="needs the flash-attn package"):
        DiT(TINY).use_flash_attn()


# -- router and balance loss


def test_aux_loss_is_one_when_balanced_and_num_experts_when_collapsed():
    even = load_balancing_loss(torch.full((4, 4), 0.25), torch.arange(4).view(4, 1))
    collapsed = load_balancing_loss(torch.eye(4)[[0, 0, 0, 0]], torch.zeros(4, 1, dtype=torch.long))
    assert even.item() == pytest.approx(1.0)
    assert collapsed.item() == pytest.approx(4.0)


def test_aux_loss_counts_all_choices():
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2]])
    indices = torch.tensor([[0, 1], [1, 2]])  # loads 1/4, 1/2, 1/4; mean probs .35, .45, .2
    expected = 3 * (0.25 * 0.35 + 0.5 * 0.45 + 0.25 * 0.2)
    assert load_balancing_loss(probs, indices).item() == pytest.approx(expected)


def test_gradient_of_the_aux_loss_is_the_load_and_flows_through_the_probs_only():
    probs = torch.full((4, 2), 0.5, requires_grad=True)
    load_balancing_loss(probs, torch.tensor([[0], [0], [0], [1]])).backward()
    assert probs.grad is not None
    torch.testing.assert_close(probs.grad, torch.tensor([[2 / 4 * 0.75, 2 / 4 * 0.25]] * 4))


def test_router_takes_the_largest_probabilities_without_renormalising():
    router, x = randomize(TopKRouter(TINY), std=1.0), randn(50, 32)
    routing = router(x[None])
    expected = (x @ router.weight.T).softmax(dim=-1)
    torch.testing.assert_close(routing.probs, expected)
    chosen = expected.sort(dim=-1, descending=True).values[:, :2]
    torch.testing.assert_close(routing.expert_weights.sort(descending=True).values, chosen)
    assert torch.equal(routing.probs.gather(1, routing.expert_indices), routing.expert_weights)


def test_router_decides_in_float32_whatever_surrounds_it():
    router, x = randomize(TopKRouter(TINY), std=1.0), randn(2, 25, 32)
    expected = router(x).probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router(x).probs, expected)
    assert router.bfloat16()(x).probs.dtype == torch.float32


def test_router_is_exact_where_tf32_is_allowed(monkeypatch: pytest.MonkeyPatch):
    router, x = randomize(TopKRouter(TINY), std=1.0), randn(1, 50, 32).requires_grad_()
    found: list[bool] = []
    matmul, plain = torch.backends.cuda.matmul, Tensor.__matmul__

    def spy(a: Tensor, b: Tensor) -> Tensor:
        found.append(matmul.allow_tf32)
        return plain(a, b)

    monkeypatch.setattr(Tensor, "__matmul__", spy)
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        router(x).aux_losses["switch"].backward()
        assert (found, matmul.allow_tf32) == ([False] * 3, True)  # logits and their two gradients
    finally:
        matmul.allow_tf32 = before


# -- mixture of experts


def naive_moe(moe: MoE, x: Tensor) -> Tensor:
    """Send each token alone through router, experts and shared experts, in float32."""

    def swiglu(token: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up.float() @ token).chunk(2)
        return down.float() @ (F.silu(gate) * up)

    outputs = []
    for token in x.flatten(0, 1).float():
        weights, experts = (moe.router.weight.float() @ token).softmax(dim=0).topk(2)
        shared = moe.shared_experts
        assert shared is not None
        out = swiglu(token, shared.gate_up_proj.weight, shared.down_proj.weight)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            gate_up, down = moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert]
            out = out + weight * swiglu(token, gate_up, down)
        outputs.append(out)
    return torch.stack(outputs).view(x.shape)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 2e-2)])
def test_moe_equals_a_loop_over_tokens_in_values_and_all_gradients(
    dtype: torch.dtype, tolerance: float
):
    moe = randomize(MoE(TINY), std=0.2).to(dtype)
    x = randn(3, 16, 32).bfloat16().float().requires_grad_()  # bfloat16 holds these values
    inputs, direction = {"x": x, **dict(moe.named_parameters())}, randn(3, 16, 32, seed=1)
    assert len(inputs) == 6  # x; router; gate_up and down of routed and of shared experts
    actual, expected = moe(x)[0], naive_moe(moe, x)
    assert relative_error(actual, expected) < tolerance
    gradients = [
        torch.autograd.grad((out * direction).sum(), list(inputs.values()))
        for out in (actual, expected)
    ]
    for name, a, e in zip(inputs, *gradients, strict=True):
        assert relative_error(a, e.float()) < tolerance, name


def test_gradients_of_a_mixture_add_up_in_the_same_order_as_ever():
    moe, x = randomize(MoE(TINY), std=0.2).train(), randn(3, 16, 32).requires_grad_()

    def as_at_first(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = x.flatten(0, 1)
        probs = (tokens @ moe.router.weight.T).softmax(dim=-1)
        weights, indices = probs.topk(2, dim=-1, sorted=False)
        load = F.one_hot(indices.flatten(), 4).float().mean(dim=0)
        out = moe.experts(tokens, indices, weights).view_as(x)
        return out + moe.shared_experts(x), 4 * (load * probs.mean(dim=0)).sum()

    def gradients(out: Tensor, aux_loss: Tensor) -> tuple[Tensor, ...]:
        loss = out.square().mean() + aux_loss
        return torch.autograd.grad(loss, [x, *moe.parameters()])

    out, aux_losses = moe(x)
    expected = gradients(*as_at_first(x))
    for found, wanted in zip(gradients(out, aux_losses["switch"]), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_single_expert_that_always_runs_is_a_dense_swiglu():
    lone = dataclasses.replace(TINY, num_experts=1, num_experts_per_tok=1, num_shared_experts=0)
    moe, dense, x = randomize(MoE(lone)), SwiGLU(32, 128), randn(3, 16, 32)
    dense.gate_up_proj.weight = nn.Parameter(moe.experts.gate_up_proj[0])
    dense.down_proj.weight = nn.Parameter(moe.experts.down_proj[0])
    torch.testing.assert_close(moe(x)[0], dense(x))
    assert moe(x)[1]["switch"].item() == pytest.approx(1.0)


def test_idle_experts_have_zero_gradients_rather_than_none():
    moe = randomize(MoE(TINY))
    nn.init.zeros_(moe.router.weight[:2].detach())
    nn.init.constant_(moe.router.weight[2:].detach(), 1.0)
    moe(randn(1, 16, 32).abs())[0].sum().backward()  # positive tokens all prefer experts 2 and 3
    for weight in moe.experts.parameters():
        assert weight.grad is not None
        used = weight.grad.flatten(1).any(dim=1)
        assert used.tolist() == [False, False, True, True]


# -- a new model


def test_a_new_model_is_the_identity_in_every_block_and_predicts_exactly_zero():
    model, (x, t, y) = DiT(TINY).eval(), tiny_inputs()
    assert torch.equal(model(x, t, y), torch.zeros(3, 8, 8, 8))
    tokens = randn(3, 16, 32)
    assert torch.equal(model.blocks[0](tokens, randn(3, 32))[0], tokens)


# -- the whole network


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_shared_experts": 0},
        {"learn_sigma": False},
        {"num_experts": 0},
        {"num_experts": 0, "mlp_type": "gelu"},
    ],
    ids=str,
)
def test_every_trained_parameter_of_every_kind_of_model_gets_a_gradient(overrides: dict[str, Any]):
    model = tiny_model(dataclasses.replace(TINY, **overrides))
    gradients = training_gradients(model)
    names = [name for name, _ in model.named_parameters() if name != "pos_embed"]
    assert list(gradients) == names
    assert all(gradient.any() for gradient in gradients.values())
    assert model.eval()(*tiny_inputs()).shape == (3, model.config.out_channels, 8, 8)


def test_aux_loss_of_the_model_is_its_depth_when_every_token_uses_every_expert():
    model = tiny_model(dataclasses.replace(TINY, num_experts_per_tok=4)).train()
    assert model(*tiny_inputs())[1]["switch"].item() == pytest.approx(TINY.depth)


def test_prediction_for_an_image_does_not_depend_on_the_rest_of_its_batch():
    model, (x, t, y) = tiny_model().eval(), tiny_inputs()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, t, y), alone)


@pytest.mark.parametrize("precision", ["float32", "autocast"])
def test_gradient_checkpointing_computes_the_same_gradients(precision: str):
    model = tiny_model()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected = training_gradients(model)
        model.grad_checkpointing = True
        actual = training_gradients(model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


# -- precision


def test_autocast_is_close_to_float32_and_gradients_are_float32():
    model = tiny_model(WITHOUT_QK_NORM)  # k_norm.bias has gradients of pure rounding
    expected, expected_gradients = model.eval()(*tiny_inputs()), training_gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, gradients = model.eval()(*tiny_inputs()), training_gradients(model)
    assert relative_error(actual, expected) < 1e-2
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert relative_error(gradient, expected_gradients[name]) < 5e-2, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_leave_the_residual_stream_in_float32(dtype: torch.dtype):
    model, inputs, tokens = tiny_model().eval(), tiny_inputs(num_images=1), randn(1, 16, 32)
    expected = model(*inputs)
    assert relative_error(model.to(dtype)(*inputs), expected) < 1e-2
    identity = DiT(TINY).to(dtype).blocks[0]  # exact only if no token is ever rounded
    assert torch.equal(identity(tokens, randn(1, 32).to(dtype))[0], tokens)


# -- compilation


def test_training_step_reads_no_value_on_the_host():
    with FakeTensorMode():  # tensors without values: reading one raises
        gradients = training_gradients(DiT(TINY))
    expected = {name: p.shape for name, p in DiT(TINY).named_parameters() if p.requires_grad}
    assert {name: gradient.shape for name, gradient in gradients.items()} == expected


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("aot_eager", torch.float32),
        ("aot_eager", torch.bfloat16),
        pytest.param("inductor", torch.float32, marks=pytest.mark.slow),
        pytest.param("inductor", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_block_compiles_to_one_graph_that_computes_the_same(backend: str, dtype: torch.dtype):
    block = randomize(DiTBlock(WITHOUT_QK_NORM)).to(dtype)
    tokens, c = randn(3, 16, 32).requires_grad_(), randn(3, 32, seed=1).to(dtype).requires_grad_()
    inputs = {"tokens": tokens, "c": c, **dict(block.named_parameters())}
    torch.compiler.reset()
    results = []
    for function in (torch.compile(block, fullgraph=True, backend=backend), block):
        out, aux_losses = function(tokens, c)
        aux_loss = aux_losses["switch"]
        gradients = torch.autograd.grad(out.square().mean() + aux_loss, list(inputs.values()))
        values = (out, aux_loss, *gradients)
        results.append(dict(zip(("out", "aux_loss", *inputs), values, strict=True)))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, expected in results[1].items():
        assert relative_error(results[0][name], expected.float()) < tolerance, name
