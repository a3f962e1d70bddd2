"""bitsandbytes' ``Linear4bit`` and ``Linear8bitLt`` with a forward, moves, copies and loading that change no stored bit.

Measured on bitsandbytes 0.50.2, each of these happens without an error:

- On CPUs with AVX512-BF16 ``Linear4bit`` repacks its weight at the first forward in evaluation and rounds its scales to bf16.
  Afterwards it has no gradient and its dequantization is garbage.
- On CPUs with AVX512 its product takes the wrong scales where the block size does not divide ``in_features``: relative error 0.3
  to 0.7. The same holds for ``dequantize_4bit``.
- Both layers cast their bias, a value of the base model, to the dtype of whatever input comes along.
- ``Linear8bitLt`` on the CPU computes another function in evaluation than in training, and logs a warning at each forward.
- Neither loads its own state dict (8 bits: after the first forward), copies keep the original layer alive, and
  ``module.to(dtype)`` converts codes that lie in a floating dtype as if they were numbers.

The layers made here are subclasses of bitsandbytes', so that whoever looks for those finds them, and use its kernels.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import DependencyError, UnsupportedLayerError
from lightning_peft.quantization import codes
from lightning_peft.quantization.product import quantized_linear
from lightning_peft.quantization.reference import unpack_4bit
from lightning_peft.quantization.stored import CodedLinear, converted, moved
from lightning_peft.types import is_dtensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMAT = "weight_format"  # 8 bits: a constant that older files lack
_BLOB = "weight.quant_state."
_INSTALL = "pip install 'lightning-peft[quantization]'"
_NAMES = ("Linear4bit", "Linear8bitLt")
_KINDS: dict[type, str | None] = {}


def require() -> Any:
    """Return the module bitsandbytes.

    Raises:
        DependencyError: It is missing or older than 0.50.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise DependencyError(
            f"Layers quantized by bitsandbytes need that package: {_INSTALL}. Or use backend='torch'."
        ) from error
    if tuple(int(part) for part in bitsandbytes.__version__.split(".")[:2]) < (0, 50):
        raise DependencyError(f"bitsandbytes {bitsandbytes.__version__} is too old, 0.50 is needed: {_INSTALL}")
    return bitsandbytes


@contextmanager
def usual_defaults() -> Iterator[None]:
    """Run bitsandbytes' own constructors under PyTorch's usual default dtype and device.

    It makes its tables in the default dtype and keeps them for the process: made under Lightning's ``precision="bf16-true"``, they
    would stay rounded.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def kind(cls: type) -> str | None:
    """Return ``Linear4bit`` or ``Linear8bitLt`` for bitsandbytes' classes and their subclasses, else None; imports nothing."""
    if cls not in _KINDS:  # not functools.cache, which torch.compile warns about
        names = (c.__name__ for c in cls.__mro__ if c.__module__.startswith("bitsandbytes."))
        _KINDS[cls] = next((name for name in names if name in _NAMES), None)
    return _KINDS[cls]


def is_8bit(layer: nn.Module) -> bool:
    """Return whether a layer for which :func:`kind` holds is ``Linear8bitLt``."""
    return "quant_state" not in vars(layer)


def quant_state(layer: Any, *, repacked: bool = False) -> Any:
    """Return the ``QuantState`` of a ``Linear4bit``.

    Args:
        layer: The layer.
        repacked: Whether it may have been repacked, which rounds its scales.

    Raises:
        UnsupportedLayerError: The weight is not quantized yet, or was repacked.
    """
    state = getattr(layer.weight, "quant_state", None)
    state = layer.quant_state if state is None else state  # FSDP replaces the parameter, and the layer remembers
    if state is None:
        raise UnsupportedLayerError(
            "This Linear4bit holds a weight that is not quantized yet: call .to(device) on it, or let lp.quantize quantize the model."
        )
    # Its state_dict() packs back in place, with rounded scales, and drops the flag; the other mark stays.
    was_repacked = getattr(state, "packing_format_for_cpu", False) or hasattr(state, "original_qshape")
    if was_repacked and not repacked:
        raise UnsupportedLayerError(
            "bitsandbytes has repacked this Linear4bit for inference on the CPU, at a forward in evaluation, and has rounded its "
            "scales; the weight cannot be recovered exactly. Load the model again and quantize it with lp.quantize, or adapt it "
            "before its first forward."
        )
    return state


def row_scales(layer: Any) -> Tensor:
    """Return the scales of a ``Linear8bitLt`` (out,), which its own first forward moves from the weight to ``layer.state``.

    Raises:
        UnsupportedLayerError: The weight is not quantized yet.
    """
    scales = getattr(layer.weight, "SCB", None)
    scales = layer.state.SCB if scales is None else scales
    if scales is None or layer.weight.dtype != torch.int8:
        raise UnsupportedLayerError(
            "This Linear8bitLt holds a weight that is not quantized yet: call .to(device) on it, or let lp.quantize quantize the model."
        )
    return scales.detach()  # type: ignore[no-any-return]


