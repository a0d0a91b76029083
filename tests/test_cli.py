"""The scripts as a user types them: published commands and spellings, help, dry runs, mistakes."""

import itertools
import logging
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import save_image_folder, save_tiny_vae
from launch import REPO, TINY_RUN, Process, torchrun
from PIL import Image

from checkpoint.state import checkpoint_path, load_checkpoint
from checkpoint.weights import load_model
from common.errors import UserError
from common.flags import FlagParser, in_groups
from common.quiet import silence
from models import DiT_models
from train_deepspeed import build_deepspeed_parser
from training.flags import build_parser
from training.job import prepare

SCRIPTS = sorted(path.name for path in REPO.glob("*.py") if "__main__" in path.read_text())
NUM_CLASSES, IMAGES_PER_CLASS = 3, 2


def run_script(script: str, *flags: str) -> tuple[int, str]:
    """Run a script in this process; returns its exit code and the message it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as ended:
            return (ended.code, "") if isinstance(ended.code, int) else (1, str(ended.code))
    return 0, ""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with images/CLASS/*.png of several shapes, and a small vae/."""
    folder = tmp_path_factory.mktemp("inputs")
    images = (folder / "images", NUM_CLASSES, IMAGES_PER_CLASS)
    save_image_folder(*images, lambda label, index: (70 + 10 * index, 90 - 10 * label))
    save_tiny_vae(folder / "vae")
    return folder


def published_train_flags(inputs: Path, model: str, image_size: int) -> list[str]:
    """Return the published command's flags, with our paths and sizes."""
    return [
        *("--model", model, "--num_experts", "8", "--num_experts_per_tok", "2"),
        *("--data-path", str(inputs / "images"), "--image-size", str(image_size)),
        *("--global-batch-size", "4", "--vae-path", str(inputs / "vae")),
    ]


def published_sample_flags(inputs: Path, model: str, ckpt: Path, image_size: int) -> list[str]:
    return [
        *("--model", model, "--ckpt", str(ckpt), "--vae-path", str(inputs / "vae")),
        *("--image-size", str(image_size), "--cfg-scale", "1.5"),
    ]


# ------------------------------------------------------------------------------ published commands


def test_the_published_training_and_sampling_commands_run(inputs: Path, tmp_path: Path) -> None:
    flags = published_train_flags(inputs, "DiT-Ti/2", 64)
    ours = ("--max-steps", "2", "--results-dir", str(tmp_path), "--run-name", "run")
    output = Process(torchrun("train.py", *flags, *ours), tmp_path / "log.txt").wait()
    assert "Traceback" not in output and output.count("parameters:") == 1
    run = tmp_path / "run"
    settings = load_checkpoint(checkpoint_path(run, 2))["settings"]
    assert settings["objective"] == "ddpm" and settings["num_workers"] == 4
    assert load_model(run).config.num_classes == NUM_CLASSES

    fewer = ("--num-sampling-steps", "2", "--out", str(tmp_path / "sample.png"))
    command = published_sample_flags(inputs, "DiT-Ti/2", run, 64)
    assert run_script("sample.py", *command, *fewer) == (0, "")
    height = 6 * 66 + 2 + 18  # six rows of 64 px, 2 between, class names above the columns
    columns = {tmp_path / "sample.png": 2 * NUM_CLASSES, run / "samples/0000002.png": NUM_CLASSES}
    for picture, number in columns.items():
        with Image.open(picture) as image:
            assert image.size == (number * 66 + 2, height)


@pytest.mark.slow
def test_the_published_commands_run_at_their_real_size(inputs: Path, tmp_path: Path) -> None:
    flags = published_train_flags(inputs, "DiT-S/2", 256)
    ours = ("--max-steps", "2", "--results-dir", str(tmp_path), "--run-name", "run")
    Process(torchrun("train.py", *flags, *ours, "--sample-every", "0"), tmp_path / "log").wait()
    out = tmp_path / "sample.png"
    fewer = ("--num-sampling-steps", "2", "--num-per-class", "1", "--out", str(out))
    command = published_sample_flags(inputs, "DiT-S/2", tmp_path / "run", 256)
    Process([sys.executable, "sample.py", *command, *fewer], tmp_path / "log2").wait()
    assert out.exists()


