"""How a base model is stored in few bits: one immutable value that Python, YAML and files spell with the same words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from lightning_peft.errors import ConfigError, did_you_mean

Scheme: TypeAlias = Literal["nf4", "fp4", "int8"]
BackendName: TypeAlias = Literal["auto", "bitsandbytes", "torch"]
ComputeDtype: TypeAlias = Literal["auto", "float64", "float32", "bfloat16", "float16"]
StorageDtype: TypeAlias = Literal["uint8", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How weights are stored.

    QLoRA: Dettmers et al. 2023, arXiv 2305.14314 (``nf4``, double quantization). LLM.int8: Dettmers et al. 2022, arXiv 2208.07339.

    Args:
        scheme: ``nf4`` (the 16 quantiles of a normal distribution), ``fp4`` (4-bit floating point) or ``int8`` (a scale per row).
        double_quant: 4 bits: store the blocks' scales in 8 bits as well, 4.127 instead of 4.5 bits per weight. Ignored for int8.
        block_size: 4 bits: weights that share a scale; a power of two, from 32 to 4096 for bitsandbytes.
        compute_dtype: dtype of the matrix products; the input is cast to it and the output back. ``auto`` is the dtype that the dense
            weight would have: that before quantization, after every ``model.to(dtype)`` since. Under autocast its dtype holds.
        storage_dtype: 4 bits: dtype of the tensor that holds the codes. FSDP1 shards floating dtypes only.
        threshold: int8: columns of the input with an entry beyond it are multiplied in 16 bit; 0 multiplies all in 8 bit.
        backend: ``bitsandbytes`` (CPU and CUDA kernels), ``torch`` (the reference, plain tensors, every device and float64), or
            ``auto``, which is bitsandbytes.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    scheme: Scheme = "nf4"
    double_quant: bool = True
    block_size: int = 64
    compute_dtype: ComputeDtype = "auto"
    storage_dtype: StorageDtype = "uint8"
    threshold: float = 0.0
    backend: BackendName = "auto"

    def __post_init__(self) -> None:
        literals = {"scheme": Scheme, "compute_dtype": ComputeDtype, "storage_dtype": StorageDtype, "backend": BackendName}
        for name, literal in literals.items():
            value, allowed = getattr(self, name), get_args(literal)
            if value not in allowed:
                hint = did_you_mean(str(value), allowed)
                raise ConfigError(f"Quantization: {name}={value!r} is not one of {', '.join(allowed)}.{hint}")
        size = self.block_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 2 or size & (size - 1):
            raise ConfigError(f"Quantization: block_size={size!r}, but it is a power of two.")
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"Quantization: double_quant={self.double_quant!r} is neither true nor false.")
        if not isinstance(self.threshold, (int, float)) or not 0 <= self.threshold < float("inf"):
            raise ConfigError(f"Quantization: threshold={self.threshold!r}, but it must be 0 or more.")
        # double_quant is on by default, so that it says nothing beside int8.
        idle = {"threshold": 0.0} if self.bits == 4 else {"block_size": 64, "storage_dtype": "uint8"}
        for name, default in idle.items():
            if getattr(self, name) != default:
                other = "int8 only" if self.bits == 4 else "nf4 and fp4 only; int8 has a scale per row"
                raise ConfigError(
                    f"Quantization: {name}={getattr(self, name)!r} has no effect on {self.scheme}; it is for {other}."
                )

    @classmethod
    def parse(cls, value: Quantization | str | Mapping[str, Any]) -> Quantization:
        """Return the value that a scheme's name, or a mapping of fields, spells.

        Raises:
            ConfigError: A field is unknown, or a value is.
        """
        if isinstance(value, Quantization):
            return value
        if isinstance(value, str):
            return cls(scheme=value)  # type: ignore[arg-type]
        if not isinstance(value, Mapping):
            raise ConfigError(f"quantization={value!r} is neither a scheme such as 'nf4' nor a mapping of options.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                raise ConfigError(
                    f"Quantization has no option {name!r}; options: {', '.join(known)}.{did_you_mean(str(name), known)}"
                )
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which :meth:`parse` makes this one again."""
        return dataclasses.asdict(self)

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return 8 if self.scheme == "int8" else 4

    def dtype(self, dense: torch.dtype) -> torch.dtype:
        """Return the dtype of the matrix products of a layer whose weight had the dtype ``dense``."""
        return dense if self.compute_dtype == "auto" else getattr(torch, self.compute_dtype)
