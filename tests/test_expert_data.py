"""Routing counts against naive recounts, over ranks, after a stop, merged; their measures."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY_DIGITS, random_model, refusal, run_main
from launch import Process, torchrun
from PIL import Image
from torch import Tensor, nn

import expert_data
import expert_report
import heatmap_layer
from checkpoint.state import save_safetensors
from common.errors import FileError, UserError
from expert_data import print_summary
from models import DiT, DiTConfig, Routing, TopKRouter
from routing import (
    PROB_UNIT,
    RoutingRecorder,
    load_entropy,
    max_violation,
    mutual_information,
    normalized_mutual_information,
    pair_usage,
)
from routing.figures import pick_layers
from routing.tables import ADDED, RoutingData, format_table, measure, measure_all, merge

T, L, E, K = 4, TINY_DIGITS.depth, TINY_DIGITS.num_experts, TINY_DIGITS.num_experts_per_tok
SETTINGS = {"objective": "rf", "vae_path": "none", "data_path": "digits", "image_size": 8}
SETTINGS["class_names"] = list("0123456789")
STEPS = 3


def save_model(folder: Path, objective: str = "rf") -> str:
    """Write a model whose blocks do something, so that routing depends on class and step."""
    model = random_model(TINY_DIGITS, std=0.3)
    path = folder / f"{objective}.safetensors"
    save_safetensors(path, model.state_dict(), TINY_DIGITS, {**SETTINGS, "objective": objective})
    return str(path)


def command(ckpt: str, out: Path, *more: str) -> list[str]:
    """Return the flags of a small run: 3 images of each of 4 classes in batches of 5."""
    size = ("--num-per-class", "3", "--labels", "0", "2", "5", "9", "--batch-size", "5")
    steps = ("--num-sampling-steps", str(STEPS), "--dtype", "fp32")
    return ["--ckpt", ckpt, "--out", str(out), *size, *steps, *more]


def count(ckpt: str, out: Path, *more: str) -> RoutingData:
    """Run expert_data.py in this process."""
    run_main(expert_data, *command(ckpt, out, *more))
    return RoutingData.load(out)


def assert_same(one: RoutingData, other: RoutingData) -> None:
    for name in (*ADDED, "traced_ids", "traced_labels", "traced_images", "times"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


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


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "10"], r"--labels 10: expected a number in \[0, 9\] or one of 0, 1"),
        (["--sampler", "ddim"], "--sampler ddim: rf accepts euler, heun"),
        (["--times", "0.5"], "--times: only with --real"),
        (["--real", "--num-per-class", "9999"], "--num-per-class 9999: class 0 of digits has"),
        (["--merge", "x.npz"], "--ckpt or --merge: give one of them"),
        (["--rf", "False"], "--rf False: the checkpoint was trained with rf"),
    ],
)
def test_wrong_flags_are_named(ckpt: str, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(UserError, match=message):
        count(ckpt, tmp_path / "a.npz", *flags)


def test_a_dense_model_is_refused(tmp_path: Path):
    config = dataclasses.replace(TINY_DIGITS, num_experts=0)
    path = tmp_path / "dense.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, SETTINGS)
    with pytest.raises(UserError, match="dense model: it has no experts to count"):
        count(str(path), tmp_path / "a.npz")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "b.npz")


def rewrite(source: Path, out: Path, **changed: Any) -> Path:
    """Copy a file of routing data with some of its arrays or metadata changed."""
    with np.load(source) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    for name, value in changed.items():
        (arrays if name in arrays else meta)[name] = value
    np.savez(out, meta=json.dumps(meta), **arrays)
    return out


@pytest.fixture(scope="module")
def saved(data: RoutingData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "routing.npz"
    data.save(path)
    return path


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"pairs": np.array([{}])}, "pairs is object, expected int64"),
        (
            {"pairs": np.zeros((2, 2, 4, 5), int)},
            r"pairs is \(2, 2, 4, 5\), expected \(2, 2, 4, 4\)",
        ),
        ({"by_class": np.zeros((2, 10, 3, 4), int)}, r"by_class is \(2, 10, 3, 4\), expected"),
        ({"times": np.zeros(3)}, None),
        ({"times": np.array([1.0, 2.0, np.nan])}, r"times are not all in \[0, 1\]"),
        ({"traced_labels": np.full(10, 10)}, r"traced_labels are not all in \[0, 9\]"),
        ({"by_step": np.full((2, 3, 2, 4), -1)}, "counts below 0"),
        ({"runs": []}, "it has no runs"),
        ({"runs": [{"seed": "0"}]}, "runs: seed is a str"),
        ({"class_names": [1, 2]}, "class_names are not all text"),
        ({"cfg_scale": None}, "its metadata: cfg_scale is a NoneType"),
        ({"config": {"depth": "many"}}, "is no routing data"),
        ({"version": 3}, "it has version 3, expected up to 2"),
    ],
)
def test_a_file_that_does_not_fit_itself_is_refused_in_a_line(
    saved: Path, tmp_path: Path, changed: dict[str, Any], message: str | None
) -> None:
    path = rewrite(saved, tmp_path / "a.npz", **changed)
    if message is None:
        RoutingData.load(path)
        return
    with pytest.raises(FileError, match=message):
        RoutingData.load(path)


def test_tables_larger_than_the_memory_are_refused_before_they_are_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda _: 30)
    with pytest.raises(FileError, match="it needs 0 GiB of memory"):
        RoutingData.load(saved)
    monkeypatch.undo()
    header = io.BytesIO()
    shape = {"descr": "<i8", "fortran_order": False, "shape": (2, 10**12)}
    np.lib.format.write_array_header_1_0(header, shape)
    huge = header.getvalue() + bytes(48)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(tmp_path / "a.npz", "w") as target:
        for info in source.infolist():
            content = huge if info.filename == "rows.npy" else source.read(info)
            target.writestr(info.filename, content)
    with pytest.raises(FileError, match="rows is cut"):
        RoutingData.load(tmp_path / "a.npz")


def test_a_file_whose_times_rise_is_read_with_noise_first(saved: Path, tmp_path: Path) -> None:
    whole = RoutingData.load(saved)
    axes = {"times": 0, "by_step": 1, "probs": 1, "rows": 1, "traced_ids": 1}
    turned = {name: getattr(whole, name).flip(axis).numpy() for name, axis in axes.items()}
    assert_same(RoutingData.load(rewrite(saved, tmp_path / "a.npz", **turned)), whole)


def test_a_file_of_version_1_is_read_and_continued(ckpt: str, data: RoutingData, tmp_path: Path):
    """It said raw for traced, and wrote no labels as floats."""
    part = tmp_path / "part.npz"
    count(ckpt, part, "--max-batches", "1")
    with np.load(part) as file:
        arrays = {name.replace("traced_", "raw_"): file[name] for name in file.files}
    arrays["meta"] = np.array(json.dumps({**json.loads(str(arrays["meta"])), "version": 1}))
    np.savez(tmp_path / "old.npz", **arrays)
    assert_same(count(ckpt, tmp_path / "old.npz"), data)
    flags = ("--raw_samples", "0", "--max-batches", "1")  # the flag's spelling of then
    none = count(ckpt, tmp_path / "b.npz", *flags)
    assert none.traced_labels.dtype == torch.int64 and len(none.traced_labels) == 0
    path = rewrite(tmp_path / "b.npz", tmp_path / "c.npz", traced_labels=np.zeros(0, np.float32))
    assert RoutingData.load(path).traced_labels.dtype == torch.int64


def test_more_experts_than_a_byte_counts_are_traced() -> None:
    config = dataclasses.replace(TINY_DIGITS, num_experts=300, depth=1)
    torch.manual_seed(0)
    model = DiT(config).eval()
    recorder = RoutingRecorder(model, num_steps=1, num_traced=40)
    recorder.begin(torch.zeros(40, dtype=torch.long), first_index=0)
    with torch.no_grad():
        model(torch.randn(40, 1, 8, 8) * 9, torch.rand(40), torch.zeros(40, dtype=torch.long))
    counted = torch.bincount(recorder.tables["traced_ids"].flatten().long(), minlength=300)
    assert torch.equal(counted, recorder.tables["by_step"][0, 0, 0]) and counted[256:].sum() > 0


def test_what_is_shown_of_a_name_controls_no_terminal(
    ckpt: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["\x1b[2Jclear", "two\nlines", "x" * 500]
    path = rewrite(saved, tmp_path / "a.npz", class_names=names, sampler="\x1b]0;title\x07")
    loaded = RoutingData.load(path)
    assert loaded.class_names[0] == "\\x1b[2Jclear" and loaded.class_names[1] == "two\\nlines"
    assert len(loaded.class_names[2]) == 40
    assert loaded.class_names[3:] == [f"class {i}" for i in range(3, 10)]  # more than names
    print_summary(loaded, "a.npz")
    assert "\x1b" not in capsys.readouterr().out


# ------------------------------------------------------------------------------ which images


def image_folder(root: Path, names: str) -> Path:
    """Write two gray images of each class, as bright as the place of its name in the alphabet."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(2):
            level = 5 * (ord(name) - ord("a")) + i
            Image.new("RGB", (9, 8), (level,) * 3).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """Write a model of RGB pixels whose classes are a, b, c and one that has no name."""
    config = dataclasses.replace(TINY_DIGITS, in_channels=3, num_classes=4)
    torch.manual_seed(0)
    settings = {"objective": "rf", "vae_path": "none", "class_names": ["a", "b", "c"]}
    path = tmp_path / "letters.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, settings)
    return str(path)


