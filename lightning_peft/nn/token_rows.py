"""Trained rows of an embedding table and of the output head, for tokens that were added or deserve better vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule


class Rows(nn.Module):
    """``rows`` (n, dim): the values of n rows of one weight, which several layers may share when they are tied.

    Args:
        context: dtype and device.
        ids: Row numbers, ascending.
        table: Returns the weight (entries, dim) from which the rows start.
    """

    def __init__(self, context: BuildContext, *, ids: Sequence[int], table: Callable[[], Tensor]) -> None:
        super().__init__()
        self.ids, self._table = tuple(ids), table
        self.rows = context.empty(len(self.ids), table().shape[1])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start from the rows of the base model."""
        with torch.no_grad():
            self.rows.copy_(self._table()[list(self.ids)])


class TokenRowsAdapter(MergeableModule):
    """The layer with some of its rows replaced by trained ones: tokens of an embedding, output features of a head.

    The difference to the base's rows is added to the output, so that the output is the base's, bit for bit, while they are equal,
    and adapters on the same layer keep their effect.

    Args:
        context: Place and layer.
        shared: Name of the :class:`Rows` among the plan's shared modules.
    """

    ids: Tensor

    def __init__(self, context: BuildContext, *, shared: str) -> None:
        super().__init__(context)
        # A reference that is not registered: the rows are stored, saved and counted once, at the root.
        object.__setattr__(self, "table", context.shared[shared])
        self.register_buffer("ids", torch.empty(len(self.trained.ids), dtype=torch.long, device=context.device), persistent=False)
        self.reset_parameters()

    @property
    def trained(self) -> Rows:
        """The trained rows."""
        table: Rows = self.table  # type: ignore[assignment]
        return table

    def reset_parameters(self) -> None:
        self.ids.copy_(torch.tensor(self.trained.ids))

    def offset(self, base: BaseLayer) -> Tensor:
        """Return the trained rows minus those of the base, (n, dim)."""
        weight = base.weight()
        stored = weight[:, self.ids].T if self.spec.kind == "embedding" else weight[self.ids]
        rows = self.trained.rows
        return rows - stored.to(rows.dtype)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """Embedding: ids (...) -> (..., dim). Head: (..., dim) -> (..., entries)."""
        y = base(x)
        offset = self.offset(base).to(y.dtype)
        if self.spec.kind == "embedding":
            place = torch.searchsorted(self.ids, x.long()).clamp(max=len(self.ids) - 1)
            hit = self.ids[place] == x
            return y + torch.where(hit[..., None], F.embedding(place, offset), 0)
        return y.index_add(-1, self.ids, F.linear(x, offset.to(x.dtype)).to(y.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = self.trained.rows.to(weight.dtype)
        if self.spec.kind == "embedding":
            return weight.index_copy(1, self.ids, rows.T), bias
        return weight.index_copy(0, self.ids, rows), bias
