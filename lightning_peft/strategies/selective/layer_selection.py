"""Layer and module selection: chosen parts of the base train whole, everything else is frozen.

Last layers: Donahue et al. 2014, "DeCAF", arXiv 1310.1531. Attention only: Touvron et al. 2022, "Three things everyone should know about
Vision Transformers", arXiv 2203.09795. Cross attention only: Gheini et al. 2021, "Cross-Attention is All You Need",
arXiv 2104.08771.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import ALL_KINDS, PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, Train
from lightning_peft.surgery.layers import DENSE
from lightning_peft.surgery.ports import BodyPort
from lightning_peft.surgery.tree import is_within
from lightning_peft.surgery.walk import base_parameters


@register(
    name="layer_selection",
    family="selective",
    summary="Trains chosen layers whole: the attention layers, the last blocks, or any module by name.",
    paper="Three things everyone should know about Vision Transformers, arXiv 2203.09795",
    lr=1e-4,
    weight_decay=0.01,
    mergeable=True,
    layer_kinds=ALL_KINDS | {"module"},
    storages=frozenset({DENSE}),
    default_roles=("attention",),
)
@dataclass(frozen=True, kw_only=True)
class LayerSelection(PEFTStrategy):
    """Train whole modules in place.

    ``targets`` says which, in the words of every method: a role (``attention``, ``cross_attention``, ``mlp``, ``embedding``, ``norm``,
    ``block``), a module by name with all that is below it, or a ``Targets`` with layer numbers. None means the attention layers, or,
    with ``last_layers``, whole blocks. A weight that is tied trains for both layers that have it.

    Nothing below the lowest trained layer needs gradients, so with ``last_layers`` the blocks in front keep no activations.

    Args:
        last_layers: k: only what lies in the last k blocks of each stack.
        head: Train the model's output head as well.
    """

    last_layers: int | None = None
    head: bool = False

    def validate(self) -> None:
        require(self.last_layers is None or self.last_layers >= 1, self, "last_layers", "it must be at least 1")

    def plan(self, anatomy: Anatomy) -> Plan:
        if self.last_layers is None:
            chosen = {site.path for site in self.sites(anatomy)}
        else:
            chosen = self._last(anatomy, self.last_layers)
        if self.head:
            chosen |= {site.path for site in anatomy.sites("head")}
        found = [(path, name) for path, name, _ in base_parameters(anatomy.root) if any(is_within(path, top) for top in chosen)]
        if not found:
            raise TargetError(
                f"LayerSelection: {', '.join(sorted(chosen))} have no parameters of their own. Choose other targets."
            )
        return Plan(tuple(Train(path, name) for path, name in found))

    def _last(self, anatomy: Anatomy, count: int) -> set[str]:
        ports = anatomy.port(BodyPort)
        short = min(ports, key=lambda port: len(port.blocks))
        if count > len(short.blocks):
            raise ConfigError(f"LayerSelection: last_layers={count}, but '{short.path}' has {len(short.blocks)} blocks.")
        blocks = {block for port in ports for block in port.blocks[-count:]}
        if self.targets is None:
            return blocks
        inside = {site.path for site in self.sites(anatomy) if any(is_within(site.path, block) for block in blocks)}
        if not inside:
            raise TargetError(f"LayerSelection: {self.targets} match nothing in the last {count} blocks. Choose other targets.")
        return inside
