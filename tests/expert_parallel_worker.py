"""Runs of train.py with and without `--expert-parallel`, on as many gloo ranks as it is started on.

    torchrun --nproc_per_node=2 tests/expert_parallel_worker.py OUT.pt FOLDER 2

Every case makes the updates of `train_worker` from the same random weights; the numbers are values
of `--expert-parallel`. The test makes the same updates in its own single process.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from train_worker import FLAGS, State, global_batch, micro_batches

from checkpoint.state import latest_checkpoint
from common import process
from models import DiT
from routing import LoadCounter
from training.ddp import DdpTrainer, ExpertParallelTrainer
from training.expert_parallel import ExpertParallel
from training.flags import build_parser
from training.initial import initial_weights
from training.job import prepare
from training.memory import expert_memory

NUM_UPDATES, BATCH = 5, 8
SHALLOW = 4  # blocks; of deeper models the last weights alone are kept
CASES: dict[str, tuple[str, ...]] = {
    "token choice": ("--aux-loss-weight", "0.1"),
    "accumulated": ("--accum-steps", "2", "--balance", "none"),
    "expert choice": ("--selection", "expert_choice", "--balance", "none"),
    "batch choice": ("--selection", "batch_choice", "--balance", "z_loss", "--mlp-type", "gelu"),
    "unconditional expert": (
        *("--selection", "expert_choice", "--balance", "contrastive", "--affinity", "cosine"),
        *("--unconditional-expert", "--mlp-type", "gelu", "--grad-checkpointing"),
    ),
    "biases": ("--balance", "bias", "z_loss", "--affinity", "sigmoid", "--norm-topk-prob"),
    "twelve blocks": ("--model", "DiT-S/8", "--mlp-ratio", "0.125", "--grad-checkpointing"),
}


def make_trainer(*flags: str, std: float = 0.1) -> DdpTrainer:
    """Build a trainer with random weights, since adaLN-Zero hides most gradients at first."""
    basic = ("--global-batch-size", str(BATCH), "--lr", "0.001", "--ema-decay", "0.9")
    args = build_parser(None).parse_args([*FLAGS, *basic, *flags])
    cut = args.expert_parallel is not None
    job = prepare(args, meta=cut)
    shapes = {name: p.shape for name, p in job.model.named_parameters() if p.requires_grad}
    trainer = (ExpertParallelTrainer if cut else DdpTrainer)(job)
    generator = torch.Generator().manual_seed(1)
    for name, shape in shapes.items():
        value = nn.init.normal_(torch.empty(shape), std=std, generator=generator)
        fill(trainer, name, value)
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-3  # see train_worker.make_updates
    return trainer


@torch.no_grad()
def fill(trainer: DdpTrainer, name: str, value: Tensor) -> None:
    """Give a parameter and its average a value, whole or this rank's part of it."""
    for model in (trainer.model, trainer.ema.model):
        parameter, part = model.get_parameter(name), value.flatten()
        if isinstance(trainer, ExpertParallelTrainer):
            part = part[trainer.part.places[name].start :][: parameter.numel()]
        parameter.copy_(part.view_as(parameter))


def shapes_of(trainer: DdpTrainer) -> dict[str, torch.Size]:
    """Return the shapes of the whole model's parameters."""
    named = {name: p.shape for name, p in trainer.model.named_parameters()}
    return {**named, **getattr(getattr(trainer, "part", None), "shapes", {})}


def whole(trainer: DdpTrainer, model: nn.Module) -> State:
    """Assemble a model's trained parameters from all ranks, on the main one."""
    trained = {name: p.detach() for name, p in model.named_parameters() if name != "pos_embed"}
    if not isinstance(trainer, ExpertParallelTrainer):
        return {name: value.clone() for name, value in trained.items()}
    state = {name: torch.full(trainer.part.shapes[name], torch.nan) for name in trained}
    for fragments in process.gather_on_main(list(trainer.part.fragments(trained))):
        for name, start, piece in fragments:
            state[name].view(-1)[start : start + len(piece)] = piece
    return state


