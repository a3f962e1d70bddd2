"""Keys of a live state dict, and keys in files: the same tensors without the adapter's name, the root and wrapper prefixes.

Live: ``[<root>.]<path>.peft.<name>[.<member>].<parameter>``; in a file: ``<path>[.<member>].<parameter>``. A base parameter that
the adapter trains in place keeps its own key in both.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning_peft.errors import ConflictError
from lightning_peft.surgery.fingerprint import strip_wrappers
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.stack import RESERVED

__all__ = ["file_keys", "live_keys", "strip_wrappers"]


def live_keys(handle: Handle, root: str = "") -> dict[str, str]:
    """Return file key -> live state-dict key of every owned tensor, wrapper prefixes stripped.

    Args:
        handle: The adapter.
        root: Path of the adapted root inside the module whose state dict is meant (``net``); empty for the root itself.

    Raises:
        ConflictError: An owner is no longer part of the model, or two owned tensors have one file key.
    """
    handle.verify()
    paths = {id(module): path for path, module in handle.root.named_modules()}
    found: dict[str, str] = {}
    for slot in handle.slots:
        if slot.key in found:
            raise ConflictError(
                f"adapter '{handle.name}': two of its tensors would be '{slot.key}' in a file, '{found[slot.key]}' and one at "
                f"'{paths[id(slot.owner)]}'. Use two adapters instead of one composition."
            )
        found[slot.key] = strip_wrappers(_join(root, paths[id(slot.owner)], slot.attribute))
    return found


def file_keys(live: Iterable[str], name: str, root: str = "") -> dict[str, str]:
    """Return file key -> key, as it stands in ``live``, of every tensor that the adapter ``name`` may own. Needs no model.

    Base keys appear under themselves, since the adapter may train them in place; where an adapter tensor has the same file key,
    it goes first.
    """
    prefix = f"{root}." if root else ""
    adapters: dict[str, str] = {}
    base: dict[str, str] = {}
    for key in live:
        plain = strip_wrappers(key)
        if not plain.startswith(prefix):
            continue
        parts = plain[len(prefix) :].split(".")
        if RESERVED not in parts:
            base[".".join(parts)] = key
            continue
        at = parts.index(RESERVED)
        if parts[at + 1 : at + 2] == [name]:
            adapters[".".join(parts[:at] + parts[at + 2 :])] = key
    return base | adapters


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
