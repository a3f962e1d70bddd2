"""``inject``: resolve a strategy, plan it for a model, install it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_peft.errors import ConflictError
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Family, anatomy_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.inject import apply_plan
from lightning_peft.types import AdapterDtype, in_pieces


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


def inject(
    model: nn.Module,
    strategy: PEFTStrategy | str | Mapping[str, Any] | list[Any],
    name: str = "default",
    *,
    adapter_dtype: AdapterDtype = "auto",
    anatomy: Family | Mapping[str, Any] | None = None,
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

    Returns:
        The handle: trains, saves, disables, merges and removes the adapter.

    Raises:
        ConfigError: The strategy or its hyperparameters are wrong.
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
    described = anatomy_of(model, anatomy)
    resolved.check_base(described)
    return apply_plan(model, resolved.plan(described), described, resolved, name=name, adapter_dtype=adapter_dtype)
