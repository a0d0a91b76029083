"""The trainers of train.py: `DdpTrainer`, and `ExpertParallelTrainer` whose ranks share experts.

A trainer is the model with its optimizer, loss scaler and EMA, one step forward, saved and
restored; `launch` of loop.py drives it.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from checkpoint.state import (
    check_shapes,
    checkpoint_path,
    commit_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from common import process
from common.errors import blamed_on
from moe_ops import rounded_once
from training.expert_parallel import ExpertParallel
from training.job import Ema, Job, describe
from training.loop import (
    Batch,
    all_finite,
    mean_losses,
    micro_loss,
    require_loss_scale,
)
from training.memory import expert_table
from training.muon import build_optimizer
from training.optimization import learning_rate, set_learning_rate
from training.parameters import load_optimizer, optimizer_state, saved_order
from training.repa import Aligned, check_repa
from training.resume import check_resumable, restore_rng
from training.shares import open_shares, save_shares


@contextmanager
def ddp_sync(wrapped: nn.Module, enabled: bool) -> Iterator[None]:
    """Let the backward passes of the body average gradients over ranks, or only add them up."""
    if enabled or not isinstance(wrapped, DistributedDataParallel):
        yield
    else:
        with wrapped.no_sync():
            yield


class DdpTrainer:
    """The model with its optimizer, loss scaler and EMA: one step forward, saved and restored."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.rt = job, job.settings, job.rt
        self.step = self.skipped = 0
        self.model = job.model.to(self.rt.device).train()
        decays = self.settings.ema_decays or [self.settings.ema_decay]
        self.averages = [Ema(self.model, decay) for decay in decays]
        self.ema = self.averages[0]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        named = list(self.model.named_parameters())
        self.order = saved_order(self.model)
        self.mlp_weights = self.model.mlp_weights()
        self.wrapped: nn.Module = self.model
        self.projector: nn.Module | None = None  # of --repa, in no checkpoint's weights
        if job.encoder is not None:
            block = check_repa(str(self.settings.repa), self.settings.repa_block, self.model)
            aligned = Aligned(self.model, block, job.encoder.width, self.settings.seed)
            self.wrapped = aligned.to(self.rt.device)
            self.projector = aligned.projector
            own = [(f"projector.{name}", p) for name, p in self.projector.named_parameters()]
            named, self.order = named + own, self.order + [name for name, _ in own]
            self.parameters += self.projector.parameters()
        self.optimizer = build_optimizer(named, self.settings)
        fp16 = self.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.rt.device.type, enabled=fp16)
        if self.settings.compile:
            self.model.compile_blocks()
        if self.rt.world_size > 1:
            devices = [self.rt.device] if self.rt.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(
                self.wrapped,
                device_ids=devices,
                gradient_as_bucket_view=True,
            )

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches.

        Args:
            batches: (latents (N, C, H, W), labels (N,), further arguments of `training_loss`).

        Returns:
            loss, auxiliary losses (per layer, see `micro_loss`) and grad_norm, each ().
        """
        set_learning_rate(self.optimizer, learning_rate(self.settings, self.step))
        losses = []
        with self._weights_rounded():
            for i, batch in enumerate(batches):
                with ddp_sync(self.wrapped, i == self.settings.accum_steps - 1):
                    losses.append(micro_loss(self.job, self.wrapped, batch))
                    self.scaler.scale(losses[-1].total / self.settings.accum_steps).backward()
        grad_norm = self._finish_gradients()
        self.scaler.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if self._overflowed():
            self.skipped += 1
            self.model.update_router_state(discard=True)
        else:
            self.model.update_router_state(bias_rate=self.settings.bias_update_rate)
            for average in self.averages:
                average.update()
            self.step += 1
        return {**mean_losses(losses), "grad_norm": grad_norm}

    def _weights_rounded(self) -> AbstractContextManager[None]:
        """Round what is used in every micro-batch once; compiled, that is fused with its use."""
        dtype = process.DTYPES[self.settings.precision]
        return nullcontext() if self.settings.compile else rounded_once(self.mlp_weights, dtype)

    def _finish_gradients(self) -> Tensor:
        """Unscale and clip the gradients; returns the () norm that they had."""
        self.scaler.unscale_(self.optimizer)
        return clip_grad_norm_(self.parameters, self.settings.clip_grad or float("inf"))

    def _overflowed(self) -> bool:
        """Update the loss scale, which an overflow halves; without one nothing is read."""
        if not self.scaler.is_enabled():
            return False
        before = self.scaler.get_scale()
        self.scaler.update()
        after = self.scaler.get_scale()
        require_loss_scale(after, self.step)
        return after < before

    def is_finite(self) -> bool:
        """Tell whether all weights and averages are numbers."""
        models = [self.model, *(average.model for average in self.averages)]
        tensors = [tensor for model in models for tensor in model.parameters()]
        return not process.any_rank(not all_finite(tensors), self.rt.device)

    def save(self) -> None:
        """Write the checkpoint of this step, with every rank's RNG, then drop the oldest ones.

        Raises:
            UserError: on all ranks, if the main one could not write; the last one is untouched.
        """
        rng = process.gather_on_main(process.rng_state())
        process.call_on_main(self._write, rng)

    def _write(self, rng: list[dict[str, Tensor]]) -> None:
        path = checkpoint_path(self.job.run_dir, self.step)
        save_checkpoint(
            path,
            config=self.model.config,
            settings=self.settings.to_dict(),
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            averages={a.decay: a.model.state_dict() for a in self.averages[1:]},
            optimizer=optimizer_state(self.optimizer, self.order),
            projector=None if self.projector is None else self.projector.state_dict(),
            scaler=self._scaler_state(),
            step=self.step,
            rng=rng,
        )
        commit_checkpoint(path, self.settings.keep_last, self.settings.resume)
        logging.info("checkpoint: %s", path)

    def _scaler_state(self) -> dict[str, float] | None:
        if not self.scaler.is_enabled():
            return None
        return {**self.scaler.state_dict(), "skipped": self.skipped}

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of this model.

        Raises:
            ValueError: if it is damaged or of another model.
        """
        content = load_checkpoint(path)
        check_resumable(self.job, path, content["config"], content["settings"])
        saved = {content["settings"].get("ema_decay"): content["ema"]}
        saved |= content.get("averages", {})
        states: list[tuple[Any, nn.Module]] = [(content["model"], self.model)]
        for average in self.averages:  # one that is new begins as the first
            states.append((saved.get(average.decay, content["ema"]), average.model))
        if self.projector is not None and content.get("projector"):
            states.append((content["projector"], self.projector))
        for state, model in states:
            state, expected = state or {}, model.state_dict()
            check_shapes(path, *({n: x.shape for n, x in s.items()} for s in (state, expected)))
            model.load_state_dict(state)
        with blamed_on(str(path)):
            load_optimizer(self.optimizer, content["optimizer"], self.order)
        if content["scaler"] is not None:
            self.scaler.load_state_dict(content["scaler"])
            self.skipped = content["scaler"].get("skipped", 0)
        self.step = content["step"]
        rng = content["rng"]
        restore_rng(self.job, path, self.step, len(rng), rng.__getitem__)
        logging.info("resumed %s at step %d", path, self.step)

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """Lend the model with averaged weights, in eval mode."""
        return nullcontext(self.ema.model)


