"""Layer kinds: how a stored weight is seen as one canonical (out, in) matrix, once for all methods."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.adapter import LayerSpec
from lightning_peft.nn.fused import Operand
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.config import Scheme

Storage: TypeAlias = Literal["dense"] | Scheme
DENSE: Literal["dense"] = "dense"


@dataclass(frozen=True)
class Rows:
    """Rows of a fused weight that belong to one projection.

    Args:
        start: First row.
        stop: One past the last row.
        period: None for one contiguous block (GPT-2). Otherwise the block repeats with this period (NeoX and Falcon
            interleave query, key and value per head): row i belongs to the part if ``start <= i % period < stop``.
    """

    start: int
    stop: int
    period: int | None = None

    def count(self, total: int) -> int:
        """Return how many of ``total`` rows belong to the part."""
        return (self.stop - self.start) * (1 if self.period is None else total // self.period)

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the part's slice of ``tensor`` along ``dim`` (a view when contiguous)."""
        if self.period is None:
            return tensor.narrow(dim, self.start, self.stop - self.start)
        dim = dim % tensor.dim()
        split: Tensor = tensor.unflatten(dim, (-1, self.period))
        return split.narrow(dim + 1, self.start, self.stop - self.start).flatten(dim, dim + 1)

    def put(self, tensor: Tensor, part: Tensor, dim: int) -> Tensor:
        """Return ``tensor`` with the part replaced; differentiable in both, neither is changed."""
        dim = dim % tensor.dim()
        period = self.period or tensor.shape[dim]
        split = tensor.unflatten(dim, (-1, period))
        middle = part.unflatten(dim, (-1, self.stop - self.start))
        pieces = [split.narrow(dim + 1, 0, self.start), middle]
        pieces.append(split.narrow(dim + 1, self.stop, period - self.stop))
        return torch.cat(pieces, dim + 1).flatten(dim, dim + 1)


