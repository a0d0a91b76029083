"""How weights are moved: schedules against their formulas, and runs that go on bit for bit."""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_worker import engine_file
from helpers import run_main
from launch import TINY_RUN, Process
from torch.testing import assert_close
from train_worker import global_batch, gradients_of_step, make_trainer, micro_batches

import sample
from checkpoint.state import checkpoint_path, load_checkpoint
from checkpoint.weights import load_model
from common.errors import UserError
from sampling.opening import open_run
from train_deepspeed import build_deepspeed_parser
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.loop import launch
from training.optimization import learning_rate
from training.settings import TrainSettings, check_flags


def parse(*flags: str) -> argparse.Namespace:
    return build_parser(None).parse_args([*TINY_RUN, *flags])


def settings(*flags: str) -> TrainSettings:
    return prepare(parse(*flags), meta=True).settings


def train(results: Path, *flags: str) -> Path:
    launch(parse("--results-dir", str(results), *flags), DdpTrainer)
    return results / "run"


def assert_same_end(run: Path, expected: Path, step: int) -> None:
    """Compare all that a checkpoint holds but the flags, bit for bit."""
    ours, theirs = (load_checkpoint(checkpoint_path(folder, step)) for folder in (run, expected))
    for part in ("step", "model", "ema", "optimizer", "rng"):
        assert_close(ours[part], theirs[part], rtol=0, atol=0)
    assert_close(ours.get("averages", {}), theirs.get("averages", {}), rtol=0, atol=0)


# ------------------------------------------------------------------------------ schedules


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_the_smallest_rate_at_the_end() -> None:
    falling = settings(
        *("--lr", "0.5", "--min-lr", "0.1", "--lr-schedule", "cosine"),
        *("--warmup-steps", "4", "--max-steps", "12"),
    )
    assert falling.decay_steps == 8
    on_paper = [0.125, 0.25, 0.375, 0.5]
    on_paper += [0.1 + 0.4 * 0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(9)]
    assert [learning_rate(falling, step) for step in range(13)] == pytest.approx(on_paper)
    assert learning_rate(falling, 8) == pytest.approx(0.3)  # half way
    assert learning_rate(falling, 12) == learning_rate(falling, 50) == 0.1


def test_wsd_warms_up_stays_and_falls_in_a_line_over_the_last_fifth() -> None:
    flags = ("--lr", "0.5", "--lr-schedule", "wsd", "--warmup-steps", "2", "--max-steps", "20")
    falling = settings(*flags)
    assert falling.decay_steps == 4
    rates = [learning_rate(falling, step) for step in range(21)]
    assert rates == pytest.approx([0.25] + 16 * [0.5] + [0.375, 0.25, 0.125, 0.0])
    sooner = settings(*flags, "--decay-steps", "10", "--min-lr", "0.25")
    assert [learning_rate(sooner, step) for step in (9, 10, 15, 20)] == [0.5, 0.5, 0.375, 0.25]


def test_a_run_shorter_than_its_warm_up_still_falls_to_the_smallest_rate() -> None:
    for schedule in ("cosine", "wsd"):
        short = settings("--lr-schedule", schedule, "--warmup-steps", "100", "--max-steps", "3")
        rates = [learning_rate(short, step) for step in range(4)]
        assert 0 < rates[0] < short.lr / 50 and rates[3] == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--min-lr", "1e-5"], "--min-lr 1e-05 means nothing with --lr-schedule constant"),
        (["--decay-steps", "9"], "--decay-steps 9 means nothing with --lr-schedule constant"),
        (["--lr-schedule", "wsd", "--min-lr", "1"], "--min-lr 1 is more than --lr 0.001"),
    ],
)
def test_flags_of_the_rate_that_mean_nothing_together_are_refused(
    flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_flags(parse(*flags))


# ------------------------------------------------------------------------------ Adam


def test_adam_moves_a_weight_by_its_formula_with_the_numbers_of_the_flags() -> None:
    flags = ("--adam-betas", "0.8", "0.9", "--adam-eps", "0.01", "--clip-grad", "0", "--lr", "0.1")
    trainer = make_trainer("--global-batch-size", "2", *flags)
    name = "blocks.0.attn.qkv.weight"
    expected = trainer.model.get_parameter(name).detach().double()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for k in range(1, 4):
        batches = micro_batches(trainer, global_batch(k, 2))
        gradient = gradients_of_step(trainer, batches)[name].double()
        first, second = 0.8 * first + 0.2 * gradient, 0.9 * second + 0.1 * gradient**2
        mean, root = first / (1 - 0.8**k), (second / (1 - 0.9**k)).sqrt()
        expected = expected - 0.1 * mean / (root + 0.01)
    assert_close(trainer.model.get_parameter(name).double(), expected, rtol=1e-5, atol=1e-6)


def test_a_run_that_goes_on_takes_the_numbers_of_the_command_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, "--max-steps", "1")
    assert "--adam" not in caplog.text
    run = train(tmp_path, "--max-steps", "2", "--adam-betas", "0.5", "0.6", "--adam-eps", "0.1")
    assert "--adam-betas was [0.9, 0.999], is [0.5, 0.6]" in caplog.text
    group = load_checkpoint(checkpoint_path(run, 2))["optimizer"]["param_groups"][0]
    assert (tuple(group["betas"]), group["eps"]) == ((0.5, 0.6), 0.1)


