"""DeepSpeed's engine from the inside: its configuration, and the shards that ZeRO makes of a model.

In order: `read_config` and `engine_config` (a file plus the flags), `join` (the process group),
`build_engine` (a meta model to an engine whose weights are still to be filled in), and `Shards`,
the one place that knows where each ZeRO stage keeps this rank's part of which parameter.
"""

import argparse
import json
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common import process
from common.process import Runtime
from common.quiet import silence_accelerator
from models import DiT
from sharded import Fragment
from train_settings import TrainSettings

silence_accelerator()
import deepspeed  # noqa: E402

# What the flags own, by its name in a DeepSpeed file.
OWNED_BY_FLAGS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "accum_steps",
    "gradient_clipping": "clip_grad",
}
SWAP_CHUNK = 2**24  # elements moved at a time when two sets of shards change places


# ---------------------------------------------------------------- configuration


def read_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed file: ZeRO and precision only.

    Raises:
        FileNotFoundError, ValueError: naming what is wrong with the file and what to do.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--deepspeed-config {path}: no such file")
    try:
        config = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--deepspeed-config {path} is no JSON: {error}") from error
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise ValueError(
                f"--deepspeed-config {path} has {section!r}, but the flags own the optimizer and "
                "its rate: remove it and give --lr, --warmup-steps, --weight-decay"
            )
    zero = config.get("zero_optimization", {})
    for section in ("offload_optimizer", "offload_param"):
        if (device := zero.get(section, {}).get("device", "none")) not in ("none", "cpu"):
            raise ValueError(f"--deepspeed-config {path}: {section} to {device!r}, only to 'cpu'")
    return config


def zero_stage(config: Mapping[str, Any]) -> int:
    """Return the ZeRO stage of a configuration, 0 without ZeRO."""
    return config.get("zero_optimization", {}).get("stage", 0)


