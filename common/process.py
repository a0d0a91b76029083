"""Where a script runs: device, precision and process group, decided here and nowhere else.

One process (`python train.py`), many (`torchrun`), CPU (gloo) or GPU (nccl): the same code.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from common import names
from common.errors import UserError

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, long) for name, long in names.DTYPES.items()}

# How long a rank waits for the others: torch's 10 minutes (nccl) or 30 (gloo) are less than a batch
# of samples, a shard of latents or a checkpoint of many GB can take.
LONG_WAIT = timedelta(days=1)


class Runtime(NamedTuple):
    """This process among all."""

    rank: int  # global: decides data and seeds
    world_size: int
    device: torch.device  # by LOCAL_RANK, since every node counts its GPUs from 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and draws progress bars."""
        return self.rank == 0


def pick_device() -> torch.device:
    """Return this process's GPU if there is one, else the CPU; every script comes by here.

    On a GPU "fp32" means that matmuls and convolutions round their inputs to TF32 (10 bits), in
    training and afterwards; what needs all of float32, as the router, asks for it itself.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def setup(wait: timedelta = LONG_WAIT) -> Runtime:
    """Pick the device, tune its allocator and, under torchrun, join the process group.

    Args:
        wait: how long a rank waits for the others.
    """
    end_with_launcher()
    device = pick_device()
    if device.type == "cpu":
        keep_freed_memory(True)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Runtime(0, 1, device)
    if not dist.is_initialized():
        # torchrun's --max-restarts keeps the store, with the addresses of the dead, on one node.
        store, rank, world_size = next(dist.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore(f"attempt_{attempt}", store),
            rank=rank,
            world_size=world_size,
            timeout=wait,
        )
    return Runtime(dist.get_rank(), dist.get_world_size(), device)


def keep_freed_memory(keep: bool) -> None:
    """Tell glibc what to do with freed memory: keep it for the next step, or give it back at once.

    By default glibc returns every large buffer and asks for it again, and the kernel clears every
    page again: a tenth of a training step on a CPU. A process that holds most of the machine's
    memory once and needs little afterwards wants the opposite.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # None: not glibc
        trim_threshold, mmap_threshold, size = -1, -3, 2**31 - 1 if keep else 2**17
        mallopt(trim_threshold, size)
        mallopt(mmap_threshold, size)


def end_with_launcher() -> None:
    """Let the kernel end this process when the launcher that started it is gone (Linux).

    A killed launcher would leave ranks that nobody can stop, in the folder of the next attempt.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ  # or DeepSpeed's
    if sys.platform != "linux" or not launched:
        return
    launcher, set_parent_death_signal = os.getppid(), 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != launcher:  # it went just now
        os.kill(os.getpid(), signal.SIGKILL)


def finish(code: int = 0) -> None:
    """Leave the process group after all work is done; under gloo this ends the process.

    gloo's threads abort some runs at interpreter exit ("terminate called without an active
    exception"), so the exit hooks are skipped there.

    Args:
        code: of the exit; other than 0 it ends the process in any case.
    """
    if dist.is_initialized():
        gloo = dist.get_backend() == "gloo"
        dist.barrier()
        dist.destroy_process_group()
        if gloo:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if code:
        sys.exit(code)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Add a tensor up over all ranks, in place; alone, return it as it is."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def any_rank(value: bool, device: torch.device) -> bool:
    """Tell whether it is so on any rank."""
    return bool(sum_over_ranks(torch.full((), int(value), device=device)))


def turns(work: Sequence[Any], rt: Runtime, *, together: bool = False) -> list[Any]:
    """Return this rank's part of a list.

    Args:
        work: what all ranks have to do.
        rt: this process.
        together: fill up with None, so that all have as many turns, since they need each other.
    """
    mine = list(work[rt.rank :: rt.world_size])
    missing = -(-len(work) // rt.world_size) - len(mine)
    return mine + [None] * (missing if together else 0)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def has_fast_bf16(device: torch.device) -> bool:
    """Tell whether the hardware multiplies bfloat16 matrices natively."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))


def default_precision(device: torch.device) -> str:
    """Return "bf16" where the hardware has it, else "fp32"."""
    return "bf16" if has_fast_bf16(device) else "fp32"


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return `--dtype`, by default bf16 where it is native, else float32.

    A half format that this CPU has no kernels for becomes that default: matmuls would be up to 1000
    times slower (float16 on most, bfloat16 without AVX512-BF16).
    """
    fast = default_precision(device)
    name = name or fast
    if device.type == "cpu" and DTYPES[name] not in (torch.float32, DTYPES[fast]):
        print(f"--dtype {name} has no fast kernels on this CPU: computing in {fast}")
        name = fast
    return DTYPES[name]


def check_memory(num_bytes: float, what: str) -> None:
    """Refuse what no process of this machine could hold, before it is asked for.

    Args:
        num_bytes: that are needed at once.
        what: flag and value, for the message.

    Raises:
        UserError: it is more than all of the machine's memory.
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if num_bytes > total:
        raise UserError(
            f"{what} needs {num_bytes / 2**30:,.0f} GiB of memory, this machine has "
            f"{total / 2**30:,.0f}"
        )


def long_name(dtype: torch.dtype) -> str:
    """Return "float16" of torch.float16, as files spell it; flags accept it for "fp16"."""
    return str(dtype).removeprefix("torch.")


def rng_state() -> dict[str, Tensor]:
    """Return the state of this process's global generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Restore what `rng_state` returned; a generator that either side lacks is left alone."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def from_main(value: Any) -> Any:
    """Return the main process's object on every rank."""
    shared = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(shared)
    return shared[0]


def call_on_main(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function on the main process; every rank returns what it returns.

    Raises:
        ValueError, OSError: on every rank, what the function raised.
    """
    outcome: tuple[Any, Exception | None] = (None, None)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = (function(*arguments), None)
        except (ValueError, OSError) as error:
            outcome = (None, error)
    result, failure = from_main(outcome)
    if failure is not None:
        raise failure
    return result


def gather_on_main(value: Any) -> list[Any]:
    """Collect one object of every rank on the main process; elsewhere the list is empty."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(value, gathered if dist.get_rank() == 0 else None)
    return gathered if dist.get_rank() == 0 else []