@pytest.mark.slow
def test_a_dry_run_under_torchrun_prints_the_published_size_once(
    inputs: Path, tmp_path: Path
) -> None:
    flags = published_train_flags(inputs, "DiT-S/2", 256)
    ours = ("--num-classes", "1000", "--results-dir", str(tmp_path), "--dry-run")
    output = Process(torchrun("train.py", *flags, *ours), tmp_path / "log.txt").wait()
    assert re.findall(r"parameters: (\S+) total", output) == ["199,307,552"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt"]


# ------------------------------------------------------------------------------ spellings


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        ("--num_experts 16", "num_experts", 16),
        ("--num_experts_per_tok 1", "num_experts_per_tok", 1),
        ("--rf", "rf", True),
        ("--rf True", "rf", True),
        ("--rf False", "rf", False),
        ("--rf=false", "rf", False),
        ("--global-seed 3", "seed", 3),
        ("--global_seed 3", "seed", 3),
        ("--accum_iter 4", "accum_steps", 4),
        ("--train_batch_size 8", "global_batch_size", 8),
        ("--global_batch_size 8", "global_batch_size", 8),
        ("--ckpt_every 8", "ckpt_every", 8),
        ("--image_size 64", "image_size", 64),
        ("--vae_path V", "vae_path", "V"),
        ("--results_dir R", "results_dir", "R"),
    ],
)
def test_published_spellings_mean_the_same(flags: str, name: str, value: object) -> None:
    args = build_parser(None).parse_args(["--data_path", "D", *flags.split()])
    assert getattr(args, name) == value and args.data_path == "D"


@pytest.mark.parametrize("script", sorted(REPO.glob("scripts/train_*.sh")), ids=lambda p: p.name)
def test_launch_scripts_start_training_with_flags_that_it_knows(
    script: Path, tmp_path: Path
) -> None:
    """A stand-in for the launcher writes down what it is asked to run."""
    for launcher in ("torchrun", "deepspeed"):
        (tmp_path / launcher).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / launcher).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "images"}
    command = ["bash", str(script), "--max-steps", "7"]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    words = printed.stdout.split()
    position = next(i for i, word in enumerate(words) if word.endswith(".py"))
    parsers = {"train.py": build_parser(None), "train_deepspeed.py": build_deepspeed_parser()}
    args = parsers[words[position]].parse_known_args(words[position + 1 :])
    assert args[1] == [] and args[0].max_steps == 7 and args[0].data_path == "images"
    assert args[0].rf and args[0].num_experts in (8, 16) and args[0].affinity is None
    command = ["bash", str(script), "--balance", "none"]
    printed = subprocess.run(
        command, env=environment | {"RECIPE": "promoe"}, capture_output=True, text=True, check=True
    )
    words = printed.stdout.split()
    given, _ = parsers[words[position]].parse_known_args(words[position + 1 :])
    assert (given.affinity, given.num_experts, given.balance) == ("cosine", 12, ["none"])


# ------------------------------------------------------------------------------ help, dry run


def flag_entries(help_text: str) -> dict[str, str]:
    """Return flag -> its explanation, as `--help` prints them, lines joined."""
    entries = re.findall(r"^  (--.*(?:\n {6,}.*)*)", help_text, re.M)
    parts = [re.split(r"\s{2,}", entry, maxsplit=1) for entry in entries]
    return {head.split()[0]: " ".join(rest.split()) for head, rest in parts}


@pytest.mark.parametrize("script", ["train.py", "train_deepspeed.py"])
def test_help_lists_a_flag_once_as_a_sentence_with_its_default(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, "--help")[0] == 0
    text = capsys.readouterr().out
    entries = flag_entries(text)
    for name, sentence in entries.items():
        assert len(re.findall(rf"^  {name}(?![\w-])", text, re.M)) == 1
        assert re.match(r"[A-Z]\w+ .*\.$", sentence), f"{name}: {sentence}"
    assert not re.search(r"^ .*--\w+_", text[text.index("Data:") :], re.M)  # no other spelling
    assert entries["--lr"].endswith("Default: 0.0001.")
    assert entries["--rf"].endswith("Default: off.")
    assert f"usage: {script} --data-path DATA [flags]\n" in text


