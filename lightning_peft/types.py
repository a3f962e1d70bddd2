"""Small types shared by every layer of the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

K = TypeVar("K")
V = TypeVar("V")

Family = Literal["additive", "selective", "reparameterized", "hybrid", "architectural", "baseline"]
AdapterDtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]


class FrozenDict(dict[K, V]):
    """A dict that cannot change, so that a strategy which holds one is hashable and safe to share."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("this mapping belongs to an immutable strategy; build a new strategy instead")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict[K, V]], tuple[dict[K, V]]]:
        return type(self), (dict(self),)


def freeze(value: Any) -> Any:
    """Return ``value`` with lists as tuples and mappings as :class:`FrozenDict`, all the way down."""
    if isinstance(value, Mapping):
        return FrozenDict({k: freeze(v) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    return value


def thaw(value: Any) -> Any:
    """Return the plain lists and dicts that JSON and YAML can hold; the inverse of :func:`freeze`."""
    if isinstance(value, Mapping):
        return {k: thaw(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [thaw(v) for v in value]
    return value


_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")


def strip_wrappers(key: str) -> str:
    """Return a path or state-dict key without the parts that FSDP1, activation checkpointing and torch.compile put in."""
    return ".".join(part for part in key.split(".") if part not in _WRAPPERS)


def stable_seed(*parts: object) -> int:
    """Return a 63-bit seed that depends on nothing but ``parts``: equal on every rank, process and Python version."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def resolve_adapter_dtype(choice: AdapterDtype, base: torch.dtype) -> torch.dtype:
    """Return the dtype of adapter parameters: fp32 under ``"auto"``, except on a float64 base, which keeps its precision."""
    if choice != "auto":
        dtype: torch.dtype = getattr(torch, choice)
        return dtype
    return torch.float64 if base == torch.float64 else torch.float32


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor holds numbers: it is neither on the meta device nor one of those that the cost model runs on."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a piece; told without the import, which is slow."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's whole, which every rank has to ask for (differentiable), and any other tensor as it is."""
    full: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
    return full


def placed(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor that every rank has, laid out like ``like``: a DTensor if that is one."""
    if not is_dtensor(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def in_pieces(tensors: Iterable[Tensor]) -> bool:
    """Return whether one of the tensors is a DTensor, or belongs to a unit of FSDP1."""
    return any(is_dtensor(t) or getattr(t, "_fsdp_flattened", False) for t in tensors)
