"""BitFit: Zaken et al. 2022, "BitFit: Simple Parameter-efficient Fine-tuning ...", arXiv 2106.10199, section 3.

Every bias trains in place; everything else is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.errors import TargetError
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import ALL_KINDS, PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, Train
from lightning_peft.surgery.walk import biases


@register(
    name="bitfit",
    family="selective",
    summary="Trains the bias terms of the base model and nothing else.",
    paper="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models, arXiv 2106.10199",
    lr=1e-3,
    mergeable=True,
    layer_kinds=ALL_KINDS,
)
@dataclass(frozen=True, kw_only=True)
class BitFit(PEFTStrategy):
    """Train biases: all of them, or those of the targeted layers."""

    def plan(self, anatomy: Anatomy) -> Plan:
        paths = None if self.targets is None else {site.path for site in self.sites(anatomy)}
        found = biases(anatomy.root, paths)
        if not found:
            raise TargetError(
                f"BitFit: {'the targeted layers have' if paths else f'{type(anatomy.root).__name__} has'} no bias (many decoders have none). "
                "Choose another method."
            )
        return Plan(tuple(Train(path, name) for path, name in found))
