"""Bottleneck adapters: one small network, ``Ad(h) = W_up φ(W_down h + b_down) + b_up``, at three places.

Series, Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1: ``h + Ad(h)``.
Before a post-norm, Pfeiffer et al. 2020, "AdapterFusion", arXiv 2005.00247: ``LN(s + Ad(LN(s)))``, s the sum that the norm reads.
Parallel, He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, table 1:
``F(x) + c Ad(x)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import AdapterModule, BaseLayer, BuildContext, fill_kaiming, fill_normal

Activation = Literal["relu", "gelu", "silu", "tanh"]
BottleneckInit = Literal["identity", "houlsby", "bert"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
STDS: dict[BottleneckInit, float] = {"houlsby": 0.01, "bert": 0.02}


class BottleneckAdapter(AdapterModule):
    """Series adapter on a layer's output: ``down`` (r, inside), ``up`` (d, r) and their biases.

    Args:
        context: Place, dtype and seed.
        width: r.
        activation: φ.
        init: ``identity`` (``up`` zero: the output is the base's, bit for bit), ``houlsby`` or ``bert`` (both matrices N(0, 0.01²) or
            N(0, 0.02²), near identity).
        inside: Width of what Ad reads; None means d, the width of what it gives.
    """

    reads_output = True
    projections = (("down", "down_bias"), ("up", "up_bias"))

    def __init__(
        self, context: BuildContext, *, width: int, activation: Activation, init: BottleneckInit, inside: int | None = None
    ) -> None:
        super().__init__(context)
        d = context.spec.out_features
        self.activation, self.init = activation, init
        self.down = context.empty(width, inside or d)
        self.down_bias = context.empty(width)
        self.up = context.empty(d, width)
        self.up_bias = context.empty(d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = self.generator()
        if self.init == "identity":
            fill_kaiming(self.down, self.down.shape[1], generator)
            nn.init.zeros_(self.up)
        else:
            fill_normal(self.down, STDS[self.init], generator)
            fill_normal(self.up, STDS[self.init], generator)
        nn.init.zeros_(self.down_bias)
        nn.init.zeros_(self.up_bias)

    def ad(self, h: Tensor) -> Tensor:
        """Return Ad(h): (..., inside) -> (..., d), in the dtype of ``h``."""
        z = ACTIVATIONS[self.activation](F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return F.linear(z, self.up.to(h.dtype), self.up_bias.to(h.dtype))

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., d); reads and changes the layer's output."""
        h = base(x)
        return h + self.ad(h)


class PostNormBottleneck(BottleneckAdapter):
    """Series adapter of a post-norm sub-layer, installed on its norm, which runs twice: before Ad and after it."""

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., d) -> (..., d); ``x`` is the sum of residual and sub-layer output that the norm reads."""
        return base(x + self.ad(base(x)))


class ParallelBottleneck(BottleneckAdapter):
    """Adapter beside a layer or a whole sub-layer F: both read the same input.

    Args:
        context: Place, dtype and seed.
        width: r.
        activation: φ.
        init: As of :class:`BottleneckAdapter`.
        inside: Width of what F reads.
        scaling: c.
    """

    reads_output = False

    def __init__(
        self, context: BuildContext, *, width: int, activation: Activation, init: BottleneckInit, inside: int, scaling: float
    ) -> None:
        super().__init__(context, width=width, activation=activation, init=init, inside=inside)
        self.scaling, self.inside = scaling, inside

    @property
    def channels_read(self) -> int:
        return self.inside

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., inside) -> (..., d)."""
        y = base(x)
        return y + self.scaling * self.ad(x).to(y.dtype)
