"""A file gives flags, the command line wins, and the recipes are such files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import refusal
from launch import REPO, TINY_RUN

from checkpoint.families import has_family
from common.errors import UserError
from models import DiT_models
from training.flags import build_parser
from training.job import describe, prepare
from training.settings import default_run_name

RECIPES = sorted((REPO / "config/recipes").glob("*.yaml"))
DATA = ("--data-path", "digits")
# Registered sizes of which a recipe says all.
PUBLISHED = {
    "promoe": "ProMoE-B/2",
    "promoe_ec": "ProMoE-EC-B/2",
    "ec_dit": "EC-DiT-L/2",
    "diffmoe": "DiffMoE-B/2",
    "dit_moe": "DiT-G/2",
}


def parse(*words: str) -> Any:
    return build_parser(None).parse_args([*DATA, *words])


def write(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
    return str(path)


@pytest.mark.parametrize("ending", ["json", "yaml", "yml"])
def test_a_file_means_what_its_flags_mean(ending: str, tmp_path: Path) -> None:
    content = {"rf": True, "num_experts": 4, "lr": 0.5, "balance": ["switch", "z_loss"]}
    path = write(tmp_path / f"f.{ending}", content | {"qk-norm": False, "vae-path": None})
    words = ("--rf", "--num-experts", "4", "--lr", "0.5", "--balance", "switch", "z_loss")
    assert parse("--config", path) == parse(f"--config={path}") == parse(*words, "--qk-norm=False")


def test_the_command_line_wins_wherever_the_file_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", {"lr": 0.5, "balance": ["switch", "z_loss"], "rf": True})
    for words in (("--lr", "2", "--config", path), ("--config", path, "--lr", "2")):
        args = parse(*words, "--balance", "none", "--rf", "False")
        assert (args.lr, args.balance, args.rf) == (2.0, ["none"], False)
    second = write(tmp_path / "g.yaml", {"lr": 3})
    assert parse("--config", path, "--config", second).lr == 3.0


def test_numbers_without_a_point_are_numbers_although_yaml_reads_texts(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("lr: 1e-3\nclip_grad: 1\nbalance: none\n")
    args = parse("--config", str(tmp_path / "f.yaml"))
    assert (args.lr, args.clip_grad, args.balance) == (0.001, 1.0, ["none"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num-exprts": 4}, "unknown name 'num-exprts'; did you mean num-experts?"),
        ({"config": "g.yaml"}, "unknown name 'config'"),
        ({"lr": {"start": 1}}, 'lr is {"start": 1}, which no flag takes'),
        ([1], "is no list of flag names and values"),
        ({1: 2}, "is no list of flag names and values"),
    ],
)
def test_what_is_no_flag_is_refused_by_its_name(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        parse("--config", write(tmp_path / "f.yaml", content))
    assert message in str(error.value) and str(tmp_path / "f.yaml") in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("f.txt", "", "must end in .json, .yaml or .yml"),
        ("f.json", "{", "is damaged"),
        ("f.yaml", "a: [", "is damaged"),
        ("f.yaml", None, "cannot be read"),
    ],
)
def test_files_that_are_none_are_refused(
    name: str, text: str | None, message: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(OSError, match=message):
        parse("--config", str(tmp_path / name))


def test_a_mistake_in_a_file_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "f.yaml", {"afinity": "cosine"})
    line = refusal("train.py", *TINY_RUN, "--config", path)
    assert f"{path}: unknown name 'afinity'; did you mean affinity?" in line


def test_a_runs_own_settings_are_such_a_file(tmp_path: Path) -> None:
    words = [*TINY_RUN, "--results-dir", str(tmp_path), "--max-steps", "4", "--balance", "none"]
    before = prepare(build_parser(None).parse_args(words), meta=True).settings
    path = write(tmp_path / "args.json", before.to_dict())
    args = build_parser(None).parse_args(["--config", path])
    assert prepare(args, meta=True).settings == before
    larger = build_parser(None).parse_args(["--config", path, "--global-batch-size", "16"])
    settings = prepare(larger, meta=True).settings
    assert (settings.micro_batch_size, settings.accum_steps) == (8, 2)


def test_settings_of_the_first_version_are_such_a_file_too(tmp_path: Path) -> None:
    old = {"rf": True, "objective": "rf", "dry_run": False, "class_names": ["a"], "lr": 0.001}
    old |= {"model": "DiT-Ti/2", "data_path": "digits", "data_fingerprint": {}, "init_from": None}
    args = build_parser(None).parse_args(["--config", write(tmp_path / "args.json", old)])
    assert (args.rf, args.model, args.lr, args.data_path) == (True, "DiT-Ti/2", 0.001, "digits")


# ------------------------------------------------------------------------------ recipes


def test_every_family_has_a_recipe() -> None:
    names = {path.stem for path in RECIPES}
    assert names == {"dit_moe", "promoe", "promoe_ec", "ec_dit", "diffmoe", "dsmoe", "best"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_and_has_a_run_name_of_its_own(path: Path, tmp_path: Path) -> None:
    words = ("--config", str(path), "--model", "DiT-Ti/2", "--results-dir", str(tmp_path))
    job = prepare(parse(*words), meta=True)
    config, content = job.model.config.to_dict(), yaml.safe_load(path.read_text())
    for name, value in content.items():
        field = name.replace("-", "_")
        if field == "balance":
            assert config[field] == (() if value == "none" else (value,))
        elif field != "rf":
            assert {**job.settings.to_dict(), **config}[field] == value
    names = {default_run_name(parse("--config", str(p), *words[2:])) for p in RECIPES}
    assert len(names) == len(RECIPES)


EXPERTS = {  # of a block, the unconditional one too; those that a token uses
    "dit_moe": (8, 2),
    "dsmoe": (8, 2),
    "promoe": (13, 1),
    "promoe_ec": (13, 1),
    "ec_dit": (8, 1),
    "diffmoe": (8, 1),
}


@pytest.mark.parametrize("recipe", EXPERTS)
def test_a_dry_run_counts_all_experts_and_those_that_a_token_uses(
    recipe: str, tmp_path: Path
) -> None:
    path = str(REPO / f"config/recipes/{recipe}.yaml")
    words = ("--config", path, "--model", "DiT-S/2", "--results-dir", str(tmp_path), "--dry-run")
    job = prepare(parse(*words, "--num-classes", "10"), meta=True)
    total, activated = job.num_parameters
    config, (experts, used) = job.model.config, EXPERTS[recipe]
    width, matrices = config.mlp_hidden_size, 3 if config.mlp_type == "swiglu" else 2
    biases = config.mlp_type == "gelu"
    one = matrices * 384 * width + biases * (width + 384)
    layers = sum(config.is_moe_block(block) for block in range(12))
    assert total - activated == layers * (experts - used) * one
    assert total == sum(tensor.numel() for tensor in job.model.parameters())
    assert f"parameters: {total:,} total, {activated:,} activated" in describe(job)


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_says_what_the_registered_size_is(recipe: str) -> None:
    size = PUBLISHED[recipe]
    path = str(REPO / f"config/recipes/{recipe}.yaml")
    job = prepare(parse("--config", path, "--model", size, "--num-classes", "1000"), meta=True)
    with torch.device("meta"):
        expected = DiT_models[size](input_size=8, in_channels=1).config
    assert job.model.config == expected


@pytest.mark.parametrize("recipe", [name for name in PUBLISHED if name != "dit_moe"])
def test_a_recipe_with_qk_norm_on_a_size_of_ours_is_still_a_published_network(
    recipe: str,
) -> None:
    words = ("--config", str(REPO / f"config/recipes/{recipe}.yaml"), "--model", "DiT-Ti/2")
    normed = prepare(parse(*words, "--qk-norm", "True"), meta=True).model.config
    assert (normed.qk_norm, normed.qk_norm_eps) == (True, 1e-5)
    assert has_family(normed)
    assert "eps" not in default_run_name(parse(*words))  # of nothing there
    assert "eps1e-05" in default_run_name(parse(*words, "--qk-norm", "True"))
