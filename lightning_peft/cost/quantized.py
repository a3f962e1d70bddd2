"""Quantized linear layers without numbers: as many bytes as the real ones, and the same operations around the matrix product."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.quantization.backend import QuantBackend, backends, nothing
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.product import quantized_linear


@dataclass(frozen=True)
class Stored:
    """What of a model is stored in few bits.

    Args:
        entries: Weights, by what the codes stand for.
        nbytes: Bytes of codes and statistics.
        codes: Numbers that hold codes and statistics.
        scheme: How, such as ``nf4``; None for nothing.
    """

    entries: int = 0
    nbytes: int = 0
    codes: int = 0
    scheme: str | None = None


def stored_bytes(out_features: int, in_features: int, config: Quantization) -> int:
    """Return the bytes of one quantized weight with its statistics.

    4 bits: half a byte per weight and fp32 per block (4.5 bits per weight with blocks of 64), or with double quantization a byte per
    block, fp32 per 256 blocks and one mean (4.127 bits): QLoRA, arXiv 2305.14314, section 3. Tables of values, which all layers
    have in common, are left out. int8: a byte per weight and fp32 per row.
    """
    count = out_features * in_features
    if config.scheme == "int8":
        return count + 4 * out_features
    blocks = math.ceil(count / config.block_size)
    return math.ceil(count / 2) + (blocks + 4 * math.ceil(blocks / 256) + 4 if config.double_quant else 4 * blocks)


class StoredLinear(nn.Linear):
    """A layer whose ``weight`` is a string of bytes: codes and statistics together.

    Args:
        stored: How.
        dense_dtype: dtype of the product.
        plain: The weight is unpacked for the product. bitsandbytes' int8 on CUDA quantizes the input instead.
    """

    stored: Quantization
    dense_dtype: torch.dtype
    plain: bool

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of ``x``, as bitsandbytes' layers compute."""

        def unpack(codes: Tensor, *, dtype: torch.dtype) -> Tensor:
            return unpacked(self).to(dtype)

        return quantized_linear(x, self.bias, self.dense_dtype, (self.weight,), unpack, None if self.plain else self._in_int8)

    def _in_int8(self, x: Tensor, bias: Tensor | None, codes: Tensor) -> Tensor:
        """LLM.int8 (arXiv 2208.07339) without outlier columns: the input in 8 bits, the product in int32; dense only backward."""
        rows = x.flatten(0, -2).half().to(torch.int8)
        weight = (
            codes.flatten()[: self.out_features * self.in_features].view(torch.int8).view(self.out_features, self.in_features)
        )
        out = torch._int_mm(rows, weight.T).to(torch.float16)
        out = out if bias is None else out.add_(bias)
        return out.to(x.dtype).view(*x.shape[:-1], -1)


def unpacked(layer: StoredLinear) -> Tensor:
    """Return a tensor as large as the dense weight (out, in); with double quantization the scales are unpacked first."""
    config, count = layer.stored, layer.out_features * layer.in_features
    nested = config.bits == 4 and config.double_quant
    scales = torch.empty(math.ceil(count / config.block_size), device=layer.weight.device) if nested else None
    weight = torch.empty(layer.out_features, layer.in_features, dtype=layer.dense_dtype, device=layer.weight.device)
    del scales
    return weight


class Numberless:
    """The part of a :class:`QuantBackend` that a forward pass uses, for :class:`StoredLinear`."""

    name = "estimate"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, StoredLinear)

    def config(self, module: nn.Linear) -> Quantization:
        assert isinstance(module, StoredLinear)
        return module.stored

    def compute_dtype(self, module: nn.Linear) -> torch.dtype:
        assert isinstance(module, StoredLinear)
        return module.dense_dtype

    def prepare(self, module: nn.Linear) -> Callable[[], None]:
        return nothing

    def dequantize(self, module: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
        assert isinstance(module, StoredLinear)
        return unpacked(module) if dtype is None else unpacked(module).to(dtype)

    def is_plain(self, module: nn.Linear) -> bool:
        assert isinstance(module, StoredLinear)
        return module.plain


@contextmanager
def numberless() -> Iterator[None]:
    """Let adapters find the storage of :class:`StoredLinear` inside ``with``."""
    known = backends()
    known[Numberless.name] = cast(QuantBackend, Numberless())
    try:
        yield
    finally:
        del known[Numberless.name]


def store(model: nn.Module, layers: Mapping[str, Quantization], *, on_cuda: bool) -> Stored:
    """Turn layers of a model on meta into quantized ones, in place: ``nn.Linear`` or HF's Conv1D, adapted or not."""
    entries = nbytes = codes = 0
    for path, config in layers.items():
        layer: Any = model.get_submodule(path)
        weight = layer._parameters["weight"]
        rows, columns = weight.shape if isinstance(layer, nn.Linear) else (weight.shape[1], weight.shape[0])
        size = stored_bytes(rows, columns, config)
        layer.__class__ = StoredLinear
        layer.out_features, layer.in_features = rows, columns
        layer.stored, layer.dense_dtype = config, config.dtype(weight.dtype)
        layer.plain = config.scheme != "int8" or not on_cuda
        layer._parameters["weight"] = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8, device="meta"), requires_grad=False)
        entries, nbytes, codes = entries + rows * columns, nbytes + size, codes + size
    return Stored(entries, nbytes, codes, ", ".join(sorted({config.scheme for config in layers.values()})) or None)
