"""Gates: a learned gain g on what an adapter changes, ``y = y0 + g (y' - y0)`` with the layer's own output y0 and the adapted one y'.

UniPELT: Mao et al. 2022, "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", arXiv 2110.07577, section 3:
``g = mean_t σ(w · h_t + b)``, one scalar for each example, over all positions t, padding included, as in the authors' code: a layer does
not know what is padding, so pad rows to like lengths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import AdapterModule, BaseLayer, BuildContext, fill_kaiming, fill_normal
from lightning_peft.types import stable_seed

GateKind = Literal["input", "static"]


class Gate(nn.Module, ABC):
    """A gain between 0 and 1."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise all parameters, the same way on every rank."""

    @abstractmethod
    def forward(self, h: Tensor, channel_dim: int = -1) -> Tensor:
        """Return the gain, in a shape that broadcasts over ``h``.

        Args:
            h: What the adapter reads, (batch, ..., d): the first dimension counts examples.
            channel_dim: Where d lies, from the end.
        """


BuildGate = Callable[..., Gate]
"""Given a context and the ``width`` of what the gate reads, returns the gate."""


class InputGate(Gate):
    """UniPELT's: ``weight`` w (d,), ``bias`` b (1,). (batch, ..., d) -> (batch, 1, ..., 1).

    Args:
        context: Place, dtype and seed.
        width: d.
        std: Standard deviation of w at the start, with b = 0; None for both like ``nn.Linear``.
    """

    def __init__(self, context: BuildContext, *, width: int, std: float | None) -> None:
        super().__init__()
        self.seed, self.std = context.seed, std
        self.weight, self.bias = context.empty(width), context.empty(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        if self.std is not None:
            fill_normal(self.weight, self.std, generator)
            nn.init.zeros_(self.bias)
            return
        fill_kaiming(self.weight, self.weight.shape[0], generator)
        fill_kaiming(self.bias, self.weight.shape[0], generator)

    def forward(self, h: Tensor, channel_dim: int = -1) -> Tensor:
        logits = F.linear(h.movedim(channel_dim, -1), self.weight[None].to(h.dtype), self.bias.to(h.dtype))  # (batch, ..., 1)
        gains = logits.to(torch.promote_types(h.dtype, torch.float32)).sigmoid()
        return gains.flatten(1).mean(1).reshape(-1, *(1,) * (h.dim() - 1))


class StaticGate(Gate):
    """One learned number for all inputs: ``logit`` (1,), 0 at the start, g = σ(logit) = 1/2.

    Args:
        context: Place and dtype.
    """

    def __init__(self, context: BuildContext) -> None:
        super().__init__()
        self.logit = context.empty(1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logit)

    def forward(self, h: Tensor, channel_dim: int = -1) -> Tensor:
        return self.logit.sigmoid().reshape((1,) * h.dim())


def build_gate(context: BuildContext, *, width: int, kind: GateKind, std: float | None = None) -> Gate:
    """Return a gate.

    Args:
        context: Place, dtype and seed.
        width: Channels of what it reads.
        kind: ``input`` or ``static``.
        std: As of :class:`InputGate`.
    """
    if kind == "static":
        return StaticGate(context)
    return InputGate(replace(context, seed=stable_seed(context.seed, "gate")), width=width, std=std)


class GatedAdapter(AdapterModule):
    """An adapter under a gate that reads what the adapter reads.

    The gain multiplies the change where it is made: an adapter that gives the layer another input x' (a bottleneck in front of a
    norm) is run at ``x + g (x' - x)``, any other gives ``y0 + g (y' - y0)``.

    Args:
        context: Place, dtype and seed.
        build: Builds the adapter.
        gate: Builds the gate.
    """

    def __init__(self, context: BuildContext, *, build: Callable[[BuildContext], AdapterModule], gate: BuildGate) -> None:
        super().__init__(context)
        self.adapter = build(context)
        self.gate = gate(context, width=self.adapter.channels_read)
        self.reads_base_weight, self.reads_output = self.adapter.reads_base_weight, self.adapter.reads_output

    def reset_parameters(self) -> None:
        self.adapter.reset_parameters()
        self.gate.reset_parameters()

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(batch, ..., in) -> (batch, ..., out)."""
        layer = NotedLayer(base)
        y0 = layer(x)
        h = y0 if self.reads_output or not x.is_floating_point() else x  # ids have no channels
        channel_dim = -base.along_channels(y0.new_empty(self.spec.out_features)).dim()
        gain: Tensor = self.gate(h, channel_dim).to(y0.dtype)
        y: Tensor = self.adapter(layer, x)
        given = layer.input_of(y)
        if given is not None and given is not x:
            return base(x + gain * (given - x))
        return y0 + gain * (y - y0)


class NotedLayer:
    """A layer that knows which input gave which output; all else of it is the layer's own."""

    def __init__(self, base: BaseLayer) -> None:
        self._base = base
        self._runs: list[tuple[Tensor, Tensor]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __call__(self, x: Tensor, /) -> Tensor:
        """Run the layer."""
        y = self._base(x)
        self._runs.append((x, y))
        return y

    def input_of(self, y: Tensor) -> Tensor | None:
        """Return what the layer was given when it gave the tensor ``y``, None if it did not."""
        return next((x for x, out in self._runs if out is y), None)
