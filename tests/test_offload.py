"""Models that are quantized or streamed sample as the whole model does; half precision is safe."""

import dataclasses
from pathlib import Path
from typing import Any

import helpers
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import models
import moe_ops
import sample
from checkpoint.hub import save_folder, save_published
from checkpoint.layouts import by_block, to_published
from checkpoint.state import save_safetensors
from checkpoint.weights import load_model, open_weights
from diffusion import create_diffusion
from models import FAMILIES, DiT, DiTConfig
from sampling.offload import Int8Experts, load_for_sampling

TINY = dataclasses.replace(helpers.TINY, hidden_size=64, depth=3)


def random_model(config: DiTConfig = TINY, std: float = 0.1) -> DiT:
    return helpers.random_model(config, std)


def draw(model: nn.Module, num_steps: int = 3, **options: Any) -> Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"cfg_scale": 2.0, "null_label": 3, **options}
    return create_diffusion("rf").sample(
        model, noise, torch.tensor([0, 2]), num_steps=num_steps, **options
    )


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def save(model: DiT, folder: Path, layout: str) -> Path:
    if layout == "folder":
        groups = (tensors for _, tensors in by_block(model.state_dict()))
        save_folder(folder / "model", groups, model.config, {"objective": "rf"})
        return folder / "model"
    if layout == "safetensors":
        save_safetensors(folder / "model.safetensors", model.state_dict(), model.config, {})
        return folder / "model.safetensors"
    torch.save(dict(to_published(model.state_dict(), flash_attention=True)), folder / "model.pt")
    return folder / "model.pt"


@pytest.mark.parametrize("layout", ["folder", "safetensors", "published"])
def test_blocks_streamed_from_disk_sample_the_same_bits(tmp_path: Path, layout: str) -> None:
    model = random_model()
    path = save(model, tmp_path, layout)
    streamed = load_for_sampling(path, offload="disk")
    assert all(p.is_meta for p in streamed.blocks.parameters())
    assert torch.equal(draw(streamed), draw(model))
    assert all(p.is_meta for p in streamed.blocks.parameters())


def test_streamed_blocks_take_the_dtype_asked_for(tmp_path: Path) -> None:
    path = save(random_model(), tmp_path, "folder")
    whole = load_model(path, dtype=torch.bfloat16)
    streamed = load_for_sampling(path, dtype=torch.bfloat16, offload="disk")
    assert torch.equal(draw(streamed), draw(whole))


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_int8_experts_are_near_bfloat16_and_a_quarter_of_float32(
    tmp_path: Path, mlp_type: str
) -> None:
    pytest.importorskip("torchao")
    model = random_model(DiTConfig.from_dict({**TINY.to_dict(), "mlp_type": mlp_type}))
    path = save(model, tmp_path, "folder")
    expected = draw(load_model(path, dtype=torch.float32))
    exact = load_for_sampling(path, dtype=torch.float32, quantize="int8")
    half = load_for_sampling(path, dtype=torch.bfloat16, quantize="int8")
    assert isinstance(helpers.moe_of(exact, 2).experts, Int8Experts)
    assert relative_error(draw(exact), expected) < 0.02
    assert relative_error(draw(half), draw(load_model(path, dtype=torch.bfloat16))) < 0.03
    stored: Any = helpers.moe_of(exact).experts.up[3].weight.qdata
    assert stored.dtype == torch.int8


# DSMoE has no published files: no registered sizes, and nothing is written in its layout.
DSMOE = {"affinity": "sigmoid", "norm_topk_prob": True, "balance": ("bias",)}
FIELDS = {name: fields for name, (fields, _) in FAMILIES.items()} | {"DSMoE": DSMOE}


@pytest.mark.parametrize("family", FIELDS)
def test_every_family_can_be_streamed_and_quantized(tmp_path: Path, family: str) -> None:
    """Empty slots, dense blocks between, an expert for images without a class; 12 blocks."""
    pytest.importorskip("torchao")
    small = {"hidden_size": 64, "depth": 12, "num_heads": 2, "num_classes": 3, "input_size": 8}
    model = random_model(DiTConfig(**{**FIELDS[family], **small}))
    for buffer in model.buffers():  # biases that decide, thresholds that some are above
        buffer.uniform_(0.4, 0.6)
    path = save(model, tmp_path, "folder")
    expected = draw(model)
    assert torch.equal(draw(load_for_sampling(path, offload="disk")), expected)
    assert relative_error(draw(load_for_sampling(path, quantize="int8")), expected) < 0.05
    half = load_for_sampling(path, dtype=torch.bfloat16)
    exact = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert exact == {"pos_embed"} | {name for name in half.state_dict() if ".router." in name}
    if family != "DSMoE":
        save_published(tmp_path / "x.pt", open_weights(path), flash_attention=False, dtype=None)
        assert torch.equal(draw(load_for_sampling(tmp_path / "x.pt", offload="disk")), expected)


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save(random_model(), tmp_path, "safetensors")
    with pytest.raises(ValueError, match="--quantize int8 and --offload disk exclude each other"):
        load_for_sampling(path, quantize="int8", offload="disk")
    with pytest.raises(ValueError, match="--offload cpu needs a GPU"):
        load_for_sampling(path, offload="cpu")
    dense = random_model(DiTConfig.from_dict({**TINY.to_dict(), "num_experts": 0}))
    with pytest.raises(ValueError, match="dense model"):
        load_for_sampling(save(dense, tmp_path, "folder"), quantize="int8")


