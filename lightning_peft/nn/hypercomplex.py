"""Hypercomplex bottlenecks: Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv 2106.04647.

``y = x H + b`` with ``H = Σ_i A_i ⊗ (s_i t_i)``, i = 1 ... n: the small rules A are shared by all layers, the thin factors s
and t belong to each.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import AdapterModule, BaseLayer, BuildContext, fill_normal
from lightning_peft.nn.bottleneck import ACTIVATIONS, Activation

CompacterInit = Literal["identity", "compacter"]
RULES = "phm"


class HypercomplexRules(nn.Module):
    """``rules`` A (n, n, n): one n x n matrix for each term, from N(0, 0.01²).

    Args:
        context: dtype, device and seed.
        n: Number of terms, and side of the matrices.
    """

    def __init__(self, context: BuildContext, *, n: int) -> None:
        super().__init__()
        self.seed = context.seed
        self.rules = context.empty(n, n, n)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill A, the same way on every rank."""
        fill_normal(self.rules, 0.01, torch.Generator().manual_seed(self.seed))


class HypercomplexLinear(nn.Module):
    """A linear layer in → out: ``s`` (n, in / n, k), ``t`` (n, k, out / n), ``bias`` (out,), and rules that belong to the root.

    Args:
        context: dtype and device.
        rules: A; referenced, not registered, so that it is stored and counted once.
        inside: in, a multiple of n.
        outside: out, a multiple of n.
        rank: k.
    """

    shared: HypercomplexRules

    def __init__(self, context: BuildContext, *, rules: HypercomplexRules, inside: int, outside: int, rank: int) -> None:
        super().__init__()
        object.__setattr__(self, "shared", rules)
        n = rules.rules.shape[0]
        self.s, self.t = context.empty(n, inside // n, rank), context.empty(n, rank, outside // n)
        self.bias = context.empty(outside)

    def fill(self, generator: torch.Generator, *, zero: bool) -> None:
        """Glorot-uniform with gain sqrt(2); ``zero`` leaves t at 0, by which H is 0. The bias starts at 0."""
        for factor in (self.s, self.t):
            bound = math.sqrt(2.0) * math.sqrt(6.0 / (factor.shape[1] + factor.shape[2]))
            if not factor.is_meta:
                with torch.no_grad():
                    factor.copy_((torch.rand(factor.shape, generator=generator) * 2 - 1) * bound)
        if zero:
            nn.init.zeros_(self.t)
        nn.init.zeros_(self.bias)

    def matrix(self) -> Tensor:
        """Return H (in, out). Rows are counted by (row of A, row of s), columns by (column of A, column of t)."""
        H = torch.einsum("iab,ick,ikd->acbd", self.shared.rules, self.s, self.t)
        return H.flatten(2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), in the dtype of ``x``."""
        return F.linear(x, self.matrix().T.to(x.dtype), self.bias.to(x.dtype))


class CompacterAdapter(AdapterModule):
    """Series adapter on a layer's output: ``h + up(φ(down(h)))`` of two hypercomplex layers.

    Args:
        context: Place, dtype and seed.
        width: r, the bottleneck; a multiple of n, as d is.
        rank: k.
        activation: φ.
        init: ``identity`` (``up`` starts at zero) or ``compacter`` (the paper's near identity).
    """

    def __init__(self, context: BuildContext, *, width: int, rank: int, activation: Activation, init: CompacterInit) -> None:
        super().__init__(context)
        self.activation, self.init = activation, init
        d, rules = context.spec.out_features, context.shared[RULES]
        assert isinstance(rules, HypercomplexRules)
        self.down = HypercomplexLinear(context, rules=rules, inside=d, outside=width, rank=rank)
        self.up = HypercomplexLinear(context, rules=rules, inside=width, outside=d, rank=rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = self.generator()
        self.down.fill(generator, zero=False)
        self.up.fill(generator, zero=self.init == "identity")

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., d); reads and changes the layer's output."""
        h = base(x)
        z = ACTIVATIONS[self.activation](self.down(h))
        y: Tensor = h + self.up(z)
        return y
