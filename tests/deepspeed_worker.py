"""Short runs of both trainers on two gloo ranks, all in one launch since each costs 10 seconds.

    torchrun --nproc_per_node=2 tests/deepspeed_worker.py OUT.pt FOLDER

Every case starts from the same random weights and makes the same updates; the main rank writes what
came out. FOLDER gets the engine files, made from those of config/ with float32 for bfloat16.
"""

import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from launch import REPO
from torch import Tensor, nn
from train_worker import FLAGS, NUM_UPDATES, State, global_batch, micro_batches

from checkpoint.state import latest_checkpoint, save_safetensors
from common import process
from models import Routing
from routing import LoadCounter
from train_deepspeed import build_deepspeed_parser
from training import zero
from training.ddp import DdpTrainer
from training.flags import build_parser
from training.initial import initial_weights
from training.job import build_model, prepare
from training.memory import rank_memory
from training.zero_config import zero_stage
from training.zero_trainer import DeepSpeedTrainer

CASES = ("stage 0", "stage 2", "stage 3", "stage 3 + offload")
FILES = {
    **{"stage 2": "zero2", "stage 2 + offload": "zero2"},
    **{"stage 3": "zero3", "stage 3 + offload": "zero3_offload"},
}
# Whose names zero_experts_worker.py looks for.
WITH_EXPERTS = ("deepspeed.utils.groups", "engine with experts", "optimizer with experts")
PERSISTENT = 1000  # stage 3 cuts what is larger; the value of config/ is larger than any here


def engine_file(case: str, folder: Path) -> str:
    """Write the engine file of a case, without a precision, so that the flag decides."""
    config: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    if case == "stage 1":
        config["zero_optimization"]["stage"] = 1
    if case in FILES:
        config = json.loads((REPO / f"config/{FILES[case]}.json").read_text())
        del config["torch_autocast"]
        config["zero_optimization"]["reduce_bucket_size"] = 1_000_000
        if case == "stage 2 + offload":
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if "3" in case:
            config["zero_optimization"]["stage3_param_persistence_threshold"] = PERSISTENT
            config["zero_optimization"]["sub_group_size"] = 100_000  # several flat tensors a rank
    path = folder / f"{case}.{os.environ.get('RANK', 0)}.json"  # a rank its own: no torn reads
    path.write_text(json.dumps(config))
    return str(path)


def make_trainer(case: str | None, *flags: str, std: float = 0.1) -> DdpTrainer | DeepSpeedTrainer:
    """Build a trainer (None: train.py's) with the random weights of the DDP tests."""
    given = [*FLAGS, "--global-batch-size", "8", "--lr", "0.001", "--ema-decay", "0.9", *flags]
    if case is not None:
        given += ["--deepspeed-config", engine_file(case, Path(sys.argv[2]))]
    args = build_deepspeed_parser().parse_args(given)
    job = prepare(args, meta=case is not None)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: nn.init.normal_(torch.empty(parameter.shape), std=std, generator=generator)
        for name, parameter in job.model.named_parameters()
    }
    if case is None:
        job.model.load_state_dict(weights, strict=False)  # routers' state starts at zero
        trainer: Any = DdpTrainer(job)
    else:
        trainer = DeepSpeedTrainer(job)
        for name, value in weights.items():
            trainer.engine.fill(name, value)
        trainer.engine.refresh()
        trainer.ema = [shard.detach().clone() for shard in trainer.engine.flat]
        trainer.averages = {trainer.settings.ema_decay: trainer.ema}
    trainer.optimizer.param_groups[0]["eps"] = 1e-3  # see train_worker.make_updates
    return trainer


def whole(trainer: DeepSpeedTrainer, flat: list[Tensor]) -> State:
    """Assemble tensors like `engine.flat` from all ranks on the main one."""
    state = {name: torch.full(trainer.shapes[name], torch.nan) for name in trainer.trained}
    for fragments in process.gather_on_main(list(trainer.engine.fragments(flat))):
        for name, start, piece in fragments:
            state[name].view(-1)[start : start + len(piece)] = piece
    return state


def make_updates(case: str | None, *flags: str) -> list[State]:
    """Return the gradient's norm, trained weights and their EMA after the first and last update."""
    trainer: Any = make_trainer(case, *flags)
    states = []
    for step in range(NUM_UPDATES):
        values = trainer.train_step(micro_batches(trainer, global_batch(step, 8)))
        if 0 < step < NUM_UPDATES - 1:
            continue
        if isinstance(trainer, DeepSpeedTrainer):
            weights, ema = whole(trainer, trainer.engine.flat), whole(trainer, trainer.ema)
            weights |= dict(trainer.job.model.named_buffers())
        else:
            weights, ema = trainer.model.state_dict(), trainer.ema.model.state_dict()
        values |= {f"weights/{name}": value.clone() for name, value in weights.items()}
        states.append(values | {f"ema/{name}": value.clone() for name, value in ema.items()})
    return states


