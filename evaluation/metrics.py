"""How close a set of images is to another: FID, sFID, inception score, precision and recall.

In this order: extractors of features (`InceptionExtractor`, `ClassifierExtractor`), `Statistics` of
a set of images, and `compare`. The formulas are torch-fidelity's; a distance between features that
are not Inception's is never called FID but FD, with the extractor's name.

Shape letters: N images in a batch, n in a set, D features, S features with positions.
"""

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from common import process
from common.errors import FileError, UserError
from common.files import atomic_write
from common.network import why_unreachable
from evaluation.classifiers import Classifier, Features

NEIGHBOURS = 3  # of precision and recall, arXiv:1904.06991
MAX_ROWS = 50_000  # images of a set whose features are kept, for precision and recall


GIVE_WEIGHTS = "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"

# ------------------------------------------------------------------------------ extractors


class Extractor(Protocol):
    """Turns images (N, C, S, S) uint8 into features."""

    name: str  # "" for Inception, else what stands in brackets behind FD
    identity: str  # tells extractors with other weights apart

    def __call__(self, images: Tensor) -> Features: ...


def find_inception_weights() -> str | None:
    """Return the file that was downloaded before, None if it can be downloaded now.

    Raises:
        UserError: neither.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    downloaded = Path(torch.hub.get_dir(), "checkpoints", URL_INCEPTION_V3.split("/")[-1])
    if downloaded.is_file():
        return str(downloaded)
    if why := why_unreachable(URL_INCEPTION_V3):
        raise UserError(f"--inception-weights: can't be downloaded ({why}); {GIVE_WEIGHTS}")
    return None


class InceptionExtractor:
    """The Inception v3 of 2015-12-05 that FID is defined with, as torch-fidelity has it.

    sFID looks at the first 7 channels of the first branch of block 6d, 17 x 17 positions, as ADM's
    evaluation does ("mixed_6/conv" in TensorFlow's graph), in TensorFlow's order: positions, then
    channels. So a reference's moments of these features (mu_s, sigma_s) can be used.
    """

    name = ""

    def __init__(self, weights: str | None, device: torch.device) -> None:
        """Load the network.

        Args:
            weights: torch-fidelity's file weights-inception-2015-12-05-6726825d.pth; None
                downloads it.
            device: where it runs.

        Raises:
            UserError: the file is not there, is not such weights, or can't be downloaded.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        weights = weights or find_inception_weights()
        try:
            if weights is not None:  # torch-fidelity unpickles: first make sure that it is tensors
                if not Path(weights).is_file():
                    raise FileNotFoundError("no such file")
                torch.load(weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(
                "inception", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except Exception as error:  # of many types, by what is wrong in the file
            given = "can't be downloaded" if weights is None else f"{weights} does not load"
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"--inception-weights: {given}; {GIVE_WEIGHTS}: {reason}") from error
        self.network, self.device = network.to(device), device
        self._spatial = torch.empty(0)
        branch: nn.Module = network.Mixed_6d.branch1x1
        branch.register_forward_hook(self._keep)
        digest = hashlib.sha256()
        for tensor in network.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        self.identity = f"inception-nhwc-{digest.hexdigest()[:16]}"

    def _keep(self, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Look at images; gray ones become RGB."""
        rgb = images.expand(-1, 3, -1, -1).to(self.device)
        pool, logits = self.network(rgb)
        return Features(pool.cpu(), self._spatial.float().cpu(), logits.cpu())


class ClassifierExtractor:
    """The features of a small classifier; colour images become gray."""

    name = "classifier features"

    def __init__(self, classifier: Classifier, data: str, device: torch.device) -> None:
        """Use a classifier of the data."""
        self.model, self.device = classifier.model.to(device), device
        digest = hashlib.sha256()
        for tensor in self.model.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        self.identity = f"{data}-classifier-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Look at images."""
        gray = images.to(self.device).float().mean(dim=1, keepdim=True) / 127.5 - 1
        return Features(*(part.float().cpu() for part in self.model.features(gray)))


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

    def finish(self, run: process.Runtime) -> Statistics | None:
        """Add up all ranks; returns the statistics on the main one, None elsewhere."""
        shapes = process.gather_on_main([len(m.total) for m in self.moments])
        widths = process.from_main(next((widths for widths in shapes if widths), None))
        self.moments = self.moments or [Moments(width) for width in widths]
        for moments in self.moments:
            moments.over_ranks(run.device)
        gathered = process.gather_on_main(self.kept)
        if not run.is_main:
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
    values = {
        fid: frechet_distance(samples.pool, real.pool),
        sfid: frechet_distance(samples.spatial, real.spatial),
        isc: isc_features_to_metric(samples.logits)[KEY_METRIC_ISC_MEAN],
    }
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
