"""A dense network becomes each family of mixtures: exact where it can be, and it says how far."""

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import moe_of, random_model, refusal, run_main
from launch import REPO
from torch import Tensor

import upcycle
from checkpoint.state import save_safetensors
from checkpoint.weights import load_model
from models import DiT, DiTConfig
from training.flags import build_parser as training_parser
from training.job import initial_weights, prepare

DENSE = DiTConfig(
    input_size=8, patch_size=2, in_channels=1, hidden_size=48, depth=12, num_heads=2,
    num_classes=10, num_experts=0, mlp_type="gelu",
)  # fmt: skip
FAMILIES = ("dit_moe", "promoe", "promoe_ec", "ec_dit", "diffmoe", "dsmoe")
WHOLE = ("--shared", "whole", "--num-shared-experts", "4")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DiT]:
    model, path = random_model(DENSE, std=0.1), tmp_path_factory.mktemp("dense") / "d.safetensors"
    save_safetensors(path, model.state_dict(), model.config, {"objective": "rf"})
    return path, model


def recipe(family: str) -> tuple[str, str]:
    return "--config", str(REPO / f"config/recipes/{family}.yaml")


@torch.no_grad()
def outputs(model: DiT) -> Tensor:
    """Predict for images with a class and for two without."""
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return model.eval()(x, torch.tensor([0.1, 0.4, 0.6, 0.9]), torch.tensor([0, 10, 9, 10]))


def difference(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_network_is_every_family_exactly_if_the_shared_expert_is_all_of_it(
    family: str, dense: tuple[Path, DiT], tmp_path: Path
) -> None:
    path, source = dense
    run_main(upcycle, "--ckpt", path, "--out", tmp_path / "moe", *recipe(family), *WHOLE)
    result = load_model(tmp_path / "moe")
    assert difference(outputs(result), outputs(source)) < 1e-5
    for index in filter(result.config.is_moe_block, range(12)):
        experts = moe_of(result, index).experts
        assert not experts.down_proj.any() and experts.up_proj.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recipe_as_it_is_starts_near_the_dense_network_and_says_how_near(
    family: str, dense: tuple[Path, DiT], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, source = dense
    args = upcycle.build_parser().parse_args(
        ["--ckpt", str(path), "--out", str(tmp_path / "moe"), *recipe(family)]
    )
    upcycle.main(args)
    said = capsys.readouterr().out
    found = float(said.split("differ from the source's by ")[1].split()[0])
    result = load_model(tmp_path / "moe")
    expected = training_parser(None).parse_args(["--data-path", "digits", *recipe(family)])
    for name in ("num_experts", "affinity", "selection", "unconditional_expert", "moe_blocks"):
        if (value := getattr(expected, name)) is not None:
            assert getattr(result.config, name) == value
    if expected.mlp_ratio is not None:
        assert result.config.mlp_ratio == expected.mlp_ratio
    error = difference(outputs(result), outputs(source))
    if family == "dsmoe":  # weights that sum to 2.5, by which the copies are divided
        assert found < 1e-5 and error < 1e-5
    else:
        assert 1e-3 < found < 2 and error < 1
    if result.config.unconditional_expert:
        assert float(said.split("unconditional one serves: ")[1].split()[0]) < 1e-5
    for index in range(12):  # of those between, nothing is changed
        if not result.config.is_moe_block(index):
            name = f"blocks.{index}.mlp.fc1.weight"
            assert torch.equal(result.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("affinity", ["softmax", "sigmoid", "cosine"])
def test_weights_that_are_normalised_and_scaled_keep_the_output(
    affinity: str, dense: tuple[Path, DiT], tmp_path: Path
) -> None:
    path, source = dense
    flags = ("--affinity", affinity, "--routed-scaling-factor", "2.5", "--balance", "bias")
    more = ("--granularity", "2", "--num-shared-experts", "2", "--shared", "split")
    run_main(upcycle, "--ckpt", path, "--out", tmp_path / "moe", *flags, *more)
    result = load_model(tmp_path / "moe")
    assert (result.config.affinity, result.config.balance) == (affinity, ("bias",))
    assert difference(outputs(result), outputs(source)) < 1e-5


def test_thresholds_begin_where_sampling_takes_as_many_tokens_as_training(
    dense: tuple[Path, DiT], tmp_path: Path
) -> None:
    path, _ = dense
    run_main(upcycle, "--ckpt", path, "--out", tmp_path / "moe", *recipe("diffmoe"))
    model = load_model(tmp_path / "moe")
    router = moe_of(model, 1).router
    tokens = torch.randn(64, 64, 48, generator=torch.Generator().manual_seed(1))
    taken = (router.eval()(tokens).expert_indices < 8).float().sum(dim=1).mean().item()
    assert router.thresholds.min() > 0 and taken == pytest.approx(1.0, rel=0.1)


def test_a_run_starts_from_an_upcycled_family_by_its_recipe(
    dense: tuple[Path, DiT], tmp_path: Path
) -> None:
    source = random_model(dataclasses.replace(DENSE, hidden_size=96, depth=4, num_heads=4))
    path = tmp_path / "dense.safetensors"
    save_safetensors(path, source.state_dict(), source.config, {"objective": "rf"})
    run_main(upcycle, "--ckpt", path, "--out", tmp_path / "moe", *recipe("promoe"))
    flags = ["--data-path", "digits", "--model", "DiT-Ti/2", *recipe("promoe"), "--time-scale", "1"]
    args = training_parser(None).parse_args([*flags, "--init-from", str(tmp_path / "moe")])
    job = prepare(args, meta=True)
    expected = load_model(tmp_path / "moe").state_dict()
    shapes = {name: tensor.shape for name, tensor in job.model.state_dict().items()}
    first = dict(initial_weights(job.settings, job.model.config, shapes))
    torch.testing.assert_close(first, dict(expected), rtol=0, atol=0)


def test_flags_that_make_no_mixture_are_named(dense: tuple[Path, DiT], tmp_path: Path) -> None:
    path, _ = dense
    out = ("--ckpt", path, "--out", tmp_path / "out")
    for flags, said in (
        (("--selection", "expert_choice", "--balance", "switch"), "'switch' means nothing with"),
        (("--shared", "whole", "--num-shared-experts", "2"), "expected 4, the width of the"),
        (("--mlp-ratio", "3"), "--mlp-ratio 3: experts are cut from 4 D of the source's MLP"),
    ):
        assert said in refusal("upcycle.py", *out, *flags)
    assert not (tmp_path / "out").exists()
