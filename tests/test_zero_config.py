"""DeepSpeed's files: what flags own of them, and what is refused."""

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import REPO

from common.errors import FileError, UserError
from training import zero_config


def flags_of(path: Path, **changes: Any) -> Any:
    given = {"global_batch_size": 8, "micro_batch_size": 4, "accum_steps": 1, "clip_grad": 1.0}
    others = {"precision": None, "compile": False, "lr": 1e-4}
    return Namespace(
        **{"deepspeed_config": str(path), "expert_parallel": None, **given, **others, **changes}
    )


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Any]:
    """Yield a function that writes an engine file and returns its path."""

    def write(content: dict[str, Any]) -> Path:
        (tmp_path / "engine.json").write_text(json.dumps(content))
        return tmp_path / "engine.json"

    yield write


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_our_engine_files_are_strict_json_of_zero_and_precision(name: str) -> None:
    config = json.loads((REPO / f"config/{name}.json").read_text())
    assert set(config) == {"torch_autocast", "zero_optimization"}
    assert zero_config.read_config(REPO / f"config/{name}.json") == config


@pytest.mark.parametrize(
    ("key", "flag", "value"),
    [
        ("train_batch_size", "--global-batch-size is 8", 16),
        ("train_micro_batch_size_per_gpu", "--micro-batch-size is 4", 1),
        ("gradient_accumulation_steps", "--accum-steps is 1", 2),
        ("gradient_clipping", "--clip-grad is 1.0", 0.1),
    ],
)
def test_a_file_that_contradicts_a_flag_is_refused(
    key: str, flag: str, value: float, file: Any
) -> None:
    path = file({key: value})
    with pytest.raises(ValueError, match=rf"engine\.json has {key} {value}, but {flag}"):
        zero_config.engine_config(flags_of(path, precision="fp32"), zero_config.read_config(path))


def test_a_file_with_an_optimizer_or_no_json_is_refused(file: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 'optimizer', but the flags own"):
        zero_config.read_config(file({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}))
    path = tmp_path / "comment.json"
    path.write_text('{"train_batch_size": 8, // eight\n}')
    with pytest.raises(ValueError, match=r"comment\.json is no JSON: .*line 1"):
        zero_config.read_config(path)
    with pytest.raises(FileError, match=r"--deepspeed-config nowhere: no such file"):
        zero_config.read_config("nowhere")


@pytest.mark.parametrize(
    "section", [{"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bf16"}}]
)
def test_the_file_owns_the_precision_and_a_contradiction_is_refused(
    section: dict[str, Any], file: Any
) -> None:
    path = file(section)
    with pytest.raises(ValueError, match=r"--precision fp32, but .* enables bf16"):
        zero_config.resolve_precision(
            flags_of(path, precision="fp32"), zero_config.read_config(path)
        )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], r"has a list, not"),
        ({"zero_optimization": 3}, r"zero_optimization is 3, not"),
        ({"zero_optimization": {"stage": 4}}, r"ZeRO stage 4 is none of"),
        ({"zero_optimization": {"stage": "2"}}, r"ZeRO stage '2' is none of"),
        ({"bf16": True}, r"bf16 is True, not"),
        ({"torch_autocast": {"enabled": True, "dtype": "fp8"}}, r"dtype is 'fp8', not bfloat16"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, r"to 'nvme', only to 'cpu'"),
    ],
)
def test_a_file_of_wrong_types_is_refused(content: Any, message: str, file: Any) -> None:
    with pytest.raises(UserError, match=rf"--deepspeed-config .*engine\.json.*{message}"):
        zero_config.read_config(file(content))


def test_half_precision_is_autocast_and_stage_3_alone_sends_weights_of_matmuls_in_half(
    file: Any,
) -> None:
    path = file({"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}})
    for stage in range(4):
        given = {**zero_config.read_config(path), "zero_optimization": {"stage": stage}}
        config = zero_config.engine_config(flags_of(path, precision="fp16"), given)
        assert "bf16" not in config and "data_types" not in config
        assert config["torch_autocast"]["dtype"] == "float16"
        sent = config["torch_autocast"]["lower_precision_safe_modules"]
        assert ("models.Experts" in sent) == (stage == 3) and "models.TopKRouter" not in sent


def test_hardware_without_the_files_precision_gets_another(
    file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("common.process.pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("common.process.has_fast_bf16", lambda device: False)
    args = flags_of(file({"bf16": {"enabled": True}}))
    found = zero_config.resolve_precision(args, zero_config.read_config(args.deepspeed_config))
    assert found == ("bf16", "fp32")
