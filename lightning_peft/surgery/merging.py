"""Writing an adapter's effect into the base weights and taking it out again. All values are computed before the first is written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_peft.errors import MergeError
from lightning_peft.nn.adapter import MergeableModule
from lightning_peft.surgery.layers import parameter
from lightning_peft.surgery.stack import AttachEntry, Entry, ReparametrizeEntry, stack_of

if TYPE_CHECKING:
    from lightning_peft.surgery.handle import Handle


@dataclass
class MergedWeights:
    """What a merge has changed, so that it can be taken back.

    Args:
        backups: (weight, its value before) where the value is kept; empty if it is computed back.
        added: (module, name) of biases that the merge has added.
    """

    backups: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    added: list[tuple[nn.Module, str]] = field(default_factory=list)

    @classmethod
    def write(cls, handle: Handle, *, exact: bool, untie: bool, add_bias: bool) -> MergedWeights:
        """Merge all adapters of a handle; see :meth:`Handle.merge`."""
        for entry in handle.entries:
            _check_mergeable(handle, entry)
        planned = _Planned(handle.entries, undo=False, add_bias=add_bias)
        if not untie:
            planned.refuse_tied(handle.root)
        adapters = [e.adapter for e in planned.entries if isinstance(e.adapter, MergeableModule)]
        exact = exact or any(type(a).unmerged is MergeableModule.unmerged for a in adapters)
        merge = cls()
        for holder, attribute, value in planned.values():
            stored = getattr(holder, attribute, None)
            if stored is None or (untie and _holders(handle.root, stored) > 1):
                new = nn.Parameter(value.clone(), requires_grad=False)
                setattr(holder, attribute, new)
                if stored is None:
                    merge.added.append((holder, attribute))
                elif exact:
                    merge.backups.append((new, stored.detach().clone()))
                continue
            if exact and not any(known is stored for known, _ in merge.backups):
                merge.backups.append((stored, stored.detach().clone()))
            with torch.no_grad():
                stored.copy_(value)
        return merge

    def take_back(self, handle: Handle) -> None:
        """Undo the merge; see :meth:`Handle.unmerge`."""
        for entry in handle.entries:
            later = [e.name for e in _around(entry, after=True) if e.name != handle.name and e.merged]
            if later:
                raise MergeError(f"unmerge '{later[0]}' first: it was merged on top of '{handle.name}' at '{entry.path}'.")
        with torch.no_grad():
            if self.backups:
                for stored, backup in self.backups:
                    stored.copy_(backup)
            else:
                for holder, attribute, value in _Planned(reversed(handle.entries), undo=True).values():
                    getattr(holder, attribute).copy_(value)
        for holder, attribute in self.added:
            setattr(holder, attribute, None)


class _Planned:
    """New values of the weights and biases of some modules, each adapter seeing what those before it have planned."""

    def __init__(self, entries: Iterable[Entry], *, undo: bool, add_bias: bool = False) -> None:
        self.undo, self.add_bias = undo, add_bias
        self.new: dict[tuple[int, str], tuple[nn.Module, str, Tensor]] = {}
        self.entries = [e for e in entries if isinstance(e, (AttachEntry, ReparametrizeEntry))]
        for entry in self.entries:
            self._add(entry)

    def values(self) -> Iterable[tuple[nn.Module, str, Tensor]]:
        """Yield (holder, attribute, new value)."""
        for module, name, value in self.new.values():
            path, _, attribute = name.rpartition(".")
            yield module.get_submodule(path) if path else module, attribute, value

    def _current(self, module: nn.Module, name: str) -> Tensor:
        known = self.new.get((id(module), name))
        return known[2] if known else parameter(module, name).detach()

    def _set(self, module: nn.Module, name: str, value: Tensor, where: str) -> None:
        if not torch.isfinite(value).all():
            raise MergeError(
                f"merging '{where}' would write values that are not finite ({value.dtype}). The adapter has diverged, or its values "
                "exceed the range of the base's dtype."
            )
        self.new[id(module), name] = (module, name, value)

    def _add(self, entry: AttachEntry | ReparametrizeEntry) -> None:
        module, site, adapter = entry.module, entry.site, entry.adapter
        assert isinstance(adapter, MergeableModule)
        full = self._current(module, site.tensor)
        if full.is_meta:
            raise MergeError(f"'{entry.path}' is on the meta device; load its weights before merging.")
        compute = torch.promote_types(full.dtype, torch.float32)
        bias_name = site.bias_name(module)
        bias = None if bias_name is None else self._current(module, bias_name).to(compute)
        weight = site.kind.canonical(full).to(compute)
        part, bias_part = weight, bias
        if site.rows is not None:
            part = site.rows.take(weight, -2)
            bias_part = None if bias is None else site.rows.take(bias, -1)
        with torch.no_grad():
            result = adapter.unmerged(part, bias_part) if self.undo else adapter.merged(part, bias_part)
        assert result is not None, "a method without unmerged() is merged with backups"
        new_weight, new_bias = result
        if new_bias is not bias_part and new_bias is not None:
            if bias_name is None and not self.add_bias:
                raise MergeError(
                    f"merging '{entry.path}' needs a bias, which the layer lacks. Pass add_bias=True to give it one."
                )
            whole = new_bias if bias is None or site.rows is None else site.rows.put(bias, new_bias, -1)
            self._set(module, bias_name or "bias", whole.to(full.dtype), entry.path)
        stored = site.effective(module, new_weight, full.to(compute)).to(full.dtype)
        self._set(module, site.tensor, stored, entry.path)

    def refuse_tied(self, root: nn.Module) -> None:
        """Raise where a merge would change a weight for a layer that is not to have the new value as well."""
        paths = {id(module): path for path, module in root.named_modules()}
        planned = {f"{paths[id(owner)]}.{name}".lstrip("."): value for owner, name, value in self.new.values()}
        holders: dict[int, list[str]] = {}
        for key, tensor in root.named_parameters(remove_duplicate=False):
            holders.setdefault(id(tensor), []).append(key)
        for keys in holders.values():
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
