"""Stopping a run from outside: SIGINT and SIGTERM, acted on by all ranks between two steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ECHO_SECONDS = 1.0  # launchers pass on the Ctrl-C that their ranks got from the terminal as well


class StopRequest:
    """Keeps a SIGINT or SIGTERM until the ranks have agreed on it; another Ctrl-C ends at once.

    with StopRequest(device) as stop:
        while not stop.agreed():
            step()
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.number = 0  # the signal that this process got, 0 for none
        self._since = 0.0
        self._before: Tensor | None = None

    def __enter__(self) -> "StopRequest":
        self._former: dict[int, Any] = {
            number: signal.signal(number, self._take) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
        elif number == signal.SIGINT and now - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt

    def agreed(self) -> int:
        """Return the signal by which all ranks stop now, 0 to go on; every rank asks every step.

        On GPUs the answer is that of the step before, so that none waits for this one's kernels.
        """
        if not dist.is_initialized():
            return self.number
        asked = torch.full((), self.number, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if self.device.type == "cpu":
            return int(asked)
        before, self._before = self._before, asked
        return 0 if before is None else int(before)


def ignore_signals(*_: Any) -> None:
    """Leave SIGINT and SIGTERM to the process that started this one, a loader of data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
