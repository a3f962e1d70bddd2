"""A mixture of M copies of an adapter's two projections: one random pair in each pass of training, their averages afterwards.

AdaMix: Wang et al. 2022, "AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning", arXiv 2205.12410, sections 3.1 to 3.3:
``h + U_j φ(D_i h)`` with i and j drawn for each layer and pass; afterwards ``D̄ = mean_i D_i``, ``Ū = mean_j U_j``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import ConflictError, UnsupportedLayerError
from lightning_peft.nn.adapter import AdapterModule, BaseLayer, BuildContext, DeltaModule, MergeableModule
from lightning_peft.types import stable_seed


@dataclass(eq=False)
class Clock:
    """What all draws of a run have in common; it changes between optimizer steps only.

    Args:
        seed: Seed of the run, equal on all ranks.
        step: Optimizer steps taken.
        passes: Passes over each batch.
    """

    seed: int
    passes: int
    step: int = 0

    def draw(self, experts: int, place: str, number: int | None) -> tuple[int, int]:
        """Return the copies of the two projections that ``place`` uses in a pass, independently and uniformly drawn.

        Raises:
            ConflictError: Which pass it is cannot be known.
        """
        if number is None and self.passes > 1:
            raise ConflictError(
                f"'{place}' is recomputed in the backward pass by a checkpoint that does not know which of the {self.passes} passes over the "
                "batch it belongs to, so its routing would be another one than in the forward pass. Switch that checkpoint off (for "
                "transformers: gradient_checkpointing_disable()) and use gradient_checkpointing=True of PEFTCallback or "
                "PEFTLightningModule, or set consistency=0."
            )
        drawn = stable_seed(self.seed, self.step, number or 0, place)
        return drawn % experts, drawn // experts % experts


class MixedAdapter(AdapterModule):
    """M copies of an adapter's projections, each parameter a stack ``(M, ...)`` under the adapter's own name.

    One stack instead of M parameters: a copy that was not drawn has gradient zero and not none, so that optimizers and distributed
    training treat all alike. The copies start equal, as in the authors' code. Without a :class:`Clock` (no training runs) and in
    evaluation the averages act.

    Args:
        context: Place, dtype and seed.
        adapter: The adapter; its parameters move here.
        experts: M.
        sharing_up: The second projection has one copy only.

    Raises:
        UnsupportedLayerError: The adapter is not made of two projections.
    """

    def __init__(self, context: BuildContext, adapter: AdapterModule, *, experts: int, sharing_up: bool) -> None:
        super().__init__(context)
        if len(adapter.projections) != 2:
            raise UnsupportedLayerError(
                f"{type(adapter).__name__} at '{context.path}' is not made of two projections, of which there could be several copies. Mix "
                "lora, houlsby, pfeiffer or parallel_adapter."
            )
        self.adapter, self.experts = adapter, experts
        self.reads_base_weight, self.reads_output = adapter.reads_base_weight, adapter.reads_output
        first, second = adapter.projections
        self.copied = {name: 0 for name in first} | ({} if sharing_up else {name: 1 for name in second})
        self.routing: tuple[Clock, str] | None = None
        for name, parameter in list(adapter._parameters.items()):
            if name in self.copied and parameter is not None:
                context.claim((experts - 1) * parameter.numel())
                stack = parameter.detach().expand(experts, *parameter.shape).clone()
                parameter = nn.Parameter(stack, parameter.requires_grad)
            self.register_parameter(name, parameter)
            adapter._parameters[name] = None

    @property
    def channels_read(self) -> int:
        return self.adapter.channels_read

    def reset_parameters(self) -> None:
        stacks = [self._parameters[name] for name in self.copied]
        with torch.no_grad():
            self._with((0, 0), self.adapter.reset_parameters)
            for stack in stacks:
                if stack is not None:
                    stack[1:].copy_(stack[:1].expand_as(stack[1:]))

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        drawn = None
        if self.training and self.routing is not None:
            clock, place = self.routing
            drawn = clock.draw(self.experts, place, base.pass_number)
        out: Tensor = self._with(drawn, functools.partial(self.adapter, base, x))
        return out

    def averages(self) -> dict[str, Tensor]:
        """Return the tensors of the one adapter that acts in evaluation, by its own names."""
        own = {name: self._part(name, None).detach() for name, p in self._parameters.items() if p is not None}
        return own | dict(self.adapter.state_dict())  # which has buffers only

    def waits(self, name: str) -> bool:
        """Return whether a projection has no gradient until a copy of the other one, zero at the start, is drawn a second time."""
        first, second = self.adapter.projections
        zero = first if self.spec.kind == "embedding" else second  # which one starts at zero (LowRankAdapter)
        return name in (second if zero is first else first) and bool(self.copied.keys() & set(zero))

    def _part(self, name: str, drawn: tuple[int, int] | None) -> Tensor:
        value = self.get_parameter(name)
        if name not in self.copied:
            return value
        return value.mean(0) if drawn is None else value[drawn[self.copied[name]]]

    def _with(self, drawn: tuple[int, int] | None, call: Callable[[], Any]) -> Any:
        """Run ``call`` while the adapter has the copies ``drawn`` of its projections, or their averages.

        What stands in an instance's ``__dict__`` is found before ``nn.Module.__getattr__`` looks among the parameters.
        """
        names = [name for name, parameter in self._parameters.items() if parameter is not None]
        for name in names:
            self.adapter.__dict__[name] = self._part(name, drawn)
        try:
            return call()
        finally:
            for name in names:
                del self.adapter.__dict__[name]


class MixedMergeable(MixedAdapter, MergeableModule):
    """A mixture of adapters whose average is a change of the weight."""

    adapter: MergeableModule

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        result: tuple[Tensor, Tensor | None] = self._with(None, functools.partial(self.adapter.merged, weight, bias))
        return result


class MixedDelta(MixedAdapter, DeltaModule):
    """A mixture of adapters whose average adds a ΔW to the weight."""

    adapter: DeltaModule

    def delta(self) -> Tensor:
        result: Tensor = self._with(None, self.adapter.delta)
        return result


def build_mixed(
    context: BuildContext, *, build: Callable[[BuildContext], AdapterModule], experts: int, sharing_up: bool
) -> MixedAdapter:
    """Return the mixture of the adapter that ``build`` makes, of the class that can do what the adapter can."""
    adapter = build(context)
    kinds: tuple[tuple[type[AdapterModule], type[MixedAdapter]], ...] = (
        (DeltaModule, MixedDelta),
        (MergeableModule, MixedMergeable),
    )
    kind = next((mixed for single, mixed in kinds if isinstance(adapter, single)), MixedAdapter)
    return kind(context, adapter, experts=experts, sharing_up=sharing_up)


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """Return ``½ [KL(p ‖ q) + KL(q ‖ p)]`` of two passes, the mean over rows; the target p of each KL(p ‖ q) is a constant.

    Args:
        first: Logits (rows, classes).
        second: Those of the other pass.
    """
    wide = torch.promote_types(first.dtype, torch.float32)
    p, q = first.to(wide).log_softmax(-1), second.to(wide).log_softmax(-1)
    both = F.kl_div(q, p.detach(), reduction="sum", log_target=True) + F.kl_div(p, q.detach(), reduction="sum", log_target=True)
    return both / (2 * max(len(first), 1))
