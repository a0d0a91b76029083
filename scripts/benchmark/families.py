"""The part `families` of `benchmark.py`: each recipe's layer against a dense MLP of equal FLOPs.

Shapes: N images, T tokens of an image, D hidden.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import torch
from contestants import dense_of_equal_flops
from measures import PASSES, Bench, Entry, Precision, Run, Stopwatch, forward_flops
from torch import Tensor, nn

from models import DiT, DiTConfig, MoE, build_mlp
from training.config_file import read_config_file
from training.settings import NETWORK_FLAGS

RECIPES = Path(__file__).parents[2] / "config/recipes"
NULL_SHARE = 0.1  # of the images, as training drops labels


def recipe_configs(config: DiTConfig) -> dict[str, DiTConfig]:
    """Return the mixture of every recipe file in one block of a model's size."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        flags = {k.replace("-", "_"): value for k, value in read_config_file(path).items()}
        fields: dict[str, Any] = {name: flags[name] for name in NETWORK_FLAGS if name in flags}
        terms = fields.get("balance", config.balance)
        terms = [terms] if isinstance(terms, str) else terms
        fields["balance"] = tuple(term for term in terms if term != "none")
        one_block = {"depth": 1, "moe_blocks": "all", "first_k_dense_replace": 0}
        found[path.stem] = dataclasses.replace(config, **fields | one_block)
    return found


def training_run(
    layer: nn.Module, batches: list[Tensor], is_null: Tensor, precision: Precision
) -> Run:
    """Time forward and backward of a layer in training, its balance losses included.

    Args:
        layer: a `MoE` or a dense MLP.
        batches: (N, T, D) fp32 for each round, as the blocks give them.
        is_null: (N,) bool, images without a class.
        precision: of weights and arithmetic.
    """
    layer = layer.to(is_null.device, precision.weights).train()

    def run(watch: Stopwatch, round_: int) -> None:
        x = batches[round_].detach().requires_grad_()
        with watch.part("forward"), precision.autocast(x.device):
            out, losses = layer(x, is_null) if isinstance(layer, MoE) else (layer(x), {})
        outputs = [out, *losses.values()]
        gradients = [batches[round_ - 1].to(out.dtype), *map(torch.ones_like, losses.values())]
        with watch.part("backward"):
            torch.autograd.backward(outputs, gradients)
        watch.seconds["forward+backward"] = sum(watch.seconds[name] for name in PASSES)
        layer.zero_grad(set_to_none=True)

    return run


def measure_families(bench: Bench, config: DiTConfig) -> None:
    """(h) The layer of each recipe at this size against a dense one of equal FLOPs, in training."""
    images, device = bench.args.batch_size, bench.device
    torch.manual_seed(0)
    shape = (images, config.num_patches, config.hidden_size)
    batches = [torch.randn(shape, device=device) for _ in range(bench.args.repeats + 1)]
    is_null = torch.arange(images, device=device) < round(NULL_SHARE * images)
    for name, mixture in recipe_configs(config).items():
        bench.heading("families", mixture, f"{name}; speed: against its dense MLP")
        dense = dense_of_equal_flops(mixture)
        flops = forward_flops(mixture, images, "moe"), forward_flops(dense, images, "mlp")
        for dtype in bench.args.dtypes:
            precision = Precision(dtype, dtype != "fp32")
            layers = {
                Entry(name, precision, flops[0]): cast(nn.Module, DiT(mixture).blocks[0].moe),
                Entry(f"{name} dense", precision, flops[1]): build_mlp(
                    dense, dense.mlp_hidden_size
                ),
            }
            runs = {e: training_run(x, batches, is_null, precision) for e, x in layers.items()}
            reference = f"{name} dense {precision.name}"
            bench.report("families", mixture, bench.alternate(runs), reference)
