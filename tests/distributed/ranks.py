"""Processes that form a group, as torchrun starts them, for tests of what several devices do together.

They are forked from a server that has imported everything and started no thread: a fork of the test process would inherit the locks
of threads that earlier tests have left there, and a fresh interpreter imports for seconds.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.distributed.preload"])
TIMEOUT = 90.0  # seconds for one group, far above what it takes


class RankError(AssertionError):
    """A rank failed, died or did not end."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _rank(rank: int, world: int, port: int, answer: Connection, call: Callable[[], Any]) -> None:
    os.setsid()  # so that a rank can be killed with all that it has started
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    if world > 1:
        os.environ.update({name: str(value) for name, value in where.items()})
    try:
        answer.send((True, call()))
    except BaseException:
        answer.send((False, traceback.format_exc()))
    with contextlib.suppress(Exception):
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: float = TIMEOUT, **options: Any) -> list[Any]:
    """Run a module-level function in a group of processes and return what each rank returned.

    Args:
        function: Called in every process; one rank is a plain process without a group.
        *args: Its arguments, the same everywhere; ``options`` too.
        ranks: Size of the group.
        timeout: Seconds after which all are killed.

    Raises:
        RankError: With the traceback of the first rank that failed.
    """
    port, answers, processes = free_port(), [], []
    for rank in range(ranks):
        mine, theirs = _SERVER.Pipe()
        process = _SERVER.Process(
            target=_rank, args=(rank, ranks, port, theirs, functools.partial(function, *args, **options)), daemon=True
        )
        process.start()
        theirs.close()
        answers.append(mine)
        processes.append(process)
    results: dict[int, Any] = {}
    end = time.monotonic() + timeout
    try:
        while len(results) < ranks:
            open_ones = [a for i, a in enumerate(answers) if i not in results]
            ready = wait(open_ones, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise RankError(f"after {timeout} seconds ranks {sorted(set(range(ranks)) - results.keys())} have not ended")
            for answer in ready:
                rank = answers.index(answer)
                try:
                    good, value = answer.recv()
                except EOFError:
                    processes[rank].join()
                    raise RankError(f"rank {rank} died with {processes[rank].exitcode}") from None
                if not good:
                    raise RankError(f"rank {rank}:\n{value}")
                results[rank] = value
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.join()
    return [results[rank] for rank in range(ranks)]


__all__ = ["RankError", "free_port", "run"]
