"""A run goes on from its own checkpoints, with its own data, and never silently from step 0."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import TINY_RUN
from PIL import Image

from checkpoint.state import checkpoint_path, load_checkpoint
from common import process
from common.errors import FileError, UserError
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import Job, prepare
from training.loop import launch
from training.resume import check_resumable, find_resume
from training.settings import TrainSettings

CLASSES = ("bird", "cat", "dog")


def job_of(*flags: str, data: Path | str = "digits") -> Job:
    small = ("--image-size", "8", "--vae-path", "none") if data != "digits" else ()
    words = [*TINY_RUN, "--data-path", str(data), *small, *flags]
    return prepare(build_parser(None).parse_args(words), meta=True)


def settings_of(*flags: str) -> TrainSettings:
    return job_of(*flags).settings


def train(results: Path, *flags: str) -> Path:
    words = [*TINY_RUN, "--results-dir", str(results), *flags]
    launch(build_parser(None).parse_args(words), DdpTrainer)
    return results / "run"


def go_on(job: Job, **changes: Any) -> None:
    """Compare the job with a checkpoint of itself whose settings are changed."""
    settings = {**job.settings.to_dict(), **changes}
    check_resumable(job, Path("0000001.pt"), job.model.config.to_dict(), settings)


def test_a_config_from_json_and_one_of_before_a_field_are_the_same_model() -> None:
    job = job_of()
    config = json.loads(json.dumps(job.model.config.to_dict()))
    check_resumable(job, Path("0000001"), config, job.settings.to_dict())
    del config["balance"], config["affinity"]
    check_resumable(job, Path("0000001"), config, job.settings.to_dict())
    with pytest.raises(UserError, match=r"--resume: 0000001: .*depth=0"):
        check_resumable(job, Path("0000001"), {**config, "depth": 0}, job.settings.to_dict())


# ------------------------------------------------------------------------------ which checkpoint


def test_a_node_without_the_main_nodes_checkpoint_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = checkpoint_path(tmp_path / "elsewhere", 5)
    here = settings_of()
    monkeypatch.setattr(process, "call_on_main", lambda *_: elsewhere)
    with pytest.raises(FileError, match=r"--results-dir results: no .*must share it"):
        find_resume(here)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_checkpoints_that_cannot_be_read_never_start_a_run_anew(
    resume: str, tmp_path: Path
) -> None:
    settings = settings_of("--results-dir", str(tmp_path), "--resume", resume)
    path = checkpoint_path(settings.run_dir, 5)
    path.parent.mkdir(parents=True)
    path.symlink_to("/proc/self/mem")  # reading its start is an I/O error
    with pytest.raises(FileError, match=rf"cannot read {path}: Input/output error"):
        find_resume(settings)


def test_a_resume_file_that_is_not_there_is_refused_before_the_data_are_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("training.job.open_data", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(FileError, match=r"--resume nowhere\.pt: no such file"):
        job_of("--resume", "nowhere.pt", "--results-dir", str(tmp_path))


def test_the_command_that_went_back_to_a_file_goes_on_when_it_is_given_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = train(tmp_path, "--max-steps", "6", "--ckpt-every", "2")
    back = ("--resume", str(checkpoint_path(run, 2)), "--keep-last", "0", "--ckpt-every", "1")
    train(tmp_path, *back, "--max-steps", "3")
    assert f"resumed {checkpoint_path(run, 2)} at step 2" in caplog.text
    caplog.clear()
    train(tmp_path, *back, "--max-steps", "4")
    assert f"resumed {checkpoint_path(run, 3)} at step 3" in caplog.text
    assert "went back to" in caplog.text and "before: going on from" in caplog.text
    caplog.clear()
    train(tmp_path, *back, "--lr", "0.25", "--max-steps", "3")  # another course
    assert f"resumed {checkpoint_path(run, 2)} at step 2" in caplog.text


def test_the_same_command_goes_on_although_the_file_it_went_back_to_is_gone(tmp_path: Path) -> None:
    run = train(tmp_path, "--max-steps", "2", "--ckpt-every", "1")
    back = ("--resume", str(checkpoint_path(run, 1)), "--ckpt-every", "1")
    train(tmp_path, *back, "--max-steps", "3")
    checkpoint_path(run, 1).unlink(missing_ok=True)
    train(tmp_path, *back, "--max-steps", "4")
    assert load_checkpoint(checkpoint_path(run, 4))["step"] == 4


# ------------------------------------------------------------------------------ the same data


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder of three classes with two images each."""
    for label, name in enumerate(CLASSES):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(2):
            image = Image.new("RGB", (8, 8), (80 * label, 80 * index, 0))
            image.save(tmp_path / "images" / name / f"{index}.png")
    return tmp_path / "images"


def test_a_folder_that_was_moved_is_the_same_data(images: Path, tmp_path: Path) -> None:
    before = job_of(data=images).settings.data_fingerprint
    moved = job_of(data=images.rename(tmp_path / "elsewhere"))
    assert moved.settings.data_fingerprint == before
    assert before["num_images"] == 6


