"""Which layers of a model can be stored in few bits, and why the others stay dense. Reads only; every check comes from here."""

from __future__ import annotations

import functools
import gc
import inspect
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_peft.errors import ConflictError, TargetError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.config import Quantization
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.builder import output_embeddings, spellings
from lightning_peft.surgery.layers import CONV1D, LinearKind, layer_kind
from lightning_peft.surgery.stack import stacks
from lightning_peft.surgery.targets import Matcher
from lightning_peft.surgery.tree import is_within, join

WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DataParallel")
# Methods that read a weight before it has a value, or while it still is a dense one.
_BUILDING = re.compile(r"__init__|_*(init|reset|tie)_.*")


@dataclass(frozen=True)
class LeftDense:
    """A weight that stays as it is.

    Args:
        key: Its name.
        reason: Why.
        nbytes: Its size.
    """

    key: str
    reason: str
    nbytes: int


@dataclass(frozen=True)
class Selection:
    """What is to be quantized.

    Args:
        paths: Layers to quantize, in model order.
        left: Every other weight with two or more dimensions.
        vectors: Bytes of what has fewer: norms, biases.
        before: Bytes of all parameters.
    """

    paths: tuple[str, ...]
    left: tuple[LeftDense, ...]
    vectors: int
    before: int


def select(anatomy: Anatomy, config: Quantization, skip: Sequence[str] = (), *, streamed: bool = False) -> Selection:
    """Choose the layers and check all that could go wrong.

    Args:
        anatomy: The model.
        config: How to store.
        skip: Roles, names, endings of names, globs or ``re:`` patterns of layers to leave dense, with all below them.
        streamed: The weights are on the meta device and will be read one by one.

    Raises:
        ConflictError: Layers are quantized or have adapters already; an optimizer or wrapper holds the parameters; a weight is tied;
            a layer has a forward of its own on the instance.
        UnsupportedLayerError: A weight has no values yet, or a dtype that cannot be stored.
        TargetError: ``skip`` matches nothing, or nothing is left to quantize.
    """
    _check_untouched(anatomy, streamed=streamed)
    reasons = _Reasons(anatomy, skip)
    paths, left = [], []
    for path, module in anatomy.tree.modules.items():
        if isinstance(layer_kind(module), LinearKind):
            reason = reasons.of(path, module)
            if reason is None:
                paths.append(path)
            else:
                left.append((path, "weight", reason))
    chosen = set(paths)
    for path, module in anatomy.tree.modules.items():
        named = {name for owner, name, _ in left if owner == path}
        left += [
            (path, name, _what(module, tensor))
            for name, tensor in module._parameters.items()
            if tensor is not None and name not in named and not (path in chosen and name == "weight") and _dim(tensor) > 1
        ]
    if not paths:
        why = "; ".join(f"'{path}': {reason}" for path, _, reason in left[:3])
        raise TargetError(f"{type(anatomy.root).__name__} has no linear layer to quantize{f' ({why})' if why else ''}.")
    for path in paths:
        _check_layer(anatomy, path, config, streamed=streamed)
    _check_ties(anatomy, paths)
    return _measured(anatomy, paths, left)


def _measured(anatomy: Anatomy, paths: Sequence[str], left: Sequence[tuple[str, str, str]]) -> Selection:
    later = {a for pair in _known_ties(anatomy) for a in pair[:1]}  # on meta, they are not tied yet
    seen: set[int] = set()

    def nbytes(path: str, name: str) -> int:  # of a tied weight once, and none of one that is computed from others
        tensor = anatomy.tree[path]._parameters.get(name)
        if tensor is None or id(tensor) in seen or is_lazy(tensor) or (tensor.is_meta and join(path, name) in later):
            return 0
        seen.add(id(tensor))
        return tensor.numel() * tensor.element_size()

    total = sum(nbytes(path, name) for path, module in anatomy.tree.modules.items() for name in module._parameters)
    seen.clear()
    stored = sum(nbytes(path, "weight") for path in paths)
    dense = [LeftDense(join(path, name), reason, nbytes(path, name)) for path, name, reason in left]
    return Selection(tuple(paths), tuple(dense), total - stored - sum(part.nbytes for part in dense), total)


def _known_ties(anatomy: Anatomy) -> list[list[str]]:
    """Return the pairs of which a transformers model on meta knows that they will be tied once it has values."""
    ties = ((root, getattr(anatomy.tree[root], "all_tied_weights_keys", None) or {}) for root in anatomy.tree.hf_roots)
    return [[join(root, a), join(root, b)] for root, known in ties for a, b in known.items()]


def _dim(tensor: Tensor) -> int:
    return 0 if is_lazy(tensor) else tensor.dim()


