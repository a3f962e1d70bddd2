"""SSF: Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv 2210.08823.

``y ← γ ⊙ y + β``, channel by channel, after every operation: patch embedding, projections, norms.
Deviation: training starts at the identity; ``init="normal"`` is the start of the paper's code. Norms without a bias (RMSNorm) get γ
only, on their weight.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.nn.scaling import ScaleAndShift, ScaleShiftInit
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, adapt
from lightning_peft.surgery.sites import Site


@register(
    name="ssf",
    family="additive",
    summary="Scales and shifts the output of every layer, channel by channel.",
    paper="Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning, arXiv 2210.08823",
    lr=1e-3,
    weight_decay=0.05,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "norm", "tensor"}),
    default_roles=("attention", "mlp", "norm"),
)
@dataclass(frozen=True, kw_only=True)
class SSF(PEFTStrategy):
    """A learned scale and shift after every layer. Layers without a bias get one when this is merged: ``merge(add_bias=True)``.

    By default after the projections of attention and feed-forward layers, all norms and the patch embedding of a vision model.

    Args:
        init: ``identity`` or ``normal`` (N(1, 0.02²) and N(0, 0.02²), the paper's, which is no identity).
    """

    init: ScaleShiftInit = "identity"

    @property
    def identity_at_init(self) -> bool:
        return self.init == "identity"

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().sites(anatomy)
        if self.targets is None and anatomy.role_names("embedding"):
            sites += tuple(site for site in anatomy.sites("embedding") if site.spec.kind == "conv")
        return sites

    def plan(self, anatomy: Anatomy) -> Plan:
        build = functools.partial(ScaleAndShift, init=self.init)
        return Plan(tuple(adapt(site, build) for site in self.sites(anatomy)))
