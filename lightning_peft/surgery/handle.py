"""The handle: what an injection owns, and what can be done with it afterwards."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConflictError, MergeError, did_you_mean
from lightning_peft.surgery.merging import IntoQuantized, MergedWeights, MergeReport
from lightning_peft.surgery.stack import (
    RESERVED,
    AttachEntry,
    Entry,
    ReparametrizeEntry,
    bypass_error,
    stack_of,
)
from lightning_peft.types import in_pieces, placed


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
        self.checked = False
        # Whether what has to come from data is there; see PEFTStrategy.calibrate.
        self.calibrated = True
        self._disabled = False
        self.shared: dict[str, nn.Module] = {}
        # Plain values that are saved with the adapter: its base's name, task and prompt. Nothing here reads them.
        self.usage: dict[str, Any] = {}
        # Who installed it, where that has to be known later; a plain value survives copies and child processes.
        self.installer = ""
        self.base_fingerprint: dict[str, Any] | None = None
        self._originals: dict[str, Tensor] = {}
        self._merge: MergedWeights | None = None
        # Partials of module-level functions, not closures: a deep copy of the model gets undo steps for the copy.
        self._restore: list[Callable[[], object]] = []

    def __repr__(self) -> str:
        return f"Handle(name={self.name!r}, strategy={self.strategy!r}, trainable={self.num_trainable():,})"

    @property
    def merged(self) -> bool:
        """The adapter's effect is in the base weights."""
        return self._merge is not None

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
                slot.tensor().copy_(placed(state[key], slot.tensor()))
        self.calibrated = True

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
        self._forbid_pieces("disabled()", (s.tensor() for s in self.slots if s.claimed))
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

    def merge(
        self,
        *,
        exact: bool = False,
        untie: bool = False,
        add_bias: bool = False,
        quantized: IntoQuantized | None = None,
    ) -> MergeReport:
        """Write the adapter's effect into the base weights; the forward no longer runs it.

        Args:
            exact: Keep a copy of every changed weight, so that :meth:`unmerge` restores it bit for bit. Methods whose effect cannot be
                computed back do so anyway.
            untie: Give a tied weight a copy of its own instead of refusing.
            add_bias: Give a layer without bias one where the method needs it.
            quantized: What to do with quantized weights, which cannot hold the result exactly: ``requantize`` rounds it to the same
                storage, ``dense`` leaves the layer an unquantized ``nn.Linear``. None refuses them. :meth:`unmerge` restores the
                codes bit for bit.

        Returns:
            The rounding errors, weight by weight. Warns of weights in which the whole change was lost in the rounding.

        Raises:
            MergeError: The method cannot be merged; an adapter installed earlier on the same layer is not merged yet; a weight is
                tied; a bias is missing; a weight is quantized and ``quantized`` is None; the result is not finite. Nothing is changed
                then.
            ConfigError: ``quantized`` has an unknown value.
        """
        self._forbid_merged("merge()")
        self._forbid_disabled("merge()")
        self._forbid_pieces("merge()", self.root.parameters())
        self.verify()
        self._merge = MergedWeights.write(self, exact=exact, untie=untie, add_bias=add_bias, quantized=quantized)
        for entry in self.entries:
            entry.merged = True
        report = self._merge.report
        if report.swallowed:
            warnings.warn(
                f"adapter '{self.name}': the rounding of the storage swallowed the change of {len(report.swallowed)} of "
                f"{len(report.layers)} weights, such as '{report.swallowed[0]}'. Keep the adapter unmerged, or store them more finely.",
                stacklevel=2,
            )
        return report

    def unmerge(self) -> None:
        """Take the adapter's effect out of the base weights again.

        Bit-exact after ``merge(exact=True)``, else exact up to rounding.

        Raises:
            MergeError: The adapter is not merged, or one merged later on the same layer is in the way.
        """
        if self._merge is None:
            raise MergeError(f"adapter '{self.name}' is not merged.")
        self._merge.take_back(self)
        self._merge = None
        for entry in self.entries:
            entry.merged = False

    def merged_entries(self) -> list[AttachEntry | ReparametrizeEntry]:
        """Return the adapters whose effect is in the base weights now."""
        return [e for e in self.entries if e.merged and isinstance(e, (AttachEntry, ReparametrizeEntry))]

    def _forbid_merged(self, what: str) -> None:
        if self.merged:
            raise MergeError(
                f"{what} while adapter '{self.name}' is merged: its effect is in the base weights. Call unmerge() first."
            )

    def _forbid_disabled(self, what: str) -> None:
        if self._disabled:
            raise ConflictError(f"{what} inside disabled() of adapter '{self.name}'. Leave the `with` block first.")

    def _forbid_pieces(self, what: str, tensors: Iterable[Tensor]) -> None:
        if in_pieces(tensors):
            raise ConflictError(
                f"{what} of adapter '{self.name}' on a sharded model (FSDP), whose weights lie in pieces. Do it in one process: "
                "lp.load_adapter(model, folder) on the unsharded model."
            )

    # ------------------------------------------------------------------ life cycle

    def remove(self) -> None:
        """Take the adapter off: keys, classes, hooks, forwards, flags and, unless merged, values are what they were.

        After :meth:`merge` the merged weights stay, so ``merge(); remove()`` leaves a plain fine-tuned model.
        """
        self._forbid_disabled("remove()")
        self._forbid_pieces("remove()", self.root.parameters())
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
    """Return the handles installed on ``model`` and on adapted roots below it, by name in install order.

    Raises:
        ConflictError: Two roots have an adapter of one name.
    """
    found: dict[str, Handle] = {}
    for module in model.modules():
        stack = stack_of(module)
        for name, handle in stack._handles.items() if stack is not None else ():
            if name in found:
                raise ConflictError(
                    f"two adapters named '{name}' are installed below {type(model).__name__}; give each its own name."
                )
            found[name] = handle
    return found
