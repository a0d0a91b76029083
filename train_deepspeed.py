"""Train a DiT-MoE with DeepSpeed ZeRO: optimizer, gradients, EMA and weights cut over the ranks.

    torchrun --nproc_per_node=8 train_deepspeed.py --deepspeed-config config/zero3.json \\
        --model DiT-G/2 --data-path IMAGES --rf --grad-checkpointing
    python train_deepspeed.py --model DiT-G/2 --data-path IMAGES --dry-run

The same flags, data, loss, curves and pictures as train.py; only the engine differs. Running the
same command again continues where the run stopped, bit for bit on the same number of ranks.
`python convert.py RUN model.safetensors` makes one file of a run.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

import zero
from common import process
from common.flags import FlagParser, number
from memory import memory_table
from resume import check_resumable, restore_rng
from sharded import (
    ShardedCheckpoint,
    commit,
    latest_sharded,
    partial_folder,
    write_share,
    write_state,
)
from train_loop import Batch, draw_grid, launch, learning_rate, mean_losses, micro_loss
from train_settings import build_parser
from train_utils import Job, compile_blocks, describe, initial_weights

LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # of the fp16 scaler


class DeepSpeedTrainer:
    """The engine with its shards and their EMA: one step forward, saved and restored."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.rt = job, job.settings, job.rt
        self.step = 0
        self.shapes = {name: p.shape for name, p in job.model.named_parameters()}
        self.trained = {name for name, p in job.model.named_parameters() if p.requires_grad}
        assert self.settings.deepspeed_config is not None  # its flag has a default
        file = zero.read_config(self.settings.deepspeed_config)
        config = zero.engine_config(self.settings, file)
        if self.settings.compile:
            compile_blocks(job.model)
        self.engine, self.optimizer = zero.build_engine(
            job.model, config, self.settings, self.rt.device
        )
        self.shards = zero.Shards(self.engine, self.rt)
        for name, value in initial_weights(self.settings, self.shapes):
            self.shards.fill(name, value)
        self.shards.refresh()
        self.ema = [shard.detach().clone() for shard in self.shards.flat]

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches, which the engine counts.

        Args:
            batches: (latents (N, C, H, W), labels (N,), further arguments of `training_loss`).

        Returns:
            loss, aux_loss (per layer, 1.0 = even) and grad_norm, each ().
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        losses = []
        for batch in batches:
            losses.append(micro_loss(self.job, self.engine, batch))
            self.engine.backward(losses[-1].total)
            norm = self.shards.whole_grad_norm()
            self.engine.step()
        with torch.no_grad():  # each rank its own shards: ema += (1 - decay)(weights - ema)
            torch._foreach_lerp_(self.ema, self.shards.flat, 1 - self.settings.ema_decay)
        self.step += 1
        norm = self.engine.get_global_grad_norm() if norm is None else norm
        grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.rt.device)
        return {**mean_losses(losses), "grad_norm": grad_norm}

    def save(self) -> None:
        """Write the checkpoint of this step, every rank its share, then drop the oldest ones.

        Raises:
            OSError: on all ranks, if one could not write; the last checkpoint is untouched.
        """
        partial = partial_folder(self.job.run_dir, self.step)
        flat = {"model": self.shards.flat, "ema": self.ema} | {
            kind: [self.optimizer.state[shard][kind] for shard in self.shards.flat]
            for kind in ("exp_avg", "exp_avg_sq")
        }
        kinds = {kind: self.shards.fragments(tensors) for kind, tensors in flat.items()}
        if self.shards.is_replica:
            kinds = {}
        error = None
        try:
            write_share(partial, self.rt.rank, kinds, process.rng_state())
            if self.rt.is_main:
                write_state(partial, self._state())
        except OSError as failure:
            error = str(failure)
        errors = process.from_main([e for e in process.gather_on_main(error) if e])
        if errors:
            if self.rt.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            last = latest_sharded(self.job.run_dir)
            raise OSError(f"{errors[0]}; the last whole checkpoint is {last}, free some space")
        if self.rt.is_main:
            logging.info("checkpoint: %s", commit(partial, self.settings.keep_last))
        process.barrier()

    def _state(self) -> dict:
        """Return what is the same on all ranks."""
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        scale = {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}
        return {
            "config": self.job.model.config.to_dict(),
            "settings": self.settings.to_dict(),
            "shapes": {name: list(self.shapes[name]) for name in sorted(self.trained)},
            "num_ranks": self.rt.world_size,
            "step": self.step,
            "adam_step": float(self.optimizer.state[self.shards.flat[0]]["step"]),
            "loss_scale": scale,
        }

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of this model, of any number of ranks and any stage.

        Raises:
            ValueError: if it is damaged, of another model, or of train.py.
        """
        if not (path / "state.json").is_file():
            raise ValueError(
                f"--resume: {path} is no sharded checkpoint; give another --run-name, and "
                "--init-from to start from its weights"
            )
        checkpoint = ShardedCheckpoint(path)
        state = checkpoint.state
        check_resumable(self.job, path, state["config"], state["settings"])
        moments = {"exp_avg": self.shards.zeros(), "exp_avg_sq": self.shards.zeros()}
        flat = {"model": self.shards.flat, "ema": self.ema, **moments}
        for kind, tensors in flat.items():
            for name, start, piece in self.shards.fragments(tensors):
                piece.copy_(checkpoint.read(kind, name, start, piece.numel()))
        self.shards.refresh()
        for i, shard in enumerate(self.shards.flat):
            self.optimizer.state[shard] = {
                "step": torch.tensor(state["adam_step"], device=shard.device),
                **{kind: tensors[i] for kind, tensors in moments.items()},
            }
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        # Only fp16 has a scale to continue; other precisions save a constant, or have no scaler.
        if getattr(scaler, "dynamic", False) and "cur_iter" in state["loss_scale"]:
            for key, value in state["loss_scale"].items():
                setattr(scaler, key, value)
        self.step = state["step"]
        restore_rng(self.job, path, self.step, state["num_ranks"], checkpoint.rng)
        logging.info("resumed %s at step %d", path, self.step)

    def draw(self) -> None:
        """Draw the sample grid of this step with the averaged weights, all ranks together."""
        with self.shards.swapped(self.ema) as model:
            draw_grid(model, self.job, self.step)
        process.barrier()


def build_deepspeed_parser() -> FlagParser:
    """Return train.py's flags and those of the engine."""
    parser = build_parser(__doc__)
    group = parser.group("DeepSpeed")
    group.add(
        "--deepspeed-config",
        default="config/zero2.json",
        metavar="FILE",
        help="JSON file with the ZeRO stage and the precision of the engine.",
    )
    group.add(
        "--local-rank",
        type=int,
        metavar="N",
        help="Number of this process on its node, which launchers give; not read.",
    )
    group.add(
        "--plan-ranks",
        type=number(int, 1),
        nargs="+",
        metavar="N",
        help="Numbers of ranks whose memory --dry-run plans. Default: this run's, else 8 16 64.",
    )
    return parser


def plan(job: Job, ranks: list[int] | None) -> str:
    """Return what `--dry-run` prints: settings, then the memory of each stage."""
    ranks = ranks or ([job.rt.world_size] if job.rt.world_size > 1 else [8, 16, 64])
    return f"{describe(job)}\n\n{memory_table(job.model, ranks, job.settings.precision)}"


def main(args: argparse.Namespace) -> None:
    """Train, or plan."""
    try:
        wanted = zero.resolve_precision(args, zero.read_config(args.deepspeed_config))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"train_deepspeed.py: error: {error}")
    rt = zero.join()
    if rt.is_main and args.precision != wanted:
        print(f"{wanted} is not native on this hardware: training in {args.precision}")
    launch(args, DeepSpeedTrainer, meta=True, plan=lambda job: plan(job, args.plan_ranks))


if __name__ == "__main__":
    main(build_deepspeed_parser().parse_args())
