"""Measure time and memory of a layer, a training step and a sampling step, on whatever is here.

    python scripts/benchmark/benchmark.py --threads 2 --out docs/benchmark.json
    python scripts/benchmark/benchmark.py --models DiT-Ti/4 --batch-size 2 --repeats 1 \\
        --parts layer,step

Contestants take turns in one process: ours, the naive loop over experts that the published code
has (`NaiveMoE`, the same weights), and a dense model of equal FLOPs; in `layer` also the experts of
transformers and the matmuls alone (`bare`), which is the limit of any dispatch; in `families` the
layer of each recipe, and a dense one. `traffic` counts operators, kernels and bytes on a GPU that
need not be there. Every repeat has new tokens, so that expert loads differ as they do in
training. Shown are the median, the quartiles, the speed relative to a reference contestant (above
1: faster) and MFU: the matmul FLOPs of the linear layers per second, over the rate that the same
matmuls reach alone in the same dtype.

Shapes: N images, M tokens, D hidden, F expert hidden, R = M*K routed rows, E experts, K a token.
"""

import argparse
import copy
import dataclasses
import gc
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))
from contestants import (
    NaiveEma,
    NaiveMoE,
    build_model,
    dense_of_equal_flops,
    use_naive_experts,
)
from families import measure_families
from measures import (
    PASSES,
    Bench,
    Entry,
    Laps,
    Precision,
    Run,
    Stopwatch,
    count_cuda_calls,
    describe,
    forward_flops,
    linear_layers,
    peak_bytes,
    saved_bytes,
)
from peers import bare_run, peers
from traffic import measure_traffic

from common import process
from common.errors import one_line_errors
from common.files import atomic_write, make_writable
from common.flags import FlagParser, number
from diffusion import create_diffusion
from models import DiT, DiT_models, DiTConfig, MoE, SwiGLU
from moe_ops import rounded_once
from training.job import Ema

EXPERTS, EXPERTS_PER_TOK, TOKEN_SHARES = (4, 8, 16, 32, 64), (1, 2, 4), (16, 8, 4, 2, 1)


def build_parser() -> FlagParser:
    """Return the parser of this script's flags."""
    parser = FlagParser(__doc__)
    what = parser.group("Run")
    sizes = [name for name in DiT_models if name.startswith("DiT-")]
    what.add("--models", nargs="+", choices=sizes, default=["DiT-S/2", "DiT-B/2"],
             help="size/patch, with the size's own experts")  # fmt: skip
    what.add("--parts", type=parse_parts, default=list(PARTS),
             help="comma-separated; families: the layer of each of config/recipes")  # fmt: skip
    what.add("--dtypes", nargs="+", choices=("fp32", "bf16"), default=native_dtypes(),
             help="computed in; training keeps fp32 weights; default: native ones")  # fmt: skip
    what.add("--batch-size", type=number(int, 1), default=8, help="images")
    what.add("--repeats", type=number(int, 1), default=7, help="timed rounds, after a warm-up")
    what.add("--threads", type=number(int, 1), help="CPU threads; default: torch's")
    what.add("--out", type=Path, help="JSON to write")
    return parser


def native_dtypes() -> list[str]:
    """Return the dtypes whose matmuls are native here."""
    return ["fp32", "bf16"] if process.has_fast_bf16(process.pick_device()) else ["fp32"]


def parse_parts(text: str) -> list[str]:
    """Read `--parts rate,layer`."""
    if unknown := sorted(set(text.split(",")) - set(PARTS)):
        raise argparse.ArgumentTypeError(f"{unknown} not in {','.join(PARTS)}")
    return text.split(",")


# ------------------------------------------------------------------------------ timed parts