# ------------------------------------------------------------------------------ weight decay


def test_decay_shrinks_matrices_and_leaves_biases_norms_routers_and_tables_alone() -> None:
    flags = ("--global-batch-size", "2", "--qk-norm", "--mlp-type", "gelu", "--lr", "0.01")
    plain, decayed = (
        make_trainer(
            *flags, "--weight-decay", decay, "--selection", "batch_choice", "--balance=none"
        )
        for decay in ("0", "0.5")
    )
    before = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    for trainer in (plain, decayed):
        trainer.train_step(micro_batches(trainer, global_batch(0, 2)))
    shrunk = set()
    for name, ours in decayed.model.named_parameters():
        theirs = plain.model.get_parameter(name)
        if not torch.equal(ours, theirs):
            shrunk.add(name)
            assert_close(ours, theirs - 0.01 * 0.5 * before[name])
    block = {
        *("attn.qkv", "attn.proj", "adaLN_modulation.1"),
        *("moe.shared_experts.fc1", "moe.shared_experts.fc2"),
    }
    expected = {f"blocks.{i}.{name}.weight" for i in range(4) for name in block}
    expected |= {f"blocks.{i}.moe.experts.{n}_proj" for i in range(4) for n in ("up", "down")}
    expected |= {f"{name}.weight" for name in ("x_embedder.proj", "final_layer.linear")}
    expected |= {f"t_embedder.mlp.{i}.weight" for i in (0, 2)}
    assert shrunk == expected | {"final_layer.adaLN_modulation.1.weight"}


def test_moments_stay_with_their_parameters_when_decay_makes_other_groups(tmp_path: Path) -> None:
    run = train(tmp_path, "--max-steps", "2")
    before = load_checkpoint(checkpoint_path(run, 2))["optimizer"]
    assert len(before["param_groups"]) == 1
    job = prepare(parse("--results-dir", str(tmp_path), "--weight-decay", "0.1"))
    trainer = DdpTrainer(job)
    trainer.resume(checkpoint_path(run, 2))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    for i, (name, parameter) in enumerate(
        (n, p) for n, p in trainer.model.named_parameters() if n != "pos_embed"
    ):
        for kind, moment in trainer.optimizer.state[parameter].items():
            assert_close(moment, before["state"][i][kind], rtol=0, atol=0, msg=name)


# ------------------------------------------------------------------------------ Muon


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Run Newton-Schulz on one matrix, in float64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    x = wide / wide.norm()
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def by_hand(name: str, x: torch.Tensor) -> list[torch.Tensor]:
    """Cut a parameter of a block into the matrices that it stacks."""
    if name.endswith("moe.experts.gate_up_proj"):
        half = x.shape[1] // 2
        return [part for expert in x for part in (expert[:half], expert[half:])]
    if name.endswith("moe.experts.down_proj"):
        return list(x)
    if name.endswith("attn.qkv.weight"):
        return [x[:96], x[96:192], x[192:]]
    if name.endswith("shared_experts.gate_up_proj.weight"):
        return [x[:192], x[192:]]
    return [x] if name.endswith(("shared_experts.down_proj.weight", "attn.proj.weight")) else []


def test_muon_moves_every_matrix_by_its_own_formula_and_adam_the_rest() -> None:
    """At the first step the momentum, and so the direction, is that of the gradient."""
    flags = ("--global-batch-size", "2", "--lr", "0.01")
    adam, muon = (make_trainer(*flags, "--optimizer", name) for name in ("adamw", "muon"))
    before = {name: p.detach().clone() for name, p in muon.model.named_parameters()}
    generator, gradients = torch.Generator().manual_seed(0), {}
    for name, parameter in muon.model.named_parameters():
        if parameter.requires_grad:
            gradients[name] = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradients[name].clone()
            adam.model.get_parameter(name).grad = gradients[name].clone()
    for trainer in (adam, muon):
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
        trainer.optimizer.step()
    seen = 0
    for name, gradient in gradients.items():
        now = muon.model.get_parameter(name).detach()
        assert_close(muon.model.get_parameter(name).grad, gradient, rtol=0, atol=0)
        moved = by_hand(name, now - before[name])
        if not moved:
            assert_close(now, adam.model.get_parameter(name).detach(), rtol=0, atol=0)
        for step, matrix in zip(moved, by_hand(name, gradient), strict=True):
            expected = -0.01 * 0.2 * math.sqrt(max(step.shape)) * orthogonal(matrix)
            error = (step.double() - expected).norm() / expected.norm()
            assert error < 0.1, name  # Muon's products are in bfloat16
            seen += 1
    # in 4 blocks: gate, up and down of 4 experts and of the shared one; q, k, v and the output
    assert seen == 4 * (4 * 3 + 3 + 3 + 1)


