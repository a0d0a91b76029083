"""Start our scripts as a user does: alone, under torchrun, on several nodes, killed at any moment.

Also the flags of a run small enough for that. pytest finds this in the tests' folder.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
TIMEOUT_SECONDS = 180  # of one run; generous, since other work may share the cores
TINY_RUN = (
    *("--data-path", "digits", "--model", "DiT-Ti/2", "--num-experts", "4", "--mlp-ratio", "0.5"),
    *("--rf", "--precision", "fp32", "--global-batch-size", "8", "--lr", "0.001"),
    *("--ema-decay", "0.9", "--sample-every", "0", "--run-name", "run"),
)


def torchrun(*arguments: str, nproc: int = 2, node: int = 0, nodes: int = 1) -> list[str]:
    """Return the command that runs a script on the ranks of one node; see `free_port`."""
    launcher = [sys.executable, "-m", "torch.distributed.run"]
    nnodes = [f"--nnodes={nodes}", f"--node_rank={node}", f"--nproc_per_node={nproc}"]
    return [*launcher, *nnodes, *arguments]


def free_port() -> str:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


class Process:
    """A command that runs in the repository, its output in a file."""

    def __init__(
        self, command: list[str], log: Path, port: str | None = None, *, own_group: bool = False
    ) -> None:
        self.log = log
        # torchrun's own variable: the published one-node command gives no port.
        environment = os.environ | {"PET_MASTER_PORT": port or free_port(), "PYTHONPATH": str(REPO)}
        with open(log, "w") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=REPO,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=own_group,
            )

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> str:
        """Wait for its end, which must be a success, and return its output."""
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            code = -1
        output = self.log.read_text()
        assert code == 0, f"exit code {code} of {self.popen.args!r}:\n{output[-4000:]}"
        return output

    def kill(self) -> None:
        """Send SIGKILL to it and everything it started, all at once."""
        tree = [self.popen.pid, *descendants(self.popen.pid)]
        for pid in tree:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.popen.wait()

    def kill_at_step(
        self, log_file: Path, step: int, delay: float, seconds: float = TIMEOUT_SECONDS
    ) -> None:
        """Kill it `delay` seconds after the run's log shows that `step` is done, in `seconds`."""
        deadline = time.monotonic() + seconds
        pattern = re.compile(rf"step {step}:")
        while not (log_file.exists() and pattern.search(log_file.read_text())):
            if self.popen.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"no step {step}:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.005)
        time.sleep(delay)
        assert self.popen.poll() is None, "the run was over before the kill"
        self.kill()


def descendants(pid: int) -> list[int]:
    """Return the processes that `pid` started, and those that they started."""
    children = [
        int(stat.parent.name)
        for stat in Path("/proc").glob("[0-9]*/stat")
        if parent_of(stat) == pid
    ]
    return children + [below for child in children for below in descendants(child)]


def parent_of(stat: Path) -> int | None:
    """Read the parent's id from /proc/PID/stat: PID (NAME) STATE PARENT ..."""
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return None
