"""The stream of training batches: which samples come when depends on seed and step alone.

`TrainBatches` says which samples, `make_loader` brings them, with worker processes or without.

Shape letters: N batch, C channels, S image size, n samples in a dataset.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import UserError
from common.quiet import silence_worker_count
from common.stopping import ignore_signals
from data.datasets import ImageDataset, Key


@lru_cache(maxsize=2)  # a batch may span the end of an epoch
def epoch_order(num_samples: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one epoch's permutation of the samples (n,) and its coin tosses for flips (n,)."""
    generator = np.random.default_rng((seed, epoch))
    return generator.permutation(num_samples), generator.random(num_samples) < 0.5


class TrainBatches(Sampler[list[Key]]):
    """One rank's endless micro-batches, cut from a global stream that depends on the seed only.

    Position p of the stream is sample `p % n` of epoch `p // n`. Micro-batch k of step s on rank r
    takes `micro_batch_size` positions from `((s * accum_steps + k) * world_size + r) *
    micro_batch_size`. So the data position is the step: resuming needs no other state, and the
    samples of a step do not depend on the number of ranks, micro-batches or workers.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        micro_batch_size: int,
        accum_steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
        flip: bool = False,
    ):
        """Describe the stream.

        Args:
            num_samples: n.
            micro_batch_size: samples per rank and forward pass.
            accum_steps: micro-batches per optimizer step.
            rank: in [0, world_size).
            world_size: number of ranks.
            seed: non-negative, the same on every rank.
            start_step: optimizer steps already taken.
            flip: mirror half of the samples.
        """
        assert 0 <= rank < world_size and micro_batch_size > 0 and accum_steps > 0
        self.num_samples, self.seed, self.flip = num_samples, seed, flip
        self.micro_batch_size, self.accum_steps = micro_batch_size, accum_steps
        self.rank, self.world_size, self.start_step = rank, world_size, start_step

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield micro-batches for ever, from the first of `start_step`."""
        for micro_step in itertools.count(self.start_step * self.accum_steps):
            start = (micro_step * self.world_size + self.rank) * self.micro_batch_size
            yield [self._key(p) for p in range(start, start + self.micro_batch_size)]

    def _key(self, position: int) -> Key:
        epoch, offset = divmod(position, self.num_samples)
        order, flips = epoch_order(self.num_samples, self.seed, epoch)
        return int(order[offset]), self.flip and bool(flips[offset])


class _Fetched(NamedTuple):
    """What a worker process sends."""

    batch: tuple[Tensor, Tensor]
    broken: dict[int, str]  # images that it has just found to be broken


class _Worker(Dataset):
    """The data set inside a worker: an error that a user can mend is sent, not raised there.

    `DataLoader` would raise it again with the worker's traceback as its message.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset, self._num_told = dataset, 0

    def __getitems__(self, keys: Sequence[Key]) -> _Fetched | UserError:
        try:
            batch = self.dataset.__getitems__(keys)
        except UserError as error:
            return error
        broken = dict([*self.dataset.broken.items()][self._num_told :])
        self._num_told += len(broken)
        return _Fetched(batch, broken)


def _as_is(batch: Any) -> Any:
    return batch  # `__getitems__` has made it already


class TrainLoader:
    """The endless micro-batches of one rank: images (N, C, S, S) and labels (N,)."""

    def __init__(self, fetched: DataLoader) -> None:
        self.fetched = fetched
        self.broken: dict[int, str] = {}  # images that others stood in for, and why

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield micro-batches; log every broken image once.

        Raises:
            UserError: an image can't be read.
        """
        for item in self.fetched:
            if isinstance(item, UserError):
                raise item
            for index, why in item.broken.items():
                if index not in self.broken:
                    self.broken[index] = why
                    logging.warning(
                        "--skip-broken: %s; the next image stands in (%d so far)",
                        why, len(self.broken),
                    )  # fmt: skip
            yield item.batch


def make_loader(
    dataset: ImageDataset,
    *,
    micro_batch_size: int,
    accum_steps: int,
    rank: int,
    world_size: int,
    seed: int,
    start_step: int = 0,
    num_workers: int = 0,
    pin_memory: bool = False,
) -> TrainLoader:
    """Return the endless loader of one rank's micro-batches.

    Args: as `TrainBatches`; num_workers 0 loads in this process, the batches are the same.
    """
    batches = TrainBatches(
        len(dataset),
        micro_batch_size=micro_batch_size,
        accum_steps=accum_steps,
        rank=rank,
        world_size=world_size,
        seed=seed,
        start_step=start_step,
        flip=dataset.flip,
    )
    silence_worker_count()
    fetched: DataLoader = DataLoader(
        _Worker(dataset),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else it draws from, and so shifts, the global RNG
        worker_init_fn=ignore_signals,  # a run that is told to stop finishes its step first
    )
    return TrainLoader(fetched)
