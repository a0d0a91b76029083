"""How close a set of images is to another: FID, sFID, inception score, precision and recall.

In this order: `Moments` and `Statistics` of a set of images, from the features of any extractor
(see features.py), and `compare`. The formulas are torch-fidelity's.

Shape letters: N images in a batch, n in a set, D features, S features with positions.
"""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import process
from common.errors import FileError
from common.files import atomic_write
from evaluation.classifiers import Features

NEIGHBOURS = 3  # of precision and recall, arXiv:1904.06991
MAX_ROWS = 50_000  # images of a set whose features are kept, for precision and recall


# ------------------------------------------------------------------------------ statistics


class Moments:
    """Mean and covariance of rows that come a batch at a time, on any rank."""

    def __init__(self, width: int) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.total = torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take (N, width) rows."""
        rows = rows.double()
        self.count += len(rows)
        self.total += rows.sum(dim=0)
        self.outer.addmm_(rows.T, rows)

    def over_ranks(self, device: torch.device) -> None:
        """Add up what all ranks took."""
        for name in ("count", "total", "outer"):
            setattr(self, name, process.sum_over_ranks(getattr(self, name).to(device)).cpu())

    def finish(self) -> dict[str, np.ndarray]:
        """Return mean (width,) and unbiased covariance (width, width) in float64."""
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return {"mu": mean.numpy(), "sigma": covariance.numpy()}


class Statistics:
    """What is compared of a set of images: moments, and single features of at most `MAX_ROWS`."""

    def __init__(
        self,
        count: int,
        pool: dict[str, np.ndarray],
        spatial: dict[str, np.ndarray],
        rows: Tensor,
        logits: Tensor,
    ) -> None:
        """Hold statistics.

        Args:
            count: n, images.
            pool: mean "mu" (D,) and covariance "sigma" (D, D), float64.
            spatial: likewise of the features with positions, (S,) and (S, S).
            rows: (at most n, D) fp32 features.
            logits: (at most n, number of classes) fp32.
        """
        self.count, self.pool, self.spatial = count, pool, spatial
        self.rows, self.logits = rows, logits

    def save(self, path: Path) -> None:
        """Write an .npz; the moments have the names that ADM's reference files use."""
        arrays = {
            "mu": self.pool["mu"],
            "sigma": self.pool["sigma"],
            "mu_s": self.spatial["mu"],
            "sigma_s": self.spatial["sigma"],
            "rows": self.rows.numpy(),
            "logits": self.logits.numpy(),
            "count": np.array(self.count),
        }
        with atomic_write(path) as temp, open(temp, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: Path) -> "Statistics":
        """Read a file of `save`, whose checksums are compared.

        Raises:
            FileError: it is damaged or something else.
        """
        try:
            with np.load(path) as file:
                pool, spatial = read_moments(file, ""), read_moments(file, "_s")
                rows, logits = (torch.from_numpy(file[name]) for name in ("rows", "logits"))
                return Statistics(int(file["count"]), pool, spatial, rows, logits)
        except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise FileError(f"{path} is damaged ({error}); delete it") from error


def read_moments(file: Mapping[str, np.ndarray], ending: str) -> dict[str, np.ndarray]:
    """Return "mu" (D,) and "sigma" (D, D) in float64 from an .npz, whose names have an ending.

    Raises:
        ValueError: they are of other shapes, or no numbers.
        KeyError: one is not there.
    """
    mean, covariance = file[f"mu{ending}"], file[f"sigma{ending}"]
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"mu{ending} is {mean.shape}, sigma{ending} {covariance.shape}")
    found = {"mu": mean.astype(float), "sigma": covariance.astype(float)}
    if not all(np.isfinite(array).all() for array in found.values()):
        raise ValueError(f"mu{ending} or sigma{ending} is not finite")
    return found


class StatisticsBuilder:
    """Collects the statistics of a set whose batches come on any rank, in any order."""

    def __init__(self, num_images: int) -> None:
        """Prepare for a set of `num_images` images."""
        self.stride = -(-num_images // MAX_ROWS)
        self.moments: list[Moments] = []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, first: int, features: Features) -> None:
        """Take a batch whose first image is number `first` of the set."""
        if not self.moments:
            self.moments = [Moments(features.pool.shape[1]), Moments(features.spatial.shape[1])]
        for moments, rows in zip(self.moments, features[:2], strict=True):
            moments.add(rows)
        start = -first % self.stride
        kept = slice(start, None, self.stride)
        self.kept[first] = features.pool[kept], features.logits[kept]

    def finish(self, rt: process.Runtime) -> Statistics | None:
        """Add up all ranks; returns the statistics on the main one, None elsewhere."""
        shapes = process.gather_on_main([len(m.total) for m in self.moments])
        widths = process.from_main(next((widths for widths in shapes if widths), None))
        self.moments = self.moments or [Moments(width) for width in widths]
        for moments in self.moments:
            moments.over_ranks(rt.device)
        gathered = process.gather_on_main(self.kept)
        if not rt.is_main:
            return None
        kept = dict(sorted(item for part in gathered for item in part.items()))
        rows, logits = (torch.cat(column) for column in zip(*kept.values(), strict=True))
        pool, spatial = (moments.finish() for moments in self.moments)
        return Statistics(int(self.moments[0].count), pool, spatial, rows, logits)


# ------------------------------------------------------------------------------ metrics


def frechet_distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Return the Fréchet distance of two normal distributions, "mu" and "sigma" of each.

    Source: Heusel et al., arXiv:1706.08500, eq. 6; torch-fidelity's formula.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


def compare(samples: Statistics, real: Statistics, name: str) -> dict[str, float]:
    """Measure samples against real images.

    Args:
        samples: of the images to judge.
        real: of the reference.
        name: of the extractor, "" for Inception.

    Returns:
        The values by their names; those that a reference without single features can't give are
        left out.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    fid, sfid, isc = ("FID", "sFID", "IS")
    if name:
        fid, sfid, isc = f"FD ({name})", f"sFD ({name})", f"IS ({name})"
    values = {fid: frechet_distance(samples.pool, real.pool)}
    if len(samples.spatial["mu"]):  # not every extractor has features with positions, and classes
        values[sfid] = frechet_distance(samples.spatial, real.spatial)
    if samples.logits.shape[1]:
        values[isc] = isc_features_to_metric(samples.logits)[KEY_METRIC_ISC_MEAN]
    if min(len(samples.rows), len(real.rows)) > NEIGHBOURS:
        found = prc_features_to_metric(
            samples.rows,
            real.rows,
            prc_neighborhood=NEIGHBOURS,
            prc_batch_size=5000,
            save_cpu_ram=True,
            verbose=False,
        )
        values |= {key: found[key] for key in ("precision", "recall")}
    return values
