"""A training step on a GPU never waits for the host: no copy to or from it, no value read.

But for the ends of the experts' segments, once a layer, where the GPU has no grouped matmul.
Run on fake CUDA tensors, which have shapes and a device but no values, so no GPU is needed.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_families import FAMILIES
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion import Diffusion, create_diffusion
from models import DiT, DiTConfig
from routing import LoadCounter

READS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "unique", "masked_select")


class HostTraffic(TorchDispatchMode):
    """Note every operator that moves a tensor between devices, touches the CPU or reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.num_operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = func.name().split(".")[0].split("::")
        if name in READS:
            self.found.append(func.name())
        out = func(*args, **(kwargs or {}))
        if library == "prim":  # asks for a device or shape, computes nothing
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {str(tensor.device) for tensor in tensors}
        if devices - {"cuda:0"}:
            self.found.append(f"{func.name()} on {sorted(devices)}")
        self.num_operators += 1
        return out


def backward(loss: Tensor) -> None:
    """Do what `loss.backward()` does, node by node: the engine itself asks CUDA for its streams."""
    grads = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(list(_inputs_first(loss.grad_fn))):
        given = grads.pop(node, {})
        if not given:
            continue
        slots = [given.get(slot) for slot in range(max(given) + 1)]
        results = (node.apply if hasattr(node, "apply") else node)(*slots)
        results = results if isinstance(results, tuple) else (results,)
        for (following, slot), grad in zip(node.next_functions, results, strict=False):
            if following is None or grad is None:
                continue
            wanted, known = following._input_metadata[slot], grads.setdefault(following, {})
            grad = grad.sum_to_size(wanted.shape).to(wanted.dtype)
            known[slot] = known[slot] + grad if slot in known else grad


def _inputs_first(root: Any) -> Iterator[Any]:
    """Yield the nodes that a graph's backward visits, each after all that it hands gradients to."""
    seen, stack = {root}, [(root, iter(root.next_functions))]
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


def train_step(model: DiT, diffusion: Diffusion, dtype: torch.dtype) -> None:
    """Do what train.py does with a micro-batch that is on the GPU."""
    latents = torch.randn(4, 4, 8, 8, device="cuda")
    labels = torch.randint(model.config.num_classes, (4,), device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        out = diffusion.training_loss(model, latents, labels)
        loss = sum(out.aux_losses.values(), out.per_sample.mean())
    backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)


@pytest.mark.parametrize(
    ("depth", "options", "dtype"),
    [
        (2, {}, torch.bfloat16),
        (2, {}, torch.float32),
        (2, {"mlp_type": "gelu"}, torch.bfloat16),
        (2, {"num_experts": 0}, torch.bfloat16),
        *((2, FAMILIES[family], torch.bfloat16) for family in FAMILIES if family != "dit_moe"),
        pytest.param(12, {"qk_norm": True}, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("objective", ["ddpm", "rf"])
def test_a_training_step_on_a_gpu_has_no_host_traffic(
    objective: str,
    depth: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
):
    # autocast asks whether there is a GPU
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (9, 0))
    sizes = {"input_size": 8, "hidden_size": 32, "num_heads": 2, "num_classes": 5}
    config = DiTConfig(**{**sizes, "depth": depth, "num_experts": 4, **options})
    with FakeTensorMode(allow_non_fake_inputs=False):
        with torch.device("cuda"):
            model = DiT(config).train()
        counter, diffusion = LoadCounter(model), create_diffusion(objective)
        train_step(model, diffusion, dtype)  # the first one may copy tables
        with HostTraffic() as traffic:
            train_step(model, diffusion, dtype)
    # the offsets, forward; all that the backward does with them is on the host
    reads = 0 if dtype == torch.bfloat16 else depth
    copies = ["aten::_to_copy on ['cpu', 'cuda:0']"] * reads
    on_host = [f"dit_moe::grouped_{kind} on ['cpu', 'cuda:0']" for kind in ("linear", "outer")]
    assert [found for found in traffic.found if found not in on_host] == copies
    assert (traffic.found == []) == (reads == 0)
    assert traffic.num_operators > 150 * depth
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.is_cuda for p in trained)
    assert len(counter.counts) == (depth if config.num_experts else 0)


def test_host_traffic_sees_copies_reads_and_tensors_of_the_host():
    with FakeTensorMode(), HostTraffic() as traffic:
        on_gpu = torch.ones(3, device="cuda")
        on_gpu.cpu()
        torch.ones(3).to("cuda")
        with pytest.raises(DataDependentOutputException):
            on_gpu.sum().item()
    copies = ["aten::_to_copy on ['cpu', 'cuda:0']"] * 2
    of_ones = "aten::ones on ['cpu']"
    assert traffic.found == [copies[0], of_ones, copies[1], "aten::_local_scalar_dense"]
