"""How `benchmark.py` measures: FLOPs on paper, contests and their table, memory, CUDA calls.

Shapes: N images, M tokens, D hidden, F expert hidden, E experts, K experts per token.
"""

import argparse
import math
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from common import process
from models import DiTConfig

MATMUL_CALLS = 4  # at most this many of a layer's equal matmuls are timed
PASSES = ("forward", "backward")
FORWARDS = {  # matmul FLOPs of a timed part, in forward passes
    **{"inference": 1, "forward": 1, "backward": 2, "forward+backward": 3, "step": 3, "sample": 1}
}


# ------------------------------------------------------------------------------ FLOPs


class Linear(NamedTuple):
    """`copies` equal linear layers: (rows, inputs) @ (inputs, outputs)."""

    name: str
    copies: int
    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        """Of one forward pass."""
        return 2 * self.copies * self.rows * self.inputs * self.outputs


def linear_layers(config: DiTConfig, images: int) -> list[Linear]:
    """List the linear layers of a model with equal blocks, loads being even."""
    D, width, E, K = (config.hidden_size, config.mlp_hidden_size, config.num_experts,
                      config.experts_per_token)  # fmt: skip
    into = 2 if config.mlp_type == "swiglu" else 1  # matrices from D, of which SwiGLU has two
    area = config.patch_size**2
    M, depth = images * (config.input_size // config.patch_size) ** 2, config.depth
    layers = [
        Linear("attn.qkv", depth, M, D, 3 * D),
        Linear("attn.proj", depth, M, D, D),
        Linear("adaLN", depth, images, D, 6 * D),
    ]
    if E:
        rows, shared = math.ceil(M * K / E), config.num_shared_experts * D
        layers += [
            Linear("moe.router", depth, M, D, E),
            Linear("moe.experts.gate_up", depth * E, rows, D, into * width),
            Linear("moe.experts.down", depth * E, rows, width, D),
        ]
        if config.selection == "batch_choice":
            layers.append(Linear("moe.predictor.fc1", depth, M, D, D))
            layers.append(Linear("moe.predictor.fc2", depth, M, D, E))
        if shared:
            layers.append(Linear("moe.shared.gate_up", depth, M, D, into * shared))
            layers.append(Linear("moe.shared.down", depth, M, shared, D))
    else:
        layers.append(Linear("mlp.gate_up", depth, M, D, into * width))
        layers.append(Linear("mlp.down", depth, M, width, D))
    return [
        *layers,
        Linear("x_embedder", 1, M, area * config.in_channels, D),
        Linear("t_embedder.0", 1, images, 256, D),
        Linear("t_embedder.2", 1, images, D, D),
        Linear("final.adaLN", 1, images, D, 2 * D),
        Linear("final.linear", 1, M, D, area * config.out_channels),
    ]


def forward_flops(config: DiTConfig, images: int, prefix: str = "") -> int:
    """Count the matmul FLOPs of the linear layers whose name starts with `prefix`."""
    return sum(x.flops for x in linear_layers(config, images) if x.name.startswith(prefix))


# ------------------------------------------------------------------------------ contests


class Precision(NamedTuple):
    """What is computed in which dtype."""

    dtype: str  # of the activations
    mixed: bool  # fp32 weights under autocast, as train.py does; else weights in `dtype`

    @property
    def name(self) -> str:
        return self.dtype + " mixed" * self.mixed

    @property
    def weights(self) -> torch.dtype:
        return torch.float32 if self.mixed else process.DTYPES[self.dtype]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, process.DTYPES[self.dtype], enabled=self.mixed)


class Stopwatch:
    """Seconds that the named parts of one run take; on a GPU it waits at both ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the body of a `with`."""
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = time.perf_counter() - start


class Entry(NamedTuple):
    """Who takes part in a contest."""

    name: str
    precision: Precision
    flops: int  # matmul FLOPs of one forward pass

    @property
    def label(self) -> str:
        return f"{self.name} {self.precision.name}"


Run = Callable[[Stopwatch, int], None]  # times its parts on the batch of that number
Laps = dict[str, list[float]]  # part of a run -> seconds in each repeat


