"""ZeRO changes where things are kept, not what is trained: the real engine on two gloo ranks."""

import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from deepspeed_worker import CASES, engine_file
from helpers import save_tiny_vae
from launch import REPO, TINY_RUN, Process, descendants, free_port, torchrun
from PIL import Image
from torch.testing import assert_close

import convert
import upcycle
from checkpoint.sharded import ShardedCheckpoint
from checkpoint.state import latest_checkpoint, load_checkpoint, save_safetensors
from checkpoint.weights import load_model
from common.files import DamagedFileError
from models import DiT_models
from training.flags import build_parser
from training.job import prepare
from training.memory import GIB
from training.reporter import draw_grid

CKPT_EVERY, MAX_STEPS = 3, 9
RUN = (*TINY_RUN, "--ckpt-every", str(CKPT_EVERY), "--log-every", "1")
FULL_RUN = (*RUN, "--max-steps", str(MAX_STEPS))


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"{step:07d}"


def command(folder: Path, *flags: str, case: str = "stage 3") -> list[str]:
    """Return the script and its flags: a run in `folder` with the engine file of a case."""
    return [
        *("train_deepspeed.py", "--deepspeed-config", engine_file(case, folder)),
        *("--results-dir", str(folder), *flags),
    ]


def assert_same_end(run: Path, expected: Path) -> None:
    """Compare all that the ranks saved at the end, bit for bit."""
    for rank in range(2):
        ours, theirs = (
            checkpoint(r, MAX_STEPS) / f"{rank:05d}.safetensors" for r in (run, expected)
        )
        assert ours.read_bytes() == theirs.read_bytes()


# ------------------------------------------------------------------------------ equal to train.py


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("worker")
    worker = torchrun(str(REPO / "tests/deepspeed_worker.py"), str(folder / "out.pt"), str(folder))
    Process(worker, folder / "log.txt").wait(seconds=600)
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.parametrize("case", CASES)
def test_every_stage_makes_the_updates_and_the_ema_of_train_py(
    case: str, on_two_ranks: dict[str, Any]
) -> None:
    updates = on_two_ranks["updates"]
    for ours, theirs in zip(updates[case, "fp32"], updates[None, "fp32"], strict=True):
        assert_close(ours, {name: theirs[name] for name in ours}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES[1:])
