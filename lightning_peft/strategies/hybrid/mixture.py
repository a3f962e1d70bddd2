"""Mixture: any strategy whose adapters are made of two projections, with M copies of these in training and their averages afterwards.

AdaMix: Wang et al. 2022, "AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", arXiv 2205.12410, sections 3.1 to 3.3:
each pass draws one copy of each projection in each layer; the loss is ``CE(p) + λ ½ [KL(p ‖ q) + KL(q ‖ p)]`` with p, q from two passes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, optim

from lightning_peft.errors import ConfigError
from lightning_peft.nn.mixture import Clock, MixedAdapter, build_mixed, consistency
from lightning_peft.strategies.additive.houlsby import HoulsbyAdapter
from lightning_peft.strategies.hybrid.wrapping import Wrapping
from lightning_peft.strategies.install import exchange
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.schedule import Schedule, SecondPass
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.handle import Handle, Slot


@register(
    name="mixture",
    family="hybrid",
    summary="Trains several copies of a strategy's projections, one random pair at a time, and deploys their average.",
    paper="the routing of AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, arXiv 2205.12410",
    mergeable=True,
    example={"part": {"class_path": "LoRA", "init_args": {"rank": 2}}, "experts": 2},
)
@dataclass(frozen=True, kw_only=True)
class Mixture(Wrapping):
    """Copies of the two projections of every adapter: those of LoRA, and of the bottleneck adapters.

    In training each optimizer step draws one copy of each projection for each layer, the same for all batches that it accumulates and on
    all ranks. With ``consistency`` every batch runs a second time, with other copies (and other dropout), and the two outputs are drawn
    to each other: about twice the time and the activations of a step, of which ``estimate`` counts one pass. Evaluation, merging and
    :meth:`deploy` take the averages.

    Args:
        part: The strategy, its name or a mapping.
        experts: M, the number of copies.
        sharing_up: The second projection has one copy only.
        consistency: λ; 0 leaves the second pass out.
        outputs: Where the logits are in what the adapted root returns, if not in ``logits``: the name of an attribute or key, a
            position in a tuple such as ``"0"``, or ``"."`` for all of it.
    """

    experts: int = 4
    sharing_up: bool = True
    consistency: float = 1.0
    outputs: str | None = None

    def validate(self) -> None:
        super().validate()
        require(self.experts >= 1, self, "experts", "it must be at least 1")
        require(0 <= self.consistency < float("inf"), self, "consistency", "it must be at least 0 and finite")
        if type(self.inner).schedule is not PEFTStrategy.schedule:
            raise ConfigError(
                f"{type(self).__name__}: {type(self.inner).__name__} has a schedule of its own, so it cannot be mixed."
            )

    @property
    def mergeable(self) -> bool:
        return self.inner.mergeable

    def plan(self, anatomy: Anatomy) -> Plan:
        mix = functools.partial(build_mixed, experts=self.experts, sharing_up=self.sharing_up)
        return self.inner.plan(anatomy).changed(lambda edit: edit.wrapped(mix))

    def schedule(self, handle: Handle) -> Schedule:
        return Routing(handle, self.consistency, self.outputs)

    def group_options(self, slot: Slot) -> dict[str, float]:
        own, stacked = (
            self.inner.group_options(slot),
            isinstance(slot.owner, MixedAdapter) and slot.attribute in slot.owner.copied,
        )
        if stacked and slot.tensor().dim() == 2:  # biases, which do not decay, though a stack of them looks like a matrix
            return {"weight_decay": 0.0, **own}
        return own

    def may_rest(self, slot: Slot) -> bool:
        if isinstance(slot.owner, MixedAdapter) and slot.owner.waits(slot.attribute):
            return True
        return self.inner.may_rest(slot)

    @staticmethod
    def deploy(handle: Handle, *, anatomy: Any = None) -> Handle:
        """Put the averaged adapter, a plain one of the mixed strategy, in the place of a mixture.

        It gives the outputs that the mixture gives in evaluation, has the size of one expert, and is saved, merged and served like any
        adapter of its strategy. The mixture is gone afterwards.

        Args:
            handle: The mixture's.
            anatomy: As for :func:`lightning_peft.inject`, if it was given there.

        Returns:
            The plain adapter's handle, of the same name.

        Raises:
            ConfigError: The adapter is no mixture.
            MergeError: It is merged.
            ConflictError: There are other adapters on the model, in whose order of installation its place would be another one.
        """
        strategy = handle.strategy
        if not isinstance(strategy, Mixture):
            raise ConfigError(
                f"deploy(): adapter '{handle.name}' is a {type(strategy).__name__}, and only a mixture has averages."
            )
        handle._forbid_merged("deploy()")
        state = {key: tensor.clone() for key, tensor in handle.state_dict().items()}
        own = [entry for entry in handle.entries if isinstance(entry.adapter, MixedAdapter)]
        for entry in own:
            assert isinstance(entry.adapter, MixedAdapter)
            prefix = f"{entry.key}." if entry.key else ""
            state = {key: tensor for key, tensor in state.items() if not key.startswith(f"{prefix}adapter.")}
            state |= {prefix + name: tensor.clone() for name, tensor in entry.adapter.averages().items()}
        dtype = next(own[0].adapter.parameters()).dtype
        plain = exchange(handle, strategy.inner, "deploy()", dtype=dtype, anatomy=anatomy)
        plain.load_state_dict(state)
        return plain


class Routing(Schedule):
    """Counts the steps that routing depends on, and asks for the second pass."""

    def __init__(self, handle: Handle, weight: float, outputs: str | None) -> None:
        self.weight, self.outputs = weight, outputs
        entries = [e for e in handle.entries if isinstance(e.adapter, MixedAdapter)]
        self.places = [(e.adapter, e.key) for e in entries]
        self.clock = Clock(self.places[0][0].seed, passes=2 if weight else 1)  # type: ignore[arg-type]

    def on_start(self, total_steps: int) -> None:
        for adapter, place in self.places:
            adapter.routing = (self.clock, place)  # type: ignore[assignment]

    def second_pass(self) -> SecondPass | None:
        return SecondPass(self._loss, self.outputs) if self.weight else None

    def _loss(self, first: Tensor, second: Tensor) -> Tensor:
        return self.weight * consistency(first, second)

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        self.clock.step += not skipped

    def on_end(self) -> None:
        for adapter, _ in self.places:
            adapter.routing = None  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.clock.step, "seed": self.clock.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock.step, self.clock.seed = state["step"], state["seed"]


@register(
    name="adamix",
    family="hybrid",
    summary="A mixture of bottleneck adapters with random routing, drawn to one function and averaged for use.",
    paper="AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning, arXiv 2205.12410",
    lr=3e-4,
    weight_decay=0.1,
    mergeable=True,
    example={"part": {"class_path": "PfeifferAdapter", "init_args": {"width": 4, "activation": "gelu"}}, "experts": 2},
)
@dataclass(frozen=True, kw_only=True)
class AdaMix(Mixture):
    """:class:`Mixture` with the paper's hyperparameters: bottlenecks of width 16 behind the feed-forward sub-layers.

    Args:
        part: What is mixed instead, such as ``LoRA`` (the paper's other kind), ``HoulsbyAdapter`` or ``PfeifferAdapter``.
        experts: M, the number of copies.
        sharing_up: The second projection has one copy only, as in the authors' runs.
        consistency: λ; 0 leaves the second pass out.
        outputs: As of :class:`Mixture`.
    """

    part: PEFTStrategy | str | dict[str, Any] = field(
        default_factory=functools.partial(HoulsbyAdapter, targets="mlp.down", width=16)
    )

    @property
    def suggested(self) -> tuple[float, float]:
        return self.info.lr, self.info.weight_decay
