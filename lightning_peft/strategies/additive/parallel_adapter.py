"""Parallel adapter: He et al. 2022, "Towards a Unified View of Parameter-Efficient Transfer Learning", arXiv 2110.04366, table 1.

``h = F(x) + c W_up φ(W_down x)``: the bottleneck reads what the sub-layer F reads, behind the pre-norm if there is one, and its result
joins F's before the residual sum. With c = 1 it is the paper's parallel adapter, with any other c its scaled parallel adapter.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from lightning_peft.errors import TargetError
from lightning_peft.nn.bottleneck import Activation, BottleneckInit, ParallelBottleneck
from lightning_peft.strategies.additive.bottleneck import BottleneckStrategy
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Edit
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.sublayers import beside

FIRST_LAYERS = {"mlp.down": "mlp.up", "attention.output": "attention.query"}


@register(
    name="parallel_adapter",
    family="additive",
    summary="Puts a bottleneck beside the feed-forward sub-layer of every block.",
    paper="Towards a Unified View of Parameter-Efficient Transfer Learning, arXiv 2110.04366",
    lr=2e-4,
    layer_kinds=frozenset({"linear"}),
    default_roles=("mlp.down",),
    example={"width": 4, "activation": "gelu"},  # of four ReLU units none may be active
)
@dataclass(frozen=True, kw_only=True)
class ParallelAdapter(BottleneckStrategy):
    """Bottleneck adapters beside sub-layers. A target is the last layer of a sub-layer: ``mlp.down`` or ``attention.output``.

    Args:
        reduction_factor: d / r, used when ``width`` is None; the authors' r is 512 of 1024.
        init: ``identity`` (the authors': exactly the base at the start), ``houlsby`` (N(0, 0.01²)) or ``bert`` (N(0, 0.02²)).
        scaling: c; 1 for the plain parallel adapter, 4 in the paper's scaled one.
    """

    reduction_factor: int = 2
    activation: Activation = "relu"
    init: BottleneckInit = "identity"
    scaling: float = 4.0

    def validate(self) -> None:
        super().validate()
        require(0 < self.scaling < math.inf, self, "scaling", "it must be positive and finite")

    def edits(self, anatomy: Anatomy, site: Site) -> tuple[Edit, ...]:
        width = self.width_at(site)
        found = (anatomy.partner(site, last, first) for last, first in FIRST_LAYERS.items())
        start = next((first for first in found if first is not None), None)
        if start is None:
            raise TargetError(
                f"ParallelAdapter: '{site.key}' is not known as the last layer of a sub-layer, so there is nothing to lie beside. Target "
                f"{' or '.join(FIRST_LAYERS)}, or use HoulsbyAdapter, whose adapters lie behind a layer."
            )
        build = functools.partial(
            ParallelBottleneck,
            width=width,
            activation=self.activation,
            init=self.init,
            inside=start.spec.in_features,
            scaling=self.scaling,
        )
        return beside(start, site, build)
