"""What strategies have in common that are made of one other and wrap its adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_peft.errors import ConfigError
from lightning_peft.nn.gates import GatedAdapter
from lightning_peft.nn.mixture import MixedAdapter
from lightning_peft.quantization.config import Scheme
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.strategy import Calibration, PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle


@dataclass(frozen=True, kw_only=True)
class Wrapping(PEFTStrategy):
    """One strategy with something around each of its adapters.

    Args:
        part: The strategy, its name or a mapping.
    """

    part: PEFTStrategy | str | dict[str, Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", resolve(self.part))
        super().__post_init__()

    def validate(self) -> None:
        if self.targets is not None:
            raise ConfigError(f"{type(self).__name__}: `targets` belongs to the part.")

    @property
    def inner(self) -> PEFTStrategy:
        """The resolved part."""
        assert isinstance(self.part, PEFTStrategy)
        return self.part

    @property
    def identity_at_init(self) -> bool:
        return self.inner.identity_at_init

    @property
    def adds_positions(self) -> bool:
        return self.inner.adds_positions

    @property
    def base_quantization(self) -> Scheme | None:
        return self.inner.base_quantization

    @property
    def suggested(self) -> tuple[float, float]:
        return self.inner.suggested

    @property
    def from_data(self) -> bool:
        return self.inner.from_data

    def calibrate(self, handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Calibration:
        return self.inner.calibrate(self.unwrapped(handle), batches, loss)

    def check_base(self, anatomy: Anatomy) -> None:
        self.inner.check_base(anatomy)

    @staticmethod
    def unwrapped(handle: Handle) -> Handle:
        """Return a view of the handle in which the part finds its own adapters."""
        view = copy.copy(handle)
        wrappers = (GatedAdapter, MixedAdapter)
        view.entries = [replace(e, adapter=e.adapter.adapter) if isinstance(e.adapter, wrappers) else e for e in handle.entries]
        return view
