"""Walks over the base model that skip adapters."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from torch import Tensor, nn

from lightning_peft.quantization.backend import backend_of
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


def base_entries(root: nn.Module, size: Callable[[Tensor], int] = Tensor.numel) -> int:
    """Return how many numbers the base model is made of; codes of quantized weights count as what they stand for.

    Args:
        root: The adapted root.
        size: Returns the entries of a parameter that is no code, where it lies in pieces those of the whole.
    """
    total = 0
    for path, name, parameter in base_parameters(root):
        module = root.get_submodule(path)
        if name == "weight" and isinstance(module, nn.Linear) and backend_of(module) is not None:
            total += module.out_features * module.in_features
        else:
            total += size(parameter)
    return total


def biases(root: nn.Module, paths: Collection[str] | None = None) -> list[tuple[str, str]]:
    """Return (path, name) of every bias, or of those of the modules at ``paths`` and their projections."""
    return [
        (path, name)
        for path, name, _ in base_parameters(root)
        if (name == "bias" or name.endswith("_bias"))
        and (paths is None or path in paths or (path.rpartition(".")[0] in paths and path.endswith("out_proj")))
    ]
