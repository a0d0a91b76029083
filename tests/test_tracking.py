"""What a run tells of itself: work and time by phase, the load as a picture, other trackers."""

import importlib
import importlib.util
import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import TINY_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from common.errors import UserError
from models import DiT_models
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.job import prepare
from training.loop import launch
from training.throughput import Phases, forward_macs, peak_rate
from training.trackers import COLUMNS, LoadPicture


def train(results: Path, *flags: str) -> Path:
    launch(
        build_parser(None).parse_args([*TINY_RUN, "--results-dir", str(results), *flags]),
        DdpTrainer,
    )
    return results / "run"


@pytest.mark.parametrize(
    ("size", "experts", "published"),
    [
        ("S", 8, 15.43), ("S", 16, 15.44), ("B", 8, 61.68), ("L", 8, 219.26),
        ("XL", 8, 323.74), ("G", 16, 690.94),
    ],
)  # fmt: skip
def test_the_work_of_an_image_is_the_published_one(size: str, experts: int, published: float):
    with torch.device("meta"):
        config = DiT_models[f"DiT-{size}/2"](num_experts=experts).config
    linear, scores = forward_macs(config)
    assert linear / 1e9 == pytest.approx(published, abs=0.006)
    assert scores == config.depth * 2 * 256 * 256 * config.hidden_size


@pytest.mark.parametrize("fields", [{}, {"num_experts": 0, "mlp_type": "gelu"}])
def test_the_work_counted_is_that_of_the_linear_layers_that_run(fields: dict[str, Any]):
    """Every linear layer of a dense model is hooked; a mixture is counted by hand."""
    model = DiT_models["DiT-Ti/2"](
        input_size=8, num_classes=3, **{"num_experts": 4, **fields}
    ).eval()
    seen = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal seen
        weight = module.weight
        seen += output.numel() // weight.shape[0] * weight.numel()

    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    for module in model.modules():
        if isinstance(module, kinds):
            module.register_forward_hook(count)
    model(torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    if not fields:  # SwiGLU runs without its Linear modules; experts have none
        width, tokens = 96, 16
        seen += 4 * tokens * width * (4 + 3 * (2 * 4 * width + 2 * width))
    assert forward_macs(model.config)[0] == seen


def test_rates_are_known_by_the_name_of_the_device_in_half_precision(monkeypatch: Any):
    device = torch.device("cuda", 0)
    for name, rate in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_rate(device, "bf16") == rate
        assert peak_rate(device, "fp32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Radeon")
    assert peak_rate(device, "bf16") is None and peak_rate(torch.device("cpu"), "bf16") is None


def test_time_within_a_phase_counts_for_the_inner_one_alone(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 1.0, 3.0, 10.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    phases = Phases()
    with phases.during("step"), phases.during("data"):
        pass
    assert (phases.seconds["data"], phases.seconds["step"]) == (2.0, 8.0)


def test_the_picture_of_the_load_is_white_where_even_red_where_crowded_and_blue_where_empty():
    picture = LoadPicture()
    assert picture.pixels() is None
    picture.add(torch.tensor([[5, 5, 5, 5], [0, 20, 10, 10]]))
    picture.add(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1]]))
    pixels = picture.pixels()
    assert pixels is not None and pixels.shape == ((4 + 1 + 4) * 3, 2 * 3, 3)
    even, blue, red = [245, 245, 245], [33, 72, 135], [176, 28, 44]
    assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == even
    assert pixels[4 * 3, 0].tolist() == [0, 0, 0]  # between layers
    assert (pixels[5 * 3, 0].tolist(), pixels[6 * 3, 0].tolist()) == (blue, red)
    for _ in range(COLUMNS):
        picture.add(torch.ones(2, 4))
    pixels = picture.pixels()
    assert pixels is not None and pixels.shape[1] <= COLUMNS * 3


