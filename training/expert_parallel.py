"""Training with the experts of every layer spread over groups of ranks: who holds what, and rules.

`ExpertParallel` cuts a model; then, in order: gradients, their norm, and this rank's pieces of
everything, to save and restore. W ranks are W / N groups of N
neighbours; experts are the same on one rank of each group, all else is the same on all ranks.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from checkpoint.sharded import Fragment, ShardedCheckpoint
from common.errors import UserError
from moe_ops import ExpertGroup
from training.initial import initial_weights
from training.job import Job
from training.settings import TrainSettings

# torch's own way, which it does not promise to keep, to leave parameters to somebody else.
IGNORE_BY_DDP = "_set_params_and_buffers_to_ignore_for_model"


class Place(NamedTuple):
    """Where a rank's tensor is within the whole one, and who else holds the same."""

    start: int  # first element within the flattened whole
    holders: int  # number of ranks that hold it
    holder: int  # this rank among them


class ExpertParallel:
    """This rank's part of a model, and what is done with it together with the other ranks.

    Attributes:
        shapes: of the whole model's parameters and buffers, by name.
        cut: names of the parameters of which each rank has a part.
        places: of this rank's tensors, by name.
    """

    def __init__(self, job: Job) -> None:
        """Cut the job's meta model to this rank's part, whose weights are yet to be filled in.

        Raises:
            UserError: `--freeze` of experts, of which nothing would be saved.
        """
        self.rt, self.model = job.rt, job.model
        self.shapes = {name: tensor.shape for name, tensor in job.model.state_dict().items()}
        size = job.settings.expert_parallel or 1
        self.group = ExpertGroup(size) if size > 1 else None
        if self.group is not None:
            job.model.use_expert_group(self.group)
        job.model.to_empty(device=job.rt.device)
        state = job.model.state_dict()
        self.cut = {name for name in state if state[name].shape != self.shapes[name]}
        if frozen := sorted(n for n in self.cut if not job.model.get_parameter(n).requires_grad):
            raise UserError(f"--expert-parallel {size}: --freeze leaves no share of {frozen[0]}")
        getattr(DistributedDataParallel, IGNORE_BY_DDP)(job.model, self.cut)
        self.places = {name: self._place(name) for name in state}

    def fill(self, settings: TrainSettings) -> None:
        """Fill in the first weights; the largest tensor is the most that is ever whole here."""
        state = self.model.state_dict()
        for name, value in initial_weights(settings, self.model.config, self.shapes):
            part = value.reshape(-1)[self.places[name].start :][: state[name].numel()]
            state[name].copy_(part.view_as(state[name]))

    def _place(self, name: str) -> Place:
        if name not in self.cut:
            return Place(0, self.rt.world_size, self.rt.rank)
        assert self.group is not None
        num_experts, *rest = self.shapes[name]
        first, _ = self.group.experts_of(self.group.rank, num_experts)
        each = torch.Size(rest).numel()
        return Place(first * each, self.group.num_replicas, self.group.replica)

    # -- gradients

    def gradients(self, cut: bool) -> list[Tensor]:
        """Return those of the experts that are cut, or all others."""
        named = self.model.named_parameters()
        found = [parameter.grad for name, parameter in named if (name in self.cut) == cut]
        return [gradient for gradient in found if gradient is not None]

    def reduce_gradients(self) -> None:
        """Sum the experts' gradients over replicas and divide by the ranks, as DDP does the rest.

        The tokens of a group's N ranks have been summed on the way back.
        """
        gradients = self.gradients(cut=True)
        if self.group is not None and self.group.num_replicas > 1:
            replicas = self.group.replicas
            works: list[Any] = [
                dist.all_reduce(gradient, group=replicas, async_op=True) for gradient in gradients
            ]
            for work in works:
                work.wait()
        if gradients:
            torch._foreach_div_(gradients, self.rt.world_size)

    def share_overflow(self) -> None:
        """Let the loss scalers of all ranks see an expert's gradient that is no number."""
        if self.group is not None:
            total = torch.stack([gradient.sum() for gradient in self.gradients(cut=True)]).sum()
            dist.all_reduce(total)
            self.gradients(cut=False)[0].add_(total * 0)  # 0, or NaN

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Do what `clip_grad_norm_` does, every parameter counting once; returns the () norm."""
        norm = get_total_norm(self.gradients(cut=False))
        if self.group is not None:
            experts = get_total_norm(self.gradients(cut=True)).square()
            dist.all_reduce(experts, group=self.group.ranks)
            norm = (norm.square() + experts).sqrt()
        clip_grads_with_norm_(self.model.parameters(), max_norm, norm)
        return norm

    # -- checkpoints

    def fragments(self, tensors: Mapping[str, Tensor]) -> Iterator[Fragment]:
        """Cut this rank's tensors, by name, so that of all ranks one saves each element."""
        for name, tensor in tensors.items():
            start, holders, holder = self.places[name]
            low, high = (tensor.numel() * i // holders for i in (holder, holder + 1))
            if low < high:
                yield Fragment(name, start + low, tensor.detach().reshape(-1)[low:high])

    @torch.no_grad()
    def restore(
        self, checkpoint: ShardedCheckpoint, kind: str, tensors: Mapping[str, Tensor]
    ) -> None:
        """Fill this rank's tensors, by name, from a checkpoint of any ranks."""
        for name, tensor in tensors.items():
            piece = checkpoint.read(kind, name, self.places[name].start, tensor.numel())
            tensor.copy_(piece.view_as(tensor))
