"""The bottleneck adapter: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, section 2.1.

``Ad(h) = W_up φ(W_down h + b_down) + b_up``, added to h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.nn.adapter import AdapterModule, BaseLayer, BuildContext, fill_kaiming, fill_normal

Activation = Literal["relu", "gelu", "silu", "tanh"]
BottleneckInit = Literal["identity", "houlsby"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class BottleneckAdapter(AdapterModule):
    """Series adapter on a layer's output: ``down`` (r, d), ``up`` (d, r) and their biases.

    Args:
        context: Place, dtype and seed.
        width: r.
        activation: φ.
        init: ``identity`` (``up`` zero: the output is the base's, bit for bit) or ``houlsby`` (both N(0, 0.01²), near identity).
    """

    def __init__(self, context: BuildContext, *, width: int, activation: Activation, init: BottleneckInit) -> None:
        super().__init__(context)
        d = context.spec.out_features
        self.activation, self.init = activation, init
        self.down = context.empty(width, d)
        self.down_bias = context.empty(width)
        self.up = context.empty(d, width)
        self.up_bias = context.empty(d)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = self.generator()
        if self.init == "houlsby":
            fill_normal(self.down, 0.01, generator)
            fill_normal(self.up, 0.01, generator)
        else:
            fill_kaiming(self.down, self.down.shape[1], generator)
            torch.nn.init.zeros_(self.up)
        torch.nn.init.zeros_(self.down_bias)
        torch.nn.init.zeros_(self.up_bias)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., d); reads and changes the layer's output."""
        h = base(x)
        z = ACTIVATIONS[self.activation](F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype)))
        return h + F.linear(z, self.up.to(h.dtype), self.up_bias.to(h.dtype))
