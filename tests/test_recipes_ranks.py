"""Each recipe trains on two ranks as on one with twice the batch, balance and all."""

import functools
from collections.abc import Callable

import pytest
import torch
from deepspeed_worker import State, make_updates
from launch import REPO, Process, torchrun
from recipes_worker import BALANCE, CASES, flags_of
from torch.testing import assert_close

FAST = ("promoe",)
OWN = {"loss", "capacity_loss"}  # of the main rank's images; curves have the mean of all ranks
Updates = dict[tuple[str | None, str], list[State]]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Updates]:
    """Return what makes the updates of the fast recipes, or of the others."""

    @functools.cache
    def updates(fast: bool) -> Updates:
        folder = tmp_path_factory.mktemp("worker")
        recipes = [recipe for recipe in BALANCE if (recipe in FAST) == fast]
        worker = (str(REPO / "tests/recipes_worker.py"), str(folder / "out.pt"), str(folder))
        Process(torchrun(*worker, *recipes), folder / "log.txt").wait(600)
        return torch.load(folder / "out.pt", weights_only=True)

    return updates


@functools.cache
def on_one_rank(recipe: str) -> list[State]:
    return make_updates(None, *flags_of(recipe))


def test_every_recipe_is_here() -> None:
    names = {path.stem for path in (REPO / "config/recipes").glob("*.yaml")}
    assert names - {"best"} == BALANCE.keys()  # that is one of them, tuned


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "recipe",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in BALANCE],
)
def test_two_ranks_make_the_updates_of_one_rank_with_twice_the_batch(
    case: str | None, recipe: str, on_two_ranks: Callable[[bool], Updates]
) -> None:
    found, expected = on_two_ranks(recipe in FAST)[case, recipe], on_one_rank(recipe)
    assert any(name.endswith("_loss") for name in expected[-1].keys() - OWN)
    state = {name for name in expected[-1] if name.endswith(("expert_bias", "thresholds"))}
    assert all(expected[-1][name].any() for name in state)
    for ours, theirs in zip(found, expected, strict=True):
        assert {name for name in state if name.startswith("weights/")} <= ours.keys()
        values = {name for name in ours if "/" not in name} - OWN
        for names, rtol, atol in ((values, 1e-5, 0), (ours.keys() - values - OWN, 0, 1e-6)):
            pair = ({name: one[name] for name in names} for one in (ours, theirs))
            assert_close(*pair, rtol=rtol, atol=atol)
