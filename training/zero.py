"""DeepSpeed's engine from the inside: how it steps, and the shards that ZeRO makes of a model.

In order: `join` (the process group), `build_engine` (a meta model to an engine whose weights are
still to be filled in), `declare_experts` (of `--expert-parallel`), and `Engine`, one class a ZeRO
stage: how it makes a step, and where it keeps this rank's part of which parameter. The settings are
made in training/zero_config.py.

Weights are float32 at every stage and half precision is autocast, as in train.py: router, position
table, embeddings and norms are never rounded. Stage 3 sends the weights of matmuls, and their
gradients, in half; autocast would round the weights next.
"""

import os
import socket
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from checkpoint.sharded import Fragment
from common import process
from common.process import Runtime
from common.quiet import silence_accelerator
from models import DiT
from training.expert_parallel import ExpertParallel
from training.optimization import adam_arguments
from training.parameters import optimizer_groups
from training.settings import TrainSettings
from training.zero_config import zero_stage

silence_accelerator()
import deepspeed  # noqa: E402
from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler  # noqa: E402
from deepspeed.utils import groups as rank_groups  # noqa: E402

# What DeepSpeed does not promise to keep, by the object that has it. A test takes each from a real
# engine, so that an upgrade that removes one fails by its name.
PRIVATE_NAMES = {
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.utils.groups": ("_create_expert_and_data_parallel",),
    "engine with experts": ("has_moe_layers",),
    "optimizer with experts": ("is_moe_param_group", "real_dp_process_group"),
    "engine at stage 0": ("torch_autocast_z0_gradscaler",),
    "optimizer of stages 1 to 3": ("torch_autocast_gradscaler", "loss_scaler"),
    "optimizer of stages 1 and 2": ("single_partition_of_fp32_groups", "update_lp_params"),
    "parameter of stages 1 and 2": ("_hp_mapping",),
    "_hp_mapping": ("param_group_index", "hp_fragment_address", "lp_fragment_address"),
    "optimizer of stage 3": (
        *("fp16_groups", "fp16_partitioned_groups_flat", "fp32_partitioned_groups_flat"),
        *("persistent_parameters", "offload_optimizer"),
        *("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters"),
    ),
    "parameter of stage 3": ("partition_numel", "ds_numel", "all_gather"),
    "DynamicLossScaler": ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis"),
}

# As torch's GradScaler, which train.py has: halved by every overflow; below 1 the run is given up.
LOSS_SCALE: dict[str, Any] = {
    **{"init_scale": 2**16, "scale_window": 2000, "min_scale": 0.25, "delayed_shift": 1},
    **{"consecutive_hysteresis": False, "raise_error_at_min_scale": False},
}
SWAP_CHUNK = 2**24  # elements moved at a time when two sets of shards change places


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
        for name, buffer in list(module.named_buffers(recurse=False)):  # small: whole on all ranks
            setattr(module, name, torch.empty_like(buffer, device=device))
        if own:
            deepspeed.zero.Init(module, config_dict_or_path=config, dtype=own[0][1].dtype)


def build_engine(
    model: DiT,
    config: dict[str, Any],
    settings: TrainSettings,
    rt: Runtime,
    part: ExpertParallel | None = None,
) -> "Engine":
    """Wrap a model; its weights are whatever the memory held, see `Engine.fill`.

    Args:
        model: on the meta device, or cut by `part`.
        config: of the engine.
        settings: of the run.
        rt: of this process.
        part: this rank's of a model whose experts are cut; not at stage 3.
    """
    stage = zero_stage(config)
    if stage == 3:
        partition(model, config, rt.device)
    elif part is None:
        model.to_empty(device=rt.device)
    groups = optimizer_groups(model.named_parameters(), settings)
    if part is not None:
        groups = declare_experts(model, groups, part)
        model.add_module(MARK, ExpertMark(model.config.num_experts))
    optimizer = torch.optim.AdamW(groups, **adam_arguments(settings), fused=True)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, dist_init_required=False
    )
    if part is not None:
        delattr(model, MARK)
    return STAGES[stage](engine, optimizer, rt, settings, part)


MARK = "deepspeed_experts"  # what the mark is called within the model while the engine looks for it