def test_help_names_every_registered_size_once(capsys: pytest.CaptureFixture[str]) -> None:
    named = []
    for part in in_groups(DiT_models).split(", "):
        options = [braced.split(",") for braced in re.findall(r"\{(.*?)\}", part)]
        pattern = re.sub(r"\{.*?\}", "{}", part)
        named += [pattern.format(*chosen) for chosen in itertools.product(*options)]
    assert sorted(named) == sorted(DiT_models)
    run_script("train.py", "--help")
    shown = flag_entries(capsys.readouterr().out)["--model"]
    assert "one of DiT-{Ti,S,B,L,XL}/{1,2,4,8}, DiT-G/{1,2}, " in shown


def test_help_of_any_style_ends_as_a_sentence_with_the_default_as_typed() -> None:
    parser = FlagParser("Docs.")
    group = parser.group("Group")
    group.add("--old-style", default=5, help="of the noise")
    group.add("--whole", default=[0.0, 1.0], nargs=2, help="Share of 10%% of it.")
    group.add("--explained", help="Where. Default: there.")
    group.add("--percent", default="5%", help="Text")
    entries = flag_entries(parser.format_help())
    assert entries == {
        "--old-style": "of the noise. Default: 5.",
        "--whole": "Share of 10% of it. Default: 0.0 1.0.",
        "--explained": "Where. Default: there.",
        "--percent": "Text. Default: 5%.",
    }


@pytest.mark.parametrize(
    ("data", "sizes"),
    [("digits", "DiT-Ti/1 or DiT-Ti/2"), ("fashion-mnist", "DiT-Ti/4"), ("photos", "DiT-S/2")],
)
def test_a_missing_model_is_refused_with_a_size_that_fits_the_data(data: str, sizes: str) -> None:
    message = f"--model is required; for --data-path {data} take {sizes}"
    with pytest.raises(UserError, match=message):
        prepare(build_parser(None).parse_args(["--data-path", data]))


def test_a_rank_that_refuses_a_flag_says_which_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert run_script("train.py", "--lr", "x")[0] == 2
    assert capsys.readouterr().err == "train.py (rank 3): error: --lr: invalid float value: 'x'\n"


# ------------------------------------------------------------------------------ start-up noise


