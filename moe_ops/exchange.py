"""Experts that live on different ranks: rows of tokens go to them and come back.

In order: `ExpertGroup` (which rank has which experts), `Trip` (rows, and their gradients, on the
wire while something else is computed), `exchange` (what a layer calls in place of its experts).

Shapes: M tokens, S slots a token, R rows that leave, A rows that arrive, E experts, D hidden,
N ranks of a group. Nothing is dropped: A is whatever the routers say, from none to all.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moe_ops.choice import RowPlan, combine_rows, dispatch_rows, plan_rows
from moe_ops.ranks import num_ranks, rank


class ExpertGroup:
    """N neighbouring ranks that hold the experts of a layer together, and their replicas.

    Attributes:
        size: N.
        rank: this process's place in the group.
        ranks: process group of the N ranks.
        replicas: process group of the ranks that hold the same experts, one of each group.
        num_replicas: number of groups, W / N of W ranks.
        replica: number of this process's group.
    """

    def __init__(self, size: int) -> None:
        """Make all process groups; every rank calls, N divides their number."""
        world = num_ranks()
        self.size, self.num_replicas = size, world // size
        self.replica, self.rank = divmod(rank(), size)
        groups = [[*range(start, start + size)] for start in range(0, world, size)]
        # In this order on all ranks, those that are not in a group too.
        self.ranks: Any = [dist.new_group(group) for group in groups][self.replica]
        alike = [dist.new_group([*same]) for same in zip(*groups, strict=True)]
        self.replicas: Any = alike[self.rank]

    def __deepcopy__(self, memo: Any) -> "ExpertGroup":
        """Return itself: process groups are the process's, not the model's that is copied."""
        return self

    def experts_of(self, member: int, num_experts: int) -> tuple[int, int]:
        """Return the first of a rank's experts and the one after its last.

        All have E // N; the last one has what is left over, the unconditional expert, too.
        """
        each = num_experts // self.size
        last = num_experts if member == self.size - 1 else (member + 1) * each
        return member * each, last


def check_expert_parallel(size: int, num_experts: int, num_ranks: int) -> None:
    """Refuse a number of ranks for the experts of a layer that does not fit.

    Args:
        size: N.
        num_experts: E, without the unconditional one.
        num_ranks: W.

    Raises:
        ValueError: N does not divide both; it says which values do.
    """
    if not num_experts:
        raise ValueError("the model has no experts")
    if num_experts % size or num_ranks % size:
        fitting = [n for n in range(1, num_experts + 1) if not (num_experts % n or num_ranks % n)]
        raise ValueError(
            f"it must divide {num_experts} experts and {num_ranks} ranks: "
            f"{' or '.join(map(str, fitting))} would do"
        )


class Trip:
    """One exchange of rows within a group: (R, D) leave, (A, D) arrive, gradients go back.

    Between `start` and `finish`, and between their backward passes, the rows are on the wire.
    """

    def __init__(self, group: ExpertGroup, leaving: list[int], arriving: list[int]) -> None:
        self.group, self.leaving, self.arriving = group, leaving, arriving
        self.work: Any = None
        self.rows: Any = None  # that are coming

    def start(self, rows: Tensor) -> Tensor:
        """Send rows; what is returned is to be given to `finish`, and empty until then."""
        return _Depart.apply(rows, self)

    def finish(self, rows: Tensor) -> Tensor:
        """Wait for the rows that arrive."""
        return _Arrive.apply(rows, self)

    def launch(self, rows: Tensor, leaving: list[int], arriving: list[int]) -> Tensor:
        """Send `leaving` rows to each rank, by place in the group, while `arriving` ones come."""
        self.rows = rows.new_empty(sum(arriving), *rows.shape[1:])
        self.work = dist.all_to_all_single(
            self.rows, rows.contiguous(), arriving, leaving, group=self.group.ranks, async_op=True
        )
        return self.rows

    def land(self) -> Tensor:
        """Wait for what `launch` returned."""
        self.work.wait()
        rows, self.rows, self.work = self.rows, None, None
        return rows


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        return trip.launch(rows, trip.leaving, trip.arriving)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.land(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: Trip) -> Tensor:
        ctx.trip = trip
        trip.land()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        trip = ctx.trip
        trip.launch(grad, trip.arriving, trip.leaving)
        return grad, None  # of the right shape; `_Depart` has the gradient


def exchange(
    x: Tensor,
    expert_indices: Tensor,
    expert_weights: Tensor,
    num_rows: int | None,
    *,
    group: ExpertGroup,
    num_experts: int,
    experts: Callable[..., Tensor],
    meanwhile: Callable[[], Any] | None,
) -> tuple[Tensor, Any]:
    """Send every token to its experts, on whatever rank they are, and sum the weighted outputs.

    One exchange of counts, one of rows, one back; every rank of the group must call, and again in
    the backward pass, which has two. Weights are applied where the token is from.

    Args:
        x: (M, D) tokens; its dtype is the one that travels.
        expert_indices: (M, S) int64, in [0, E]; E is an empty slot.
        expert_weights: (M, S), in any dtype.
        num_rows: as in `swiglu_experts`.
        group: of ranks.
        num_experts: E, of all ranks.
        experts: of this rank: (A, D), (A, 1) their indices here, (A, 1) weights -> (A, D).
        meanwhile: is called, if given, while the tokens travel.

    Returns:
        (M, D), and what `meanwhile` returned.
    """
    bound = expert_indices.numel() if num_rows is None else num_rows
    plan = plan_rows(expert_indices, num_experts, bound)
    leaving, arriving, local = _exchange_counts(plan.offsets, num_experts, group)
    plan = without_void(plan, sum(leaving))
    outward, homeward = Trip(group, leaving, arriving), Trip(group, arriving, leaving)
    rows = outward.start(dispatch_rows(x, plan))  # (A, D)
    beside = None if meanwhile is None else meanwhile()
    rows = outward.finish(rows)
    num_arrived = len(rows)
    if not num_arrived:  # one of zeros, so that experts without a token have a gradient, of zeros
        rows, local = F.pad(rows, (0, 0, 0, 1)), local.new_zeros(1, 1)
    rows = experts(rows, local, torch.ones_like(local, dtype=rows.dtype))[:num_arrived]
    rows = homeward.finish(homeward.start(rows))  # (R, D)
    weights = expert_weights.to(x.dtype).flatten().index_select(0, plan.slots)[:, None]
    return combine_rows(rows * weights, plan), beside


def without_void(plan: RowPlan, num_rows: int) -> RowPlan:
    """Leave out the rows that are void, which come last in both orders."""
    by_row = ("tokens", "slots", "experts", "by_token")
    return plan._replace(**{name: getattr(plan, name)[:num_rows] for name in by_row})


def _exchange_counts(
    offsets: Tensor, num_experts: int, group: ExpertGroup
) -> tuple[list[int], list[int], Tensor]:
    """Tell all ranks of the group how many rows come from here, by expert.

    Args:
        offsets: (E,) int32, ends of the experts' segments here.
        num_experts: E.
        group: of ranks.

    Returns:
        Numbers of rows that leave for and arrive from each rank, read on the host, and the (A, 1)
        index, among the experts here, of every row that arrives.
    """
    held = [group.experts_of(member, num_experts) for member in range(group.size)]
    first, last = held[group.rank]
    counts = torch.diff(offsets, prepend=offsets.new_zeros(1))  # (E,)
    arriving = counts.new_empty(group.size, last - first)
    whole, cut = [last - first] * group.size, [end - start for start, end in held]
    dist.all_to_all_single(arriving.view(-1), counts, whole, cut, group=group.ranks)
    from_each = arriving.sum(dim=1)
    for_each = torch.stack([counts[start:end].sum() for start, end in held])
    leave, arrive = torch.stack([for_each, from_each]).tolist()
    every = torch.arange(last - first, device=counts.device).repeat(group.size)
    local = every.repeat_interleave(arriving.view(-1), output_size=sum(arrive))
    return leave, arrive, local[:, None]
