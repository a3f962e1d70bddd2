"""What all bottleneck adapters have in common: where they go, how wide they are, and the norms that may train beside them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.bottleneck import Activation
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Edit, Plan, Train
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.walk import base_parameters


@dataclass(frozen=True, kw_only=True)
class BottleneckStrategy(PEFTStrategy):
    """A bottleneck at every target.

    Args:
        width: Bottleneck width r; None means the hidden size divided by ``reduction_factor``.
        reduction_factor: d / r, used when ``width`` is None.
        activation: φ.
        init: ``identity`` starts exactly at the base model.
        train_norms: Train the norm layers as well.
    """

    width: int | None = None
    reduction_factor: int = 16
    activation: Activation = "gelu"
    init: str = "identity"
    train_norms: bool = False

    def validate(self) -> None:
        require(self.width is None or self.width >= 1, self, "width", "it must be at least 1")
        require(self.reduction_factor >= 1, self, "reduction_factor", "it must be at least 1")

    @property
    def identity_at_init(self) -> bool:
        return self.init == "identity"

    @abstractmethod
    def edits(self, anatomy: Anatomy, site: Site) -> tuple[Edit, ...]:
        """Return what is done at one target."""

    def plan(self, anatomy: Anatomy) -> Plan:
        edits = [edit for site in self.sites(anatomy) for edit in self.edits(anatomy, site)]
        if self.train_norms:
            norms = {site.path for site in anatomy.sites("norm")}
            edits += [Train(path, name) for path, name, _ in base_parameters(anatomy.root) if path in norms]
        return Plan(tuple(edits))

    def width_at(self, site: Site) -> int:
        """Return r at a layer, after the checks that every bottleneck on its output needs."""
        name, d = type(self).__name__, site.spec.out_features
        width = self.width or d // self.reduction_factor
        if not 1 <= width <= d:
            raise ConfigError(f"{name}: width {width} at '{site.key}' (d = {d}) must lie between 1 and d.")
        if not site.spec.has_input:
            raise UnsupportedLayerError(
                f"{name}: '{site.key}' is read inside another module's forward, so there is no output to adapt. Set targets to layers "
                "that run themselves, such as mlp.down."
            )
        return width
