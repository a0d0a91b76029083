"""What is saved comes back, what is published loads, what is damaged or hostile is refused."""

import argparse
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers import random_model
from safetensors.torch import save_file
from torch import Tensor

from checkpoint.layouts import to_published
from checkpoint.state import (
    check_shapes,
    checkpoint_path,
    commit_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_safetensors,
)
from checkpoint.weights import load_model, load_settings
from common.errors import FileError
from common.files import atomic_write
from models import DiT, DiTConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = DiTConfig(
    input_size=4, hidden_size=16, depth=1, num_heads=2, num_classes=3, num_experts=2, qk_norm=True
)
SETTINGS = {"objective": "rf", "image_size": 32, "class_names": ["a", "b", "c"], "lr": 1e-4}


class RunsCode:
    """Unpickling this the usual way would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def tiny_model(seed: int = 0, config: DiTConfig = TINY) -> DiT:
    """Return a model whose every parameter is random, so that none can hide."""
    return random_model(config, seed=seed, frozen=True)


def save_tiny(path: Path, seed: int = 0, step: int = 1, **overrides: Any) -> Path:
    """Write a training checkpoint: model of `seed`, EMA of `seed + 1`."""
    content = {
        "config": TINY,
        "settings": SETTINGS,
        "model": tiny_model(seed).state_dict(),
        "ema": tiny_model(seed + 1).state_dict(),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": None,
        "step": step,
        "rng": [{"cpu": torch.get_rng_state()}],
    }
    save_checkpoint(path, **{**content, **overrides})
    return path


def assert_same_state(model: DiT, expected: DiT) -> None:
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def golden(name: str) -> tuple[dict[str, Any], DiTConfig]:
    data = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    dense: Any = {} if "num_experts" in data["config"] else {"num_experts": 0, "mlp_type": "gelu"}
    return data, DiTConfig(**data["config"], **dense)


# ---------------------------------------------------------------- training checkpoints


def test_a_training_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    scaler = {"scale": 65536.0, "_growth_tracker": 7}
    path = save_tiny(checkpoint_path(tmp_path, 42), step=42, scaler=scaler)
    content = load_checkpoint(path)
    assert path == tmp_path / "checkpoints" / "0000042.pt"
    assert (content["step"], content["scaler"], content["settings"]) == (42, scaler, SETTINGS)
    assert DiTConfig.from_dict(content["config"]) == TINY
    assert content["optimizer"]["state"][0]["step"].item() == 3.0
    for name, seed in (("model", 0), ("ema", 1)):
        expected = tiny_model(seed).state_dict()
        torch.testing.assert_close(content[name], expected, rtol=0, atol=0)
    torch.set_rng_state(content["rng"][0]["cpu"])


def test_a_failed_write_keeps_the_old_file_and_names_the_path(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "0000001.pt")
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # as a disk that fills up
    try:
        with pytest.raises(OSError, match=r"could not write .*0000001\.pt: .*File too large"):
            save_tiny(path, seed=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "x") as temp:
        temp.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="PosixPath"):
        save_tiny(tmp_path / "0000001.pt", settings={"data_path": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_latest_checkpoint_skips_damaged_and_temporary_files(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    whole = save_tiny(checkpoint_path(tmp_path, 999_999), step=999_999)
    cut = checkpoint_path(tmp_path, 10_000_000)  # longer name: order is by number
    cut.write_bytes(whole.read_bytes()[:-100])
    checkpoint_path(tmp_path, 20_000_000).with_suffix(".pt.tmp").write_bytes(whole.read_bytes())
    whole.with_name("best.pt").write_bytes(whole.read_bytes())
    assert latest_checkpoint(tmp_path) == whole
    cut.write_bytes(whole.read_bytes())
    assert latest_checkpoint(tmp_path) == cut


def test_pruning_keeps_the_last_ones_and_removes_leftovers(tmp_path: Path) -> None:
    paths = [save_tiny(checkpoint_path(tmp_path, step)) for step in (1, 2, 3)]
    leftover = paths[0].with_suffix(".pt.tmp")
    leftover.touch()
    commit_checkpoint(paths[2], keep_last=0)
    assert [path.exists() for path in (*paths, leftover)] == [True, True, True, False]
    commit_checkpoint(paths[2], keep_last=2)
    assert [path.exists() for path in paths] == [False, True, True]


def test_a_run_that_went_back_keeps_and_continues_what_it_wrote_last(tmp_path: Path) -> None:
    paths = [save_tiny(checkpoint_path(tmp_path, step)) for step in (10, 15, 20)]
    commit_checkpoint(paths[2], keep_last=3)
    back = save_tiny(checkpoint_path(tmp_path, 12))
    commit_checkpoint(back, keep_last=3)
    assert latest_checkpoint(tmp_path) == back
    assert [path.exists() for path in paths] == [True, False, True]
    back.write_bytes(back.read_bytes()[:-100])  # damaged: the best of its course that is left
    assert latest_checkpoint(tmp_path) == paths[0]


def test_only_our_checkpoints_can_be_resumed(tmp_path: Path) -> None:
    torch.save({"ema": tiny_model().state_dict()}, tmp_path / "published.pt")
    with pytest.raises(ValueError, match=r"can't be resumed.*ema"):
        load_checkpoint(tmp_path / "published.pt")
    torch.save({"format": "dit-moe", "version": 99}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="version 99"):
        load_checkpoint(tmp_path / "newer.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "one"}, "has version 'one', this code reads up to 1"),
        ({"version": None}, "has version None"),
        ({"step": "3"}, "its step is of another type"),
        ({"step": -1}, "its step is of another type"),
        ({"model": {"x": 3}}, "its model is of another type"),
        ({"model": [1]}, "its model is of another type"),
        ({"ema": 3}, "its ema is of another type"),
        ({"optimizer": None}, "its optimizer is of another type"),
        ({"rng": {"cpu": 3}}, "its rng is of another type"),
        ({"rng": [{}]}, "its rng is of another type"),
        ({"rng": [{"cpu": torch.zeros(3)}]}, "its rng is of another type"),
        ({"scaler": "x"}, "its scaler is of another type"),
    ],
)
def test_entries_of_other_types_are_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "0000001.pt")
    torch.save({**torch.load(path, weights_only=True), **changes}, path)
    with pytest.raises(FileError, match=message) as raised:
        load_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_the_first_tensor_that_a_model_does_not_take_is_named(tmp_path: Path) -> None:
    expected = {"a": (2, 3), "b": (4,)}
    check_shapes(tmp_path, expected, expected)
    for found, message in (
        ({"a": (2, 3)}, r"b is no such tensor, the model has \(4,\)"),
        ({**expected, "c": (1,)}, r"c is \(1,\), the model has no such tensor"),
        ({**expected, "a": (3, 2)}, r"a is \(3, 2\), the model has \(2, 3\)"),
    ):
        with pytest.raises(FileError, match=message):
            check_shapes(tmp_path, found, expected)


# ---------------------------------------------------------------- weights of ours


def test_a_run_folder_loads_its_latest_ema(tmp_path: Path) -> None:
    save_tiny(checkpoint_path(tmp_path, 1))
    save_tiny(checkpoint_path(tmp_path, 2), seed=10)
    model = load_model(tmp_path)
    assert_same_state(model, tiny_model(11))
    assert_same_state(load_model(tmp_path, ema=False), tiny_model(10))
    assert (model.config, model.training, model.pos_embed.requires_grad) == (TINY, False, False)
    assert all(p.requires_grad for name, p in model.named_parameters() if name != "pos_embed")
    assert load_settings(tmp_path) == SETTINGS


def test_without_ema_the_trained_weights_are_loaded(tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "0000001.pt", ema=None)
    assert_same_state(load_model(path), tiny_model(0))


def test_safetensors_carry_config_and_settings(tmp_path: Path) -> None:
    path, model = tmp_path / "model.safetensors", tiny_model()
    save_safetensors(path, model.state_dict(), TINY, SETTINGS)
    assert_same_state(load_model(path), model)
    assert load_model(path).config == TINY
    assert load_settings(path) == SETTINGS


def test_config_beside_bare_safetensors_is_read(tmp_path: Path) -> None:
    config = DiTConfig.from_dict({**TINY.to_dict(), "num_experts_per_tok": 1})
    save_file(tiny_model(config=config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert load_model(tmp_path / "model.safetensors").config == config


def test_loaded_weights_can_be_trained_without_touching_the_file(tmp_path: Path) -> None:
    paths = [tmp_path / "model.safetensors", save_tiny(tmp_path / "0000001.pt")]
    save_safetensors(paths[0], tiny_model().state_dict(), TINY, {})
    for path in paths:
        before = path.read_bytes()
        with torch.no_grad():
            for parameter in load_model(path).parameters():
                parameter.add_(1.0)
        assert path.read_bytes() == before


# ---------------------------------------------------------------- published layouts


def wrap(name: str, state: dict[str, Tensor]) -> Any:
    """Return `state` as the published file of that wrapper holds it."""
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    args = argparse.Namespace(model="DiT-S/2", num_experts_per_tok=2, lr=1e-4, resume=None)
    return {
        "ema": {"ema": state},
        "flat": state,
        "train": {
            "model": {f"module.{key}": tensor for key, tensor in other.items()},
            "ema": state,
            "opt": {"state": {}, "param_groups": []},
            "args": args,
        },
    }[name]


@pytest.mark.parametrize("wrapper", ["ema", "flat", "train"])
@pytest.mark.parametrize("name", ["ddpm_timm_attn_4E2A", "rf_flash_attn_qknorm_4E2A", "dense_dit"])
def test_published_weights_compute_the_golden_outputs(
    name: str, wrapper: str, tmp_path: Path
) -> None:
    data, config = golden(name)
    torch.save(wrap(wrapper, data["state_dict"]), tmp_path / "published.pt")
    told_by_shapes = None if config.qk_norm else config  # width 64 isn't a published one
    model = load_model(tmp_path / "published.pt", config=told_by_shapes)
    with torch.inference_mode():
        output = model(data["x"], data["t"], data["y"])
    torch.testing.assert_close(output, data["outputs"]["forward"], rtol=0, atol=1e-5)
    assert model.config == config
    assert load_settings(tmp_path / "published.pt") == {}


@pytest.mark.parametrize("name", ["ddpm_timm_attn_4E2A", "rf_flash_attn_qknorm_4E2A"])
def test_published_weights_compute_the_golden_guided_outputs(name: str, tmp_path: Path) -> None:
    data, config = golden(name)
    torch.save(data["state_dict"], tmp_path / "published.pt")
    model = load_model(tmp_path / "published.pt", config=config)
    x, t = torch.cat([data["x"][:2]] * 2), torch.cat([data["t"][:2]] * 2)
    y = torch.tensor([1, 3, config.null_label, config.null_label])
    with torch.inference_mode():
        output = model(x, t, y)
    cond, uncond = output[:, :3].chunk(2)
    guided = (uncond + 4.0 * (cond - uncond)).repeat(2, 1, 1, 1)
    output = torch.cat([guided, output[:, 3:]], dim=1)
    expected = data["outputs"]["forward_with_cfg_4.0_first3"]
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_the_averaged_weights_of_a_published_run_are_preferred(tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    torch.save(wrap("train", state), tmp_path / "train.pt")
    assert_same_state(load_model(tmp_path / "train.pt"), tiny_model())
    assert not load_model(tmp_path / "train.pt", ema=False).final_layer.linear.weight.any()
    torch.save(wrap("ema", state), tmp_path / "ema.pt")
    with pytest.raises(ValueError, match=r"ema=False: .* only the weights \['ema'\]"):
        load_model(tmp_path / "ema.pt", ema=False)


def test_flags_of_a_published_run_tell_the_experts_per_token(tmp_path: Path) -> None:
    args = argparse.Namespace(num_experts_per_tok=1)
    torch.save({"model": tiny_model().state_dict(), "args": args}, tmp_path / "train.pt")
    assert load_model(tmp_path / "train.pt").config.num_experts_per_tok == 1


def test_half_precision_files_keep_their_dtype_unless_asked(tmp_path: Path) -> None:
    half = dict(to_published(tiny_model().half().state_dict(), flash_attention=True))
    torch.save(half, tmp_path / "half.pt")
    assert {p.dtype for p in load_model(tmp_path / "half.pt").parameters()} == {torch.float16}
    model = load_model(tmp_path / "half.pt", dtype=torch.float32)
    assert_same_state(model, tiny_model().half().float())


def test_files_of_old_torch_versions_load(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(tiny_model().state_dict(), path, _use_new_zipfile_serialization=False)
    assert_same_state(load_model(path), tiny_model())


# ---------------------------------------------------------------- diffusers


def save_diffusers(folder: Path) -> Any:
    """Write a small random DiTTransformer2DModel with one embedder for all blocks, as DiT has."""
    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,  # what DiT was trained with; the published config.json says 1e-5
    )
    model.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first, second = (block.norm1.emb for block in model.transformer_blocks)
    second.load_state_dict(first.state_dict())
    model.save_pretrained(folder)
    return model


def test_a_diffusers_folder_computes_what_diffusers_computes(tmp_path: Path) -> None:
    theirs = save_diffusers(tmp_path)
    for block in theirs.transformer_blocks:
        # DiT was trained with frequencies 10000^(-i/128); diffusers has 10000^(-i/127) here.
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([0.0, 3.0, 977.0]), torch.tensor([0, 7, 10])
    ours = load_model(tmp_path)
    with torch.inference_mode():
        expected = theirs(x, t, y).sample
        torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-5, atol=1e-5)
    assert (ours.config.num_heads, ours.config.num_experts, ours.config.mlp_type) == (4, 0, "gelu")


def test_a_diffusers_pipeline_with_shards_loads_like_its_single_file(tmp_path: Path) -> None:
    model = save_diffusers(tmp_path / "single")
    pipeline = tmp_path / "pipeline"
    model.save_pretrained(pipeline / "transformer", max_shard_size="50KB")
    (pipeline / "model_index.json").write_text("{}")
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    assert_same_state(load_model(pipeline), load_model(tmp_path / "single"))


def test_diffusers_blocks_with_different_embedders_are_refused(tmp_path: Path) -> None:
    model = save_diffusers(tmp_path)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[3] += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.emb\.class_embedder.* differs"):
        load_model(tmp_path)


# ---------------------------------------------------------------- refusals


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path: Path) -> None:
    path, evidence = tmp_path / "hostile.pt", tmp_path / "ran"
    torch.save({"ema": tiny_model().state_dict(), "args": RunsCode(evidence)}, path)
    with pytest.raises(ValueError, match=r"hostile\.pt is refused.*posix\.mkdir"):
        load_model(path)
    assert not evidence.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable torch file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a readable torch file"),
        (b"PK\x03\x04" + bytes(1000), "damaged: cut to 1004 bytes"),
    ],
)
def test_damaged_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model\.pt is {message}"):
        load_model(tmp_path / "model.pt")


def test_damaged_safetensors_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_safetensors(path, tiny_model().state_dict(), TINY, {})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(path)


def test_unknown_contents_are_told_with_what_is_accepted(tmp_path: Path) -> None:
    torch.save({"generator": 1, "critic": 2}, tmp_path / "gan.pt")
    with pytest.raises(ValueError, match=r"\['generator', 'critic'\]; accepted are: our \.pt"):
        load_model(tmp_path / "gan.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match=r"folder with UNet2DModel; accepted are"):
        load_model(tmp_path / "folder")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("nothing.pt", "nothing.safetensors"):
        with pytest.raises(OSError, match=rf"no such file: {tmp_path}/{name}"):
            load_model(tmp_path / name)


def test_weights_that_do_not_fit_the_given_config_are_refused(tmp_path: Path) -> None:
    torch.save(tiny_model().state_dict(), tmp_path / "flat.pt")
    config = DiTConfig.from_dict({**TINY.to_dict(), "num_classes": 5})
    with pytest.raises(ValueError, match=r"flat\.pt: y_embedder.* shape \(4, 16\), .* \(6, 16\)"):
        load_model(tmp_path / "flat.pt", config=config)
