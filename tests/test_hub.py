"""Layouts convert into each other without a loss, and the hub reads what we write."""

import argparse
import dataclasses
import functools
import re
import resource
from pathlib import Path
from typing import Any

import helpers
import huggingface_hub
import pytest
import torch

import convert
from checkpoint.layouts import to_ours, to_published
from checkpoint.state import checkpoint_path, save_checkpoint, save_safetensors
from checkpoint.weights import load_model, load_settings
from common.errors import FileError, UserError
from common.files import DamagedFileError, verify_file
from common.process import DTYPES
from models import DiT, DiT_models, DiTConfig

GOLDEN = Path(__file__).parent / "golden"
TINY = dataclasses.replace(helpers.TINY, in_channels=1)
SETTINGS = {"objective": "rf", "vae_path": "none", "class_names": ["a", "b", "c"]}


def random_model(config: DiTConfig = TINY) -> DiT:
    return helpers.random_model(config, frozen=True)


def same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=0, atol=0)


def run(*arguments: object) -> None:
    """Run `python convert.py ARGUMENTS` in this process."""
    helpers.run_main(convert, *arguments)


def saved(folder: Path) -> Path:
    model = random_model()
    save_safetensors(folder / "ours.safetensors", model.state_dict(), TINY, SETTINGS)
    return folder / "ours.safetensors"


# ---------------------------------------------------------------- layouts


def test_weights_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "folder")
    (tmp_path / "any").touch()
    for file in (tmp_path / "ours.safetensors", tmp_path / "folder" / "model.safetensors"):
        assert file.stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.parametrize(
    ("name", "attention"),
    [("ddpm_timm_attn_4E2A", "qkv"), ("rf_flash_attn_qknorm_4E2A", "Wqkv"), ("dense_dit", "qkv")],
)
def test_published_to_ours_to_published_is_the_identity_for_golden_files(
    tmp_path: Path, name: str, attention: str
) -> None:
    published = torch.load(GOLDEN / f"{name}.pt", weights_only=True)["state_dict"]
    heads = torch.load(GOLDEN / f"{name}.pt", weights_only=True)["config"]["num_heads"]
    torch.save(published, tmp_path / "published.pt")
    run(tmp_path / "published.pt", tmp_path / "ours", "--num-heads", heads)
    run(tmp_path / "ours", tmp_path / "back.pt", "--attention", attention)
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    same(back.get("ema", back), published)
    assert ("ema" in back) == (name == "ddpm_timm_attn_4E2A")  # as the S and B files


def test_the_two_attention_spellings_and_all_our_formats_hold_the_same_weights(
    tmp_path: Path,
) -> None:
    chain = [saved(tmp_path)]
    for name in ("x.pt", "folder", "y.pt", "z.safetensors"):
        flags = ("--attention", "qkv") if name == "y.pt" else ()
        run(chain[-1], tmp_path / name, *flags)
        chain.append(tmp_path / name)
    expected = random_model().state_dict()
    for path in chain:
        same(load_model(path, config=TINY).state_dict(), expected)
    run(chain[0], tmp_path / "direct")
    assert load_settings(tmp_path / "direct") == SETTINGS


@pytest.mark.slow
def test_published_to_ours_to_published_is_the_identity_for_s_2_8e2a_at_full_size() -> None:
    torch.manual_seed(0)
    published = dict(to_published(DiT_models["DiT-S/2"]().state_dict(), flash_attention=False))
    assert sum(tensor.numel() for tensor in published.values()) == 199_307_552
    ours = dict(to_ours(published))
    assert len(ours) < len(published)
    same(to_published(ours, flash_attention=False), published)


def test_a_published_train_checkpoint_with_a_namespace_converts_without_running_code(
    tmp_path: Path,
) -> None:
    model = random_model()
    state = dict(to_published(model.state_dict(), flash_attention=False))
    args = argparse.Namespace(model="DiT-S/2", num_experts_per_tok=2)
    content = {"model": {"module." + n: t for n, t in state.items()}, "ema": state, "opt": {}}
    torch.save({**content, "args": args}, tmp_path / "train.pt")
    run(tmp_path / "train.pt", tmp_path / "ours")
    same(load_model(tmp_path / "ours").state_dict(), model.state_dict())


