"""Which pass of the model over a batch is running: what varies between two calls of one adapter before one backward pass.

A method that runs every batch twice draws other random choices in the second pass. The number of the pass lives in this thread for the
length of the pass, never on a module, and a block that is recomputed (:mod:`.recompute`) sees the number of its first run again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class _Running(threading.local):
    """The pass that this thread runs; None outside of any."""

    def __init__(self) -> None:
        self.number: int | None = None


_RUNNING = _Running()


@contextmanager
def in_pass(number: int) -> Iterator[None]:
    """Run what is inside as pass ``number`` over the batch, from 0."""
    before = _RUNNING.number
    _RUNNING.number = number
    try:
        yield
    finally:
        _RUNNING.number = before


def pass_number() -> int | None:
    """Return the pass that runs, 0 unless :func:`in_pass` says otherwise.

    None in a backward pass that recomputes something under somebody else's checkpoint (transformers' ``gradient_checkpointing_enable``,
    ``torch.utils.checkpoint``): which pass it was is not known there.
    """
    if _RUNNING.number is not None:
        return _RUNNING.number
    # torch's own checkpoint asks the same way; there is no public one (torch 2.13).
    return 0 if torch._C._current_graph_task_id() == -1 else None


def captured(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call`` bound to the pass that runs now, in whatever thread and whenever it is called."""
    return _Captured(pass_number(), call)


class _Captured:
    def __init__(self, number: int | None, call: Callable[..., Any]) -> None:
        self.number, self.call = number, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.number is None:
            return self.call(*args, **kwargs)
        with in_pass(self.number):
            return self.call(*args, **kwargs)