@pytest.mark.parametrize("flags", [("--offload", "disk"), ("--quantize", "int8")])
def test_sample_draws_from_a_sharded_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    if "int8" in flags:
        pytest.importorskip("torchao")
    monkeypatch.setattr("checkpoint.hub.SHARD_BYTES", 100_000)
    config = DiTConfig.from_dict({**TINY.to_dict(), "in_channels": 1})
    path = save(random_model(config), tmp_path, "folder")
    assert len(list(path.glob("*.safetensors"))) > 2
    given = ["--ckpt", str(path), "--out", str(tmp_path / "grid.png"), "--vae-path", "none"]
    helpers.run_main(sample, *given, *flags, "--num-sampling-steps", "2")
    assert (tmp_path / "grid.png").stat().st_size > 100


# ---------------------------------------------------------------- float16


class RoundsToFloat16(TorchDispatchMode):
    """Runs operators on float16 tensors in float32 and rounds their results to float16.

    What torch would promote to float32, and casts, stay as they are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0.0  # of all results in float16, inf if one overflowed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtypes = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        is_cast = func is torch.ops.aten._to_copy.default
        is_view = any(result.alias_info for result in func._schema.returns)
        if is_view:
            return func(*args, **kwargs)
        if is_cast or torch.float16 not in dtypes or torch.float32 in dtypes:
            results = func(*args, **kwargs)
        else:
            args, kwargs = tree_map_only(Tensor, widen, (args, kwargs))
            results = tree_map_only(Tensor, narrow, func(*args, **kwargs))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and result.dtype == torch.float16 and result.numel():
                self.largest = max(self.largest, result.float().abs().max().item())
        return results


def widen(value: Tensor) -> Tensor:
    return value.float() if value.dtype == torch.float16 else value


def narrow(value: Tensor) -> Tensor:
    return value.half() if value.dtype == torch.float32 else value


def test_a_deep_model_in_real_float16_has_no_nan_over_50_steps() -> None:
    fields = {"depth": 28, "hidden_size": 16, "patch_size": 4, "num_experts": 2}
    model = random_model(DiTConfig.from_dict({**TINY.to_dict(), **fields}), std=0.15)
    expected = draw(model, num_steps=50, cfg_scale=1.0)
    found = draw(model.half(), num_steps=50, cfg_scale=1.0)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert relative_error(found, expected) < 0.05


def grouped(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    indices: Tensor,
    weights: Tensor,
    num_rows: int | None,
) -> Tensor:
    """Route by single operators, so that each is rounded."""
    assert num_rows is None
    plan = moe_ops.sort_by_expert(indices, len(gate_up))
    rows = x.index_select(0, plan.tokens)
    gate, up = moe_ops.grouped_linear(rows, gate_up, plan.offsets).chunk(2, dim=-1)
    row_weights = weights.to(x.dtype).flatten().index_select(0, plan.order)[:, None]
    hidden = F.silu(gate) * up * row_weights
    out_rows = moe_ops.grouped_linear(hidden, down, plan.offsets)
    return moe_ops.sum_rows(out_rows, plan.inverse, plan.starts)


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


@pytest.fixture
def single_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "swiglu_experts", grouped)
    monkeypatch.setattr(models, "swiglu", dense)


@pytest.mark.usefixtures("single_operators")
def test_rounding_every_operator_to_float16_is_near_float32() -> None:
    model = random_model()
    expected = draw(model)
    seen = []
    hook = model.blocks[0].register_forward_hook(lambda _m, _i, out: seen.append(out[0].dtype))
    with RoundsToFloat16():
        found = draw(model.half())
    hook.remove()
    assert set(seen) == {torch.float32}  # the residual stream
    assert 0 < relative_error(found, expected) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("single_operators")
def test_an_xl_shaped_model_rounded_to_float16_does_not_overflow_over_50_steps() -> None:
    """XL/2 with QK norm, on 8x8 latents; 28 blocks share their weights to fit in memory.

    Its gates are so wide that a residual stream in float16 would overflow.
    """
    fields = {**TINY.to_dict(), **models.SIZES["XL"], "depth": 1, "num_experts": 2}
    model = random_model(DiTConfig.from_dict(fields), std=0.02)
    bias = model.blocks[0].get_parameter("adaLN_modulation.1.bias")
    for i, part in enumerate(bias.data.chunk(6)):
        nn.init.normal_(part, std=1000.0 if i in (2, 5) else 0.5)  # gates; shifts and scales
    model.blocks = nn.ModuleList([model.blocks[0]] * 28)
    residual = []
    model.blocks[0].register_forward_hook(lambda _m, _i, out: residual.append(out[0].abs().max()))
    expected = draw(model, num_steps=1, cfg_scale=1.0)
    model.half()
    with RoundsToFloat16():
        assert relative_error(draw(model, num_steps=1, cfg_scale=1.0), expected) < 0.02
    with RoundsToFloat16() as rounded:
        found = draw(model, num_steps=50, cfg_scale=1.0)
    most = max(residual).item()
    print(f"largest activation {rounded.largest:.0f} in float16, {most:.0f} in the residual stream")
    assert found.isfinite().all()
    assert rounded.largest < 65504 / 4 < 65504 < most
