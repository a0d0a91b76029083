"""The mixture as independent choices: the published families' tensors and facts known on paper."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint.families import family_to_ours
from models import (
    DiT,
    DiTBlock,
    DiTConfig,
    MoE,
    Routing,
    TopKRouter,
    normalize_weights,
)
from routing import LoadCounter

GOLDEN = Path(__file__).parent / "golden"
TINY = DiTConfig(
    input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, num_experts=4,
    num_experts_per_tok=1, num_shared_experts=1, mlp_type="gelu", learn_sigma=False,
)  # fmt: skip
PROMOE: dict[str, Any] = {
    "affinity": "cosine", "balance": ("contrastive",), "unconditional_expert": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "dit_moe": {"mlp_type": "swiglu", "num_experts_per_tok": 2},
    "promoe": PROMOE,
    "promoe_ec": {**PROMOE, "selection": "expert_choice"},
    "ec_dit": {"selection": "expert_choice", "capacity": 1.5, "balance": ()},
    "diffmoe": {"selection": "batch_choice", "balance": ()},
    "dsmoe": {
        "affinity": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "balance": ("bias", "z_loss"), "mlp_type": "swiglu", "num_experts_per_tok": 2,
    },
    "two_slots": {**PROMOE, "num_experts_per_tok": 2, "norm_topk_prob": True,
                  "mlp_type": "swiglu", "balance": ("switch", "contrastive", "bias")},
    "wide_choice": {**PROMOE, "selection": "expert_choice", "capacity": 0.5, "mlp_type": "swiglu"},
}  # fmt: skip
families = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str, **overrides: Any) -> DiTConfig:
    return dataclasses.replace(TINY, **{**FAMILIES[family], **overrides})


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_inputs(num_images: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Every second image is without a class."""
    y = torch.where(torch.arange(num_images) % 2 == 1, TINY.num_classes, 3)
    return randn(num_images, 4, 8, 8), torch.linspace(0.1, 0.9, num_images), y


def record_routing(model: nn.Module) -> list[Routing]:
    layers: list[Routing] = []
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _, args, routing: layers.append(routing))
    return layers


def training_gradients(model: DiT) -> dict[str, Tensor]:
    x, t, y = tiny_inputs()
    model.train().zero_grad()
    prediction, aux_losses = model(x, t, y, torch.zeros(4, dtype=torch.bool))
    sum(aux_losses.values(), prediction.float().square().mean()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# -- config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"affinity": "dot"}, "affinity='dot' must be one of softmax, sigmoid, cosine"),
        ({"selection": "top_k"}, "selection='top_k' must be one of token_choice, expert_choice"),
        ({"moe_blocks": "odd"}, "moe_blocks='odd' must be one of all, every_second, deep_half"),
        ({"balance": ("swich",)}, "'swich' is none of switch, contrastive, z_loss, bias"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor=0.0 must be positive"),
        ({"qk_norm_eps": 0.0}, "qk_norm_eps=0.0 must be positive"),
        ({"first_k_dense_replace": 2}, r"first_k_dense_replace=2 must be in \[0, depth=2\)"),
        (
            {"first_k_dense_replace": 1, "moe_blocks": "deep_half"},
            "first_k_dense_replace=1 needs moe_blocks='all', not 'deep_half'",
        ),
        ({"num_experts": 0, "moe_blocks": "deep_half"}, "moe_blocks='deep_half'.*num_experts=0"),
        ({"depth": 1, "moe_blocks": "every_second"}, "moe_blocks='every_second' .*depth=1"),
        ({"num_experts": 0, "unconditional_expert": True}, "unconditional_expert.*num_experts=0"),
        ({"capacity": 1.0}, "capacity=1.0 means nothing with selection='token_choice'"),
        (
            {"selection": "expert_choice", "balance": (), "capacity": 5.0},
            r"capacity=5.0 must be in \[0, num_experts=4\]",
        ),
        ({"exact_thresholds": True}, "exact_thresholds=True .* selection='token_choice'"),
        (
            {"selection": "batch_choice", "balance": (), "unconditional_expert": True},
            "unconditional_expert=True .* selection='batch_choice'",
        ),
        ({"selection": "expert_choice"}, "'switch' means nothing with selection='expert_choice'"),
        (
            {"selection": "batch_choice", "balance": ("bias",)},
            "'bias' means nothing with selection='batch_choice'",
        ),
        (
            {"affinity": "cosine", "balance": ("z_loss",)},
            "balance=.*'z_loss' means nothing with affinity='cosine'",
        ),
    ],
)
def test_choices_that_mean_nothing_are_refused_by_name(fields: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


@families
def test_config_of_every_family_survives_json_whose_tuples_are_lists(family: str):
    config = config_of(family)
    fields = {**config.to_dict(), "balance": list(config.balance)}
    assert DiTConfig.from_dict(fields) == config


def test_a_config_from_before_these_fields_is_a_dit_moe():
    new = ("affinity", "selection", "capacity", "exact_thresholds", "routed_scaling_factor",
           "balance", "unconditional_expert", "moe_blocks", "first_k_dense_replace",
           "dense_mlp_ratio", "qk_norm_eps")  # fmt: skip
    old = {name: value for name, value in DiTConfig().to_dict().items() if name not in new}
    assert DiTConfig.from_dict(old) == DiTConfig()


@pytest.mark.parametrize(
    ("fields", "moe"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"moe_blocks": "every_second"}, [1, 3]),
        ({"moe_blocks": "deep_half"}, [2, 3, 4]),
        ({"first_k_dense_replace": 3}, [3, 4]),
        ({"num_experts": 0}, []),
    ],
)
def test_the_other_blocks_are_dense_and_four_times_as_wide(fields: dict[str, Any], moe: list[int]):
    model = DiT(dataclasses.replace(TINY, depth=5, mlp_ratio=2.0, **fields))
    assert [i for i, block in enumerate(model.blocks) if block.is_moe] == moe
    blocks: list[Any] = list(model.blocks)
    widths = {block.mlp.fc1.out_features for block in blocks if not block.is_moe}
    assert widths == (set() if fields == {} else {64} if "num_experts" in fields else {128})