def measure_rate(bench: Bench, config: DiTConfig) -> None:
    """(a) What the machine's matmuls reach at the model's shapes."""
    for dtype in bench.args.dtypes:
        bench.heading("rate", config, "matmuls alone")
        bench.report("rate", config, bench.matmul_laps(config, dtype))
        forward, training = bench.rates(config, dtype)
        print(f"all {dtype}: {forward / 1e9:.0f} GFLOP/s forward, {training / 1e9:.0f} training")
        bench.rows.append({"part": "rate", "contestant": "all", "dtype": dtype,
                           "model": describe(config), "gflops_forward": forward / 1e9,
                           "gflops_training": training / 1e9})  # fmt: skip


def layer_run(layer: nn.Module, batches: list[Tensor], precision: Precision) -> Run:
    """Time inference, forward and backward of an MLP; tokens are fp32, as the blocks give them."""
    layer = layer.to(batches[0].device, precision.weights)

    def apply(x: Tensor) -> Tensor:
        with precision.autocast(x.device):
            out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    def run(watch: Stopwatch, round_: int) -> None:
        x = batches[round_].detach().requires_grad_()
        layer.eval()
        with torch.no_grad(), watch.part("inference"):
            apply(x)
        layer.train()
        with watch.part("forward"):
            out = apply(x)
        grad = batches[round_ - 1].to(out.dtype)
        with watch.part("backward"):
            out.backward(grad)
        watch.seconds["forward+backward"] = sum(watch.seconds[name] for name in PASSES)
        layer.zero_grad(set_to_none=True)

    return run


def random_tokens(bench: Bench, count: int, hidden_size: int) -> list[Tensor]:
    """Draw (1, M, D) tokens for every round."""
    torch.manual_seed(0)
    shape = (1, count, hidden_size)
    return [torch.randn(shape, device=bench.device) for _ in range(bench.args.repeats + 1)]


def random_moe(config: DiTConfig) -> MoE:
    """Build one MoE layer, initialised as in a model."""
    return cast(MoE, DiT(dataclasses.replace(config, depth=1)).blocks[0].moe)


def layer_precisions(bench: Bench) -> list[Precision]:
    """Return every dtype with its own weights, and those below float32 with fp32 weights too."""
    mixed = [Precision(dtype, True) for dtype in bench.args.dtypes if dtype != "fp32"]
    return [*(Precision(dtype, False) for dtype in bench.args.dtypes), *mixed]


def measure_layer(bench: Bench, config: DiTConfig) -> None:
    """(b) One MoE layer against the naive loop and a dense SwiGLU of equal FLOPs."""
    dense = dense_of_equal_flops(config)
    one = dataclasses.replace(config, depth=1)
    flops = forward_flops(one, bench.args.batch_size, "moe")
    tokens = linear_layers(config, bench.args.batch_size)[0].rows
    batches = random_tokens(bench, tokens, config.hidden_size)
    bench.heading("layer", config, f"{tokens} tokens; speed: against naive")
    for precision in layer_precisions(bench):
        moe = random_moe(config).to(bench.device, precision.weights)
        layers: dict[str, nn.Module] = {
            "ours": moe,
            "naive": NaiveMoE(moe),
            "dense": SwiGLU(config.hidden_size, dense.mlp_hidden_size),
        }
        if not precision.mixed:  # transformers computes in the dtype of the weights
            layers |= peers(moe)
        contestants = {
            Entry(name, precision, flops): layer_run(layer, batches, precision)
            for name, layer in layers.items()
        }
        contestants[Entry("bare", precision, flops)] = bare_run(moe, batches, precision)
        bench.report("layer", config, bench.alternate(contestants), f"naive {precision.name}")