def test_conversion_casts_but_keeps_the_router_in_float32(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "half", "--dtype", "float16")
    dtypes = {n: t.dtype for n, t in load_model(tmp_path / "half").state_dict().items()}
    assert dtypes["blocks.0.moe.router.weight"] == torch.float32
    assert dtypes["blocks.0.moe.experts.down_proj"] == torch.float16


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_nothing_is_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = saved(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(FileError, match=f"{name} exists already"):
        run(source, tmp_path / name)
    assert (tmp_path / name).read_bytes() == b""


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp_type": "gelu", "norm_topk_prob": True}, "mlp_type='gelu', norm_topk_prob=True"),
        ({"num_experts": 0, "qk_norm": False}, "mlp_type='swiglu', qk_norm=False"),
        ({"num_experts": 0, "mlp_type": "gelu"}, "mlp_type='gelu', qk_norm=True"),
    ],
)
def test_what_the_published_code_cannot_compute_is_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    config = DiTConfig.from_dict({**TINY.to_dict(), **fields})
    save_safetensors(tmp_path / "x.safetensors", random_model(config).state_dict(), config, {})
    with pytest.raises(UserError, match=message):
        run(tmp_path / "x.safetensors", tmp_path / "x.pt")
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_published_file_can_be_told_its_experts_per_token(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "published.pt")
    (tmp_path / "published.json").unlink()
    run(tmp_path / "published.pt", tmp_path / "ours", "--num-experts-per-tok", "3")
    assert load_model(tmp_path / "ours").config.num_experts_per_tok == 3
    assert load_model(tmp_path / "published.pt").config.num_experts_per_tok == 2


def test_half_weights_are_written_in_float32(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "half", "--dtype", "bfloat16")
    run(tmp_path / "half", tmp_path / "exported.safetensors", "--dtype", "fp32")
    expected = {n: t.float() for n, t in load_model(tmp_path / "half").state_dict().items()}
    same(load_model(tmp_path / "exported.safetensors").state_dict(), expected)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_file_is_written_a_block_at_a_time_in_any_dtype_and_can_be_mapped(
    tmp_path: Path, dtype: str
) -> None:
    """Channels and patch of 1 make a bias of one number, after which others would be misaligned."""
    small = {"patch_size": 1, "learn_sigma": False}
    config = DiTConfig.from_dict({**TINY.to_dict(), **small, "depth": 12})
    model = random_model(config)
    save_safetensors(tmp_path / "ours.safetensors", model.state_dict(), config, SETTINGS)
    run(tmp_path / "ours.safetensors", tmp_path / "out.safetensors", "--dtype", dtype)
    expected = load_model(tmp_path / "ours.safetensors", dtype=DTYPES[dtype]).state_dict()
    found = load_model(tmp_path / "out.safetensors").state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: t.dtype for n, t in expected.items()}
    same(found, expected)
    assert all(tensor.data_ptr() % tensor.itemsize == 0 for tensor in found.values())
    assert load_settings(tmp_path / "out.safetensors") == SETTINGS
    assert verify_file(tmp_path / "out.safetensors")


def test_a_run_becomes_one_file_of_its_averaged_or_its_trained_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, averaged = random_model(), random_model()
    averaged.load_state_dict({n: 2 * t for n, t in trained.state_dict().items()})
    save_checkpoint(
        checkpoint_path(tmp_path / "run", 1), config=TINY, settings=SETTINGS, step=1,
        model=trained.state_dict(), ema=averaged.state_dict(), optimizer={}, scaler=None, rng=[],
    )  # fmt: skip
    run(tmp_path / "run", tmp_path / "ema.safetensors")
    run(tmp_path / "run", tmp_path / "raw.safetensors", "--ema", "False")
    same(load_model(tmp_path / "ema.safetensors").state_dict(), averaged.state_dict())
    same(load_model(tmp_path / "raw.safetensors").state_dict(), trained.state_dict())
    lines = capsys.readouterr().out.splitlines()
    assert "averaged weights of" in lines[0] and "trained weights of" in lines[1]
    assert "0000001.pt" in lines[0]


def test_a_published_file_of_any_width_comes_back_by_the_config_beside_it(tmp_path: Path) -> None:
    config = DiTConfig.from_dict({**TINY.to_dict(), "qk_norm": False, "num_experts_per_tok": 1})
    source, state = tmp_path / "x.safetensors", random_model(config).state_dict()
    save_safetensors(source, state, config, SETTINGS)
    run(source, tmp_path / "p.pt")
    assert load_model(tmp_path / "p.pt").config == config
    assert load_settings(tmp_path / "p.pt") == SETTINGS
    (tmp_path / "p.json").rename(tmp_path / "q.json")
    with pytest.raises(UserError, match=r"num_heads can't be told .*give --model"):
        run(tmp_path / "p.pt", tmp_path / "again")
    run(tmp_path / "p.pt", tmp_path / "again", "--num-heads", "2", "--num-experts-per-tok", "1")
    assert load_model(tmp_path / "again").config == config
    (tmp_path / "r.json").write_text("mine")
    with pytest.raises(FileError, match=r"r\.json exists already"):
        run(source, tmp_path / "r.pt")
    assert not (tmp_path / "r.pt").exists()


