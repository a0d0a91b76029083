"""How fast a run is: the work of a step, what the hardware could do, and where the time goes.

In order: `forward_macs`, `peak_rate`, `peak_memory`, `Phases`.
"""

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from models import DiTConfig

# Dense products in half precision, in FLOP/s, by a part of the device's name; the first that fits.
PEAK_RATES = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
PHASES = ("data", "step", "save", "draw")  # every run has these; another has only what it does


def forward_macs(config: DiTConfig) -> tuple[int, int]:
    """Count the multiplications, each with its addition, of an image's forward pass.

    Returns:
        Those of linear layers, with the experts that a token uses, and those of attention's scores
        and values. A training step has three times as many: a forward pass and both gradients.
    """
    tokens, width, patch = config.num_patches, config.hidden_size, config.patch_size**2
    per_unit = width * (3 if config.mlp_type == "swiglu" else 2)  # of a hidden unit of an MLP
    routed = config.experts_per_token * config.mlp_hidden_size
    mixture = per_unit * (routed + config.num_shared_experts * width) + config.num_experts * width
    dense = per_unit * config.dense_hidden_size
    blocks = 0.0
    for index in range(config.depth):
        mlp = mixture if config.is_moe_block(index) else dense
        blocks += tokens * (4 * width**2 + mlp) + 6 * width**2  # adaLN is for the image
    ends = tokens * patch * (config.in_channels + config.out_channels) * width
    conditioning = 256 * width + width**2 + 2 * width**2
    scores = config.depth * 2 * tokens**2 * width
    return round(blocks + ends + conditioning), scores


def peak_rate(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s that the hardware can reach, None where that is not known."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_RATES.items() if part in name), None)


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process had at a time, in GiB: of its GPU, else its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux


class Phases:
    """Seconds by phase on the host, where GPU kernels that run on are in the phase that waits."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._open: list[str] = []

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Measure the body, which does not count for a phase around it."""
        began = time.monotonic()
        self._open.append(name)
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self._open.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
            if self._open:
                self.seconds[self._open[-1]] -= seconds
