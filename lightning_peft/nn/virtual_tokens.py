"""Virtual tokens: the learned numbers of soft prompts and prefixes, without a word about the model they go into.

Prompt tuning: Lester et al. 2021, arXiv 2104.08691, ``E_in = [P; Emb(x)]``. Prefix tuning: Li & Liang 2021, arXiv 2101.00190,
equation 3, ``Z = Linear(tanh(Linear(E)))``, where Z holds keys and values of every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import BuildContext, fill_kaiming, fill_normal


class PromptTokens(nn.Module):
    """A soft prompt P: ``weight`` (N, d).

    Args:
        context: Place, dtype and seed.
        count: N.
        width: d.
        rows: Values to start from, (N, d); None draws from U(-0.5, 0.5), as the paper's code does.
    """

    def __init__(self, context: BuildContext, *, count: int, width: int, rows: Tensor | None = None) -> None:
        super().__init__()
        self.seed = context.seed
        self._rows = None if rows is None else rows.detach().clone()
        self.weight = context.empty(count, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill P, the same way on every rank."""
        rows = self._rows
        if rows is None:
            rows = torch.rand(self.weight.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
        with torch.no_grad():
            self.weight.copy_(rows)

    def forward(self) -> Tensor:
        """Return P (N, d)."""
        return self.weight


class PrefixTokens(nn.Module):
    """Keys and values of one attention module: ``key`` (p, kv_heads x head_dim) and ``value``, of the same shape.

    Args:
        context: Place, dtype and seed.
        count: p.
        width: kv_heads x head_dim.
        std: Standard deviation of the normal initialisation.
    """

    def __init__(self, context: BuildContext, *, count: int, width: int, std: float) -> None:
        super().__init__()
        self.seed, self.std = context.seed, std
        self.key, self.value = context.empty(count, width), context.empty(count, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill keys and values from N(0, std²), the same way on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_normal(self.key, self.std, generator)
        fill_normal(self.value, self.std, generator)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (keys, values), each (p, kv_heads x head_dim)."""
        return self.key, self.value


class PrefixTrunk(nn.Module):
    """The part of the reparametrisation that all layers share: ``tanh(W E + b)`` with E (p, d), W (mid, d), b (mid,).

    Args:
        context: Place, dtype and seed.
        count: p.
        width: d.
        middle: mid.
    """

    def __init__(self, context: BuildContext, *, count: int, width: int, middle: int) -> None:
        super().__init__()
        self.seed = context.seed
        self.embedding = context.empty(count, width)
        self.weight, self.bias = context.empty(middle, width), context.empty(middle)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E from N(0, 1), the layer like ``nn.Linear``: the defaults that the paper's code leaves in place."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_normal(self.embedding, 1.0, generator)
        fill_kaiming(self.weight, self.weight.shape[1], generator)
        fill_kaiming(self.bias, self.weight.shape[1], generator)

    def forward(self) -> Tensor:
        """Return the hidden layer (p, mid)."""
        return torch.tanh(F.linear(self.embedding, self.weight, self.bias))


class ProjectedPrefix(nn.Module):
    """Keys and values of one attention module, computed from a shared :class:`PrefixTrunk`.

    The layer owns its rows of the second linear map: ``weight`` (2 x width, mid), ``bias`` (2 x width,). Every call computes the
    small trunk again, so nothing has to be kept from one layer to the next, and activation checkpointing is exact.

    Args:
        context: Place, dtype and seed.
        trunk: The shared part; referenced, not registered, so that it is stored and counted once.
        width: kv_heads x head_dim.
        dropout: Dropout on keys and values, in training.
    """

    trunk: PrefixTrunk

    def __init__(self, context: BuildContext, *, trunk: PrefixTrunk, width: int, dropout: float) -> None:
        super().__init__()
        self.seed, self.dropout = context.seed, dropout
        object.__setattr__(self, "trunk", trunk)
        middle = trunk.weight.shape[0]
        self.weight, self.bias = context.empty(2 * width, middle), context.empty(2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Like ``nn.Linear``."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_kaiming(self.weight, self.weight.shape[1], generator)
        fill_kaiming(self.bias, self.weight.shape[1], generator)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (keys, values), each (p, kv_heads x head_dim)."""
        both = F.linear(self.trunk(), self.weight, self.bias)  # (p, 2 x width)
        both = F.dropout(both, self.dropout, self.training) if self.dropout else both
        key, value = both.chunk(2, dim=-1)
        return key, value