def test_an_expert_without_tokens_stays_where_it_is_under_muon() -> None:
    trainer = make_trainer("--global-batch-size", "2", "--optimizer", "muon", "--lr", "0.01")
    block: Any
    for block in trainer.model.blocks:
        block.moe.router.weight.data.zero_()  # all experts tie: every token takes the same two
    experts = trainer.model.get_parameter("blocks.0.moe.experts.down_proj")
    before = experts.detach().clone()
    trainer.train_step(micro_batches(trainer, global_batch(0, 2)))
    assert ((experts - before).abs().amax(dim=(1, 2)) > 0).sum() == 2


def test_another_optimizer_goes_on_with_no_run_and_muon_needs_whole_matrices(
    tmp_path: Path,
) -> None:
    train(tmp_path, "--max-steps", "1", "--optimizer", "muon")
    with pytest.raises(UserError, match="was trained with another optimizer"):
        train(tmp_path, "--max-steps", "2")
    args = build_deepspeed_parser().parse_args([*TINY_RUN, "--optimizer", "muon"])
    with pytest.raises(UserError, match=r"--optimizer muon needs whole matrices: take train\.py"):
        check_flags(args)


# ------------------------------------------------------------------------------ averages


def test_several_averages_are_those_of_a_run_each_and_any_is_drawn(tmp_path: Path) -> None:
    flags = ("--max-steps", "3", "--ckpt-every", "1", "--keep-last", "0")
    both = train(tmp_path / "both", *flags, "--ema-decay", "0.5", "0.9")
    alone = [train(tmp_path / decay, *flags, "--ema-decay", decay) for decay in ("0.5", "0.9")]
    for decay, run in zip((0.5, 0.9), alone, strict=True):
        expected = load_model(run).state_dict()
        assert_close(load_model(both, ema=decay).state_dict(), expected, rtol=0, atol=0)
    assert_close(load_model(both).state_dict(), load_model(alone[0]).state_dict(), rtol=0, atol=0)
    opened = open_run(both, device=torch.device("cpu"), ema=0.9, dtype="fp32")
    assert_close(opened.model.state_dict(), load_model(alone[1]).state_dict(), rtol=0, atol=0)
    with pytest.raises(
        UserError, match=r"ema=0.7: .*'ema 0.9', 'model'\], of which ema has the .*0.5"
    ):
        load_model(both, ema=0.7)
    # one more from here on begins as the first; the others go on as they were
    checkpoint_path(both, 3).unlink()
    checkpoint_path(both, 2).unlink()
    train(tmp_path / "both", *flags, "--ema-decay", "0.9", "0.5", "0.99")
    for decay, run in zip((0.5, 0.9), alone, strict=True):
        expected = load_model(run).state_dict()
        assert_close(load_model(both, ema=decay).state_dict(), expected, rtol=0, atol=0)
    assert load_model(both, ema=0.99) is not None


def test_two_averages_of_one_decay_are_refused() -> None:
    with pytest.raises(UserError, match=r"--ema-decay 0.9 0.9: two are the same"):
        check_flags(parse("--ema-decay", "0.9", "0.9"))


@pytest.mark.slow
def test_shards_keep_several_averages_go_on_with_them_and_are_read(tmp_path: Path) -> None:
    """The same runs of one process by both trainers, to rounding."""
    flags = ("--ema-decay", "0.5", "0.9", "--weight-decay", "0.1", "--ckpt-every", "1")
    both = train(tmp_path / "ddp", *flags, "--max-steps", "3")
    engine = ("--deepspeed-config", engine_file("stage 2", tmp_path))
    results = ("--results-dir", str(tmp_path / "zero"), *engine)
    words = [sys.executable, "train_deepspeed.py", *TINY_RUN, *results, *flags, "--max-steps"]
    for steps in ("2", "3"):
        Process([*words, steps], tmp_path / "log.txt").wait()
    for decay in (0.5, 0.9):
        ours = load_model(tmp_path / "zero" / "run", ema=decay).state_dict()
        assert_close(ours, load_model(both, ema=decay).state_dict(), rtol=0, atol=1e-5)