class LayerKind(ABC):
    """One way to store a weight. Stateless: instances compare and pickle by class."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))

    @abstractmethod
    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        """Return the logical shape of ``module``'s weight called ``tensor``."""

    def canonical(self, weight: Tensor) -> Tensor:
        """Return the stored weight as ``(*batch, out, in)``; a view."""
        return weight

    def stored(self, weight: Tensor, like: Tensor) -> Tensor:
        """Return a canonical weight in the shape of the stored one."""
        return weight.reshape(like.shape)

    def project(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Read ``x`` as the layer reads it, with weight A ``(r, in)``; the result has r channels in the output layout."""
        raise UnsupportedLayerError(f"{type(module).__name__} has no input-side form; only its weight can be adapted")

    channel_dim: int = -1

    def along_channels(self, values: Tensor) -> Tensor:
        """Return ``values`` (out,) in a shape that broadcasts over the layer's output."""
        return values.reshape(-1, *(1,) * (-1 - self.channel_dim))

    def operand(self, module: nn.Module) -> Operand | None:
        """Return the layer as ``x Wᵀ + b`` if that is all that its forward computes, else None."""
        return None

    def mix(self, module: nn.Module, z: Tensor, M: Tensor, groups: int) -> Tensor:
        """Map channels of ``z`` with M ``(c_out, c_in / groups)``."""
        return F.linear(z, M.to(z.dtype))


def _spec(kind: str, module: nn.Module, weight: Tensor, out: int, columns: int, **more: object) -> LayerSpec:
    values = dict(kind=kind, out_features=out, in_features=columns, dtype=weight.dtype, device=weight.device)
    values["has_bias"] = getattr(module, "bias", None) is not None
    return LayerSpec(**{**values, **more})  # type: ignore[arg-type]


def parameter(module: nn.Module, name: str) -> Tensor:
    """Return the tensor at a dotted parameter name (``weight``, ``out_proj.weight``)."""
    owner, _, attribute = name.rpartition(".")
    value = getattr(module.get_submodule(owner) if owner else module, attribute)
    if not isinstance(value, Tensor):
        raise UnsupportedLayerError(f"{type(module).__name__}.{name} is {type(value).__name__}, not a tensor")
    return value


def computes_more_than_a_lookup(module: nn.Module) -> bool:
    """Return whether a subclass of nn.Embedding has a forward of its own (Gemma scales what it finds)."""
    return isinstance(module, nn.Embedding) and type(module).forward is not nn.Embedding.forward


def storage_of(module: nn.Module) -> Storage:
    """Return how the weight of a layer is stored: ``dense``, or the scheme of a quantized one."""
    backend = backend_of(module)
    if backend is None:
        return DENSE
    assert isinstance(module, nn.Linear)
    return backend.config(module).scheme


def dense(module: nn.Module, name: str, least: torch.dtype | None = None) -> Tensor:
    """Return a tensor of a module as numbers, detached: the parameter itself, or what its codes stand for where it is quantized.

    Args:
        module: The layer.
        name: Dotted parameter name.
        least: At least this precision; None takes that of the parameter, of a quantized layer that of its products.
    """
    backend = backend_of(module) if name == "weight" else None
    if backend is None:
        stored = parameter(module, name).detach()
        return stored if least is None else stored.to(torch.promote_types(stored.dtype, least))
    assert isinstance(module, nn.Linear)
    return backend.dequantize(module, None if least is None else torch.promote_types(backend.compute_dtype(module), least))


class LinearKind(LayerKind):
    """nn.Linear, quantized ones included: weight (out, in)."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight, backend = parameter(module, tensor), backend_of(module)
        if backend is None:
            return _spec("linear", module, weight, weight.shape[0], weight.shape[1])
        assert isinstance(module, nn.Linear)
        # The codes are a string of bytes, whose shape and dtype say nothing.
        out, columns, dtype = module.out_features, module.in_features, backend.compute_dtype(module)
        return _spec("linear", module, weight, out, columns, dtype=dtype)

    def project(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A.to(x.dtype))

    def operand(self, module: nn.Module) -> Operand | None:
        backend, weight = backend_of(module), parameter(module, "weight")
        if not isinstance(module, nn.Linear):
            return None
        if backend is None:
            plain = type(module).forward is nn.Linear.forward
            return Operand(weight, None, module.bias, weight.dtype) if plain else None
        if not backend.is_plain(module):
            return None
        return Operand(weight, functools.partial(backend.dequantize, module), module.bias, backend.compute_dtype(module))


class Conv1DKind(LinearKind):
    """The Conv1D of transformers' GPT-2: a linear layer whose weight is stored as (in, out)."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight = parameter(module, tensor)
        return _spec("linear", module, weight, weight.shape[1], weight.shape[0])

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight.T

    def operand(self, module: nn.Module) -> Operand | None:
        weight = parameter(module, "weight")
        return Operand(weight.T, None, parameter(module, "bias"), weight.dtype)


class EmbeddingKind(LayerKind):
    """nn.Embedding: table (entries, dim); canonical (dim, entries), since a look-up multiplies a one-hot vector."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight = parameter(module, tensor)
        if getattr(module, "max_norm", None) is not None:
            raise UnsupportedLayerError(f"{type(module).__name__} rewrites its own weight (max_norm); it cannot be adapted.")
        # A forward of its own does something else than a look-up; then only the weight itself can be adapted exactly.
        plain = not computes_more_than_a_lookup(module) or hasattr(module, "embed_scale")
        return _spec("embedding", module, weight, weight.shape[1], weight.shape[0], has_bias=False, has_input=plain)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.T

    def stored(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight.T

    def project(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        weight = parameter(module, "weight")
        looked_up = F.embedding(x, A.T.to(weight.dtype))
        scale = getattr(module, "embed_scale", None)  # the scaled embeddings of BART-like models and of Gemma 3
        if scale is not None:
            looked_up = looked_up * (scale.to(weight.dtype) if isinstance(scale, Tensor) else scale)
        padding = getattr(module, "padding_idx", None)
        # nn.Embedding sends no gradient to the padding row; neither does its adapter.
        return looked_up if padding is None else torch.where((x == padding)[..., None], looked_up.detach(), looked_up)


class ConvKind(LayerKind):
    """nn.Conv1d/2d/3d: weight (out, in / groups, *kernel); canonical (out, in / groups x kernel size)."""

    def __init__(self, spatial: int) -> None:
        self.spatial = spatial
        self.channel_dim = -1 - spatial

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConvKind) and self.spatial == other.spatial

    def __hash__(self) -> int:
        return hash((type(self), self.spatial))

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight = parameter(module, tensor)
        # A forward of its own (weight standardisation, dynamic padding) is more than a convolution with the weight.
        plain = type(module).forward in (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
        sizes = dict(groups=module.groups, kernel=weight[0, 0].numel())
        return _spec("conv", module, weight, weight.shape[0], weight[0].numel(), **sizes, has_input=plain)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def project(self, module: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        kernel = A.to(x.dtype).unflatten(1, parameter(module, "weight").shape[1:])
        # The layer's own routine: stride, dilation, groups and padding mode are its business.
        out: Tensor = module._conv_forward(x, kernel, None)  # type: ignore[operator]
        return out

    def mix(self, module: nn.Module, z: Tensor, M: Tensor, groups: int) -> Tensor:
        pixels = z.flatten(-self.spatial).unflatten(-2, (groups, -1))  # (..., groups, c_in / groups, pixels)
        mixed: Tensor = M.to(z.dtype).unflatten(0, (groups, -1)) @ pixels
        return mixed.flatten(-3, -2).reshape(*z.shape[: -self.spatial - 1], -1, *z.shape[-self.spatial :])


class NormKind(LayerKind):
    """LayerNorm, RMSNorm, BatchNorm: weight (d,), canonical (d, 1). Its input is not linear, so only the weight is adapted."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight = parameter(module, tensor)
        return _spec("norm", module, weight, weight.numel(), 1, has_input=False)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 1)