class ExpertMark(MoE):
    """By its class the engine knows a model that has experts; it has no parameters, and no use."""

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Do nothing: `declare_experts` made the groups of ranks."""


def declare_experts(
    model: DiT, groups: list[dict[str, Any]], part: ExpertParallel
) -> list[dict[str, Any]]:
    """Tell DeepSpeed which parameters only some ranks have, so that it sums and cuts over those.

    DeepSpeed divides their gradients by all ranks and counts each once in the norm, as we do; at
    stage 0 only its norm is another, see `WholeEngine`.

    Args:
        model: cut.
        groups: of `optimizer_groups`.
        part: of this rank.

    Returns:
        The groups with cut experts apart, in the words that DeepSpeed has for it.
    """
    assert part.group is not None
    rank_groups._create_expert_and_data_parallel(part.group.size)
    ranks = f"ep_size_{part.group.size}"
    for name in part.cut:
        parameter: Any = model.get_parameter(name)
        parameter.allreduce, parameter.group_name = False, ranks
    apart = []
    for group in groups:
        for mark in ({}, {"moe": True, "name": ranks}):
            if names := [name for name in group["names"] if (name in part.cut) == bool(mark)]:
                params = [model.get_parameter(name) for name in names]
                apart.append({**group, "params": params, "names": names, **mark})
    return apart


class Place(NamedTuple):
    """Where a piece of a parameter is: flat[shard][offset : offset + numel]."""

    shard: int
    offset: int
    start: int  # first element within the flattened parameter
    numel: int


class Engine(ABC):
    """DeepSpeed's engine, and this rank's part of the trained parameters in float32.

    Attributes:
        wrapped: the module to train through.
        optimizer: torch's, inside the engine.
        buffers: biases and thresholds of routers by name, whole and the same on all ranks.
        frozen: names of the parameters of `--freeze`.
        flat: the tensors that it updates.
        part: this rank's of a model whose experts are cut, else None.
        scaler: of the loss in float16, else None.
    """

    wrapped: Any
    flat: list[Tensor]
    scaler: Any = None

    def __init__(
        self,
        wrapped: Any,
        optimizer: torch.optim.AdamW,
        rt: Runtime,
        settings: TrainSettings,
        part: ExpertParallel | None,
    ) -> None:
        self.wrapped, self.optimizer, self._zero = wrapped, optimizer, wrapped.optimizer
        self.part, self._rt = part, rt
        self._max_norm = settings.clip_grad or float("inf")
        trained = {n: p for n, p in wrapped.module.named_parameters() if p.requires_grad}
        self.buffers = dict(wrapped.module.named_buffers())
        known = {*trained, "pos_embed"}
        self.frozen = [n for n, _ in wrapped.module.named_parameters() if n not in known]
        self.flat, self._places = self._lay_out(trained, rt)
        if part is not None:  # within the whole parameter, not within this rank's part of it
            for name, place in self._places.items():
                start = part.places[name].start + place.start
                self._places[name] = place._replace(start=start)
        self._scale_losses(settings.precision == "fp16")

    # -- what a stage decides

    @abstractmethod
    def _lay_out(
        self, trained: dict[str, nn.Parameter], rt: Runtime
    ) -> tuple[list[Tensor], dict[str, Place]]:
        """Return `flat`, and where in it this rank's pieces of which parameters are."""

    @abstractmethod
    def refresh(self) -> None:
        """Bring the weights that the model computes with up to date with `flat`."""

    def _scale_losses(self, fp16: bool) -> None:
        """Replace the loss scaler that autocast to float16 gets here.

        Each rank's would look for overflows in its own shards alone, and never lower its scale.
        """
        self._zero.torch_autocast_gradscaler = None
        if fp16:
            self.scaler = self._zero.loss_scaler = DynamicLossScaler(**LOSS_SCALE)

    def accumulate(self, loss: Tensor) -> None:
        """Run a micro-batch's backward pass; the last one of a step, which it counts, updates."""
        self.wrapped.backward(loss)
        self.wrapped.step()

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with in float16, else 1."""
        return 1.0 if self.scaler is None else self.scaler.loss_scale

    def grad_norm(self) -> Tensor | float:
        """Return the norm of the last step's gradient, before it was clipped."""
        return self.wrapped.get_global_grad_norm()

    def was_skipped(self) -> bool:
        """Tell whether the last step's gradient was not finite, so that nothing was updated."""
        return not self.wrapped.was_step_applied()

    def scale_state(self) -> dict[str, float]:
        """Return the state of the loss scaler, plain values; empty without one."""
        names = PRIVATE_NAMES["DynamicLossScaler"]
        return {} if self.scaler is None else {name: getattr(self.scaler, name) for name in names}

    def load_scale_state(self, state: Mapping[str, float]) -> None:
        """Restore what `scale_state` returned, if that was a dynamic scale and is needed."""
        if self.scaler is not None and "cur_iter" in state:
            for name in PRIVATE_NAMES["DynamicLossScaler"]:
                setattr(self.scaler, name, state[name])

    # -- what is the same for all

    def moments(self, kind: str) -> list[Tensor]:
        """Return Adam's "exp_avg" or "exp_avg_sq", tensors like `flat`; zeros before a step."""
        states = [self.optimizer.state.get(shard, {}) for shard in self.flat]
        return [
            state[kind] if kind in state else torch.zeros_like(shard, requires_grad=False)
            for shard, state in zip(self.flat, states, strict=True)
        ]

    def adam_step(self) -> float:
        """Return how many steps Adam has counted, for its bias correction."""
        return float(self.optimizer.state.get(self.flat[0], {}).get("step", 0))

    def set_adam(self, step: float, moments: Mapping[str, list[Tensor]]) -> None:
        """Let Adam continue from a step with its moments, by kind, tensors like `flat`."""
        for i, shard in enumerate(self.flat):
            self.optimizer.state[shard] = {
                "step": torch.tensor(step, device=shard.device),
                **{kind: tensors[i] for kind, tensors in moments.items()},
            }

    def fragments(self, flat: list[Tensor]) -> Iterator[Fragment]:
        """Cut tensors like `flat` into this rank's named pieces, to restore."""
        for name, (shard, offset, start, numel) in self._places.items():
            piece = flat[shard].detach().view(-1)[offset : offset + numel]
            yield Fragment(name, start, piece)

    def shares(self, flat: list[Tensor]) -> Iterator[Fragment]:
        """Cut tensors like `flat` so that of all ranks one saves each element."""
        return self.fragments(flat)

    def fill(self, name: str, value: Tensor) -> None:
        """Keep this rank's part of a whole parameter; `refresh` when all are filled.

        Args:
            name: of a trained or frozen parameter, or of a buffer.
            value: of its whole shape, the same on all ranks; frozen ones are filled together.
        """
        if name in self.buffers:
            self.buffers[name].copy_(value)
            return
        parameter = self.wrapped.module.get_parameter(name)
        if not parameter.requires_grad:
            with self._whole(parameter):
                parameter.data.copy_(value)
        elif name in self._places:
            shard, offset, start, numel = self._places[name]
            piece = value.view(-1)[start : start + numel]
            self.flat[shard].detach().view(-1)[offset : offset + numel].copy_(piece)

    def frozen_parameters(self) -> dict[str, Tensor]:
        """Return what `--freeze` keeps as it was, whole on every rank; called on all together."""
        values = {}
        for name in self.frozen:
            parameter = self.wrapped.module.get_parameter(name)
            with self._whole(parameter):
                values[name] = parameter.detach().to("cpu", copy=True)
        return values

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        """Have a frozen parameter whole, to be read or written."""
        yield

    @contextmanager
    def swapped(self, other: list[Tensor]) -> Iterator[nn.Module]:
        """Yield the model with other weights, tensors like `flat`, in eval mode; exact on return.

        Collective under ZeRO, and so is every forward of the model.
        """
        self._swap(other)
        self.wrapped.eval()
        try:
            yield self.wrapped.module
        finally:
            self.wrapped.train()
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


