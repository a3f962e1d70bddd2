"""LST: Sung et al. 2022, "Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv 2206.06522, section 3.

A small network runs beside the frozen model and reads its blocks through gates; no gradient, and so no stored activation, enters the
frozen model. Deviations from the paper: the side network's output is added to the frozen model's instead of taking its place, with
``Up`` zero at the start, so that training starts from the base model (``output="replace"`` is the paper's way, which needs a good
start of the side network); side blocks are pre-norm GPT-like blocks started at random, not pruned copies of the backbone's;
encoder-decoder models are refused.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from lightning_peft.errors import ConfigError, PortError, TargetError
from lightning_peft.nn.ladder import LadderNetwork
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.ports import BodyPort
from lightning_peft.surgery.side_network import is_causal, side_network_edits


@register(
    name="ladder_side_tuning",
    family="architectural",
    summary="Trains a small network beside the frozen model, which runs without gradient.",
    paper="LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, arXiv 2206.06522",
    lr=3e-3,
    ports=("body",),
    example={"reduction": 4, "heads": 2},
)
@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(PEFTStrategy):
    """A side network of width d / reduction. Its cost at inference comes on top of the base model's; it cannot be merged.

    With ``heads`` above 0 the side network attends over all positions: generate with ``use_cache=False``. Adapters inside the frozen
    body get no gradient, so other methods do not combine with this one there.

    Args:
        reduction: d divided by the width of the side network; the paper uses 8.
        heads: Attention heads of the side blocks. 0 leaves attention out; then a KV cache can be used.
        layers: Indices of the blocks that the side network reads; None means all.
        output: ``add`` to the body's output, zero at the start, or ``replace`` it, as in the paper.
        causal: Position i sees positions up to i only. None: what the model's anatomy says.
        hidden: d, for models whose config does not tell it.
    """

    reduction: int = 8
    heads: int = 4
    layers: list[int] | None = None
    output: Literal["add", "replace"] = "add"
    causal: bool | None = None
    hidden: int | None = None

    def validate(self) -> None:
        require(self.reduction >= 1, self, "reduction", "it must be at least 1")
        require(self.heads >= 0, self, "heads", "it must be at least 0")
        require(self.output in ("add", "replace"), self, "output", "it is one of add, replace")
        require(
            self.layers is None or len(set(self.layers)) == len(self.layers) > 0, self, "layers", "it names blocks, each once"
        )
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "it must be at least 1")
        if self.targets is not None:
            raise TargetError("LadderSideTuning acts on the model's body; `targets` has no meaning. Choose blocks with `layers`.")

    def plan(self, anatomy: Anatomy) -> Plan:
        ports = anatomy.port(BodyPort)
        if len(ports) > 1:
            raise PortError(
                f"LadderSideTuning runs beside one body, {type(anatomy.root).__name__} has {len(ports)}: "
                f"{', '.join(p.path for p in ports)}. Inject into the one to adapt."
            )
        port = ports[0]
        count = len(port.blocks)
        used = tuple(range(count)) if self.layers is None else tuple(sorted(self.layers))
        if not 0 <= used[0] <= used[-1] < count:
            raise ConfigError(f"LadderSideTuning: layers={list(used)}, but the model has blocks 0 to {count - 1}.")
        hidden = self.hidden or port.hidden
        if hidden is None:
            raise ConfigError(
                f"LadderSideTuning: the width of the hidden states of {type(anatomy.root).__name__} is unknown. Set hidden."
            )
        width = hidden // self.reduction
        if width < 1 or (self.heads and width % self.heads):
            raise ConfigError(
                f"LadderSideTuning: reduction={self.reduction} gives a side network of width {width} (d = {hidden}), which must be "
                f"positive and a multiple of heads={self.heads}."
            )
        build = functools.partial(
            LadderNetwork, hidden=hidden, width=width, steps=len(used), heads=self.heads, zero=self.output == "add"
        )
        causal = self.causal if self.causal is not None else self.heads > 0 and self._is_causal(anatomy, port)
        return Plan(side_network_edits(anatomy, port, used, build, output=self.output, causal=causal, attends=self.heads > 0))

    def _is_causal(self, anatomy: Anatomy, port: BodyPort) -> bool:
        known = is_causal(anatomy, port)
        if known is None:
            raise ConfigError(
                f"LadderSideTuning: whether {type(anatomy.root).__name__} is causal is unknown, and a wrong guess would let positions "
                "see the future. Set causal to True or False, or heads to 0."
            )
        return known
