"""Pfeiffer adapter: Pfeiffer et al. 2020, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv 2005.00247.

One bottleneck per block, on the feed-forward sub-layer. In post-norm blocks, with u its output and x its input, ``LN(u + x)`` becomes
``LN(u + Ad(LN(u + x)) + x)``: the block's own norm runs twice. Pre-norm blocks have no norm there; their sub-layer gives ``u + Ad(u)``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.bottleneck import Activation, BottleneckAdapter, BottleneckInit, PostNormBottleneck
from lightning_peft.strategies.additive.bottleneck import BottleneckStrategy
from lightning_peft.strategies.registry import register
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, Edit
from lightning_peft.surgery.sites import Site


@register(
    name="pfeiffer",
    family="additive",
    summary="Puts one small bottleneck into every block, after the feed-forward sub-layer.",
    paper="AdapterFusion: Non-Destructive Task Composition for Transfer Learning, arXiv 2005.00247",
    lr=1e-3,
    layer_kinds=frozenset({"linear"}),
    default_roles=("mlp.down",),
    example={"width": 4, "activation": "gelu"},  # of four ReLU units none may be active
)
@dataclass(frozen=True, kw_only=True)
class PfeifferAdapter(BottleneckStrategy):
    """One series bottleneck adapter per block: half of Houlsby's parameters.

    On a post-norm block the adapter of the feed-forward layer lies on the norm behind it; on any other layer, on its output.

    Args:
        init: ``identity`` (exact identity at the start), ``bert`` (near identity, N(0, 0.02²), as in the authors' code) or ``houlsby``.
    """

    activation: Activation = "relu"
    init: BottleneckInit = "identity"

    def edits(self, anatomy: Anatomy, site: Site) -> tuple[Edit, ...]:
        width, norm = self.width_at(site), anatomy.partner(site, "mlp.down", "mlp_norm")
        kind = BottleneckAdapter if norm is None else PostNormBottleneck
        return (Attach(norm or site, functools.partial(kind, width=width, activation=self.activation, init=self.init)),)
