"""The gradient sentinel: finds adapter tensors that do not train, while the run is two steps old."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_peft.errors import DeadAdapterError
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.stack import stack_of
from lightning_peft.types import in_pieces

STEPS = 2  # a product that starts at zero passes a gradient to one factor at the first step and to the other at the second


Sign = Literal[
    "gradient",  # one that is not all zero
    "reached",  # a gradient at all
    "in optimizer",
    "rate",  # a learning rate above zero
    "moved",
]


@dataclass(eq=False)
class _Watched:
    key: str
    before: Tensor
    seen: set[Sign] = field(default_factory=set)

    def note(self, sign: Sign, found: bool = True) -> None:
        if found:
            self.seen.add(sign)


@dataclass(eq=False)
class GradientSentinel:
    """Watches all tensors that should train through the first two effective optimizer steps.

    A step is effective when its learning rate is above zero somewhere and the gradient scaler did not skip it. Tensors below
    fp32 are watched for gradients only: there a small step may round to nothing. Tensors that the method lets rest, and adapters of
    routed or optional modules, are excused.

    Args:
        handle: The adapter.
        others: Further parameters that train with it (extra modules), by name.
    """

    handle: Handle
    others: Mapping[str, nn.Parameter] = field(default_factory=dict)
    steps: int = 0

    def __post_init__(self) -> None:
        self._effective = False  # the learning rate is read before the step: afterwards a scheduler has moved it on
        self.watched = {id(t): (t, _Watched(key, local(t).detach().clone())) for key, t in self._tensors().items()}

    def _tensors(self) -> dict[str, Tensor]:
        excused = {id(m) for e in self.handle.entries if e.conditional for m in e.adapter.modules()}
        found: dict[str, Tensor] = {}
        for slot in self.handle.trainable_slots():
            if id(slot.owner) not in excused and not self.handle.strategy.may_rest(slot):
                found[slot.key] = slot.tensor()
        return {k: t for k, t in {**found, **self.others}.items() if t.numel() or in_pieces([t])}

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at the gradients, after backward and before the step."""
        for group in optimizer.param_groups:
            self._effective |= float(group["lr"]) > 0
            for parameter in group["params"]:
                if id(parameter) not in self.watched:
                    continue
                record = self.watched[id(parameter)][1]
                record.note("in optimizer")
                record.note("rate", float(group["lr"]) > 0)
                if parameter.grad is not None:
                    record.note("reached")
                    record.note("gradient", bool(local(parameter.grad).ne(0).any()))

    def after_step(self, *, skipped: bool) -> str | None:
        """Count the step; after the last one return what is dead and why, or None.

        Args:
            skipped: The gradient scaler skipped the step.
        """
        for tensor, record in self.watched.values():
            record.note("moved", not torch.equal(local(tensor.detach()), record.before))
        self.steps += self._effective and not skipped
        self._effective = False
        if self.steps < STEPS:
            return None
        self._join_ranks()
        return self.report()

    def _join_ranks(self) -> None:
        """Take together what the ranks saw: each may hold a piece of a tensor only, and all have to come to one verdict."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        records = {record.key: record for _, record in self.watched.values()}
        everyone: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(everyone, {key: record.seen for key, record in records.items()})
        for key, record in records.items():
            record.seen = set().union(*(theirs[key] for theirs in everyone))

    @property
    def done(self) -> bool:
        """Both steps were seen."""
        return self.steps >= STEPS

    def report(self) -> str | None:
        """Return one line per reason with the tensors it holds for, or None when everything trains."""
        reasons: dict[str, list[str]] = {}
        for tensor, record in self.watched.values():
            exact = tensor.dtype.itemsize >= 4
            if "gradient" in record.seen and ("moved" in record.seen or not exact):
                continue
            reasons.setdefault(self._reason(tensor, record), []).append(record.key)
        if not reasons:
            return None
        lines = [
            f"{', '.join(keys[:4])}{f' and {len(keys) - 4} more' if len(keys) > 4 else ''}: {why}"
            for why, keys in reasons.items()
        ]
        count = sum(map(len, reasons.values()))
        return (
            f"adapter '{self.handle.name}': {count} of {len(self.watched)} trainable tensors did not train in the first {STEPS} steps.\n  "
            + "\n  ".join(lines)
            + "\nSet PEFTCallback(gradient_sentinel='warn') if that is intended."
        )

    def _reason(self, tensor: Tensor, record: _Watched) -> str:
        if not tensor.requires_grad:
            return "frozen: something set requires_grad=False after the adapter was installed"
        if "in optimizer" not in record.seen:
            return "in no optimizer: configure_optimizers, or a callback, made an optimizer without it"
        if "reached" not in record.seen:
            if not self._ran(tensor):
                return "its module never ran in training: the loss does not use it; exclude it from the targets"
            if _reentrant(self.handle.root):
                return "reentrant activation checkpointing cuts the graph of a frozen base; use use_reentrant=False"
            return "no gradient arrives: the graph is cut between it and the loss (no_grad, detach, .data, an argmax)"
        if "gradient" not in record.seen:
            return "its gradient is zero: the loss does not depend on it here (a zero mask or gate, a saturated unit)"
        if "rate" not in record.seen:
            return "the learning rate of its parameter group is 0"
        return "it has a gradient and did not move: the step is too small for its values, or something undid it"

    def _ran(self, tensor: Tensor) -> bool:
        for entry in self.handle.entries:
            stack = stack_of(entry.module)
            if stack is not None and any(p is tensor for p in entry.adapter.parameters()):
                return stack._ran
        return True

    def close(self, mode: str, report: str) -> None:
        """Raise the report, or warn with it.

        Raises:
            DeadAdapterError: ``mode`` is ``"raise"``.
        """
        if mode == "raise":
            raise DeadAdapterError(report)
        warnings.warn(report, stacklevel=2)


def local(tensor: Any) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def _reentrant(root: nn.Module) -> bool:
    for module in root.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            return True
    return False