# -- facts on paper


def test_bias_decides_who_is_chosen_but_not_the_weight():
    router, x = (
        randomize(TopKRouter(config_of("dsmoe", norm_topk_prob=False)), 1.0),
        randn(1, 9, 32),
    )
    router.expert_bias[2] = 9.0
    routing = router.eval()(x)
    assert (routing.expert_indices == 2).any(dim=1).all()
    scores = (x[0] @ router.weight.T).sigmoid()
    torch.testing.assert_close(
        routing.expert_weights, 2.5 * scores.gather(1, routing.expert_indices)
    )


def test_expert_choice_gives_every_expert_the_same_load_in_every_image():
    router = randomize(TopKRouter(config_of("ec_dit")), std=1.0).eval()
    indices = router(randn(3, 16, 32)).expert_indices.view(3, 16 * 4)
    for expert in range(4):
        assert (indices == expert).sum(dim=1).tolist() == [6, 6, 6]  # 16 / 4 * 1.5


def test_expert_choice_gives_an_expert_one_token_at_least():
    router = randomize(TopKRouter(config_of("ec_dit", capacity=0.1)), std=1.0).eval()
    assert (router(randn(3, 16, 32)).expert_indices < 4).sum() == 3 * 4


def test_choice_of_the_batch_gives_every_expert_the_same_load_in_training():
    router = randomize(TopKRouter(config_of("diffmoe", num_experts_per_tok=2)), std=1.0).train()
    indices = router(randn(3, 16, 32)).expert_indices
    assert [(indices == expert).sum().item() for expert in range(4)] == [24] * 4
    assert (indices < 4).sum(dim=1).unique().numel() > 2  # tokens differ in how many they have


def test_thresholds_choose_exactly_the_tokens_above_them_or_as_many_of_the_best():
    router = randomize(TopKRouter(config_of("diffmoe")), std=1.0).eval()
    exact = randomize(TopKRouter(config_of("diffmoe", exact_thresholds=True)), std=1.0).eval()
    router.thresholds[:] = exact.thresholds[:] = torch.tensor([0.5, 2.0, -1.0, 0.3])
    x = randn(2, 16, 32)
    above = router.capacity_predictor(x.flatten(0, 1)).sigmoid() > router.thresholds
    chosen = [r(x).expert_indices == torch.arange(4) for r in (router, exact)]
    assert torch.equal(chosen[1], above) and not torch.equal(chosen[0], above)
    assert torch.equal(chosen[0].sum(dim=0), above.sum(dim=0))
    probs = router(x).probs
    for expert in (0, 3):
        best = probs[:, expert].sort(descending=True).values
        kept = probs[:, expert][chosen[0][:, expert]]
        assert kept.min() == best[len(kept) - 1]


