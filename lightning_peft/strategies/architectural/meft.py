"""MEFT: Liao et al. 2023, "Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning", arXiv 2306.00477.

The hidden states become two streams, ``x1 = x2 = h0``. Every block computes ``y1 = λ x1 + F(x2)``, ``y2 = β x2 + G(y1)``, after which the
streams may change places; at the end ``h = (x1 + x2) / 2``. The frozen block is one of F and G, an adapter the other:

======= =================================== =================================== === === ======
variant F                                   G                                   λ   β   switch
======= =================================== =================================== === === ======
1       block with parallel adapters        adapter                             0.1 1   yes
2       adapter                             block with parallel adapters        1   0.1 yes
3       attention half, adapter behind it   MLP half with parallel adapter      0.1 0.1 no
======= =================================== =================================== === === ======

The coupling can be inverted, so the blocks keep nothing for the backward pass, which computes their inputs from their outputs. The
authors invert all blocks, and divide by λ or β in each: in fp32 the gradients of the lowest of 12 blocks are then wrong. Here every
``anchor_every``-th block keeps its two inputs.

How close the start is depends on the base: on a pretrained decoder whose last blocks change much, the table's λ, β and the mean of two
streams are far from it (SmolLM2-135M: loss 3.7 becomes 9.9, 10.1 and 19.9). ``variant=2, beta=0.01, result="block"`` starts at 3.7.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.bottleneck import Activation, BottleneckAdapter, BottleneckInit, ParallelBottleneck
from lightning_peft.nn.reversible import MEAN, Check, Coupling, StreamAdapter
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Attach, Edit, Plan
from lightning_peft.surgery.halves import half_edits
from lightning_peft.surgery.ports import BodyPort
from lightning_peft.surgery.reversible import Arrangement, reversible_edits
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.sublayers import beside

COUPLINGS = {1: Coupling(0.1, 1.0, True), 2: Coupling(1.0, 0.1, True), 3: Coupling(0.1, 0.1, False)}
# In fp32 gradients are then within 1e-5 of plain autograd's (30 blocks of SmolLM2-135M); with one block more between anchors up to 9e-5.
ANCHORS = {1: 3, 2: 3, 3: 2}
ANCHORS_LEAST = 2  # where blocks compute in 16 bits, or are divided by less than 0.1: what they read is inverted once at most


@register(
    name="meft",
    family="architectural",
    summary="Makes the blocks reversible: they keep no activations, and train small adapters.",
    paper="Make Pre-trained Model Reversible: From Parameter to Memory Efficient Fine-Tuning, arXiv 2306.00477",
    lr=5e-4,
    weight_decay=0.1,
    identity_at_init=False,
    ports=("body",),
    example={"width": 4},
)
@dataclass(frozen=True, kw_only=True)
class MEFT(PEFTStrategy):
    """Reversible blocks with bottleneck adapters. The function starts close to the base model's, and cannot be merged into it.

    The streams are kept in fp32 at least. Each block runs once more in the backward pass, so gradient checkpointing adds nothing; blocks
    sharded by FSDP are refused. A compiled training step runs the same function by plain autograd.

    Args:
        variant: Which of the table's three.
        width: Bottleneck width of the adapters.
        activation: Of the adapters.
        init: Of the adapters; ``bert`` is the authors' N(0, 0.02²).
        feed_forward: Variants 1 and 2: the adapter beside the feed-forward sub-layer of every block. False for blocks whose feed-forward
            layers are not known.
        lam: λ; None takes the variant's. Further from 0 the walk back is more accurate, and the start further from the base model.
        beta: β; as ``lam``.
        switch: Whether the streams change places between blocks; None takes the variant's.
        layers: The first so many blocks of every body are reversible, those above keep their activations; None means all.
        anchor_every: Every so many blocks keep their inputs: 1 inverts nothing, 0 keeps all activations by plain autograd. None: 3, 3
            and 2 for the three variants, 2 where blocks compute in 16 bits or λ or β is below 0.1.
        check: ``warn`` or ``raise`` where a reconstructed input is off by more than 1 %. Keeps all inputs, so it is for debugging.
        result: ``mean`` of the streams, or the stream that the last ``block`` gives. With the latter, variant 2 and a small ``beta`` the
            start is the base model's function, which the mean of two streams is not where the last blocks change much, as in decoders.
        hidden: Width of the hidden states, for models whose config does not tell it.
    """

    variant: Literal[1, 2, 3] = 1
    width: int = 8
    activation: Activation = "gelu"
    init: BottleneckInit = "bert"
    feed_forward: bool = True
    lam: float | None = None
    beta: float | None = None
    switch: bool | None = None
    layers: int | None = None
    anchor_every: int | None = None
    check: Check = "off"
    result: Literal["mean", "block"] = "mean"
    hidden: int | None = None

    def validate(self) -> None:
        require(self.width >= 1, self, "width", "it must be at least 1")
        for name in ("lam", "beta"):
            value = getattr(self, name)
            require(value is None or 0 < abs(value) < math.inf, self, name, "the walk back divides by it: finite and not 0")
        require(self.layers is None or self.layers >= 1, self, "layers", "it counts blocks: at least 1")
        require(self.anchor_every is None or self.anchor_every >= 0, self, "anchor_every", "it must be at least 0")
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "it must be at least 1")
        require(self.feed_forward or self.variant != 3, self, "feed_forward", "variant 3 has its adapters there")
        if self.targets is not None:
            raise TargetError("MEFT acts on the model's bodies; `targets` has no meaning. Choose blocks with `layers`.")

    @property
    def coupling(self) -> Coupling:
        """λ, β and switch, as given or the variant's."""
        given = {"lam": self.lam, "beta": self.beta, "switch": self.switch}
        return replace(COUPLINGS[self.variant], **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]

    @property
    def arrangement(self) -> Arrangement:
        """What F and G are, and when inputs are kept."""
        f, g = {1: ("block", "adapter"), 2: ("adapter", "block"), 3: ("attention", "mlp")}[self.variant]
        smaller = min(abs(self.coupling.lam), abs(self.coupling.beta)) < 0.1  # than any of the table
        every = (ANCHORS_LEAST if smaller else ANCHORS[self.variant]) if self.anchor_every is None else self.anchor_every
        low = ANCHORS_LEAST if self.anchor_every is None else self.anchor_every
        first = self.coupling.switch if self.variant != 1 else not self.coupling.switch  # the stream that the block writes
        result = MEAN if self.result == "mean" else (1.0, 0.0) if first else (0.0, 1.0)
        return Arrangement(f, g, self.coupling, every, low, self.check, result)  # type: ignore[arg-type]

    def plan(self, anatomy: Anatomy) -> Plan:
        bodies = anatomy.port(BodyPort)
        edits = self._adapters(anatomy)
        for port in bodies:
            total = len(port.blocks)
            count = total if self.layers is None else self.layers
            if count > total:
                raise ConfigError(f"MEFT: layers={count}, but '{port.path or type(anatomy.root).__name__}' has {total} blocks.")
            if self.variant == 3:
                edits += [edit for block in port.blocks[:count] for edit in half_edits(anatomy, block)]
                build = None
            else:
                build = functools.partial(_stream_adapter, d=self._width_of(anatomy, port), strategy=self)
            edits += reversible_edits(anatomy, port, count, self.arrangement, build)
        return Plan(tuple(edits))

    def _adapters(self, anatomy: Anatomy) -> list[Edit]:
        """Return the adapters inside the blocks."""
        edits: list[Edit] = []
        options: dict[str, Any] = {"width": self.width, "activation": self.activation, "init": self.init}
        if self.feed_forward:
            for last in self._sites(anatomy, "mlp.down"):
                first = anatomy.partner(last, "mlp.down", "mlp.up")
                if first is None:
                    raise TargetError(f"MEFT: '{last.key}' has no layer before it to lie beside. Set feed_forward=False.")
                build = functools.partial(ParallelBottleneck, inside=first.spec.in_features, scaling=1.0, **options)
                edits += [edit.labelled("ffn") for edit in beside(first, last, build)]
        if self.variant == 3:
            behind = functools.partial(BottleneckAdapter, **options)
            edits += [Attach(site, behind).labelled("attention") for site in self._sites(anatomy, "attention.output")]
        return edits

    def _sites(self, anatomy: Anatomy, role: str) -> list[Site]:
        names = anatomy.role_names(role)
        sites = [site for name in names for site in anatomy.roles[name]]
        inside = [site for site in sites if anatomy.block_of(site.path) is not None]
        if not inside or not all(site.spec.has_input for site in inside):
            remedy = "Take variant 1 or 2" if role != "mlp.down" else "Set feed_forward=False"
            raise TargetError(
                f"MEFT: the layers '{role}' of {type(anatomy.root).__name__} ({anatomy.family}) are not known, or do not run "
                f"themselves. {remedy}, or describe the model (anatomy=)."
            )
        return inside

    def _width_of(self, anatomy: Anatomy, port: BodyPort) -> int:
        known = self.hidden or port.hidden
        if known is None:
            widths = {s.spec.out_features for s in anatomy.roles.get("mlp.down", ()) if anatomy.block_of(s.path) in port.blocks}
            known = widths.pop() if len(widths) == 1 else None
        if known is None:
            raise ConfigError(f"MEFT: the width of the hidden states of {type(anatomy.root).__name__} is unknown. Set hidden.")
        return known


def _stream_adapter(context: BuildContext, *, d: int, strategy: MEFT) -> StreamAdapter:
    spec = replace(context.spec, kind="linear", out_features=d, in_features=d)
    return StreamAdapter(replace(context, spec=spec), width=strategy.width, activation=strategy.activation, init=strategy.init)