def routing(case: str | None) -> tuple[Tensor, Tensor]:
    """Return which experts 12 layers choose in the first bfloat16 step, (L, M, K), and tables.

    The second tensor holds the router and the position table that the model computed with, flat.
    """
    flags = ("--model", "DiT-S/2", "--mlp-ratio", "0.25", "--precision", "bf16")
    trainer: Any = make_trainer(case, *flags, std=0.03)
    chosen, tables = [], []

    def keep(router: Any, _inputs: Any, routing: Routing) -> None:
        chosen.append(routing.expert_indices.sort().values)
        tables.append(router.weight.detach().clone().flatten())

    model = trainer.job.model
    for block in model.blocks:
        block.moe.router.register_forward_hook(keep)
    model.x_embedder.register_forward_hook(
        lambda *_: tables.append(model.pos_embed.detach().clone().flatten())
    )
    trainer.train_step(micro_batches(trainer, global_batch(0, 8)))
    return torch.stack(chosen), torch.cat(tables)


def initial_difference(case: str, *flags: str) -> float:
    """Return how far a fresh run's weights are from those that one process starts with."""
    engine = ("--deepspeed-config", engine_file(case, Path(sys.argv[2])))
    args = build_deepspeed_parser().parse_args(
        [*FLAGS, *engine, "--global-batch-size", "8", *flags]
    )
    job = prepare(args, meta=True)
    expected = dict(
        initial_weights(
            job.settings, job.model.config, {n: p.shape for n, p in job.model.named_parameters()}
        )
    )
    trainer = DeepSpeedTrainer(job)
    weights = whole(trainer, trainer.engine.flat)
    return max((expected[name] - value).abs().max().item() for name, value in weights.items())


def save_random_model(path: Path) -> None:
    """Write the weights of another seed, for `--init-from`."""
    args = build_parser(None).parse_args([*FLAGS, "--global-batch-size", "8", "--seed", "5"])
    job = prepare(args)
    if job.rt.is_main:
        save_safetensors(path, job.model.state_dict(), job.model.config, {})
    process.barrier()


def allocated(case: str, precision: str) -> dict[str, Any]:
    """Return what a rank holds after a backward, and what `rank_memory` says, in bytes."""
    trainer: Any = make_trainer(case, "--precision", precision)
    stage = zero_stage(json.loads(Path(trainer.settings.deepspeed_config).read_text()))
    meta = build_model(trainer.settings, trainer.job.model.config.in_channels, 1)
    expected = rank_memory(
        meta,
        stage,
        trainer.rt.world_size,
        offload="offload" in case,
        persistent=PERSISTENT,
    )
    trainer.train_step(micro_batches(trainer, global_batch(0, 8)))
    engine = trainer.engine.wrapped
    optimizer = engine.optimizer
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
               for p in engine.module.parameters()
               for t in (p, getattr(p, "ds_tensor", p))}  # fmt: skip
    moments = [state[key] for state in trainer.optimizer.state.values()
               for key in ("exp_avg", "exp_avg_sq")]  # fmt: skip
    flat = trainer.engine.flat  # at stage 0, and at 3 without offload, the weights themselves
    copies = [shard for shard in flat if shard.untyped_storage().data_ptr() not in weights]
    if stage == 3:
        gradients = optimizer.grad_partitions_flat_buffer.nbytes
        gradients += sum(shard.grad.nbytes for shard in flat if shard.grad is not None)
    else:
        (latents, labels, given), *_ = micro_batches(trainer, global_batch(1, 8))
        loss = trainer.job.diffusion.training_loss(engine, latents, labels, **given)
        engine.backward(loss.per_sample.mean())
        held = [p.grad for p in engine.module.parameters() if p.grad is not None]
        if stage == 2:
            held = [t for group in optimizer.averaged_gradients.values() for t in group]
        gradients = sum(t.nbytes for t in held)
    found = {
        "weights": sum(weights.values()),
        "gradients": gradients,
        "optimizer": sum(t.nbytes for t in [*moments, *copies]),
        "ema": sum(t.nbytes for t in trainer.ema),
    }
    return {"found": found, "expected": expected._asdict()}


def float16_steps(case: str | None) -> dict[str, Any]:
    """Make a step that overflows, save, resume, and make one that does not."""
    folder = Path(sys.argv[2]) / "float16"
    flags = ("--precision", "fp16", "--results-dir", str(folder), "--run-name", str(case))
    trainer: Any = make_trainer(case, *flags)
    set_loss_scale(trainer, 2.0**40)
    before = [shard.clone() for shard in averages(trainer)]
    trainer.train_step(micro_batches(trainer, global_batch(0, 8)))
    facts: dict[str, Any] = {
        "moved": any(not torch.equal(a, b) for a, b in zip(averages(trainer), before, strict=True)),
        "step and skipped": (trainer.step, trainer.skipped),
        "scale": loss_scale(trainer),
    }
    trainer.save()
    trainer = make_trainer(case, *flags)
    trainer.resume(latest_checkpoint(folder / str(case)))
    facts["resumed"] = (trainer.step, trainer.skipped, loss_scale(trainer))
    set_loss_scale(trainer, 2.0**8)
    values = trainer.train_step(micro_batches(trainer, global_batch(1, 8)))
    facts |= {name: float(value) for name, value in values.items()}
    facts["then"] = (trainer.step, trainer.skipped)
    return facts


