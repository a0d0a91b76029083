"""Training is the same on any number of ranks, micro-batches and restarts."""

import errno
import os
import random
import shutil
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import spoil_gradients
from launch import REPO, TINY_RUN, Process, free_port, torchrun
from torch import Tensor
from torch.testing import assert_close
from train_worker import (
    State,
    global_batch,
    gradients_of_step,
    grid_of_twelve_blocks,
    make_trainer,
    make_updates,
    micro_batches,
    train_on_disjoint_experts,
)

from checkpoint.state import checkpoint_path, latest_checkpoint, load_checkpoint
from common.errors import UserError
from training import loop as train_loop
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.loop import launch

CKPT_EVERY, MAX_STEPS = 4, 40
STOPPABLE_RUN = (*TINY_RUN, "--ckpt-every", str(CKPT_EVERY), "--log-every", "1")
FULL_RUN = (*STOPPABLE_RUN, "--max-steps", str(MAX_STEPS))


def train(results: Path, *flags: str) -> Path:
    """Train in this process; returns the run folder."""
    arguments = [*TINY_RUN, "--results-dir", str(results), *flags]
    launch(build_parser(None).parse_args(arguments), DdpTrainer)
    return results / "run"


def assert_same_end(run: Path, expected: Path, step: int = MAX_STEPS) -> None:
    """Compare all that a checkpoint holds but the flags, bit for bit."""
    ours = load_checkpoint(checkpoint_path(run, step))
    theirs = load_checkpoint(checkpoint_path(expected, step))
    for part in ("step", "model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)


# ------------------------------------------------------------------------------ ranks, accumulation


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two_ranks")
    command = torchrun(str(REPO / "tests/train_worker.py"), str(folder / "out.pt"))
    Process(command, folder / "log.txt").wait()
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.fixture(scope="module")
def on_one_rank() -> list[State]:
    return make_updates()


def assert_same_updates(updates: list[State], expected: list[State]) -> None:
    for ours, theirs in zip(updates, expected, strict=True):
        assert_close(ours["grad_norm"], theirs["grad_norm"], rtol=1e-5, atol=0)
        for name in theirs.keys() - {"grad_norm"}:
            assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["updates", "accumulated updates"])
def test_two_ranks_make_the_updates_of_one_rank_with_twice_the_batch(
    case: str, on_two_ranks: dict[str, Any], on_one_rank: list[State]
) -> None:
    assert_same_updates(on_two_ranks[case], on_one_rank)


def test_accumulating_two_times_two_makes_the_updates_of_one_times_four(
    on_one_rank: list[State],
) -> None:
    assert_same_updates(make_updates("--accum-steps", "2"), on_one_rank)


@pytest.mark.slow
def test_compiled_blocks_make_the_updates_of_eager_ones(on_one_rank: list[State]) -> None:
    assert_same_updates(make_updates("--compile"), on_one_rank)


