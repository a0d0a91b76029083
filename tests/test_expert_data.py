"""Routing counts against naive recounts, over ranks, after a stop, merged; their measures."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import Process, torchrun
from torch import Tensor

import expert_data
from checkpoint import save_safetensors
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
from routing_data import ADDED, RoutingData, format_table, measure, measure_all, merge

TINY = DiTConfig(
    input_size=8,  # digits
    patch_size=4,
    in_channels=1,
    hidden_size=16,
    depth=2,
    num_heads=2,
    mlp_ratio=1.0,
    num_classes=10,
    num_experts=4,
    num_experts_per_tok=2,
)
T, L, E, K = 4, TINY.depth, TINY.num_experts, TINY.num_experts_per_tok
SETTINGS = {"objective": "rf", "vae_path": "none", "data_path": "digits", "image_size": 8}
SETTINGS["class_names"] = list("0123456789")
STEPS = 3


def save_model(folder: Path, objective: str = "rf") -> str:
    """Write a model whose blocks do something, so that routing depends on class and step."""
    torch.manual_seed(0)
    model = DiT(TINY)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    path = folder / f"{objective}.safetensors"
    save_safetensors(path, model.state_dict(), TINY, {**SETTINGS, "objective": objective})
    return str(path)


def command(ckpt: str, out: Path, *more: str) -> list[str]:
    """Return the flags of a small run: 3 images of each of 4 classes in batches of 5."""
    size = ("--num-per-class", "3", "--labels", "0", "2", "5", "9", "--batch-size", "5")
    steps = ("--num-sampling-steps", str(STEPS), "--dtype", "fp32")
    return ["--ckpt", ckpt, "--out", str(out), *size, *steps, *more]


def count(ckpt: str, out: Path, *more: str) -> RoutingData:
    """Run expert_data.py in this process."""
    expert_data.main(expert_data.build_parser().parse_args(command(ckpt, out, *more)))
    return RoutingData.load(out)


def assert_same(one: RoutingData, other: RoutingData) -> None:
    for name in (*ADDED, "raw_ids", "raw_labels", "raw_images", "times"):
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
    model, labels, seen, step = DiT(TINY).eval(), torch.tensor([7, 1, 7]), [], 0
    recorder = RoutingRecorder(model, num_steps=2, num_raw=2)
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
    assert torch.equal(recorder.tables["raw_ids"][:, 0, 0, :, 0].long(), heaviest)


def test_choices_add_up_to_tokens_times_k_times_layers_times_steps_times_images(data: RoutingData):
    total = T * K * L * STEPS * 12
    for name in ("by_class", "by_step", "by_patch"):
        assert getattr(data, name).sum(dim=(1, 2, 3)).tolist() == [total, total]  # both halves
    pairs = data.pairs[0]
    alone = pairs.diagonal(dim1=1, dim2=2)
    assert torch.equal(alone, data.by_step[0].sum(dim=0))
    assert torch.equal(pairs.sum(dim=2) - alone, (K - 1) * alone)
    assert data.drawn_classes.tolist() == [0, 2, 5, 9]


def test_raw_choices_agree_with_the_pictures_they_belong_to(data: RoutingData, ckpt, tmp_path):
    whole = count(ckpt, tmp_path / "a.npz", "--raw-samples", "12")
    recount = torch.nn.functional.one_hot(whole.raw_ids.long(), E).sum(dim=(0, 1, 3, 4))  # (L, E)
    assert torch.equal(recount, data.by_step[0].sum(dim=0))
    assert whole.raw_labels.tolist() == [0, 2, 5, 9] * 3
    assert whole.raw_images.float().std() > 1
    assert torch.equal(whole.raw_images[:10], data.raw_images)


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
    assert data.raw_images[0].float().mean() < 200  # a digit, not noise


def test_real_images_of_ddpm_take_whole_timesteps(tmp_path: Path):
    ckpt = save_model(tmp_path, "ddpm")
    data = count(ckpt, tmp_path / "a.npz", "--real", "--times", "1", "0.5")
    assert data.times.tolist() == [0.999, 0.5]


def test_tables_take_no_more_room_for_more_images(ckpt: str, data: RoutingData, tmp_path: Path):
    more = count(ckpt, tmp_path / "a.npz", "--num-per-class", "6")
    assert more.images_done == 2 * data.images_done
    for name in (*ADDED, "raw_ids", "raw_images"):
        assert getattr(more, name).shape == getattr(data, name).shape


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
    with pytest.raises(SystemExit, match=r"a\.npz exists and num_steps differs"):
        count(ckpt, out, "--num-sampling-steps", "4")
    with pytest.raises(SystemExit, match=r"a\.npz exists and run differs"):
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
    with pytest.raises(SystemExit, match="exists and times differs"):
        count(ckpt, tmp_path / "a.npz", *flags, "0.2", "0.5")


def test_merging_two_runs_adds_their_counts(ckpt: str, tmp_path: Path):
    options = ("--batch-size", "3", "--raw-samples", "0")
    parts = [tmp_path / "a.npz", tmp_path / "b.npz"]
    count(ckpt, parts[0], "--seed", "1", *options)
    count(ckpt, parts[1], "--seed", "2", *options)
    out = tmp_path / "all.npz"
    arguments = ["--merge", *map(str, parts), "--out", str(out)]
    with pytest.raises(SystemExit, match=r"exists; choose another name or delete it"):
        clash = [*arguments[:-1], str(parts[0])]
        expert_data.main(expert_data.build_parser().parse_args(clash))
    expert_data.main(expert_data.build_parser().parse_args(arguments))
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
        (["--labels", "10"], r"--labels 10: expected different numbers in \[0, 9\]"),
        (["--sampler", "ddim"], "--sampler ddim: rf accepts euler, heun"),
        (["--times", "0.5"], "--times: only with --real"),
        (["--real", "--num-per-class", "9999"], "--num-per-class 9999: class 0 of digits has"),
        (["--merge", "x.npz"], "--ckpt or --merge: give one of them"),
        (["--rf", "False"], "--rf False: the checkpoint was trained with rf"),
    ],
)
def test_wrong_flags_are_named(ckpt: str, tmp_path: Path, flags: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        count(ckpt, tmp_path / "a.npz", *flags)


def test_a_dense_model_is_refused(tmp_path: Path):
    config = DiTConfig(**{**TINY.to_dict(), "num_experts": 0})
    path = tmp_path / "dense.safetensors"
    save_safetensors(path, DiT(config).state_dict(), config, SETTINGS)
    with pytest.raises(SystemExit, match="dense model: it has no experts to count"):
        count(str(path), tmp_path / "a.npz")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"a\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "a.npz")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b\.npz is no routing data of expert_data\.py"):
        RoutingData.load(tmp_path / "b.npz")


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
