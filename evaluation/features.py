"""What networks see in images: Inception's features, and those of a small classifier.

A distance between features that are not Inception's is never called FID but FD, with the name of
the extractor.

Shape letters: N batch, C channels, S image size.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.network import why_unreachable
from evaluation.classifiers import Classifier, Features

GIVE_WEIGHTS = "give torch-fidelity's weights-inception-2015-12-05-6726825d.pth"


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