def _weight(anatomy: Anatomy, path: str) -> Tensor:
    weight = anatomy.tree[path]._parameters["weight"]
    assert weight is not None
    return weight


def _what(module: nn.Module, tensor: Tensor) -> str:
    """Return why a weight that is none of a linear layer stays dense."""
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "convolution"
    if isinstance(module, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads it inside its own forward"
    if tensor.dim() == 3:
        return "experts in one 3-D tensor"
    return f"{type(module).__name__} reads it inside its own forward"


class _Reasons:
    """Why a linear layer stays dense."""

    def __init__(self, anatomy: Anatomy, skip: Sequence[str]) -> None:
        self.anatomy, self.matcher, tree = anatomy, Matcher(anatomy), anatomy.tree
        self.heads = {site.path for role, sites in anatomy.roles.items() if "head" in spellings(role) for site in sites}
        outputs = (output_embeddings(tree[root]) for root in tree.hf_roots)
        self.heads |= {path for head in outputs if head is not None and (path := tree.path_of(head)) is not None}
        self.skipped: dict[str, str] = {}
        for pattern in skip:
            roles = anatomy.role_names(pattern)
            paths = {site.path for role in roles for site in anatomy.roles[role]} if roles else self.matcher.paths(pattern)
            self.skipped |= {path: f"skip: {pattern}" for path in paths}
        self.wide = [(root, name) for root, module in _hf_models(anatomy) for name in _kept_wide(module)]

    def of(self, path: str, module: nn.Module) -> str | None:
        """Return the reason, or None if the layer can be quantized."""
        owner, _, name = path.rpartition(".")
        if path in self.skipped:
            return self.skipped[path]
        if path in self.heads:
            return "output head"
        if self.matcher.is_router(path):
            return "router"
        if (bypass := self.anatomy.bypassed(path)) is not None:
            return bypass.partition(";")[0]
        if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
            return f"{type(module).__name__} has a forward of its own"
        tensors = {key for key, value in (*module._parameters.items(), *module._buffers.items()) if value is not None}
        if "weight" not in tensors or tensors - {"weight", "bias"} or module._modules:
            return "its weight is computed from other tensors"
        parent: Any = type(self.anatomy.tree[owner])
        reader = _reader(parent, name) if path else None
        if reader is not None:
            return f"{reader} reads its weight"
        kept = next((key for root, key in self.wide if is_within(path, root) and f".{key}." in f".{path}."), None)
        return None if kept is None else f"the model keeps '{kept}' in fp32"


def _hf_models(anatomy: Anatomy) -> Iterator[tuple[str, nn.Module]]:
    for path, module in anatomy.tree.modules.items():
        if any(is_within(path, root) for root in anatomy.tree.hf_roots) and hasattr(module, "_keep_in_fp32_modules"):
            yield path, module


def _kept_wide(module: nn.Module) -> set[str]:
    """Return names of parts that a transformers model never casts to 16 bit (T5's ``wo``, whose caller casts to its dtype)."""
    names: set[str] = set()
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        names |= set(getattr(module, attribute, None) or ())
    return names


@functools.cache
def _reader(owner: Any, child: str) -> str | None:
    """Return the method of a class that reads ``self.<child>.weight``, as far as its source tells."""
    for cls in owner.__mro__:
        # torch's encoder layer reads them on its fast path only, which a quantized child makes it leave.
        if cls is nn.Module or cls.__module__ == nn.TransformerEncoderLayer.__module__:
            break
        for name, function in vars(cls).items():
            if inspect.isfunction(function) and not _BUILDING.fullmatch(name):
                try:
                    source = inspect.getsource(function)
                except (OSError, TypeError):
                    continue  # typed into an interpreter
                if re.search(rf"\bself\.{re.escape(child)}\.weight\b", source):
                    return f"{cls.__name__}.{name}"
    return None


def _check_untouched(anatomy: Anatomy, *, streamed: bool) -> None:
    root, modules = anatomy.root, anatomy.tree.modules
    adapted = next((path for path, _, _ in stacks(root)), None)
    if adapted is not None or any(hasattr(module, "peft_config") for module in modules.values()):
        raise ConflictError(
            f"{type(root).__name__} has adapters already ('{adapted or 'of Hugging Face peft'}'). Quantize before injecting: remove() "
            "them, quantize, and inject again."
        )
    for path, module in modules.items():
        name = _stored(module)
        if name is not None and not streamed:
            raise ConflictError(
                f"'{path or type(module).__name__}' is quantized already ({name}). Quantize the dense model once, or leave "
                "quantization out and use the model as it is."
            )
        wrapper = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), None)
        if wrapper is not None:
            raise ConflictError(
                f"'{path or 'the model'}' is wrapped by {wrapper} already. Quantize the module before wrapping it."
            )
    if not streamed:
        _check_unused(root)


