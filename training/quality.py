"""How near samples are to real images while a run goes on, by `--eval-every`, and the best step."""

import math
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from checkpoint.run_folder import mark_best, read_best
from common import process
from evaluation.classifiers import predict
from evaluation.comparison import describe_source, open_images, reference_statistics
from evaluation.encoders import DEFAULT_BACKBONE
from evaluation.flags import REFERENCES
from evaluation.judging import features_for, open_eyes
from evaluation.metrics import StatisticsBuilder, compare
from sampling.numbered import draw_numbered
from training.job import Job, autocast

BATCH_SIZE = 100  # samples at once
SEED = 0  # of the samples


class Quality:
    """The real images of a run, and what samples and they are seen by; all ranks make it."""

    def __init__(self, job: Job) -> None:
        """Look at the real images, or take what is kept of them.

        Raises:
            UserError: a network cannot be had, or the data has no pixels any more.
            FileError: what says the best checkpoint is damaged.
        """
        self.job, settings = job, job.settings
        if settings.keep_best:
            process.call_on_main(read_best, job.run_dir)
        path, root = settings.data_path, settings.fashion_mnist_root
        reference = open_images(path, image_size=settings.image_size, fashion_mnist_root=root)
        features = settings.eval_features or features_for(path)
        self.witness, self.look = open_eyes(
            features, path, reference, batch_size=BATCH_SIZE, backbone=DEFAULT_BACKBONE,
            inception_weights=settings.inception_weights, cache=REFERENCES,
            fashion_mnist_root=root, rt=job.rt,
        )  # fmt: skip
        source = describe_source(path, root)
        self.real = reference_statistics(
            reference, self.look, source=source, cache=Path(REFERENCES)
        )

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Draw `--eval-samples`, as many of each class, and compare them with the real images.

        All ranks draw and make equally many forward passes; batches are the same on any number of
        them, and no global generator moves.

        Args:
            model: in eval mode.

        Returns:
            On the main rank the distance (FID or FD) first, then what else the features give, and
            which share is read as the class asked for; {} on the others.
        """
        job, settings = self.job, self.job.settings
        labels = torch.arange(settings.eval_samples) % len(settings.class_names)
        builder = StatisticsBuilder(len(labels))
        starts = list(range(0, len(labels), BATCH_SIZE))
        right = torch.zeros((), dtype=torch.float64, device=job.rt.device)
        mine = process.turns(starts, job.rt, together=True)
        for first in tqdm(mine, desc="samples", leave=False, disable=not job.rt.is_main):
            y = labels[first or 0 :][:BATCH_SIZE]
            with autocast(job):
                images = draw_numbered(
                    model, job.model.config, job.diffusion, job.vae, y, seed=SEED,
                    first=first or 0, device=job.rt.device, cfg_scale=settings.sample_cfg_scale,
                )  # fmt: skip
            if first is None:  # drawn for company
                continue
            builder.add(first, self.look.extractor(images))
            if self.witness is not None:
                seen = images.to(job.rt.device).float() / 127.5 - 1
                right += (predict(self.witness.model, seen).cpu() == y).sum().to(right.device)
        found, right = builder.finish(job.rt), process.sum_over_ranks(right)
        if found is None or self.real is None:
            return {}
        values = compare(found, self.real, self.look.extractor.name)
        short = {name.partition(" (")[0]: value for name, value in values.items()}
        return short | ({"read_right": right.item() / len(labels)} if self.witness else {})

    def is_best(self, step: int, values: dict[str, float]) -> bool:
        """Tell all ranks whether a step's distance is less than that of every step before."""
        best = process.call_on_main(read_best, self.job.run_dir)
        is_first = best is None or best["features"] != self.look.extractor.identity
        closer = bool(values) and math.isfinite(distance(values)) and (
            is_first or best is None or distance(values) < best["distance"])  # fmt: skip
        return bool(process.from_main(closer))

    def mark_best(self, step: int, values: dict[str, float]) -> None:
        """Note that a step, whose checkpoint is there, is the best.

        Raises:
            OSError: on all ranks, if the folder cannot be written.
        """

        def mark() -> None:
            identity = self.look.extractor.identity
            mark_best(self.job.run_dir, step, distance(values), identity)

        process.call_on_main(mark)


def distance(values: dict[str, float]) -> float:
    """Return FID or FD, the first of the values."""
    return next(iter(values.values()))