def test_by_exact_thresholds_an_image_does_not_depend_on_the_rest_of_its_batch():
    model = randomize(DiT(config_of("diffmoe", exact_thresholds=True))).eval()
    for block in model.blocks:
        block.moe.router.thresholds.fill_(0.5)
    x, t, y = tiny_inputs()
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(x, t, y), alone)


def test_all_affinities_with_renormalised_gates_agree_when_every_expert_is_used():
    """All choose all experts with gates of sum 1, so equal experts give the same output."""
    outputs = []
    for affinity in ("softmax", "sigmoid", "cosine"):
        fields: dict[str, Any] = {"num_experts_per_tok": 4, "norm_topk_prob": True}
        fields["affinity"] = affinity
        moe = randomize(MoE(dataclasses.replace(TINY, **fields))).eval()
        with torch.no_grad():
            for weights in moe.experts.parameters():
                weights.copy_(weights[:1].expand_as(weights))
        routing = moe.router(randn(2, 16, 32))
        assert torch.equal(routing.expert_indices.sort(dim=1).values[0], torch.arange(4))
        torch.testing.assert_close(routing.expert_weights.sum(dim=1), torch.ones(32))
        torch.testing.assert_close(routing.probs.sum(dim=1), torch.ones(32))
        outputs.append(moe(randn(2, 16, 32))[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "cosine"])
def test_renormalised_gates_are_finite_without_a_choice_and_one_for_a_single_one(affinity: str):
    scores = torch.tensor([[0.4, -0.4], [0.3, 0.2]])
    filled = torch.tensor([[False, False], [True, False]])
    weights = normalize_weights(affinity, scores, filled)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


# -- the layer against a loop


