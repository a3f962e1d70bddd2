"""Houlsby adapter: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, figure 2.

A bottleneck after the attention sub-layer and one after the feed-forward sub-layer, before the residual sum and the norm.
The adapter reads the output of the sub-layer's last projection; the paper reads it after the frozen dropout, which is the same in
evaluation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.bottleneck import BottleneckAdapter, BottleneckInit
from lightning_peft.strategies.additive.bottleneck import BottleneckStrategy
from lightning_peft.strategies.registry import register
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, Edit
from lightning_peft.surgery.sites import Site


@register(
    name="houlsby",
    family="additive",
    summary="Puts a small bottleneck after the attention and after the feed-forward sub-layer of every block.",
    paper="Parameter-Efficient Transfer Learning for NLP, arXiv 1902.00751",
    lr=1e-3,
    layer_kinds=frozenset({"linear"}),
    default_roles=("attention.output", "mlp.down"),
    example={"width": 4},
)
@dataclass(frozen=True, kw_only=True)
class HoulsbyAdapter(BottleneckStrategy):
    """Series bottleneck adapters.

    Args:
        init: ``identity`` (exact identity at the start), ``houlsby`` (the paper's near identity, N(0, 0.01²)) or ``bert``
            (N(0, 0.02²)).
        train_norms: Train the norm layers as well, as the paper does.
    """

    init: BottleneckInit = "identity"

    def edits(self, anatomy: Anatomy, site: Site) -> tuple[Edit, ...]:
        width = self.width_at(site)
        return (Attach(site, functools.partial(BottleneckAdapter, width=width, activation=self.activation, init=self.init)),)