def test_ranks_whose_tokens_go_to_disjoint_experts_average_the_right_gradients(
    on_two_ranks: dict[str, Any],
) -> None:
    gradients, _ = train_on_disjoint_experts()
    first, second = on_two_ranks["tokens_per_expert"]  # (L, E) each
    assert (first[:, 2:] == 0).all() and (second[:, :2] == 0).all()
    assert first.sum() == second.sum() > 0
    assert_close(on_two_ranks["disjoint gradients"], gradients, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ balance loss


def router_gradients(
    *flags: str, repeats: int = 1, scaler: torch.amp.GradScaler | None = None
) -> State:
    """Return the first gradients of all routers, on `repeats` times the same two images.

    At first the output layer is zero: nothing but the balance loss reaches the routers.
    """
    given = ("--global-batch-size", str(2 * repeats), "--aux-loss-weight", "0.5")
    trainer = make_trainer(*given, "--clip-grad", "0", *flags, random_weights=False)
    if scaler is not None:
        trainer.scaler = scaler
    batch = {k: torch.cat([v] * repeats) for k, v in global_batch(0, 2).items()}
    gradients = gradients_of_step(trainer, micro_batches(trainer, batch))
    return {name: value for name, value in gradients.items() if "router" in name}


@pytest.fixture(scope="module")
def true_router_gradients() -> State:
    """Differentiate the weighted balance loss alone."""
    trainer = make_trainer("--global-batch-size", "2", random_weights=False)
    routers = {name: p for name, p in trainer.model.named_parameters() if "router" in name}
    batch = global_batch(0, 2)
    x_t = trainer.job.diffusion.add_noise(batch["latents"], batch["noise"], batch["t"])
    _, aux_losses = trainer.model(x_t, batch["t"], batch["labels"], batch["drop_mask"])
    gradients = torch.autograd.grad(0.5 * aux_losses["switch"], list(routers.values()))
    return dict(zip(routers, gradients, strict=True))


def test_the_balance_loss_reaches_the_routers_with_its_weight(true_router_gradients: State) -> None:
    assert all(gradient.abs().max() > 1e-3 for gradient in true_router_gradients.values())
    assert_close(router_gradients(), true_router_gradients)


def test_the_balance_loss_is_divided_by_accumulation(true_router_gradients: State) -> None:
    gradients = router_gradients("--accum-steps", "2", repeats=2)
    assert_close(gradients, true_router_gradients)


def test_the_balance_loss_is_under_the_scale_of_float16(true_router_gradients: State) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaled = router_gradients("--accum-steps", "2", repeats=2, scaler=scaler)
    assert_close(scaled, true_router_gradients)
    half = router_gradients("--precision", "fp16")
    assert_close(half, true_router_gradients, rtol=0.05, atol=0.01)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale() -> None:
    trainer = make_trainer("--global-batch-size", "2", "--precision", "fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train_step(micro_batches(trainer, global_batch(0, 2)))
    assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)
    assert trainer.scaler.get_scale() == 2.0**126


# ------------------------------------------------------------------------------ SIGKILL and resume


def kill_at_random(process: Process, run: Path) -> None:
    """Kill the run at a random moment after its first checkpoint; KILL_SEED repeats it."""
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 10**6))
    draw = random.Random(seed)
    step, delay = draw.randint(CKPT_EVERY + 1, MAX_STEPS - 10), draw.uniform(0, 0.05)
    print(f"KILL_SEED={seed}: SIGKILL {delay:.3f} s after step {step}")
    process.kill_at_step(run / "log.txt", step, delay)
    assert not checkpoint_path(run, MAX_STEPS).exists()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("undisturbed"), *FULL_RUN)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_run_reaches_the_weights_of_an_undisturbed_one_bit_for_bit(
    num_workers: int, undisturbed: Path, tmp_path: Path
) -> None:
    flags = (*FULL_RUN, "--num-workers", str(num_workers), "--results-dir", str(tmp_path))
    command = [sys.executable, "train.py", *flags]
    kill_at_random(Process(command, tmp_path / "killed.txt"), tmp_path / "run")
    output = Process(command, tmp_path / "resumed.txt").wait()
    assert "resumed" in output
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on two "nodes" of one rank each, as the published command for several nodes."""
    results = tmp_path_factory.mktemp("two_nodes")
    address = ("--master_addr=127.0.0.1", f"--master_port={free_port()}")
    flags = (*FULL_RUN, "--results-dir", str(results))
    nodes = [
        Process(
            torchrun(*address, "train.py", *flags, node=node, nodes=2, nproc=1),
            results / f"node{node}.txt",
        )
        for node in (0, 1)
    ]
    for node in nodes:
        node.wait()
    return results / "run"


def test_two_nodes_train_together_and_one_of_them_writes(two_nodes: Path) -> None:
    content = load_checkpoint(checkpoint_path(two_nodes, MAX_STEPS))
    assert len(content["rng"]) == 2
    assert not torch.equal(content["rng"][0]["cpu"], content["rng"][1]["cpu"])
    assert (two_nodes / "log.txt").read_text().count(f"step {MAX_STEPS}:") == 1
    assert "step" not in (two_nodes.parent / "node1.txt").read_text()


def test_killed_ranks_reach_the_weights_of_undisturbed_ones_bit_for_bit(
    two_nodes: Path, tmp_path: Path
) -> None:
    command = torchrun("train.py", *FULL_RUN, "--results-dir", str(tmp_path))
    kill_at_random(Process(command, tmp_path / "killed.txt"), tmp_path / "run")
    output = Process(command, tmp_path / "resumed.txt").wait()
    assert "resumed" in output
    assert_same_end(tmp_path / "run", two_nodes)


def test_another_number_of_ranks_continues_with_a_warning(
    two_nodes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(two_nodes, tmp_path / "run")
    run = train(tmp_path, "--max-steps", str(MAX_STEPS + 1))
    assert "is from 2 ranks, this run has 1" in caplog.text
    assert load_checkpoint(checkpoint_path(run, MAX_STEPS + 1))["step"] == MAX_STEPS + 1


def test_a_finished_run_is_left_as_it_is(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    last = checkpoint_path(run, MAX_STEPS)
    before = last.stat().st_mtime_ns
    train(tmp_path, *FULL_RUN)
    assert f"resumed {last} at step {MAX_STEPS}" in caplog.text
    assert "experts: one matmul an expert" in caplog.text
    assert last.stat().st_mtime_ns == before


def test_a_truncated_last_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--max-steps", "4", "--ckpt-every", "2")
    run = train(tmp_path / "cut", *flags)
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    last = checkpoint_path(run, 4)
    os.truncate(last, last.stat().st_size // 2)
    train(tmp_path / "cut", *flags)
    assert f"{last} is damaged" in caplog.text
    assert f"resumed {checkpoint_path(run, 2)} at step 2" in caplog.text
    assert_same_end(run, whole, step=4)


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, "--max-steps", "1")

    def write_half(content: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match=r"0000002\.pt.*No space left"):
        train(tmp_path, "--max-steps", "2")
    assert latest_checkpoint(run) == checkpoint_path(run, 1)
    assert load_checkpoint(checkpoint_path(run, 1))["step"] == 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--num-experts", "2"], "num_experts"),
        (["--qk-norm"], "qk_norm"),
        (["--model", "DiT-Ti/4"], "patch_size"),
        (["--rf", "False"], "objective, time_scale"),
    ],
)
def test_resuming_another_model_names_what_differs(
    flags: list[str], field: str, undisturbed: Path
) -> None:
    with pytest.raises(ValueError, match=f"--resume: .* was trained with another {field};"):
        train(undisturbed.parent, *FULL_RUN, *flags)


def test_resuming_with_another_course_warns(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    flags = ("--max-steps", str(MAX_STEPS + 1), "--lr", "0.5", "--weight-decay", "0.25")
    train(tmp_path, *flags)
    assert "--lr was 0.001, is 0.5" in caplog.text
    group = load_checkpoint(checkpoint_path(run, MAX_STEPS + 1))["optimizer"]["param_groups"][0]
    assert group["lr"] == 0.5 and group["weight_decay"] == 0.25


def test_resume_never_refuses_a_folder_with_checkpoints(undisturbed: Path) -> None:
    with pytest.raises(ValueError, match=r"--resume never: .*run has checkpoints; give another"):
        train(undisturbed.parent, *FULL_RUN, "--resume", "never")


def test_resuming_a_file_continues_from_that_one(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = checkpoint_path(undisturbed, MAX_STEPS - CKPT_EVERY)
    run = train(tmp_path, *FULL_RUN, "--resume", str(source))
    assert_same_end(run, undisturbed)
    with pytest.raises(OSError, match=r"--resume nowhere\.pt: no such file"):
        train(tmp_path, "--resume", "nowhere.pt")


# ------------------------------------------------------------------------------ one step


@pytest.mark.parametrize("flags", [(), ("--accum-steps", "2"), ("--optimizer", "muon")])
def test_weights_rounded_once_a_step_make_the_updates_of_weights_rounded_at_every_use(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    once = make_updates("--precision", "bf16", *flags)
    monkeypatch.setattr("training.ddp.rounded_once", lambda *_: nullcontext())
    always = make_updates("--precision", "bf16", *flags)
    for ours, theirs in zip(once, always, strict=True):
        assert_close(ours, theirs, rtol=0, atol=0)


def test_ema_equals_its_formula_after_some_steps() -> None:
    trainer = make_trainer("--global-batch-size", "2", "--ema-decay", "0.75")
    expected: dict[str, Tensor] = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    for step in range(3):
        trainer.train_step(micro_batches(trainer, global_batch(step, 2)))
        for name, value in trainer.model.state_dict().items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    assert_close(trainer.ema.model.state_dict(), expected)


def test_weights_that_become_nan_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, "--max-steps", "1")
    monkeypatch.setattr("training.ddp.clip_grad_norm_", spoil_gradients)
    flags = ("--max-steps", "9", "--ckpt-every", "2", "--log-every", "3")
    with pytest.raises(UserError, match=r"grad_norm is nan after step 2; .*--lr"):
        train(tmp_path, *flags)
    assert latest_checkpoint(run) == checkpoint_path(run, 1)


@pytest.mark.parametrize("part", ["model", "ema"])
def test_weights_or_averages_of_nan_behind_a_finite_loss_are_never_saved(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(tmp_path, "--max-steps", "1")

    def spoil(trainer: DdpTrainer, batches: Any) -> dict[str, Tensor]:
        values = step(trainer, batches)
        model = trainer.model if part == "model" else trainer.ema.model
        model.get_parameter("blocks.3.attn.qkv.bias").data[5] = torch.inf
        return values

    step = DdpTrainer.train_step
    monkeypatch.setattr(DdpTrainer, "train_step", spoil)
    with pytest.raises(FloatingPointError, match=r"weights are no numbers after step 2; .*--lr"):
        train(tmp_path, "--max-steps", "2")
    assert latest_checkpoint(run) == checkpoint_path(run, 1)
    assert "DivergedError: weights are no numbers" in (run / "log.txt").read_text()


# ------------------------------------------------------------------------------ float16


def test_a_step_that_overflows_moves_no_average_no_step_and_no_warm_up() -> None:
    trainer = make_trainer(
        *("--global-batch-size", "2", "--precision", "fp16", "--ema-decay", "0.5"),
        *("--warmup-steps", "4"),
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = {name: value.clone() for name, value in trainer.ema.model.state_dict().items()}
    trainer.train_step(micro_batches(trainer, global_batch(0, 2)))
    assert_close(trainer.ema.model.state_dict(), before, rtol=0, atol=0)
    assert (trainer.step, trainer.skipped, trainer.scaler.get_scale()) == (0, 1, 2.0**126)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**8})
    trainer.train_step(micro_batches(trainer, global_batch(1, 2)))
    assert (trainer.step, trainer.skipped) == (1, 1)
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.settings.lr / 4


def test_a_run_with_skipped_steps_resumes_with_the_batch_and_the_scale_that_come_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--precision", "fp16", "--model", "DiT-Ti/8", "--ckpt-every", "2")
    drawn = []

    def keep(job: Any, num_drawn: int) -> Any:
        drawn.append(num_drawn)
        return batches(job, num_drawn)

    def overflow_first(job: Any) -> DdpTrainer:
        trainer = DdpTrainer(job)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)
        return trainer

    batches = train_loop.latent_batches
    monkeypatch.setattr(train_loop, "latent_batches", keep)
    arguments = [*TINY_RUN, "--results-dir", str(tmp_path), *flags]
    launch(build_parser(None).parse_args([*arguments, "--max-steps", "4"]), overflow_first)
    whole = load_checkpoint(checkpoint_path(tmp_path / "run", 4))
    assert (skipped := whole["scaler"]["skipped"]) > 2
    checkpoint_path(tmp_path / "run", 4).unlink()
    launch(build_parser(None).parse_args([*arguments, "--max-steps", "4"]), DdpTrainer)
    again = load_checkpoint(checkpoint_path(tmp_path / "run", 4))
    assert drawn == [0, 2 + skipped]
    for key in ("model", "ema", "optimizer", "scaler"):
        assert_close(again[key], whole[key], rtol=0, atol=0)


def test_gradients_that_overflow_at_every_scale_end_the_run(tmp_path: Path) -> None:
    def broken(job: Any) -> DdpTrainer:
        trainer = DdpTrainer(job)
        trainer.model.final_layer.linear.bias.data.fill_(torch.nan)
        return trainer

    flags = ("--precision", "fp16", "--model", "DiT-Ti/8", "--max-steps", "2")
    arguments = [*TINY_RUN, "--results-dir", str(tmp_path), *flags]
    with pytest.raises(FloatingPointError, match="after step 0 the gradient overflows float16"):
        launch(build_parser(None).parse_args(arguments), broken)
    assert latest_checkpoint(tmp_path / "run") is None


def test_the_grid_of_two_ranks_is_that_of_one_bit_for_bit(
    on_two_ranks: dict[str, Any], tmp_path: Path
) -> None:
    assert on_two_ranks["grid"] == grid_of_twelve_blocks(tmp_path)
