"""(IA)³: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638.

``softmax(Q (l_k ⊙ K)ᵀ / √d_h) (l_v ⊙ V)`` and ``W_2 (l_ff ⊙ φ(W_1 x))`` (section 3.3): three vectors per block, started at one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.scaling import LearnedScaling
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Edit, Plan, adapt
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import Matcher, values_for

WAYS_DOWN = ("mlp.down", "experts.down")


@register(
    name="ia3",
    family="additive",
    summary="Scales keys, values and the hidden units of the feed-forward layer by learned vectors.",
    paper="Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning, arXiv 2205.05638",
    lr=1e-2,
    mergeable=True,
    layer_kinds=frozenset({"linear", "conv", "tensor"}),
    default_roles=("attention.key", "attention.value", "mlp.down"),
)
@dataclass(frozen=True, kw_only=True)
class IA3(PEFTStrategy):
    """Learned scales on outputs, bias included, and on the inputs of the feed-forward layers' last projections.

    Args:
        feedforward: Targets whose input is scaled instead of the output, by role, name, glob or ``re:`` pattern
            (``feedforward_modules`` of HF peft). None means the last projections of feed-forward layers and of experts, as far as they
            are among the targets.
    """

    feedforward: list[str] | None = None

    def plan(self, anatomy: Anatomy) -> Plan:
        sites = self.sites(anatomy)
        if self.feedforward is None:
            matcher = Matcher(anatomy)
            down = tuple(any(matcher.is_role(site, role) for role in WAYS_DOWN) for site in sites)
        else:
            down = values_for(sites, dict.fromkeys(self.feedforward, True), False, anatomy)
        return Plan(tuple(self._edit(site, scales_input) for site, scales_input in zip(sites, down, strict=True)))

    def _edit(self, site: Site, scales_input: bool) -> Edit:
        if scales_input and site.spec.kind == "conv":
            raise UnsupportedLayerError(
                f"IA3: the input of '{site.key}' is to be scaled, which is not done for convolutions. Take it out of `feedforward`: "
                "scaling its output is."
            )
        return adapt(site, functools.partial(LearnedScaling, side="input" if scales_input else "output"))
