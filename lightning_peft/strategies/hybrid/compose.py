"""Compose: several strategies on one model as one adapter, each at its own targets; nothing in a method knows of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, optim

from lightning_peft.errors import ConfigError
from lightning_peft.quantization.config import Scheme
from lightning_peft.strategies.registry import register, resolve
from lightning_peft.strategies.schedule import Schedule, SecondPass
from lightning_peft.strategies.strategy import Calibration, PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import BuildShared, Edit, Plan
from lightning_peft.surgery.handle import Handle, Slot


@dataclass(frozen=True, kw_only=True)
class Composition(PEFTStrategy):
    """Several strategies as one: planned together, saved in one file, disabled and removed together.

    On a layer that two parts adapt they nest in the order given.
    """

    def validate(self) -> None:
        if self.targets is not None:
            raise ConfigError(f"{type(self).__name__}: `targets` belongs to the parts. Compose these with targets of their own.")
        _ = self.strategies  # parts that are made of this strategy's own fields check them

    @property
    @abstractmethod
    def strategies(self) -> tuple[PEFTStrategy, ...]:
        """The parts, in install order."""

    @property
    def mergeable(self) -> bool:
        return all(part.mergeable for part in self.strategies)

    @property
    def identity_at_init(self) -> bool:
        return all(part.identity_at_init for part in self.strategies)

    @property
    def adds_positions(self) -> bool:
        return any(part.adds_positions for part in self.strategies)

    def plan(self, anatomy: Anatomy) -> Plan:
        edits: list[Edit] = []
        shared: dict[str, BuildShared] = {}
        for index, part in enumerate(self.strategies):
            plan = part.plan(anatomy)
            edits += [edit.labelled(str(index)) for edit in plan.edits]
            shared |= {f"{index}-{name}": build for name, build in plan.shared.items()}
        return Plan(tuple(edits), shared)

    @property
    def base_quantization(self) -> Scheme | None:
        return next((part.base_quantization for part in self.strategies if part.base_quantization is not None), None)

    @property
    def from_data(self) -> bool:
        return any(part.from_data for part in self.strategies)

    def calibrate(self, handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Calibration:
        found: dict[str, Tensor] = {}
        for index, part in enumerate(self.strategies):
            if part.from_data:
                found |= part.calibrate(handle.part(str(index)), batches, loss)
        return found

    def check_base(self, anatomy: Anatomy) -> None:
        for part in self.strategies:
            part.check_base(anatomy)

    def schedule(self, handle: Handle) -> Schedule:
        schedules = [part.schedule(handle.part(str(i))) for i, part in enumerate(self.strategies)]
        if all(type(schedule) is Schedule for schedule in schedules):
            return Schedule()  # nothing is planned, so the run needs no known end
        return _Schedules(schedules)

    def group_options(self, slot: Slot) -> dict[str, float]:
        part, inner = self._owner(slot)
        return part.group_options(inner)

    def may_rest(self, slot: Slot) -> bool:
        part, inner = self._owner(slot)
        return part.may_rest(inner)

    def _owner(self, slot: Slot) -> tuple[PEFTStrategy, Slot]:
        """Return the part that owns a tensor, and the slot as that part knows it."""
        index, _, rest = slot.label.partition("-")
        return self.strategies[int(index)], replace(slot, label=rest)


@register(
    name="compose",
    family="hybrid",
    summary="Installs several strategies side by side as one adapter.",
    paper="the combination used by MAM, arXiv 2110.04366, and UniPELT, arXiv 2110.07577",
    mergeable=True,
    example={"parts": [{"class_path": "LoRA", "init_args": {"rank": 2}}, {"class_path": "BitFit"}]},
)
@dataclass(frozen=True, kw_only=True)
class Compose(Composition):
    """Several strategies as one: planned together, saved in one file, disabled and removed together.

    On a layer that two parts adapt they nest in the order given.

    Args:
        parts: Two or more strategies, names or mappings.
    """

    parts: tuple[PEFTStrategy | str | dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(resolve(part) for part in self.parts))
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if len(self.parts) < 2:
            raise ConfigError(f"Compose: parts holds {len(self.parts)} strategies; two or more make a composition.")

    @property
    def strategies(self) -> tuple[PEFTStrategy, ...]:
        return self.parts  # type: ignore[return-value]

    @property
    def suggested(self) -> tuple[float, float]:
        """The most careful ones of the parts."""
        rates, decays = zip(*(part.suggested for part in self.strategies), strict=True)
        return min(rates), max(decays)


class _Schedules(Schedule):
    """The schedules of all parts, in order."""

    def __init__(self, parts: list[Schedule]) -> None:
        self.parts = parts

    def on_start(self, total_steps: int) -> None:
        for part in self.parts:
            part.on_start(total_steps)

    def penalty(self) -> Tensor | None:
        terms = [term for part in self.parts if (term := part.penalty()) is not None]
        return sum_of(terms) if terms else None

    def second_pass(self) -> SecondPass | None:
        wishes = [wish for part in self.parts if (wish := part.second_pass()) is not None]
        if len(wishes) < 2:
            return wishes[0] if wishes else None
        outputs = {wish.outputs for wish in wishes}
        if len(outputs) > 1:
            raise ConfigError(f"Compose: its parts read the logits from different outputs, {outputs}. Give them one.")
        return SecondPass(lambda first, second: sum_of([wish.loss(first, second) for wish in wishes]), outputs.pop())

    def before_step(self, optimizer: optim.Optimizer) -> None:
        for part in self.parts:
            part.before_step(optimizer)

    def after_step(self, optimizer: optim.Optimizer | None, *, skipped: bool = False) -> None:
        for part in self.parts:
            part.after_step(optimizer, skipped=skipped)

    def on_end(self) -> None:
        for part in self.parts:
            part.on_end()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def sum_of(terms: list[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    return sum(terms[1:], terms[0])
