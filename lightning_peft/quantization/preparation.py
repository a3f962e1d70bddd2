"""Base preparation: quantized codes that differ from plain rounding of the weights, and what an adapter has to know about them.

LoftQ (Li et al. 2023, arXiv 2310.08659, algorithm 1) alternates between quantizing W − LR and taking the best rank-r factors of what
quantization lost. One iteration leaves the plain codes Q = quant(W) and merely proposes factors, so it is an initialisation; with
more, the base itself is another one, and an adapter fits only bases that were prepared the same way.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.quantization.backend import backend_for
from lightning_peft.quantization.config import Quantization
from lightning_peft.types import strip_wrappers

# Plain attributes of a prepared layer: they go with copies and pickles of it, and into no state dict.
FACTORS, RECIPE = "_peft_factors", "_peft_recipe"


@dataclass(frozen=True, kw_only=True)
class LoftQ:
    """How to prepare a base with LoftQ.

    Args:
        rank: Rank of the factors; that of the LoRA which will start from them.
        iterations: Alternations. 1 leaves the codes as plain quantization makes them.
        targets: Names, endings of names or globs of the layers to prepare; None is every quantized layer.

    Raises:
        ConfigError: A value is out of range.
    """

    rank: int
    iterations: int = 1
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "iterations"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"loftq: {name}={value!r}, but it is an integer of at least 1.")
        if self.targets is not None:
            targets = (self.targets,) if isinstance(self.targets, str) else self.targets
            if not isinstance(targets, (list, tuple)) or not targets or not all(isinstance(t, str) and t for t in targets):
                raise ConfigError(f"loftq: targets={self.targets!r}, but it is a list of names of layers.")
            object.__setattr__(self, "targets", tuple(targets))

    @classmethod
    def parse(cls, value: LoftQ | Mapping[str, Any] | None) -> LoftQ | None:
        """Return the value that a mapping of fields spells; None stays None.

        Raises:
            ConfigError: A field is unknown or missing.
        """
        if value is None or isinstance(value, LoftQ):
            return value
        known = [field.name for field in fields(cls)]
        if not isinstance(value, Mapping) or "rank" not in value:
            raise ConfigError(f"loftq={value!r}, but it is a mapping with rank and, if you like, iterations and targets.")
        for name in value:
            if name not in known:
                raise ConfigError(f"loftq has no option {name!r}; options: {', '.join(known)}.{did_you_mean(str(name), known)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which :meth:`parse` makes this one again."""
        return {"rank": self.rank, "iterations": self.iterations, "targets": None if self.targets is None else list(self.targets)}

    def check(self, shape: Sequence[int], path: str) -> None:
        """Check that a weight of this shape has factors of the rank.

        Raises:
            ConfigError: The rank exceeds the smaller side.
        """
        if self.rank > min(shape):
            raise ConfigError(
                f"loftq: rank {self.rank} exceeds the smaller side of '{path}' {tuple(shape)}. Take a smaller rank, or name the layers "
                "to prepare with targets."
            )

    def layer(self, weight: Tensor, bias: Tensor | None, config: Quantization) -> nn.Linear:
        """Return the quantized layer of a dense weight, with its factors kept on it.

        Args:
            weight: Dense (out, in), not changed.
            bias: (out,) or None.
            config: How to store.

        """
        backend, dense = backend_for(config), weight.float()
        layer = backend.linear(weight, bias, config)
        left, right = _factors(dense - backend.dequantize(layer).float(), self.rank)
        for _ in range(1, self.iterations):
            layer = backend.linear((dense - left @ right).to(weight.dtype), bias, config)
            left, right = _factors(dense - backend.dequantize(layer).float(), self.rank)
        note(layer, (left, right), _recipe(self, config) if self.iterations > 1 else None)
        return layer


def note(layer: nn.Module, factors: tuple[Tensor, Tensor] | None, recipe: Mapping[str, Any] | None) -> None:
    """Keep on a layer what its preparation left: factors for LoRA to start from, and the recipe if the codes are not plain ones."""
    if factors is not None:
        layer.__dict__[FACTORS] = factors
    if recipe is not None:
        layer.__dict__[RECIPE] = dict(recipe)


def loftq_factors(module: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Return LoftQ's factors of a layer, on the device of its weight, or None if it was not prepared.

    Returns:
        L (out, r) and R (r, in) in fp32 with W ≈ dequantized weight + L R. LoftQ has no scaling: a LoRA with scaling c starts from
        B = L / c and A = R.
    """
    factors: tuple[Tensor, Tensor] | None = module.__dict__.get(FACTORS)
    if factors is None:
        return None
    device = next(module.parameters(recurse=False)).device
    return factors[0].to(device), factors[1].to(device)


def recipe_of(module: nn.Module) -> dict[str, Any] | None:
    """Return how the codes of a layer were made, or None for plain quantization and for a dense layer."""
    recipe: dict[str, Any] | None = module.__dict__.get(RECIPE)
    return recipe


def preparation_of(root: nn.Module) -> dict[str, Any]:
    """Return how the base below ``root`` was prepared beyond plain quantization, as plain values; ``{}`` if it was not.

    Returns:
        ``{"loftq": [{"rank", "iterations", "scheme", ..., "layers": {path with layer numbers as *: count}}]}``, with one entry for
        each different recipe. Compute dtype and backend, which change no code, are not part of it.
    """
    layers: dict[str, collections.Counter[str]] = {}
    recipes: dict[str, dict[str, Any]] = {}
    for path, module in root.named_modules():
        recipe = recipe_of(module)
        if recipe is not None:
            key = repr(sorted(recipe.items()))
            recipes[key] = recipe
            name = re.sub(r"(?<![^.])\d+(?=\.|$)", "*", strip_wrappers(path))
            layers.setdefault(key, collections.Counter())[name] += 1
    if not recipes:
        return {}
    return {"loftq": [{**recipes[key], "layers": dict(sorted(layers[key].items()))} for key in sorted(recipes)]}


def _recipe(loftq: LoftQ, config: Quantization) -> dict[str, Any]:
    return {"rank": loftq.rank, "iterations": loftq.iterations, **codes_of(config)}


def codes_of(config: Quantization) -> dict[str, Any]:
    """Return the part of a configuration that decides about the codes."""
    blocks = {"double_quant": config.double_quant, "block_size": config.block_size} if config.bits == 4 else {}
    return {"scheme": config.scheme, **blocks}


def _factors(residual: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return L (out, r), R (r, in) in fp32: the best rank-r approximation U√S, √S Vᵀ of ``residual`` (Eckart-Young).

    From the eigenvectors of the smaller Gram matrix in float64, which is much faster than a whole SVD and as exact in fp32.
    """
    wide = residual.double()
    wide = wide if residual.shape[0] <= residual.shape[1] else wide.T
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    basis = vectors[:, -rank:].flip(-1)  # eigenvalues come in ascending order
    scale = values[-rank:].flip(-1).clamp_min(0).sqrt().sqrt()  # √ of the singular values
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    near, far = basis * scale, inverse[:, None] * (basis.T @ wide)
    left, right = (near, far) if residual.shape[0] <= residual.shape[1] else (far.T, near.T)
    return left.float().contiguous(), right.float().contiguous()