class ExpertParallelTrainer(DdpTrainer):
    """The same with the experts of each layer spread over groups of ranks, saved in shares."""

    def __init__(self, job: Job) -> None:
        self.part = ExpertParallel(job)
        self.part.fill(job.settings)
        super().__init__(job)
        named = {name: p for name, p in self.model.named_parameters() if name != "pos_embed"}
        self.trained = {name: p for name, p in named.items() if p.requires_grad}
        self.whole: dict[str, Tensor] = dict(self.model.named_buffers())  # on every rank
        self.whole |= {name: p for name, p in named.items() if not p.requires_grad}

    def _finish_gradients(self) -> Tensor:
        self.part.reduce_gradients()
        if self.scaler.is_enabled():
            self.part.share_overflow()
        self.scaler.unscale_(self.optimizer)
        return self.part.clip_gradients(self.settings.clip_grad or float("inf"))

    def _kinds(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's tensors by kind and name; moments are zero before the first step."""
        ema = {name: self.ema.model.get_parameter(name) for name in self.trained}
        kinds: dict[str, dict[str, Tensor]] = {"model": {**self.trained}, "ema": {**ema}}
        for kind in ("exp_avg", "exp_avg_sq"):
            state = {name: self.optimizer.state[p] for name, p in self.trained.items()}
            kinds[kind] = {
                name: state[name].setdefault(kind, torch.zeros_like(p, requires_grad=False))
                for name, p in self.trained.items()
            }
        return kinds

    def save(self) -> None:
        """Write the checkpoint of this step, every rank its share, then drop the oldest ones.

        Raises:
            UserError: on all ranks, if one could not write; the last checkpoint is untouched.
        """
        first = self.optimizer.state[self.parameters[0]]
        state = {
            "shapes": {name: list(self.part.shapes[name]) for name in sorted(self.trained)},
            "step": self.step,
            "skipped": self.skipped,
            "adam_step": float(first.get("step", 0)),
            "loss_scale": self.scaler.state_dict(),
        }
        kinds = {kind: self.part.fragments(named) for kind, named in self._kinds().items()}
        save_shares(self.job, kinds, self.whole, state)

    def resume(self, path: Path) -> None:
        """Continue from a sharded checkpoint, of any number of ranks and either trainer.

        Raises:
            ValueError: if it is damaged, of another model, or not sharded.
        """
        shapes = {name: self.part.shapes[name] for name in self.trained}
        buffers = {name: tensor.shape for name, tensor in self.whole.items()}
        checkpoint = open_shares(self.job, path, shapes, buffers)
        state = checkpoint.state
        for p in self.parameters:
            self.optimizer.state[p]["step"] = torch.tensor(state["adam_step"], device=p.device)
        for kind, tensors in self._kinds().items():
            self.part.restore(checkpoint, kind, tensors)
        for model in (self.model, self.ema.model):
            model.load_state_dict(checkpoint.buffers(), strict=False)
        scale = state["loss_scale"].get("scale", state["loss_scale"].get("cur_scale"))
        if self.scaler.is_enabled() and scale is not None:
            known = self.scaler.state_dict()
            self.scaler.load_state_dict(
                {n: state["loss_scale"].get(n, known[n]) for n in known} | {"scale": scale}
            )
        self.step, self.skipped = state["step"], state.get("skipped", 0)
        restore_rng(self.job, path, self.step, state["num_ranks"], checkpoint.rng)
        logging.info("resumed %s at step %d", path, self.step)


def plan_experts(job: Job) -> str:
    """Return what `--dry-run` prints with `--expert-parallel`: settings, memory and bytes sent."""
    settings, ranks = job.settings, [job.rt.world_size] if job.rt.world_size > 1 else [8, 16, 64]
    table = expert_table(
        job.model,
        ranks,
        sorted({1, settings.expert_parallel or 1}),
        images=settings.global_batch_size,
        width=process.DTYPES[settings.precision].itemsize,
        grad_checkpointing=settings.grad_checkpointing,
    )
    return f"{describe(job)}\n\n{table}"
