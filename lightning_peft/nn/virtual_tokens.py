"""Virtual tokens: the learned numbers of soft prompts and prefixes, without a word about the model they go into.

Prompt tuning: Lester et al. 2021, arXiv 2104.08691, ``E_in = [P; Emb(x)]``. P-tuning: Liu et al. 2021, arXiv 2103.10385,
``P = MLP(BiLSTM(E))``. Prefix tuning: Li & Liang 2021, arXiv 2101.00190, equation 3, ``Z = Linear(tanh(Linear(E)))``, where Z holds
keys and values of every layer.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import BuildContext, fill_kaiming, fill_normal

EncoderKind = Literal["mlp", "lstm"]


class PromptTokens(nn.Module):
    """A soft prompt P: ``weight`` (N, d).

    Args:
        context: Place, dtype and seed.
        count: N.
        width: d.
        rows: Values to start from, (N, d); None draws from U(-bound, bound).
        bound: 0.5 is what the code of prompt tuning has.
        dropout: Dropout on P, in training.
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        count: int,
        width: int,
        rows: Tensor | None = None,
        bound: float = 0.5,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.seed, self.bound, self.dropout = context.seed, bound, dropout
        self._rows = None if rows is None else rows.detach().clone()
        self.weight = context.empty(count, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill P, the same way on every rank."""
        rows = self._rows
        if rows is None:
            rows = torch.rand(self.weight.shape, generator=torch.Generator().manual_seed(self.seed)) - 0.5
            rows = rows * (2 * self.bound)
        with torch.no_grad():
            self.weight.copy_(rows)

    def forward(self) -> Tensor:
        """Return P (N, d)."""
        return F.dropout(self.weight, self.dropout, self.training) if self.dropout else self.weight


class PromptEncoder(nn.Module):
    """A soft prompt that a small network computes from ``embedding`` E (N, d): P-tuning.

    ``mlp``: d → h → h → d with ReLU between. ``lstm``: a bidirectional LSTM with h units per direction, then 2h → 2h → d. The MLP's
    weights are ``weight0``, ``bias0``, ..., the LSTM's have the names of ``nn.LSTM``.

    Args:
        context: Place, dtype and seed.
        count: N.
        width: d.
        kind: The network.
        hidden: h.
        layers: Layers of the LSTM.
        dropout: Dropout between the LSTM's layers, in training.
    """

    def __init__(
        self, context: BuildContext, *, count: int, width: int, kind: EncoderKind, hidden: int, layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.seed, self.hidden, self.dropout = context.seed, hidden, dropout
        self.layers = layers if kind == "lstm" else 0
        self.embedding = context.empty(count, width)
        self.recurrent: list[str] = []
        for layer in range(self.layers):
            for side in ("", "_reverse"):
                inside = 2 * hidden if layer else width
                for name, shape in (("weight_ih", (inside,)), ("weight_hh", (hidden,)), ("bias_ih", ()), ("bias_hh", ())):
                    self.recurrent.append(f"{name}_l{layer}{side}")
                    self.register_parameter(self.recurrent[-1], context.empty(4 * hidden, *shape))
        self.widths = (2 * hidden, 2 * hidden, width) if self.layers else (width, hidden, hidden, width)
        for i in range(len(self.widths) - 1):
            self.register_parameter(f"weight{i}", context.empty(self.widths[i + 1], self.widths[i]))
            self.register_parameter(f"bias{i}", context.empty(self.widths[i + 1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """E from N(0, 1), the layers like ``nn.Linear`` and ``nn.LSTM``: the defaults that the paper's code leaves in place."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_normal(self.embedding, 1.0, generator)
        for name in self.recurrent:
            fill_kaiming(self.get_parameter(name), self.hidden, generator)
        for i, inside in enumerate(self.widths[:-1]):
            fill_kaiming(self.get_parameter(f"weight{i}"), inside, generator)
            fill_kaiming(self.get_parameter(f"bias{i}"), inside, generator)

    def forward(self) -> Tensor:
        """Return P (N, d)."""
        h: Tensor = self.embedding
        if self.layers:
            start = h.new_zeros(2 * self.layers, 1, self.hidden)
            weights: list[Tensor] = [self.get_parameter(name) for name in self.recurrent]
            # Not nn.LSTM, which keeps a second list of its parameters, behind those that FSDP2 puts in their place. Nor cuDNN, which
            # wants them in one piece.
            with torch.backends.cudnn.flags(enabled=False):
                states, _, _ = torch.lstm(
                    h[None], [start, start], weights, True, self.layers, self.dropout, self.training, True, True
                )
            h = states[0]  # (N, 2h)
        for i in range(len(self.widths) - 1):
            h = F.linear(F.relu(h) if i else h, self.get_parameter(f"weight{i}"), self.get_parameter(f"bias{i}"))
        return h


class PrefixTokens(nn.Module):
    """Keys and values of one attention module: ``key`` (p, kv_heads x head_dim) and ``value``, of the same shape.

    Args:
        context: Place, dtype and seed.
        count: p.
        width: kv_heads x head_dim.
        std: Standard deviation of the normal initialisation.
        dropout: Dropout on keys and values, in training.
    """

    def __init__(self, context: BuildContext, *, count: int, width: int, std: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.seed, self.std, self.dropout = context.seed, std, dropout
        self.key, self.value = context.empty(count, width), context.empty(count, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill keys and values from N(0, std²), the same way on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_normal(self.key, self.std, generator)
        fill_normal(self.value, self.std, generator)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return (keys, values), each (p, kv_heads x head_dim)."""
        if not self.dropout:
            return self.key, self.value
        return F.dropout(self.key, self.dropout, self.training), F.dropout(self.value, self.dropout, self.training)


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
        both = F.linear(self.trunk().to(self.weight.dtype), self.weight, self.bias)  # (p, 2 x width)
        both = F.dropout(both, self.dropout, self.training) if self.dropout else both
        key, value = both.chunk(2, dim=-1)
        return key, value