def test_every_stage_makes_the_updates_of_train_py_in_bfloat16_to_its_precision(
    case: str, on_two_ranks: dict[str, Any]
) -> None:
    (first, last), (_, expected) = (on_two_ranks["updates"][key, "bf16"] for key in (case, None))
    weights = [name for name in last if name.startswith(("weights", "ema"))]
    moved = torch.cat([(last[n] - first[n]).flatten() for n in weights]).norm()
    error = torch.cat([(last[n] - expected[n]).flatten() for n in weights]).norm()
    assert error < 0.05 * moved
    assert_close(last["loss"], expected["loss"], rtol=1e-2, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_every_stage_chooses_the_experts_of_train_py_in_bfloat16(
    case: str, on_two_ranks: dict[str, Any]
) -> None:
    (chosen, tables), (expected, expected_tables) = (
        on_two_ranks["routing"][key] for key in (case, None)
    )
    assert torch.equal(tables, expected_tables) and tables.dtype == torch.float32
    if "3" in case:  # its linear layers round before and after they add the bias
        assert (chosen == expected).float().mean() > 0.99
    else:
        assert torch.equal(chosen, expected)


@pytest.mark.parametrize("case", ["stage 0", "stage 2"])
def test_the_first_update_in_bfloat16_is_that_of_train_py(
    case: str, on_two_ranks: dict[str, Any]
) -> None:
    (ours, _), (expected, _) = (on_two_ranks["updates"][key, "bf16"] for key in (case, None))
    assert_close(ours, {name: expected[name] for name in ours}, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [None, *CASES[:3]])
def test_a_gradient_that_overflows_float16_moves_only_the_scale_and_can_be_saved(
    case: str | None, on_two_ranks: dict[str, Any]
) -> None:
    facts, expected = (on_two_ranks["float16"][key] for key in (case, None))
    assert not facts["moved"] and facts["step and skipped"] == (0, 1)
    assert facts["scale"] == 2.0**39 and facts["resumed"] == (0, 1, 2.0**39)
    assert facts["then"] == (1, 1)
    for name in ("loss", "aux_loss", "grad_norm"):
        assert facts[name] == pytest.approx(expected[name], rel=5e-3)


def test_deepspeed_still_has_every_private_name_that_we_use(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["missing names"] == []


@pytest.mark.parametrize("case", [*CASES[1:], "--init-from"])
def test_sharded_building_starts_from_the_weights_of_one_process(
    case: str, on_two_ranks: dict[str, Any]
) -> None:
    assert on_two_ranks["initial difference"][case] == 0.0


def test_ranks_with_different_experts_train_20_zero_3_steps(on_two_ranks: dict[str, Any]) -> None:
    (first, second), loss = on_two_ranks["different experts"]  # (L, E) each
    assert (first[:, 2:] == 0).all() and (second[:, :2] == 0).all()
    assert first.sum() == second.sum() > 0
    assert loss > 0


@pytest.mark.parametrize("case", CASES)
def test_the_memory_plan_is_what_a_run_holds(case: str, on_two_ranks: dict[str, Any]) -> None:
    memory = on_two_ranks["memory"][case]
    assert memory["found"] == {name: memory["expected"][name] for name in memory["found"]}


@pytest.mark.slow
def test_a_run_starts_from_an_upcycled_folder_with_the_loss_of_train_py(tmp_path: Path) -> None:
    dense = DiT_models["DiT-Ti/2"](
        input_size=8, in_channels=1, num_classes=10, num_experts=0, mlp_ratio=0.5, mlp_type="gelu"
    )
    for parameter in dense.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_safetensors(tmp_path / "dense.safetensors", dense.state_dict(), dense.config, {})
    made = ["--ckpt", str(tmp_path / "dense.safetensors"), "--out", str(tmp_path / "moe")]
    upcycle.main(upcycle.build_parser().parse_args([*made, "--num-experts", "4"]))
    start = ("--init-from", str(tmp_path / "moe"), "--lr", "0", "--max-steps", "1")
    flags = (*RUN, *start, "--results-dir", str(tmp_path))
    ours = torchrun(*command(tmp_path, *flags), nproc=1)
    zero_run = Process(ours, tmp_path / "zero.txt").wait()
    expected = load_model(tmp_path / "moe")
    assert expected.config.mlp_type == "gelu" and expected.config.norm_topk_prob
    for ema in (False, True):
        found = load_model(tmp_path / "run", ema=ema)
        assert found.config == expected.config
        assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    ddp = [sys.executable, "train.py", *flags, "--run-name", "ddp"]
    assert losses(zero_run) == losses(Process(ddp, tmp_path / "ddp.txt").wait())


# ------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two ZeRO-3 ranks to the end, which draws with the averaged weights."""
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = (*FULL_RUN, "--sample-every", str(MAX_STEPS), "--keep-last", "2")
    output = Process(torchrun(*command(folder, *flags)), folder / "log.txt").wait()
    assert "872,840 total" in output
    return folder / "run"


def test_the_last_checkpoints_are_kept_and_latest_names_the_last(undisturbed: Path) -> None:
    names = sorted(item.name for item in (undisturbed / "checkpoints").iterdir())
    assert names == ["0000006", "0000009", "latest"]
    assert latest_checkpoint(undisturbed) == checkpoint(undisturbed, MAX_STEPS)


def test_an_exported_file_draws_the_picture_of_the_runs_own_ema(
    undisturbed: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "ema.safetensors")
    convert.main(convert.build_parser().parse_args([str(undisturbed), out]))
    model = load_model(tmp_path / "ema.safetensors")
    job = prepare(build_parser(None).parse_args([*FULL_RUN, "--results-dir", str(tmp_path)]))
    ours = Image.open(draw_grid(model, job, MAX_STEPS))
    theirs = Image.open(undisturbed / "samples" / f"{MAX_STEPS:07d}.png")
    assert ours.tobytes() == theirs.tobytes()
    assert_close(load_model(undisturbed).state_dict(), model.state_dict(), rtol=0, atol=0)


def test_an_export_is_ema_or_weights_and_has_every_tensor(
    undisturbed: Path, tmp_path: Path
) -> None:
    states = {}
    for ema, flags in ((True, []), (False, ["--ema", "False"])):
        out = str(tmp_path / f"{ema}.safetensors")
        convert.main(convert.build_parser().parse_args([str(undisturbed), out, *flags]))
        states[ema] = load_model(out, ema=False).state_dict()
    assert states[True].keys() == states[False].keys()
    assert not torch.equal(states[True]["x_embedder.proj.weight"],
                           states[False]["x_embedder.proj.weight"])  # fmt: skip


def losses(log: str) -> dict[int, float]:
    """Return the loss by step from a run's log."""
    return {int(s): float(v) for s, v in re.findall(r"step (\d+): loss ([\d.]+)", log)}


@pytest.mark.parametrize("case", ["stage 0", "stage 2"])  # of a run at stage 3
def test_one_rank_continues_two_ranks_run_and_at_another_stage(
    case: str, undisturbed: Path, tmp_path: Path
) -> None:
    # At a rate of zero the weights stay those of the checkpoint, and the loss is theirs.
    start = checkpoint(undisturbed, 6)
    flags = (*RUN, "--max-steps", "8", "--lr", "0", "--resume", str(start))
    script = command(tmp_path, *flags, case=case)
    output = Process([sys.executable, *script], tmp_path / "log.txt").wait()
    assert f"{start} is from 2 ranks, this run has 1" in output
    ours, theirs = ShardedCheckpoint(checkpoint(tmp_path / "run", 8)), ShardedCheckpoint(start)
    for name in theirs.shapes:
        assert torch.equal(ours.read("model", name), theirs.read("model", name))
    expected = losses((undisturbed / "log.txt").read_text())
    assert losses(output)[7] == pytest.approx(expected[7], rel=0.2)
    assert losses(output)[7] < expected[1]


def kill_a_rank(process: Process, run: Path, moment: str) -> float:
    """Kill one of two ranks: at a random moment after the first checkpoint, or while it saves.

    Returns:
        When, in seconds of the monotonic clock.
    """
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    step, delay, rank = (
        draw.randint(CKPT_EVERY, MAX_STEPS - 3),
        draw.uniform(0, 0.3),
        draw.choice([0, 1]),
    )
    print(f"KILL_SEED={seed}: SIGKILL of rank {rank} {delay:.3f} s after step {step}")
    log, saving = run / "log.txt", f"checkpoints/{2 * CKPT_EVERY:07d}.*.partial"
    deadline = time.monotonic() + 180
    while not (
        any(run.glob(saving)) if moment == "saving"
        else log.exists() and f"step {step}:" in log.read_text()
    ):  # fmt: skip
        assert time.monotonic() < deadline and process.popen.poll() is None
        time.sleep(0.001)
    time.sleep(delay if moment == "random" else 0)
    os.kill(descendants(process.popen.pid)[rank], signal.SIGKILL)
    return time.monotonic()


def test_a_killed_rank_ends_the_other_and_a_restart_reaches_the_same_weights(
    undisturbed: Path, tmp_path: Path
) -> None:
    launched = torchrun("--max-restarts=1", *command(tmp_path, *FULL_RUN))
    process = Process(launched, tmp_path / "log.txt")
    kill_a_rank(process, tmp_path / "run", "random")
    assert "resumed" in process.wait()
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["random", "saving"])
def test_a_rank_killed_at_any_moment_ends_the_run_and_the_same_command_continues(
    moment: str, undisturbed: Path, tmp_path: Path
) -> None:
    launched = torchrun(*command(tmp_path, *FULL_RUN))
    process = Process(launched, tmp_path / "killed.txt")
    killed = kill_a_rank(process, tmp_path / "run", moment)
    assert process.popen.wait(60) != 0 and time.monotonic() - killed < 60
    assert "resumed" in Process(launched, tmp_path / "resumed.txt").wait()
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_full_disk_ends_the_run_says_so_and_leaves_the_last_checkpoint(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    flags = (*RUN, "--max-steps", str(MAX_STEPS + 1))
    process = Process(torchrun(*command(tmp_path, *flags)), tmp_path / "log.txt")
    while len(ranks := descendants(process.popen.pid)) < 2:
        time.sleep(0.01)
    resource.prlimit(ranks[1], resource.RLIMIT_FSIZE, (10**6, 10**6))  # a disk that fills up
    assert process.popen.wait(180) != 0
    last = checkpoint(run, MAX_STEPS)
    said = rf"could not write .*0000010\.\w+\.partial/00001.*; the last whole checkpoint is {last}"
    assert re.search(said, process.log.read_text())
    assert latest_checkpoint(run) == last and not list(run.glob("checkpoints/*.partial"))
    assert_same_end(run, undisturbed)


def test_the_trainers_refuse_each_others_checkpoints(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"sharded checkpoint: resume it with train_deepspeed"):
        load_checkpoint(checkpoint(undisturbed, MAX_STEPS))


def test_a_missing_share_is_named(undisturbed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(checkpoint(undisturbed, MAX_STEPS), tmp_path / "copy"))
    (copy / "00001.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"incomplete: no 00001\.safetensors"):
        ShardedCheckpoint(copy)


# ------------------------------------------------------------------------------ commands


@pytest.fixture(scope="module")
def published_flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the published command's flags with our paths and sizes."""
    folder = tmp_path_factory.mktemp("inputs")
    for label in range(2):
        (folder / "images" / str(label)).mkdir(parents=True)
        for index in range(2):
            Image.new("RGB", (64, 64), (80 * label, 90 * index, 0)).save(
                folder / "images" / str(label) / f"{index}.png"
            )
    return [
        *("--model", "DiT-Ti/2", "--num_experts", "8", "--num_experts_per_tok", "2"),
        *("--data-path", str(folder / "images"), "--vae-path", str(save_tiny_vae(folder / "vae"))),
        *("--train_batch_size", "4", "--image-size", "64", "--num-workers", "0"),
        *("--max-steps", "2", "--sample-every", "0", "--run-name", "run"),
    ]


def test_the_published_command_runs_with_torch_distributed_launch(
    published_flags: list[str], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.launch", "--nnodes=1"]
    script = ["train_deepspeed.py", "--deepspeed_config", "config/zero2.json", *published_flags]
    ours = ["--results-dir", str(tmp_path), "--rf", "True"]
    Process([*launcher, "--nproc_per_node=2", *script, *ours], tmp_path / "log.txt").wait()
    state = ShardedCheckpoint(checkpoint(tmp_path / "run", 2)).state
    assert state["settings"]["objective"] == "rf" and state["num_ranks"] == 2
    assert "local_rank" not in state["settings"]  # the launcher gives it, nobody reads it


@pytest.mark.slow
def test_the_deepspeed_launcher_runs_zero_3_with_offload(
    published_flags: list[str], tmp_path: Path
) -> None:
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus=2"]
    address = ["--master_port", free_port()]
    script = [
        *("train_deepspeed.py", "--deepspeed_config", "config/zero3_offload.json"),
        *("--grad-checkpointing", "--rf"),
    ]
    flags = [*script, *published_flags, "--results-dir", str(tmp_path)]
    Process([*launcher, *address, *flags], tmp_path / "log.txt").wait()
    assert ShardedCheckpoint(checkpoint(tmp_path / "run", 2)).state["num_ranks"] == 2


def test_a_dry_run_plans_g_for_several_numbers_of_ranks(
    published_flags: list[str], tmp_path: Path
) -> None:
    flags = [*published_flags, "--model", "DiT-G/2", "--num_experts", "16"]
    sizes = ["--num-classes", "1000", "--image-size", "256", "--train_batch_size", "64"]
    ours = ["--results-dir", str(tmp_path / "none"), "--dry-run", "--plan-ranks", "8", "64"]
    script = [sys.executable, "train_deepspeed.py", *flags, *sizes, *ours]
    output = Process(script, tmp_path / "log.txt").wait()
    assert "parameters: 16,503,731,232 total, 3,181,573,152 activated" in output
    table = [line.split() for line in output.splitlines()]
    assert [row[:2] for row in table if row[1:2] == ["3"]] == [["8", "3"], ["64", "3"]]
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------ a big model


@pytest.mark.slow
def test_a_billion_parameters_step_on_two_ranks_with_half_of_a_whole_copy_each(
    tmp_path: Path,
) -> None:
    available = psutil.virtual_memory().available
    if available < 19 * GIB:
        pytest.skip(f"needs 19 GiB of free memory, there are {available / GIB:.1f}")
    worker = torchrun(str(REPO / "tests/big_model_worker.py"), str(tmp_path))
    Process(worker, tmp_path / "log.txt").wait(seconds=1200)
    for rank in range(2):
        figures = json.loads((tmp_path / f"{rank}.json").read_text())
        # Whole, in float32: weights, gradients, both moments and the EMA take 20 bytes a parameter.
        assert figures["parameters"] > 10**9
        assert figures["built"] - figures["start"] < 10 * figures["parameters"]
        assert figures["stepped"] < 13 * figures["parameters"]