def make_updates(*flags: str) -> list[State]:
    """Return losses, the gradient's norm, weights, routers' state and EMA after each update."""
    trainer = make_trainer(*flags)
    states = []
    for step in range(NUM_UPDATES):
        values = trainer.train_step(micro_batches(trainer, global_batch(step, BATCH)))
        for name, value in values.items():
            if name != "grad_norm":  # each rank's own, of its own images
                values[name] = process.sum_over_ranks(value) / trainer.rt.world_size
        values |= {f"buffer/{name}": b.clone() for name, b in trainer.model.named_buffers()}
        kinds = {"model": trainer.model, "ema": trainer.ema.model}
        if trainer.model.config.depth > SHALLOW:  # a gigabyte else
            kinds = {"model": trainer.model} if step == NUM_UPDATES - 1 else {}
        for kind, model in kinds.items():
            values |= {f"{kind}/{name}": value for name, value in whole(trainer, model).items()}
        states.append(values)
    return states


def initial_difference(*flags: str) -> float:
    """Return how far a fresh run's weights are from those that one process starts with."""
    job = prepare(build_parser(None).parse_args([*FLAGS, *flags]), meta=True)
    shapes = {name: tensor.shape for name, tensor in job.model.state_dict().items()}
    expected = dict(initial_weights(job.settings, job.model.config, shapes))
    part = ExpertParallel(job)
    part.fill(job.settings)
    return max(
        (expected[n].flatten()[part.places[n].start :][: t.numel()] - t.flatten())
        .abs()
        .max()
        .item()
        for n, t in job.model.state_dict().items()
    )


def steer(trainer: DdpTrainer, favourites: list[int]) -> None:
    """Send all tokens of class c to experts favourites[c] and favourites[c] + 1."""
    hidden_size = trainer.model.config.hidden_size
    for name, shape in shapes_of(trainer).items():
        value = torch.zeros(shape)
        if name == "y_embedder.embedding_table.weight":
            value[: len(favourites)] = 5 * torch.eye(len(favourites), hidden_size)
        elif name.endswith("adaLN_modulation.1.weight") and name.startswith("blocks"):
            value.chunk(6)[3].copy_(2 * torch.eye(hidden_size))  # shift of the MLP's input
        elif name.endswith("router.weight"):
            for label, expert in enumerate(favourites):
                value[expert : expert + 2, label] = 5.0
        else:
            continue
        fill(trainer, name, value)


def train_on_few_experts(favourites: list[int], *flags: str, steps: int) -> dict[str, Any]:
    """Make steps in which rank r's tokens all go to experts favourites[r] and the next.

    Returns:
        Tokens by layer and expert (L, E) of every rank, the last gradient's norm, the weights.
    """
    trainer = make_trainer("--lr", "1e-5", *flags)
    steer(trainer, favourites)
    counter = LoadCounter(trainer.model)
    for step in range(steps):
        batch = global_batch(step, BATCH)
        share = BATCH // len(favourites)
        batch["labels"] = torch.arange(len(favourites)).repeat_interleave(share)
        batch["drop_mask"] = torch.zeros(BATCH, dtype=torch.bool)
        values = trainer.train_step(micro_batches(trainer, batch))
    counts = process.gather_on_main(counter.counts)
    counter.remove()
    return {"counts": counts, "grad_norm": values["grad_norm"], **whole(trainer, trainer.model)}


def count_bytes(*flags: str) -> dict[str, Any]:
    """Make a step, and count what this rank sends to other ranks for rows of tokens.

    Returns:
        By "rows" and "counts" the bytes sent, and the choices (L, E) of this rank's tokens.
    """
    trainer: Any = make_trainer(*flags)
    counter = LoadCounter(trainer.model)
    sent = {"rows": 0, "counts": 0}
    library: Any = dist
    original = library.all_to_all_single

    def count(out: Tensor, rows: Tensor, arrive: Any, leave: Any, **options: Any) -> Any:
        elsewhere = len(rows) - leave[dist.get_rank(options["group"])]
        kind = "rows" if rows.is_floating_point() else "counts"
        sent[kind] += elsewhere * rows[:1].numel() * rows.element_size()
        return original(out, rows, arrive, leave, **options)

    library.all_to_all_single = count
    try:
        trainer.train_step(micro_batches(trainer, global_batch(0, BATCH)))
    finally:
        library.all_to_all_single = original
    return {**sent, "counts of choices": process.gather_on_main(counter.counts)}


