"""The loss of a batch as a sum over its labelled positions, and its share in an optimizer step.

A task's loss may have several terms, each of them a mean over something else (tokens, examples); most have one.

Why sums. Lightning averages the losses of accumulated batches, and DDP averages over ranks; with ragged texts an average of
averages weighs a token of a short batch more than one of a long batch. Here the loss of a batch is the sum over its labelled
positions divided by the number of them in the whole window of accumulated batches on all ranks, so that k small batches give the
gradient of one large batch. That number must be known before the first backward of the window. It is read ahead from the loader:
dividing gradients afterwards would also divide a method's penalty, would show unscaled gradients to callbacks, and would overflow
under fp16.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor


class LookAhead:
    """An iterator whose next items can be seen before they are taken."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.queue: deque[Any] = deque()

    def __iter__(self) -> LookAhead:
        return self

    def __next__(self) -> Any:
        return self.queue.popleft() if self.queue else next(self.source)

    def peek(self, count: int) -> list[Any]:
        """Return the next ``count`` items, fewer at the end."""
        while len(self.queue) < count:
            try:
                self.queue.append(next(self.source))
            except StopIteration:
                break
        return list(self.queue)[:count]


class LossWindow:
    """Labelled positions per batch and rank, averaged over the window of accumulated batches that a batch belongs to.

    A term of the loss may be a mean over something else, which is counted in the same way.

    It reads no further than the window's end, so at every optimizer step the loader stands where it would without it, and a
    checkpoint written there resumes exactly.

    Args:
        count: Returns for each term how many there are in a batch.
    """

    def __init__(self, count: Callable[[Any], tuple[int, ...]]) -> None:
        self.count = count
        self.last = self.end = -1
        self.means: tuple[float, ...] = ()

    def per_batch(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> tuple[float, ...]:
        """Return for each term the number in the window, averaged over ranks, divided by the number of batches to accumulate.

        Lightning divides every loss by that number and distributed strategies average gradients over ranks, so the gradient of
        ``sum of losses / per_batch`` is that of the mean over all labelled positions.
        """
        if batch_idx != self.last + 1 or batch_idx >= self.end:
            self._open(trainer, batch, batch_idx)
        self.last = batch_idx
        return self.means

    def _open(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        accumulate = trainer.accumulate_grad_batches
        self.end = int(min((batch_idx // accumulate + 1) * accumulate, trainer.num_training_batches))
        batches = [batch, *self._ahead(trainer, self.end - batch_idx - 1)]
        numbers = [float(sum(term)) for term in zip(*map(self.count, batches), strict=True)]
        least = 1.0
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            total: Tensor = trainer.strategy.reduce(torch.tensor(numbers, dtype=torch.float64, device=device), reduce_op="mean")
            numbers, least = total.tolist(), 1 / trainer.world_size
        self.means = tuple(max(number, least) / accumulate for number in numbers)

    @staticmethod
    def _ahead(trainer: pl.Trainer, count: int) -> list[Any]:
        """Return the next ``count`` batches of the training loader, which will still be handed out."""
        if count <= 0:
            return []
        fetcher = trainer.fit_loop._data_fetcher  # no public way to see the batches to come (lightning 2.6)
        assert fetcher is not None
        assert fetcher.iterator is not None
        if not isinstance(fetcher.iterator, LookAhead):
            fetcher.iterator = LookAhead(fetcher.iterator)
        fetched = list(getattr(fetcher, "batches", ()))  # a loader without length is prefetched by one batch
        items = [*fetched, *fetcher.iterator.peek(max(0, count - len(fetched)))]
        return [item[0] for item in items[:count]]
