"""The adapter folder: ``adapter.safetensors`` with the tensors and ``adapter.json``, the manifest; written atomically."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lightning_peft.checkpoint.manifest import Manifest, manifest_of, sealed
from lightning_peft.files import staged
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.handle import Handle

TENSORS = "adapter.safetensors"
MANIFEST = "adapter.json"
EXTRA = "extra/"  # prefix of extra tensors' keys in the tensor file; a module path has no slash


class Tokenizer(Protocol):
    """Anything that writes itself into a folder, as tokenizers and processors of transformers do."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write all files into the folder."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from a file, checked and not yet on a model.

    Args:
        manifest: See :func:`~lightning_peft.checkpoint.manifest.manifest_of`.
        strategy: The strategy that made it.
        state: Tensors by file key, on the CPU.
        extra_state: Other tensors saved with it, by their key in the user's module.
    """

    manifest: Manifest
    strategy: PEFTStrategy
    state: Mapping[str, Tensor]
    extra_state: Mapping[str, Tensor] = field(default_factory=dict)


def save_adapter(
    handle: Handle,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer | None = None,
    state: Mapping[str, Tensor] | None = None,
    extra_state: Mapping[str, Tensor] | None = None,
    root: str = "",
) -> Path:
    """Save an adapter into a folder, in place of the one that may lie there.

    All files are written and synced beside their places before the first is moved there. A full disk or an interruption
    leaves the previous adapter; one between the two moves of a changed adapter leaves a pair that loading refuses.

    Args:
        handle: The adapter.
        directory: The folder; made if needed.
        tokenizer: Saved into the same folder by its own ``save_pretrained``.
        state: The tensors to save, by file key, when they are not the live ones (gathered from shards).
        extra_state: Other trained tensors to keep with the adapter (a task head), by their key in the user's module.
        root: Path of the adapted root inside the user's module; empty when the adapted root is all there is.

    Returns:
        The folder.

    Raises:
        MergeError: The adapter is merged: its effect is in the base weights.
        ConflictError: A module of the adapter was replaced after injection.
        OSError: The folder cannot be written.
    """
    extra = dict(extra_state or {})
    state = handle.state_dict() if state is None else state
    manifest = manifest_of(handle, root=root, state=state, extra_state=extra)
    return write_adapter(AdapterFile(manifest, handle.strategy, state, extra), directory, tokenizer=tokenizer)


def write_adapter(adapter: AdapterFile, directory: str | os.PathLike[str], *, tokenizer: Tokenizer | None = None) -> Path:
    """Write an adapter that is not (or no longer) on a model, such as one read from a checkpoint; see :func:`save_adapter`."""
    with staged(directory, last=(TENSORS, MANIFEST)) as staging:
        if tokenizer is not None:
            tokenizer.save_pretrained(str(staging))
        _write_tensors(adapter, staging / TENSORS)
        file = {"sha256": sha256(staging / TENSORS)}
        text = json.dumps(sealed({**adapter.manifest, "file": file}), indent=1, ensure_ascii=False)
        # It moves last: until it lies there, it names the checksum of the tensor file before.
        (staging / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return Path(directory)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_tensors(adapter: AdapterFile, path: Path) -> None:
    named = {**adapter.state, **{EXTRA + key: tensor for key, tensor in adapter.extra_state.items()}}
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:  # safetensors refuses two tensors in one storage
            tensor = tensor.clone()
        seen.add(storage)
        plain[key] = tensor
    try:
        save_file(plain, path)
    except SafetensorError as error:
        raise OSError(
            f"cannot write '{path.parent.parent / path.name}': {error}. The previous adapter there is as it was."
        ) from error
