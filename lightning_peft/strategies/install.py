"""``inject``: resolve a strategy, plan it for a model, install it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.strategy import Calibration, PEFTStrategy
from lightning_peft.surgery.anatomy import Family, anatomy_of
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.surgery.inject import apply_plan
from lightning_peft.types import AdapterDtype, in_pieces

LATER: Literal["later"] = "later"


def reinstall(
    model: nn.Module,
    strategy: PEFTStrategy,
    name: str,
    *,
    adapter_dtype: AdapterDtype,
    anatomy: Family | Mapping[str, Any] | None = None,
    room: int | None = None,
) -> Handle:
    """Install the adapters of ``strategy`` for tensors that were trained before: :func:`inject`, on any base that they fit.

    A method may start from a quantized base only, but what it has trained also runs on the dense one, and the other way round.

    Args:
        model: The adapted root.
        strategy: Read from a file, so that nothing is made of its word that takes more memory than the file does.
        name: Name of the adapter.
        adapter_dtype: dtype of its parameters.
        anatomy: As for :func:`inject`.
        room: How many numbers the trained tensors have together.

    Raises:
        FormatError: The strategy asks for more than that.
        PEFTError: As :func:`inject`.
    """
    described = anatomy_of(model, anatomy)
    plan = strategy.plan(described)
    return apply_plan(model, plan, described, strategy, name=name, adapter_dtype=adapter_dtype, room=room)


def exchange(handle: Handle, strategy: PEFTStrategy, action: str, *, dtype: torch.dtype, anatomy: Any = None) -> Handle:
    """Put a fresh adapter of another strategy in the place of one, with its name and with what is known of its base and its task.

    Args:
        handle: The adapter that goes.
        strategy: Of the one that comes.
        action: Who asks, for the errors.
        dtype: Of the new adapter's parameters.
        anatomy: As for :func:`inject`.

    Raises:
        MergeError: The adapter is merged.
        ConflictError: There are other adapters on the model, in whose order of installation its place would be another one.
        PEFTError: As :func:`inject`. Nothing is gone then.
    """
    root, name, usage, installer = handle.root, handle.name, handle.usage, handle.installer
    handle._forbid_merged(action)
    if len(handles(root)) > 1:
        raise ConflictError(f"{action} of adapter '{name}': remove() the other adapters of the model first.")
    strategy.plan(anatomy_of(root, anatomy))
    handle.remove()
    fresh = reinstall(root, strategy, name, adapter_dtype=str(dtype).removeprefix("torch."), anatomy=anatomy)  # type: ignore[arg-type]
    fresh.usage, fresh.installer = usage, installer
    return fresh


def inject(
    model: nn.Module,
    strategy: PEFTStrategy | str | Mapping[str, Any] | list[Any],
    name: str = "default",
    *,
    adapter_dtype: AdapterDtype = "auto",
    anatomy: Family | Mapping[str, Any] | None = None,
    calibration: Calibration | Literal["later"] | None = None,
) -> Handle:
    """Freeze ``model`` and install the adapters of ``strategy`` on it, in place.

    Installing changes no module's class, no parameter name, no state-dict key and no value of the base. If anything is wrong, a
    typed error comes before the first change.

    Args:
        model: Any module; it becomes the adapted root.
        strategy: A strategy, its name, a mapping as YAML holds it, or a list of these, which composes.
        name: Name of the adapter; several with different names live on one model.
        adapter_dtype: dtype of adapter parameters; ``auto`` is fp32 (float64 on a float64 base).
        anatomy: Roles of an architecture that the package does not know.
        calibration: For methods that start from data what :func:`lightning_peft.calibrate` returned; ``later`` if it comes from there,
            or from a file, before training. Until then the adapter changes nothing.

    Returns:
        The handle: trains, saves, disables, merges and removes the adapter.

    Raises:
        ConfigError: The strategy or its hyperparameters are wrong, or a calibration is missing or not wanted.
        CompatibilityError: The calibration is of another strategy or base.
        TargetError: Targets match nothing, or nothing that can be adapted.
        UnsupportedLayerError: A layer, or the way in which its weight is stored, is none for this method.
        PortError: The model lacks a port that the method needs.
        ConflictError: The name is taken, edits contradict each other, or the model is sharded.
    """
    resolved = resolve(strategy)
    if in_pieces(model.parameters()):
        raise ConflictError(
            f"{type(model).__name__} is sharded already (FSDP), and adapters have to be there before. Inject between building the model and "
            "sharding it."
        )
    if resolved.from_data and calibration is None:
        raise ConfigError(
            f"{type(resolved).__name__} starts from training data. Pass calibration=lp.calibrate(model, strategy, batches, loss), or let "
            "PEFTCallback take it from the train dataloader."
        )
    if not resolved.from_data and calibration is not None:
        raise ConfigError(f"{type(resolved).__name__} starts from no data; leave calibration out.")
    described = anatomy_of(model, anatomy)
    resolved.check_base(described)
    handle = apply_plan(model, resolved.plan(described), described, resolved, name=name, adapter_dtype=adapter_dtype)
    if calibration == LATER:
        handle.calibrated = False
    elif calibration is not None:
        try:
            start_from(handle, calibration)
        except BaseException:
            handle.remove()
            raise
    return handle


def start_from(handle: Handle, calibration: Calibration) -> None:
    """Copy a calibration into the adapter; all tensors are checked before the first is written.

    Raises:
        CompatibilityError: It is of another strategy or another base, or empty.
    """
    if not calibration:
        raise CompatibilityError(
            f"the calibration is empty, and {type(handle.strategy).__name__} starts from one. Calibrate with this strategy: "
            "lp.calibrate(model, strategy, batches, loss)."
        )
    slots = {slot.key: slot for slot in handle.slots}
    for key, value in calibration.items():
        if key not in slots or slots[key].tensor().shape != value.shape:
            raise CompatibilityError(
                f"the calibration holds '{key}' {tuple(value.shape)}, for which {type(handle.strategy).__name__} has no place on this base. "
                "Calibrate with this strategy: lp.calibrate(model, strategy, batches, loss)."
            )
    with torch.no_grad():
        for key, value in calibration.items():
            slots[key].tensor().copy_(value)
    handle.calibrated = True
