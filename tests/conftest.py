"""Shared by all tests: one thread a process, so that two ranks fit on two cores and bits repeat."""

import logging
import os
from collections.abc import Iterator

import pytest
import torch

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests compare what a CPU computes
torch.set_num_threads(1)
logging.getLogger().setLevel(logging.INFO)  # as scripts do


@pytest.fixture(autouse=True)
def close_log_files() -> Iterator[None]:
    """Take the log files of runs off the root logger, as the end of a process does."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if isinstance(handler, logging.FileHandler) and handler.baseFilename != os.devnull:
            logging.getLogger().removeHandler(handler)
            handler.close()
