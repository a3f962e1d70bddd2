"""Reading adapters from a folder or a Lightning checkpoint; everything is checked before anything is returned."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lightning_peft.checkpoint.files import EXTRA, MANIFEST, TENSORS, AdapterFile, sha256
from lightning_peft.checkpoint.keys import file_keys
from lightning_peft.checkpoint.manifest import FORMAT, UPGRADE, Manifest, check_manifest, check_tensors, sealed
from lightning_peft.checkpoint.sharded import ShardedCheckpoint, is_sharded
from lightning_peft.errors import FormatError, did_you_mean
from lightning_peft.untrusted import check_plain, check_safetensors, inside, load_archive, parse_json, read_text

CHECKPOINT_KEY = "peft"


def stamp(checkpoint: dict[str, Any], manifests: Mapping[str, Manifest]) -> None:
    """Enter the manifests of all adapters whose tensors lie in ``checkpoint["state_dict"]``, by adapter name."""
    checkpoint[CHECKPOINT_KEY] = {"format": FORMAT, "adapters": {name: sealed(manifest) for name, manifest in manifests.items()}}


def manifests_of(checkpoint: Mapping[str, Any], where: str = "the checkpoint") -> dict[str, Manifest]:
    """Return the manifests of a loaded checkpoint by adapter name, checked.

    Raises:
        FormatError: It holds no adapter, is newer, or a manifest is malformed.
        UnknownMethodError: A method is not registered here.
    """
    found = checkpoint.get(CHECKPOINT_KEY)
    if found is None:
        raise FormatError(f"{where} holds no adapter: it was saved without PEFTCallback, or before it was added.")
    if not isinstance(found, Mapping) or type(found.get("format")) is not int or not isinstance(found.get("adapters"), Mapping):
        raise FormatError(f"{where}: its entry {CHECKPOINT_KEY!r} is not one of lightning_peft.")
    check_plain(found["adapters"], where)
    if found["format"] > FORMAT:
        raise FormatError(f"{where} has adapter format {found['format']}, this package reads up to {FORMAT}. {UPGRADE}")
    for name, manifest in found["adapters"].items():
        check_manifest(manifest, f"{where}, adapter '{name}'")
    return dict(found["adapters"])


def adapter_of(checkpoint: Mapping[str, Any], name: str | None = None, where: str = "the checkpoint") -> AdapterFile:
    """Return one adapter of a loaded checkpoint, its tensors checked against its manifest.

    Args:
        checkpoint: What Lightning saved, as a dict.
        name: Name of the adapter; needed when there are several.
        where: Names the checkpoint in messages.

    Raises:
        FormatError: No or several adapters and no name; no such name; tensors missing or corrupted.
    """
    manifests = manifests_of(checkpoint, where)
    if name is None and len(manifests) == 1:
        name = next(iter(manifests))
    if name is None:
        raise FormatError(f"{where} holds {len(manifests)} adapters ({', '.join(manifests)}); say which one by its name.")
    if name not in manifests:
        raise FormatError(f"{where} holds no adapter '{name}'.{did_you_mean(name, manifests)} It holds: {', '.join(manifests)}.")
    manifest = manifests[name]
    live = checkpoint.get("state_dict")
    if not isinstance(live, Mapping) or not all(isinstance(key, str) for key in live):
        raise FormatError(f"{where} has no state_dict.")
    keys = file_keys(live, name, manifest["root"])
    state = {key: live[keys[key]] for key in manifest["tensors"] if key in keys}
    extra = {key: live[key] for key in manifest["extra"] if key in live}
    check_tensors(manifest["tensors"], state, where)
    check_tensors(manifest["extra"], extra, where)
    return AdapterFile(manifest, check_manifest(manifest, where), _own(state), _own(extra))


def read_adapter(path: str | os.PathLike[str], name: str | None = None) -> AdapterFile:
    """Read an adapter from its folder, or from a Lightning checkpoint.

    Args:
        path: The folder, or a ``.ckpt`` file or folder (FSDP strategies write folders).
        name: Name of the adapter in a checkpoint; needed when it holds several. A folder holds one.

    Raises:
        FormatError: Nothing is there; it is truncated, corrupted, foreign, or of a newer format.
        UnknownMethodError: The adapter's method is not registered here.
    """
    place = Path(path)
    if place.name in (TENSORS, MANIFEST):
        place = place.parent
    if place.is_dir() and not is_sharded(place):
        return _read_folder(place)
    return adapter_of(load_checkpoint(place), name, f"'{place}'")


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """Load a ``.ckpt`` file, or the folder of a sharded checkpoint, without running anything that it holds (``weights_only=True``).

    Raises:
        FormatError: It is missing, truncated, or holds objects other than tensors and plain values.
    """
    if path.is_dir() and is_sharded(path):
        return ShardedCheckpoint(path).read()
    if not path.is_file():
        raise FormatError(f"'{path}' does not exist: give an adapter folder or a Lightning .ckpt file.")
    try:
        checkpoint = load_archive(path)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"'{path}' is no checkpoint that can be loaded safely: {str(error).splitlines()[0]} Objects of own classes in it come "
            "from save_hyperparameters; keep plain values there."
        ) from error
    except Exception as error:  # damaged bytes can fail anywhere in torch.load
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FormatError(f"'{path}' is no checkpoint, or is truncated: {reason}") from error
    if not isinstance(checkpoint, Mapping):
        raise FormatError(f"'{path}' holds {type(checkpoint).__name__}, not a Lightning checkpoint.")
    return checkpoint


def _read_folder(folder: Path) -> AdapterFile:
    where = f"'{folder}'"
    described, path = inside(folder, MANIFEST), inside(folder, TENSORS)
    if not described.is_file():
        raise FormatError(_foreign(folder))
    manifest = parse_json(read_text(described), f"'{described}'")
    strategy = check_manifest(manifest, f"'{folder / MANIFEST}'")
    file = manifest.get("file")
    if file is None or not path.is_file():
        raise FormatError(f"{where} holds {MANIFEST} but no {TENSORS} that belongs to it; the copy is incomplete.")
    if sha256(path) != file["sha256"]:
        raise FormatError(
            f"'{path}' is not the file that {MANIFEST} describes: it is truncated or corrupted, or saving was interrupted between the "
            "two. Take another copy, or save again."
        )
    check_safetensors(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"'{path}' is not a safetensors file: {error}.") from error
    state = {key: tensor for key, tensor in tensors.items() if not key.startswith(EXTRA)}
    extra = {key.removeprefix(EXTRA): tensor for key, tensor in tensors.items() if key.startswith(EXTRA)}
    check_tensors(manifest["tensors"], state, f"'{path}'")
    check_tensors(manifest["extra"], extra, f"'{path}'")
    return AdapterFile(manifest, strategy, state, extra)


def _foreign(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return (
            f"'{folder}' is an adapter of Hugging Face peft, which is another format. Load it with lp.interop.load_hf(model, folder), or "
            "convert it: lightning-peft convert FOLDER OUTPUT --to native."
        )
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
    return f"'{folder}' is not an adapter folder: it holds {found}, and no {MANIFEST}."


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies, so that one adapter does not keep a whole checkpoint in memory."""
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}
