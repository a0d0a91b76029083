"""Rotary embedding, RMSNorm and dense SwiGLU blocks against naive loops; off, nothing changes."""

import cmath
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY, random_model, run_main
from launch import TINY_RUN
from torch import Tensor
from torch.testing import assert_close

import convert
from checkpoint.weights import load_model
from common.errors import UserError
from models import Attention, DiT, DiT_models, DiTConfig, RMSNorm, rotate
from moe_ops import swiglu
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rotation_multiplies_pairs_as_complex_numbers_by_row_and_column():
    size, heads, d = 3, 2, 12
    x = randn(2, size * size, heads, d).double()
    expected = torch.empty_like(x)
    for n in range(2):
        for token in range(size * size):
            for head in range(heads):
                for half, place in enumerate((token // size, token % size)):
                    for i in range(d // 4):
                        a, b = half * d // 2 + i, half * d // 2 + d // 4 + i
                        pair = complex(x[n, token, head, a].item(), x[n, token, head, b].item())
                        turned = pair * cmath.exp(1j * place * 10_000 ** (-i / (d // 4)))
                        expected[n, token, head, a] = turned.real
                        expected[n, token, head, b] = turned.imag
    assert_close(rotate(x), expected.float())


def test_products_of_rotated_queries_and_keys_depend_on_the_distance_alone():
    q, k = (rotate(randn(1, 1, 1, 8, seed=seed).expand(1, 25, 1, 8)) for seed in (1, 2))
    scores = (q[0, :, 0] @ k[0, :, 0].T).view(5, 5, 5, 5)  # by row and column of q and of k
    for row, column in ((0, 0), (1, 2), (2, 1)):
        moved = scores[row : row + 3, column : column + 3, row : row + 3, column : column + 3]
        assert_close(moved, scores[:3, :3, :3, :3], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 1, 0])


def test_rms_norm_is_its_formula_in_float32():
    x, norm = randn(4, 6).bfloat16(), RMSNorm(6, eps=0.1)
    norm.get_parameter("weight").data.copy_(torch.arange(6.0))
    row = x[2].float().tolist()
    root = math.sqrt(sum(value * value for value in row) / 6 + 0.1)
    assert_close(norm(x)[2], torch.tensor([i * value / root for i, value in enumerate(row)]))
    assert norm(x).dtype == torch.float32


def test_attention_with_both_options_equals_a_loop_over_queries():
    config = dataclasses.replace(TINY, rope=True, norm="rms", qk_norm=True)
    layer = Attention(config)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    x, d = randn(2, 16, 32), 16
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, d)).unbind(2)  # (N, T, heads, d)
    q, k = rotate(layer.q_norm(q)), rotate(layer.k_norm(k))
    out = torch.empty(2, 16, 2, d)
    for n in range(2):
        for head in range(2):
            for i in range(16):
                scores = torch.stack([q[n, i, head] @ k[n, j, head] for j in range(16)])
                weights = (scores / math.sqrt(d)).softmax(0)
                out[n, i, head] = sum(weights[j] * v[n, j, head] for j in range(16))
    assert_close(layer(x), layer.proj(out.flatten(2)), atol=1e-5, rtol=1e-4)


def test_without_the_options_no_parameter_and_no_bit_is_another():
    plain, told = (
        random_model(config) for config in (TINY, dataclasses.replace(TINY, norm="layer"))
    )
    inputs = (randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2]))
    assert torch.equal(plain(*inputs), told(*inputs))
    for options in ({"rope": True}, {"norm": "rms"}):
        other = random_model(dataclasses.replace(TINY, **options))
        names = {name for name in plain.state_dict() if not name.endswith("norm.bias")}
        assert names <= set(other.state_dict()) <= set(plain.state_dict())
        assert not torch.allclose(plain(*inputs), other(*inputs), atol=1e-3)


def test_a_dense_block_of_swiglu_is_its_formula():
    config = dataclasses.replace(TINY, num_experts=4, first_k_dense_replace=1, dense_mlp_ratio=1.5)
    model = random_model(config)
    block: Any = model.blocks[0]
    assert not block.is_moe and block.mlp.down_proj.weight.shape == (32, 48)
    x = randn(5, 32)
    gate, up = (block.mlp.gate_up_proj.weight[part] for part in (slice(48), slice(48, None)))
    expected = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ block.mlp.down_proj.weight.T
    assert_close(block.mlp(x), expected)
    assert_close(swiglu(x, block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight), expected)


def test_heads_that_cannot_be_turned_and_unknown_norms_are_refused():
    with pytest.raises(ValueError, match="rope=True needs heads whose width is a multiple of 4"):
        DiTConfig(hidden_size=24, num_heads=4, num_experts=0, rope=True)
    with pytest.raises(ValueError, match="norm='batch' must be one of layer, rms"):
        DiTConfig(norm="batch")  # type: ignore[arg-type]


def test_twelve_blocks_with_both_options_learn_and_keep_their_gradients_under_checkpointing():
    config = dataclasses.replace(TINY, depth=12, rope=True, norm="rms")
    model = random_model(config).train()
    inputs = (randn(2, 4, 8, 8), torch.tensor([0.2, 0.7]), torch.tensor([0, 2]))
    keep = torch.zeros(2, dtype=torch.bool)
    gradients = []
    for checkpointing in (False, True):
        model.grad_checkpointing = checkpointing
        model.zero_grad()
        model(*inputs, keep)[0].square().mean().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]["blocks.11.attn.q_norm.weight"].abs().max() > 0
    assert_close(gradients[0], gradients[1])


def test_a_run_with_both_options_goes_on_bit_for_bit_and_is_exported_but_not_as_published(
    tmp_path: Path,
) -> None:
    flags = ("--rope", "--norm", "rms", "--qk-norm", "--max-steps", "2", "--ckpt-every", "1")
    words = [*TINY_RUN, "--results-dir", str(tmp_path), *flags]
    launch(build_parser(None).parse_args(words), DdpTrainer)
    run = tmp_path / "run"
    whole = load_model(run, ema=False).state_dict()
    (run / "checkpoints" / "0000002.pt").unlink()
    launch(build_parser(None).parse_args(words), DdpTrainer)
    assert_close(load_model(run, ema=False).state_dict(), whole, rtol=0, atol=0)
    run_main(convert, run, tmp_path / "folder", "--ema", "False")
    loaded = DiT.from_pretrained(str(tmp_path / "folder"))
    assert loaded.config.rope and loaded.config.norm == "rms"
    assert_close(loaded.state_dict(), whole, rtol=0, atol=0)
    with pytest.raises(UserError, match=r"published code knows no rope .*rope=True, norm='rms'"):
        run_main(convert, run, tmp_path / "x.pt")
    assert "rope" in DiT_models["DiT-Ti/2"](num_experts=0, rope=True).config.to_dict()