def averages(trainer: Any) -> list[Tensor]:
    """Return what this rank keeps of the EMA."""
    deepspeed = isinstance(trainer, DeepSpeedTrainer)
    return trainer.ema if deepspeed else list(trainer.ema.model.parameters())


def loss_scale(trainer: Any) -> float:
    """Return what losses are multiplied with."""
    deepspeed = isinstance(trainer, DeepSpeedTrainer)
    return trainer.engine.loss_scale if deepspeed else trainer.scaler.get_scale()


def set_loss_scale(trainer: Any, scale: float) -> None:
    """Replace it, in torch's scaler or DeepSpeed's."""
    scaler = trainer.engine.scaler if isinstance(trainer, DeepSpeedTrainer) else trainer.scaler
    if isinstance(scaler, torch.amp.GradScaler):
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale})
    else:
        scaler.cur_scale = scale


def missing_names() -> list[str]:
    """Return what `zero.PRIVATE_NAMES` lists and this DeepSpeed does not have."""
    engines = {case: make_trainer(case).engine.wrapped for case in CASES[:3]}  # type: ignore[union-attr]
    flat, cut = engines["stage 2"], engines["stage 3"]
    parts = [p for p in flat.module.parameters() if getattr(p, "_hp_mapping", None) is not None]
    owners = {
        "deepspeed.ops": [zero.deepspeed.ops],
        "engine at stage 0": [engines["stage 0"]],
        "optimizer of stages 1 to 3": [flat.optimizer, cut.optimizer],
        "optimizer of stages 1 and 2": [flat.optimizer],
        "parameter of stages 1 and 2": parts[:1],
        "_hp_mapping": [getattr(p, "_hp_mapping", None) for p in parts[:1]],
        "optimizer of stage 3": [cut.optimizer],
        "parameter of stage 3": [next(cut.module.parameters())],
        "DynamicLossScaler": [zero.DynamicLossScaler(**zero.LOSS_SCALE)],
    }
    return [
        f"{owner}: {name}"
        for owner, names in zero.PRIVATE_NAMES.items()
        if owner not in WITH_EXPERTS
        for name in names
        if not owners[owner] or not all(hasattr(found, name) for found in owners[owner])
    ]


def train_on_different_experts(steps: int) -> tuple[list[Tensor], float]:
    """Make ZeRO-3 steps in which rank r's tokens all go to experts 2r and 2r + 1.

    Returns:
        Tokens by layer and expert (L, E) of every rank, and the last loss.
    """
    trainer: Any = make_trainer("stage 3", "--lr", "0")
    hidden_size = trainer.job.model.config.hidden_size
    for name, shape in trainer.shapes.items():
        value = torch.zeros(shape)
        if name == "y_embedder.embedding_table.weight":
            value[:2] = 5 * torch.eye(2, hidden_size)
        elif name.endswith("adaLN_modulation.1.weight") and name.startswith("blocks"):
            value.chunk(6)[3].copy_(2 * torch.eye(hidden_size))  # shift of the MLP's input
        elif name.endswith("router.weight"):
            value[:2, 0] = value[2:, 1] = 5.0
        elif name.endswith("proj.weight"):
            continue
        trainer.engine.fill(name, value)
    trainer.engine.refresh()
    counter = LoadCounter(trainer.job.model)
    for step in range(steps):
        batch = global_batch(step, 8)
        batch["labels"] = torch.tensor([0] * 4 + [1] * 4)
        batch["drop_mask"] = torch.zeros(8, dtype=torch.bool)
        loss = trainer.train_step(micro_batches(trainer, batch))["loss"]
    return process.gather_on_main(counter.counts), float(loss)


def main(path: str) -> None:
    """Run every case on all ranks; the first one writes what came out."""
    zero.join()
    process.setup = functools.cache(process.setup)
    accumulate = ("--accum-steps", "2", "--aux-loss-weight", "0.1", "--clip-grad", "0.5")
    results: dict[str, Any] = {"updates": {}, "initial difference": {}, "memory": {}}
    for precision in ("fp32", "bf16"):
        for case in (None, *CASES):
            flags = (*accumulate, "--precision", precision)
            results["updates"][case, precision] = make_updates(case, *flags)
    for case in CASES[1:]:
        results["initial difference"][case] = initial_difference(case)
    results["routing"] = {case: routing(case) for case in (None, *CASES)}
    random_model = Path(sys.argv[2]) / "random.safetensors"
    save_random_model(random_model)
    results["initial difference"]["--init-from"] = initial_difference(
        "stage 3", "--init-from", str(random_model)
    )
    for case in CASES:
        results["memory"][case] = allocated(case, "bf16" if "0" not in case else "fp32")
    results["float16"] = {case: float16_steps(case) for case in (None, *CASES[:3])}
    results["missing names"] = missing_names()
    results["different experts"] = train_on_different_experts(20)
    if process.setup().is_main:
        torch.save(results, path)
    process.finish()


if __name__ == "__main__":
    main(sys.argv[1])
