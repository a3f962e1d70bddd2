"""LST: Sung et al. 2022, "Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", arXiv 2206.06522, section 3.

A small network runs beside the frozen model and reads its blocks through gates; no gradient, and so no stored activation, enters the
frozen model. Of an encoder-decoder model both stacks have one, and the decoder's attends to the encoder's. Deviations from the paper:
the side network's output is added to the frozen model's instead of taking its place, with ``Up`` zero at the start, so that training
starts from the base model (``output="replace"`` is the paper's way, which needs a good start of the side network); side blocks are
pre-norm GPT-like blocks of the base's widths over ``reduction``, whatever the base's blocks are; they start at random, or with
``init="pruned"`` from the base's weights by their L1 norm, which needs no data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.errors import ConfigError, PortError, TargetError
from lightning_peft.nn.ladder import LadderNetwork, UpStart
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.base_blocks import block_weights, feed_forward_width, head_count
from lightning_peft.surgery.edits import Plan, Tap
from lightning_peft.surgery.ports import BodyPort
from lightning_peft.surgery.side_network import Output, hide_memory, is_causal, pair_of, side_network_edits


@register(
    name="ladder_side_tuning",
    family="architectural",
    summary="Trains a small network beside the frozen model, which runs without gradient.",
    paper="LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning, arXiv 2206.06522",
    version=2,
    lr=3e-3,
    ports=("body",),
    example={"reduction": 4, "heads": 2},
)
@dataclass(frozen=True, kw_only=True)
class LadderSideTuning(PEFTStrategy):
    """A side network of width d / reduction. Its cost at inference comes on top of the base model's; it cannot be merged.

    With attention the side network looks at all positions: generate with ``use_cache=False``. Adapters inside the frozen body get no
    gradient, so other methods do not combine with this one there.

    Args:
        reduction: d divided by the width of the side network; the paper uses 8. The MLPs are as much narrower than the base's.
        heads: Attention heads of the side blocks; None: as many as the base's, or the most of them that divide the width. 0 leaves
            attention out; then a KV cache can be used, and of an encoder-decoder model only the decoder has a side network.
        layers: Indices of the blocks that the side network reads, of every stack; None means all.
        output: ``add`` to the body's output, zero at the start, or ``replace`` it, as in the paper.
        init: Of the side blocks: ``random``, or ``pruned`` from the base's.
        causal: Position i sees positions up to i only. None: what the model's anatomy says.
        hidden: d, for models whose config does not tell it.
        expansion: Width inside the side blocks' MLPs over their width; None: as above.
    """

    reduction: int = 8
    heads: int | None = None
    layers: list[int] | None = None
    output: Literal["add", "replace"] = "add"
    init: Literal["random", "pruned"] = "random"
    causal: bool | None = None
    hidden: int | None = None
    expansion: int | None = None

    def validate(self) -> None:
        require(self.reduction >= 1, self, "reduction", "it must be at least 1")
        require(self.heads is None or self.heads >= 0, self, "heads", "it must be at least 0")
        require(
            self.layers is None or len(set(self.layers)) == len(self.layers) > 0, self, "layers", "it names blocks, each once"
        )
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "it must be at least 1")
        require(self.expansion is None or self.expansion >= 1, self, "expansion", "it must be at least 1")
        if self.targets is not None:
            raise TargetError("LadderSideTuning acts on the model's body; `targets` has no meaning. Choose blocks with `layers`.")

    @classmethod
    def upgrade(cls, init_args: dict[str, Any], version: int) -> dict[str, Any]:
        """Version 1 had MLPs of four times the side network's width."""
        return {"expansion": 4, **init_args} if version == 1 else super().upgrade(init_args, version)

    def plan(self, anatomy: Anatomy) -> Plan:
        bodies, pair = anatomy.port(BodyPort), pair_of(anatomy)
        if len(bodies) > 1 and pair is None:
            raise PortError(
                f"LadderSideTuning runs beside one body, or beside an encoder and its decoder; {type(anatomy.root).__name__} has "
                f"{len(bodies)}: {', '.join(p.path for p in bodies)}. Inject into the one to adapt."
            )
        if pair is None or self.heads == 0:
            return Plan(self._edits(anatomy, bodies[-1], self.output))
        encoder, decoder = pair
        if encoder.hidden != decoder.hidden and not self.hidden:
            raise PortError(
                f"the hidden states of encoder and decoder are {encoder.hidden} and {decoder.hidden} wide, so the decoder cannot be "
                "handed what the encoder's side network gives. Inject into one of them, or take heads=0."
            )
        width = self._width(anatomy, encoder)[1]
        first = self._edits(anatomy, encoder, "hand_on")
        return Plan((*first, *self._edits(anatomy, decoder, self.output, memory=width), hide_memory(width)))

    def _width(self, anatomy: Anatomy, port: BodyPort) -> tuple[int, int, int]:
        """Return d, the side network's width, and its heads."""
        hidden = self.hidden or port.hidden
        if hidden is None:
            raise ConfigError(
                f"LadderSideTuning: the width of the hidden states of {type(anatomy.root).__name__} is unknown. Set hidden."
            )
        width = hidden // self.reduction
        heads = math.gcd(head_count(anatomy, port) or 4, width) if self.heads is None else self.heads
        if width < 1 or (heads and width % heads):
            raise ConfigError(
                f"LadderSideTuning: reduction={self.reduction} gives a side network of width {width} (d = {hidden}), which must be "
                f"positive and a multiple of heads={heads}."
            )
        return hidden, width, heads

    def _edits(self, anatomy: Anatomy, port: BodyPort, output: Output, memory: int | None = None) -> tuple[Tap, ...]:
        """Return the edits for one body."""
        count = len(port.blocks)
        used = tuple(range(count)) if self.layers is None else tuple(sorted(self.layers))
        if not 0 <= used[0] <= used[-1] < count:
            raise ConfigError(f"LadderSideTuning: layers={list(used)}, but the model has blocks 0 to {count - 1}.")
        hidden, width, heads = self._width(anatomy, port)
        inner = self.expansion and self.expansion * width
        if inner is None:
            inner = (feed_forward_width(anatomy, port) or 4 * hidden) // self.reduction
        starts: dict[Output, UpStart] = {"add": "zero", "replace": "random", "hand_on": "none"}
        pruned: Callable[[], Any] | None = None
        if self.init == "pruned":
            pruned = block_weights(anatomy, [port.blocks[i] for i in used], hidden=hidden, inner=inner)
        build = functools.partial(
            LadderNetwork, hidden=hidden, width=width, inner=inner, steps=len(used), heads=heads, up=starts[output],
            cross=memory is not None, pruned=pruned,
        )  # fmt: skip
        causal = self.causal if self.causal is not None else heads > 0 and self._is_causal(anatomy, port)
        return side_network_edits(anatomy, port, used, build, output=output, causal=causal, attends=heads > 0, memory=memory)

    def _is_causal(self, anatomy: Anatomy, port: BodyPort) -> bool:
        known = is_causal(anatomy, port)
        if known is None:
            raise ConfigError(
                f"LadderSideTuning: whether {type(anatomy.root).__name__} is causal is unknown, and a wrong guess would let positions "
                "see the future. Set causal to True or False, or heads to 0."
            )
        return known