@pytest.mark.parametrize("source", ["ours.safetensors", "folder", "run", "published.pt"])
def test_a_flipped_bit_is_found_before_anything_is_written(tmp_path: Path, source: str) -> None:
    run(saved(tmp_path), tmp_path / "folder")
    run(tmp_path / "folder", tmp_path / "published.pt")
    state = random_model().state_dict()
    weights = checkpoint_path(tmp_path / "run", 1)
    save_checkpoint(
        weights, config=TINY, settings=SETTINGS, step=1, model=state, ema=None,
        optimizer={}, scaler=None, rng=[],
    )  # fmt: skip
    inside = {"folder": Path("folder/model.safetensors"), "run": weights}
    file = tmp_path / inside.get(source, Path(source))
    content = bytearray(file.read_bytes())
    needle = state["blocks.1.attn.qkv.weight"].numpy().tobytes()[:64]
    content[content.index(needle) + 13] ^= 4
    file.write_bytes(content)
    with pytest.raises(DamagedFileError, match=rf"{file.name} is damaged"):
        run(tmp_path / source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    if file.suffix == ".safetensors":  # compared whenever they are loaded
        with pytest.raises(DamagedFileError, match=rf"{file.name} is damaged"):
            load_model(tmp_path / source)


@pytest.mark.parametrize(
    ("dst", "flags", "message"),
    [
        ("x.pt", ["--pipeline"], "--pipeline writes a folder"),
        ("x", ["--attention", "qkv"], "--attention qkv: only of a .pt"),
        ("x", ["--vae-path", "none"], "--vae-path none: only with --pipeline"),
        ("ours.safetensors/x", [], "ours.safetensors is no folder"),
    ],
)
def test_a_destination_that_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, dst: str, flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path)
    monkeypatch.setattr("convert.open_weights", None)  # it is not called
    with pytest.raises(UserError, match=re.escape(message)):
        run(source, tmp_path / dst, *flags)


def test_a_flag_that_contradicts_the_config_is_refused(tmp_path: Path) -> None:
    for flag, told in (("--num-heads", "4"), ("--num-experts-per-tok", "1")):
        with pytest.raises(UserError, match=rf"{flag} {told}: .*ours\.safetensors has 2"):
            run(saved(tmp_path), tmp_path / "x", flag, told)
    with pytest.raises(UserError, match=r"--model DiT-S/2 has hidden_size 384, .* has 32"):
        run(saved(tmp_path), tmp_path / "x", "--model", "DiT-S/2")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    source = saved(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # as a disk that fills up
    try:
        with pytest.raises(FileError, match=rf"{name}.*: .*File too large"):
            run(source, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [file.name for file in tmp_path.iterdir()] == ["ours.safetensors"]


# ---------------------------------------------------------------- huggingface_hub


@pytest.mark.parametrize("mlp_type", ["swiglu", "gelu"])
def test_save_pretrained_and_from_pretrained_are_inverse(tmp_path: Path, mlp_type: str) -> None:
    config = DiTConfig.from_dict({**TINY.to_dict(), "mlp_type": mlp_type})
    model = random_model(config)
    model.save_pretrained(tmp_path / "hub")
    for loaded in (DiT.from_pretrained(tmp_path / "hub"), load_model(tmp_path / "hub")):
        assert loaded.config == config and not loaded.training
        assert not loaded.pos_embed.requires_grad
        same(loaded.state_dict(), model.state_dict())


def test_what_our_weights_tell_survives_the_hub(tmp_path: Path) -> None:
    run(saved(tmp_path), tmp_path / "folder")
    DiT.from_pretrained(tmp_path / "folder").save_pretrained(tmp_path / "hub")
    load_model(tmp_path / "hub").save_pretrained(tmp_path / "again")
    assert load_settings(tmp_path / "again") == SETTINGS


def test_what_our_weights_tell_survives_the_hub_in_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = functools.partial(huggingface_hub.save_torch_state_dict, max_shard_size=30_000)
    monkeypatch.setattr("models.save_torch_state_dict", split)
    load_model(saved(tmp_path)).save_pretrained(tmp_path / "hub")
    assert (tmp_path / "hub" / "model.safetensors.index.json").is_file()
    assert load_settings(tmp_path / "hub") == SETTINGS
    assert DiT.from_pretrained(tmp_path / "hub").settings == SETTINGS


def test_from_pretrained_reads_a_sharded_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint.hub.SHARD_BYTES", 30_000)
    run(saved(tmp_path), tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors.index.json").is_file()
    loaded = DiT.from_pretrained(tmp_path / "folder")
    same(loaded.state_dict(), random_model().state_dict())


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    def upload_folder(_self: Any, *, folder_path: Path, **_: Any) -> str:
        uploaded["names"] = sorted(file.name for file in Path(folder_path).iterdir())
        return "commit"

    created: Any = argparse.Namespace(repo_id="me/tiny")
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.create_repo", lambda *_, **__: created)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi.upload_folder", upload_folder)
    assert random_model().push_to_hub("me/tiny") == "commit"
    assert {"config.json", "model.safetensors"} <= set(uploaded["names"])
