"""Writing an adapter's effect into the base weights and taking it out again.

Every new value is computed and checked before the first is written; then each layer is computed once more and written, so that no
second copy of the model is ever needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, MergeError
from lightning_peft.nn.adapter import MergeableModule
from lightning_peft.quantization.backend import backend_of
from lightning_peft.surgery.layers import dense, parameter
from lightning_peft.surgery.stack import AttachEntry, Entry, ReparametrizeEntry, stack_of

if TYPE_CHECKING:
    from lightning_peft.surgery.handle import Handle

IntoQuantized: TypeAlias = Literal["requantize", "dense"]
_SWALLOWED = 0.05  # below this share of its size, a change has not come through the rounding of the storage
_ROUNDING = math.sqrt(0.75 / (2 * math.log(2)) / 12)  # relative error of rounding, in units of eps, over a log-uniform mantissa


@dataclass(frozen=True)
class MergedLayer:
    """What merging did to one weight. All numbers are Frobenius norms relative to the wanted weight W + ΔW.

    Args:
        path: The weight, relative to the adapted root.
        storage: How it is stored now: a dtype, or a quantization scheme.
        change: ‖ΔW‖.
        predicted: Rounding error that the storage was expected to make.
        measured: Rounding error that it made.
        kept: Share of ΔW that came through: ⟨stored now − stored before, ΔW⟩ / ‖ΔW‖²; 1 is all of it.
    """

    path: str
    storage: str
    change: float
    predicted: float
    measured: float
    kept: float

    @property
    def swallowed(self) -> bool:
        """The change was lost in the rounding: the layer computes what it did before."""
        return self.change > 0 and self.kept < _SWALLOWED


@dataclass(frozen=True)
class MergeReport:
    """What :meth:`Handle.merge` did, weight by weight."""

    layers: tuple[MergedLayer, ...]

    @property
    def swallowed(self) -> tuple[str, ...]:
        """Weights in which the change was lost in the rounding of the storage."""
        return tuple(layer.path for layer in self.layers if layer.swallowed)

    def __str__(self) -> str:
        width = max((len(layer.path) for layer in self.layers), default=4)
        lines = [f"{'weight':<{width}}  storage      change  predicted   measured   kept"]
        lines += [
            f"{x.path:<{width}}  {x.storage:<10} {x.change:>8.2e}   {x.predicted:>8.2e}   {x.measured:>8.2e}  {x.kept:>5.2f}"
            for x in self.layers
        ]
        return "\n".join(lines)


@dataclass
class MergedWeights:
    """A merge in effect.

    Args:
        report: What it did.
        undo: Steps that restore values bit for bit, in the order in which the values were written.
        computed: Groups whose weights are computed back.
    """

    report: MergeReport
    undo: list[Callable[[], object]] = field(default_factory=list)
    computed: list[_Group] = field(default_factory=list)

    @classmethod
    def write(cls, handle: Handle, *, exact: bool, untie: bool, add_bias: bool, quantized: IntoQuantized | None) -> MergedWeights:
        """Merge all adapters of a handle; see :meth:`Handle.merge`."""
        if quantized is not None and quantized not in get_args(IntoQuantized):
            raise ConfigError(f"merge: quantized={quantized!r} is not one of {', '.join(get_args(IntoQuantized))}.")
        for entry in handle.entries:
            _check_mergeable(handle, entry)
        groups = _groups(handle.entries)
        for group in groups:
            group.check(quantized=quantized, add_bias=add_bias)
        if not untie:
            _refuse_tied(handle.root, groups)
        merge, layers, written = cls(MergeReport(())), list[MergedLayer](), set[int]()
        try:
            for group in groups:
                keep = exact or group.needs_backup
                for name, value in group.new_values():
                    stored = group.stored(name)
                    if stored is not None and id(stored) in written:
                        continue  # the same tensor under another name, for which the same value was computed
                    before = None if stored is None else dense(group.module, name, torch.float32).to(value.dtype, copy=True)
                    predicted = group.rounding(name, quantized)
                    apart = stored is not None and untie and _holders(handle.root, stored) > 1
                    merge.undo += group.write(name, value, quantized=quantized, apart=apart, keep=keep)
                    written.add(id(group.stored(name)))
                    if before is not None and before.dim() > 1:
                        layers.append(_measure(group, name, before, value, predicted))
                if not keep:
                    merge.computed.append(group)
        except BaseException:
            merge._restore()
            raise
        merge.report = MergeReport(tuple(layers))
        return merge

    def take_back(self, handle: Handle) -> None:
        """Undo the merge; see :meth:`Handle.unmerge`."""
        for entry in handle.entries:
            later = [e.name for e in _around(entry, after=True) if e.name != handle.name and e.merged]
            if later:
                raise MergeError(f"unmerge '{later[0]}' first: it was merged on top of '{handle.name}' at '{entry.path}'.")
        self._restore()

    def _restore(self) -> None:
        done: set[int] = set()
        for group in reversed(self.computed):
            for name, value in group.old_values():
                stored = parameter(group.module, name)
                if id(stored) not in done:
                    with torch.no_grad():
                        stored.copy_(value)
                    done.add(id(stored))
        for step in reversed(self.undo):
            step()


class _Group:
    """The adapters that are merged into one module, in install order."""

    def __init__(self, module: nn.Module, entries: list[AttachEntry | ReparametrizeEntry]) -> None:
        self.module, self.entries = module, entries
        self.path = entries[0].path
        self.backend = backend_of(module)

    @property
    def needs_backup(self) -> bool:
        """The old values cannot be computed back, because of the method or of the storage."""
        return self.backend is not None or any(type(e.adapter).unmerged is MergeableModule.unmerged for e in self.entries)  # type: ignore[attr-defined]

    def holder(self, name: str) -> tuple[nn.Module, str]:
        """Return the submodule that holds a parameter, and its attribute there."""
        path, _, attribute = name.rpartition(".")
        return (self.module.get_submodule(path) if path else self.module), attribute

    def stored(self, name: str) -> Tensor | None:
        """Return the stored tensor, or None for a bias that the layer lacks."""
        value: Tensor | None = getattr(*self.holder(name), None)
        return value

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of the tensor as numbers; a new bias takes that of the weight."""
        backend, stored = backend_of(self.module), self.stored(name)
        if backend is not None and (stored is None or name == "weight"):
            assert isinstance(self.module, nn.Linear)
            return backend.dense_dtype(self.module)
        return parameter(self.module, "weight" if stored is None else name).dtype

    def new_values(self) -> list[tuple[str, Tensor]]:
        """Return (name, value) of every parameter that the adapters change, in fp32 or better."""
        return self._values(self.entries, undo=False)

    def old_values(self) -> list[tuple[str, Tensor]]:
        """Return (name, value) of every changed parameter as it was, computed back."""
        return self._values(self.entries[::-1], undo=True)

    def _values(self, entries: Iterable[AttachEntry | ReparametrizeEntry], *, undo: bool) -> list[tuple[str, Tensor]]:
        values: dict[str, Tensor] = {}

        def current(name: str) -> Tensor:
            if name not in values:
                return dense(self.module, name, torch.float32)
            return values[name]

        for entry in entries:
            site, adapter = entry.site, entry.adapter
            assert isinstance(adapter, MergeableModule)
            full, bias_name = current(site.tensor), site.bias_name(self.module)
            bias = None if bias_name is None else current(bias_name)
            part, bias_part = site.kind.canonical(full), bias
            if site.rows is not None:
                part = site.rows.take(part, -2)
                bias_part = None if bias is None else site.rows.take(bias, -1)
            with torch.no_grad():
                result = adapter.unmerged(part, bias_part) if undo else adapter.merged(part, bias_part)
            assert result is not None, "a method without unmerged() is merged with backups"
            weight, new_bias = result
            if new_bias is not bias_part and new_bias is not None:
                whole = new_bias if bias is None or site.rows is None else site.rows.put(bias, new_bias, -1)
                values[bias_name or "bias"] = whole
            values[site.tensor] = site.effective(self.module, weight, full)
        return list(values.items())

    def check(self, *, quantized: IntoQuantized | None, add_bias: bool) -> None:
        """Raise if the module cannot take the merged values."""
        if any(parameter(self.module, e.site.tensor).is_meta for e in self.entries):
            raise MergeError(f"'{self.path}' is on the meta device; load its weights before merging.")
        if self.backend is not None and quantized is None:
            assert isinstance(self.module, nn.Linear)
            raise MergeError(
                f"'{self.path}' is stored as {self.backend.config(self.module).scheme}, which cannot hold the merged weight exactly. "
                "Choose: merge(quantized='requantize') rounds it to the same storage, merge(quantized='dense') leaves the layer "
                "unquantized, with the memory that takes."
            )
        for name, value in self.new_values():
            if self.stored(name) is None and not add_bias:
                raise MergeError(f"merging '{self.path}' needs a bias, which the layer lacks. Pass add_bias=True to give it one.")
            dtype = self.dtype(name)
            if not torch.isfinite(value.to(dtype)).all():
                raise MergeError(
                    f"merging '{self.path}' would write values that are not finite ({dtype}). The adapter has diverged, or its values "
                    "exceed the range of the base's dtype."
                )

    def rounding(self, name: str, quantized: IntoQuantized | None) -> float:
        """Return the relative error that storing a value is expected to make."""
        if self.backend is not None and name == "weight" and quantized == "requantize":
            assert isinstance(self.module, nn.Linear)
            return self.backend.expected_error(self.backend.config(self.module))
        dtype = self.dtype(name)  # in fp32 and float64 it is stored as it was computed
        return _ROUNDING * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0

    def write(
        self, name: str, value: Tensor, *, quantized: IntoQuantized | None, apart: bool, keep: bool
    ) -> list[Callable[[], object]]:
        """Store a value and return the steps that take it back exactly; none where it is to be computed back."""
        (holder, attribute), stored = self.holder(name), self.stored(name)
        if self.backend is not None and name == "weight":
            assert isinstance(self.module, nn.Linear)
            if quantized == "requantize":
                return [self.backend.requantize(self.module, value)]
            return [self.backend.densify(self.module, value.to(self.backend.dense_dtype(self.module)))]
        value = value.to(self.dtype(name))
        if stored is None:
            setattr(holder, attribute, nn.Parameter(value, requires_grad=False))
            return [functools.partial(setattr, holder, attribute, None)]
        backup = stored.detach().clone() if keep else None
        if apart:
            stored = nn.Parameter(value.clone(), requires_grad=False)
            setattr(holder, attribute, stored)
        else:
            _put(stored, value)
        return [] if backup is None else [functools.partial(_put, stored, backup)]


