"""The part `traffic` of `benchmark.py`: what one block does on a GPU in training, counted exactly.

Forward and backward of one block on fake CUDA tensors, which have shapes and no values: nothing
runs, no GPU is needed and every machine counts the same. The GPU is one with a grouped matmul, and
attention is torch's flash kernel. In order: the fake GPU, the backward pass, what is counted of
single operators (`count_eager`) and of compiled kernels (`count_compiled`).

A matmul (attention included) counts as an operator; the bytes are those that all others read and
write, and a gather reads what it returns.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import torch
from measures import Bench, describe
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import DiT, DiTConfig
from moe_ops import rounded_once

MATMULS = ("mm", "addmm", "bmm", "grouped_linear", "grouped_outer", "exact_linear",
           "_scaled_dot_product_flash_attention",
           "_scaled_dot_product_flash_attention_backward")  # fmt: skip
GATHERS = ("index_select", "gather")
# What allocates, or names the same memory otherwise, and launches no kernel.
NO_KERNELS = ("detach", "alias", "_unsafe_view", "empty", "new_empty", "empty_like",
              "empty_strided", "new_empty_strided")  # fmt: skip

# ------------------------------------------------------------------------------ a fake GPU


def _flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend as `scaled_dot_product_attention` does on a GPU, which fake tensors can't ask."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextmanager
def fake_gpu() -> Iterator[FakeTensorMode]:
    """Let "cuda" be an H100 of fake tensors within a `with`."""
    answers: dict[str, Any] = {
        "torch.cuda.get_device_capability": (9, 0),
        "torch.cuda.current_device": 0,
        "torch.cuda.device_count": 1,
        "torch.cuda.is_bf16_supported": True,
        "torch.cuda.amp.common.amp_definitely_not_available": False,
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(patch(name, return_value=answer))
        attention = "torch.nn.functional.scaled_dot_product_attention"
        stack.enter_context(patch(attention, _flash_attention))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


# ------------------------------------------------------------------------------ backward


@torch.no_grad()
def backward(outs: Sequence[Tensor], grads: Sequence[Tensor], leaves: Iterable[Tensor]) -> list:
    """Differentiate as autograd does, node by node: its engine asks CUDA for streams.

    Returns:
        The gradient of every leaf, None for one that has no part.
    """
    coming: dict[Any, dict[int, Tensor]] = {}
    found: dict[int, Tensor] = {}

    def add(into: dict, slot: int, grad: Tensor) -> None:
        into[slot] = into[slot] + grad if slot in into else grad

    for out, grad in zip(outs, grads, strict=True):
        add(coming.setdefault(out.grad_fn, {}), out.output_nr, grad)
    root = SimpleNamespace(next_functions=[(out.grad_fn, 0) for out in outs])
    for node in reversed(list(_inputs_first(root))[:-1]):
        given = coming.pop(node, {})
        if not given:
            continue
        if node.name() == "torch::autograd::AccumulateGrad":
            found[id(node.variable)] = given[0]
            continue
        slots = [given.get(slot) for slot in range(max(given) + 1)]
        results = (node.apply if hasattr(node, "apply") else node)(*slots)
        results = results if isinstance(results, tuple) else (results,)
        for (following, slot), grad in zip(node.next_functions, results, strict=False):
            if following is not None and grad is not None:
                wanted = following._input_metadata[slot]
                if grad.shape != wanted.shape:
                    grad = grad.sum_to_size(wanted.shape)
                add(coming.setdefault(following, {}), slot, grad.to(wanted.dtype))
    return [found.get(id(leaf)) for leaf in leaves]


def _inputs_first(root: Any) -> Iterator[Any]:
    """Yield the nodes that a graph's backward visits, each after all that it hands gradients to."""
    seen: set[Any] = set()
    stack = [(root, iter(root.next_functions))]
    while stack:
        node, following = stack[-1]
        for child, _ in following:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append((child, iter(child.next_functions)))
                break
        else:
            stack.pop()
            yield node


# ------------------------------------------------------------------------------ counting


class Traffic(TorchDispatchMode):
    """Count the operators that launch a kernel, and the bytes of those that are no matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        library, name = func.name().split(".")[0].split("::")
        if library == "prim" or func.is_view or name in NO_KERNELS:
            return out
        self.operators[name] += 1
        if name not in MATMULS:
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            read = given[1:] + made if name in GATHERS else given
            self.bytes[name] += sum(map(size, {id(x): x for x in read}.values()))
            self.bytes[name] += sum(map(size, made))
        return out


def size(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements; of one that is expanded, those it has in memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _inputs(config: DiTConfig, images: int) -> tuple[DiT, list[Tensor], Tensor]:
    """Build one block on the fake GPU; returns it, tokens and conditioning, and `is_null`."""
    with torch.device("cuda"):
        model: Any = DiT(config).train()
        x = torch.randn(images, config.num_patches, config.hidden_size)
        c = torch.randn(images, config.hidden_size)
        is_null = torch.zeros(images, dtype=torch.bool)
    return model, [x.requires_grad_(), c.requires_grad_()], is_null


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


def count_eager(config: DiTConfig, images: int, dtype: torch.dtype) -> Traffic:
    """Count the operators of one block's forward and backward under autocast, balance loss too."""
    with fake_gpu():
        model, inputs, is_null = _inputs(config, images)
        block: Any = model.blocks[0]
        # as train.py rounds weights, before the micro-batches of a step
        with rounded_once(model.mlp_weights(), dtype), Traffic() as traffic:
            with _autocast(dtype):
                out, losses = block(*inputs, is_null)
            with torch.no_grad():
                outs, grads = [out, *losses.values()], [out.detach(), *losses.values()]
            backward(outs, grads, [])
    return traffic


