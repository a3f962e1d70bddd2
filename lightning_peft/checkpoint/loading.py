"""Putting a saved adapter on a model, and describing one without a model."""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.checkpoint.files import AdapterFile
from lightning_peft.checkpoint.manifest import Manifest, check_base, entries_of, require_base
from lightning_peft.checkpoint.reading import adapter_of, load_checkpoint, manifests_of, read_adapter
from lightning_peft.checkpoint.sharded import is_sharded
from lightning_peft.errors import CompatibilityError
from lightning_peft.hub import local_copy
from lightning_peft.strategies.install import reinstall
from lightning_peft.surgery.anatomy import Family
from lightning_peft.surgery.fingerprint import base_fingerprint, compare_structures
from lightning_peft.surgery.handle import Handle


def load_adapter(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str = "default",
    *,
    revision: str | None = None,
    anatomy: Family | Mapping[str, Any] | None = None,
) -> Handle:
    """Install a saved adapter on a model, in place.

    Args:
        model: The base model that the adapter was made for, or a module that holds it where the manifest says.
        path: Adapter folder, or a Lightning ``.ckpt``; else the id of a repository on the Hugging Face hub (``user/name``). Of a
            checkpoint with several adapters, the one called ``name``.
        name: Name under which the adapter is installed.
        revision: Branch, tag or commit on the hub.
        anatomy: Roles of an architecture that the package does not know, as given to ``inject``.

    Returns:
        The handle. ``remove()`` also restores what extra tensors have replaced, unless the adapter is merged.

    Raises:
        FormatError: The file is missing, truncated, corrupted, foreign, or of a newer format; the hub cannot be reached.
        ConfigError: A revision of what is no repository.
        CompatibilityError: The model is not the base that the adapter was made for, or has no values yet.
        UnknownMethodError: The adapter's method is not registered here.

    Whatever is raised, the model is left as it was.
    """
    adapter = _read(local_copy(path, revision), name)
    manifest = adapter.manifest
    root, prefix = _find_root(model, manifest)
    require_base(root, manifest)
    replaced = _extra_targets(model, prefix, adapter)
    room = entries_of(manifest)
    handle = reinstall(root, adapter.strategy, name, adapter_dtype=manifest["adapter_dtype"], anatomy=anatomy, room=room)
    handle.usage = dict(manifest.get("usage", {}))
    try:
        empty = [key for key, tensor in handle.state_dict().items() if tensor.is_meta]
        if empty:
            raise CompatibilityError(f"'{empty[0]}' lies on the meta device, which holds no values. Materialise the model first.")
        handle.load_state_dict(adapter.state)
    except BaseException:
        handle.remove()
        raise
    with torch.no_grad():
        for tensor, value in replaced:
            handle._restore.append(functools.partial(_put_back, handle, tensor, tensor.detach().clone()))
            tensor.copy_(value)
    return handle


def inspect_adapter(path: str | os.PathLike[str]) -> str:
    """Describe the adapter in a folder, or all adapters in a Lightning checkpoint, after checking them; needs no model.

    Raises:
        FormatError: The file is missing, truncated, corrupted, foreign, or of a newer format.
    """
    place = Path(path)
    if (place.is_dir() and not is_sharded(place)) or place.suffix in (".safetensors", ".json"):
        found = [read_adapter(place)]
    else:
        checkpoint = load_checkpoint(place)
        found = [adapter_of(checkpoint, name, f"'{place}'") for name in manifests_of(checkpoint, f"'{place}'")]
    return "\n\n".join(_description(place, adapter) for adapter in found)


def _read(path: Path, name: str) -> AdapterFile:
    if path.suffix != ".ckpt" or not path.is_file():
        return read_adapter(path)
    checkpoint = load_checkpoint(path)
    several = len(manifests_of(checkpoint, f"'{path}'")) > 1
    return adapter_of(checkpoint, name if several else None, f"'{path}'")


def _find_root(model: nn.Module, manifest: Manifest) -> tuple[nn.Module, str]:
    """Return the module that fits as adapted root, and the prefix of its keys in the module that was saved."""
    path = manifest["root"]
    candidates = [(model, path)]
    # Nothing of that name: the adapted root itself was given. A property of that name may raise RuntimeError.
    with contextlib.suppress(AttributeError, RuntimeError):
        candidates.insert(0, (model.get_submodule(path), ""))
    for root, prefix in candidates:
        if compare_structures(manifest["base"]["structure"], base_fingerprint(root)["structure"]) is None:
            return root, prefix
    check_base(candidates[0][0], manifest)  # says what differs
    raise AssertionError("unreachable: no candidate fits")


def _extra_targets(model: nn.Module, prefix: str, adapter: AdapterFile) -> list[tuple[Tensor, Tensor]]:
    """Return (tensor in the model, saved value) of the extra tensors; those that have no place in the model are announced."""
    live = model.state_dict(keep_vars=True)
    targets: list[tuple[Tensor, Tensor]] = []
    homeless: list[str] = []
    for key, value in adapter.extra_state.items():
        inside = not prefix or key.startswith(f"{prefix}.")
        target = live.get(key.removeprefix(f"{prefix}.") if prefix else key) if inside else None
        if target is None:
            homeless.append(key)
        elif target.shape != value.shape:
            raise CompatibilityError(
                f"'{key}' was saved with shape {tuple(value.shape)}, the model has {tuple(target.shape)}. Build the model with the "
                "same head (number of labels)."
            )
        else:
            targets.append((target, value))
    if homeless:
        warnings.warn(
            f"adapter '{adapter.manifest['name']}' was saved with {', '.join(repr(k) for k in homeless[:5])}, for which this model has "
            "no place. Load into the whole module, or take them from read_adapter(path).extra_state.",
            stacklevel=3,
        )
    return targets


def _put_back(handle: Handle, tensor: Tensor, value: Tensor) -> None:
    if not handle.merged:  # merge() and remove() leave a fine-tuned model, with its trained head
        with torch.no_grad():
            tensor.copy_(value)


def _description(path: Path, adapter: AdapterFile) -> str:
    manifest = adapter.manifest
    tensors = [*adapter.state.values()]
    count, size = sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)
    base = sum(manifest["base"]["structure"]["tensors"].values())
    sampled = manifest["base"]["values"]
    lines = [
        f"adapter '{manifest['name']}' in {path}",
        f"  strategy   {_spelled(adapter.strategy.to_dict())}",
        f"  methods    {', '.join(f'{name} (version {v})' for name, v in manifest['methods'].items())}",
        f"  tensors    {len(tensors)}, {count:,} numbers, {size:,} bytes; adapters in {manifest['adapter_dtype']}",
        f"  root       {manifest['root'] or 'the model itself'}",
        f"  base       {base} tensors, structure {manifest['base']['structure']['hash'][:12]}, "
        + (f"values of {len(sampled)} sampled" if sampled else "values not recorded"),
        f"  written by lightning-peft {manifest['package_version']}, format {manifest['format']}",
    ]
    if manifest["extra"]:
        lines.insert(4, f"  extra      {', '.join(manifest['extra'])}")
    return "\n".join(lines)


def _spelled(value: Any) -> str:
    """Return data of a strategy as Python would spell it."""
    if isinstance(value, dict) and "class_path" in value:
        return f"{value['class_path']}({', '.join(f'{k}={_spelled(v)}' for k, v in value['init_args'].items())})"
    if isinstance(value, list):
        return f"[{', '.join(map(_spelled, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k}: {_spelled(v)}' for k, v in value.items() if v)}}}"
    return repr(value)
