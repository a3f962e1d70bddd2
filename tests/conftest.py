"""What every test gets: an offline environment, one thread, fixed seeds, and nothing left behind for the next test."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

# Before torch and transformers are imported, here and in every process that a test starts.
os.environ["HF_HUB_OFFLINE"] = "1"  # tests build models from configs; a hub is never asked
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # no warning when a test forks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices; two-process tests do not fight over the cores

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Seed every generator, so that a test gives the same numbers alone, in any order, and in any process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def environment_restored() -> Iterator[None]:
    """Give `os.environ` back: Lightning leaves MASTER_PORT, LOCAL_RANK, PL_GLOBAL_SEED and others behind."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def process_state_restored() -> Iterator[None]:
    """Give back the settings of the process that a Trainer changes or that a failed test leaves changed."""
    dtype, grad, threads = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