def _put(stored: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        stored.copy_(value)


def _groups(entries: Iterable[Entry]) -> list[_Group]:
    found: dict[int, list[AttachEntry | ReparametrizeEntry]] = {}
    for entry in entries:
        if isinstance(entry, (AttachEntry, ReparametrizeEntry)):
            found.setdefault(id(entry.module), []).append(entry)
    return [_Group(group[0].module, group) for group in found.values()]


def _measure(group: _Group, name: str, before: Tensor, wanted: Tensor, predicted: float) -> MergedLayer:
    backend, now = backend_of(group.module), dense(group.module, name, torch.float32).to(wanted.dtype)
    storage = str(group.dtype(name) if backend is None else backend.config(group.module).scheme).removeprefix("torch.")  # type: ignore[arg-type]
    change = wanted - before
    size, squared = float(wanted.norm()) or 1.0, float(change.square().sum())
    kept = float(((now - before) * change).sum()) / squared if squared else 1.0
    return MergedLayer(
        path=f"{group.path}.{name}".lstrip("."),
        storage=storage,
        change=squared**0.5 / size,
        predicted=predicted,
        measured=float((now - wanted).norm()) / size,
        kept=kept,
    )


def _refuse_tied(root: nn.Module, groups: Iterable[_Group]) -> None:
    """Raise where a merge would change a weight for a layer that is not to have the new value as well."""
    holders: dict[int, list[str]] = {}
    for key, tensor in root.named_parameters(remove_duplicate=False):
        holders.setdefault(id(tensor), []).append(key)
    shared = {tensor for tensor, keys in holders.items() if len(keys) > 1}
    planned: dict[str, Tensor] = {}
    for group in groups:
        if any(id(group.stored(e.site.tensor)) in shared for e in group.entries):
            planned |= {f"{group.path}.{name}".lstrip("."): value for name, value in group.new_values()}
    for keys in (holders[tensor] for tensor in shared):
        values = [planned.get(key) for key in keys]
        first = next((v for v in values if v is not None), None)
        if first is not None and not all(v is not None and torch.equal(v, first) for v in values):
            key = next(k for k in keys if k in planned)
            raise MergeError(
                f"'{key}' is tied to another layer, which a merge would change as well. Pass untie=True to give this layer a copy, "
                "or keep the adapter unmerged."
            )


def _check_mergeable(handle: Handle, entry: Entry) -> None:
    if not isinstance(entry, (AttachEntry, ReparametrizeEntry)) or not isinstance(entry.adapter, MergeableModule):
        raise MergeError(
            f"adapter '{handle.name}' cannot be merged: {type(entry.adapter).__name__} at '{entry.path or 'the root'}' is not a change "
            "of a weight. Serve it as an adapter, or train a mergeable method (see `lightning-peft methods`)."
        )
    earlier = [e.name for e in _around(entry, after=False) if e.name != handle.name and not e.merged]
    if earlier:
        raise MergeError(
            f"adapter '{handle.name}' nests outside '{earlier[0]}' on '{entry.path}'. Merge '{earlier[0]}' first: merging keeps the "
            "install order."
        )
    root = stack_of(handle.root)
    assert root is not None
    weight = parameter(entry.module, entry.site.tensor)
    for other in root._handles.values():
        if other is not handle and not other.merged and any(s.claimed and s.tensor() is weight for s in other.slots):
            raise MergeError(
                f"'{entry.path}.{entry.site.tensor}' is trained by adapter '{other.name}', whose originals would lack the merged "
                f"effect. Merge or remove() '{other.name}' first."
            )


def _around(entry: Entry, *, after: bool) -> list[Entry]:
    """Return the adapters installed on the same module before or after this one."""
    stack = stack_of(entry.module)
    assert stack is not None
    place = stack._entries.index(entry)
    return stack._entries[place + 1 :] if after else stack._entries[:place]


def _holders(root: nn.Module, weight: Tensor) -> int:
    return sum(p is weight for m in root.modules() for p in m._parameters.values())
