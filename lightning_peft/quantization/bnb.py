"""The bitsandbytes backend: its layers and kernels behind the package's interface. Imported inside functions only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, FormatError, UnsupportedLayerError
from lightning_peft.quantization import bnb_layers as layers
from lightning_peft.quantization.backend import QuantBackend, nothing
from lightning_peft.quantization.bnb_layers import DTYPES
from lightning_peft.quantization.codes import SCALES_PER_SCALE
from lightning_peft.quantization.config import ComputeDtype, Quantization, Scheme, StorageDtype
from lightning_peft.quantization.reference import TorchLinear, store
from lightning_peft.quantization.stored import check_scales, check_state, check_weight, frozen

_DENSE = "dense"
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class BitsAndBytes(QuantBackend):
    """bitsandbytes 0.50 or later, CPU and CUDA.

    ``Linear4bit`` (NF4, FP4) and ``Linear8bitLt`` (int8) in our subclasses, which :mod:`~lightning_peft.quantization.bnb_layers`
    describes, and those that somebody else made: :meth:`prepare` turns them into ours.
    """

    name = "bitsandbytes"

    def check(self, config: Quantization) -> None:
        layers.require()
        if config.compute_dtype == "float64":
            raise ConfigError("Quantization: bitsandbytes does not compute in float64; use backend='torch'.")
        if config.bits == 4 and config.block_size not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise ConfigError(
                f"Quantization: block_size={config.block_size}, but bitsandbytes knows {sizes}; or use backend='torch'."
            )

    @torch.no_grad()
    def linear(self, weight: Tensor, bias: Tensor | None, config: Quantization) -> nn.Linear:
        self.check(config)
        check_weight(weight, config, DTYPES)
        layer = _empty((weight.shape[0], weight.shape[1]), bias, config, weight.dtype)
        _store(layer, weight.detach(), config, weight.dtype)
        return layer

    def matches(self, module: nn.Module) -> bool:
        kind = layers.kind(type(module))
        return kind == "Linear4bit" or (kind == "Linear8bitLt" and not module.state.has_fp16_weights)  # type: ignore[union-attr]

    def config(self, module: nn.Linear) -> Quantization:
        compute = getattr(module, "compute_dtype", None)
        compute_dtype = cast(ComputeDtype, "auto" if compute is None else _name(compute))
        if layers.is_8bit(module):
            threshold = cast(Any, module).state.threshold
            return Quantization(scheme="int8", threshold=threshold, compute_dtype=compute_dtype, backend="bitsandbytes")
        state = layers.quant_state(module)
        return Quantization(
            scheme=cast(Scheme, state.quant_type),
            double_quant=state.nested,
            block_size=state.blocksize,
            compute_dtype=compute_dtype,
            storage_dtype=cast(StorageDtype, _name(module.weight.dtype)),
            backend="bitsandbytes",
        )

    def compute_dtype(self, module: nn.Linear) -> torch.dtype:
        return getattr(module, "compute_dtype", None) or self.dense_dtype(module)

    def dense_dtype(self, module: nn.Linear) -> torch.dtype:
        if not layers.is_8bit(module):
            state = layers.quant_state(module, repacked=True)
            packed = getattr(state, "packing_format_for_cpu", False)
            return cast(torch.dtype, getattr(state, "original_dtype", state.dtype) if packed else state.dtype)
        known: torch.dtype | None = getattr(module, "dense_dtype", None)
        # Of a layer that somebody else made, only the bias remembers.
        return known or (torch.float32 if module.bias is None else module.bias.dtype)

    @torch.no_grad()
    def dequantize(self, module: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
        return layers.unpack(module)(*layers.operands(module), dtype=dtype or self.compute_dtype(module))

    @torch.no_grad()
    def requantize(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        config = self.config(module)
        check_weight(weight, config, DTYPES)
        undo = functools.partial(_hold, module, *_held(module))
        _store(module, weight.detach().to(module.weight.device), config, self.dense_dtype(module))
        return undo

    def densify(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        cls, parameter, held = type(module), module._parameters["weight"], _held(module)
        if not _forward_is_known(cls):
            raise UnsupportedLayerError(f"{cls.__qualname__} has a forward of its own, which a dense nn.Linear would not run.")
        layer = cast(Any, module)
        if layers.is_8bit(module):
            layer.state.CB = layer.state.SCB = None
        else:
            layer.quant_state = None
        module.weight = frozen(weight)
        module.__class__ = nn.Linear
        return functools.partial(_quantize_again, module, cls, parameter, held)

    def state(self, module: nn.Linear) -> dict[str, Tensor]:
        """Return the state dict's tensors; of int8, which they do not tell, also ``dense``, empty and of :meth:`dense_dtype`."""
        coded = layers.coded(module)
        return coded | {_DENSE: torch.empty(0, dtype=self.dense_dtype(module))} if layers.is_8bit(module) else coded

    def from_state(
        self, shape: tuple[int, int], state: Mapping[str, Tensor], bias: Tensor | None, config: Quantization
    ) -> nn.Linear:
        self.check(config)
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, signature in TorchLinear.signature(shape, config).items():
            if name != "nested_offset":  # bitsandbytes keeps it in the blob
                wanted[name if name in ("weight", "SCB") else f"weight.{name}"] = signature
        if config.bits == 4:
            blob = f"weight.quant_state.bitsandbytes__{config.scheme}"
            wanted[blob] = ((state[blob].numel() if blob in state else 0,), torch.uint8)
        check_state(state, wanted, optional=[layers.FORMAT, _DENSE] if config.bits == 8 else [])
        layer = _empty(shape, bias, config, state[_DENSE].dtype if _DENSE in state else None)
        try:
            layers.recode(layer, state)
        except Exception as error:  # the blob is JSON that bitsandbytes takes at its word
            raise FormatError(f"The stored weight cannot be read: {type(error).__name__}: {error}.") from error
        if config.bits == 4:
            # Its kernels read as many scales as these numbers say.
            stored = layers.quant_state(layer)
            said = {"shape": tuple(stored.shape or ()), "block_size": stored.blocksize, "scheme": stored.quant_type}
            said |= {"scales_per_scale": stored.state2.blocksize} if stored.nested else {}
            asked = {"shape": shape, "block_size": config.block_size, "scheme": config.scheme}
            asked |= {"scales_per_scale": SCALES_PER_SCALE} if config.double_quant else {}
            if said != asked or not isinstance(stored.dtype, torch.dtype):
                raise FormatError(f"The stored weight is {said} of {stored.dtype}, not {asked}.")
        return layer

    def is_plain(self, module: nn.Linear) -> bool:
        if isinstance(module, layers.Kept8bit):  # on CUDA it quantizes its input as well
            ours = type(module).forward is layers.Kept8bit.forward and module.weight.device.type == "cpu"
            return ours and (module.compute_dtype or module.dense_dtype) is not None
        return type(module).forward is layers.Kept4bit.forward

    def prepare(self, module: nn.Linear) -> Callable[[], None]:
        """Turn a layer of bitsandbytes into ours, and keep one of another subclass from being repacked."""
        layer, cls = cast(Any, module), type(module)
        if isinstance(module, layers.Kept):
            return nothing
        held = _held(module)
        added = dict(module.__dict__)
        if layers.is_8bit(module):
            layer.compute_dtype = layer.dense_dtype = None
        else:
            layer.support_avx512bf16_for_cpu = False
        if cls.__module__.startswith("bitsandbytes.") and _forward_is_known(cls):
            module.__class__ = layers.our_class(cast(str, layers.kind(cls)))
            _hold(module, *held)
        return functools.partial(_unprepare, module, cls, added)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _forward_is_known(cls: type[nn.Linear]) -> bool:
    bnb = layers.require()
    return cls.forward in (
        layers.Kept4bit.forward,
        layers.Kept8bit.forward,
        bnb.nn.Linear4bit.forward,
        bnb.nn.Linear8bitLt.forward,
    )