def _stored(module: nn.Module) -> str | None:
    """Return how a module is quantized, by whomever, or None."""
    backend = backend_of(module)
    if backend is not None:
        assert isinstance(module, nn.Linear)
        return f"{backend.config(module).scheme}, {backend.name}"
    method = getattr(module, "quantization_method", None)
    if getattr(module, "is_quantized", False) is True and method is not None:
        return str(getattr(method, "value", method))
    for tensors in (module._parameters, module._buffers):
        for key in ("weight", "qweight"):
            value = tensors.get(key)
            if value is not None and not is_lazy(value) and not value.is_floating_point():
                return f"{type(module).__name__}, {value.dtype} codes"
    return None


def _check_unused(root: nn.Module) -> None:
    """Refuse where an optimizer or a wrapper outside the model holds its parameters: both would go on with the dense weights."""
    parameters, modules = {id(p) for p in root.parameters()}, {id(m) for m in root.modules()}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.optim.Optimizer):
            if any(id(p) in parameters for group in thing.param_groups for p in group["params"]):
                raise ConflictError(
                    f"an optimizer ({kind.__name__}) holds parameters of {type(root).__name__} already and would go on training the dense "
                    "weights. Quantize first, then make the optimizer."
                )
        elif issubclass(kind, nn.Module) and kind.__name__ in WRAPPERS:
            wrapped = thing._modules.get("module", thing._modules.get("_fsdp_wrapped_module"))
            if wrapped is not None and any(id(m) in modules for m in wrapped.modules()):
                raise ConflictError(f"{type(root).__name__} is wrapped by {kind.__name__} already. Quantize before wrapping it.")


def _check_layer(anatomy: Anatomy, path: str, config: Quantization, *, streamed: bool) -> None:
    module, weight = anatomy.tree[path], _weight(anatomy, path)
    if "forward" in vars(module):
        raise ConflictError(
            f"'{path}' has a forward of its own on the instance (an offloading hook of accelerate, a patch), which would go on with the "
            f"dense weight. Take it off first, or leave the layer dense with skip=['{path}']."
        )
    if is_lazy(weight) or (weight.is_meta and not streamed):
        raise UnsupportedLayerError(
            f"'{path}.weight' has no values yet ({'lazy' if is_lazy(weight) else 'meta device'}). Materialise the model first, or let the "
            "weights be read one by one: BaseSource(name=..., quantization=...)."
        )
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnsupportedLayerError(
            f"'{path}.weight' is a {type(weight).__name__}, not a plain tensor. Quantize before sharding, or skip it."
        )
    allowed = {torch.float32, torch.bfloat16, torch.float16} | ({torch.float64} if config.backend == "torch" else set())
    if weight.dtype not in allowed:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in allowed))
        raise UnsupportedLayerError(
            f"'{path}.weight' is {str(weight.dtype).removeprefix('torch.')}; what can be quantized is {names}. Cast the model first, or "
            f"leave the layer dense with skip=['{path}']."
        )
    size, packed = getattr(torch, config.storage_dtype).itemsize, (weight.numel() + 1) // 2
    if config.bits == 4 and packed % size:
        raise UnsupportedLayerError(
            f"'{path}.weight' takes {packed} bytes, which storage_dtype={config.storage_dtype} ({size} bytes) does not divide. Take "
            f"uint8, or leave the layer dense with skip=['{path}']."
        )
    limit = torch.finfo(torch.float16).max if config.scheme == "int8" else torch.inf
    largest = 0.0 if streamed else float(torch.linalg.vector_norm(weight.detach(), torch.inf))
    if not largest < torch.inf or largest > limit:
        raise UnsupportedLayerError(
            f"'{path}.weight' has the entry {largest}, which would spread over its block. Repair the weight, or leave the layer dense "
            f"with skip=['{path}']."
        )


def _check_ties(anatomy: Anatomy, paths: Collection[str]) -> None:
    chosen = {join(path, "weight") for path in paths}
    holders: dict[int, list[str]] = {}
    for path, module in anatomy.tree.modules.items():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                holders.setdefault(id(tensor), []).append(join(path, name))
    ties = [keys for keys in holders.values() if len(keys) > 1]
    ties += _known_ties(anatomy)
    for keys in ties:
        key = next((key for key in keys if key in chosen), None)
        if key is not None:
            other = next((k for k in keys if k != key), key)
            raise ConflictError(
                f"'{key}' is tied to '{other}', which would lose its weight. Leave both dense with "
                f"skip={sorted({k.rpartition('.')[0] for k in keys})}, or untie them first."
            )


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a layer is transformers' Conv1D, whose weight lies as (in, out)."""
    return layer_kind(module) == CONV1D
