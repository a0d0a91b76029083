"""The trainer of train_deepspeed.py, as ddp.py has those of train.py."""

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint.weights import average_kinds, average_name
from common import process
from common.errors import UserError
from training import zero
from training.expert_parallel import ExpertParallel
from training.initial import initial_weights
from training.job import Job, describe
from training.loop import (
    Batch,
    all_finite,
    mean_losses,
    micro_loss,
    require_loss_scale,
)
from training.memory import memory_table
from training.optimization import learning_rate, set_learning_rate
from training.resume import restore_rng
from training.shares import open_shares, save_shares
from training.zero_config import engine_config, read_config


class DeepSpeedTrainer:
    """The engine with its shards and their EMA: one step forward, saved and restored."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.rt = job, job.settings, job.rt
        self.step = self.skipped = 0
        self.shapes = {name: tensor.shape for name, tensor in job.model.state_dict().items()}
        self.trained = {name for name, p in job.model.named_parameters() if p.requires_grad}
        assert self.settings.deepspeed_config is not None  # its flag has a default
        config = engine_config(self.settings, read_config(self.settings.deepspeed_config))
        part = ExpertParallel(job) if (self.settings.expert_parallel or 1) > 1 else None
        if self.settings.compile:
            job.model.compile_blocks()
        self.engine = zero.build_engine(job.model, config, self.settings, self.rt, part)
        self.optimizer = self.engine.optimizer
        for name, value in initial_weights(self.settings, job.model.config, self.shapes):
            self.engine.fill(name, value)
        self.engine.refresh()
        decays = self.settings.ema_decays or [self.settings.ema_decay]
        self.averages = {d: [s.detach().clone() for s in self.engine.flat] for d in decays}
        self.ema = self.averages[self.settings.ema_decay]

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches, which the engine counts.

        Args:
            batches: (latents (N, C, H, W), labels (N,), further arguments of `training_loss`).

        Returns:
            loss, auxiliary losses (per layer, see `micro_loss`) and grad_norm, each ().
        """
        set_learning_rate(self.optimizer, learning_rate(self.settings, self.step))
        losses = []
        for batch in batches:
            losses.append(micro_loss(self.job, self.engine.wrapped, batch))
            self.engine.accumulate(losses[-1].total)
        if self._overflowed():
            self.skipped += 1
            self.job.model.update_router_state(discard=True)
        else:
            # The averages have no routers' state of their own: train.py's `Ema` copies it too.
            self.job.model.update_router_state(bias_rate=self.settings.bias_update_rate)
            with torch.no_grad():  # each rank its own shards: ema += (1 - decay)(weights - ema)
                for decay, average in self.averages.items():
                    torch._foreach_lerp_(average, self.engine.flat, 1 - decay)
            self.step += 1
        norm = self.engine.grad_norm()
        grad_norm = torch.as_tensor(norm, dtype=torch.float32, device=self.rt.device)
        return {**mean_losses(losses), "grad_norm": grad_norm}

    def _overflowed(self) -> bool:
        """Tell whether a gradient overflowed float16; of other formats it is the model's end."""
        if self.engine.scaler is None:
            return False
        require_loss_scale(self.engine.loss_scale, self.step)
        return self.engine.was_skipped()

    def is_finite(self) -> bool:
        """Tell whether all weights and averages are numbers."""
        finite = all(map(all_finite, [self.engine.flat, *self.averages.values()]))
        return not process.any_rank(not finite, self.rt.device)

    def save(self) -> None:
        """Write the checkpoint of this step, every rank its share, then drop the oldest ones.

        Raises:
            UserError: on all ranks, if one could not write; the last checkpoint is untouched.
        """
        flat = {"model": self.engine.flat, "ema": self.ema} | {
            kind: self.engine.moments(kind) for kind in ("exp_avg", "exp_avg_sq")
        }
        further = [d for d in self.averages if d != self.settings.ema_decay]
        flat |= {average_name(decay): self.averages[decay] for decay in further}
        kinds = {kind: self.engine.shares(tensors) for kind, tensors in flat.items()}
        whole = {**self.engine.buffers, **self.engine.frozen_parameters()}
        save_shares(self.job, kinds, whole, self._state())

    def _state(self) -> dict:
        """Return what is the same on all ranks."""
        return {
            "shapes": {name: list(self.shapes[name]) for name in sorted(self.trained)},
            "step": self.step,
            "skipped": self.skipped,
            "adam_step": self.engine.adam_step(),
            "loss_scale": self.engine.scale_state(),
        }

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of this model, of any number of ranks and any stage.

        Raises:
            ValueError: if it is damaged, of another model, or of train.py.
        """
        shapes = {name: self.shapes[name] for name in self.trained}
        whole = [*self.engine.buffers, *self.engine.frozen]
        buffers = {name: self.shapes[name] for name in whole}
        checkpoint = open_shares(self.job, path, shapes, buffers)
        state = checkpoint.state
        for name, buffer in checkpoint.buffers().items():
            self.engine.fill(name, buffer)
        moments = {kind: self.engine.moments(kind) for kind in ("exp_avg", "exp_avg_sq")}
        flat = [("model", self.engine.flat), *moments.items()]
        saved = average_kinds(state["settings"])
        for decay, average in self.averages.items():  # one that is new begins as the first
            flat.append((saved.get(decay, "ema"), average))
        for kind, tensors in flat:
            for name, start, piece in self.engine.fragments(tensors):
                piece.copy_(checkpoint.read(kind, name, start, piece.numel()))
        self.engine.refresh()
        self.engine.set_adam(state["adam_step"], moments)
        self.engine.load_scale_state(state["loss_scale"])
        self.step, self.skipped = state["step"], state.get("skipped", 0)
        restore_rng(self.job, path, self.step, state["num_ranks"], checkpoint.rng)
        logging.info("resumed %s at step %d", path, self.step)

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Lend the model with averaged weights, in eval mode, all ranks together."""
        return self.engine.swapped(self.ema)


def plan_stages(job: Job, ranks: list[int] | None) -> str:
    """Return what `--dry-run` prints: settings, then the memory of each stage.

    Args:
        job: of the run.
        ranks: of `--plan-ranks`.

    Raises:
        UserError: `--expert-parallel` does not divide one of them.
    """
    size = job.settings.expert_parallel or 1
    for number in ranks or ():
        if number % size:
            raise UserError(f"--plan-ranks {number}: --expert-parallel {size} must divide it")
    usual = [number for number in (8, 16, 64) if number % size == 0] or [size]
    ranks = ranks or ([job.rt.world_size] if job.rt.world_size > 1 else usual)
    return f"{describe(job)}\n\n{memory_table(job.model, ranks, size)}"
