"""Routing counts against naive recounts, over ranks, after a stop, merged; their measures."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from counting import SETTINGS, STEPS, E, K, L, T, assert_same, command, count, save_model
from helpers import TINY_DIGITS, random_model, run_main
from launch import Process, torchrun
from torch import Tensor, nn

import expert_data
import expert_report
import heatmap_layer
from checkpoint.state import save_safetensors
from common.errors import UserError
from models import DiT, DiTConfig, Routing, TopKRouter
from routing import (
    PROB_UNIT,
    RoutingRecorder,
    load_entropy,
    max_violation,
)
from routing.figures import pick_layers
from routing.tables import ADDED, RoutingData, measure, measure_all, merge


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(ckpt: str, tmp_path_factory: pytest.TempPathFactory) -> RoutingData:
    return count(ckpt, tmp_path_factory.mktemp("data") / "routing.npz")


# ------------------------------------------------------------------------------ counting


def naive_count(
    seen: list[tuple[int, int, Routing]], labels: Tensor, num_steps: int
) -> dict[str, np.ndarray]:
    """Count (step, layer, routing) token by token; rows from N on are the unconditional ones."""
    N = len(labels)
    by_class, by_step = np.zeros((2, 10, L, E), int), np.zeros((2, num_steps, L, E), int)
    by_patch, pairs = np.zeros((2, T, L, E), int), np.zeros((2, L, E, E), int)
    for step, layer, routing in seen:
        for m, experts in enumerate(routing.expert_indices.tolist()):
            row, patch = divmod(m, T)
            half, image = divmod(row, N)
            for expert in experts:
                by_class[half, labels[image], layer, expert] += 1
                by_step[half, step, layer, expert] += 1
                by_patch[half, patch, layer, expert] += 1
                for partner in experts:
                    pairs[half, layer, expert, partner] += 1
    return {"by_class": by_class, "by_step": by_step, "by_patch": by_patch, "pairs": pairs}


def test_every_table_equals_a_recount_token_by_token():
    torch.manual_seed(0)
    model, labels, seen, step = DiT(TINY_DIGITS).eval(), torch.tensor([7, 1, 7]), [], 0
    recorder = RoutingRecorder(model, num_steps=2, num_traced=2)
    for layer, router in enumerate(m for m in model.modules() if isinstance(m, TopKRouter)):
        router.register_forward_hook(
            lambda _router, _args, routing, layer=layer: seen.append((step, layer, routing))
        )
    recorder.begin(labels, first_index=0)
    for step, copies in ((0, 1), (1, 2)):  # guidance works at the second step only
        recorder.at_step(step)
        x, t = torch.randn(copies * 3, 1, 8, 8), torch.rand(copies * 3)
        model(x, t, labels.repeat(copies))

    for name, expected in naive_count(seen, labels, num_steps=2).items():
        assert recorder.tables[name].numpy().tolist() == expected.tolist(), name
    assert recorder.tables["rows"].tolist() == [[3, 3], [0, 3]]
    first = seen[0][2]  # step 0, layer 0
    mean_probs = recorder.tables["probs"][0, 0, 0].double() * PROB_UNIT / (3 * T)
    torch.testing.assert_close(mean_probs.float(), first.probs.mean(dim=0))
    heaviest = first.probs.argmax(dim=1).view(3, T)[:2]
    assert torch.equal(recorder.tables["traced_ids"][:, 0, 0, :, 0].long(), heaviest)


def test_choices_add_up_to_tokens_times_k_times_layers_times_steps_times_images(data: RoutingData):
    total = T * K * L * STEPS * 12
    for name in ("by_class", "by_step", "by_patch"):
        assert getattr(data, name).sum(dim=(1, 2, 3)).tolist() == [total, total]  # both halves
    pairs = data.pairs[0]
    alone = pairs.diagonal(dim1=1, dim2=2)
    assert torch.equal(alone, data.by_step[0].sum(dim=0))
    assert torch.equal(pairs.sum(dim=2) - alone, (K - 1) * alone)
    assert data.drawn_classes.tolist() == [0, 2, 5, 9]


def test_traced_choices_agree_with_the_pictures_they_belong_to(data: RoutingData, ckpt, tmp_path):
    whole = count(ckpt, tmp_path / "a.npz", "--traced-samples", "12")
    recount = torch.nn.functional.one_hot(whole.traced_ids.long(), E).sum(
        dim=(0, 1, 3, 4)
    )  # (L, E)
    assert torch.equal(recount, data.by_step[0].sum(dim=0))
    assert whole.traced_labels.tolist() == [0, 2, 5, 9] * 3
    assert whole.traced_images.float().std() > 1
    assert torch.equal(whole.traced_images[:10], data.traced_images)


def test_guidance_off_leaves_the_unconditional_half_empty(ckpt: str, tmp_path: Path):
    data = count(ckpt, tmp_path / "a.npz", "--cfg-scale", "1")
    assert data.by_step[0].sum() > 0 and data.by_step[1].sum() == 0
    assert {row["half"] for row in measure_all(data)} == {"conditional"}
    with pytest.raises(ValueError, match="--half unconditional"):
        data.counts("step", "unconditional")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_ddpm_samplers_count_as_many_choices(sampler: str, tmp_path: Path):
    data = count(save_model(tmp_path, "ddpm"), tmp_path / "a.npz", "--sampler", sampler)
    assert data.by_step.sum().item() == 2 * T * K * L * STEPS * 12
    assert data.times[0].item() == pytest.approx(0.999)


def test_heun_counts_both_model_calls_of_a_step(ckpt: str, tmp_path: Path):
    data = count(ckpt, tmp_path / "a.npz", "--sampler", "heun")
    assert data.rows[0].tolist() == [2 * 12] * STEPS
    assert data.by_step[0].sum().item() == 2 * T * K * L * STEPS * 12


def test_real_images_are_routed_at_the_chosen_times(ckpt: str, tmp_path: Path):
    data = count(ckpt, tmp_path / "a.npz", "--real", "--times", "0.9", "0.1")
    assert data.times.tolist() == [0.9, 0.1]
    assert data.meta["source"] == "real"
    assert data.by_class.sum().item() == 2 * T * K * L * 2 * 12
    assert data.traced_images[0].float().mean() < 200  # a digit, not noise


def test_real_images_of_ddpm_take_whole_timesteps(tmp_path: Path):
    ckpt = save_model(tmp_path, "ddpm")
    data = count(ckpt, tmp_path / "a.npz", "--real", "--times", "1", "0.5")
    assert data.times.tolist() == [0.999, 0.5]


def test_tables_take_no_more_room_for_more_images(ckpt: str, data: RoutingData, tmp_path: Path):
    more = count(ckpt, tmp_path / "a.npz", "--num-per-class", "6")
    assert more.images_done == 2 * data.images_done
    for name in (*ADDED, "traced_ids", "traced_images"):
        assert getattr(more, name).shape == getattr(data, name).shape


class FixedRouter(nn.Module):
    """No `TopKRouter`, but it returns a `Routing`: token m has experts m % E and (m + 1) % E."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))

    def forward(self, x: Tensor, _is_null: Tensor) -> Routing:
        num_tokens = x.shape[0] * x.shape[1]
        first = torch.arange(num_tokens) % E
        chosen = torch.stack([first, (first + 1) % E], dim=1)
        weights = torch.tensor([0.75, 0.25]).expand(num_tokens, K)
        probs = torch.zeros(num_tokens, E).scatter_(1, chosen, weights)
        return Routing(chosen, weights, probs, {}, None)


