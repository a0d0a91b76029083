"""Models larger than the memory: experts in int8, or blocks that come when it is their turn.

In this order: `load_for_sampling` and what it is made of, `check_options` and `build_for_sampling`,
which choose; `Int8Experts`; and `BlockStream`. All read the weights a block at a time, whatever
their layout (see `weights.read_blocks`).
"""

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint.weights import Weights, build_model, empty_model, open_weights, place, read_blocks
from common.errors import UserError
from common.quiet import silence_torchao
from models import DiT
from moe_ops import ExpertGroup, sort_by_expert, sum_rows

Block = tuple[int, dict[str, Tensor]]  # its number, and its tensors without `blocks.i.`


def load_for_sampling(
    path: str | Path,
    *,
    ema: bool = True,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    offload: str | None = None,
) -> DiT:
    """Load a model that is never trained, in eval mode.

    Args:
        path, ema: as in `load_model`.
        dtype, device, quantize, offload: as in `build_for_sampling`.

    Raises:
        UserError: as `load_model`, or for options that do not fit the model or the machine.
    """
    weights = open_weights(path, ema=ema)
    check_options(weights, device, quantize=quantize, offload=offload)
    return build_for_sampling(
        weights, dtype=dtype, device=device, quantize=quantize, offload=offload
    )


def check_options(
    weights: Weights, device: str | torch.device, *, quantize: str | None, offload: str | None
) -> None:
    """Refuse options of `build_for_sampling` that do not fit the model or the machine.

    Raises:
        UserError: naming the flag.
    """
    if quantize and offload:
        raise UserError(f"--quantize {quantize} and --offload {offload} exclude each other")
    if offload == "cpu" and torch.device(device).type == "cpu":
        raise UserError("--offload cpu needs a GPU: here weights are on the CPU anyway; use disk")
    if quantize and weights.config.num_experts == 0:
        raise UserError(f"--quantize {quantize} is for experts, {weights.path} is a dense model")
    if quantize and importlib.util.find_spec("torchao") is None:
        raise UserError(f"--quantize {quantize} needs torchao: pip install torchao")


def build_for_sampling(
    weights: Weights,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
    offload: str | None = None,
    group: ExpertGroup | None = None,
) -> DiT:
    """Return the model of open weights, never to be trained, in eval mode.

    Args:
        weights: of any layout.
        dtype, device: as in `load_model`.
        quantize: "int8" stores the experts' weights so, one scale per output row, and the rest
            in `dtype`; arithmetic stays in `dtype`.
        offload: "cpu" keeps the blocks in memory and brings each to the GPU for its forward,
            "disk" leaves them in the file.
        group: of ranks that hold the experts together; without quantize and offload.

    Raises:
        FileError: weights are missing, damaged, or don't fit the config.
    """
    if group is not None:
        return _build_part(weights, dtype, device, group)
    if quantize is None and offload is None:
        return build_model(weights, dtype=dtype, device=device)
    model = empty_model(weights.config).requires_grad_(False)
    _load_outside(model, weights, dtype, device)
    if offload:
        BlockStream(model, _endless(weights, offload, dtype, device), device)
        return model
    for index, tensors in _blocks(weights):
        block: Any = model.blocks[index]
        placed = {name: place(name, t, device, dtype) for name, t in tensors.items()}
        block.load_state_dict(placed, assign=True)
        if block.is_moe:
            block.moe.experts = Int8Experts(block.moe.experts)
    return model


def _build_part(
    weights: Weights, dtype: torch.dtype | None, device: str | torch.device, group: ExpertGroup
) -> DiT:
    """Return the model with this rank's experts only; a block is the most that is ever whole."""
    model = empty_model(weights.config).requires_grad_(False)
    model.use_expert_group(group)
    first, last = group.experts_of(group.rank, weights.config.num_all_experts)
    state: dict[str, Tensor] = {}
    for _, tensors in read_blocks(weights):
        for name, tensor in tensors.items():
            part = tensor[first:last] if ".moe.experts." in name else tensor
            state[name] = place(name, part, device, dtype, copy=True)
    model.load_state_dict(state, assign=True)
    return model.eval()


def _load_outside(
    model: DiT, weights: Weights, dtype: torch.dtype | None, device: str | torch.device
) -> None:
    """Load what is in no block."""
    _, tensors = next(read_blocks(weights))
    placed = {name: place(name, t, device, dtype, copy=True) for name, t in tensors.items()}
    model.load_state_dict(placed, strict=False, assign=True)


def _blocks(weights: Weights, check_values: bool = True) -> Iterator[Block]:
    """Yield the blocks in order; their tensors are mapped from the file."""
    for index, tensors in read_blocks(weights, check_values=check_values):
        if index is not None:
            yield index, _strip(tensors, index)


