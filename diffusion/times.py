"""Times of rectified flow: which are drawn in training, and how all are shifted towards noise.

t: 0 = data, 1 = noise.

Source: Esser et al., arXiv:2403.03206, sec. 3.1 (laws) and eq. 23 (shift).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Generator, Tensor

from diffusion.base import randn

Time = TypeVar("Time", float, Tensor)
# Numbers of each law: name, default, smallest and largest value.
LAWS: dict[str, tuple[tuple[str, float, float, float], ...]] = {
    "lognormal": (("mean", 0.0, -100.0, 100.0), ("deviation", 1.0, 0.01, 100.0)),
    "uniform": (),
    "mode": (("scale", 1.29, -1.0, 2 / (math.pi - 2)),),
}


class TimeLaw(NamedTuple):
    """A distribution of training times: a name of `LAWS` and its numbers."""

    name: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, words: Sequence[Any]) -> "TimeLaw":
        """Read a law from its name and, if given, its numbers.

        Raises:
            ValueError: there is no such law, or it has no such numbers.
        """
        name, *given = words or ["lognormal"]
        if name not in LAWS:
            raise ValueError(f"time_sampling {name!r} is none of {', '.join(LAWS)}")
        known, said = LAWS[name], " ".join(map(str, words))
        if given and len(given) != len(known):
            names = " and ".join(number[0] for number in known) or "nothing"
            raise ValueError(f"time_sampling {said}: {name} takes {names}, or its defaults")
        try:
            numbers = tuple(map(float, given)) or tuple(number[1] for number in known)
        except ValueError:
            raise ValueError(f"time_sampling {said}: after {name} come numbers") from None
        for value, (number, _, low, high) in zip(numbers, known, strict=True):
            if not low <= value <= high:
                allowed = f"[{low:g}, {high:.6g}]"
                raise ValueError(f"time_sampling {said}: {number} is not in {allowed}")
        return cls(name, numbers)

    def draw(self, count: int, device: torch.device, generator: Generator | None) -> Tensor:
        """Draw (count,) fp32 times in [0, 1], where the generator lives."""
        if self.name == "lognormal":
            mean, deviation = self.numbers
            return (mean + deviation * randn(torch.Size([count]), device, generator)).sigmoid()
        source = device if generator is None else generator.device
        u = torch.rand(count, generator=generator, device=source).to(device)
        if self.name == "uniform":
            return u
        (scale,) = self.numbers  # eq. 20: uniform for 0, its mode is 1/2 above
        return 1 - u - scale * ((math.pi / 2 * u).cos().square() - 1 + u)


def shifted(t: Time, shift: float) -> Time:
    """Shift times in [0, 1] towards noise: s t / (1 + (s - 1) t), both ends stay.

    s = sqrt(m / n) keeps the uncertainty of an image of m values what it was at n, eq. 23.
    """
    return shift * t / (1 + (shift - 1) * t)