def route(ckpt: str, out: Path, *flags: str) -> RoutingData:
    """Run expert_data.py without the flags of `command`."""
    steps = ("--num-sampling-steps", "2", "--dtype", "fp32")
    arguments = ["--ckpt", ckpt, "--out", str(out), *steps, *flags]
    run_main(expert_data, *arguments)
    return RoutingData.load(out)


def test_classes_are_given_by_name_and_those_without_one_are_left_out(letters: str, tmp_path: Path):
    found = route(letters, tmp_path / "a.npz", "--labels", "c", "a", "--num-per-class", "1")
    assert found.drawn_classes.tolist() == [0, 2] and found.traced_labels.tolist() == [2, 0]
    assert route(letters, tmp_path / "b.npz", "--num-per-class", "1").drawn_classes.tolist() == [
        *(0, 1, 2)
    ]
    assert found.class_names == ["a", "b", "c", "class 3"]
    with pytest.raises(UserError, match="class 2 is there twice"):
        route(letters, tmp_path / "c.npz", "--labels", "c", "2")


def test_classes_of_a_folder_are_found_by_name_not_by_place(letters: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", "bc")  # places 0 and 1
    flags = ("--real", "--data-path", str(folder), "--num-per-class", "2")
    found = route(letters, tmp_path / "a.npz", *flags)
    assert found.drawn_classes.tolist() == [1, 2]
    brightness = found.traced_images.float().mean(dim=(1, 2, 3)).round().tolist()
    assert dict(zip(brightness, found.traced_labels.tolist(), strict=True)) == {
        5: 1,
        6: 1,
        10: 2,
        11: 2,
    }
    image_folder(folder, "x")
    with pytest.raises(UserError, match="has the class 'x', the checkpoint was trained with 'a'"):
        route(letters, tmp_path / "b.npz", *flags)
    assert not (tmp_path / "b.npz").exists()


def test_classes_without_names_must_be_as_many(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY_DIGITS, in_channels=3)
    path = tmp_path / "published.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, {"vae_path": "none"})
    flags = ("--real", "--data-path", str(image_folder(tmp_path / "images", "ab")), "--rf")
    with pytest.raises(UserError, match="has 2 classes, the checkpoint 10 without names"):
        route(str(path), tmp_path / "a.npz", *flags)


def test_single_pictures_are_routed_with_the_class_that_is_said(letters: str, tmp_path: Path):
    folder = image_folder(tmp_path / "images", "bc")
    pictures = [str(folder / "c" / "1.png"), str(folder / "b" / "0.png")]
    flags = ("--times", "0.2", "0.6", "--batch-size", "1")
    found = route(letters, tmp_path / "a.npz", "--image", *pictures, "--labels", "c", "b", *flags)
    assert found.images_done == 2 and found.traced_labels.tolist() == [2, 1]
    assert found.times.tolist() == [0.6, 0.2]  # noise first
    assert found.traced_images.float().mean(dim=(1, 2, 3)).round().tolist() == [11, 5]
    assert found.title.endswith("2 real images at 2 noise levels")
    alone = route(letters, tmp_path / "b.npz", "--image", pictures[0], "--labels", "c", *flags)
    assert torch.equal(alone.traced_ids[0], found.traced_ids[0])
    with pytest.raises(UserError, match="--image needs --labels: one class for all or one for"):
        route(letters, tmp_path / "c.npz", "--image", *pictures)
    with pytest.raises(UserError, match="exists and run differs"):
        route(letters, tmp_path / "b.npz", "--image", pictures[1], "--labels", "c", *flags)
    with pytest.raises(FileError, match=r"cannot read .*nowhere\.png"):
        route(letters, tmp_path / "c.npz", "--image", "nowhere.png", "--labels", "c")


# ------------------------------------------------------------------------------ what is written


def test_only_npz_is_written_and_nothing_that_is_not_ours_is_replaced(
    ckpt: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--out .*x\.csv: expected a name that ends in \.npz"):
        count(ckpt, tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("name,score\nmine,1\n")
    with pytest.raises(FileError, match=r"x\.csv exists and is none of ours"):
        count(ckpt, tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(b"mine")
    with pytest.raises(FileError, match=r"y\.npz is no routing data"):
        count(ckpt, tmp_path / "y.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.csv", "y.npz"]
    assert (tmp_path / "x.csv").read_text() == "name,score\nmine,1\n"


def test_a_name_that_cannot_be_written_is_one_line(ckpt: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"--out .*file can't be written to: File exists"):
        count(ckpt, tmp_path / "file" / "a.npz")


def test_what_is_loaded_is_what_is_hashed_while_the_run_goes_on(
    ckpt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer checkpoint appears right after the first look."""
    files = [Path(ckpt), tmp_path / "newer.safetensors"]
    monkeypatch.setattr("expert_data.resolve_checkpoint", lambda _: files.pop(0))
    (tmp_path / "run").mkdir()
    found = count(str(tmp_path / "run"), tmp_path / "a.npz", "--max-batches", "1")
    named = found.meta["checkpoint"]
    assert named["path"].endswith("run") and named["file"] == ckpt
    assert named["sha256"] == hashlib.sha256(Path(ckpt).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traced-samples", "999999999", "--num-per-class", "999999999"], "--traced-samples 9"),
        (["--cfg-interval", "0.8", "0.2"], "--cfg-interval 0.8 0.2: expected LOW <= HIGH"),
        (["--real", "--image", "a.png"], "--real or --image: give one of them"),
    ],
)
def test_absurd_flags_are_refused_before_any_work(
    ckpt: str, tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        count(ckpt, tmp_path / "a.npz", *flags)
    assert not list(tmp_path.iterdir())


def test_the_script_says_a_mistake_in_one_line(ckpt: str, tmp_path: Path) -> None:
    line = refusal("expert_data.py", "--ckpt", tmp_path / "no\x1b[2Jwhere")
    assert "no such file" in line and "\x1b" not in line


# ------------------------------------------------------------------------------ measures


def test_information_is_nothing_for_equal_rows_and_everything_for_rows_of_their_own():
    equal, own = torch.tensor([[4, 2], [4, 2]]), torch.tensor([[6, 0], [0, 6]])
    assert mutual_information(equal).item() == pytest.approx(0, abs=1e-12)
    assert mutual_information(own).item() == pytest.approx(math.log(2))
    assert normalized_mutual_information(torch.stack([equal, own]), 1).tolist() == pytest.approx(
        [0, 1]
    )


def test_information_is_complete_when_each_row_has_k_experts_of_its_own():
    counts = torch.tensor([[5, 5, 0, 0], [0, 0, 5, 5]])  # K = 2: each row knows its pair
    assert normalized_mutual_information(counts, 2).item() == pytest.approx(1)
    assert normalized_mutual_information(counts[:1], 2).item() == 0  # nothing to tell apart


def test_information_follows_its_formula_on_an_uneven_table():
    joint = np.array([[1, 2, 3], [3, 1, 0]]) / 10
    rows, columns = joint.sum(axis=1, keepdims=True), joint.sum(axis=0, keepdims=True)
    ratio = np.where(joint > 0, joint / (rows * columns), 1)
    expected = (joint * np.log(ratio)).sum()
    found = mutual_information(torch.tensor([[1, 2, 3], [3, 1, 0]]))
    assert found.item() == pytest.approx(expected)


def test_pair_usage_counts_pairs_not_single_experts():
    pairs = torch.diag(torch.tensor([4, 4, 4]))
    pairs[0, 1] = pairs[1, 0] = 4
    assert pair_usage(pairs).item() == pytest.approx(1 / 3)


def test_early_middle_and_late_steps_are_measured_apart(data: RoutingData):
    even, one = [3, 3, 3, 3], [6, 6, 0, 0]
    for num_steps, by_step in ((8, [one] * 2 + [even] * 4 + [one] * 2), (1, [one]), (2, [one] * 2)):
        tables = {**vars(data), "by_step": torch.tensor(by_step)[None, :, None].repeat(2, 1, L, 1)}
        row = measure(RoutingData(**tables))[0]
        ends = (row["entropy_early"], row["entropy_late"])
        assert ends == pytest.approx((0.5, 0.5))
        assert row["entropy_middle"] == pytest.approx(1.0 if num_steps == 8 else 0.5)


def test_the_table_is_printed_and_saved_with_a_row_per_layer_and_half(ckpt: str, tmp_path: Path):
    data = count(ckpt, tmp_path / "a.npz")
    with open(tmp_path / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["half"], row["layer"]) for row in rows] == [
        *(("conditional", "0"), ("conditional", "1")),
        *(("unconditional", "0"), ("unconditional", "1")),
    ]
    measured = measure(data)
    assert float(rows[1]["nmi_patch"]) == pytest.approx(measured[1]["nmi_patch"])
    table = format_table(measured, ["nmi_class", "entropy"]).splitlines()
    assert table[0].split() == ["layer", "nmi_class", "entropy"]
    assert table[-1].split()[0] == "mean"
    probabilities = data.mean_probs()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(L, dtype=torch.float64))