def test_any_router_that_returns_a_routing_is_counted(
    ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.TopKRouter", FixedRouter)
    data = count(ckpt, tmp_path / "a.npz")
    images = data.images_done
    assert data.by_patch[0, :, 0].tolist() == [
        [images * STEPS * (expert in (patch, (patch + 1) % E)) for expert in range(E)]
        for patch in range(T)
    ]
    assert data.traced_ids[0, 0, 0].tolist() == [[m, (m + 1) % E] for m in range(T)]


MIXTURES: list[dict[str, Any]] = [
    {"selection": "expert_choice", "capacity": 1.0, "balance": ()},
    {"selection": "batch_choice", "affinity": "sigmoid", "balance": (), "num_experts_per_tok": 1},
    {"selection": "expert_choice", "balance": (), "unconditional_expert": True},
    {"unconditional_expert": True},
    {"moe_blocks": "every_second", "depth": 12},
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_every_kind_of_mixture_is_counted_and_drawn(mixture: dict[str, Any], tmp_path: Path):
    config = dataclasses.replace(TINY_DIGITS, **mixture)
    model = random_model(config, std=0.3)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, model.state_dict(), config, SETTINGS)

    data = count(str(path), tmp_path / "a.npz", "--traced-samples", "12")

    images, E = 12, config.num_all_experts
    assert data.layers == [i for i in range(config.depth) if config.is_moe_block(i)]
    assert torch.equal(data.by_class.sum(dim=1), data.by_step.sum(dim=1))
    assert torch.equal(data.by_patch.sum(dim=1), data.by_step.sum(dim=1))
    alone = data.pairs.diagonal(dim1=2, dim2=3)
    assert torch.equal(alone, data.by_step.sum(dim=1))
    if config.selection == "expert_choice":  # each expert takes T/E * capacity tokens of each image
        tokens = int(T * config.experts_per_token / config.num_experts)
        assert (data.by_step[0, :, :, : config.num_experts] == images * tokens).all()
    if config.unconditional_expert:
        whole = torch.zeros_like(data.by_step[1])
        whole[..., -1] = T * images
        assert torch.equal(data.by_step[1], whole)
    ids = data.traced_ids.long()
    by_first = torch.nn.functional.one_hot(ids, E + 1).sum(dim=(0, 3, 4))  # (S, L, E + 1)
    chosen = data.by_step[0]
    traced = by_first[..., :E]
    assert torch.equal(traced, chosen) or ((traced <= chosen).all() and mixture.get("selection"))
    for kind in heatmap_layer.FIGURES:
        args = ["--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / f"{kind}.png")]
        run_main(heatmap_layer, *args, "--by", kind)
    expert_report.build_page(data)


def test_the_unconditional_expert_is_named_and_no_part_of_the_routed_experts_load(tmp_path: Path):
    mixture = {**MIXTURES[2], "moe_blocks": "every_second", "depth": 12}
    config = dataclasses.replace(TINY_DIGITS, **mixture)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, random_model(config).state_dict(), config, SETTINGS)
    data = count(str(path), tmp_path / "a.npz")
    assert data.expert_names == ["0", "1", "2", "3", "U"]
    assert "4 experts and one unconditional, 2 per token" in data.title
    for row in measure(data):  # experts that choose have even loads
        assert row["entropy"] == pytest.approx(1.0)
        assert row["max_vio"] == row["dead"] == row["dead_class"] == 0
    for row in measure(data, "unconditional"):  # one expert takes all
        assert (row["entropy"], row["dead"], row["max_vio"]) == (0, 4, 4)
    figures = {
        kind: heatmap_layer.FIGURES[kind](
            heatmap_layer.build_parser().parse_args(["--data", "x", "--by", kind]), data
        )
        for kind in heatmap_layer.FIGURES
    }
    for kind, figure in figures.items():
        columns = [t.get_text() for axis in figure.axes for t in axis.get_xticklabels()]
        columns += [t.get_text() for legend in figure.legends for t in legend.get_texts()]
        assert "U" in columns, kind
    loads: Any = figures["expert"].axes[0].images[0].get_array()  # (L, E), relative to even
    assert abs(loads[:, :4] - 1).max() < 1e-9 and not loads[:, 4].any()
    assert "U is the unconditional expert" in str(figures["step"].texts)
    page = expert_report.page_data(data, 1, 1)
    assert page["expert_names"][-1] == "U" and page["most"] == 2


def test_layers_are_called_by_the_number_of_their_block(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_DIGITS, moe_blocks="every_second", depth=4)
    path = tmp_path / "model.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, SETTINGS)
    data = count(str(path), tmp_path / "a.npz")
    assert [row["layer"] for row in measure(data)] == [1, 3]
    parser = heatmap_layer.build_parser()
    args = parser.parse_args(["--data", "a.npz", "--layers", "3"])
    assert pick_layers(args, data) == [1]
    args.layers = [2]
    with pytest.raises(UserError, match="--layers 2: that block has no experts"):
        pick_layers(args, data)


# ------------------------------------------------------------------------------ ranks, merges


def test_two_ranks_count_what_one_counts(ckpt: str, data: RoutingData, tmp_path: Path):
    out = tmp_path / "two.npz"
    printed = Process(torchrun("expert_data.py", *command(ckpt, out)), tmp_path / "log").wait()
    assert "12 of 12 images" in printed
    assert_same(RoutingData.load(out), data)


def test_a_stopped_run_continues_to_the_same_file(ckpt: str, data: RoutingData, tmp_path: Path):
    out = tmp_path / "a.npz"
    assert count(ckpt, out, "--max-batches", "1").images_done == 5
    assert count(ckpt, out, "--max-batches", "1").images_done == 10
    assert_same(count(ckpt, out), data)
    assert_same(count(ckpt, out), data)  # nothing left to do
    assert json.loads(out.with_suffix(".json").read_text())[0]["layer"] == 0


def test_another_command_does_not_continue_a_file(ckpt: str, tmp_path: Path):
    out = tmp_path / "a.npz"
    count(ckpt, out, "--max-batches", "1")
    with pytest.raises(UserError, match=r"a\.npz exists and num_steps differs"):
        count(ckpt, out, "--num-sampling-steps", "4")
    with pytest.raises(UserError, match=r"a\.npz exists and run differs"):
        count(ckpt, out, "--seed", "1")


def test_steps_without_guidance_count_for_nothing_in_the_unconditional_half(
    ckpt: str, tmp_path: Path
) -> None:
    found = count(ckpt, tmp_path / "a.npz", "--cfg-scale", "2", "--cfg-interval", "0.5", "1")
    assert found.rows.tolist() == [[12, 12, 12], [12, 12, 0]]
    numbers, ran = measure(found, "unconditional"), found.counts("step", "unconditional")[:, :2]
    for row, counts in zip(numbers, ran, strict=True):
        assert row["max_vio_step"] == pytest.approx(max_violation(counts).mean().item())
        assert row["entropy_late"] == pytest.approx(load_entropy(counts)[-1].item())


def test_real_images_at_other_times_do_not_continue_a_file(ckpt: str, tmp_path: Path) -> None:
    flags = ("--real", "--max-batches", "1", "--times")
    count(ckpt, tmp_path / "a.npz", *flags, "0.1", "0.5")
    with pytest.raises(UserError, match="exists and times differs"):
        count(ckpt, tmp_path / "a.npz", *flags, "0.2", "0.5")


def test_merging_two_runs_adds_their_counts(ckpt: str, tmp_path: Path):
    options = ("--batch-size", "3", "--traced-samples", "0")
    parts = [tmp_path / "a.npz", tmp_path / "b.npz"]
    count(ckpt, parts[0], "--seed", "1", *options)
    count(ckpt, parts[1], "--seed", "2", *options)
    out = tmp_path / "all.npz"
    arguments = ["--merge", *map(str, parts), "--out", str(out)]
    with pytest.raises(UserError, match=r"exists; choose another name or delete it"):
        clash = [*arguments[:-1], str(parts[0])]
        run_main(expert_data, *clash)
    run_main(expert_data, *arguments)
    one, two, both = (RoutingData.load(path) for path in (*parts, out))
    assert both.images_done == 24
    for name in ADDED:
        assert torch.equal(getattr(both, name), getattr(one, name) + getattr(two, name))


def test_merge_refuses_the_same_images_twice_and_other_models(data: RoutingData):
    with pytest.raises(ValueError, match="seed 0 is there twice"):
        merge([data, data])
    other = RoutingData({**data.meta, "sampler": "heun"}, *list(vars(data).values())[1:])
    with pytest.raises(ValueError, match="--merge: sampler differs: euler and heun"):
        merge([data, other])