class TrainingStep:
    """One model in training, as train.py does it: loss, backward, clipping, AdamW, EMA.

    The naive one has torch's default AdamW and `NaiveEma`, as the published code.
    """

    def __init__(self, config: DiTConfig, device: torch.device, naive: bool = False) -> None:
        self.config, self.device = config, device
        self.model = build_model(config, device, naive).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=1e-4, weight_decay=0.0, fused=not naive
        )
        self.ema = (NaiveEma if naive else Ema)(self.model, 0.9999)
        self.diffusion = create_diffusion("rf", learn_sigma=config.learn_sigma)

    def run(self, precision: Precision, images: int, watch: Stopwatch, seed: int) -> None:
        """Make one optimizer step on random latents and time its parts."""
        latents, y = random_batch(self.config, images, self.device, seed)
        with watch.part("forward"), precision.autocast(self.device):
            out = self.diffusion.training_loss(self.model, latents, y)
            loss = out.per_sample.mean() + 0.005 * sum(out.aux_losses.values())
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimizer"):
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with watch.part("ema"):
            self.ema.update()
        watch.seconds["step"] = sum(watch.seconds.values())

    def pass_over_state(self, dtype: torch.dtype, watch: Stopwatch, _round: int) -> None:
        """Clip, update and average with the gradients there are, and round as a step begins."""
        with watch.part("state"):
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.ema.update()
            with rounded_once(self.model.mlp_weights(), dtype):
                pass


