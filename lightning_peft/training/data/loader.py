"""A loader with state: mid-epoch resume gives the batches that the uninterrupted run would have seen.

It is deliberately no ``torch.utils.data.DataLoader``: Lightning then neither replaces its sampler under DDP (it shards
by itself) nor rebuilds it. Lightning calls ``set_epoch`` on ``batch_sampler.sampler`` at every epoch, saves
``state_dict`` with the fit loop, and restores it before the first batch (lightning 2.6: ``CombinedLoader._state_dicts``,
``FitLoop.setup_data``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_peft.errors import CompatibilityError
from lightning_peft.training.data.collators import Batch, BatchKey
from lightning_peft.training.data.encoders import Example
from lightning_peft.types import stable_seed

Collate = Callable[[Sequence[Example], BatchKey], Batch]
_WINDOW = 50  # length grouping sorts within windows of so many batches, then mixes the batches


class EpochSampler:
    """The batches of each epoch for one rank, as a pure function of (seed, epoch, rank, world size).

    Every rank gets the same number of rows and batches; the rows of all ranks are disjoint and cover the data set. Where
    the number of rows is no multiple of the world size, the last row of some ranks is a filler (see :class:`BatchKey`).
    Step s of all ranks together holds the rows that one rank with a ``world_size`` times larger batch would see.

    Args:
        lengths: tokens per row; only used for ``length_grouped``.
        batch_size: rows per batch and rank.
        shuffle: a new order in every epoch; False keeps the order of the data set, and epoch 0 for all draws.
        seed: of the order.
        rank: of this process.
        world_size: number of data-parallel processes.
        length_grouped: put rows of similar length into a batch; without ``shuffle`` simply the longest first.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        length_grouped: bool = False,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.length_grouped = length_grouped
        self.epoch = 0
        self.position = 0  # batches of this epoch that were handed out
        self.resumed = False  # the next pass starts at position instead of 0

    @property
    def sampler(self) -> EpochSampler:
        """Itself: Lightning looks for ``set_epoch`` on ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass belongs to; another one than the restored one begins at its first batch."""
        if epoch != self.epoch:
            self.epoch, self.position, self.resumed = epoch, 0, False

    def __len__(self) -> int:
        step = self.batch_size * self.world_size
        return -(-len(self.lengths) // step)

    def order(self) -> list[int]:
        """Return the rows of all ranks in the order of this epoch."""
        rows = len(self.lengths)
        if not self.shuffle:
            return sorted(range(rows), key=lambda row: -self.lengths[row]) if self.length_grouped else list(range(rows))
        generator = torch.Generator().manual_seed(stable_seed(self.seed, "order", self.epoch))
        order: list[int] = torch.randperm(rows, generator=generator).tolist()
        if not self.length_grouped:
            return order
        step = self.batch_size * self.world_size
        window = step * _WINDOW
        grouped: list[int] = []
        for start in range(0, rows, window):
            grouped += sorted(order[start : start + window], key=lambda row: self.lengths[row], reverse=True)
        full = [grouped[start : start + step] for start in range(0, rows - step + 1, step)]
        mixed = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return [row for batch in mixed for row in batch] + grouped[len(full) * step :]

    def keys(self) -> list[BatchKey]:
        """Return this rank's batches of the whole epoch."""
        order = self.order()
        rows = len(order)
        order += [order[i % rows] for i in range(-rows % self.world_size)]
        step = self.batch_size * self.world_size
        keys = []
        for start in range(0, len(order), step):
            mine = range(start + self.rank, min(start + step, len(order)), self.world_size)
            indices = tuple(order[i] for i in mine)
            keys.append(BatchKey(self.epoch if self.shuffle else 0, indices, filler=mine[-1] >= rows))
        return keys


class _Batches(Dataset[Batch]):
    """Maps a batch's key to the batch, so that workers build whole batches and know the epoch."""

    def __init__(self, examples: Sequence[Example], collate: Collate) -> None:
        self.examples = examples
        self.collate = collate

    def __getitem__(self, key: BatchKey) -> Batch:
        return self.collate([self.examples[i] for i in key.indices], key)


def _as_is(batch: Any) -> Any:
    return batch


class StatefulLoader:
    """Iterates over batches; remembers how far it came.

    Args:
        examples: the data set.
        collate: makes a batch of examples and their key.
        sampler: the order; one per loader.
        num_workers: processes that build batches; rows are tokenised already, so 0 is mostly fastest.
        pin_memory: put batches into page-locked memory for faster copies to a GPU.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collate: Collate,
        sampler: EpochSampler,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.dataset = examples
        self.collate = collate
        self.batch_sampler = sampler
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    @property
    def batch_size(self) -> int:
        """Rows per batch and rank."""
        return self.batch_sampler.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass belongs to; Lightning does this by itself."""
        self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Number of batches of a whole epoch, also when resuming within one."""
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing happens before the first batch is asked for; Lightning calls iter() before set_epoch().
        sampler = self.batch_sampler
        if not sampler.resumed:
            sampler.position = 0
        sampler.resumed = False
        loader: DataLoader[Batch] = DataLoader(
            _Batches(self.dataset, self.collate),
            batch_size=None,
            sampler=sampler.keys()[sampler.position :],
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # DataLoader draws a base seed for its workers: from here, so that the global RNG stays where it is.
            generator=torch.Generator().manual_seed(stable_seed(sampler.seed, "workers", sampler.epoch)),
        )
        for batch in loader:
            sampler.position += 1
            yield batch

    @cached_property
    def _checksum(self) -> int:
        checksum = 0
        for example in self.dataset:
            for ids in (example.input_ids, *example.choices):
                checksum = zlib.crc32(ids.tobytes(), checksum)
        return checksum

    def _identity(self) -> dict[str, int | bool]:
        """What must be equal for a position within an epoch to mean the same rows."""
        sampler = self.batch_sampler
        return {
            "rows": len(self.dataset),
            "content": self._checksum,
            "seed": sampler.seed,
            "batch_size": sampler.batch_size,
            "world_size": sampler.world_size,
            "shuffle": sampler.shuffle,
            "length_grouped": sampler.length_grouped,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch, the batches handed out, and what identifies the data and its order; equal on all ranks."""
        sampler = self.batch_sampler
        return {"epoch": sampler.epoch, "position": sampler.position, "batches": len(self), "data": self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CompatibilityError: the position lies within an epoch, but the rows or their order are not the saved ones.
        """
        saved, now = state_dict["data"], self._identity()
        position, batches = int(state_dict["position"]), int(state_dict["batches"])
        if 0 < position < batches:
            differ = [f"{name}: {saved.get(name)} -> {now[name]}" for name in now if saved.get(name) != now[name]]
            if differ:
                raise CompatibilityError(
                    f"cannot resume at batch {position} of epoch {state_dict['epoch']}: {', '.join(differ)}. Use the "
                    "same data, tokenizer and data settings, or resume from a checkpoint of an epoch's end."
                )
        sampler = self.batch_sampler
        sampler.epoch, sampler.resumed = int(state_dict["epoch"]), True
        sampler.position = len(self) if position == batches else position
