"""Runs of train_deepspeed.py with `--expert-parallel 2`, on as many gloo ranks as it is started on.

    torchrun --nproc_per_node=2 tests/zero_experts_worker.py OUT.pt FOLDER

Every case makes the updates of `expert_parallel_worker` from the same random weights; the test
makes them in its own single process.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import expert_parallel_worker
import torch
from deepspeed_worker import engine_file, whole
from expert_parallel_worker import BATCH, CASES, NUM_UPDATES
from torch import nn
from train_worker import FLAGS, State, global_batch, micro_batches

from checkpoint.state import latest_checkpoint
from common import process
from models import DiT
from train_deepspeed import build_deepspeed_parser
from training import zero
from training.job import prepare
from training.memory import rank_memory
from training.zero_trainer import DeepSpeedTrainer

EXPERTS = ("--expert-parallel", "2")
CLIPPED = ("--clip-grad", "0.5")
RUNS: list[tuple[str, str, tuple[str, ...]]] = [  # stage, case, further flags
    *((stage, case, ()) for stage in ("stage 0", "stage 1", "stage 2")
      for case in ("token choice", "accumulated", "expert choice")),
    *((stage, "token choice", CLIPPED) for stage in ("stage 0", "stage 2")),
    ("stage 2", "unconditional expert", ()),
    ("stage 2 + offload", "token choice", CLIPPED),
]  # fmt: skip


def make_trainer(stage: str, *flags: str, std: float = 0.1) -> DeepSpeedTrainer:
    """Build a trainer with the random weights of `expert_parallel_worker`."""
    basic = ("--global-batch-size", str(BATCH), "--lr", "0.001", "--ema-decay", "0.9")
    file = ("--deepspeed-config", engine_file(stage, Path(sys.argv[2])))
    job = prepare(build_deepspeed_parser().parse_args([*FLAGS, *basic, *file, *flags]), meta=True)
    trainer = DeepSpeedTrainer(job)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in job.model.named_parameters():
        if parameter.requires_grad:
            value = nn.init.normal_(torch.empty(trainer.shapes[name]), std=std, generator=generator)
            trainer.engine.fill(name, value)
    trainer.engine.refresh()
    for shard, average in zip(trainer.engine.flat, trainer.ema, strict=True):
        average.copy_(shard.detach())
    for group in trainer.optimizer.param_groups:
        group["eps"] = 1e-3  # see train_worker.make_updates
    return trainer


def make_updates(stage: str, *flags: str) -> list[State]:
    """Return what `expert_parallel_worker.make_updates` does."""
    trainer: Any = make_trainer(stage, *flags)
    model, states = trainer.job.model, []
    for step in range(NUM_UPDATES):
        values = trainer.train_step(micro_batches(trainer, global_batch(step, BATCH)))
        for name, value in values.items():
            if name != "grad_norm":
                values[name] = process.sum_over_ranks(value) / trainer.rt.world_size
        values |= {f"buffer/{name}": b.clone() for name, b in model.named_buffers()}
        for kind, flat in (("model", trainer.engine.flat), ("ema", trainer.ema)):
            values |= {f"{kind}/{name}": value for name, value in whole(trainer, flat).items()}
        states.append(values)
    return states


def state_of(trainer: Any) -> State:
    """Return trained weights, averages and moments of either sharded trainer, whole."""
    if isinstance(trainer, DeepSpeedTrainer):
        kinds = {"model": trainer.engine.flat, "ema": trainer.ema}
        kinds |= {kind: trainer.engine.moments(kind) for kind in ("exp_avg", "exp_avg_sq")}
        found = {kind: whole(trainer, flat) for kind, flat in kinds.items()}
    else:
        found = {}
        for kind, named in trainer._kinds().items():
            state = {name: torch.full(trainer.part.shapes[name], torch.nan) for name in named}
            for fragments in process.gather_on_main(list(trainer.part.fragments(named))):
                for name, start, piece in fragments:
                    state[name].view(-1)[start : start + len(piece)] = piece
            found[kind] = state
    return {
        f"{kind}/{name}": v.clone() for kind, named in found.items() for name, v in named.items()
    }


def build(kind: str, *flags: str, std: float = 0.1) -> Any:
    """Build a trainer of a kind: a stage, a stage with "experts", or train.py's with them."""
    if kind == "train.py":
        return expert_parallel_worker.make_trainer(*EXPERTS, *flags, std=std)
    stage, _, experts = kind.partition(" with ")
    return make_trainer(stage, *(EXPERTS if experts else ()), *flags, std=std)