def test_settings_of_several_averages_come_back_as_a_command(tmp_path: Path) -> None:
    run = train(
        tmp_path, "--max-steps", "1", "--ema-decay", "0.5", "0.9", "--adam-betas", "0", "0.9"
    )
    again = build_parser(None).parse_args(["--config", str(run / "args.json")])
    assert (again.ema_decay, again.adam_betas) == ([0.5, 0.9], [0.0, 0.9])
    assert again.lr_schedule == "constant" and again.rf


# ------------------------------------------------------------------------------ going on


@pytest.mark.parametrize(
    "flags",
    [
        ("--lr-schedule", "cosine"),
        ("--lr-schedule", "wsd"),
        ("--adam-betas", "0.8", "0.9", "--adam-eps", "1e-6", "--weight-decay", "0.1"),
        ("--time-shift", "3", "--time-sampling", "mode"),
        ("--ema-decay", "0.5", "0.9"),
        ("--optimizer", "muon", "--weight-decay", "0.1", "--lr-scale", "attn=0.5"),
        ("--rf", "False", "--prediction", "v", "--zero-terminal-snr", "--min-snr-gamma", "5"),
    ],
)
def test_a_run_cut_in_two_ends_as_one_in_one_bit_for_bit(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    flags = ("--max-steps", "6", "--ckpt-every", "3", *flags)
    whole = train(tmp_path / "whole", *flags)
    cut = train(tmp_path / "cut", *flags)
    checkpoint_path(cut, 6).unlink()
    train(tmp_path / "cut", *flags)
    assert_same_end(cut, whole, 6)


def test_going_on_to_another_end_says_that_the_rate_falls_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, "--max-steps", "2", "--lr-schedule", "cosine")
    assert "--decay-steps" not in caplog.text
    train(tmp_path, "--max-steps", "3", "--lr-schedule", "cosine")
    assert "--decay-steps was 2, is 3" in caplog.text


# ------------------------------------------------------------------------------ objectives


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prediction", "v"], "--prediction v means nothing with --rf"),
        (["--min-snr-gamma", "5"], "--min-snr-gamma 5 means nothing with --rf"),
        (["--rf", "False", "--time-shift", "3"], "--time-shift 3 means nothing without --rf"),
        (["--rf", "False", "--zero-terminal-snr"], "zero_terminal_snr needs prediction v"),
        (["--time-sampling", "mode", "9"], r"time_sampling mode 9: scale is not in"),
    ],
)
def test_flags_of_the_objective_that_mean_nothing_together_are_refused(
    flags: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_flags(parse(*flags))


def test_a_run_draws_and_is_opened_with_the_objective_it_was_trained_with(tmp_path: Path) -> None:
    flags = ("--rf", "False", "--prediction", "v", "--zero-terminal-snr", "--max-steps", "1")
    run = train(tmp_path / "v", *flags)
    opened: Any = open_run(run, device=torch.device("cpu")).diffusion
    assert opened.predicts_v and opened.alpha_bar[-1] == 0
    with pytest.raises(UserError, match="was trained with another prediction, zero_terminal_snr"):
        train(tmp_path / "v", "--rf", "False", "--max-steps", "2")
    started = settings("--rf", "False", "--init-from", str(run), "--run-name", "tuned")
    assert (started.prediction, started.zero_terminal_snr) == ("v", True)
    run = train(tmp_path / "shift", "--time-shift", "3", "--max-steps", "1")
    for given, expected in ((None, 3.0), (1.5, 1.5)):
        opened = open_run(run, device=torch.device("cpu"), time_shift=given).diffusion
        assert opened.time_shift == expected
    with pytest.raises(UserError, match=r"--time-shift 2 means nothing for .*, which is of DDPM"):
        open_run(tmp_path / "v" / "run", device=torch.device("cpu"), time_shift=2.0)


def test_a_guide_of_another_objective_or_other_data_is_refused_and_one_that_fits_guides(
    tmp_path: Path,
) -> None:
    flags = ("--max-steps", "1", "--model", "DiT-Ti/4")
    model, guide = (train(tmp_path / seed, *flags, "--seed", seed) for seed in "01")
    other = train(tmp_path / "v", *flags, "--rf", "False", "--prediction", "v")
    with pytest.raises(
        UserError, match=r"--guide-ckpt .* was trained with another objective, time"
    ):
        open_run(model, device=torch.device("cpu"), guide_ckpt=other)
    opened = open_run(model, device=torch.device("cpu"), guide_ckpt=guide)
    assert opened.guide is not None
    out = tmp_path / "out.png"
    run_main(sample, "--ckpt", model, "--guide-ckpt", guide, "--cfg-scale", "2", "--out", out,
             "--num-sampling-steps", "2", "--sampler", "sde", "--cfg-rescale", "0.7")  # fmt: skip
    assert out.exists()
