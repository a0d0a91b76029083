"""Fine-tuning: what a run takes from `--init-from`, what it draws anew, and what it trains."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model, randomize, refusal, save_image_folder
from launch import REPO, TINY_RUN, Process, torchrun
from torch.testing import assert_close

from checkpoint.layouts import to_published
from checkpoint.state import checkpoint_path, load_checkpoint, save_safetensors
from checkpoint.weights import load_model
from common.errors import UserError
from models import DiT, DiTConfig, initialize_parameter, sincos_pos_embed
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.initial import label_rows
from training.job import Job, describe, prepare
from training.loop import launch
from training.parameters import load_optimizer, optimizer_groups, optimizer_state

DEEP = DiTConfig(
    input_size=8, patch_size=4, in_channels=3, hidden_size=384, depth=12, num_heads=6,
    num_classes=5, num_experts=0, mlp_type="gelu", mlp_ratio=0.25,
)  # fmt: skip
DIGITS = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=96, depth=4, num_heads=4,
    num_classes=10, num_experts=4, mlp_ratio=0.5,
)  # fmt: skip
LABELS, PATCHES = "y_embedder.embedding_table.weight", "x_embedder.proj.weight"
OUTPUT = "final_layer.linear.weight"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the classes class0, class1 and class2."""
    folder = tmp_path_factory.mktemp("data") / "images"
    return save_image_folder(folder, 3, 4, lambda *_: (20, 16))


def save(model: DiT, path: Path, **settings: Any) -> str:
    save_safetensors(path, model.state_dict(), model.config, settings)
    return str(path)


def job_of(images: Path, initial: str, *flags: str) -> Job:
    words = ["--data-path", str(images), "--vae-path", "none", "--rf", "--precision", "fp32"]
    words += ["--init-from", initial, "--results-dir", str(images.parent / "runs")]
    return prepare(build_parser(None).parse_args([*words, "--global-batch-size", "4", *flags]))


def test_labels_are_matched_by_name_or_by_equal_numbers_and_null_to_null() -> None:
    assert label_rows(["b", "new", "a"], 3, ["a", "b", "c"], 1000) == {0: 1, 2: 0, 3: 1000}
    assert label_rows(["x", "y"], 2, [], 2) == {0: 0, 1: 1, 2: 2}
    assert label_rows(["x", "y"], 2, [], 1000) == {2: 1000}
    assert label_rows(["a"], 4, ["a", "b"], 4) == {0: 0, 4: 4}


def test_twelve_blocks_start_at_another_size_with_the_rows_of_their_classes(
    images: Path, tmp_path: Path
) -> None:
    source = random_model(DEEP, std=0.05)
    path = save(source, tmp_path / "w.safetensors", class_names=["a", "class2", "b", "class0", "c"])
    flags = ("--model", "DiT-S/4", "--image-size", "16", "--seed", "3")
    job = job_of(images, path, *flags)
    before, after = source.state_dict(), job.model.state_dict()
    assert job.model.config == dataclasses.replace(DEEP, input_size=16, num_classes=3)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {LABELS, "pos_embed"} and after.keys() == before.keys()
    assert torch.equal(after["pos_embed"], sincos_pos_embed(4, 384))
    assert torch.equal(after[LABELS][[0, 2, 3]], before[LABELS][[3, 1, 5]])
    drawn = torch.empty(4, 384)
    initialize_parameter(LABELS, drawn, torch.Generator().manual_seed(3))
    assert torch.equal(after[LABELS][1], drawn[1])
    text = describe(job)
    assert f"{len(after) - 2} tensors of {path} as they are" in text
    assert f"{LABELS}: 2 rows taken by name, the null label's row taken, 1 drawn anew: class1" in (
        text
    )
    assert "pos_embed: computed for 4 x 4 patches" in text


def test_a_fine_tuned_start_computes_what_the_file_computes_for_a_class_of_both(
    images: Path, tmp_path: Path
) -> None:
    source = random_model(DEEP, std=0.05)
    names = ["z", "class1", "y", "class0", "x"]
    path = save(source, tmp_path / "w.safetensors", class_names=names)
    model = job_of(images, path, "--model", "DiT-S/4", "--image-size", "8").model.eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        ours, theirs = model(x, t, torch.tensor([1, 3])), source(x, t, torch.tensor([1, 5]))
    assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(("theirs", "expected"), [(1, [0]), (4, [0, 1, 2])])
