"""Views of a handle by which its parts are read, and where the base model lies in what a user hands over."""

from __future__ import annotations

import copy
from dataclasses import replace

from torch import nn

from lightning_peft.strategies.hybrid.compose import Compose
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.stack import RESERVED, AttachEntry, Entry, ReparametrizeEntry


def relative(handle: Handle, path: str) -> Handle:
    """Return a view of a handle whose paths and keys are relative to the module at ``path``."""
    if not path:
        return handle
    view = copy.copy(handle)
    head = f"{path}."
    view.root = handle.root.get_submodule(path)
    view.entries = [_relative_entry(e, "" if e.path == path else e.path.removeprefix(head)) for e in handle.entries]
    view.slots = [replace(s, key=s.key.removeprefix(head)) for s in handle.slots]
    return view


def _relative_entry(entry: Entry, path: str) -> Entry:
    if isinstance(entry, (AttachEntry, ReparametrizeEntry)):
        return replace(entry, path=path, site=replace(entry.site, path=path))
    return replace(entry, path=path)


def parts_of(handle: Handle) -> list[Handle]:
    """Return views of the single strategies of a handle."""
    if not isinstance(handle.strategy, Compose):
        return [handle]
    return [single for i, part in enumerate(handle.strategy.strategies) for single in parts_of(part_of(handle, i, part))]


def without_claims(handle: Handle) -> Handle:
    """Return a view of all entries of a handle, whatever strategies they are of."""
    view = copy.copy(handle)
    view.slots = [slot for slot in handle.slots if not slot.claimed]
    return view


def part_of(handle: Handle, index: int, strategy: PEFTStrategy) -> Handle:
    """Return a view of one part of a composition, with its own strategy."""
    view = handle.part(str(index))
    view.strategy = strategy
    return view


def only_child(module: nn.Module) -> str:
    """Return the name of the only child with parameters, empty where there are several."""
    holders = [n for n, child in module.named_children() if n != RESERVED and next(child.parameters(), None) is not None]
    return holders[0] if len(holders) == 1 and next(module.parameters(recurse=False), None) is None else ""