def coded(layer: Any) -> dict[str, Tensor]:
    """Return the tensors of a layer's stored weight by their names in its state dict."""
    weight = layer.weight.detach()
    with usual_defaults():
        if is_8bit(layer):
            return {"weight": weight, "SCB": row_scales(layer), FORMAT: torch.tensor(0, dtype=torch.uint8)}
        statistics = quant_state(layer).as_dict(packed=True)
    return {"weight": weight, **{f"weight.{name}": tensor.detach() for name, tensor in statistics.items()}}


def recode(layer: Any, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer the weight that :func:`coded` returned; tensors are used, not copied."""
    bnb = require()
    weight = tensors["weight"].detach()
    if is_8bit(layer):
        hold_int8(layer, weight, tensors["SCB"])
        return
    statistics = {name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"}
    with usual_defaults():
        made = bnb.nn.Params4bit.from_prequantized(weight, statistics, device=weight.device, module=layer)
    hold_4bit(layer, made.detach(), made.quant_state)


def hold_4bit(layer: Any, weight: Tensor, state: Any) -> None:
    """Let a ``Linear4bit`` hold codes and their ``QuantState``, in the parameter that it has if it can."""
    parameter = layer._parameters.get("weight")
    if is_dtensor(weight):
        pass  # FSDP2's own parameter; the layer remembers the state
    elif getattr(parameter, "quant_state", None) is not None and parameter.device == weight.device:
        parameter.data, parameter.quant_state = weight, state
    else:
        layer._parameters["weight"] = require().nn.Params4bit(
            weight,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=weight.dtype,
            module=layer,
            bnb_quantized=True,
        )
    layer.quant_state, layer.quant_storage = state, weight.dtype


def hold_int8(layer: Any, weight: Tensor, scales: Tensor) -> None:
    """Let a ``Linear8bitLt`` hold codes and scales, where its first forward would put them and where loading looks for them."""
    if is_dtensor(weight):  # FSDP2's own parameter; the layer remembers the scales
        layer.state.CB, layer.state.SCB = None, scales
        return
    parameter = layer._parameters.get("weight")
    if parameter is not None and parameter.dtype == torch.int8 and parameter.device == weight.device:
        parameter.data = weight
    else:
        parameter = require().nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer._parameters["weight"] = parameter
    parameter.CB, parameter.SCB = None, scales
    layer.state.CB, layer.state.SCB = weight, scales


def operands(layer: Any) -> tuple[Tensor, ...]:
    """Return the tensors from which :func:`unpack` makes the dense weight."""
    weight = layer.weight.detach()
    if is_8bit(layer):
        return weight, row_scales(layer)
    state = quant_state(layer)
    nested = (state.state2.absmax, state.offset, state.state2.code) if state.nested else ()
    return weight, state.code, state.absmax, *nested


def unpack(layer: Any) -> Callable[..., Tensor]:
    """Return the function of :func:`operands` and ``dtype`` that makes the dense weight."""
    if is_8bit(layer):
        return codes.dequantize_int8
    state = quant_state(layer)
    shape, size = tuple(state.shape), state.blocksize
    if layer.weight.device.type == "cpu" and (size >= 2048 or shape[1] % size or shape[1] % 2):
        return functools.partial(unpack_4bit, shape=shape, block_size=size)  # the kernel is wrong there, or compiles for a minute
    return functools.partial(_unpack_by_kernel, shape=shape, block_size=size, scheme=state.quant_type)


def _unpack_by_kernel(
    weight: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    *nested: Tensor,
    shape: tuple[int, int],
    block_size: int,
    scheme: str,
    dtype: torch.dtype,
) -> Tensor:
    if dtype not in DTYPES:
        return unpack_4bit(weight, quant_map, absmax, *nested, shape=shape, block_size=block_size, dtype=dtype)
    scales = codes.dequantize_scales(absmax, *nested) if nested else absmax
    dense: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(weight, scales, block_size, scheme, shape, dtype)
    return dense


def _multiply_4bit(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    *nested: Tensor,
    shape: tuple[int, int],
    block_size: int,
    scheme: str,
) -> Tensor:
    outer, offset, values = nested or (absmax, None, None)
    y: Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
        x,
        weight,
        shape,
        outer,
        block_size,
        scheme,
        bias=bias,
        absmax_8bit=absmax if nested else None,
        absmax_code=values,
        absmax_offset=offset,
    )
    return y


def multiply_int8(x: Tensor, bias: Tensor | None, weight: Tensor, scales: Tensor, *, threshold: float) -> Tensor:
    """Return ``x Wᵀ + b`` with the input in 8 bits (LLM.int8, arXiv 2208.07339); columns beyond the threshold in x's dtype."""
    ops = torch.ops.bitsandbytes
    rows = x.reshape(-1, x.shape[-1])
    # The kernel sets outliers to 0 for a moment, so that with a threshold it gets a copy.
    quantized, of_rows, outliers = ops.int8_vectorwise_quant.default(rows.to(torch.float16, copy=threshold > 0), threshold)
    y: Tensor
    if threshold > 0:
        y, _ = ops.int8_mixed_scaled_mm.default(rows, quantized, weight, of_rows, scales, outliers, bias)
    else:
        y = ops.int8_scaled_mm.default(quantized, weight, of_rows, scales, bias=bias, dtype=x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _within(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype, or fp32 where bitsandbytes cannot compute in it."""
    return dtype if dtype in DTYPES else torch.float32


class Kept(CodedLinear):
    """What both layers have in common: moves and copies by the stored tensors alone."""

    compute_dtype: torch.dtype | None
    state: Any
    quant_state: Any
    optional = (FORMAT,)

    def coded(self) -> dict[str, Tensor]:
        return coded(self)

    def recode(self, tensors: Mapping[str, Tensor]) -> None:
        recode(self, tensors)

    def to(self, *args: Any, **kwargs: Any) -> Kept:
        """Move the layer; the codes keep their dtype."""
        return nn.Module.to(self, *args, **kwargs)  # Linear8bitLt's own moves codes a second time

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kept:
        with self._without_codes():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self._move(fn)
        return self

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # Linear4bit's own forgets the statistics once FSDP has replaced the parameter.
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination.update((prefix + name, tensor) for name, tensor in self.coded().items() if name != "weight")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self._emptied(), "_parameters": {**self._parameters, "weight": None}, "_coded": self.coded()}

    def _emptied(self) -> dict[str, Any]:
        """Return the attributes that hold stored tensors, without them."""
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = state.pop("_coded")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.recode(tensors)


class Kept4bit(Kept):
    """Our part of our ``Linear4bit``."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        state, product = quant_state(self), None
        if input.is_cuda and input.numel():  # kernels that unpack and multiply at once where rows are few
            product = functools.partial(
                _multiply_4bit, shape=tuple(state.shape), block_size=state.blocksize, scheme=state.quant_type
            )
        return quantized_linear(input, self.bias, self.compute_dtype or state.dtype, operands(self), unpack(self), product)

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        state = quant_state(self)
        for holder in (state, state.state2) if state.nested else (state,):
            for name in ("absmax", "code", "offset"):
                tensor = getattr(holder, name)
                if tensor is not None:
                    there = moved(tensor, fn)
                    # The offset goes into state dicts as a number, which it would not be on meta.
                    setattr(holder, name, tensor if name == "offset" and there.is_meta else there)
        state.dtype = _within(converted(state.dtype, fn))
        hold_4bit(self, moved(self.weight.detach(), fn), state)

    def _emptied(self) -> dict[str, Any]:
        return {"quant_state": None}

    def _difference(self, name: str, given: Tensor, own: Tensor) -> str | None:
        if not name.startswith(_BLOB):
            return super()._difference(name, given, own)
        theirs, ours = (json.loads(bytes(tensor.cpu().tolist())) for tensor in (given, own))
        differ = [key for key in ("shape", "blocksize") if theirs.get(key) != ours.get(key)]
        return f"{name}: the weight was stored with another {' and '.join(differ)}." if differ else None

    def recode(self, tensors: Mapping[str, Tensor]) -> None:
        dtype = None if self.quant_state is None else self.quant_state.dtype
        super().recode(tensors)
        self.quant_state.dtype = dtype or self.quant_state.dtype  # the model's rather than the file's


class Kept8bit(Kept):
    """Our part of our ``Linear8bitLt``.

    On the CPU the dense weight is multiplied, in training (as bitsandbytes does it there) and in evaluation (where it would quantize
    the input), so that both compute the same. On CUDA the input is quantized in both.
    """

    dense_dtype: torch.dtype | None

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        product = functools.partial(multiply_int8, threshold=self.state.threshold) if input.is_cuda and input.numel() else None
        dtype = self.compute_dtype or self.dense_dtype or input.dtype
        return quantized_linear(input, self.bias, dtype, operands(self), unpack(self), product)

    def _move(self, fn: Callable[[Tensor], Tensor]) -> None:
        hold_int8(self, moved(self.weight.detach(), fn), moved(row_scales(self), fn))
        if self.dense_dtype is not None:
            self.dense_dtype = _within(converted(self.dense_dtype, fn))

    def _emptied(self) -> dict[str, Any]:
        state = copy.copy(self.state)
        state.CB = state.SCB = None
        return {"state": state}


def __getattr__(name: str) -> Any:
    """Make our ``Linear4bit`` and ``Linear8bitLt`` at the first use: bitsandbytes is imported then, and pickle finds them here."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    ours = Kept8bit if name == "Linear8bitLt" else Kept4bit
    made = type(name, (ours, getattr(require().nn, name)), {"__module__": __name__, "__doc__": ours.__doc__})
    globals()[name] = made
    return made


def our_class(name: str) -> Any:
    """Return our ``Linear4bit`` or ``Linear8bitLt``."""
    return globals().get(name) or __getattr__(name)
