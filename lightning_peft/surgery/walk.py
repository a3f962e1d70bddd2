"""Walks over the base model that skip adapters."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from lightning_peft.surgery.stack import RESERVED


def base_modules(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) of the base model, each module once, without adapters."""
    for path, module in root.named_modules():
        if RESERVED not in path.split("."):
            yield path, module


def base_parameters(root: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Return (path, name, parameter) of the base model, each parameter once (tied ones under their first name)."""
    found: dict[int, tuple[str, str, nn.Parameter]] = {}
    for path, module in base_modules(root):
        for name, value in module._parameters.items():
            if value is not None:
                found.setdefault(id(value), (path, name, value))
    return list(found.values())


def biases(root: nn.Module, paths: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Return (path, name) of every bias, or of those of the modules at ``paths`` and their projections."""
    return [
        (path, name)
        for path, name, _ in base_parameters(root)
        if (name == "bias" or name.endswith("_bias"))
        and (paths is None or path in paths or (path.rpartition(".")[0] in paths and path.endswith("out_proj")))
    ]