def test_patch_and_output_layers_take_the_channels_that_both_have(
    images: Path, tmp_path: Path, theirs: int, expected: list[int]
) -> None:
    config = dataclasses.replace(DIGITS, in_channels=theirs, num_classes=3)
    source = random_model(config)
    path = save(source, tmp_path / "w.safetensors")
    job = job_of(images, path, "--model", "DiT-Ti/2", "--image-size", "8")
    before, after = source.state_dict(), job.model.state_dict()
    assert torch.equal(after[PATCHES][:, expected], before[PATCHES][:, expected])
    # a row of the output layer: which pixel of the patch (4), mean or variance (2), channel
    ours, given = (
        state[OUTPUT].view(4, 2, channels, 96) for state, channels in ((after, 3), (before, theirs))
    )
    assert torch.equal(ours[:, :, expected], given[:, :, expected])
    assert ours[:, :, len(expected) :].abs().sum() == 0
    assert torch.equal(after[LABELS], before[LABELS])  # as many, without names
    assert f"{PATCHES}: channels 0 to {len(expected) - 1} taken" in describe(job)


def test_a_model_without_variance_gives_its_mean_to_one_that_has_it(
    images: Path, tmp_path: Path
) -> None:
    config = dataclasses.replace(DIGITS, in_channels=3, num_classes=3, learn_sigma=False)
    source = random_model(config)
    path = save(source, tmp_path / "w.safetensors")
    job = job_of(images, path, "--model", "DiT-Ti/2", "--image-size", "8")
    ours = job.model.state_dict()[OUTPUT].view(4, 2, 3, 96)
    assert torch.equal(ours[:, 0], source.state_dict()[OUTPUT].view(4, 3, 96))
    assert ours[:, 1].abs().sum() == 0


def test_a_published_file_of_another_data_set_starts_a_run(images: Path, tmp_path: Path) -> None:
    source = random_model(DIGITS)
    path = tmp_path / "published.pt"
    torch.save(dict(to_published(source.state_dict(), flash_attention=False)), path)
    job = job_of(images, str(path), "--model", "DiT-Ti/4", "--image-size", "16")
    for name, value in job.model.state_dict().items():
        if name.startswith("blocks."):
            assert torch.equal(value, source.state_dict()[name]), name
    listed = {line.split(":")[0].strip() for line in job.start[1:]}
    assert listed == {PATCHES, OUTPUT, "final_layer.linear.bias", LABELS}  # 4 x 4 as before


def test_strict_refuses_what_would_be_drawn_anew_and_any_run_another_network(
    images: Path, tmp_path: Path
) -> None:
    same = dataclasses.replace(DIGITS, in_channels=3, num_classes=3)
    path = save(random_model(same), tmp_path / "w", class_names=["class0", "class1", "other"])
    Path(path).rename(path := f"{path}.safetensors")
    flags = ("--model", "DiT-Ti/2", "--init-strict", "--image-size")
    with pytest.raises(UserError, match="has input_size 8, this run 16"):
        job_of(images, path, *flags, "16")
    with pytest.raises(UserError, match=f"--init-strict, but {LABELS}: .*1 drawn anew: class2"):
        job_of(images, path, *flags, "8")
    with pytest.raises(UserError, match="has depth 4, this run 12"):
        job_of(images, path, "--model", "DiT-S/2", "--image-size", "8")


# ------------------------------------------------------------------------------ what is trained


def tiny(results: Path, *flags: str) -> list[str]:
    return [*TINY_RUN, "--results-dir", str(results), *flags]


def test_frozen_parameters_stay_and_rates_are_scaled_by_name(tmp_path: Path) -> None:
    flags = (
        "--freeze",
        "attn",
        "blocks.0.*.weight",
        "--lr-scale",
        "router=0.1",
        "blocks.1.moe.router=0.5",
    )
    job = prepare(build_parser(None).parse_args(tiny(tmp_path, *flags)))
    randomize(job.model)  # adaLN-Zero would hide most gradients
    before = {name: value.clone() for name, value in job.model.state_dict().items()}
    trainer = DdpTrainer(job)
    images, labels = job.dataset.__getitems__([(i, False) for i in range(8)])
    trainer.train_step([(images, labels, {})])
    moved = {
        name: (value - before[name]).abs().max().item()
        for name, value in job.model.named_parameters()
    }
    frozen = {name for name, value in job.model.named_parameters() if not value.requires_grad}
    assert frozen == {n for n in moved if "attn" in n or n == "pos_embed"} | {
        n for n in moved if n.startswith("blocks.0.") and n.endswith(".weight")
    }
    assert all((moved[name] == 0) == (name in frozen) for name in moved)
    lr = 0.001  # Adam's first step that has a gradient moves a weight by it
    assert moved["blocks.2.moe.router.weight"] == pytest.approx(0.1 * lr, rel=0.02)
    assert moved["blocks.1.moe.router.weight"] == pytest.approx(0.5 * lr, rel=0.02)
    assert moved["final_layer.linear.weight"] == pytest.approx(lr, rel=0.02)