def saved_per_token(config: DiTConfig, images: int, dtype: torch.dtype) -> float:
    """Sum the bytes that one block's forward keeps for its backward, weights left out, a token."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with fake_gpu():
        model, inputs, is_null = _inputs(config, images)
        block: Any = model.blocks[0]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), _autocast(dtype):
            block(*inputs, is_null)
        weights = {p.numel() * wide for p in block.parameters() for wide in (2, 4)}
    tokens = images * config.num_patches
    return sum(held for held in kept.values() if held not in weights) / tokens


def count_compiled(config: DiTConfig, images: int, dtype: torch.dtype) -> dict[str, int]:
    """Count the kernels and bytes that torch's compiler makes of one block, forward and backward.

    Returns:
        "matmuls", and of the others "kernels" and "bytes".
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    with fake_gpu() as fake, patch("torch.compiler.is_compiling", return_value=True):
        model, inputs, is_null = _inputs(config, images)
        block: Any = model.blocks[0]
        names, weights = zip(*block.named_parameters(), strict=True)

        def step(primals: list[Tensor], tangents: list[Tensor]) -> tuple[list, list]:
            leaves = [x.detach().requires_grad_() for x in primals]
            x, c, *rest = leaves
            parameters = dict(zip(names, rest, strict=True))
            with torch.enable_grad(), _autocast(dtype):
                out, losses = torch.func.functional_call(block, parameters, (x, c, is_null))
            outs = [out, *losses.values()]
            return [o.detach() for o in outs], backward(outs, tangents, leaves)

        ones = [torch.ones((), device="cuda") for _ in config.balance]
        traced = [*inputs, *weights], [inputs[0].detach().clone(), *ones]
        graph = make_fx(step, decomposition_table=select_decomp_table())(*traced)
        parts = min_cut_rematerialization_partition(
            graph, traced, num_fwd_outputs=1 + len(ones), static_lifetime_input_indices=[]
        )
        counts = [_count_kernels(part, fake) for part in parts]
    return dict(
        zip(("matmuls", "kernels", "bytes"), map(sum, zip(*counts, strict=True)), strict=True)
    )


def _count_kernels(graph: Any, fake: FakeTensorMode) -> tuple[int, int, int]:
    """Let the compiler schedule a graph; returns matmuls, other kernels, and their bytes."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._inductor.virtualized import V

    hopper = DeviceProperties(
        type="cuda",
        index=0,
        multi_processor_count=132,
        cc=90,
        major=9,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    lowering = GraphLowering(graph, shape_env=None)
    with ExitStack() as stack:
        stack.enter_context(patch.object(DeviceProperties, "create", return_value=hopper))
        stack.enter_context(patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(V.set_debug_handler(Mock()))
        stack.enter_context(V.set_fake_mode(fake))
        stack.enter_context(V.set_graph_handler(lowering))
        lowering.run(*inputs)
        lowering._update_scheduler()
        matmuls = others = num_bytes = 0
        for node in lowering.scheduler.nodes:
            kind = type(node.node).__name__  # of one kernel's; others are fused, and have none
            if type(node).__name__.startswith("Nop") or kind == "MultiOutput":
                continue  # names memory that another kernel wrote
            if node.is_extern() and _operator(node.node) in MATMULS:
                matmuls += 1
            else:
                others += 1
                num_bytes += node.get_read_write_buffers_sizes()
    return matmuls, others, num_bytes


def _operator(kernel: Any) -> str:
    """Return the name, without library and overload, of what an extern kernel calls."""
    name = str(getattr(kernel, "op_overload", None) or kernel.python_kernel_name)
    return name.replace("::", ".").split(".")[-2 if name.count(".") > 1 else -1]


def measure_traffic(bench: Bench, config: DiTConfig) -> None:
    """(i) Operators, kernels and bytes of one block in training on a GPU, and what it keeps."""
    bench.heading("traffic", config, "one block, forward + backward, on a fake GPU")
    one = DiTConfig.from_dict({**config.to_dict(), "depth": 1})
    images, dtype = bench.args.batch_size, torch.bfloat16
    tokens = images * config.num_patches
    eager, compiled = count_eager(one, images, dtype), count_compiled(one, images, dtype)
    row = {
        "operators": eager.operators.total(),
        "bytes_per_token": eager.bytes.total() / tokens,
        "matmuls_compiled": compiled["matmuls"],
        "other_kernels_compiled": compiled["kernels"],
        "bytes_per_token_compiled": compiled["bytes"] / tokens,
        "saved_bytes_per_token": saved_per_token(one, images, dtype),
    }
    print(row)
    bench.rows.append({"part": "traffic", "contestant": "ours", "dtype": "bf16 mixed",
                       "model": describe(config), **row})  # fmt: skip
