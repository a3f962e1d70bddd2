"""Cross-entropy behind an output head, without the logits of all positions.

A language model's logits are its largest tensor: 4 × 256 positions of SmolLM2 are 201 MB in fp32, and the plain loss holds
them three times (logits, log-probabilities, their gradient). But the loss of a position depends on its own row only,
and the gradient of the loss L = Σᵢ −log softmax(zᵢ)[tᵢ] with respect to the logits zᵢ = head(hᵢ) has a closed form,

    ∂L/∂zᵢ = softmax(zᵢ) − (1 − ε) onehot(tᵢ) − ε / V        (ε: label smoothing, V: classes),

so the head runs on a chunk of positions, its gradients are taken at once, and the chunk's logits are dropped. Nothing is
computed twice; the backward pass scales what is there already. (The idea is common: Liger Kernel, arXiv:2410.10989,
section 3.2, and "Cut Your Losses", arXiv:2411.09009; here the head is any differentiable function, adapters included.)

A loss that is no sum over positions gets their log-likelihoods instead, whose gradients are known in backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_peft.errors import ConfigError

IGNORE = -100
"""The label of a position without loss, as in torch and in Hugging Face's data."""

CHUNK_ROWS = 256
"""Positions of one chunk. Each chunk reads the head's weight anew, forward and backward, so what counts is how many positions share
one reading, whatever the width and the vocabulary. CPU time relative to the plain loss, with 576 x 49,152 in fp32 and bf16, 1,024
positions, two cores: 43 positions 1.3 to 1.5, 85 positions 1.0 to 1.15, 170 positions 0.9 to 1.0, 256 positions 0.85 to 1.0, and 341
no less. Two fp32 buffers of a chunk's size live at a time: 2 x 50 MB there, 2 x 131 MB with a vocabulary of 128,256."""

CHUNK_LOGITS = 2**22
"""A chunk may always hold this many logits (16 MiB in fp32), so that few classes are scored in one go."""

FP16_SCALE = 64.0
"""What the gradient of fp16 logits is multiplied by on its way through the head. A probability of 1/49,152 is subnormal in fp16, and
one below 3e-8 is zero; 64 is what a GradScaler's first scale (65,536) leaves of the mean over 1,024 positions."""

Head = Callable[[Tensor], Tensor]


