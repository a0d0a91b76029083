"""Train a DiT-MoE with DistributedDataParallel, on one CPU or many GPU nodes.

    python train.py --data-path digits --model DiT-Ti/1 --rf --max-steps 1000
    torchrun --nproc_per_node=8 train.py --model DiT-S/2 --num-experts 8 --data-path IMAGES

Running the same command again continues where the run stopped, bit for bit.
"""

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from checkpoint import checkpoint_path, commit_checkpoint, load_checkpoint, save_checkpoint
from common import process
from resume import check_resumable, restore_rng
from train_loop import Batch, draw_grid, launch, learning_rate, mean_losses, micro_loss
from train_settings import build_parser
from train_utils import Ema, Job, compile_blocks


class DdpTrainer:
    """The model with its optimizer, loss scaler and EMA: one step forward, saved and restored."""

    def __init__(self, job: Job) -> None:
        self.job, self.settings, self.rt = job, job.settings, job.rt
        self.step = 0
        self.model = job.model.to(self.rt.device).train()
        self.ema = Ema(self.model, self.settings.ema_decay)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.settings.lr,
            weight_decay=self.settings.weight_decay,
            fused=True,
        )
        fp16 = self.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.rt.device.type, enabled=fp16)
        if self.settings.compile:
            compile_blocks(self.model)
        self.wrapped: nn.Module = self.model
        if self.rt.world_size > 1:
            devices = [self.rt.device] if self.rt.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=devices,
                gradient_as_bucket_view=True,
            )

    def train_step(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Make one optimizer step from `accum_steps` micro-batches.

        Args:
            batches: (latents (N, C, H, W), labels (N,), further arguments of `training_loss`).

        Returns:
            loss, aux_loss (per layer, 1.0 = even) and grad_norm, each ().
        """
        dtype = process.DTYPES[self.settings.precision]
        losses = []
        for i, batch in enumerate(batches):
            last = i == self.settings.accum_steps - 1
            skip_sync = self.rt.world_size > 1 and not last
            with self.wrapped.no_sync() if skip_sync else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(self.rt.device.type, dtype, enabled=dtype != torch.float32):
                    losses.append(micro_loss(self.job, self.wrapped, batch))
                self.scaler.scale(losses[-1].total / self.settings.accum_steps).backward()
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_grad_norm_(self.parameters, self.settings.clip_grad or float("inf"))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, self.step)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        return {**mean_losses(losses), "grad_norm": grad_norm}

    def save(self) -> None:
        """Write the checkpoint of this step, with every rank's RNG, then drop the oldest ones."""
        rng = process.gather_on_main(process.rng_state())
        if not self.rt.is_main:
            return
        path = checkpoint_path(self.job.run_dir, self.step)
        save_checkpoint(
            path,
            config=self.model.config,
            settings=self.settings.to_dict(),
            model=self.model.state_dict(),
            ema=self.ema.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=self.scaler.state_dict() if self.scaler.is_enabled() else None,
            step=self.step,
            rng=rng,
        )
        commit_checkpoint(path, self.settings.keep_last)
        logging.info("checkpoint: %s", path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint of this model.

        Raises:
            ValueError: if it is damaged or of another model.
        """
        content = load_checkpoint(path)
        check_resumable(self.job, path, content["config"], content["settings"])
        self.model.load_state_dict(content["model"])
        self.ema.model.load_state_dict(content["ema"])
        self.optimizer.load_state_dict(content["optimizer"])
        for group in self.optimizer.param_groups:
            group["weight_decay"] = self.settings.weight_decay
        if content["scaler"] is not None:
            self.scaler.load_state_dict(content["scaler"])
        self.step = content["step"]
        rng = content["rng"]
        restore_rng(self.job, path, self.step, len(rng), rng.__getitem__)
        logging.info("resumed %s at step %d", path, self.step)

    def draw(self) -> None:
        """Draw the sample grid of this step on the main process, while the others wait."""
        if self.rt.is_main:
            draw_grid(self.ema.model, self.job, self.step)
        process.barrier()


if __name__ == "__main__":
    launch(build_parser(__doc__).parse_args(), DdpTrainer)
