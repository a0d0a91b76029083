"""The experiment of recipes: equal activation, its order, and what it writes of its runs."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recipes
import torch
from PIL import Image

from models import DiT, DiT_models, DiTConfig, TopKRouter
from training.flags import build_parser
from training.settings import NETWORK_FLAGS


def config_of(variant: str) -> DiTConfig:
    """Return the model that a variant's flags describe."""
    args = build_parser(None).parse_args(recipes.train_flags(variant, seed=0, steps=6000))
    fields = {name: getattr(args, name) for name in NETWORK_FLAGS}
    if fields["balance"] is not None:
        fields["balance"] = tuple(term for term in fields["balance"] if term != "none")
    given = {name: value for name, value in fields.items() if value is not None}
    with torch.device("meta"):
        return DiT_models[args.model](input_size=32, in_channels=1, num_classes=10, **given).config


@pytest.mark.parametrize("variant", [name for name in recipes.VARIANTS if name != "wide"])
def test_a_token_passes_mlps_as_wide_as_denses(variant: str) -> None:
    assert recipes.activated_width(config_of(variant)) == pytest.approx(2.0, rel=0.01)


@pytest.mark.parametrize("variant", recipes.VARIANTS)
def test_no_mixture_has_more_experts_than_the_wide_model_stands_for(variant: str) -> None:
    config, wide = config_of(variant), config_of("wide")
    if variant == "dense":
        return
    shared = config.num_shared_experts * config.hidden_size if config.num_experts else 0
    everything = max(config.num_experts, 1) * config.mlp_hidden_size + shared
    assert everything <= wide.mlp_hidden_size == 17 * config.hidden_size


def test_the_headroom_and_the_recipes_come_before_other_seeds_and_choices() -> None:
    order = recipes.in_order([0, 1])
    assert order[:3] == [("dense", 0), ("wide", 0), ("dit_moe", 0)]
    assert order.index(("dense", 1)) == len(recipes.FIRST)
    assert order.index(("sigmoid", 0)) == 2 * len(recipes.FIRST)
    assert len(order) == 2 * len(recipes.VARIANTS)


def write_run(docs: Path, variant: str, seed: int, loss: float, **more: Any) -> None:
    """Write the values of a run, and its row of samples."""
    curve = {"1000": 2 * loss, "900": 9.0, "2000": loss}  # by steps, which are words in JSON
    values = {"variant": variant, "seed": seed, "width": 2.0, "parameters": 10**6}
    values |= {"fd": 100 * loss, "read_right": 0.5, "test_loss": curve}
    (docs / f"{variant}-seed{seed}.json").write_text(json.dumps(values | more))
    Image.fromarray(np.zeros((32, 640), np.uint8)).save(docs / f"{variant}-seed{seed}.png")


def test_the_page_says_shares_of_the_headroom_and_what_was_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = tmp_path / "results" / "recipes"
    docs.mkdir(parents=True)
    page = tmp_path / "RECIPES.md"
    page.write_text(f"before\n{recipes.BEGIN}\nold\n{recipes.END}\nafter\n")
    monkeypatch.setattr(recipes, "PAGE", page)
    for seed, dense in enumerate((0.20, 0.22)):
        write_run(docs, "dense", seed, dense)
    write_run(docs, "wide", 0, 0.16)
    write_run(docs, "promoe", 0, 0.17, max_vio=0.5, dead=0.0, experts_per_token=1.01)

    recipes.write_page(docs)

    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    rows = {row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
            for row in text.splitlines() if re.match(r"\| \w", row)}  # fmt: skip
    assert rows["dense"][4] == "0.2100 ± 0.0141"
    assert rows["promoe"][3:8] == ["1", "0.1700", "", "75%", "17.0"]
    assert rows["promoe"][8:] == ["0.85", "0.500", "1.01", "0.50", "0.00"]
    assert {len(row) for row in rows.values()} == {13}
    assert rows["diffmoe"][1] == "not run yet"
    assert set(rows) - {"variant"} == set(recipes.VARIANTS)
    assert (tmp_path / "results" / "recipes_curves.png").exists()
    assert Image.open(tmp_path / "results" / "recipes_samples.png").height > 3 * 32


def test_experts_of_a_token_are_counted_at_every_forward() -> None:
    config = DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2, num_experts=4,
                       selection="batch_choice", balance=(), num_classes=3)  # fmt: skip
    model = DiT(config).eval()
    found = recipes.count_experts(model)
    batch = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1])
    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    for router, threshold in zip(routers, (0.0, 1.0), strict=True):
        router.thresholds.fill_(threshold)  # all are above, none is
    model(*batch)
    assert found == [4.0, 0.0]


def test_a_run_that_is_measured_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "dense", 0, 0.2)
    monkeypatch.setattr(recipes, "call", lambda *_: pytest.fail("it was"))
    flags = ["run", "dense", "0", "--docs", str(tmp_path), "--results", str(tmp_path)]
    recipes.main(recipes.build_flags().parse_args(flags))