def allocated(*flags: str) -> dict[str, Any]:
    """Return the bytes that this rank holds in a step, and what the plan says."""
    trainer: Any = make_trainer(*flags)
    config = trainer.model.config
    with torch.device("meta"):
        expected = expert_memory(DiT(config), trainer.settings.expert_parallel)
    found = {"gradients": 0}

    def count(*_: Any) -> None:
        found["gradients"] = sum(p.grad.nbytes for p in trainer.parameters)

    trainer.optimizer.register_step_pre_hook(count)
    trainer.train_step(micro_batches(trainer, global_batch(0, BATCH)))
    moments = [s[k] for s in trainer.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    found |= {
        "weights": sum(p.nbytes for p in trainer.model.parameters()),
        "optimizer": sum(tensor.nbytes for tensor in moments),
        "ema": sum(p.nbytes for p in trainer.ema.model.parameters()),
    }
    return {"found": found, "expected": {name: getattr(expected, name) for name in found}}


def overflow(*flags: str) -> tuple[int, int, float]:
    """Spoil one rank's expert in float16: steps, skipped ones, and by how much weights differ."""
    trainer: Any = make_trainer("--precision", "fp16", *flags)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    if trainer.rt.rank == 1:
        name = "blocks.0.moe.experts.down_proj"
        trainer.model.get_parameter(name).register_hook(lambda grad: grad * torch.inf)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train_step(micro_batches(trainer, global_batch(0, BATCH)))
    pairs = zip(trainer.model.parameters(), before, strict=True)
    moved = max((a - b).abs().max().item() for a, b in pairs)
    return trainer.step, trainer.skipped, moved


def resumed_updates(folder: Path, *flags: str) -> list[State]:
    """Make two steps, save, go on in a new trainer; as `make_updates` of one parameter kind."""
    names = ("--results-dir", str(folder), "--run-name", "resumed")
    trainer = make_trainer(*flags, *names)
    for step in range(2):
        trainer.train_step(micro_batches(trainer, global_batch(step, BATCH)))
    trainer.save()
    again = make_trainer(*flags, *names, std=0.5)
    path = latest_checkpoint(folder / "resumed")
    assert path is not None
    again.resume(path)
    states = []
    for one in (trainer, again):
        one.train_step(micro_batches(one, global_batch(2, BATCH)))
        averages = {f"ema/{name}": value for name, value in whole(one, one.ema.model).items()}
        states.append(whole(one, one.model) | averages)
    return states


def main(path: str, folder: str, *sizes: str) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    process.setup = functools.cache(process.setup)  # one process group for many jobs
    rt = process.setup()
    results: dict[Any, Any] = {}
    for name, given in CASES.items():
        results[name, ""] = make_updates(*given)
    for size in sizes:
        flags: tuple[str, ...] = ("--expert-parallel", size)
        for name, given in CASES.items():
            results[name, size] = make_updates(*given, *flags)
        results["initial", size] = initial_difference(*flags)
        results["overflow", size] = process.gather_on_main(overflow(*flags))
        for precision in ("fp32", "bf16"):
            results["bytes", size, precision] = process.gather_on_main(
                count_bytes(*flags, "--precision", precision)
            )
        results["memory", size] = process.gather_on_main(allocated(*flags))
        results["resumed", size] = resumed_updates(Path(folder) / size, *flags)
    favourites = {"one": [0] * rt.world_size, "others": [2, 0] * (rt.world_size // 2)}
    for choice in ("", *sizes):
        flags = ("--expert-parallel", choice) if choice else ()
        for case, experts in favourites.items():
            results[case, choice] = train_on_few_experts(experts, *flags, steps=20)
    if rt.is_main:
        torch.save(results, path)
    process.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