def test_embedded_data_have_fingerprints_of_their_own() -> None:
    digits = settings_of().data_fingerprint
    assert digits == settings_of().data_fingerprint
    assert digits["num_images"] == 1497 and len(digits["digest"]) == 32


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("rename class", r"it had 3 classes, now 3 \(gone: 'cat'; new: 'tiger'\)"),
        ("new class", r"it had 3 classes, now 4 \(new: 'ant'\)"),
        ("new image", r"it had 6 images, now 7"),
        ("rename image", r"as many images, 6, but other files or labels"),
        ("move image", r"as many images, 6, but other files or labels"),
    ],
)
def test_another_data_set_in_a_run_is_refused_by_what_differs_or_allowed_with_a_warning(
    change: str, difference: str, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = job_of(data=images).settings
    if change == "rename class":
        (images / "cat").rename(images / "tiger")
    elif change == "new class":
        shutil.copytree(images / "cat", images / "ant")
    elif change == "new image":
        shutil.copy(images / "dog" / "0.png", images / "bird" / "2.png")
    elif change == "rename image":
        (images / "dog" / "0.png").rename(images / "dog" / "5.png")
    else:
        (images / "dog" / "0.png").rename(images / "cat" / "2.png")
    saved = before.to_dict()
    job = job_of("--num-classes", "4", data=images)
    config = job.model.config.to_dict()
    with pytest.raises(UserError, match=rf"--data-path {images}: {difference}; .*--allow-new-data"):
        check_resumable(job, Path("0000001.pt"), config, saved)
    allowed = job_of("--num-classes", "4", "--allow-new-data", data=images)
    check_resumable(allowed, Path("0000001.pt"), config, saved)
    assert f"was trained on other data than --data-path {images}: it had" in caplog.text or (
        "but other files" in caplog.text
    )


def test_classes_in_another_order_are_other_data() -> None:
    job = job_of()
    with pytest.raises(UserError, match=r"it had 10 classes, now 10 \(reordered\)"):
        go_on(job, class_names=job.settings.class_names[::-1])


def test_a_checkpoint_of_before_fingerprints_goes_on_without_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = job_of()
    saved = job.settings.to_dict()
    del saved["data_fingerprint"]
    saved |= {"rf": True, "dry_run": False, "run_name": None}
    check_resumable(job, Path("0000001.pt"), job.model.config.to_dict(), saved)
    assert caplog.text == ""


def test_the_trainer_refuses_a_folder_whose_class_was_renamed(images: Path, tmp_path: Path) -> None:
    flags = ("--results-dir", str(tmp_path), "--image-size", "8", "--vae-path", "none")
    run = train(tmp_path, "--data-path", str(images), *flags, "--max-steps", "1")
    (images / "cat").rename(images / "tiger")
    trainer = DdpTrainer(
        prepare(build_parser(None).parse_args([*TINY_RUN, *flags, "--data-path", str(images)]))
    )
    with pytest.raises(UserError, match=r"gone: 'cat'; new: 'tiger'"):
        trainer.resume(checkpoint_path(run, 1))


# ------------------------------------------------------------------------------ damaged settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": 5}, ": objective 5 is not a text"),
        ({"objective": "edm"}, ": objective 'edm' is neither rf nor ddpm"),
        ({"objective": None}, " is damaged: its settings lack the objective"),
        ({"class_names": 7}, ": class_names 7 is not a list"),
        ({"class_names": [1, [2]]}, ": class_names 1 is not a text"),
        ({"data_fingerprint": "x"}, " is damaged: data_fingerprint in its settings is 'x'"),
        ({"lr": torch.zeros(3)}, r" is damaged: lr in its settings is tensor\(\[0., 0., 0.\]\)"),
    ],
)
def test_settings_of_wrong_types_are_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FileError, match=rf"0000001\.pt{message}"):
        go_on(job_of(), **changes)


def test_a_config_or_settings_that_are_no_table_are_one_line() -> None:
    job = job_of()
    bad: Any = ["a", "list"]
    config, settings = job.model.config.to_dict(), job.settings.to_dict()
    with pytest.raises(FileError, match=r"settings .* is not an object"):
        check_resumable(job, Path("0000001.pt"), config, bad)
    with pytest.raises(FileError, match=r"config .* is not an object"):
        check_resumable(job, Path("0000001.pt"), bad, settings)
    with pytest.raises(FileError, match=r"depth \"deep\" is not int"):
        check_resumable(job, Path("0000001.pt"), config | {"depth": "deep"}, settings)


# ------------------------------------------------------------------------------ older versions


def test_a_config_without_the_fields_that_came_later_is_of_the_same_model() -> None:
    job = job_of()
    first_version = (
        *("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads"),
        *("mlp_ratio", "num_classes", "class_dropout_prob", "num_experts", "num_experts_per_tok"),
        *("num_shared_experts", "norm_topk_prob", "learn_sigma", "qk_norm", "mlp_type"),
    )
    config = job.model.config.to_dict()
    old = {name: config[name] for name in first_version}
    check_resumable(job, Path("0000001.pt"), old, job.settings.to_dict())
    with pytest.raises(UserError, match=r"was trained with another depth; give the same flags"):
        check_resumable(job, Path("0000001.pt"), old | {"depth": 5}, job.settings.to_dict())


def test_an_epsilon_of_norms_that_are_not_there_is_of_the_same_model() -> None:
    """Recipes of before did not say theirs."""
    job = job_of()
    config = job.model.config.to_dict() | {"qk_norm_eps": 1e-5}
    assert not job.model.config.qk_norm and job.model.config.qk_norm_eps == 1e-6
    check_resumable(job, Path("0000001.pt"), config, job.settings.to_dict())
    with pytest.raises(UserError, match=r"was trained with another qk_norm, qk_norm_eps; give"):
        check_resumable(job, Path("0000001.pt"), config | {"qk_norm": True}, job.settings.to_dict())