def random_batch(
    config: DiTConfig, images: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw latents (N, C, H, W) and labels (N,) where they are used: no copy makes a GPU wait."""
    torch.manual_seed(seed)
    shape = (images, config.in_channels, config.input_size, config.input_size)
    labels = torch.randint(config.num_classes, (images,), device=device)
    return torch.randn(shape, device=device), labels


def train_precisions(bench: Bench) -> list[Precision]:
    """Return the precisions that train.py would use."""
    return [Precision(dtype, dtype != "fp32") for dtype in bench.args.dtypes]


def model_variants(config: DiTConfig) -> dict[str, tuple[DiTConfig, bool]]:
    """Return the config of every contestant, and whether its experts run naively."""
    dense = dense_of_equal_flops(config)
    return {"ours": (config, False), "naive": (config, True), "dense": (dense, False)}


def measure_step(bench: Bench, config: DiTConfig) -> None:
    """(c) A training step and its parts; one model after the other where memory is short."""
    images, precisions = bench.args.batch_size, train_precisions(bench)
    variants = model_variants(config)

    def race(names: list[str]) -> dict[Entry, Laps]:
        contestants: dict[Entry, Run] = {}
        for name in names:
            variant, naive = variants[name]
            training = TrainingStep(variant, bench.device, naive)
            for precision in precisions:
                entry = Entry(name, precision, forward_flops(variant, images))
                contestants[entry] = partial(training.run, precision, images)
        return bench.alternate(contestants)

    together = sum(map(state_bytes, (v for v, _ in variants.values()))) < 0.6 * memory(bench.device)
    reference = f"naive {precisions[0].name}"
    order = "in turn" if together else "one model after the other: memory is short"
    bench.heading("step", config, f"({order}); speed: against {reference}")
    laps: dict[Entry, Laps] = {}
    for names in [list(variants)] if together else [[name] for name in variants]:
        laps |= race(names)
        gc.collect()
    bench.report("step", config, laps, reference)


def measure_state(bench: Bench, config: DiTConfig) -> None:
    """(h) What passes over the state in a bf16 step, against a copy of one pass's bytes.

    Those are 42 a parameter: gradient (twice, the norm comes first), weight, moments and average
    read, all but the gradient written, and the rounded weight.
    """
    config = dataclasses.replace(config, depth=max(1, config.depth // 2))  # three models at once
    precision = Precision("bf16", True)
    contestants: dict[Entry, Run] = {}
    for name, naive in (("ours", False), ("naive", True)):
        training = TrainingStep(config, bench.device, naive)
        for parameter in training.parameters:
            parameter.grad = torch.randn_like(parameter)
        run = partial(training.pass_over_state, torch.bfloat16)
        contestants[Entry(name, precision, 0)] = run
    count = sum(p.numel() for p in training.parameters)
    source = torch.randn(21 * count // 4, device=bench.device)
    target = torch.empty_like(source)

    def copy_bytes(watch: Stopwatch, _round: int) -> None:
        with watch.part("state"):
            target.copy_(source)

    contestants[Entry("bare copy", precision, 0)] = copy_bytes
    bench.heading("state", config, f"{count / 1e6:.0f} million parameters; speed: against the copy")
    bench.report("state", config, bench.alternate(contestants), f"bare copy {precision.name}")


def state_bytes(config: DiTConfig) -> int:
    """Count what training holds in float32: weights, gradients, two AdamW moments, EMA."""
    with torch.device("meta"):
        return 5 * 4 * DiT(config).num_parameters()[0]


def memory(device: torch.device) -> int:
    """Return the bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_sample(bench: Bench, config: DiTConfig) -> None:
    """(d) One Euler step with guidance: a forward pass of twice the images."""
    images = bench.args.batch_size
    precisions = [Precision(dtype, False) for dtype in bench.args.dtypes]
    contestants: dict[Entry, Run] = {}
    for precision in precisions:
        ours = build_model(config, bench.device).to(precision.weights).eval()
        naive = use_naive_experts(copy.deepcopy(ours, {id(p): p for p in ours.parameters()}))
        dense_config = dense_of_equal_flops(config)
        dense = build_model(dense_config, bench.device).to(precision.weights).eval()
        for name, model in {"ours": ours, "naive": naive.eval(), "dense": dense}.items():
            entry = Entry(name, precision, forward_flops(model.config, 2 * images))
            contestants[entry] = sample_run(model, images, bench.device)
    reference = f"naive {precisions[0].name}"
    bench.heading("sample", config, f"guided; speed: against {reference}")
    bench.report("sample", config, bench.alternate(contestants), reference)


def sample_run(model: DiT, images: int, device: torch.device) -> Run:
    """Time one guided Euler step."""
    config = model.config
    diffusion = create_diffusion("rf", learn_sigma=config.learn_sigma)

    def run(watch: Stopwatch, seed: int) -> None:
        noise, y = random_batch(config, images, device, seed)
        with watch.part("sample"):
            diffusion.sample(
                model, noise, y, num_steps=1, cfg_scale=1.5, null_label=config.null_label
            )

    return run


def measure_growth(bench: Bench, config: DiTConfig, ends_only: bool = False) -> None:
    """(e) Our layer with more experts, more experts a token, and fewer tokens.

    Args:
        bench: of this run.
        config: of the model.
        ends_only: its own number of experts and the largest one, nothing else.
    """
    images = 2 * bench.args.batch_size
    tokens, E, K = (linear_layers(config, images)[0].rows, config.num_experts,
                    config.num_experts_per_tok)  # fmt: skip
    cases = dict.fromkeys(
        [
            *((experts, K, tokens) for experts in EXPERTS),
            (E, K, tokens),
            *((E, k, tokens) for k in EXPERTS_PER_TOK),
            *((E, K, tokens // share) for share in TOKEN_SHARES),
        ]
    )
    if ends_only:
        cases = dict.fromkeys([(E, K, tokens), (EXPERTS[-1], K, tokens)])
    batches = random_tokens(bench, tokens, config.hidden_size)
    bench.heading("growth", config, f"speed: against E={E} K={K} M={tokens}")
    for precision in layer_precisions(bench):
        contestants: dict[Entry, Run] = {}
        for experts, k, M in cases:
            changed = dataclasses.replace(
                config, num_experts=experts, num_experts_per_tok=k, depth=1
            )
            flops = forward_flops(changed, images, "moe") * M // tokens
            name, own = f"E={experts} K={k} M={M}", [x[:, :M] for x in batches]
            moe = random_moe(changed)
            contestants[Entry(name, precision, flops)] = layer_run(moe, own, precision)
            if (k, M) == (K, tokens):
                contestants[Entry(f"bare {name}", precision, flops)] = bare_run(moe, own, precision)
        reference = f"E={E} K={K} M={tokens} {precision.name}"
        bench.report("growth", config, bench.alternate(contestants), reference)


def measure_peak(
    config: DiTConfig, naive: bool, precision: Precision, images: int, threads: int
) -> dict[str, int]:
    """Make two training steps in a fresh process; returns bytes held at the start, peak, needed."""
    torch.set_num_threads(threads)
    device = process.setup().device
    imports = peak_bytes(device)
    training = TrainingStep(config, device, naive)
    for seed in range(2):
        training.run(precision, images, Stopwatch(device), seed)
    peak = peak_bytes(device)
    step = lambda: training.run(precision, images, Stopwatch(device), 0)  # noqa: E731
    return {"imports": imports, "peak": peak, "state": state_bytes(config),
            "saved": saved_bytes(step, training.model)}  # fmt: skip


def measure_memory(bench: Bench, config: DiTConfig) -> None:
    """(f) Peak memory of training over what it must hold."""
    bench.heading("memory", config, "peak without imports / (state + saved activations), in GB")
    threads, images = torch.get_num_threads(), bench.args.batch_size
    for name, (variant, naive) in model_variants(config).items():
        for precision in train_precisions(bench):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
                job = fresh.submit(measure_peak, variant, naive, precision, images, threads)
                held = job.result()
            ratio = (held["peak"] - held["imports"]) / (held["state"] + held["saved"])
            gigabytes = {key: f"{value / 1e9:.2f}" for key, value in held.items()}
            print(f"{name:<20} {precision.name:<10} ratio {ratio:.3f} {gigabytes}", flush=True)
            bench.rows.append({"part": "memory", "contestant": name, "dtype": precision.name,
                               "model": describe(config), "ratio": ratio, **held})  # fmt: skip


def measure_cuda(bench: Bench, config: DiTConfig) -> None:
    """(g) Kernel launches and waits of the host in a training step and a sampling step."""
    bench.heading("cuda", config, "calls a step")
    if bench.device.type != "cuda":
        print("skipped: there is no GPU")
        return
    images = bench.args.batch_size
    for name, (variant, naive) in model_variants(config).items():
        for precision in train_precisions(bench):
            training = TrainingStep(variant, bench.device, naive)
            weights = precision._replace(mixed=False).weights
            model = build_model(variant, bench.device, naive).to(weights).eval()

            step: Run = partial(training.run, precision, images)
            runs = {"step": step, "sample": sample_run(model, images, bench.device)}
            for what, run in runs.items():
                counts = count_cuda_calls(run, bench.device)
                print(f"{name:<20} {precision.name:<10} {what:<10} {counts}", flush=True)
                bench.rows.append({"part": "cuda", "contestant": name, "dtype": precision.name,
                                   "what": what, "model": describe(config), **counts})  # fmt: skip


# ------------------------------------------------------------------------------ script

PARTS: dict[str, Callable[[Bench, DiTConfig], None]] = {
    "rate": measure_rate,
    "layer": measure_layer,
    "step": measure_step,
    "sample": measure_sample,
    "growth": measure_growth,
    "ends": partial(measure_growth, ends_only=True),
    "state": measure_state,
    "memory": measure_memory,
    "cuda": measure_cuda,
    "families": measure_families,
    "traffic": measure_traffic,
}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpu": gpu,
            "threads": torch.get_num_threads(), "torch": torch.__version__,
            "load": os.getloadavg(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}  # fmt: skip


def main(args: argparse.Namespace) -> None:
    """Measure all parts for all models, print the tables and write the JSON.

    Raises:
        FileError: `--out` can't be written; said before anything is measured.
    """
    if args.out:
        make_writable(args.out.parent, "--out")
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args, process.setup().device)
    about = machine(bench.device)
    print(about)
    for name in args.models:
        with torch.device("meta"):
            config = DiT_models[name]().config
        for part in args.parts:
            PARTS[part](bench, config)
    if args.out:
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        content = {"machine": about, "settings": settings, "rows": bench.rows}
        with atomic_write(args.out) as temp:
            temp.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(build_parser().parse_args())
