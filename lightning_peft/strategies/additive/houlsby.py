"""Houlsby adapter: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751, figure 2.

A bottleneck after the attention sub-layer and one after the feed-forward sub-layer, before the residual sum and the norm.
The adapter reads the output of the sub-layer's last projection; the paper reads it after the frozen dropout, which is the same in
evaluation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.bottleneck import Activation, BottleneckAdapter, BottleneckInit
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, Edit, Plan, Train
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.walk import base_parameters


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
class HoulsbyAdapter(PEFTStrategy):
    """Series bottleneck adapters.

    Args:
        width: Bottleneck width r; None means the hidden size divided by ``reduction_factor``.
        reduction_factor: d / r, used when ``width`` is None.
        activation: φ.
        init: ``identity`` (exact identity at the start) or ``houlsby`` (the paper's near identity).
        train_norms: Train the norm layers as well, as the paper does.
    """

    width: int | None = None
    reduction_factor: int = 16
    activation: Activation = "gelu"
    init: BottleneckInit = "identity"
    train_norms: bool = False

    def validate(self) -> None:
        require(self.width is None or self.width >= 1, self, "width", "it must be at least 1")
        require(self.reduction_factor >= 1, self, "reduction_factor", "it must be at least 1")

    @property
    def identity_at_init(self) -> bool:
        return self.init == "identity"

    def plan(self, anatomy: Anatomy) -> Plan:
        edits: list[Edit] = [self._edit(site) for site in self.sites(anatomy)]
        if self.train_norms:
            norms = {site.path for site in anatomy.sites("norm")}
            edits += [Train(path, name) for path, name, _ in base_parameters(anatomy.root) if path in norms]
        return Plan(tuple(edits))

    def _edit(self, site: Site) -> Edit:
        d = site.spec.out_features
        width = self.width or d // self.reduction_factor
        if not 1 <= width <= d:
            raise ConfigError(f"HoulsbyAdapter: width {width} at '{site.key}' (d = {d}) must lie between 1 and d.")
        if not site.spec.has_input:
            raise UnsupportedLayerError(
                f"HoulsbyAdapter: '{site.key}' is read inside another module's forward, so there is no output to adapt. Set targets "
                "to layers that run themselves, such as mlp.down."
            )
        return Attach(site, functools.partial(BottleneckAdapter, width=width, activation=self.activation, init=self.init))
