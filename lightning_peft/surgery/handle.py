"""The handle: what an injection owns, and what can be done with it afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConflictError, MergeError, did_you_mean
from lightning_peft.nn.adapter import MergeableModule
from lightning_peft.surgery.layers import parameter
from lightning_peft.surgery.stack import (
    RESERVED,
    AttachEntry,
    Entry,
    ReparametrizeEntry,
    bypass_error,
    stack_of,
)


@dataclass(frozen=True, eq=False)
class Slot:
    """A place that holds an owned tensor: resolved to the tensor when used, since FSDP2 replaces every Parameter object.

    Args:
        owner: The module that holds the tensor.
        attribute: Its attribute name there.
        key: Key in files: relative to the adapted root, without the handle's name.
        trainable: It receives gradient; False for buffers and fixed factors.
        claimed: It is a tensor of the base model that the handle trains in place.
        label: Which part of a composition it belongs to; empty outside compositions.
    """

    owner: nn.Module
    attribute: str
    key: str
    trainable: bool
    claimed: bool = False
    label: str = ""

    def tensor(self) -> Tensor:
        """Return the tensor that the slot holds now."""
        value = getattr(self.owner, self.attribute)
        assert isinstance(value, Tensor)
        return value


class Handle:
    """One installed adapter.

    Made by :func:`lightning_peft.inject`. Everything that trains, is saved and is counted comes from ``slots``, which the edits
    created or claimed; never from substrings of names.
    """

    def __init__(self, root: nn.Module, name: str, strategy: Any) -> None:
        self.root, self.name, self.strategy = root, name, strategy
        self.slots: list[Slot] = []
        self.entries: list[Entry] = []
        self.merged = False
        self.checked = False
        self._disabled = False
        self.shared: dict[str, nn.Module] = {}
        # Plain values that are saved with the adapter: its base's name, task and prompt. Nothing here reads them.
        self.usage: dict[str, Any] = {}
        self.base_fingerprint: dict[str, Any] | None = None
        self._originals: dict[str, Tensor] = {}
        self._backups: list[tuple[Tensor, Tensor]] = []
        self._added: list[tuple[nn.Module, str]] = []
        # Partials of module-level functions, not closures: a deep copy of the model gets undo steps for the copy.
        self._restore: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"Handle(name={self.name!r}, strategy={self.strategy!r}, trainable={self.num_trainable():,})"

    # ------------------------------------------------------------------ ownership

    def trainable_slots(self) -> list[Slot]:
        """Return the slots that receive gradient, each tensor once."""
        seen: set[int] = set()
        return [s for s in self.slots if s.trainable and not (id(s.tensor()) in seen or seen.add(id(s.tensor())))]  # type: ignore[func-returns-value]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that receive gradient, each once, in plan order."""
        return [s.tensor() for s in self.trainable_slots()]  # type: ignore[misc]

    def part(self, label: str) -> Handle:
        """Return a view of one part of a composition: its entries and slots, as the part's own strategy would own them."""
        view = copy.copy(self)
        view.entries = [replace(e, label=_inner(e.label)) for e in self.entries if _outer(e.label) == label]
        view.slots = [replace(s, label=_inner(s.label)) for s in self.slots if _outer(s.label) == label]
        return view

    def num_trainable(self) -> int:
        """Return the number of trainable entries; shared tensors count once."""
        return sum(p.numel() for p in self.trainable_parameters())

    def verify(self) -> None:
        """Check that every owned tensor is still reachable from the root.

        Raises:
            ConflictError: An adapted module was replaced after injection (``resize_token_embeddings`` does that to an untied
                head), so its adapter would be dropped in silence.
        """
        reachable = {id(m) for m in self.root.modules()}
        lost = [s.key for s in self.slots if id(s.owner) not in reachable]
        lost += [e.key for e in self.entries if id(e.module) not in reachable]
        if lost:
            raise ConflictError(
                f"adapter '{self.name}' lost {', '.join(sorted(set(lost))[:5])}: the module was replaced after injection. Make such "
                "changes (resize_token_embeddings) before injecting, or remove() the adapter and inject again."
            )

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Tensor]:
        """Return the owned tensors by file key, detached and not copied."""
        self._forbid_merged("state_dict()")
        # Inside disabled() a claimed tensor holds the base's value; its trained one waits among the originals.
        trained = self._originals if self._disabled else {}
        return {s.key: trained.get(s.key, s.tensor().detach()) if s.claimed else s.tensor().detach() for s in self.slots}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy tensors into the owned slots; all are checked before the first is written.

        Raises:
            CompatibilityError: Keys are missing or unexpected, or a shape differs.
            MergeError: The adapter is merged.
        """
        self._forbid_merged("load_state_dict()")
        self._forbid_disabled("load_state_dict()")
        slots = {s.key: s for s in self.slots}
        missing, unexpected = sorted(slots.keys() - state.keys()), sorted(state.keys() - slots.keys())
        if missing or unexpected:
            hint = did_you_mean(unexpected[0], missing) if missing and unexpected else ""
            raise CompatibilityError(
                f"adapter '{self.name}': the state does not fit. Missing {missing[:3] or 'nothing'} ({len(missing)}), unexpected "
                f"{unexpected[:3] or 'nothing'} ({len(unexpected)}).{hint} It was made with another strategy, target set or root."
            )
        for key, slot in slots.items():
            if slot.tensor().shape != state[key].shape:
                raise CompatibilityError(
                    f"adapter '{self.name}': '{key}' has shape {tuple(state[key].shape)}, the model expects "
                    f"{tuple(slot.tensor().shape)}. It was made with another rank or for another base model."
                )
        with torch.no_grad():
            for key, slot in slots.items():
                slot.tensor().copy_(state[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the base model without this adapter, bit for bit.

        Raises:
            MergeError: The adapter is merged: its effect is in the weights.
        """
        self._forbid_merged("disabled()")
        if self._disabled:  # an inner context changes nothing, and leaves the outer one to give the adapter back
            yield
            return
        self._disabled = True
        for entry in self.entries:
            entry.enabled = False
        self._swap_originals(trains=False)
        try:
            yield
        finally:
            self._swap_originals(trains=True)
            for entry in self.entries:
                entry.enabled = True
            self._disabled = False

    def _swap_originals(self, *, trains: bool) -> None:
        for slot in self.slots:
            if slot.claimed:
                tensor, original = slot.tensor(), self._originals[slot.key]
                self._originals[slot.key] = tensor.data
                tensor.data = original.to(tensor.device, tensor.dtype)
                # Frozen like the rest of the base: a gradient would go to the wrong values, and torch picks other kernels
                # (attention) for weights that want one, which rounds differently.
                tensor.requires_grad_(trains)

    # ------------------------------------------------------------------ merge

    def merge(self, *, exact: bool = False, untie: bool = False, add_bias: bool = False) -> None:
        """Write the adapter's effect into the base weights; the forward no longer runs it.

        Args:
            exact: Keep a copy of every changed weight, so that :meth:`unmerge` restores it bit for bit.
            untie: Give a tied weight a copy of its own instead of refusing.
            add_bias: Give a layer without bias one where the method needs it.

        Raises:
            MergeError: The method cannot be merged; an adapter installed earlier on the same layer is not merged yet; a weight is
                tied; a bias is missing; the result is not finite. Nothing is changed then.
        """
        self._forbid_merged("merge()")
        self._forbid_disabled("merge()")
        self.verify()
        writes: dict[tuple[int, str], tuple[nn.Module, str, Tensor]] = {}
        for entry in self.entries:
            self._plan_merge(entry, writes, add_bias=add_bias)
        if not untie:
            self._refuse_tied(writes)
        for owner, name, value in writes.values():
            path, _, attribute = name.rpartition(".")
            holder = owner.get_submodule(path) if path else owner
            stored = getattr(holder, attribute, None)
            if stored is None or (untie and self._tied(stored)):
                new = nn.Parameter(value.clone(), requires_grad=False)
                setattr(holder, attribute, new)
                if stored is None:
                    self._added.append((holder, attribute))
                elif exact:
                    self._backups.append((new, stored.detach().clone()))
                continue
            if exact and not any(known is stored for known, _ in self._backups):
                self._backups.append((stored, stored.detach().clone()))
            with torch.no_grad():
                stored.copy_(value)
        for entry in self.entries:
            entry.merged = True
        self.merged = True

    def _plan_merge(self, entry: Entry, writes: dict[tuple[int, str], tuple[nn.Module, str, Tensor]], *, add_bias: bool) -> None:
        adapter = entry.adapter
        if not isinstance(entry, (AttachEntry, ReparametrizeEntry)) or not isinstance(adapter, MergeableModule):
            raise MergeError(
                f"adapter '{self.name}' cannot be merged: {type(adapter).__name__} at '{entry.path or 'the root'}' is not a change of "
                "a weight. Serve it as an adapter, or train a mergeable method (see `lightning-peft methods`)."
            )
        stack = stack_of(entry.module)
        assert stack is not None
        earlier = [e.name for e in stack._entries[: stack._entries.index(entry)] if e.name != self.name and not e.merged]
        if earlier:
            raise MergeError(
                f"adapter '{self.name}' nests outside '{earlier[0]}' on '{entry.path}'. Merge '{earlier[0]}' first: merging keeps the "
                "install order."
            )
        module, site = entry.module, entry.site
        bias_name = site.bias_name(module)

        def pending(name: str) -> Tensor:
            known = writes.get((id(module), name))
            return known[2] if known else parameter(module, name).detach()

        trained_by = self._claimed_elsewhere(parameter(module, site.tensor))
        if trained_by is not None:
            raise MergeError(
                f"'{entry.path}.{site.tensor}' is trained by adapter '{trained_by}', whose originals would lack the merged effect. "
                f"Merge or remove() '{trained_by}' first."
            )
        full = pending(site.tensor)
        if full.is_meta:
            raise MergeError(f"'{entry.path}' is on the meta device; load its weights before merging.")
        compute = torch.promote_types(full.dtype, torch.float32)
        weight = site.kind.canonical(full).to(compute)
        bias = None if bias_name is None else pending(bias_name).to(compute)
        if site.rows is not None:
            weight = site.rows.take(weight, -2)
            bias_part = None if bias is None else site.rows.take(bias, -1)
        else:
            bias_part = bias
        with torch.no_grad():
            new_weight, new_bias = adapter.merged(weight, bias_part)
        if new_bias is not bias_part and new_bias is not None:
            if bias_name is None and not add_bias:
                raise MergeError(
                    f"merging '{entry.path}' needs a bias, which the layer lacks. Pass add_bias=True to give it one."
                )
            merged_bias = new_bias if bias is None or site.rows is None else site.rows.put(bias, new_bias, -1)
            writes[id(module), bias_name or "bias"] = (module, bias_name or "bias", merged_bias.to(full.dtype))
        stored = site.effective(module, new_weight, full.to(compute)).to(full.dtype)
        if not torch.isfinite(stored).all():
            raise MergeError(
                f"merging '{entry.path}' would write values that are not finite ({full.dtype}). The adapter has diverged, or its "
                "values exceed the range of the base's dtype."
            )
        writes[id(module), site.tensor] = (module, site.tensor, stored)

    def _refuse_tied(self, writes: dict[tuple[int, str], tuple[nn.Module, str, Tensor]]) -> None:
        """Raise where a merge would change a weight for a layer that is not to have the new value as well."""
        paths = {id(module): path for path, module in self.root.named_modules()}
        planned = {f"{paths[id(owner)]}.{name}".lstrip("."): value for owner, name, value in writes.values()}
        holders: dict[int, list[str]] = {}
        for key, tensor in self.root.named_parameters(remove_duplicate=False):
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

    def merged_entries(self) -> list[AttachEntry | ReparametrizeEntry]:
        """Return the adapters whose effect is in the base weights now."""
        return [e for e in self.entries if e.merged and isinstance(e, (AttachEntry, ReparametrizeEntry))]

    def _claimed_elsewhere(self, weight: Tensor) -> str | None:
        others = [h for h in handles(self.root).values() if h is not self and not h.merged]
        return next((h.name for h in others if any(s.claimed and s.tensor() is weight for s in h.slots)), None)

    def _tied(self, weight: Tensor) -> bool:
        owners = [m for m in self.root.modules() for p in m._parameters.values() if p is weight]
        return len(owners) > 1

    def unmerge(self) -> None:
        """Take the adapter's effect out of the base weights again.

        Bit-exact after ``merge(exact=True)``, else exact up to rounding.

        Raises:
            MergeError: The adapter is not merged; one merged later on the same layer is in the way; the method needs a backup.
        """
        if not self.merged:
            raise MergeError(f"adapter '{self.name}' is not merged.")
        for entry in self.entries:
            stack = stack_of(entry.module)
            assert stack is not None
            later = [e.name for e in stack._entries[stack._entries.index(entry) + 1 :] if e.name != self.name and e.merged]
            if later:
                raise MergeError(f"unmerge '{later[0]}' first: it was merged on top of '{self.name}' at '{entry.path}'.")
        if self._backups:
            with torch.no_grad():
                for stored, backup in self._backups:
                    stored.copy_(backup)
            self._backups.clear()
        else:
            self._subtract()
        for holder, attribute in self._added:
            setattr(holder, attribute, None)
        self._added.clear()
        for entry in self.entries:
            entry.merged = False
        self.merged = False

    def _subtract(self) -> None:
        results: list[tuple[AttachEntry | ReparametrizeEntry, Tensor, Tensor | None]] = []
        for entry in reversed(self.entries):
            assert isinstance(entry, (AttachEntry, ReparametrizeEntry))
            assert isinstance(entry.adapter, MergeableModule)
            weight, bias = entry.site.weight(entry.module), entry.site.bias(entry.module)
            compute = torch.promote_types(weight.dtype, torch.float32)
            with torch.no_grad():
                plain = entry.adapter.unmerged(weight.to(compute), None if bias is None else bias.to(compute))
            if plain is None:
                raise MergeError(f"{type(entry.adapter).__name__} needs a backup to unmerge: use merge(exact=True).")
            results.append((entry, *plain))
        with torch.no_grad():
            for entry, weight, bias in results:
                site, module = entry.site, entry.module
                stored = parameter(module, site.tensor)
                stored.copy_(site.effective(module, weight.to(stored.dtype), stored.detach()))
                name = site.bias_name(module)
                if name is not None and bias is not None:
                    stored_bias = parameter(module, name)
                    bias = bias.to(stored_bias.dtype)
                    stored_bias.copy_(bias if site.rows is None else site.rows.put(stored_bias.detach(), bias, -1))

    def _forbid_merged(self, what: str) -> None:
        if self.merged:
            raise MergeError(
                f"{what} while adapter '{self.name}' is merged: its effect is in the base weights. Call unmerge() first."
            )

    def _forbid_disabled(self, what: str) -> None:
        if self._disabled:
            raise ConflictError(f"{what} inside disabled() of adapter '{self.name}'. Leave the `with` block first.")

    # ------------------------------------------------------------------ life cycle

    def remove(self) -> None:
        """Take the adapter off: keys, classes, hooks, forwards, flags and, unless merged, values are what they were.

        After :meth:`merge` the merged weights stay, so ``merge(); remove()`` leaves a plain fine-tuned model.
        """
        self._forbid_disabled("remove()")
        if not self._restore:
            return  # already removed; what it claimed may by now be trained by somebody else
        if not self.merged:
            for slot in self.slots:
                if slot.claimed:
                    slot.tensor().data.copy_(self._originals[slot.key])
        while self._restore:
            self._restore.pop()()

    def check_ran(self) -> None:
        """Check that every adapted module ran since the injection.

        Raises:
            AdapterBypassedError: A module was bypassed, so its adapter has no effect (design invariant 6).
        """
        silent = [e.path for e in self.entries if not e.conditional and not _ran(e.module)]
        if silent:
            raise bypass_error(self.name, silent)
        self.checked = True

    def summary(self) -> str:
        """Return a table of what trains: place, tensors, shapes, counts, and the share of the base."""
        rows: dict[str, list[Slot]] = {}
        for slot in self.trainable_slots():
            place, _, tensor = slot.key.rpartition(".")
            rows.setdefault(place or tensor, []).append(slot)
        base = sum(p.numel() for n, p in self.root.named_parameters() if RESERVED not in n.split("."))
        total = self.num_trainable()
        width = max((len(r) for r in rows), default=4)
        lines = [
            f"adapter '{self.name}' ({type(self.strategy).__name__}): {total:,} trainable, {total / max(base, 1):.3%} of {base:,}"
        ]
        for place, slots in rows.items():
            what = ", ".join(f"{s.attribute} {'x'.join(map(str, s.tensor().shape))}" for s in slots)
            lines.append(f"  {place:<{width}}  {what}")
        return "\n".join(lines)


def _outer(label: str) -> str:
    return label.partition("-")[0]


def _inner(label: str) -> str:
    return label.partition("-")[2]


def _ran(module: nn.Module) -> bool:
    stack = stack_of(module)
    return stack is None or stack._ran


def handles(model: nn.Module) -> dict[str, Handle]:
    """Return the handles installed on ``model``, or on the adapted root below it, by name in install order."""
    for module in model.modules():
        stack = stack_of(module)
        if stack is not None and stack._handles:
            return dict(stack._handles)
    return {}
