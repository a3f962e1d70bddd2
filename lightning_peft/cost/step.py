"""One training step without numbers, in the order in which Lightning makes it, and what was alive at its worst moment.

Forward and loss, with the gradients of the step before still there; ``zero_grad``; backward; the optimizer's step. FLOPs count matrix
products, convolutions and attention, a multiply-add as two, as torch's FlopCounterMode does. The backward pass counts what really runs:
no gradient of a frozen weight, and nothing below the first tensor that trains, so about once the forward for a frozen base and twice
for a trained one (methods.md F6).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from lightning_peft.cost.blocks import Blocks
from lightning_peft.cost.planned import GiveInputs, Inputs, Planned
from lightning_peft.cost.quantized import numberless
from lightning_peft.cost.tracer import Tracer, Watch
from lightning_peft.errors import ConfigError, PEFTError
from lightning_peft.nn.chunked_loss import chunk_rows, chunked_cross_entropy, head_parameters

Loss: TypeAlias = Literal["chunked", "full"]
CHUNKS = 4  # of a chunked loss that are run; the others are like them


@dataclass(frozen=True)
class Step:
    """What one step takes; bytes and FLOPs.

    Args:
        activations: Alive at the end of the forward pass for the backward pass.
        loss: The most that output head and loss add to that until the backward pass has left them.
        forward_flops: Of the forward pass, output head and loss included.
        backward_flops: Of the backward pass, recomputed operations included.
        rises: Highest number of bytes alive in each phase, above those of weights, adapters and optimizer state.
    """

    activations: int
    loss: int
    forward_flops: int
    backward_flops: int
    rises: dict[str, int]


def trace_step(
    planned: Planned,
    *,
    batch: int,
    length: int | None,
    given: Inputs | GiveInputs | None,
    padded: bool,
    loss: Loss,
    labelled: float,
    optimizer_rise: int,
    gradient_share: float = 1.0,
) -> Step:
    """Run one step of a planned model.

    Args:
        planned: The model.
        batch: Rows.
        length: Tokens per row.
        given: The model's input, where it is not known.
        padded: The batch comes with an attention mask.
        loss: ``full`` for the logits of all labelled positions at once, ``chunked`` for a part at a time. Not used by models without
            a language model's head, whose loss is taken to cost nothing.
        labelled: Share of the positions that have a label.
        optimizer_rise: Bytes that the optimizer's step takes and gives back.
        gradient_share: Share of every gradient that this device keeps.

    Raises:
        ConfigError: The model cannot run on this input, or nothing trains.
    """
    tracer, model, trainable = planned.tracer, planned.model, planned.trainable()
    if not trainable:
        raise ConfigError(f"nothing of {type(model).__name__} trains, so a training step has no cost.")
    args, kwargs = planned.inputs(batch, length, given, padded=padded)
    kwargs |= without_cache(model)
    tracer.gradient_share = gradient_share
    arrivals = [p.register_post_accumulate_grad_hook(tracer.has_gradient) for p in trainable]
    try:
        with runs(planned), Blocks(tracer, model, planned.blocks), torch.enable_grad():
            return _traced(planned, _Score(planned, loss, labelled), args, kwargs, optimizer_rise)
    finally:
        for arrival in arrivals:
            arrival.remove()
        for parameter in trainable:
            parameter.grad = None
        tracer.forget_watches()
        tracer.book(tracer.not_here)
        tracer.not_here = 0


def _traced(planned: Planned, score: _Score, args: tuple[Tensor, ...], kwargs: dict[str, Any], optimizer_rise: int) -> Step:
    tracer = planned.tracer
    start, flops = tracer.live, tracer.flops
    old = sum(int(p.nbytes * tracer.gradient_share) for p in planned.trainable())  # gradients of the step before
    tracer.book(old)
    score.start()
    total = score.of(args, kwargs)
    forward, at_head, forward_flops = score.body.peak, score.at_head, tracer.flops - flops
    tracer.book(-old)
    back = _Backward(tracer, score.tail, score.left_out)
    if score.hidden is not None and score.hidden.requires_grad:
        score.hidden.register_hook(back.leaves_loss)
    score.hidden = None
    flops = tracer.flops
    total.backward()
    back.leaves_loss()
    assert back.watch is not None
    peaks = {
        "forward": forward,
        "loss": back.tail.peak,
        "backward": back.watch.peak,
        "optimizer step": tracer.live + optimizer_rise,
    }
    return Step(
        activations=at_head - start - old,
        loss=back.tail.peak - at_head,
        forward_flops=forward_flops,
        backward_flops=tracer.flops - flops,
        rises={name: peak - start for name, peak in peaks.items()},
    )


class _Backward:
    """Divides the backward pass where the gradient leaves loss and output head."""

    def __init__(self, tracer: Tracer, tail: Watch, left_out: int) -> None:
        self.tracer, self.tail, self.left_out = tracer, tail, left_out
        self.watch: Watch | None = None

    def leaves_loss(self, gradient: Tensor | None = None) -> None:
        if self.watch is None:
            self.tail.stop()
            self.tracer.book(-self.left_out)
            self.watch = self.tracer.watch()


class _Score:
    """Forward and loss of a batch.

    After :meth:`of`: ``body`` has watched the forward pass up to the output head and ``tail`` watches since then; ``at_head`` is what
    was alive between; ``hidden`` is what the head read; ``left_out`` are bytes booked for chunks of positions that were not run.
    """

    body: Watch
    tail: Watch
    at_head: int

    def __init__(self, planned: Planned, loss: Loss, labelled: float) -> None:
        self.planned, self.loss, self.labelled = planned, loss, labelled
        self.hidden: Tensor | None = None
        self.left_out = 0

    def start(self) -> None:
        """Begin to watch."""
        self.body = self.planned.tracer.watch()

    def of(self, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
        """Return the loss."""
        head = self.planned.head
        if head is None:
            out = self.planned.model(*args, **kwargs)
            self._reaches_head()
            moving = [t for t in tree_leaves(_plain(out)) if isinstance(t, Tensor) and t.requires_grad]
            if not moving:
                raise ConfigError(f"no output of {type(self.planned.model).__name__} depends on what trains.")
            return torch.stack([t.float().sum() for t in moving]).sum()
        before, inner = head.__dict__.get("forward"), head.forward

        def forward(hidden: Tensor) -> Tensor:
            self._reaches_head()
            self.hidden = hidden
            return hidden if self.loss == "chunked" else inner(self._labelled(hidden))

        head.forward = forward
        try:
            out = self.planned.model(*args, **kwargs)
        finally:
            del head.forward
            if before is not None:
                head.forward = before
        logits = out.logits if hasattr(out, "logits") else next(t for t in tree_leaves(_plain(out)) if isinstance(t, Tensor))
        del out
        assert self.hidden is not None
        if self.loss == "full":
            targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(wide, targets, reduction="sum")
        del logits
        rows = self._labelled(self.hidden)
        classes = head(rows[:1]).shape[-1]
        tracer, chunk = self.planned.tracer, chunk_rows(classes)
        some = rows[: CHUNKS * chunk]
        # The gradient of the positions that are left out is kept, too.
        self.left_out = (len(rows) - len(some)) * rows.shape[1] * rows.element_size()
        tracer.book(self.left_out)
        with tracer.any_values():
            targets, parameters = torch.zeros(len(some), dtype=torch.long), head_parameters(head, rows[:1])
            before = tracer.flops
            total: Tensor = chunked_cross_entropy(some, targets, head, parameters, chunk=chunk)
        tracer.flops += (tracer.flops - before) * (len(rows) - len(some)) // len(some)
        return total

    def _reaches_head(self) -> None:
        tracer = self.planned.tracer
        self.body.stop()
        self.at_head, self.tail = tracer.live, tracer.watch()

    def _labelled(self, hidden: Tensor) -> Tensor:
        """Return the labelled positions (n, d) of (batch, length, d)."""
        rows = hidden.flatten(0, -2)
        count = max(1, round(self.labelled * len(rows)))
        return rows if count == len(rows) else rows[torch.zeros(count, dtype=torch.long)]


@contextmanager
def runs(planned: Planned) -> Iterator[None]:
    """Run a planned model inside ``with``; what goes wrong there is a typed error.

    Raises:
        ConfigError: The model cannot run on this input, or not without numbers.
    """
    cast = contextlib.nullcontext() if planned.autocast is None else torch.autocast("cpu", planned.autocast)
    for handle in planned.handles:
        handle.checked = True  # of equal blocks one runs
    try:
        with numberless(), one_text_per_row(), planned.tracer, cast:
            yield
    except PEFTError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{type(planned.model).__name__} cannot be run without numbers: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        ) from error


@contextmanager
def one_text_per_row() -> Iterator[None]:
    """Answer for transformers, which looks at the positions whether several texts are packed into a row: they are not.

    Of tensors without numbers it cannot tell, and makes a mask of (batch, 1, length, length) in any case, for which it also repeats keys
    and values (transformers 5.23, ``masking_utils``).
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    before = getattr(masking, "find_packed_sequence_indices", None)
    if before is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = before


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Return the argument that tells a transformers model to keep no KV cache."""
    return {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}


def _plain(out: Any) -> Any:
    """Return the output of a model as a structure that pytree knows."""
    return dict(out) if isinstance(out, dict) else out