def resolve_precision(args: argparse.Namespace, config: Mapping[str, Any]) -> str:
    """Set `args.precision` to the file's or the flag's, or to what this hardware has instead.

    Returns:
        The precision that was asked for.

    Raises:
        ValueError: if file and flag contradict each other.
    """
    device = process.pick_device()
    enabled = [name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled") is True]
    wanted = enabled[0] if enabled else args.precision or process.default_precision(device)
    if enabled and args.precision not in (None, wanted):
        raise ValueError(
            f"--precision {args.precision}, but --deepspeed-config {args.deepspeed_config} enables "
            f"{enabled[0]}: drop the flag or that section of the file"
        )
    args.precision = wanted
    if wanted == "bf16" and not process.has_fast_bf16(device):
        args.precision = "fp16" if device.type == "cuda" else "fp32"
    elif wanted == "fp16" and device.type == "cpu":  # DeepSpeed has none there
        args.precision = process.default_precision(device)
    return wanted


def engine_config(args: TrainSettings, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a file with what the flags own.

    Raises:
        ValueError: if the file has another value for one of them, or stage and precision don't fit.
    """
    for key, name in OWNED_BY_FLAGS.items():
        value, ours = config.get(key, "auto"), getattr(args, name)
        if value not in ("auto", ours):
            raise ValueError(
                f"--deepspeed-config {args.deepspeed_config} has {key} {value}, but "
                f"--{name.replace('_', '-')} is {ours}: remove it from the file"
            )
    stage = zero_stage(config)
    if stage == 0 and args.precision != "fp32":
        raise ValueError(
            f"--deepspeed-config {args.deepspeed_config}: stage 0 with {args.precision} is not "
            "supported, take stage 1 or --precision fp32"
        )
    if stage == 3 and args.compile:
        raise ValueError("--compile does not work with ZeRO stage 3: drop it or take stage 2")
    complete = {
        **config,
        **{key: getattr(args, name) for key, name in OWNED_BY_FLAGS.items()},
        # Always clipped, if only at infinity: the engine computes the norm, a curve, on the way.
        "gradient_clipping": args.clip_grad or float("inf"),
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, on the CPU too
        "steps_per_print": 10**12,
    }
    for name in ("bf16", "fp16"):
        complete[name] = {**config.get(name, {}), "enabled": name == args.precision}
    if args.precision == "fp32":
        complete.pop("data_types", None)
    return complete


# ---------------------------------------------------------------- engine


def join() -> Runtime:
    """Join the process group through DeepSpeed; a process that nobody launched is one of one."""
    if "RANK" not in os.environ:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    rt = process.setup()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # Else gloo compiles an operator for a minute, which is used for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if rt.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, verbose=False)
    return rt


def partition(model: DiT, config: dict[str, Any], device: torch.device) -> None:
    """Give a meta model memory for this rank's share of each parameter only (ZeRO stage 3).

    The largest module's parameters are the most that is ever whole here.
    """
    for module in reversed(list(model.modules())):  # children first
        own = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(memory, parameter.requires_grad))
        if own:
            deepspeed.zero.Init(module, config_dict_or_path=config, dtype=own[0][1].dtype)


def build_engine(
    model: DiT, config: dict[str, Any], args: TrainSettings, device: torch.device
) -> tuple[Any, torch.optim.AdamW]:
    """Wrap a meta model; its weights are whatever the memory held, see `Shards.fill`.

    Returns:
        The engine, and the torch optimizer inside it.
    """
    model.to(process.DTYPES[args.precision])
    if zero_stage(config) == 3:
        partition(model, config, device)
    else:
        model.to_empty(device=device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    return engine, optimizer


# ---------------------------------------------------------------- shards


class _Place(NamedTuple):
    """Where a piece of a parameter is: flat[shard][offset : offset + numel]."""

    shard: int
    offset: int
    start: int  # first element within the flattened parameter
    numel: int


class Shards:
    """This rank's part of the trained parameters in float32, however the stage cuts them.

    Attributes:
        flat: the tensors that the optimizer updates; at stage 0 the whole parameters.
        is_replica: another rank holds, and saves, the same.
    """

    def __init__(self, engine: Any, rt: Runtime) -> None:
        self._engine, self._zero = engine, engine.optimizer
        self._stage = engine.zero_optimization_stage()
        # At stage 0 all ranks hold all, and one of them is enough on disk.
        self.is_replica = self._stage == 0 and not rt.is_main
        trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.flat: list[Tensor]
        if self._stage == 3:
            self.flat = self._zero.fp32_partitioned_groups_flat
            places = _places_of_stage_3(self._zero.fp16_groups, rt.rank)
            self._places = {name: places[p] for name, p in trained.items() if p in places}
        elif self._stage == 0:
            self.flat = list(trained.values())
            pairs = enumerate(trained.items())
            self._places = {name: _Place(i, 0, 0, p.numel()) for i, (name, p) in pairs}
        else:
            self.flat = (
                getattr(self._zero, "single_partition_of_fp32_groups", None)
                or self._zero.fp32_groups_flat_partition
            )  # stage 1 in bf16 has its own optimizer
            maps = {n: p._hp_mapping for n, p in trained.items() if p._hp_mapping is not None}
            self._places = {
                name: _Place(
                    part.param_group_index,
                    part.hp_fragment_address.start,
                    part.lp_fragment_address.start,
                    part.hp_fragment_address.numel,
                )
                for name, part in maps.items()
            }

    def zeros(self) -> list[Tensor]:
        """Return tensors like `flat`, zeroed."""
        return [torch.zeros_like(shard, requires_grad=False) for shard in self.flat]

    def fragments(self, flat: list[Tensor]) -> Iterator[Fragment]:
        """Cut tensors like `flat` into this rank's named pieces, to save or restore."""
        for name, (shard, offset, start, numel) in self._places.items():
            piece = flat[shard].detach().view(-1)[offset : offset + numel]
            yield Fragment(name, start, piece)

    def fill(self, name: str, value: Tensor) -> None:
        """Keep this rank's part of a whole parameter; `refresh` when all are filled.

        Args:
            name: of a trained or frozen parameter.
            value: of its whole shape, the same on all ranks; frozen ones are filled together.
        """
        parameter = self._engine.module.get_parameter(name)
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], 0, enabled=self._stage == 3):
                parameter.data.copy_(value)
        elif name in self._places:
            shard, offset, start, numel = self._places[name]
            piece = value.view(-1)[start : start + numel]
            self.flat[shard].detach().view(-1)[offset : offset + numel].copy_(piece)

    def whole_grad_norm(self) -> Tensor | None:
        """Return the gradient's norm before a step at stage 0, where the engine keeps none."""
        if self._stage > 0:
            return None
        return nn.utils.get_total_norm([p.grad for p in self.flat if p.grad is not None])

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the weights that the model computes with up to date with `flat`."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            self._zero._partition_all_parameters()
            for group in range(len(self.flat)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if kept := self._zero.persistent_parameters:
                kept[0].all_gather(kept)

    @contextmanager
    def swapped(self, other: list[Tensor]) -> Iterator[nn.Module]:
        """Yield the model with other weights, tensors like `flat`, in eval mode; exact on return.

        Collective under ZeRO, and so is every forward of the model.
        """
        self._swap(other)
        self._engine.eval()
        try:
            yield self._engine.module
        finally:
            self._engine.train()
            self._swap(other)

    @torch.no_grad()
    def _swap(self, other: list[Tensor]) -> None:
        for ours, theirs in zip(self.flat, other, strict=True):
            pairs = zip(
                ours.view(-1).split(SWAP_CHUNK), theirs.view(-1).split(SWAP_CHUNK), strict=True
            )
            for a, b in pairs:
                kept = a.clone()
                a.copy_(b)
                b.copy_(kept)
        self.refresh()


def _places_of_stage_3(groups: list[list[Any]], rank: int) -> dict[nn.Parameter, _Place]:
    """Find the pieces: each parameter is cut evenly over the ranks, the last one is padded."""
    places = {}
    for shard, group in enumerate(groups):
        offset = 0
        for parameter in group:
            size = parameter.partition_numel()
            start = min(rank * size, parameter.ds_numel)
            numel = min(size, parameter.ds_numel - start)
            if numel:
                places[parameter] = _Place(shard, offset, start, numel)
            offset += size
    return places
