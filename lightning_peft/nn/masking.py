"""A few entries of many weights, each changed by a number of its own: unstructured masks.

The base is never edited, and nothing of the size of a weight trains: the numbers lie in one tensor beside the places that they belong
to. So decoupled weight decay and momentum cannot reach other entries, and optimizer states are as small as the mask.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.errors import FormatError
from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule
from lightning_peft.nn.entries import scattered
from lightning_peft.types import has_values

Scores: TypeAlias = Callable[[], Iterable[Tensor]]


def top_entries(scores: Scores, keep: int) -> Tensor:
    """Return where the ``keep`` highest scores are, (keep,) ascending, counted through all tensors; of equal scores the first ones.

    Args:
        scores: Returns the tensors one by one, the same ones in every call: it is called twice, and only one of them is held at a time.
        keep: At most as many as there are entries.
    """
    best = torch.empty(0)
    for part in scores():
        flat = part.flatten()
        joined = torch.cat([best.to(flat.device), flat])  # of the wider dtype
        best = joined.topk(keep).values if len(joined) > keep else joined
    threshold = best.min()
    ties, offset, found = int((best == threshold).sum()), 0, list[Tensor]()
    for part in scores():
        flat = part.flatten().to(threshold.dtype)
        limit = threshold.to(flat.device)
        equal = (flat == limit).nonzero().flatten()[:ties]
        ties -= len(equal)
        found.append(torch.cat([(flat > limit).nonzero().flatten(), equal]).sort().values.cpu() + offset)
        offset += len(flat)
    return torch.cat(found)


def _only(scores: Tensor) -> list[Tensor]:
    return [scores]


class Mask(nn.Module):
    """``values`` (k,) and ``indices`` (k,): the changes of k entries, and which ones they are among all entries of all segments.

    A segment is a weight, flattened as (out, in), or a bias. The indices ascend, so that each segment has a stretch of both tensors.
    Both have their shapes before anything is chosen: a file needs no data to load, and a plan no values to be costed. The price is a
    gradient that autograd puts together from one vector of length k for each layer, little at the shares that the papers use.

    Args:
        context: dtype, device and seed.
        sizes: Entries of every segment.
        keep: k for all segments together, or one number for each of them.
        scores: Given a seed, returns the score of every entry, segment by segment; the highest are taken. None where they come from
            data: until they are there the indices are -1, and nothing is changed.
    """

    indices: Tensor

    def __init__(
        self,
        context: BuildContext,
        *,
        sizes: tuple[int, ...],
        keep: int | tuple[int, ...],
        scores: Callable[[int], Iterable[Tensor]] | None,
    ) -> None:
        super().__init__()
        self.offsets = (0, *itertools.accumulate(sizes))
        self.keep, self._scores, self._seed = keep, scores, context.seed
        self._known: tuple[Tensor, int, list[int]] | tuple[()] = ()
        count = keep if isinstance(keep, int) else sum(keep)
        self.values = context.empty(count)
        context.claim(count)
        dtype = torch.int32 if self.offsets[-1] < 2**31 else torch.int64
        self.register_buffer("indices", torch.empty(count, dtype=dtype, device=context.device))
        self.reset_parameters()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_known": ()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Choose the entries, the same on every rank, and change none of them yet."""
        self.values.zero_()
        if self._scores is None:
            self.indices.fill_(-1)
        elif has_values(self.indices):
            scores, seed = self._scores, self._seed
            self.indices.copy_(self.choose(lambda: scores(seed)))
        else:
            next(iter(self._scores(self._seed)))  # where the scores need values that are not there, they say so

    def choose(self, scores: Scores) -> Tensor:
        """Return the indices of the entries with the highest scores."""
        if isinstance(self.keep, int):
            return top_entries(scores, self.keep)
        found = []
        for part, keep, offset in zip(scores(), self.keep, self.offsets, strict=False):
            if keep:
                found.append(top_entries(functools.partial(_only, part), keep) + offset)
        return torch.cat(found)

    def part(self, segment: int) -> tuple[Tensor, Tensor]:
        """Return positions (n,) within a segment, and the changes (n,) there."""
        first, last = self.offsets[segment : segment + 2]
        if torch.compiler.is_compiling():  # where a stretch begins is a question for values; this asks none
            inside = (self.indices >= first) & (self.indices < last)
            return torch.where(inside, self.indices - first, 0), torch.where(inside, self.values, 0)
        start, stop = self._stretches()[segment : segment + 2]
        return self.indices[start:stop] - first, self.values[start:stop]

    def _stretches(self) -> list[int]:
        """Return where the stretch of each segment starts, and the end of the last; found out once for every content of the indices."""
        indices, count = self.indices, len(self.indices)
        if not has_values(indices):  # what a plan costs is asked before anything is chosen
            return [count * offset // self.offsets[-1] for offset in self.offsets]
        version = -1 if indices.is_inference() else indices._version
        if not self._known or self._known[0] is not indices or self._known[1] != version or version < 0:
            self._check()
            edges = torch.tensor(self.offsets, dtype=indices.dtype, device=indices.device)
            self._known = (indices, version, torch.searchsorted(indices.contiguous(), edges).tolist())
        return self._known[2]

    def _check(self) -> None:
        unset = bool((self.indices == -1).all())
        ascend = bool((self.indices[1:] > self.indices[:-1]).all()) and int(self.indices[0]) >= 0
        if not unset and not (ascend and int(self.indices[-1]) < self.offsets[-1]):
            raise FormatError(
                f"the indices of a mask do not ascend from 0 to below {self.offsets[-1]:,}. They come from a file that is damaged, or was made "
                "for other targets."
            )


class MaskedEntries(MergeableModule):
    """A layer with some entries of its weight and bias changed: W + ΔW, b + Δb, of a :class:`Mask` that many layers share.

    Args:
        context: Place and layer.
        shared: Name of the mask among the plan's shared modules.
        segment: Number of the weight among its segments; the bias of the layer is the next one.
        biases: The bias is a segment.
    """

    def __init__(self, context: BuildContext, *, shared: str, segment: int, biases: bool) -> None:
        super().__init__(context)
        # A reference that is not registered: the mask is stored, saved and counted once, at the root.
        object.__setattr__(self, "shared", context.shared[shared])
        self.segment, self.biases = segment, biases and context.spec.has_bias

    @property
    def mask(self) -> Mask:
        """The mask of all layers."""
        mask: Mask = self.shared  # type: ignore[assignment]
        return mask

    def reset_parameters(self) -> None:
        """Nothing: the mask has all tensors."""

    def bias_change(self) -> Tensor:
        """Return Δb (out,)."""
        return scattered(*self.mask.part(self.segment + 1), self.spec.out_features)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        positions, values = (tensor.to(x.device) for tensor in self.mask.part(self.segment))
        y = base.entries(x, positions, values) if len(positions) else base(x)
        return y + base.along_channels(self.bias_change()).to(y) if self.biases else y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._added(weight, bias, 1)

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return self._added(weight, bias, -1)

    def _added(self, weight: Tensor, bias: Tensor | None, sign: int) -> tuple[Tensor, Tensor | None]:
        positions, values = self.mask.part(self.segment)
        changed = weight.reshape(-1).index_add(0, positions.to(weight.device), values.to(weight), alpha=sign).view(weight.shape)
        if bias is None or not self.biases:
            return changed, bias
        return changed, bias + sign * self.bias_change().to(bias)


def random_scores(seed: int, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield a uniform number for every entry, the same ones for one seed."""
    generator = torch.Generator().manual_seed(seed)
    for size in sizes:
        yield torch.rand(size, generator=generator)