class Bench:
    """One run of this script: its flags, the matmul rates known so far, the rows of the table."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.rows: list[dict[str, Any]] = []
        self._matmul_laps: dict[tuple[DiTConfig, str], dict[Entry, Laps]] = {}

    def alternate(self, contestants: dict[Entry, Run]) -> dict[Entry, Laps]:
        """Run everyone in turn, back and forth, after one round to warm up."""
        laps: dict[Entry, Laps] = {entry: defaultdict(list) for entry in contestants}
        for round_ in range(self.args.repeats + 1):
            for entry in list(contestants)[:: -1 if round_ % 2 else 1]:
                watch = Stopwatch(self.device)
                contestants[entry](watch, round_)
                for part, seconds in watch.seconds.items() if round_ else ():
                    laps[entry][part].append(seconds)
        return laps

    def matmul_laps(self, config: DiTConfig, dtype: str) -> dict[Entry, Laps]:
        """Time the matmuls of a model's linear layers alone, and a square one; once in a run."""
        if (config, dtype) not in self._matmul_laps:
            layers = linear_layers(config, self.args.batch_size)
            rows = layers[0].rows
            layers.append(Linear("square", 0, rows, rows, rows))
            timed = [layer._replace(copies=calls(layer)) for layer in layers]
            self._matmul_laps[config, dtype] = self.alternate(
                {
                    Entry(x.name, Precision(dtype, False), x.flops): self._run(x, dtype)
                    for x in timed
                }
            )
        return self._matmul_laps[config, dtype]

    def _run(self, layer: Linear, dtype: str) -> Run:
        def randn(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=self.device).to(process.DTYPES[dtype])

        x, weight = randn(layer.rows, layer.inputs), randn(layer.outputs, layer.inputs)
        out, x_out, weight_out = randn(layer.rows, layer.outputs), x.clone(), weight.clone()
        grad = out.clone()

        def run(watch: Stopwatch, _round: int) -> None:
            with watch.part("forward"):
                for _ in range(layer.copies):
                    torch.mm(x, weight.t(), out=out)
            with watch.part("backward"):
                for _ in range(layer.copies):
                    torch.mm(grad, weight, out=x_out)
                    torch.mm(grad.t(), x, out=weight_out)

        return run

    def rates(self, config: DiTConfig, dtype: str) -> tuple[float, float]:
        """Return FLOP/s of a model's matmuls alone: in a forward pass, and in a training step."""
        laps = {entry.name: parts for entry, parts in self.matmul_laps(config, dtype).items()}
        layers = linear_layers(config, self.args.batch_size)
        flops = sum(x.flops for x in layers)
        forward, backward = (
            sum(quartiles(laps[x.name][name])[1] * x.copies / calls(x) for x in layers)
            for name in PASSES
        )
        return flops / forward, 3 * flops / (forward + backward)

    def report(
        self, part: str, config: DiTConfig, laps: dict[Entry, Laps], reference: str = ""
    ) -> None:
        """Add a row for every contestant and timed part; speeds relative to `reference`'s label."""
        medians = {
            (entry.label, name): quartiles(seconds)[1]
            for entry, parts in laps.items()
            for name, seconds in parts.items()
        }
        for entry, parts in laps.items():
            for name, seconds in parts.items():
                low, median, high = quartiles(seconds)
                row = {"part": part, "contestant": entry.name, "dtype": entry.precision.name,
                       "what": name, "ms": 1e3 * median, "ms_low": 1e3 * low,
                       "ms_high": 1e3 * high}  # fmt: skip
                if name in FORWARDS:
                    rate = FORWARDS[name] * entry.flops / median
                    row["gflops"] = rate / 1e9
                    if part != "rate":
                        forward, training = self.rates(config, entry.precision.dtype)
                        alone = training if "backward" in name or name == "step" else forward
                        row["mfu"] = rate / alone
                if (reference, name) in medians:
                    row["speed"] = medians[reference, name] / median
                self.rows.append(row | {"reference": reference, "model": describe(config)})
                print_row(row)

    def heading(self, part: str, config: DiTConfig, note: str = "") -> None:
        """Start a table."""
        images = f"{self.args.batch_size} images"
        print(f"\n{part}: {describe(config)}, {images}, {self.device.type} {note}".rstrip())


def calls(layer: Linear) -> int:
    """Return how many of a layer's equal matmuls are timed."""
    return max(1, min(layer.copies, MATMUL_CALLS))


def quartiles(seconds: list[float]) -> list[float]:
    """Return the first quartile, the median and the third."""
    points = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    return torch.tensor(seconds, dtype=torch.float64).quantile(points).tolist()


def describe(config: DiTConfig) -> str:
    """Name a model by its size and experts."""
    experts = f"{config.num_experts}E{config.num_experts_per_tok}A" if config.num_experts else ""
    return f"D={config.hidden_size} depth={config.depth} patch={config.patch_size} {experts}"


def print_row(row: dict[str, Any]) -> None:
    """Print a timed part: who, what, median and quartiles in ms, GFLOP/s, MFU, speed."""
    columns = [
        f"{row['contestant']:<20} {row['dtype']:<10} {row['what']:<17}",
        f"{row['ms']:>9.2f} ms [{row['ms_low']:.2f} - {row['ms_high']:.2f}]".ljust(36),
        f"{row['gflops']:>8.0f} GFLOP/s" if "gflops" in row else " " * 16,
        f"MFU {row['mfu']:.2f}" if "mfu" in row else " " * 8,
        f"{row['speed']:.2f}x" if "speed" in row else "",
    ]
    print(" ".join(columns).rstrip(), flush=True)


# ------------------------------------------------------------------------------ memory, CUDA calls


def saved_bytes(compute: Callable[[], Any], model: nn.Module) -> int:
    """Sum the distinct storages that autograd keeps for the backward, but for the parameters'."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for address, size in kept.items() if address not in parameters)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held so far.

    VmHWM and not `resource`'s ru_maxrss, which a child inherits from whoever started it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    match = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def count_calls(names: Counter[str]) -> dict[str, int]:
    """Count kernel launches and waits of the host among the profiler's CUDA calls.

    Device-wide waits are left out: the profiler and the stopwatch make them, the model none.
    """
    patterns = {
        "launches": r"cu(da)?(Launch\w*Kernel\w*|GraphLaunch)",
        "waits": r"cu(da)?(Stream|Event)Synchronize",
    }
    return {
        what: sum(n for name, n in names.items() if re.fullmatch(pattern, name))
        for what, pattern in patterns.items()
    }


def count_cuda_calls(run: Run, device: torch.device) -> dict[str, int]:
    """Profile one warm run; `reported` are the waits of the host that torch itself warns of."""
    for round_ in range(2):
        run(Stopwatch(device), round_)
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True
    ) as profiler:
        run(Stopwatch(device), 2)
    names = Counter({event.key: event.count for event in profiler.key_averages()})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        run(Stopwatch(device), 3)
        torch.cuda.set_sync_debug_mode("default")
    reported = sum("synchronizing CUDA operation" in str(w.message) for w in caught)
    return count_calls(names) | {"reported": reported}