def test_a_run_has_the_load_as_a_picture_and_tells_its_time_and_work(tmp_path: Path) -> None:
    run = train(tmp_path, "--max-steps", "4", "--log-every", "1", "--ckpt-every", "2")
    events = EventAccumulator(str(run)).Reload()
    assert [image.step for image in events.Images("experts/load")] == [2, 4]
    assert (events.Images("experts/load")[1].width, events.Images("experts/load")[1].height) == (
        4 * 3, (4 * 4 + 3) * 3,
    )  # fmt: skip
    seconds = {phase: events.Scalars(f"time/{phase}") for phase in ("data", "step", "save", "draw")}
    assert all(
        0 < data.value < step.value
        for data, step in zip(seconds["data"], seconds["step"], strict=True)
    )
    assert [point.value > 0 for point in seconds["save"]] == [False, False, True, False]
    macs = sum(forward_macs(DdpTrainer(prepare(parsed(tmp_path))).model.config))
    speed, rate = (
        events.Scalars(f"system/{name}")[0].value
        for name in ("images_per_second", "tflops_per_second")
    )
    assert rate == pytest.approx(6 * macs * speed / 1e12)
    assert events.Scalars("system/peak_memory_gib")[0].value > 0.1
    assert "time" not in events.Tags()["images"] and "step " in (run / "log.txt").read_text()


def test_tensorboard_has_a_chart_of_each_measure_of_the_load_with_a_line_a_layer(
    tmp_path: Path,
) -> None:
    run = train(tmp_path, "--max-steps", "1", "--log-every", "1")
    events = EventAccumulator(str(run)).Reload()
    config = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    (category,) = layout_pb2.Layout.FromString(config).category
    assert [chart.title for chart in category.chart] == [
        "max_vio by layer", "entropy by layer", "dead by layer",
    ]  # fmt: skip
    curves = events.Tags()["scalars"]
    for chart in category.chart:
        lines = [[c for c in curves if re.match(tag, c)] for tag in chart.multiline.tag]
        assert len(lines) == 4 and all(len(found) == 1 for found in lines), chart.title


def parsed(results: Path) -> Any:
    return build_parser(None).parse_args([*TINY_RUN, "--results-dir", str(results)])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is here")
def test_a_tracker_whose_package_is_missing_is_refused_before_anything(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tracker wandb needs a package that is not here: pip"):
        train(tmp_path, "--tracker", "tensorboard", "wandb")
    assert not (tmp_path / "run").exists()


def wandb_records(path: Path) -> Iterator[bytes]:
    """Read a .wandb file: 7 bytes, then a log of LevelDB, records cut at blocks of 32 KiB."""
    content, position, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # no room for a head: padding
            position += left
            continue
        length, kind = struct.unpack(
            "<HB", content[position + 4 : position + 7]
        )  # after a checksum
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def test_the_files_of_wandb_offline_hold_settings_curves_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    internal: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    monkeypatch.setenv("WANDB_MODE", "offline")
    flags = ("--log-every", "1", "--ckpt-every", "2", "--tracker", "tensorboard", "wandb")
    run = train(tmp_path, *flags, "--max-steps", "2")
    train(tmp_path, *flags, "--max-steps", "4")  # goes on as the same run
    config: dict[str, Any] = {}
    points, ids = [], set()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path):
            record = internal.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                update = record.run.config.update
                config |= {item.key: json.loads(item.value_json) for item in update}
            elif record.WhichOneof("record_type") == "history":
                items = {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                if "train/loss" in items:
                    points.append((items["_step"], items["train/loss"]))
    curve = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert [step for step, _ in points] == [point.step for point in curve] == [1, 2, 3, 4]
    assert [loss for _, loss in points] == pytest.approx([point.value for point in curve])
    assert config["num_experts"] == 4 and len(ids) == 1
    pictures = [*(run / "wandb").rglob("files/media/images/experts/load*.png")]
    assert len({picture.name for picture in pictures}) == 2