def naive_moe(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """Send each token alone through its experts and the shared ones."""
    outputs = []
    for token, indices, weights in zip(
        x.flatten(0, 1), routing.expert_indices.tolist(), routing.expert_weights, strict=True
    ):
        assert moe.shared_experts is not None
        out = moe.shared_experts(token)
        for slot, expert in enumerate(indices):
            if expert == moe.router.num_experts:
                continue
            parts = [p[expert] for p in moe.experts.parameters()]
            if len(parts) == 4:
                hidden = F.gelu(parts[0] @ token + parts[1], approximate="tanh")
                out = out + weights[slot] * (parts[2] @ hidden + parts[3])
            else:
                gate, up = (parts[0] @ token).chunk(2)
                out = out + weights[slot] * (parts[1] @ (F.silu(gate) * up))
        outputs.append(out)
    return torch.stack(outputs).view_as(x)


@families
@pytest.mark.parametrize("training", [True, False])
def test_every_selection_equals_a_loop_over_tokens_in_values_and_gradients(
    family: str, training: bool
):
    moe = randomize(MoE(config_of(family)), std=0.2).train(training)
    x, is_null = randn(3, 16, 32).requires_grad_(), torch.tensor([False, True, False])
    if family == "diffmoe":
        moe.router.thresholds[:] = torch.tensor([0.4, 0.5, 0.6, 2.0])
    actual, expected = moe(x, is_null)[0], naive_moe(moe, x, moe.router(x, is_null))
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    inputs = {"x": x, **dict(moe.named_parameters())}
    gradients = [
        torch.autograd.grad((out * randn(3, 16, 32, seed=1)).sum(), list(inputs.values()),
                            allow_unused=True, materialize_grads=True)
        for out in (actual, expected)
    ]  # fmt: skip
    for name, a, e in zip(inputs, *gradients, strict=True):
        torch.testing.assert_close(a, e, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("family", ["promoe", "promoe_ec", "two_slots", "wide_choice"])
def test_the_unconditional_expert_alone_serves_images_without_a_class(family: str):
    router = randomize(TopKRouter(config_of(family)), std=1.0).train()
    routing = router(randn(3, 16, 32), torch.tensor([True, False, True]))
    indices, weights = routing.expert_indices.view(3, 16, -1), routing.expert_weights
    assert (indices[[0, 2], :, 0] == 4).all() and (indices[[0, 2], :, 1:] == 5).all()
    assert (indices[1] != 4).all()
    assert (weights.view(3, 16, -1)[[0, 2], :, 0] == 1).all()
    torch.testing.assert_close(routing.probs.sum(dim=1), torch.ones(48))


def test_images_without_a_class_do_not_enter_the_balance_of_routed_experts():
    router = randomize(TopKRouter(config_of("two_slots")), std=1.0).train()
    x = randn(3, 16, 32)
    both = router(x, torch.tensor([False, True, False])).aux_losses
    seen = router.seen.pop("load")[:-1]
    alone = router(x[[0, 2]], torch.zeros(2, dtype=torch.bool)).aux_losses
    assert both.keys() == alone.keys() == {"switch", "contrastive"}
    torch.testing.assert_close(both, alone)
    assert torch.equal(seen, router.seen["load"][:-1]) and seen.sum() == 2 * 32


# -- the whole network


@families
def test_twelve_blocks_train_are_counted_and_keep_their_state(family: str):
    """Every parameter has a gradient, every layer its load, in training and in sampling."""
    model = randomize(DiT(config_of(family, depth=12, moe_blocks="every_second")))
    counter = LoadCounter(model)
    gradients = training_gradients(model)
    missing = {name for name, p in model.named_parameters() if p.requires_grad} - set(gradients)
    assert not missing and all(g.isfinite().all() for g in gradients.values())
    # (an expert that no token chose has a gradient of zero, a prototype that no loss sees too)
    assert counter.counts.shape == (6, model.config.num_all_experts)
    counted = counter.counts.sum(dim=1)
    slots = {"dit_moe": 128, "dsmoe": 128, "ec_dit": 96, "two_slots": 96, "wide_choice": 48}
    assert counted.tolist() == [slots.get(family, 64)] * 6
    if model.config.unconditional_expert:
        assert (counter.counts[:, -1] == 32).all()
    before = {name: b.clone() for name, b in model.named_buffers()}
    model.update_router_state()
    moved = [name for name, b in model.named_buffers() if not torch.equal(b, before[name])]
    assert len(moved) == (6 if family in ("diffmoe", "dsmoe", "two_slots") else 0)
    assert set(moved) <= set(model.state_dict())
    counter.reset()
    assert model.eval()(*tiny_inputs()).isfinite().all()
    assert counter.counts.any() or family == "diffmoe"


@families
def test_gradient_checkpointing_computes_the_same_and_moves_state_the_same(family: str):
    results = []
    for checkpointing in (False, True):
        model = randomize(DiT(config_of(family)))
        model.grad_checkpointing = checkpointing
        gradients = training_gradients(model)
        model.update_router_state()
        results.append(gradients | dict(model.named_buffers()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@families
def test_microbatches_add_up_before_state_moves(family: str):
    """Two forwards and one update count both; the next update counts only what came since."""
    model = randomize(DiT(config_of(family)))
    training_gradients(model)
    training_gradients(model)
    once = {m: dict(m.seen) for m in model.modules() if isinstance(m, TopKRouter)}
    for seen in once.values():
        assert all(value[-1] == 2 for value in seen.values())
    model.update_router_state()
    state = {name: b.clone() for name, b in model.named_buffers()}
    model.update_router_state()
    assert all(torch.equal(b, state[name]) for name, b in model.named_buffers())


@families
@pytest.mark.parametrize(
    ("training", "dtype"),
    [
        (True, torch.float32),
        pytest.param(False, torch.float32, marks=pytest.mark.slow),
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(False, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_every_selection_compiles_to_one_graph_that_computes_the_same(
    family: str, training: bool, dtype: torch.dtype
):
    block = randomize(DiTBlock(config_of(family))).to(dtype).train(training)
    tokens, c = randn(3, 16, 32), randn(3, 32, seed=1).to(dtype)
    is_null = torch.tensor([False, True, False])
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the second finds the sums of the first
        actual, expected = compiled(tokens, c, is_null), block(tokens, c, is_null)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
    names = [name for name, p in block.named_parameters() if p.requires_grad]
    gradients = []
    for out, aux_losses in (compiled(tokens, c, is_null), block(tokens, c, is_null)):
        loss = sum(aux_losses.values(), out.square().mean())
        gradients.append(torch.autograd.grad(loss, list(block.parameters()), allow_unused=True))
    atol, rtol = (1e-5, 1e-3) if dtype == torch.float32 else (0.02, 0.05)
    for name, a, e in zip(names, *gradients, strict=True):
        torch.testing.assert_close(a, e, atol=atol, rtol=rtol, msg=name)


@families
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_training_and_sampling_read_no_value_on_the_host(family: str, device: str):
    """Tensors without values: reading one raises."""
    with FakeTensorMode(), torch.device(device):
        model = DiT(config_of(family))
        x, t = torch.empty(4, 4, 8, 8), torch.empty(4)
        y = torch.empty(4, dtype=torch.int64)
        prediction, aux_losses = model.train()(x, t, y)
        loss = sum(aux_losses.values(), prediction.square().mean())
        if device == "cpu":  # autograd's threads need a real GPU
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.update_router_state()
        assert model.eval()(x, t, y).shape == (4, 4, 8, 8)


# -- the published codes' tensors: tests/golden/README.md

GOLDEN_FIELDS: dict[str, dict[str, Any]] = {
    "promoe_tc_6E1A": {**PROMOE, "num_experts": 6, "mlp_ratio": 2.0, "num_shared_experts": 2},
    "promoe_ec_4E": {**FAMILIES["promoe_ec"], "mlp_ratio": 2.0, "num_shared_experts": 2},
    "ecdit_4E": {**FAMILIES["ec_dit"], "capacity": 2.0, "num_shared_experts": 0},
    "diffmoe_4E": {**FAMILIES["diffmoe"], "num_shared_experts": 0},
}
goldens = pytest.mark.parametrize("name", GOLDEN_FIELDS)


def golden_model(name: str) -> tuple[DiT, dict[str, Any]]:
    golden = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    fields: dict[str, Any] = {"hidden_size": 48, "depth": 4, "num_heads": 4, "num_classes": 1000}
    fields |= {"moe_blocks": "every_second", "qk_norm_eps": 1e-5}
    model = DiT(dataclasses.replace(TINY, **fields, **GOLDEN_FIELDS[name]))
    model.load_state_dict(dict(family_to_ours(golden["state_dict"])))
    return model, golden


@goldens
def test_published_families_predict_and_choose_as_published(name: str):
    model, golden = golden_model(name)
    layers, outputs = record_routing(model), golden["outputs"]
    with torch.no_grad():
        prediction = model.eval()(golden["x"], golden["t"], golden["y"])
    torch.testing.assert_close(prediction, outputs["forward"], atol=1e-5, rtol=0)
    if "router_indices" in outputs:
        for layer, indices, weights in zip(
            layers, outputs["router_indices"], outputs["router_weights"], strict=True
        ):
            assert torch.equal(layer.expert_indices.view_as(indices), indices)
            torch.testing.assert_close(
                layer.expert_weights.view_as(weights), weights, atol=1e-5, rtol=0
            )
    if "dispatch_mask" in outputs:
        for layer, mask, scores in zip(
            layers, outputs["dispatch_mask"], outputs["gating_scores"], strict=True
        ):
            has_class = golden["y"] != 1000
            weights = layer.expert_weights.view(4, 16, -1)[has_class]  # (N, T, E)
            chosen = layer.expert_indices.view(4, 16, -1)[has_class] == torch.arange(4)
            assert torch.equal(chosen, mask.any(dim=2).transpose(1, 2))  # of (N, E, k, T)
            published = (mask * scores[..., None]).sum(dim=2).transpose(1, 2)
            torch.testing.assert_close(weights, published, atol=1e-5, rtol=0)


@goldens
def test_published_families_train_as_published(name: str):
    """Prediction, auxiliary losses, choices, every gradient, and the thresholds after the step."""
    model, golden = golden_model(name)
    layers, outputs = record_routing(model), golden["outputs"]
    inputs = golden["x"], golden["t"], golden["y"], torch.zeros(4, dtype=torch.bool)
    prediction, aux_losses = model.train()(*inputs)
    torch.testing.assert_close(prediction, outputs["train_forward"], atol=1e-5, rtol=0)
    aux_name, weight = "contrastive", 1.0
    if "capacity_losses" in outputs:
        aux_name, weight = "capacity", outputs["capacity_loss_weight"]
        for layer, chosen in zip(layers, outputs["chosen"], strict=True):
            assert torch.equal(layer.expert_indices == torch.arange(4), chosen.flatten(0, 1) > 0)
    expected = outputs.get(f"{aux_name}_losses")
    loss = F.mse_loss(prediction, golden["target"])
    if expected is not None:
        found = torch.stack([layer.aux_losses[aux_name] for layer in layers])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(aux_losses, {aux_name: expected.sum()}, atol=1e-5, rtol=0)
        loss = loss + weight * aux_losses[aux_name]
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    published = dict(family_to_ours(outputs["grads"]))
    assert gradients.keys() == published.keys()
    for name, gradient in published.items():
        error = (gradients[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, name
    model.update_router_state()
    after = dict(family_to_ours(outputs.get("thresholds_after", {})))
    assert len(after) == (2 if "thresholds_after" in outputs else 0)
    for name, thresholds in after.items():
        torch.testing.assert_close(model.get_buffer(name), thresholds, atol=1e-5, rtol=0)