class WholeEngine(Engine):
    """Stage 0: every rank holds, and updates, all but the other ranks' experts."""

    def _lay_out(
        self, trained: dict[str, nn.Parameter], rt: Runtime
    ) -> tuple[list[Tensor], dict[str, Place]]:
        places = {name: Place(i, 0, 0, p.numel()) for i, (name, p) in enumerate(trained.items())}
        return list(trained.values()), places

    def _scale_losses(self, fp16: bool) -> None:
        self.scaler = self.wrapped.torch_autocast_z0_gradscaler  # torch's; None but in float16
        self._scale = self.loss_scale

    @property
    def loss_scale(self) -> float:
        """What losses are multiplied with in float16, else 1."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def accumulate(self, loss: Tensor) -> None:
        """Run a micro-batch's backward pass; the engine keeps no norm here, so we compute it."""
        self._scale = self.loss_scale
        self.wrapped.backward(loss)
        if self.part is None:
            gradients = [p.grad for p in self.flat if p.grad is not None]
            self._norm = nn.utils.get_total_norm(gradients) / self._scale
        elif self.wrapped.is_gradient_accumulation_boundary():
            # The engine would clip by the mean of the ranks' norms: its settings tell it not to.
            if self.scaler is not None:
                self.part.share_overflow()
                self.scaler.unscale_(self._zero)
            self._norm = self.part.clip_gradients(self._max_norm)
        self.wrapped.step()

    def shares(self, flat: list[Tensor]) -> Iterator[Fragment]:
        """Let the main rank save all, or, of cut experts, all ranks evenly what they have."""
        if self.part is not None:
            named = {name: flat[place.shard] for name, place in self._places.items()}
            return self.part.fragments(named)
        return self.fragments(flat) if self._rt.is_main else iter(())

    def grad_norm(self) -> Tensor:
        """Return the norm of the last step's gradient, before it was clipped."""
        return self._norm

    def was_skipped(self) -> bool:
        """Tell whether the last step's gradient was not finite, so that nothing was updated."""
        return self.loss_scale < self._scale

    def scale_state(self) -> dict[str, float]:
        """Return the state of the loss scaler, plain values; empty without one."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_scale_state(self, state: Mapping[str, float]) -> None:
        """Restore what `scale_state` returned; of other stages' scalers, the scale."""
        if self.scaler is not None and (scale := state.get("scale", state.get("cur_scale"))):
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale})

    def refresh(self) -> None:
        """Do nothing: the model computes with `flat`."""


