"""Two fingerprints of a base model: its structure, and a sample of its values.

The structure is equal for one model on meta, sharded, in another precision, quantized, and stored as ``nn.Linear`` or as
``Conv1D``. The values tell other weights of the same architecture apart, with the tolerance of the coarser storage.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.surgery.layers import LinearKind, layer_kind
from lightning_peft.surgery.stack import stack_of
from lightning_peft.surgery.walk import base_modules
from lightning_peft.types import has_values, stable_seed
from lightning_peft.types import strip_wrappers as strip_wrappers

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Fingerprint = dict[str, Any]
UNCHECKED = "unchecked"

ENTRIES = 8  # sampled entries of one tensor
MATRICES, VECTORS = 24, 8  # sampled tensors. Matrices tell models apart; norms and biases of fresh models are all 1 and 0.
FLOAT_TOLERANCE = 2.0**-7  # twice the rounding error of bfloat16, relative to the entry
TINY = 2.0**-24  # float16 holds nothing smaller
QUANTIZED_TOLERANCE = 0.25  # share of squared error: NF4 gives about 0.01, int8 1e-5, unrelated weights 1.0
DENSE = ("float64", "float32", "bfloat16", "float16")


def fingerprint(root: nn.Module) -> Fingerprint:
    """Describe the base model below ``root``; adapters are left out. Reads only; no entry leaves its device but the sample.

    Returns:
        Plain values. ``structure``: ``hash`` over all paths and logical shapes, ``tensors`` counts of them with numbers in paths
        written as ``*``. ``values``: at most 32 tensors, each ``{"stored": dtype or code, "entries": 8 numbers}``; an entry is
        None where this process holds no such number, ``values`` is None where it holds none at all (meta device).
    """
    lines: list[str] = []
    samples: dict[bool, list[tuple[int, str, nn.Module, str]]] = {True: [], False: []}
    seen: set[int] = set()
    for name, module, attribute, tensor in _base_tensors(root):
        shape = _logical_shape(module, attribute, tensor)
        lines.append(f"{name} {'x'.join(map(str, shape)) or 'scalar'}")
        if id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            samples[len(shape) > 1 and min(shape[-2:]) > 1].append((stable_seed("fingerprint", name), name, module, attribute))
    chosen = sorted(samples[True])[:MATRICES] + sorted(samples[False])[:VECTORS]
    values = {name: _sample(name, module, attribute) for _, name, module, attribute in chosen}
    known = any(entry is not None for value in values.values() for entry in value["entries"])
    patterns = collections.Counter(re.sub(r"(?<![^.])\d+(?=\.)", "*", line) for line in lines)
    return {
        "structure": {
            "hash": hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest(),
            "tensors": dict(sorted(patterns.items())),
        },
        "values": values if known else None,
    }


def base_fingerprint(root: nn.Module) -> Fingerprint:
    """Return the fingerprint of ``root`` as it was before the first adapter came, which may train base parameters since."""
    stack = stack_of(root)
    for handle in stack._handles.values() if stack else ():
        if handle.base_fingerprint is not None:
            return handle.base_fingerprint
    return fingerprint(root)


def compare_fingerprints(saved: Mapping[str, Any], current: Mapping[str, Any], *, carried: Collection[str] = ()) -> str | None:
    """Compare two fingerprints.

    Args:
        saved: The one in the manifest.
        current: The one of the model at hand.
        carried: Names of base tensors that the adapter file brings along (BitFit's biases, a head), so that theirs may differ.

    Returns:
        None when both describe the same base, :data:`UNCHECKED` when the structure agrees and the values cannot be compared,
        else the reason of the mismatch.
    """
    reason = compare_structures(saved["structure"], current["structure"])
    if reason is not None:
        return reason
    if saved["values"] is None or current["values"] is None:
        return UNCHECKED
    names = [n for n in saved["values"] if n in current["values"]]
    free = [n for n in names if n not in carried]
    if names and not free:
        return None  # nothing of the base is left that the file does not bring
    compared, differing = 0, []
    for name in free:
        verdict = _same_values(saved["values"][name], current["values"][name])
        # Equal numbers all over (a fresh norm's 1, a fresh bias's 0) agree in any model.
        compared += verdict is not None and len(set(saved["values"][name]["entries"])) > 1
        if verdict is False:
            differing.append(name)
    if differing:
        return (
            f"the weights are other ones: {len(differing)} of {len(free)} sampled tensors differ, such as "
            f"{', '.join(repr(n) for n in differing[:3])}"
        )
    return None if compared else UNCHECKED


def compare_structures(saved: Mapping[str, Any], current: Mapping[str, Any]) -> str | None:
    """Return None when both have the same paths and logical shapes, else what differs."""
    if saved["hash"] == current["hash"]:
        return None
    ours, theirs = collections.Counter(current["tensors"]), collections.Counter(saved["tensors"])
    missing, extra = sorted((theirs - ours).items()), sorted((ours - theirs).items())
    if not missing and not extra:
        return "the same tensors lie under other layer numbers"

    def shown(tensors: list[tuple[str, int]]) -> str:
        names = [f"'{name}'" + (f" ({count} times)" if count > 1 else "") for name, count in tensors[:3]]
        return ", ".join(names) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "") if names else "nothing"

    return f"the structure differs: the adapter's base has {shown(missing)}, this model has {shown(extra)} instead"


def _base_tensors(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Yield (name, module, attribute, tensor) of every parameter of every module; tied ones under each of their names.

    A tie can be lost or not yet made (on meta), which changes no shape.
    """
    for path, module in base_modules(root):
        for attribute, tensor in module._parameters.items():
            if tensor is not None:
                yield strip_wrappers(f"{path}.{attribute}" if path else attribute), module, attribute, tensor


def _logical_shape(module: nn.Module, attribute: str, tensor: Tensor) -> tuple[int, ...]:
    kind = layer_kind(module) if attribute == "weight" else None
    if isinstance(kind, LinearKind):
        spec = kind.spec(module, attribute)
        return spec.out_features, spec.in_features
    return tuple(tensor.shape)


def _sample(name: str, module: nn.Module, attribute: str) -> dict[str, Any]:
    """Return 8 entries, the same ones for every storage of the tensor."""
    shape = _logical_shape(module, attribute, getattr(module, attribute)) or (1,)
    total = math.prod(shape)
    flat = torch.tensor([stable_seed("entry", name, i) % total for i in range(min(ENTRIES, total))])
    stored, dense = _dense(module, attribute)
    if dense is None:
        return {"stored": stored, "entries": [None] * len(flat)}
    kind = layer_kind(module) if attribute == "weight" else None
    if isinstance(kind, LinearKind):
        dense = kind.canonical(dense)
    dense = dense if dense.dim() else dense[None]
    return {"stored": stored, "entries": _entries(dense, torch.stack(torch.unravel_index(flat, shape)))}


def _dense(module: nn.Module, attribute: str) -> tuple[str, Tensor | None]:
    """Return how a parameter is stored, and it as numbers, or None where this process has no numbers to read."""
    tensor: Tensor = getattr(module, attribute)
    backend = backend_of(module) if attribute == "weight" else None
    if backend is not None:
        assert isinstance(module, nn.Linear)
        with contextlib.suppress(UnsupportedLayerError):  # repacked or not quantized yet: looked at as a plain tensor below
            return backend.config(module).scheme, backend.dequantize(module, torch.float32) if has_values(tensor) else None
    state = getattr(tensor, "quant_state", None)
    if state is not None:  # bitsandbytes' 4 bits
        readable = has_values(tensor) and getattr(state, "packing_format_for_cpu", False) is False
        if not readable:  # repacked for the CPU: its own dequantization gives wrong numbers
            return str(state.quant_type), None
        from bitsandbytes.functional import dequantize_4bit

        return str(state.quant_type), dequantize_4bit(tensor.detach(), state)
    stored = str(tensor.dtype).removeprefix("torch.")
    # bitsandbytes' int8: codes and a scale per row, which the first forward moves from the weight to the layer.
    scale = next((s for o in (tensor, getattr(module, "state", None)) if (s := getattr(o, "SCB", None)) is not None), None)
    if tensor.dtype == torch.int8 and isinstance(scale, Tensor) and has_values(tensor):
        return stored, tensor.detach() * (scale[:, None] / 127)
    return stored, tensor.detach() if tensor.is_floating_point() and has_values(tensor) else None


def _entries(tensor: Tensor, places: Tensor) -> list[float | None]:
    """Return the numbers at ``places`` (dimensions, n); None for those in another process's shard."""
    inside = torch.ones(places.shape[1], dtype=torch.bool)
    if _is_sharded(tensor):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        places = places - torch.tensor(offset)[:, None]
        inside = ((places >= 0) & (places < torch.tensor(shape)[:, None])).all(0)
        tensor = tensor.to_local()
        if tensor.is_meta:
            return [None] * len(inside)
    values = iter(tensor[tuple(places[:, inside].to(tensor.device))].double().tolist())
    # 7 digits are finer than any tolerance and keep the manifest small.
    return [float(f"{next(values):.7g}") if known else None for known in inside.tolist()]


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    if type(tensor) in (Tensor, nn.Parameter):
        return False  # without the import, which takes half a second
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _same_values(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool | None:
    """Return whether two samples of one tensor agree; None when no entry is known on both sides."""
    entries: Iterable[tuple[float | None, float | None]] = zip(saved["entries"], current["entries"], strict=False)
    pairs = [(a, b) for a, b in entries if a is not None and b is not None]
    if not pairs:
        return None
    if saved["stored"] in DENSE and current["stored"] in DENSE:
        different = sum(not abs(a - b) <= FLOAT_TOLERANCE * min(abs(a), abs(b)) + TINY for a, b in pairs)
        # A few rows may differ legally: those that a resize of the vocabulary filled at random.
        return 4 * different <= len(pairs)
    error = sum((a - b) * (a - b) for a, b in pairs)  # `**` raises where a product is infinite
    return error <= QUANTIZED_TOLERANCE * sum(a * a + b * b for a, b in pairs) < math.inf