def resumed(source: str, *targets: str) -> list[State]:
    """Make two steps, save; return state and a further step of this trainer and of others."""
    folder = Path(sys.argv[2]) / "resumed"
    flags = ("--results-dir", str(folder), "--run-name", source.replace(" ", "-"))
    first = build(source, *flags)
    for step in range(2):
        first.train_step(micro_batches(first, global_batch(step, BATCH)))
    first.save()
    path = latest_checkpoint(folder / flags[-1])
    assert path is not None
    states = []
    for trainer in (first, *(build(target, *flags, std=0.5) for target in targets)):
        if trainer is not first:
            trainer.resume(path)
        at_once = {f"saved/{name}": value for name, value in state_of(trainer).items()}
        trainer.train_step(micro_batches(trainer, global_batch(2, BATCH)))
        states.append(at_once | state_of(trainer))
    return states


def overflow(stage: str) -> tuple[int, int, float]:
    """Spoil one rank's expert in float16: steps, skipped ones, and by how much weights differ."""
    trainer: Any = make_trainer(stage, *EXPERTS, "--precision", "fp16")
    if trainer.rt.rank == 1:
        name = "blocks.0.moe.experts.down_proj"
        trainer.job.model.get_parameter(name).register_hook(lambda grad: grad * torch.inf)
    before = [shard.detach().clone() for shard in trainer.engine.flat]
    trainer.train_step(micro_batches(trainer, global_batch(0, BATCH)))
    pairs = zip(trainer.engine.flat, before, strict=True)
    moved = max((a - b).abs().max().item() for a, b in pairs)
    return trainer.step, trainer.skipped, moved


def allocated(stage: str) -> dict[str, Any]:
    """Return the bytes that this rank holds after a step, and what the plan says."""
    trainer: Any = make_trainer(stage, *EXPERTS)
    with torch.device("meta"):
        model = DiT(trainer.job.model.config)
    model.pos_embed.requires_grad_(False)
    number = int(stage[-1])
    expected = rank_memory(model, number, trainer.rt.world_size, size=2)
    trainer.train_step(micro_batches(trainer, global_batch(0, BATCH)))
    moments = [trainer.engine.moments(kind) for kind in ("exp_avg", "exp_avg_sq")]
    copies = trainer.engine.flat if number else []
    found = {
        "weights": sum(p.nbytes for p in trainer.job.model.parameters()),
        "optimizer": sum(t.nbytes for flat in (*moments, copies) for t in flat),
        "ema": sum(t.nbytes for t in trainer.ema),
    }
    return {"found": found, "expected": {name: getattr(expected, name) for name in found}}


def missing_names() -> list[str]:
    """Return what this DeepSpeed lacks of the names that cut experts need."""
    engine = make_trainer("stage 2", *EXPERTS).engine.wrapped
    owners = {
        "deepspeed.utils.groups": zero.rank_groups,
        "engine with experts": engine,
        "optimizer with experts": engine.optimizer,
    }
    marked = engine.has_moe_layers and any(engine.optimizer.is_moe_param_group)
    missing = [f"{o}: {n}" for o in owners for n in zero.PRIVATE_NAMES[o]
               if not hasattr(owners[o], n)]  # fmt: skip
    return missing + ([] if marked else ["the mark of experts"])


def main(path: str, folder: str) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    zero.join()
    process.setup = functools.cache(process.setup)
    rt = process.setup()
    results: dict[Any, Any] = {}
    for stage, case, further in RUNS:
        results[stage, case, further] = make_updates(stage, *CASES[case], *further, *EXPERTS)
    stages = ("stage 0", "stage 1", "stage 2")
    for stage in stages:
        source = f"{stage} with experts"
        results["resumed", stage] = resumed(source, source, "stage 2", "train.py")
        results["overflow", stage] = process.gather_on_main(overflow(stage))
    results["resumed", "train.py"] = resumed("train.py", *(f"{s} with experts" for s in stages))
    results["resumed", "without"] = resumed("stage 2", "stage 2 with experts")
    for stage in ("stage 0", "stage 2"):
        results["memory", stage] = process.gather_on_main(allocated(stage))
    results["missing names"] = missing_names()
    if rt.is_main:
        torch.save(results, path)
    process.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
