"""The benchmark: its contestants compute the same, its counts are those known on paper."""

import json
from collections import Counter
from pathlib import Path
from typing import Any, cast

import benchmark
import pytest
import torch
from families import recipe_configs, training_run
from measures import (
    Bench,
    Entry,
    Precision,
    count_calls,
    forward_flops,
    linear_layers,
    saved_bytes,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common.errors import FileError
from models import DiT, DiT_models, DiTConfig, MoE

CONFIG = DiTConfig(hidden_size=16, depth=1, num_heads=2, num_experts=4, input_size=8)
CPU = torch.device("cpu")
ROUTING = ("moe.router", "moe.predictor")


def run_benchmark(out: Path, *flags: str) -> list[dict]:
    """Run tiny contests in this process and return the rows of the JSON."""
    tiny = ("--models", "DiT-Ti/4", "--batch-size", "1", "--repeats", "1", "--dtypes", "fp32")
    benchmark.main(benchmark.build_parser().parse_args([*tiny, "--out", str(out), *flags]))
    return json.loads(out.read_text())["rows"]


# ------------------------------------------------------------------------------ contestants


def outputs_and_gradients(moe: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Return the output, the balance loss and the gradients, those of experts stacked."""
    tokens = tokens.clone().requires_grad_()
    out, aux_losses = moe(tokens)
    aux_loss = aux_losses.get("switch", torch.zeros(()))
    ((out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum() + aux_loss).backward()
    found: dict[str, Any] = {"out": out, "aux_loss": aux_loss, "tokens": tokens.grad}
    found["router"] = moe.router.weight.grad
    if isinstance(moe, MoE):
        names = {"gate_up": "experts.gate_up_proj", "down": "experts.down_proj"}
        names |= {"shared_gate_up": "shared_experts.gate_up_proj.weight"}
        names |= {"shared_down": "shared_experts.down_proj.weight"}
        return found | {name: moe.get_parameter(path).grad for name, path in names.items()}
    experts, shared = list(moe.experts), moe.shared_experts
    found["gate_up"] = torch.stack([torch.cat([e.gate.grad, e.up.grad]) for e in experts])
    found["down"] = torch.stack([e.down.grad for e in experts])
    found["shared_gate_up"] = torch.cat([shared.gate.grad, shared.up.grad])
    return found | {"shared_down": shared.down.grad}


@pytest.mark.parametrize("training", [True, False])
def test_the_naive_layer_gives_our_output_and_gradients(training: bool) -> None:
    moe = benchmark.random_moe(CONFIG).train(training)
    tokens = torch.randn(2, 16, CONFIG.hidden_size)
    ours = outputs_and_gradients(moe, tokens)
    moe.zero_grad()  # the router is shared
    naive = outputs_and_gradients(benchmark.NaiveMoE(moe).train(training), tokens)
    assert ours.keys() == naive.keys()
    for name in ours:
        torch.testing.assert_close(naive[name], ours[name], msg=name)


@pytest.mark.parametrize("name", ["eager", "grouped_mm"])
def test_the_experts_of_transformers_give_our_output_and_gradients(name: str) -> None:
    pytest.importorskip("transformers")
    moe = benchmark.random_moe(CONFIG).train()
    peer = benchmark.peers(moe)[f"transformers {name}"]
    x, y = (torch.randn(2, 16, CONFIG.hidden_size, requires_grad=True) for _ in range(2))
    y.data.copy_(x.data)
    ours, theirs = moe(x)[0], peer(y)[0]
    torch.testing.assert_close(theirs, ours)
    ours.square().sum().backward()
    gradient = moe.experts.down_proj.grad.clone()
    moe.zero_grad()
    theirs.square().sum().backward()
    torch.testing.assert_close(moe.experts.down_proj.grad, gradient)
    torch.testing.assert_close(y.grad, x.grad)


def test_the_bare_matmuls_have_the_shapes_of_the_layers_own_loads() -> None:
    moe = benchmark.random_moe(CONFIG)
    batches = [torch.randn(1, 32, CONFIG.hidden_size) for _ in range(2)]
    run = benchmark.bare_run(moe, batches, Precision("fp32", False))
    with FlopCounterMode(display=False) as counter:
        run(benchmark.Stopwatch(CPU), 0)
    one = forward_flops(CONFIG, 2, "moe.experts") + forward_flops(CONFIG, 2, "moe.shared")
    assert counter.get_total_flops() == 4 * one  # inference, forward, twice as much backward


def test_the_naive_model_holds_views_of_our_weights() -> None:
    model = benchmark.build_model(CONFIG, CPU)
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    naive = benchmark.use_naive_experts(model)
    assert {p.untyped_storage().data_ptr() for p in naive.parameters()} == storages
    assert naive.num_parameters()[0] == DiT(CONFIG).num_parameters()[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_contestant_of_a_training_step_runs_in_mixed_precision(dtype: str) -> None:
    for config, naive in benchmark.model_variants(CONFIG).values():
        training = benchmark.TrainingStep(config, CPU, naive)
        before = [p.clone() for p in training.parameters]
        watch = benchmark.Stopwatch(CPU)
        training.run(Precision(dtype, dtype != "fp32"), 2, watch, seed=0)
        assert list(watch.seconds) == ["forward", "backward", "optimizer", "ema", "step"]
        assert any(not p.equal(b) for p, b in zip(training.parameters, before, strict=True))


# ------------------------------------------------------------------------------ counts


@pytest.mark.parametrize(
    ("name", "gigamacs"),
    [("S/2", 15.43), ("B/2", 61.68), ("L/2", 219.26), ("XL/2", 323.74), ("G/2", 690.94)],
)
def test_linear_layers_have_the_published_gigamacs(name: str, gigamacs: float) -> None:
    with torch.device("meta"):
        config = DiT_models[f"DiT-{name}"]().config
    assert forward_flops(config, images=1) / 2e9 == pytest.approx(gigamacs, abs=0.006)


def test_the_dense_model_has_our_flops_but_for_the_router() -> None:
    dense = benchmark.dense_of_equal_flops(CONFIG)
    without_router = forward_flops(CONFIG, 2) - forward_flops(CONFIG, 2, "moe.router")
    assert forward_flops(dense, 2) == without_router
    shape = next(layer for layer in linear_layers(dense, 2) if layer.name == "mlp.down")
    weight = DiT(dense).get_parameter("blocks.0.mlp.down_proj.weight")
    assert weight.shape == (shape.outputs, shape.inputs)


def test_every_recipe_has_a_dense_model_of_its_flops_and_widths() -> None:
    configs = recipe_configs(DiTConfig(hidden_size=16, depth=12, num_heads=2, input_size=8))
    assert set(configs) >= {"dit_moe", "promoe", "promoe_ec", "ec_dit", "diffmoe", "dsmoe"}
    for name, config in configs.items():
        dense = benchmark.dense_of_equal_flops(config)
        routing = [x.flops for x in linear_layers(config, 6) if x.name.startswith(ROUTING)]
        assert forward_flops(dense, 6) == forward_flops(config, 6) - sum(routing), name
        counted = sum(x.inputs * x.outputs for x in linear_layers(dense, 6) if "mlp" in x.name)
        mlp = cast(nn.Module, DiT(dense).blocks[0].mlp)
        matrices = [p for p in mlp.parameters() if p.ndim > 1]
        assert counted == sum(p.numel() for p in matrices), name


def test_saved_bytes_count_every_storage_once_and_no_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 8))
    x = torch.randn(3, 4, requires_grad=True)
    # x for the first layer, the ReLU's result for itself and for the second layer
    assert saved_bytes(lambda: model(x), model) == 2 * (3 * 4) * 4


def test_calls_are_read_from_the_profilers_names() -> None:
    names = Counter(
        {"cudaLaunchKernel": 5, "cuLaunchKernelEx": 2, "cudaLaunchKernelExC": 1, "aten::mm": 9,
         "cudaStreamSynchronize": 3, "cudaDeviceSynchronize": 4, "cudaMemcpyAsync": 7}
    )  # fmt: skip
    assert count_calls(names) == {"launches": 8, "waits": 3}


# ------------------------------------------------------------------------------ contests


def test_contestants_take_turns_back_and_forth_after_a_warm_up() -> None:
    bench = Bench(benchmark.build_parser().parse_args(["--repeats", "2"]), CPU)
    order: list[str] = []

    def contestant(name: str) -> benchmark.Run:
        def run(watch: benchmark.Stopwatch, round_: int) -> None:
            with watch.part("all"):
                order.append(f"{name}{round_}")

        return run

    entries = {Entry(name, Precision("fp32", False), 0): contestant(name) for name in "ab"}
    laps = bench.alternate(entries)
    assert order == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [len(parts["all"]) for parts in laps.values()] == [2, 2]


def test_every_part_adds_rows_to_the_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run_benchmark(tmp_path / "b.json", "--parts", "rate,layer,step,sample,cuda")
    assert {row["part"] for row in rows} == {"rate", "layer", "step", "sample"}
    for part in ("layer", "step", "sample"):
        of_part = [row for row in rows if row["part"] == part]
        who = {row["contestant"] for row in of_part}
        assert who >= {"ours", "naive", "dense"} and ("bare" in who) == (part == "layer")
        assert all(row["speed"] == 1 for row in of_part if row["contestant"] == "naive")
        assert all(row["mfu"] > 0 for row in of_part if row["what"] in ("forward", "sample"))
    assert "skipped: there is no GPU" in capsys.readouterr().out


def test_families_train_each_recipes_layer_and_a_dense_one(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path / "b.json", "--parts", "families")
    for name in ("dit_moe", "promoe", "promoe_ec", "ec_dit", "diffmoe", "dsmoe"):
        ours = [row for row in rows if row["contestant"] == name]
        dense = [row for row in rows if row["contestant"] == f"{name} dense"]
        assert {row["what"] for row in ours} == {"forward", "backward", "forward+backward"}
        assert all(row["speed"] > 0 and row["mfu"] > 0 for row in ours)
        assert all(row["speed"] == 1 for row in dense)


def test_a_familys_layer_is_timed_with_its_losses_and_images_without_a_class() -> None:
    config = recipe_configs(CONFIG)["promoe"]
    moe = benchmark.random_moe(config)
    watch, batches = benchmark.Stopwatch(CPU), [torch.randn(4, 16, 16) for _ in range(2)]
    is_null = torch.tensor([True, False, False, False])
    gradients: dict[str, Tensor] = {}
    for name, parameter in moe.named_parameters():
        parameter.register_hook(lambda grad, name=name: gradients.update({name: grad}))
    training_run(moe, batches, is_null, Precision("fp32", False))(watch, 1)
    assert gradients["router.prototypes"].any()
    assert gradients["experts.up_proj"][-1].any()  # of the unconditional expert, the last


@pytest.mark.slow
def test_growth_and_memory_add_rows_to_the_json(tmp_path: Path) -> None:
    rows = run_benchmark(tmp_path / "b.json", "--parts", "growth,memory")
    growth = {row["contestant"] for row in rows if row["part"] == "growth"}
    assert {"E=64 K=2 M=128", "E=8 K=4 M=128", "E=8 K=2 M=8"} <= growth
    memory = [row for row in rows if row["part"] == "memory"]
    assert [row["contestant"] for row in memory] == ["ours", "naive", "dense"]
    assert all(row["peak"] > row["imports"] and row["saved"] > 0 for row in memory)


def test_an_unknown_part_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmark.build_parser().parse_args(["--parts", "rate,laier"])
    assert "['laier'] not in rate,layer,step" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    out = str(tmp_path / "file" / "b.json")
    with pytest.raises(FileError, match=r"--out .*file can't be written"):
        benchmark.main(benchmark.build_parser().parse_args(["--out", out]))