def test_patterns_that_match_nothing_are_refused_before_any_work(tmp_path: Path) -> None:
    for flags, message in (
        (("--freeze", "atn"), "--freeze atn: no parameter has that in its name, such as"),
        (("--freeze", ""), "--freeze : nothing is left to train"),
        (("--lr-scale", "touter=0.1"), "--lr-scale touter: no parameter has that in its name"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(build_parser(None).parse_args(tiny(tmp_path, *flags)), meta=True)
    said = refusal("train.py", *tiny(tmp_path, "--lr-scale", "router"))
    assert "--lr-scale: 'router' is not PATTERN=FACTOR, such as router=0.1" in said


def test_an_optimizer_state_follows_the_names_into_other_groups(tmp_path: Path) -> None:
    job = prepare(build_parser(None).parse_args(tiny(tmp_path, "--lr-scale", "router=0.1")))
    named = [(n, p) for n, p in job.model.named_parameters() if p.requires_grad]
    old = torch.optim.AdamW([p for _, p in named])  # one group without names, as before
    for number, (_, parameter) in enumerate(named):
        parameter.grad = torch.full_like(parameter, float(number))
    old.step()
    new = torch.optim.AdamW(optimizer_groups(named, job.settings), lr=0.5)
    load_optimizer(new, old.state_dict(), [name for name, _ in named])
    assert [group["lr_scale"] for group in new.param_groups] == [1.0, 0.1]
    assert [group["lr"] for group in new.param_groups] == [0.5, 0.5]
    for number, (_, parameter) in enumerate(named):
        assert new.state[parameter]["exp_avg"].unique().item() == pytest.approx(0.1 * number)
    again = optimizer_state(new, [name for name, _ in named])
    assert_close(again["state"], old.state_dict()["state"], rtol=0, atol=0)
    with pytest.raises(ValueError, match="has other parameters than the 3 of the model"):
        load_optimizer(new, old.state_dict(), ["a", "b", "c"])


def test_a_frozen_run_with_scaled_rates_resumes_bit_for_bit(tmp_path: Path) -> None:
    flags = ("--freeze", "attn", "--lr-scale", "router=0.1", "--ckpt-every", "2")

    def train(folder: str, *more: str) -> Any:
        words = tiny(tmp_path / folder, *flags, *more)
        launch(build_parser(None).parse_args(words), DdpTrainer)

    train("whole", "--max-steps", "4")
    train("parts", "--max-steps", "2")
    train("parts", "--max-steps", "4")
    whole, parts = (
        load_checkpoint(checkpoint_path(tmp_path / name / "run", 4)) for name in ("whole", "parts")
    )
    for kind in ("model", "ema", "optimizer"):
        assert_close(parts[kind], whole[kind], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_fine_tunes_a_frozen_run_on_two_ranks_and_its_checkpoint_is_whole(
    tmp_path: Path, stage: int
) -> None:
    source = random_model(DIGITS)
    path = save(source, tmp_path / "w.safetensors", class_names=[*"9876543210"])
    flags = tiny(
        tmp_path, "--freeze", "attn", "t_embedder", "--lr-scale", "router=0.1", "final_layer=2"
    )
    engine = tmp_path / "engine.json"
    engine.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    flags += ["--val-fraction", "0.1", "--val-every", "2"]
    flags += ["--init-from", path, "--deepspeed-config", str(engine)]
    for steps in ("2", "4"):
        command = torchrun("train_deepspeed.py", *flags, "--max-steps", steps)
        output = Process(command, tmp_path / "log").wait()
    assert f"{LABELS}: its rows put in the order of this run's classes" in output
    zero = load_model(tmp_path / "run", ema=False).state_dict()
    before = source.state_dict()
    for name in zero:
        frozen = "attn" in name or "t_embedder" in name or name == "pos_embed"
        assert torch.equal(zero[name], before[name]) == frozen, name
    ddp = tmp_path / "ddp"
    words = [word for word in flags if word not in ("--deepspeed-config", flags[-1])]
    words[words.index("--results-dir") + 1] = str(ddp)
    Process(torchrun("train.py", *words, "--max-steps", "4"), tmp_path / "log").wait()
    other = load_model(ddp / "run", ema=False).state_dict()
    assert_close(zero, other, rtol=1e-3, atol=2e-4)
    curves = [
        [float(value) for value in re.findall(r"step \d: val/loss ([\d.]+)", log.read_text())]
        for log in (tmp_path / "run" / "log.txt", ddp / "run" / "log.txt")
    ]
    assert len(curves[0]) == 2 and curves[0] == pytest.approx(curves[1], rel=1e-2)
    command = [sys.executable, "train_deepspeed.py", *flags, "--freeze", "attn", "--max-steps", "6"]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2 and "attn t_embedder; give the same" in ended.stderr
