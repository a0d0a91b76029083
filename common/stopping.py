"""Stopping a run: by SIGINT, SIGTERM, SIGUSR1 or the clock, for all ranks between two steps."""

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TIME_IS_UP = 1  # stands for the clock beside the signals' numbers, all of which are larger
ON_PURPOSE = (TIME_IS_UP, signal.SIGUSR1)  # planned beforehand: the run ends with exit code 0
ECHO_SECONDS = 1.0  # launchers pass on the Ctrl-C that their ranks got from the terminal as well


class StopRequest:
    """Keeps a signal until the ranks have agreed on it; another Ctrl-C ends at once.

    with StopRequest(device) as stop:
        while not stop.agreed():
            step()
    """

    def __init__(self, device: torch.device, deadline: float | None = None) -> None:
        """Prepare.

        Args:
            device: of this process.
            deadline: value of `time.monotonic` after which to stop; None: never.
        """
        self.device, self.deadline = device, deadline
        self.number = 0  # the signal that this process got, or TIME_IS_UP; 0 for none
        self._since = 0.0
        self._before: Tensor | None = None

    def __enter__(self) -> "StopRequest":
        self._former: dict[int, Any] = {
            number: signal.signal(number, self._take) for number in STOPPING
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
        """Return the number by which all ranks stop now, 0 to go on; every rank asks every step.

        On GPUs the answer is that of the step before, so that none waits for this one's kernels.
        """
        if not self.number and self.deadline is not None and time.monotonic() >= self.deadline:
            self.number = TIME_IS_UP
        if not dist.is_initialized():
            return self.number
        asked = torch.full((), self.number, device=self.device)
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if self.device.type == "cpu":
            return int(asked)
        before, self._before = self._before, asked
        return 0 if before is None else int(before)


def ignore_signals(*_: Any) -> None:
    """Leave signals that stop to the process that started this one, a loader of data."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def stop_name(number: int) -> str:
    """Say what stopped a run, by the number that `StopRequest.agreed` returned."""
    return "--stop-after" if number == TIME_IS_UP else signal.Signals(number).name
