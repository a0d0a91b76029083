"""Flags become settings once the data is known, and a run's name says what makes it another run."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from launch import TINY_RUN

from training.flags import build_parser
from training.job import Job, prepare
from training.settings import default_run_name, split_batch


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, *flags])


def tiny_job(results: Path, *flags: str) -> Job:
    return prepare(parse("--results-dir", str(results), "--max-steps", "4", *flags), meta=True)


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("flags", "world_size", "expected"),
    [
        ([], 1, (24, 1)),
        ([], 4, (6, 1)),
        (["--accum-steps", "3"], 2, (4, 3)),
        (["--micro-batch-size", "4"], 2, (4, 3)),
        (["--micro-batch-size", "4", "--accum-steps", "3"], 2, (4, 3)),
    ],
)
def test_the_batch_is_split_over_ranks_and_passes(
    flags: list[str], world_size: int, expected: tuple[int, int]
) -> None:
    assert split_batch(parse("--global-batch-size", "24", *flags), world_size) == expected


@pytest.mark.parametrize(
    ("flags", "world_size", "message"),
    [
        ([], 5, "--global-batch-size 24 is not a multiple of 5 ranks"),
        (["--accum-steps", "5"], 1, "24 is not --micro-batch-size 4 x --accum-steps 5 x 1 ranks"),
        (["--micro-batch-size", "5"], 1, "24 is not --micro-batch-size 5 x --accum-steps 4 x"),
        (["--micro-batch-size", "48"], 1, "24 is not --micro-batch-size 48 x"),
        (["--accum-steps", "48"], 1, "24 is less than --accum-steps 48 x 1 ranks"),
    ],
)
def test_batch_sizes_that_do_not_fit_are_refused(
    flags: list[str], world_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        split_batch(parse("--global-batch-size", "24", *flags), world_size)


def test_data_decides_classes_size_vae_and_workers(tmp_path: Path) -> None:
    job = tiny_job(tmp_path)
    resolved = job.settings
    assert resolved.class_names == [*"0123456789"]
    assert (resolved.image_size, resolved.vae_path, resolved.num_workers) == (8, "none", 0)
    config = job.model.config
    assert (config.input_size, config.in_channels, config.num_classes) == (8, 1, 10)
    assert not (tmp_path / "run").exists()


def test_fewer_classes_than_the_data_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--num-classes 9 is less than the 10 classes of"):
        tiny_job(tmp_path, "--num-classes", "9")


def test_epochs_and_max_steps_end_a_run_whichever_is_first(tmp_path: Path) -> None:
    flags = ("--global-batch-size", "100", "--epochs", "2")  # 14 steps an epoch
    assert tiny_job(tmp_path, *flags, "--max-steps", "1000").settings.max_steps == 28
    assert tiny_job(tmp_path, *flags, "--max-steps", "3").settings.max_steps == 3


def test_settings_cannot_be_changed_and_flags_are_left_as_given(tmp_path: Path) -> None:
    args = parse("--results-dir", str(tmp_path))
    before = dict(vars(args))
    settings: Any = prepare(args, meta=True).settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.lr = 1.0
    assert vars(args) == before


def test_saved_settings_are_plain_json_with_the_keys_of_before(tmp_path: Path) -> None:
    saved = tiny_job(tmp_path).settings.to_dict()
    assert json.loads(json.dumps(saved)) == saved
    only_asked = {"dry_run", "rf"}  # of the command; the objective tells the second
    given = set(vars(parse())) - only_asked
    found = {"objective", "class_names", "data_fingerprint", "latent_stats"}
    assert given | found == set(saved) - {"deepspeed_config", "ema_decays"}
    assert saved["objective"] == "rf"


# ------------------------------------------------------------------------------ run name

# Another value for each flag, by whether it makes another run.
OTHER_RUN = {
    "data_path": "fashion-mnist",
    "image_size": "16",
    "fashion_mnist_root": "folder",
    "flip": "True",
    "vae_path": "other/vae",
    "latent_norm": "channel",
    "val_fraction": "0.1",
    "model": "DiT-Ti/4",
    "num_classes": "11",
    "class_dropout_prob": "0.2",
    "qk_norm": "True",
    "init_from": "other.pt",
    "num_experts": "16",
    "num_experts_per_tok": "1",
    "num_shared_experts": "1",
    "mlp_ratio": "2",
    "mlp_type": "gelu",
    "moe_blocks": "deep_half",
    "first_k_dense_replace": "1",
    "dense_mlp_ratio": "2",
    "unconditional_expert": "True",
    "affinity": "sigmoid",
    "selection": "expert_choice",
    "capacity": "2",
    "exact_thresholds": "True",
    "norm_topk_prob": "True",
    "routed_scaling_factor": "2.5",
    "balance": "z_loss",
    "qk_norm_eps": "1e-5",
    "rope": "True",
    "norm": "rms",
    "aux_loss_weight": "0.01",
    "contrastive_loss_weight": "10",
    "z_loss_weight": "0.01",
    "capacity_loss_weight": "0.1",
    "bias_update_rate": "0.01",
    "aux_loss_scope": "rank",
    "time_scale": "1000",
    "time_shift": "3",
    "time_sampling": "mode 1.2",
    "prediction": "v",
    "zero_terminal_snr": "True",
    "min_snr_gamma": "5",
    "repa": "timm:vit_tiny_patch16_224",
    "repa_block": "2",
    "repa_loss_weight": "1",
    "rf": "True",
    "global_batch_size": "64",
    "lr": "0.00010000001",
    "warmup_steps": "10",
    "lr_schedule": "cosine",
    "min_lr": "1e-5",
    "decay_steps": "10",
    "optimizer": "muon",
    "adam_betas": "0.9 0.95",
    "adam_eps": "1e-7",
    "weight_decay": "0.1",
    "clip_grad": "0",
    "ema_decay": "0.99",
    "precision": "fp32",
    "seed": "1",
    "freeze": "attn",
    "lr_scale": "router=0.1",
}
SAME_RUN = {
    "skip_broken": "True",
    "num_workers": "1",
    "flash_attn": "True",
    "micro_batch_size": "4",
    "accum_steps": "2",
    "grad_checkpointing": "True",
    "compile": "True",
    "results_dir": "elsewhere",
    "run_name": "name",
    "resume": "never",
    "allow_new_data": "True",
    "epochs": "3",
    "max_steps": "3",
    "stop_after": "3",
    "log_every": "3",
    "ckpt_every": "3",
    "keep_last": "1",
    "sample_every": "3",
    "sample_cfg_scale": "3",
    "tracker": "wandb",
    "dry_run": "True",
    "init_strict": "True",
    "expert_parallel": "2",
    "val_path": "test",
    "val_every": "3",
    "eval_every": "3",
    "eval_samples": "30",
    "eval_features": "classifier",
    "inception_weights": "file.pth",
    "keep_best": "True",
}
BASE = {"data_path": "digits", "model": "DiT-Ti/2"}
SEVERAL = ("adam_betas", "time_sampling")  # flags of several values


def name_of(**flags: str) -> str:
    words: list[str] = []
    for name, value in (BASE | flags).items():
        spelling = f"--{name.replace('_', '-')}"
        words += [spelling, *value.split()] if name in SEVERAL else [f"{spelling}={value}"]
    return default_run_name(build_parser(None).parse_args(words))


def test_every_flag_is_known_to_make_another_run_or_not() -> None:
    assert set(vars(parse())) == OTHER_RUN.keys() | SAME_RUN.keys()
    assert not OTHER_RUN.keys() & SAME_RUN.keys()


def test_a_sweep_over_any_flag_that_changes_the_training_has_names_of_its_own() -> None:
    names = {name_of(), *(name_of(**{name: value}) for name, value in OTHER_RUN.items())}
    assert len(names) == len(OTHER_RUN) + 1


@pytest.mark.parametrize("name", SAME_RUN)
def test_limits_and_machine_flags_leave_the_name_as_it_is(name: str) -> None:
    assert name_of(**{name: SAME_RUN[name]}) == name_of()


def test_a_run_name_reads_as_its_command() -> None:
    assert name_of() == "DiT-Ti-2-ddpm-digits-lr0.0001-seed0"
    assert name_of(lr="1e-4", seed="0", global_batch_size="256") == name_of()
    flags = {"num_experts": "8", "num_experts_per_tok": "2", "rf": "True", "qk_norm": "False"}
    name = name_of(**flags, mlp_ratio="0.5", global_batch_size="64", precision="fp32")
    assert name == "DiT-Ti-2-8E2A-rf-digits-lr0.0001-seed0-noqknorm-mlp0.5-batch64-fp32"


def test_folders_of_one_name_have_runs_of_their_own_whatever_way_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "train images").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    first, second = (name_of(data_path=f"{parent}/train images") for parent in "ab")
    assert first != second and first[:-8] == second[:-8]
    assert first.startswith("DiT-Ti-2-ddpm-train-images-lr0.0001-seed0-")
    assert name_of(data_path=str(tmp_path / "a" / "train images")) == first
    assert name_of(data_path="a/train images/") == first


def test_pixels_and_latents_of_a_folder_are_other_runs(tmp_path: Path) -> None:
    assert name_of(data_path=str(tmp_path)) != name_of(data_path=str(tmp_path), vae_path="none")


def test_a_run_name_is_one_short_file_name_whatever_the_flags(tmp_path: Path) -> None:
    hostile = "../" + "über lang \n$(rm)" * 30
    name = name_of(**OTHER_RUN | {"data_path": hostile})
    assert len(name.encode()) <= 200 and "/" not in name and name.isprintable()
    (tmp_path / name).mkdir()
    assert name_of(**OTHER_RUN | {"data_path": hostile, "seed": "2"}) != name