def _strip(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name.removeprefix(f"blocks.{index}."): tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------ int8


class Int8Experts(nn.Module):
    """E experts with int8 weights, run one after the other; in place of `Experts`.

    Source: torchao's Int8WeightOnlyConfig, symmetric, one scale per output row.
    """

    def __init__(self, experts: nn.Module) -> None:
        """Quantize `Experts` or `GeluExperts`, on their device; needs torchao."""
        super().__init__()
        silence_torchao()
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        weights = dict(experts.named_parameters())
        self.is_gelu = "up_bias" in weights
        up = weights["up_proj" if self.is_gelu else "gate_up_proj"]
        self.up = _linears(up, weights.get("up_bias"))
        self.down = _linears(weights["down_proj"], weights.get("down_bias"))
        self.dtype = up.dtype
        quantize_(self, Int8WeightOnlyConfig())

    def forward(
        self,
        x: Tensor,
        expert_indices: Tensor,
        expert_weights: Tensor,
        num_rows: int | None = None,
    ) -> Tensor:
        """Send (M, D) tokens through their experts, see `Routing`; returns the (M, D) sum."""
        x = x.to(self.dtype)
        plan = sort_by_expert(expert_indices, len(self.up))
        ends = plan.offsets.tolist()
        order = plan.order[: ends[-1]]  # (R,), without empty slots, which come last
        tokens = plan.tokens[: ends[-1]]
        rows = x.index_select(0, tokens)  # (R, D)
        row_weights = expert_weights.to(x.dtype).flatten().index_select(0, order)[:, None]
        experts = zip(self.up, self.down, rows.tensor_split(ends[:-1]), strict=True)
        out = [down(self._activate(up(part))) for up, down, part in experts if len(part)]
        weighted = torch.cat(out) * row_weights
        if num_rows is None:
            return sum_rows(weighted, plan.inverse, plan.starts)
        return torch.zeros_like(x).index_add_(0, tokens, weighted)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.is_gelu:
            return F.gelu(hidden, approximate="tanh")
        gate, up = hidden.chunk(2, dim=-1)
        return F.silu(gate) * up


def _linears(weights: Tensor, biases: Tensor | None) -> nn.ModuleList:
    """Return a linear map for each of (E, O, I) weights and (E, O) biases, without a copy."""
    linears = nn.ModuleList()
    for expert, weight in enumerate(weights):
        width_out, width_in = weight.shape
        linear = nn.Linear(width_in, width_out, bias=biases is not None, device="meta")
        state = {"weight": weight} if biases is None else {"weight": weight, "bias": biases[expert]}
        linear.load_state_dict(state, assign=True)
        linears.append(linear.requires_grad_(False))
    return linears


# ------------------------------------------------------------------------------ streaming


class BlockStream:
    """Gives each block its weights for the time of its forward, and reads the next ones meanwhile.

    At most two blocks are in memory: the one that runs and the one that is being read. The model
    must be called as a whole, so that its blocks run in order.
    """

    def __init__(self, model: DiT, blocks: Iterator[Block], device: str | torch.device) -> None:
        """Hook into a model.

        Args:
            model: whose blocks have no weights.
            blocks: all blocks in order, over and over, their tensors on the device.
            device: of the computation.
        """
        self.blocks, self.device = blocks, torch.device(device)
        self.copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="blocks")
        self.coming: Future[Block] = self.reader.submit(self._read)
        self.finished: torch.cuda.Event | None = None  # of the last block's computation
        for index, block in enumerate(model.blocks):
            block.register_forward_pre_hook(partial(self._enter, index))
            block.register_forward_hook(self._leave)

    def _read(self, finished: torch.cuda.Event | None = None) -> Block:
        """Read the next block; on a GPU beside the computation, in a stream of its own.

        The host runs ahead of a GPU, so the block before the one that runs must have finished:
        else its memory is still in use, and this one's is a third block's.
        """
        if finished is not None:
            finished.synchronize()
        with torch.cuda.stream(self.copies):
            block = next(self.blocks)
            if self.copies is not None:
                self.copies.synchronize()
        return block

    def _enter(self, index: int, block: nn.Module, _inputs: Any) -> None:
        found, tensors = self.coming.result()
        assert found == index, f"block {index} runs, block {found} was read"
        self.coming = self.reader.submit(self._read, self.finished)
        block.load_state_dict(tensors, assign=True)
        if self.copies is not None:
            for tensor in tensors.values():  # else their memory is reused while still in use
                tensor.record_stream(torch.cuda.current_stream(self.device))

    def _leave(self, block: nn.Module, _inputs: Any, _output: Any) -> None:
        block.to("meta")
        if self.copies is not None:
            self.finished = torch.cuda.current_stream(self.device).record_event()


def _endless(
    weights: Weights, offload: str, dtype: torch.dtype | None, device: str | torch.device
) -> Iterator[Block]:
    """Yield all blocks over and over, copied to the device."""
    waiting: list[Block] = []
    if offload == "cpu":
        for index, tensors in _blocks(weights):
            pinned = {n: place(n, t, "cpu", dtype).pin_memory() for n, t in tensors.items()}
            waiting.append((index, pinned))
    for turn in itertools.count():
        for index, tensors in waiting or _blocks(weights, check_values=turn == 0):
            placed = {n: place(n, t, device, dtype, copy=True) for n, t in tensors.items()}
            yield index, placed
