"""Weights are checked before they are used, and mapped; test_checkpoint.py has the layouts."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_model
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.described import description_path, save_description
from checkpoint.hub import save_folder
from checkpoint.layouts import by_block, known_fields, to_published
from checkpoint.state import save_checkpoint, save_safetensors
from checkpoint.weights import SafetensorsWeights, load_model, load_settings, open_weights, page_out
from common.errors import FileError, UserError
from common.process import check_memory
from models import DiT, DiTConfig

MEGABYTE = 1_000_000
TINY = DiTConfig(
    input_size=4, hidden_size=16, depth=12, num_heads=2, num_classes=3, num_experts=2
)  # without QK norm and of no published width: shapes do not tell the heads
SETTINGS = {"objective": "rf", "vae_path": "none", "class_names": ["a", "b", "c"]}


def tiny_model(config: DiTConfig = TINY) -> DiT:
    torch.manual_seed(0)
    return DiT(config).eval()


def save_as(layout: str, folder: Path, state: dict[str, Tensor], config: Any = TINY) -> Path:
    """Write weights, as a file whose config may be anything."""
    fields = config.to_dict() if isinstance(config, DiTConfig) else config
    if layout == "safetensors":
        path, metadata = folder / "x.safetensors", {"config": json.dumps(fields)}
        save_file(state, path, {"settings": json.dumps(SETTINGS), **metadata})
        return path
    if layout == "folder":
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(fields))
        return folder
    content = {"model": state, "ema": None, "settings": SETTINGS, "config": fields}
    empty: dict[str, Any] = {"optimizer": {}, "scaler": None, "step": 0, "rng": []}
    torch.save({"format": "dit-moe", "version": 1, **content, **empty}, folder / "x.pt")
    return folder / "x.pt"


LAYOUTS = ["safetensors", "folder", "checkpoint"]

# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_depth_that_the_tensors_lack_is_refused_before_a_model_is_built(
    tmp_path: Path, layout: str
) -> None:
    config = {**TINY.to_dict(), "depth": 3_000_000}
    path = save_as(layout, tmp_path, tiny_model().state_dict(), config)
    began = time.monotonic()
    with pytest.raises(FileError, match=r"holds 12 blocks, .* says 3000000"):
        load_model(path)
    assert time.monotonic() - began < 5


def test_one_block_with_a_large_number_is_no_deep_model(tmp_path: Path) -> None:
    state = tiny_model(DiTConfig(**{**TINY.to_dict(), "depth": 1, "qk_norm": True})).state_dict()
    torch.save({**state, "blocks.2999999.attn.proj.bias": torch.zeros(16)}, tmp_path / "x.pt")
    with pytest.raises(FileError, match=r"holds 2 blocks, numbered up to 2999999"):
        load_model(tmp_path / "x.pt")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, layout: str, value: float
) -> None:
    state = tiny_model().state_dict()
    state["blocks.11.moe.experts.down_proj"][1, 3, 5] = value
    path = save_as(layout, tmp_path, state)
    with pytest.raises(FileError, match=r"blocks\.11\.moe\.experts\.down_proj holds NaN or inf"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.3.attn.qkv.weight": torch.zeros(48, 15)}, r"has shape \(48, 15\), .* \(48, 16\)"),
        ({"blocks.3.attn.qkv.weight": None}, r"lacks blocks\.3\.attn\.qkv\.weight"),
        ({"x_embedder.proj.bias": None}, r"lacks x_embedder\.proj\.bias"),
        ({"blocks.3.attn.extra": torch.zeros(2)}, r"no tensor blocks\.3\.attn\.extra"),
        ({"blocks.3.attn.proj.bias": torch.zeros(16).long()}, r"proj\.bias holds torch\.int64"),
    ],
)
def test_the_first_tensor_that_does_not_fit_the_config_is_named(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    state = {k: v for k, v in (tiny_model().state_dict() | change).items() if v is not None}
    with pytest.raises(FileError, match=message) as caught:
        load_model(save_as("safetensors", tmp_path, state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(10**9, 10**9),
        torch.zeros(4, 4).to_sparse(),
        torch.zeros(10**9, 10**6, device="meta"),
    ],
)
def test_a_tensor_that_claims_more_values_than_it_stores_is_refused(
    tmp_path: Path, tensor: Tensor
) -> None:
    state = tiny_model().state_dict() | {"blocks.0.attn.proj.bias": tensor}
    torch.save(state, tmp_path / "flat.pt")
    torch.save({"ema": state}, tmp_path / "wrapped.pt")
    save_as("checkpoint", tmp_path, state)
    for name in ("flat.pt", "wrapped.pt", "x.pt"):
        with pytest.raises(UserError, match=rf"{name}( has a dict|.* holds only the weights)"):
            load_model(tmp_path / name)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: Any) -> None:
    (tmp_path / "in").mkdir()
    path = save_as("folder", tmp_path / "in", tiny_model().state_dict())
    (path / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": dict.fromkeys(tiny_model().state_dict(), name)}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        FileError, match=r"index\.json(: weight_map names no files| names .*, which)"
    ):
        load_model(path)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1, 2], r"\[1, 2\] is not an object"),
        ("text", r'"text" is not an object'),
        ({**TINY.to_dict(), "depth": "12"}, r'depth "12" is not int'),
        ({**TINY.to_dict(), "num_heads": 2.0}, "num_heads 2.0 is not int"),
        ({**TINY.to_dict(), "qk_norm": 1}, "qk_norm 1 is not bool"),
        ({**TINY.to_dict(), "mlp_ratio": True}, "mlp_ratio true is not float"),
        ({**TINY.to_dict(), "num_heads": 3}, "num_heads=3"),
        ({**TINY.to_dict(), "wings": 2}, r"unknown DiTConfig fields \['wings'\]"),
    ],
)
def test_a_config_of_wrong_types_is_one_line(
    tmp_path: Path, layout: str, config: Any, message: str
) -> None:
    path = save_as(layout, tmp_path, tiny_model().state_dict(), config)
    with pytest.raises(UserError, match=message) as caught:
        load_model(path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"\[\] is not an object"),
        ({"objective": "gan"}, "objective 'gan' is neither rf nor ddpm"),
        ({"class_names": "abc"}, 'class_names "abc" is not a list'),
        ({"class_names": [1]}, "class_names 1 is not a text"),
        ({"vae_path": {"a": 1}}, r'vae_path {"a": 1} is not a text'),
    ],
)
def test_settings_of_wrong_types_are_one_line(tmp_path: Path, settings: Any, message: str) -> None:
    metadata = {"config": json.dumps(TINY.to_dict()), "settings": json.dumps(settings)}
    save_file(tiny_model().state_dict(), tmp_path / "x.safetensors", metadata)
    with pytest.raises(FileError, match=message):
        load_settings(tmp_path / "x.safetensors")


def test_a_damaged_json_is_named(tmp_path: Path) -> None:
    path = save_as("folder", tmp_path, tiny_model().state_dict())
    for content in (b"{", b"\xff", b"[" * 100_000):
        (path / "config.json").write_bytes(content)
        with pytest.raises(FileError, match=r"config\.json (is damaged|cannot be read)"):
            load_model(path)


def test_a_position_table_that_fits_no_machine_is_refused(tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    del state["pos_embed"]
    path = save_as("safetensors", tmp_path, state, {**TINY.to_dict(), "input_size": 2_000_000})
    with pytest.raises(UserError, match=r"input_size 2000000 needs .* GiB of memory"):
        load_model(path)


def test_what_no_machine_holds_is_refused_and_what_it_holds_is_not() -> None:
    check_memory(2**20, "--flag 1")
    with pytest.raises(UserError, match=r"--flag 9 needs 1,048,576 GiB of memory, this machine"):
        check_memory(2**50, "--flag 9")


# ------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("flash_attention", [True, False])
def test_the_config_beside_a_published_file_makes_it_load_without_flags(
    tmp_path: Path, flash_attention: bool
) -> None:
    config = DiTConfig(**{**TINY.to_dict(), "num_experts_per_tok": 1})
    model = tiny_model(config)
    torch.save(
        dict(to_published(model.state_dict(), flash_attention=flash_attention)), tmp_path / "p.pt"
    )
    with pytest.raises(UserError, match=r"p\.pt: num_heads can't be told .*: give --model"):
        load_model(tmp_path / "p.pt")
    save_description(tmp_path / "p.pt", config, SETTINGS)
    loaded = load_model(tmp_path / "p.pt")
    assert loaded.config == config and load_settings(tmp_path / "p.pt") == SETTINGS
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "another"}', "\xff"])
def test_a_json_of_somebody_else_beside_a_published_file_is_left_alone(
    tmp_path: Path, content: str
) -> None:
    config = DiTConfig(**{**TINY.to_dict(), "qk_norm": True})
    torch.save(tiny_model(config).state_dict(), tmp_path / "p.pt")
    description_path(tmp_path / "p.pt").write_text(content, encoding="latin-1")
    assert load_model(tmp_path / "p.pt").config == config


def test_the_name_of_a_size_tells_the_heads() -> None:
    assert known_fields("DiT-Ti/2", num_experts_per_tok=None) == {"num_heads": 4}
    assert known_fields("DiT-XL/2", num_heads=3) == {"num_heads": 3}
    assert known_fields(num_experts_per_tok=1) == {"num_experts_per_tok": 1}


def test_a_run_folder_tells_which_checkpoint_was_opened(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "0000007.pt"
    save_checkpoint(
        path, config=TINY, settings=SETTINGS, model=tiny_model().state_dict(), ema=None,
        optimizer={}, scaler=None, step=7, rng=[],
    )  # fmt: skip
    assert open_weights(tmp_path).path == path
    save_safetensors(tmp_path / "x.safetensors", tiny_model().state_dict(), TINY, {})
    assert open_weights(tmp_path / "x.safetensors").path == tmp_path / "x.safetensors"
    groups = (tensors for _, tensors in by_block(tiny_model().state_dict()))
    save_folder(tmp_path / "folder", groups, TINY, {})
    assert open_weights(tmp_path / "folder").path == tmp_path / "folder"


# ------------------------------------------------------------------------------ mapping


def resident(path: Path) -> int:
    """Return how many bytes of a file this process has mapped and in memory."""
    found, is_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):  # a mapping's head: its addresses, ..., its file
            is_file = rest[-1] == str(path)
        elif is_file and first == "Rss:":
            found += int(rest[0]) * 1024
    return found


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, Tensor]:
    """Write a tensor of 8 MB; returns the file and the tensor mapped from it."""
    path = tmp_path / "weights.safetensors"
    save_file({"weight": torch.randn(2 * MEGABYTE)}, path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # what is not on disk yet stays in memory
    return path, SafetensorsWeights({"weight": path})["weight"]


def test_a_mapped_tensor_takes_memory_when_it_is_used(mapped: tuple[Path, Tensor]) -> None:
    path, tensor = mapped
    before = resident(path)
    tensor.sum()
    assert before < MEGABYTE and resident(path) >= tensor.nbytes


def test_paging_out_gives_the_memory_back_and_the_values_are_read_again(
    mapped: tuple[Path, Tensor],
) -> None:
    path, tensor = mapped
    expected = tensor.clone()
    page_out([tensor])
    assert resident(path) < MEGABYTE
    assert torch.equal(tensor, expected)
    assert resident(path) >= tensor.nbytes


def test_paging_out_what_no_file_holds_loses_nothing() -> None:
    tensors = [torch.randn(MEGABYTE), torch.randn(3), torch.randn(0)]
    expected = [tensor.clone() for tensor in tensors]
    neighbours = torch.randn(100_000)
    part, whole = neighbours[7:90_000], neighbours.clone()
    page_out([*tensors, part])
    for tensor, values in zip([*tensors, neighbours], [*expected, whole], strict=True):
        assert torch.equal(tensor, values)


def test_weights_of_the_hub_are_found_where_they_were_downloaded_and_else_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    model = random_model()
    (snapshot / "config.json").write_text(json.dumps(model.config.to_dict()))
    save_safetensors(snapshot / "model.safetensors", model.state_dict(), model.config, {})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    for path in ("owner/name", "owner/name/model.safetensors"):
        assert open_weights(path).config == model.config
    with pytest.raises(FileError, match=r"no such file: other/name; as a hub id .*OFFLINE is set"):
        open_weights("other/name")
    (tmp_path / "results").mkdir()
    with pytest.raises(FileError, match=r"no such file: results/typo$"):  # the hub is not asked
        open_weights("results/typo")