def _empty(shape: tuple[int, int], bias: Tensor | None, config: Quantization, dense: torch.dtype | None) -> nn.Linear:
    """Return our layer for a configuration, with its bias and without a weight."""
    out, columns = shape
    if config.scheme == "int8":
        layer: Any = layers.our_class("Linear8bitLt")(
            columns, out, bias=False, has_fp16_weights=False, threshold=float(config.threshold), device="meta"
        )
        layer.dense_dtype = dense
    else:
        layer = layers.our_class("Linear4bit")(
            columns,
            out,
            bias=False,
            compress_statistics=config.double_quant,
            quant_type=config.scheme,
            quant_storage=getattr(torch, config.storage_dtype),
            device="meta",
        )
        layer.support_avx512bf16_for_cpu, layer.compute_type_is_set = False, True
    layer.compute_dtype = None if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype)
    if bias is not None:
        layer.bias = frozen(bias)
    return cast(nn.Linear, layer)


def _store(layer: nn.Linear, weight: Tensor, config: Quantization, dense: torch.dtype) -> None:
    """Quantize a weight into a layer."""
    bnb = layers.require()
    if weight.device.type == "cpu":  # equal to bitsandbytes' own, which copies the weight several times
        made = store(weight, config)
        if config.scheme == "int8":
            layers.hold_int8(layer, made["weight"], made["SCB"])
            return
        make = bnb.functional.QuantState
        nested = (
            make(made["nested_absmax"], code=made["nested_quant_map"], blocksize=256, dtype=torch.float32)
            if config.double_quant
            else None
        )
        state = make(
            made["absmax"],
            shape=weight.shape,
            code=made["quant_map"],
            blocksize=config.block_size,
            quant_type=config.scheme,
            dtype=dense,
            offset=made.get("nested_offset"),
            state2=nested,
        )
        layers.hold_4bit(layer, made["weight"], state)
        return
    with layers.usual_defaults():
        if config.scheme == "int8":
            packed, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
            check_scales(scales)
            layers.hold_int8(layer, packed, scales)
            return
        packed, state = bnb.functional.quantize_4bit(
            weight.contiguous(),
            blocksize=config.block_size,
            compress_statistics=config.double_quant,
            quant_type=config.scheme,
            quant_storage=getattr(torch, config.storage_dtype),
        )
    check_scales(state.offset if state.nested else state.absmax)
    state.dtype = dense
    layers.hold_4bit(layer, packed, state)


