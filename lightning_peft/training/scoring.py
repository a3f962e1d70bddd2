"""A batch scored at its labelled positions, without the logits of all positions.

A language model's head runs outside the model, chunk by chunk (``nn/chunked_loss.py``). For one call of the model its head is stood
in for: it notes the hidden states that it is given and computes a single row of logits. What the model does with logits after
its head (Gemma 2 caps them, Cohere and Granite scale them) it then does with that row, so a row that comes out as it went in, bit
for bit, shows that it does nothing, for any model and without a list of names. A model that does something gets its logits from
its own forward, at labelled positions only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.nn.chunked_loss import (
    IGNORE,
    Head,
    chunk_rows,
    chunked_cross_entropy,
    chunked_evaluation,
    chunked_log_likelihoods,
    head_parameters,
)
from lightning_peft.training.namespace import is_a
from lightning_peft.training.rng import restore_rng_state, rng_state
from lightning_peft.training.tasks import Task
from lightning_peft.types import in_pieces


def identity(logits: Tensor) -> Tensor:
    """Return ``logits``: the head where they are computed already."""
    return logits


@dataclass(frozen=True)
class Scores:
    """The n labelled positions of a batch.

    Args:
        hidden: What the head is given, (n, d).
        targets: Class indices (n,).
        classes: Number of classes.
        head: Returns the logits (rows, classes) of rows of ``hidden``.
    """

    hidden: Tensor
    targets: Tensor
    classes: int
    head: Head = identity

    def logits(self) -> Tensor:
        """Return the logits of all positions (n, classes), with gradient."""
        return self.head(self.hidden)

    def loss(self, label_smoothing: float = 0.0) -> Tensor:
        """Return the summed cross-entropy, a scalar of fp32 or better."""
        parameters = head_parameters(self.head, self.hidden) if torch.is_grad_enabled() else ()
        total: Tensor = chunked_cross_entropy(
            self.hidden, self.targets, self.head, parameters, chunk=chunk_rows(self.classes), label_smoothing=label_smoothing
        )
        return total

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy and the likeliest class of every position (n,), without gradient."""
        return chunked_evaluation(self.hidden, self.targets, self.head, chunk=chunk_rows(self.classes))

    def log_likelihoods(self) -> Tensor:
        """Return the log-probability of every target (n,), with gradient where that is enabled."""
        logp: Tensor = chunked_log_likelihoods(self.hidden, self.targets, self.head, chunk=chunk_rows(self.classes))
        return logp


class Scorer:
    """Runs models on the batches of one task.

    Args:
        task: Says what the labels are and how the model is called.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.stand_in: StandIn | None = None  # one object for all calls: for another one torch.compile would compile again

    @torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator]  # of a compiled step only the model is compiled
    def __call__(self, model: nn.Module, batch: Any) -> Scores:
        """Return the scores of a batch.

        The model runs once, and once more at its first batch if it changes its logits. A sharded model (FSDP, ZeRO-3), and a head with
        hooks, compute the logits of all labelled positions in the model's own forward: their hooks belong to one forward and one
        backward.
        """
        targets = self.task.targets(batch)
        where = targets != IGNORE
        head = self.task.head(model)
        if head is None:
            return _whole(self.task.logits(model, batch), where, targets)
        if self.stand_in is None or self.stand_in.head is not head:
            self.stand_in = StandIn(head)
        stand_in = self.stand_in
        if stand_in.separable is not False and not _watched(head) and not _sharded(model):
            before = torch.compiler.disable(rng_state)() if stand_in.separable is None else None
            with stand_in.instead(where, whole=False):
                logits = self.task.logits(model, batch)
                hidden, row = stand_in.hidden, stand_in.row
            if hidden is not None and row is not None and hidden.shape[:-1] == where.shape and _same(logits, row):
                stand_in.separable = True
                return Scores(hidden[where], targets[where], row.shape[-1], head.forward)
            stand_in.separable = False
            if before is not None:
                # One step draws random numbers once, whether or not something was found out in it.
                torch.compiler.disable(restore_rng_state)(before)
        with stand_in.instead(where, whole=True):
            return _whole(self.task.logits(model, batch), where, targets)


class StandIn:
    """The forward of an output head during one call of its model.

    It takes the place of ``forward`` on the instance: torch.compile sees that change, while it ignores a hook that is added after
    its first call (torch 2.13).

    Args:
        head: The head.
    """

    def __init__(self, head: nn.Module) -> None:
        self.head = head
        self.separable: bool | None = None  # the model returns what its head returns; None until it was tried
        self.whole = False
        self.where: Tensor | None = None
        self.hidden: Tensor | None = None
        self.row: Tensor | None = None
        self.own: Any = None  # a forward that the instance has already: adapters, accelerate
        self.forward = functools.partial(_run, self)

    @contextmanager
    def instead(self, where: Tensor, *, whole: bool) -> Iterator[None]:
        """Stand in for the head.

        Args:
            where: Labelled positions (batch, length).
            whole: The head computes the logits of all labelled positions; else one row, and notes its input.
        """
        self.where, self.whole, self.own = where, whole, self.head.__dict__.get("forward")
        self.head.forward = self.forward
        try:
            yield
        finally:
            if self.own is None:
                del self.head.forward
            else:
                self.head.forward = self.own
            self.where = self.hidden = self.row = self.own = None


def _run(stand_in: StandIn, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    def head(x: Tensor) -> Any:
        if stand_in.own is None:
            return type(stand_in.head).forward(stand_in.head, x, *args, **kwargs)
        return stand_in.own(x, *args, **kwargs)

    where = stand_in.where
    assert where is not None
    if stand_in.whole:
        # Compiled, a number of positions that depends on the data would break the graph.
        fits = not torch.compiler.is_compiling() and hidden.shape[:-1] == where.shape
        return head(hidden[where] if fits else hidden)
    if stand_in.hidden is not None or args or kwargs:
        return head(hidden)
    stand_in.hidden = hidden
    row = head(hidden.flatten(0, -2)[-1:][None])  # (1, 1, classes); the last position has seen a token, left-padded or not
    stand_in.row = row.detach().clone()  # the model may change its own in place
    return row


def _whole(logits: Tensor, where: Tensor, targets: Tensor) -> Scores:
    """Return scores from logits (..., classes) of all positions, or (n, classes) of the labelled ones."""
    logits = logits[where] if logits.shape[:-1] == where.shape else logits
    return Scores(logits, targets[where], logits.shape[-1])


def _same(logits: Tensor, row: Tensor) -> bool:
    """Return whether the row came out of the model as it went in; another dtype is not a change, and NaN tells nothing."""
    return logits.shape == row.shape and bool(((logits.detach() == row) | row.isnan()).all())


def _watched(head: nn.Module) -> bool:
    """Return whether somebody looks at what the head computes: then it computes all of it."""
    return bool(head._forward_hooks or head._backward_hooks or head._backward_pre_hooks)


def _sharded(model: nn.Module) -> bool:
    """Return whether parameters are gathered by hooks around forward and backward, which a gradient taken in between would miss."""
    if any(is_a(m, "FullyShardedDataParallel", "FSDPModule") for m in model.modules()):
        return True
    return in_pieces(model.parameters()) or any(hasattr(p, "ds_id") for p in model.parameters())  # FSDP around a parent; ZeRO-3