def chunk_rows(classes: int) -> int:
    """Return how many positions one chunk has with this number of classes."""
    return max(CHUNK_ROWS, CHUNK_LOGITS // classes)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def head_parameters(head: Head, hidden: Tensor) -> tuple[Tensor, ...]:
    """Return the trainable tensors that ``head`` uses, found in the graph of its output for one row of ``hidden`` (n, d).

    Which modules hold them does not matter: a tied weight, rows that several layers share, a parametrization's original.
    """
    row = hidden.detach()[:1] if len(hidden) else hidden.new_zeros(1, hidden.shape[1])
    with torch.enable_grad():
        out = head(row)
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    todo: list[Any] = [out.grad_fn] if out.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # an AccumulateGrad node
        if leaf is not None:
            found[id(leaf)] = leaf
        todo += [n for n, _ in node.next_functions if n is not None]
    return tuple(found.values())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    head: Head,
    parameters: Sequence[Tensor] = (),
    *,
    chunk: int,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Return the cross-entropy of ``head(hidden)`` with ``targets``, computed in fp32 or better; a scalar.

    Loss and gradients are those of ``F.cross_entropy(head(hidden).float(), targets)``. In grad mode the head's graph is built and
    used chunk by chunk inside this call, so a head with random numbers draws once per chunk, and hooks that a wrapper such as
    FSDP has on the head's backward run here, not in ``backward()``: do not use it with a sharded head. Without grad mode no
    gradient is computed. It cannot be differentiated twice.

    Args:
        hidden: What the head is given, (n, d).
        targets: Class indices (n,).
        head: Maps (rows, d) to logits (rows, classes), each row on its own.
        parameters: The leaf tensors inside the head that shall receive gradient (:func:`head_parameters`).
        chunk: Positions per call of the head (:func:`chunk_rows`).
        label_smoothing: ε of Szegedy et al., arXiv:1512.00567, section 7.
        ignore_index: Targets without loss; the head does not run there.
        reduction: ``sum``, or ``mean`` over the positions with loss (NaN if there are none, as in torch).

    Raises:
        ConfigError: ``chunk`` is below 1 or ``label_smoothing`` outside [0, 1].
    """
    if chunk < 1:
        raise ConfigError(f"chunk={chunk}: a chunk has at least one position.")
    if not 0 <= label_smoothing <= 1:
        raise ConfigError(f"label_smoothing={label_smoothing} is not between 0 and 1.")
    where = targets != ignore_index
    if not bool(where.all()):
        hidden, targets = hidden[where], targets[where]
    wanted = [p for p in parameters if p.requires_grad]
    if torch.is_grad_enabled() and (hidden.requires_grad or wanted):
        total: Tensor = _ChunkedCrossEntropy.apply(targets, head, chunk, label_smoothing, hidden, *wanted)  # type: ignore[no-untyped-call]
    else:
        losses = [loss for loss, _ in _scored(hidden, targets, head, chunk, label_smoothing)]
        total = _sum(losses, hidden)
    return total / targets.numel() if reduction == "mean" else total


@torch.no_grad()
def chunked_evaluation(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy and the likeliest class of every position (n,), without gradient.

    Args:
        hidden: What the head is given, (n, d).
        targets: Class indices (n,), none ignored.
        head: Maps (rows, d) to logits (rows, classes).
        chunk: Positions per call of the head.
    """
    scored = list(_scored(hidden, targets, head, chunk, 0.0))
    best = [b for _, b in scored]
    return _sum([loss for loss, _ in scored], hidden), torch.cat(best) if best else targets.new_empty(0)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_log_likelihoods(hidden: Tensor, targets: Tensor, head: Head, *, chunk: int) -> Tensor:
    """Return ``log softmax(head(hidden))`` at every position's target, (n,), in fp32 or better.

    Unlike :func:`chunked_cross_entropy` it is plain autograd: any loss may follow, and whatever trains in the head receives gradient.
    More than one chunk of positions is scored twice, since no chunk's logits are kept for the backward pass.

    Args:
        hidden: What the head is given, (n, d).
        targets: Class indices (n,), none ignored.
        head: Maps (rows, d) to logits (rows, classes), each row on its own.
        chunk: Positions per call of the head.
    """
    parts = list(zip(hidden.split(chunk), targets.split(chunk), strict=True))
    if len(parts) == 1 or not torch.is_grad_enabled():
        return torch.cat([_log_likelihoods(head, rows, right) for rows, right in parts])
    return torch.cat([checkpoint(_log_likelihoods, head, rows, right, use_reentrant=False) for rows, right in parts])


def _log_likelihoods(head: Head, rows: Tensor, targets: Tensor) -> Tensor:
    logits = head(rows)
    return F.log_softmax(logits, -1, dtype=_wide(logits.dtype)).gather(1, targets[:, None]).squeeze(1)


def _scored(hidden: Tensor, targets: Tensor, head: Head, chunk: int, smoothing: float) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, right in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        if len(rows):  # an empty tensor splits into one empty chunk
            yield _score(head(rows), right, smoothing)


def _score(logits: Tensor, targets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return loss and likeliest class of every position, each (rows,)."""
    return _losses(_log_probabilities(logits), targets, smoothing), logits.argmax(-1)


def _sum(losses: list[Tensor], hidden: Tensor) -> Tensor:
    # One sum over all positions: its rounding does not depend on the chunks.
    return torch.cat(losses).sum() if losses else hidden.new_zeros((), dtype=_wide(hidden.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _log_probabilities(logits: Tensor) -> Tensor:
    return F.log_softmax(logits.detach(), -1, dtype=_wide(logits.dtype))


def _losses(logp: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the cross-entropy of every position, (rows,)."""
    right = -logp.gather(1, targets[:, None]).squeeze(1)
    return right if not smoothing else (1 - smoothing) * right - smoothing * logp.mean(1)


def _slope_(logp: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Return the gradient of the summed loss with respect to the logits, written over their log-probabilities."""
    slope = logp.exp_()
    if smoothing:
        slope -= smoothing / slope.shape[1]
    slope[torch.arange(len(targets), device=targets.device), targets] -= 1 - smoothing
    return slope


@contextmanager
def _hooks_off(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keep users' tensor hooks from running on the gradient of every chunk: they run in backward, on the whole one."""
    held = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, items in held:
            hooks.update(items)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The summed loss; its gradients are computed in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, head: Head, chunk: int, smoothing: float, hidden: Tensor, *parameters: Tensor
    ) -> Tensor:
        losses: list[Tensor] = []
        slopes = torch.empty_like(hidden) if hidden.requires_grad else None
        # 16-bit gradients are added up in fp32.
        sums = [torch.zeros_like(p, dtype=_wide(p.dtype)) if not len(hidden) else None for p in parameters]
        ctx.scale = 1.0
        with _hooks_off(parameters):
            for start in range(0, len(hidden), chunk):
                stop = start + chunk
                rows = hidden[start:stop].detach().requires_grad_(slopes is not None)
                with torch.enable_grad():
                    logits = head(rows)
                logp = _log_probabilities(logits)
                losses.append(_losses(logp, targets[start:stop], smoothing))
                slope = _slope_(logp, targets[start:stop], smoothing)
                if logits.dtype == torch.float16:
                    ctx.scale = FP16_SCALE
                    slope *= ctx.scale
                inputs = [rows, *parameters] if slopes is not None else list(parameters)
                # The gradient of an fp32 operation stays in fp32 also where the caller is inside autocast.
                with torch.autocast(hidden.device.type, enabled=False):
                    found = list(torch.autograd.grad(logits, inputs, slope.to(logits.dtype), allow_unused=True))
                del logits, logp, slope
                if slopes is not None:
                    slopes[start:stop] = found.pop(0)
                for i, part in enumerate(found):
                    known = sums[i]
                    if part is not None:
                        sums[i] = part.to(_wide(part.dtype)) if known is None else known.add_(part)
        ctx.save_for_backward(slopes, *sums)
        return _sum(losses, hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32: a scale of 1 / positions has more digits than a 16-bit number.
        factor = gradient / ctx.scale
        scaled = [None if t is None else (t.to(_wide(t.dtype)) * factor) for t in ctx.saved_tensors]
        return (None, None, None, None, *scaled)
