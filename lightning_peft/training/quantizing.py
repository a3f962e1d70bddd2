"""Quantizing the base of a LightningModule before its adapter is installed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_peft.errors import ConfigError, ConflictError, UnsupportedLayerError
from lightning_peft.loading.quantize import quantize, require_same
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Train
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.selection import select
from lightning_peft.surgery.tree import join
from lightning_peft.training.adapted_root import path_of, strip_root

CASTS = {"16-true": "float16", "bf16-true": "bfloat16", "64-true": "float64"}


def quantize_base(
    asked: QuantizeOptions,
    path: str,
    anatomy: Anatomy,
    strategy: PEFTStrategy,
    extras: Iterable[nn.Module],
    given: dict[str, Any] | str | None,
) -> None:
    """Quantize the adapted root, unless it is stored that way already; extra modules, which train whole, stay dense.

    Args:
        asked: What to do; names of layers as the user sees them, or relative to the root.
        path: Path of the root in the LightningModule.
        anatomy: The root.
        strategy: What will be installed; planned first, so that a wrong target is found while the weights are still there.
        extras: Extra modules.
        given: The user's own description of the architecture.

    Raises:
        PEFTError: As :func:`lightning_peft.quantize`; or the strategy trains a weight that would be quantized. Nothing is changed.
    """
    root = anatomy.root
    if require_same(root, asked):
        return
    local = strip_root(asked, path, anatomy)
    own = {name for extra in extras if (name := path_of(root, extra)) is not None}
    local = local.skipping(sorted(own))
    chosen = {join(name, "weight") for name in select(anatomy, local.config, local.skip).paths}
    for edit in strategy.plan(anatomy).edits:
        if isinstance(edit, Train) and (key := join(edit.path, edit.tensor)) in chosen:
            raise UnsupportedLayerError(
                f"{type(strategy).__name__} trains '{key}' itself, which cannot be done to a quantized weight. Leave the layer dense: "
                f"quantization with skip=['{edit.path}']."
            )
    quantize(root, local, anatomy=given)


def check_quantized(root: nn.Module, checkpoint: str) -> None:
    """Refuse what cannot work with a quantized base.

    Raises:
        ConfigError: A checkpoint is to hold the base, whose quantized layers could not read it back.
    """
    if checkpoint == "full" and any(backend_of(module) is not None for module in root.modules()):
        raise ConfigError(
            "checkpoint='full' with a quantized base: torch cannot load quantized weights from a .ckpt. Use checkpoint='adapter', which "
            "resumes exactly, and keep the base itself with lp.save_quantized(base, folder)."
        )


def check_run(handle: Handle, trainer: Any, merge_on_end: bool | str) -> None:
    """Refuse settings of a run that would damage a quantized base, or end in an error after training.

    Raises:
        ConfigError: ``merge_on_end`` does not say what becomes of quantized weights; or the Trainer's precision would cast the codes.
    """
    adapted = next((entry.path for entry in handle.entries if backend_of(entry.module) is not None), None)
    if merge_on_end is True and adapted is not None:
        raise ConfigError(
            f"merge_on_end=True, but '{adapted}' is quantized and cannot hold the sum exactly. Say merge_on_end='requantize' (rounded to "
            "the same storage) or 'dense' (unquantized layers)."
        )
    cast = CASTS.get(str(getattr(trainer, "precision", "")))
    for path, module in handle.root.named_modules():
        backend = backend_of(module)
        if backend is None or cast is None:
            continue
        assert isinstance(module, nn.Linear)
        stored = backend.config(module).storage_dtype
        if stored not in ("uint8", cast):
            raise ConfigError(
                f"precision='{trainer.precision}' would cast the codes of '{path}', which lie in {stored}. Take storage_dtype 'uint8' or "
                f"'{cast}', or the precision 'bf16-mixed'."
            )


def require_before(handle: Handle, asked: QuantizeOptions) -> None:
    """Refuse to quantize below an adapter.

    Raises:
        ConflictError: The adapter is installed on a dense base, or on one that is stored in another way.
    """
    if not require_same(handle.root, asked):
        raise ConflictError(
            f"adapter '{handle.name}' is installed already, and the base is dense. Quantize before injecting: remove() the adapter, and "
            "let the callback do both."
        )