def test_what_libraries_say_at_start_up_and_means_nothing_is_not_printed(
    inputs: Path, tmp_path: Path
) -> None:
    program = """
import sys
from data import load_dataset, load_vae, make_loader
from training import zero
load_vae(sys.argv[1], device="cpu")
data = load_dataset(sys.argv[2], image_size=8)
options = dict(rank=0, world_size=1, seed=0, num_workers=300)
make_loader(data, micro_batch_size=2, accum_steps=1, **options)
"""
    command = [sys.executable, "-c", program, str(inputs / "vae"), str(inputs / "images")]
    environment = os.environ | {"PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_other_lines_of_a_silenced_library_are_printed(caplog: pytest.LogCaptureFixture) -> None:
    silence("tests.noisy", "means nothing")
    silence("tests.noisy", "means nothing")
    logger = logging.getLogger("tests.noisy")
    assert len(logger.filters) == 1
    logger.warning("this %s nothing", "means")
    logger.warning("this matters")
    assert [record.getMessage() for record in caplog.records] == ["this matters"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_a_command_and_explains_every_flag(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(script, "--help")[0] == 0
    text = capsys.readouterr().out
    assert script in text and "usage:" in text
    entries = re.findall(r"^  (--.*(?:\n {6,}.*)*)", text, re.M)
    assert entries
    assert [entry for entry in entries if not re.search(r"\s{2,}\S", entry)] == []


def test_a_dry_run_prints_settings_and_sizes_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run_script("train.py", *TINY_RUN, "--results-dir", str(tmp_path), "--dry-run")
    text = capsys.readouterr().out
    assert code == 0
    assert '"num_experts": 4' in text and '"objective": "rf"' in text
    assert "parameters: 872,840 total, 762,248 activated" in text
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train.py", "--max-steps 0", "--max-steps: 0 is not in [1, 1000000000]"),
        ("train.py", "--max-steps many", "--max-steps: invalid int value: 'many'"),
        ("train.py", "--ema-decay 1.5", "--ema-decay: 1.5 is not in [0, 1]"),
        ("train.py", "--lr nan", "--lr: nan is not in [0, 1000]"),
        ("train.py", "--lr inf", "--lr: inf is not in [0, 1000]"),
        ("train.py", "--clip-grad inf", "--clip-grad: inf is not in [0, inf)"),
        ("train.py", "--aux_loss_weight nan", "--aux-loss-weight: nan is not in [0, inf)"),
        ("train.py", "--seed -1", "--seed: -1 is not in [0, 9223372036854775807]"),
        ("train.py", f"--global_seed {2**64}", f"--seed: {2**64} is not in [0, 9223372036854775"),
        ("train.py", "--num-classes 1000000000", "--num-classes: 1000000000 is not in [1, 100000]"),
        ("train.py", f"--lr {'9' * 400}", f"--lr: {'9' * 400} is not in [0, 1000]"),
        ("train.py", f"--max-steps {'9' * 5000}", "--max-steps: invalid int value: '9999"),
        ("train.py", "surplus", "unexpected 'surplus', no flag takes it"),
        ("train.py", "--rf maybe", "--rf: expected True or False, got 'maybe'"),
        ("train.py", "--model DiT-Q/2", "--model: DiT-Q/2 is none of DiT-{Ti,S,B,L,XL}/"),
        ("train.py", "--model DiT-B/3", "DiffMoE-{B,L,XL}/2; did you mean DiT-B/"),
        ("train.py", "--precision fp8", "fp8 is none of fp32, bf16, fp16"),
        ("train.py", "--no-such-flag", "unknown flag --no-such-flag; --help lists all flags"),
        ("train.py", "--max-step 1", "unknown flag --max-step; did you mean --max-steps?"),
        ("train.py", "--num_expert=1", "unknown flag --num_expert; did you mean --num-experts?"),
        ("train.py", "--accum_itr 1", "unknown flag --accum_itr; did you mean --accum-steps?"),
        ("sample.py", "--cfg-scale -1", "--cfg-scale: -1 is not in [0, inf)"),
        ("sample.py", "--cfg-interval 0 2", "2 is not in [0, 1]"),
        ("sample.py", "--num-sampling-steps 0", "0 is not in [1, 100000]"),
        ("sample.py", "--dtype int8", "int8 is none of fp32, bf16, fp16"),
    ],
)
def test_a_bad_value_is_refused_with_flag_value_and_range(
    script: str, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    required = ("--data-path", "digits") if script == "train.py" else ("--ckpt", "C")
    assert run_script(script, *required, *flags.split())[0] == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"{script}: error: ") and message in printed
    assert len(printed.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path nowhere", "--data-path nowhere is not a folder. It accepts 'digits'"),
        ("--image-size 32", "--image-size 32: digits has 8 pixels"),
        ("--vae-path nowhere", "--vae-path nowhere is not a folder"),
        ("--num-experts-per-tok 5", "num_experts_per_tok=5 must be in [1, num_experts=4]"),
        ("--class-dropout-prob 1", "class_dropout_prob=1.0 must be in [0, 1)"),
        ("--num-classes 5", "--num-classes 5 is less than the 10 classes of --data-path digits"),
        ("--accum-steps 3", "--global-batch-size 8 is not --micro-batch-size 2 x --accum-steps 3"),
        ("--init-from nowhere", "no such file: nowhere"),
        ("--resume nowhere", "--resume nowhere: no such file"),
        ("--model DiT-S/8 --image-size 12", "--image-size 12: digits has 8 pixels"),
        ("--data-path fashion-mnist --fashion-mnist-root nowhere", "cannot read the idx file"),
    ],
)
def test_values_that_do_not_fit_together_end_training_with_a_sentence(
    flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = ("--results-dir", str(tmp_path))
    assert run_script("train.py", *TINY_RUN, *results, *flags.split())[0] == 2
    printed = capsys.readouterr().err
    assert printed.startswith("train.py: error: ") and message in printed
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_error_has_exit_code_2_and_no_traceback(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    command = [sys.executable, "train.py", "--model", "DiT-S/2", "--data-path", str(missing)]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith(f"train.py: error: --data-path {missing} is not a")
    assert len(ended.stderr.splitlines()) == 1


def test_a_broken_image_ends_training_and_is_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(inputs / "images", tmp_path / "images"))
    broken = images / "class1" / "0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    flags = ("--image-size", "8", "--vae-path", "none", "--num-workers", "0", "--max-steps", "2")
    results = ("--results-dir", str(tmp_path / "results"))
    assert run_script("train.py", *TINY_RUN, "--data-path", str(images), *flags, *results)[0] == 2
    assert f"train.py: error: cannot read the image file {broken}" in capsys.readouterr().err
