"""What the backends have in common: checks of what they are given, and codes that are moved and loaded without being changed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import FormatError, UnsupportedLayerError
from lightning_peft.quantization.config import Quantization
from lightning_peft.types import is_dtensor

Signature = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def check_weight(weight: Tensor, config: Quantization, dtypes: Collection[torch.dtype]) -> None:
    """Raise if a weight cannot be quantized.

    Raises:
        UnsupportedLayerError: It is not a matrix, has no values (meta) or a dtype that is not among ``dtypes``, or its number of
            bytes does not fit the storage dtype.
    """
    name = str(weight.dtype).removeprefix("torch.")
    if weight.dim() != 2 or not weight.numel():
        raise UnsupportedLayerError(
            f"A weight of shape {tuple(weight.shape)} cannot be quantized; it must be a matrix that has entries."
        )
    if weight.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        remedy = " Use the torch backend, or cast the model first." if weight.dtype == torch.float64 else ""
        raise UnsupportedLayerError(f"A weight of dtype {name} cannot be quantized, only {known}.{remedy}")
    if weight.is_meta:
        raise UnsupportedLayerError("A weight on the meta device has no values to quantize; load it first.")
    packed, size = (weight.numel() + 1) // 2, getattr(torch, config.storage_dtype).itemsize
    if config.bits == 4 and packed % size:
        raise UnsupportedLayerError(
            f"A weight of shape {tuple(weight.shape)} takes {packed} bytes, which storage_dtype={config.storage_dtype} ({size} bytes) "
            "does not divide; use storage_dtype=uint8, or leave the layer dense."
        )


def check_scales(scales: Tensor) -> None:
    """Raise :class:`UnsupportedLayerError` if the scales, or their mean, show that the weight had an entry that is no number."""
    if not bool(scales.isfinite().all()):
        raise UnsupportedLayerError(
            "The weight has entries that are NaN or infinite (int8: beyond 65504, the range of float16), which would spread over "
            "their block; repair the weight, or leave the layer dense."
        )


def check_state(state: Mapping[str, Tensor], wanted: Signature, *, optional: Collection[str] = ()) -> None:
    """Raise if a stored weight is not made of the tensors that its configuration asks for.

    Raises:
        FormatError: A tensor is missing, unknown, or of the wrong shape or dtype.
    """
    missing, unknown = set(wanted) - set(state), set(state) - set(wanted) - set(optional)
    if missing or unknown:
        parts = [f"lacks {', '.join(sorted(missing))}"] * bool(missing) + [f"has unknown {', '.join(sorted(unknown))}"] * bool(
            unknown
        )
        raise FormatError(f"The stored weight {' and '.join(parts)}; it was stored in another way than {sorted(wanted)}.")
    for name, (shape, dtype) in wanted.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(
                f"The stored weight's {name} is {tensor.dtype} {tuple(tensor.shape)}, but the shape and configuration of the layer ask "
                f"for {dtype} {shape}."
            )


def blocks(count: int, block_size: int) -> int:
    """Return how many blocks ``count`` entries take."""
    return -(-count // block_size)


def frozen(tensor: Tensor) -> nn.Parameter:
    """Return a parameter that does not train and shares the tensor's memory."""
    return nn.Parameter(tensor.detach(), requires_grad=False)


def moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor where ``fn``, the argument of ``nn.Module._apply``, would put it, bit for bit.

    Conversions of dtype leave integers alone, so that ``fn`` is given bytes. A DTensor stays: FSDP2 has put it where it belongs.
    """
    if is_dtensor(tensor):
        return tensor
    as_bytes = tensor.reshape(-1).view(torch.uint8)
    result = fn(as_bytes)
    if result.dtype != torch.uint8:  # `module.type(dtype)` converts integers as well
        result = as_bytes.to(result.device)
    return result.view(tensor.dtype).view(tensor.shape)


def converted(dtype: torch.dtype, fn: Callable[[Tensor], Tensor]) -> torch.dtype:
    """Return the dtype that ``fn``, the argument of ``nn.Module._apply``, would give a parameter of ``dtype``."""
    return fn(torch.empty(0, dtype=dtype, device="cpu")).dtype


class CodedLinear(nn.Linear):
    """A linear layer whose weight is stored as codes and statistics, which a state dict replaces all together or not at all."""

    optional: ClassVar[Collection[str]] = ()  # names of tensors that a state dict may lack

    def coded(self) -> dict[str, Tensor]:
        """Return the tensors of the stored weight by their names in the state dict."""
        raise NotImplementedError

    def recode(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold the tensors that :meth:`coded` returned; they are used, not copied."""
        raise NotImplementedError

    @contextmanager
    def _without_codes(self) -> Iterator[None]:
        """Hide the stored weight from methods of nn.Module, which would change it."""
        held = [(holder, name) for holder in (self._parameters, self._buffers) for name in self.coded() if name in holder]
        tensors: list[Any] = [holder[name] for holder, name in held]
        for holder, name in held:
            holder[name] = None
        try:
            yield
        finally:
            for (holder, name), tensor in zip(held, tensors, strict=True):
                holder[name] = tensor

    def _difference(self, name: str, given: Tensor, own: Tensor) -> str | None:
        """Say why a tensor of a state dict does not fit, or None."""
        if given.shape == own.shape and given.dtype == own.dtype:
            return None
        return f"{name} is {given.dtype} {tuple(given.shape)}, but the layer stores {own.dtype} {tuple(own.shape)}."

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = self.coded()
        given = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        new = {name: value for name, value in given.items() if name in own or name.startswith("weight.")}
        rest = {prefix + name: value for name, value in given.items() if name not in new}
        with self._without_codes():
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        missing = [name for name in own if name not in new and name not in self.optional]
        unknown = [name for name in new if name not in own]
        differing = [text for name in new if name in own and (text := self._difference(name, new[name], own[name]))]
        missing_keys.extend(prefix + name for name in missing)
        unexpected_keys.extend(prefix + name for name in unknown)
        error_msgs.extend(prefix + text for text in differing)
        if not (missing or unknown or differing):
            with torch.no_grad():
                same = (name for name in new if new[name].shape == own[name].shape and not own[name].is_meta)
                self.recode({**new, **{name: own[name].copy_(new[name]) for name in same}})
