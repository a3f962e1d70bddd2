"""The quantized linear layer in plain torch operations: the definition that the other backends are tested against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.quantization import codes
from lightning_peft.quantization.backend import QuantBackend
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.product import quantized_linear
from lightning_peft.quantization.stored import (
    CodedLinear,
    Signature,
    blocks,
    check_scales,
    check_state,
    check_weight,
    frozen,
    moved,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TorchLinear(CodedLinear):
    """A linear layer whose weight is stored quantized: ``y = x Ŵᵀ + b``.

    ``weight`` holds the codes, buffers hold the statistics. They keep their bits in ``module.to(dtype)``, ``.half()`` and so on,
    and go where ``module.to(device)`` sends them. The empty buffer ``dense`` has the dtype of the weight before and follows
    ``module.to(dtype)``; with ``compute_dtype="auto"`` it is the dtype of the product. The input is cast to that dtype and the output
    back.

    Args:
        shape: (out, in).
        stored: The tensors by name, as :meth:`signature` describes them.
        bias: (out,) or None.
        config: How the weight is stored.
    """

    quantization: Quantization
    dense: Tensor

    def __init__(self, shape: tuple[int, int], stored: Mapping[str, Tensor], bias: Tensor | None, config: Quantization) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a dense weight
        self.out_features, self.in_features = shape
        self.quantization = config
        self.weight = frozen(stored["weight"])
        self.register_parameter("bias", None if bias is None else frozen(bias))
        for name, tensor in stored.items():
            if name != "weight":
                self.register_buffer(name, tensor)

    @staticmethod
    def signature(shape: tuple[int, int], config: Quantization) -> Signature:
        """Return shape and dtype of every stored tensor but ``dense``; the names are bitsandbytes'."""
        if config.scheme == "int8":
            return {"weight": (shape, torch.int8), "SCB": (shape[:1], torch.float32)}
        entries, storage = shape[0] * shape[1], getattr(torch, config.storage_dtype)
        count = blocks(entries, config.block_size)
        signature: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((blocks(entries, 2) // storage.itemsize, 1), storage),
            "quant_map": ((16,), torch.float32),
            "absmax": ((count,), torch.uint8 if config.double_quant else torch.float32),
        }
        if config.double_quant:
            signature["nested_absmax"] = ((blocks(count, codes.SCALES_PER_SCALE),), torch.float32)
            signature["nested_offset"] = ((), torch.float32)
            signature["nested_quant_map"] = ((256,), torch.float32)
        return signature

    def coded(self) -> dict[str, Tensor]:
        """Return the stored tensors by name, without ``dense``."""
        names = self.signature((self.out_features, self.in_features), self.quantization)
        return {name: getattr(self, name).detach() for name in names}

    def recode(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold other stored tensors, on the device where the layer is."""
        device = self.weight.device
        for name, tensor in tensors.items():
            if name == "weight":
                self.weight.data = tensor.to(device)
            else:
                self._buffers[name] = tensor.to(device)

    @property
    def unpack(self) -> Callable[..., Tensor]:
        """Function of the stored tensors, in their order, and of ``dtype``: the dense weight."""
        if self.quantization.scheme == "int8":
            return codes.dequantize_int8
        return functools.partial(
            unpack_4bit, shape=(self.out_features, self.in_features), block_size=self.quantization.block_size
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the product."""
        return self.quantization.dtype(self.dense.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return quantized_linear(input, self.bias, self.compute_dtype, tuple(self.coded().values()), self.unpack)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TorchLinear:
        kept = {id(self._parameters["weight"])} | {id(b) for name, b in self._buffers.items() if name != "dense"}
        super()._apply(lambda tensor: moved(tensor, fn) if id(tensor) in kept else fn(tensor), recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        config = self.quantization
        how = f"{config.scheme}, compute_dtype={self.compute_dtype}"
        if config.scheme != "int8":
            how += f", block_size={config.block_size}, double_quant={config.double_quant}"
        return f"{super().extra_repr()}, {how}"


def unpack_4bit(
    weight: Tensor,
    quant_map: Tensor,
    absmax: Tensor,
    *nested: Tensor,
    shape: tuple[int, int],
    block_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the dense weight (out, in); ``nested`` is what double quantization adds: scales of the scales, mean and map."""
    scales = codes.dequantize_scales(absmax, *nested) if nested else absmax
    return codes.dequantize_4bit(weight, scales, quant_map, shape=shape, block_size=block_size, dtype=dtype)


def store(weight: Tensor, config: Quantization) -> dict[str, Tensor]:
    """Return the stored tensors of a weight by name, in the order of :meth:`TorchLinear.signature`, without ``dense``."""
    if config.scheme == "int8":
        values, scales = codes.quantize_int8(weight)
        check_scales(scales)
        return {"weight": values, "SCB": scales}
    packed, scales = codes.quantize_4bit(weight, config.scheme, config.block_size)
    check_scales(scales)
    if config.storage_dtype != "uint8":
        packed = packed.view(-1).view(getattr(torch, config.storage_dtype))[:, None]
    # A copy: buffers that share memory cannot be saved as safetensors.
    stored = {"weight": packed, "quant_map": codes.codebook(config.scheme, weight.device).clone(), "absmax": scales}
    if config.double_quant:
        stored["absmax"], stored["nested_absmax"], stored["nested_offset"] = codes.quantize_scales(scales)
        stored["nested_quant_map"] = codes.dynamic_map(weight.device).clone()
    return stored


class TorchReference(QuantBackend):
    """NF4, FP4 and int8 in plain torch operations: every device, float64, nothing to install.

    int8 quantizes the weight only: inputs are not quantized, so that there are no outliers to treat apart.
    """

    name = "torch"

    def check(self, config: Quantization) -> None:
        if config.threshold:
            raise ConfigError(
                f"Quantization: threshold={config.threshold}, but the torch backend does not quantize inputs, so that none is beyond "
                "it. Leave it at 0, or use backend='bitsandbytes'."
            )

    @torch.no_grad()
    def linear(self, weight: Tensor, bias: Tensor | None, config: Quantization) -> nn.Linear:
        check_weight(weight, config, DTYPES)
        stored = store(weight.detach(), config) | {"dense": weight.new_empty(0)}
        return TorchLinear((weight.shape[0], weight.shape[1]), stored, bias, config)

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, TorchLinear)

    def config(self, module: nn.Linear) -> Quantization:
        return _ours(module).quantization

    def compute_dtype(self, module: nn.Linear) -> torch.dtype:
        return _ours(module).compute_dtype

    def dense_dtype(self, module: nn.Linear) -> torch.dtype:
        return _ours(module).dense.dtype

    @torch.no_grad()
    def dequantize(self, module: nn.Linear, dtype: torch.dtype | None = None) -> Tensor:
        layer = _ours(module)
        return layer.unpack(*layer.coded().values(), dtype=dtype or layer.compute_dtype)

    @torch.no_grad()
    def requantize(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        layer = _ours(module)
        check_weight(weight, layer.quantization, DTYPES)
        undo = functools.partial(layer.recode, layer.coded())
        layer.recode(store(weight.detach(), layer.quantization))
        return undo

    def densify(self, module: nn.Linear, weight: Tensor) -> Callable[[], None]:
        layer = _ours(module)
        cls, config, parameter = type(layer), layer.quantization, layer._parameters["weight"]
        buffers = {name: layer._buffers.pop(name) for name in self.state(layer) if name != "weight"}
        layer.weight = frozen(weight)
        del layer.quantization
        module.__class__ = nn.Linear
        return functools.partial(_quantize_again, module, cls, parameter, buffers, config)

    def state(self, module: nn.Linear) -> dict[str, Tensor]:
        layer = _ours(module)
        return layer.coded() | {"dense": layer.dense}

    def from_state(
        self, shape: tuple[int, int], state: Mapping[str, Tensor], bias: Tensor | None, config: Quantization
    ) -> nn.Linear:
        self.check(config)
        wanted = dict(TorchLinear.signature(shape, config))
        dense = state.get("dense")
        wanted["dense"] = ((0,), dense.dtype if dense is not None and dense.is_floating_point() else torch.float32)
        check_state(state, wanted)
        return TorchLinear(shape, state, bias, config)

    def is_plain(self, module: nn.Linear) -> bool:
        return type(module).forward is TorchLinear.forward


def _ours(module: nn.Linear) -> TorchLinear:
    assert isinstance(module, TorchLinear)
    return module


def _quantize_again(
    module: nn.Linear,
    cls: type[TorchLinear],
    parameter: nn.Parameter | None,
    buffers: dict[str, Tensor | None],
    config: Quantization,
) -> None:
    device = module.weight.device
    module.__class__ = cls
    assert isinstance(module, TorchLinear)
    module._parameters["weight"] = parameter
    module._buffers.update(buffers)
    module.quantization = config
    module.to(device)  # it may have moved meanwhile