class TensorKind(LayerKind):
    """A raw (out, in) or (experts, out, in) parameter that another module's forward reads: attention, expert stacks."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        weight = parameter(module, tensor)
        *batch, out, columns = weight.shape
        has_bias = self.bias_name(module, tensor) is not None
        return _spec("tensor", module, weight, out, columns, batch=tuple(batch), has_bias=has_bias, has_input=False)

    @staticmethod
    def bias_name(module: nn.Module, tensor: str) -> str | None:
        """Return the name of the bias that belongs to the parameter, if there is one."""
        name = tensor.removesuffix("weight") + "bias" if tensor.endswith("weight") else tensor + "_bias"
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner) if owner else module
        return name if isinstance(getattr(holder, attribute, None), Tensor) else None


class TransposedTensorKind(TensorKind):
    """An expert stack stored as (experts, in, out)."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        spec = super().spec(module, tensor)
        return replace(spec, out_features=spec.in_features, in_features=spec.out_features)

    def canonical(self, weight: Tensor) -> Tensor:
        return weight.mT

    def stored(self, weight: Tensor, like: Tensor) -> Tensor:
        return weight.mT


class ModuleKind(LayerKind):
    """A module without a weight of its own to adapt (a block, an attention module): only its output is edited."""

    def spec(self, module: nn.Module, tensor: str) -> LayerSpec:
        dtype, device = torch.float32, torch.device("cpu")
        for part in module.modules():
            first, backend = next(part.parameters(recurse=False), None), backend_of(part)
            if first is not None:
                dtype, device = first.dtype if backend is None else backend.compute_dtype(part), first.device  # type: ignore[arg-type]
                break
        return LayerSpec(kind="module", out_features=0, in_features=0, dtype=dtype, device=device)


LINEAR, CONV1D, EMBEDDING, NORM = LinearKind(), Conv1DKind(), EmbeddingKind(), NormKind()
TENSOR, TRANSPOSED_TENSOR, MODULE = TensorKind(), TransposedTensorKind(), ModuleKind()
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_kind(module: nn.Module) -> LayerKind | None:
    """Return the kind of a layer, or None when it has no weight that an adapter could attach to.

    Layers of other packages are recognised by their shape, so that nothing is imported: ``Conv1D`` by ``nf``, an RMSNorm by
    its name and a one-dimensional weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or is_lazy(weight) or isinstance(module, nn.MultiheadAttention):
        return None
    if isinstance(module, nn.Linear):
        return LINEAR
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return ConvKind(weight.dim() - 2)
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return CONV1D
    if weight.dim() == 1 and "Norm" in type(module).__name__:
        return NORM
    if isinstance(module, nn.LayerNorm):
        return NORM
    return None