class FlatEngine(Engine):
    """Stages 1 and 2: each parameter group is one flat tensor, cut evenly over the ranks."""

    def _lay_out(
        self, trained: dict[str, nn.Parameter], rt: Runtime
    ) -> tuple[list[Tensor], dict[str, Place]]:
        parts = {name: getattr(p, "_hp_mapping") for name, p in trained.items()}  # noqa: B009
        places = {
            name: Place(
                part.param_group_index,
                part.hp_fragment_address.start,
                part.lp_fragment_address.start,
                part.hp_fragment_address.numel,
            )
            for name, part in parts.items()
            if part is not None  # it is another rank's
        }
        return self._zero.single_partition_of_fp32_groups, places

    def refresh(self) -> None:
        """Copy `flat` of all ranks to the weights."""
        self._zero.update_lp_params()


class CutEngine(Engine):
    """Stage 3: every parameter is cut evenly over the ranks, the last part padded."""

    def _lay_out(
        self, trained: dict[str, nn.Parameter], rt: Runtime
    ) -> tuple[list[Tensor], dict[str, Place]]:
        names = {parameter: name for name, parameter in trained.items()}
        places = {}
        for shard, group in enumerate(self._zero.fp16_groups):
            offset = 0
            for parameter in group:
                size = parameter.partition_numel()
                start = min(rt.rank * size, parameter.ds_numel)
                numel = min(size, parameter.ds_numel - start)
                if numel:
                    places[names[parameter]] = Place(shard, offset, start, numel)
                offset += size
        flat: list[Tensor] = self._zero.fp32_partitioned_groups_flat
        if not self._zero.offload_optimizer:
            # The engine updates a copy of what is float32 already. It means to update the weights
            # themselves, but compares a device with a string: 4 of 24 bytes a parameter.
            flat[:] = [cut.requires_grad_() for cut in self._zero.fp16_partitioned_groups_flat]
        return flat, places

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        with deepspeed.zero.GatheredParameters([parameter], 0):
            yield

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy `flat` to the cut weights, and gather those that stay whole."""
        self._zero._partition_all_parameters()
        for group in range(len(self.flat)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if kept := self._zero.persistent_parameters:
            kept[0].all_gather(kept)


STAGES: dict[int, type[Engine]] = {0: WholeEngine, 1: FlatEngine, 2: FlatEngine, 3: CutEngine}
