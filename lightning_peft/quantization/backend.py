"""The interface between the package and a way to store quantized weights, and the list of the ways there are."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.quantization.config import Quantization, Scheme


class QuantBackend(ABC):
    """One implementation of quantized linear layers. Stateless.

    A quantized layer is a subclass of ``nn.Linear`` with the same attributes ``in_features``, ``out_features``, ``weight``
    (codes, frozen) and ``bias``. Its logical weight is (out, in), whatever shape the codes have.
    """

    name: ClassVar[str]

    @abstractmethod
    def check(self, config: Quantization) -> None:
        """Raise a typed error if the backend is not installed (with the install line) or cannot store this way."""

    @abstractmethod
    def linear(self, weight: Tensor, bias: Tensor | None, config: Quantization) -> nn.Linear:
        """Return a new quantized layer on the weight's device.

        Args:
            weight: Dense (out, in), floating point; not changed and not kept.
            bias: (out,) or None; kept dense as a frozen parameter.
            config: How to store.
        """

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Return whether ``module`` is a quantized layer of this backend; imports nothing."""

    @abstractmethod
    def config(self, module: nn.Linear) -> Quantization:
        """Return how the layer is stored."""

    @abstractmethod
    def compute_dtype(self, module: nn.Linear) -> torch.dtype:
        """Return the dtype of the layer's matrix products outside of autocast: the configured one, or :meth:`dense_dtype`.

        The layer casts its input to it and its output back.
        """

    @abstractmethod
    def dense_dtype(self, module: nn.Linear) -> torch.dtype:
        """Return the dtype of the weight before, which follows ``module.to(dtype)`` as a dense weight would.

        It is the dtype that the layer's input is likely to have, so the one for :meth:`densify`.
        """

    @abstractmethod
    def dequantize(self, module: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dense weight (out, in) of the stored state, detached, newly made.

        Args:
            module: The layer.
            dtype: None for the layer's :meth:`compute_dtype`. Rounded once, from fp32 (float64: what the codes stand for exactly).
        """

    @abstractmethod
    def requantize(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        """Store a dense weight (out, in) in place of the present one, quantized the same way.

        Returns:
            A function that puts the present codes back, bit for bit.
        """

    @abstractmethod
    def densify(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        """Turn the layer, keeping its identity, into a plain ``nn.Linear`` with the dense ``weight`` (out, in).

        The object's class changes to ``nn.Linear``; children, hooks and the instance's forward stay.

        Returns:
            A function that turns it back, bit for bit.
        """

    @abstractmethod
    def state(self, module: nn.Linear) -> dict[str, Tensor]:
        """Return every tensor of the stored weight by name (``weight``, ``weight.absmax`` ...); without the bias."""

    @abstractmethod
    def from_state(
        self, shape: tuple[int, int], state: Mapping[str, Tensor], bias: Tensor | None, config: Quantization
    ) -> nn.Linear:
        """Return the layer that had this :meth:`state`, bit for bit.

        Args:
            shape: (out, in).
            state: As :meth:`state` returned it; tensors are used, not copied.
            bias: (out,) or None.
            config: As :meth:`config` returned it.

        Raises:
            FormatError: A tensor is missing, unknown, or of the wrong shape or dtype.
        """

    @abstractmethod
    def is_plain(self, module: nn.Linear) -> bool:
        """Return whether the layer's forward is ``x @ dequantize(module).T + bias`` in :meth:`compute_dtype`, so that it can be fused.

        False for bitsandbytes' int8 on CUDA, where it quantizes its input as well, and for a subclass with a forward of its own.
        """

    def prepare(self, module: nn.Linear) -> Callable[[], None]:
        """Make a layer that somebody else quantized safe to train, read and store.

        Returns:
            A function that puts back what was changed.

        Raises:
            UnsupportedLayerError: Its weight is not quantized yet, or was changed by its owner beyond exact recovery.
        """
        return nothing

    def expected_error(self, config: Quantization) -> float:
        """Return the relative Frobenius error ‖W - Ŵ‖ / ‖W‖ that storing normally distributed weights makes."""
        return _error_on_gaussian(config.scheme, config.block_size, config.double_quant)

    def nbytes(self, module: nn.Linear) -> int:
        """Return the bytes of the stored weight with its statistics, without the bias."""
        return sum(t.numel() * t.element_size() for t in self.state(module).values())


def nothing() -> None:
    """Put back nothing."""


@functools.cache
def _error_on_gaussian(scheme: Scheme, block_size: int, double_quant: bool) -> float:
    from lightning_peft.quantization.reference import TorchReference

    reference = TorchReference()
    config = Quantization(scheme=scheme, block_size=block_size, double_quant=double_quant)
    weight = torch.randn(256, 4096, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    error = reference.dequantize(reference.linear(weight, None, config)) - weight
    return float(error.norm() / weight.norm())


def prepare(root: nn.Module) -> Callable[[], None]:
    """Prepare every quantized layer below ``root`` (:meth:`QuantBackend.prepare`), all or none.

    Returns:
        A function that puts back what was changed.
    """
    undo: list[Callable[[], None]] = []
    try:
        for module in root.modules():
            backend = backend_of(module)
            if backend is not None and isinstance(module, nn.Linear):
                undo.append(backend.prepare(module))
    except BaseException:
        _undo(undo)
        raise
    return functools.partial(_undo, undo)


def _undo(steps: list[Callable[[], None]]) -> None:
    for step in reversed(steps):
        step()


_BACKENDS: dict[str, QuantBackend] = {}


def backends() -> dict[str, QuantBackend]:
    """Return the backends by name."""
    if not _BACKENDS:  # not functools.cache, which torch.compile warns about
        from lightning_peft.quantization.bnb import BitsAndBytes
        from lightning_peft.quantization.reference import TorchReference

        _BACKENDS.update((backend.name, backend) for backend in (BitsAndBytes(), TorchReference()))
    return _BACKENDS


def backend_for(config: Quantization) -> QuantBackend:
    """Return the backend that a configuration asks for, checked.

    Raises:
        DependencyError: It is not installed.
        ConfigError: It cannot store this way.
    """
    backend = backends()["bitsandbytes" if config.backend == "auto" else config.backend]
    backend.check(config)
    return backend


def backend_of(module: nn.Module) -> QuantBackend | None:
    """Return the backend of a quantized layer, or None for any other module."""
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return None
    return next((backend for backend in backends().values() if backend.matches(module)), None)