Held = tuple[Tensor, Any]


def _held(layer: nn.Linear) -> Held:
    """Return codes and statistics of a layer."""
    return layer.weight.detach(), layers.row_scales(layer) if layers.is_8bit(layer) else layers.quant_state(layer)


def _hold(layer: nn.Linear, weight: Tensor, statistics: Any) -> None:
    """Give a layer back what :func:`_held` returned, on the device where it is now."""
    device = layer.weight.device
    if layers.is_8bit(layer):
        layers.hold_int8(layer, weight.to(device), statistics.to(device))
    else:
        statistics.to(device)
        layers.hold_4bit(layer, weight.to(device), statistics)


def _quantize_again(module: nn.Linear, cls: type[nn.Linear], parameter: nn.Parameter | None, held: Held) -> None:
    device = module.weight.device
    module.__class__ = cls
    module._parameters["weight"] = parameter
    _hold(module, *held)
    module.to(device)  # it may have moved meanwhile


def _unprepare(module: nn.Linear, cls: type[nn.Linear], before: Mapping[str, Any]) -> None:
    module.__class__ = cls
    for name in ("compute_dtype", "dense_dtype", "support_avx512bf16_for_cpu"):
        if name in before:
            module.__dict__[name] = before[name]
        else:
            module.__dict__.pop(name, None)
