"""Calibration: what some methods start from is found in data, with the model as it is, and nothing of it is left changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, ConflictError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.strategies.install import LATER, inject
from lightning_peft.strategies.strategy import Calibration, PEFTStrategy
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.types import in_pieces

_NAME = "calibration"


def calibrate(
    model: nn.Module,
    strategy: PEFTStrategy | str | Mapping[str, Any] | list[Any],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    *,
    anatomy: Any = None,
) -> Calibration:
    """Return what the adapters of a method start from, found in data, for ``inject(..., calibration=)``.

    The model runs in eval mode, without this adapter. Its modes, buffers, gradients, ``requires_grad`` and torch's random states are
    what they were afterwards. Under ``torch.distributed`` every rank gives its own batches, and gets the result of all of them.

    Args:
        model: The adapted root, not yet adapted by this method.
        strategy: As for :func:`lightning_peft.inject`.
        batches: Training data. No more of it is drawn than the method asks for; a composition may go through it several times.
        loss: Runs the model on a batch, or on an example that was cut out of one, and returns the loss as a scalar.
        anatomy: As for :func:`lightning_peft.inject`.

    Raises:
        DataError: There are no batches, or they cannot be taken apart as the method needs it.
        ConfigError: The method needs no calibration.
        UnsupportedLayerError: The model has no values yet (meta device).
        PEFTError: As :func:`lightning_peft.inject`.
    """
    name = next(n for n in (_NAME, *(f"{_NAME}{i}" for i in range(1000))) if n not in handles(model))
    handle = inject(model, strategy, name, anatomy=anatomy, calibration=LATER)
    try:
        return measure(handle, batches, loss, model)
    finally:
        handle.remove()


def measure(handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor], around: nn.Module) -> Calibration:
    """Return the calibration of an installed adapter.

    Args:
        handle: The adapter; it is off meanwhile.
        batches: As for :func:`calibrate`.
        loss: As for :func:`calibrate`.
        around: The module that ``loss`` runs, with the adapted root in it.
    """
    strategy = handle.strategy
    if not strategy.from_data:
        raise ConfigError(f"{type(strategy).__name__} starts from no data; inject it without a calibration.")
    parameters = list(handle.root.parameters())
    if in_pieces(parameters):
        raise ConflictError(
            f"{type(strategy).__name__} is calibrated on whole weights, and those of {type(handle.root).__name__} lie in pieces (FSDP). "
            "Calibrate before sharding: lp.inject(model, strategy, calibration=lp.calibrate(model, strategy, batches, loss))."
        )
    if any(p.is_meta for p in parameters):
        raise UnsupportedLayerError(
            f"{type(strategy).__name__} is calibrated on the weights of the base, and those of {type(handle.root).__name__} are on the meta "
            "device. Load them first."
        )
    with _undisturbed(around, handle):
        found: Calibration = strategy.calibrate(handle, batches, loss)
    return found


@contextmanager
def _undisturbed(around: nn.Module, handle: Handle) -> Iterator[None]:
    """Inside, the model runs without the adapter and in eval mode; afterwards all is what it was."""
    modes = [(module, module.training) for module in around.modules()]
    # Codes and statistics of quantized weights do not move, and are large.
    plain = [module for module in around.modules() if backend_of(module) is None]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in plain
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        try:
            around.eval()
            stack.enter_context(handle.disabled())
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, before in buffers:
                    buffer.copy_(before)
                    module._buffers[name] = buffer  # a forward may have put another tensor there
            for module, mode in modes:
                module.training = mode
