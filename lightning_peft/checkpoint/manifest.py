"""The manifest: everything about an adapter but its numbers, as plain values that JSON and ``weights_only`` loading accept."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_peft.checkpoint.keys import live_keys
from lightning_peft.errors import CompatibilityError, ConflictError, FormatError, UnknownMethodError, did_you_mean
from lightning_peft.quantization.preparation import preparation_of
from lightning_peft.strategies.registry import get_method, resolve
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.fingerprint import UNCHECKED, base_fingerprint, compare_fingerprints, fingerprint
from lightning_peft.surgery.handle import Handle
from lightning_peft.types import AdapterDtype, in_pieces
from lightning_peft.untrusted import check_plain

Manifest = dict[str, Any]
FORMAT = 1
UPGRADE = "Upgrade the package: pip install -U lightning-peft."

CHECKSUM = "checksum"
MOST_STRATEGIES = 64  # in one manifest, with those inside compositions
_STRATEGY_VALUES = 10_000  # of all strategies of a manifest together: every pattern is looked up in every module

# Every field and the type of its value. "file" describes the tensor file and is absent in a checkpoint; "usage" says what the
# adapter was trained for (name of the base, task, prompt) and may be absent; "checksum" (see `sealed`) is absent before 0.2.
_FIELDS: dict[str, type] = {
    "format": int,
    "package_version": str,
    "name": str,
    "methods": dict,
    "strategy": dict,
    "base": dict,
    "root": str,
    "adapter_dtype": str,
    "tensors": dict,
    "extra": dict,
}
_OPTIONAL: dict[str, type] = {"file": dict, "usage": dict, CHECKSUM: str}
_NESTED: dict[str, dict[str, tuple[type, ...]]] = {
    "base": {"structure": (dict,), "values": (dict, type(None)), "preparation": (dict,)},
    "file": {"sha256": (str,)},
}
_ADAPTER_DTYPES = set(get_args(AdapterDtype))
_TENSOR: dict[str, tuple[type, ...]] = {"shape": (list,), "dtype": (str,), "crc32": (int,)}


def manifest_of(
    handle: Handle,
    *,
    root: str = "",
    state: Mapping[str, Tensor] | None = None,
    extra_state: Mapping[str, Tensor] | None = None,
) -> Manifest:
    """Describe an adapter.

    Args:
        handle: The adapter.
        root: Path of the adapted root inside the user's module (``net``); empty when the root itself is the user's module.
        state: The tensors to describe, by file key, when they are not the live ones (gathered from shards, averaged).
        extra_state: Other trained tensors that are saved with the adapter, by their key in the user's module.

    Returns:
        Plain values: ``format``, ``package_version``, ``name``, ``methods`` (name -> version, the parts of a composition too),
        ``strategy``, ``base`` (see :func:`~lightning_peft.surgery.fingerprint.fingerprint`; with ``preparation`` if the base was
        prepared, see :func:`~lightning_peft.quantization.preparation.preparation_of`), ``root``, ``adapter_dtype``, and
        ``tensors`` and ``extra`` (key -> shape, dtype, crc32).

    Raises:
        MergeError: The adapter is merged.
        ConflictError: The handle lost a module, two of its tensors have one key, or ``state`` is not all of them.
        CompatibilityError: A tensor has no values yet (meta device).
    """
    handle._forbid_merged("saving")  # its effect would be in a full checkpoint twice
    if not handle.calibrated:
        raise ConflictError(f"adapter '{handle.name}' waits for its calibration; there is nothing to save yet.")
    keys = live_keys(handle).keys()  # every tensor is reachable, and has a key of its own
    tensors = handle.state_dict() if state is None else state
    if tensors.keys() != keys:
        wrong = sorted(tensors.keys() ^ keys)
        raise ConflictError(f"adapter '{handle.name}' owns {len(keys)} tensors, the state given differs by {wrong[:3]}.")
    if in_pieces([*tensors.values(), *(extra_state or {}).values()]):
        raise ConflictError(
            f"adapter '{handle.name}' lies in pieces on several ranks (FSDP). PEFTCallback gathers it for checkpoints and at the end of "
            "fit; load it from there (lp.load_adapter)."
        )
    strategy = handle.strategy.to_dict(defaults=True)
    claimed = {slot.key for slot in handle.slots if slot.claimed}
    dtypes = {_dtype_name(t.dtype) for key, t in tensors.items() if key not in claimed and t.is_floating_point()}
    return {
        "format": FORMAT,
        "package_version": package_version(),
        "name": handle.name,
        "methods": {info.name: info.version for info in map(get_method, _class_paths(strategy))},
        "strategy": strategy,
        "base": _base_of(handle),
        "root": root,
        "adapter_dtype": dtypes.pop() if len(dtypes) == 1 and dtypes <= _ADAPTER_DTYPES else "auto",
        "tensors": {key: _describe(key, tensor) for key, tensor in tensors.items()},
        "extra": {key: _describe(key, tensor) for key, tensor in (extra_state or {}).items()},
        **({"usage": dict(handle.usage)} if handle.usage else {}),
    }


def sealed(manifest: Mapping[str, Any]) -> Manifest:
    """Return a manifest, about to be written, with a checksum over all its other fields.

    The checksums of the tensors say nothing about the rest: one flipped bit makes an alpha of 16 one of 17.
    """
    return {**manifest, CHECKSUM: _checksum(manifest)}


def entries_of(manifest: Mapping[str, Any]) -> int:
    """Return how many numbers the tensors of a checked manifest have together, without the extra ones."""
    return sum(math.prod(record["shape"]) for record in manifest["tensors"].values())


def check_manifest(manifest: Any, where: str = "the manifest") -> PEFTStrategy:
    """Check a manifest's form and return its strategy.

    Raises:
        FormatError: The format or a method's version is newer than this package; a field is unknown, missing or malformed; or it is
            not as it was written.
        UnknownMethodError: No registered method has the strategy's name.
    """
    check_plain(manifest, where)
    if not isinstance(manifest, Mapping) or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise FormatError(f"{where} is not an adapter manifest: it has no format number.")
    if manifest["format"] > FORMAT:
        raise FormatError(f"{where} has format {manifest['format']}, this package reads up to {FORMAT}. {UPGRADE}")
    known = _FIELDS | _OPTIONAL
    for field, value in manifest.items():
        if field not in known:
            raise FormatError(f"{where} has the unknown field {field!r}.{did_you_mean(str(field), known)} {UPGRADE}")
        if type(value) is not known[field]:
            raise FormatError(f"{where}: field {field!r} is {type(value).__name__}, not {known[field].__name__}.")
    missing = [field for field in _FIELDS if field not in manifest]
    if missing:
        raise FormatError(f"{where} lacks the field {missing[0]!r}; it is damaged.")
    if manifest.get(CHECKSUM) not in (None, _checksum(manifest)):
        raise FormatError(
            f"{where} is not as it was written: its checksum is another one. It is corrupted, or was changed by hand; take another copy."
        )
    _check_contents(manifest, where)
    return _strategy(manifest, where)


def check_base(model: Handle | nn.Module, manifest: Mapping[str, Any]) -> str | None:
    """Check that a model is the base that the adapter was made for.

    Args:
        model: The adapted root, or a handle on it.
        manifest: A checked manifest.

    Returns:
        None, or ``"unchecked"``: the structure fits, and the values could not be compared (meta device); tell the user.

    Raises:
        CompatibilityError: Another structure, or other weights of the same structure.
    """
    carried = set(manifest["tensors"]) | {_relative(key, manifest["root"]) for key in manifest["extra"]}
    known = _base_of(model)
    trained, found = (base.get("preparation", {}) for base in (manifest["base"], known))
    if trained != found:
        raise CompatibilityError(
            f"adapter '{manifest['name']}' was trained on a base with {_prepared(trained)}, and this one has {_prepared(found)}. Prepare "
            "the base the same way (lp.quantize with the same loftq), or train an adapter for this one."
        )
    reason = compare_fingerprints(manifest["base"], known, carried=carried)
    if reason in (None, UNCHECKED):
        return reason
    raise CompatibilityError(
        f"adapter '{manifest['name']}' was made for another base model: {reason}. Load the base it was trained on (same name, "
        "revision and preparation), or train an adapter for this one."
    )


def require_base(model: Handle | nn.Module, manifest: Mapping[str, Any]) -> None:
    """Check the base as :func:`check_base` does, and warn where only its structure could be compared."""
    if check_base(model, manifest) is not None:
        warnings.warn(
            f"adapter '{manifest['name']}': the base weights could not be compared with those it was trained on (only their "
            "structure fits), because one side is on the meta device or packed.",
            stacklevel=3,
        )


def check_tensors(index: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor], where: str) -> None:
    """Check tensors against their records.

    Raises:
        FormatError: One is missing, not listed, or has another shape, dtype or checksum.
    """
    missing, foreign = sorted(index.keys() - tensors.keys()), sorted(tensors.keys() - index.keys())
    if missing or foreign:
        raise FormatError(
            f"{where}: the tensors are not those of the manifest: {missing[:3] or 'none'} missing, {foreign[:3] or 'none'} unknown. "
            "It is damaged, or was made by something else."
        )
    for key, record in index.items():
        tensor: Any = tensors[key]
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise FormatError(f"{where}: '{key}' is no plain tensor, but {type(tensor).__name__}. It was made by something else.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # strides that show one number many times
            raise FormatError(
                f"{where}: tensor '{key}' {tuple(tensor.shape)} has fewer bytes than entries. It was made by something else."
            )
        _expect(record, {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype)}, key, where)
        try:
            found = _describe(key, tensor)
        except (RuntimeError, TypeError) as error:  # dtypes and views that have no bytes to read
            raise FormatError(f"{where}: tensor '{key}' ({tensor.dtype}) cannot be read: {error}.") from error
        _expect(record, found, key, where)


def package_version() -> str:
    """Return the version of the installed package."""
    try:
        return version("lightning-peft")
    except PackageNotFoundError:
        return "not installed"


def _base_of(model: Handle | nn.Module) -> dict[str, Any]:
    """Return the fingerprint of the base before training, and how it was prepared if it was."""
    root = model.root if isinstance(model, Handle) else model
    known = model.base_fingerprint if isinstance(model, Handle) else base_fingerprint(root)
    if known is None or (isinstance(model, Handle) and known["values"] is None):
        # Taken on meta; the weights are there by now, or not. What the adapter itself has moved since, its file carries.
        known = fingerprint(root)
    preparation = preparation_of(root)
    return {**known, "preparation": preparation} if preparation else known


def _prepared(preparation: Mapping[str, Any]) -> str:
    return f"the preparation {dict(preparation)}" if preparation else "no preparation"


def _expect(record: Mapping[str, Any], found: Mapping[str, Any], key: str, where: str) -> None:
    for what, value in found.items():
        if value != record[what]:
            raise FormatError(
                f"{where}: tensor '{key}' has {what} {value}, the manifest says {record[what]}. The file is corrupted, or was changed; "
                "take another copy."
            )


def _checksum(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest as JSON with sorted keys and no spaces: equal in a folder and in a checkpoint."""
    fields = {field: value for field, value in manifest.items() if field != CHECKSUM}
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _relative(key: str, root: str) -> str:
    return key.removeprefix(f"{root}.") if root else key


def _describe(key: str, tensor: Tensor) -> dict[str, Any]:
    if tensor.is_meta:
        raise CompatibilityError(f"'{key}' has no values yet (meta device). Materialise the model first.")
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return {"shape": list(tensor.shape), "dtype": _dtype_name(tensor.dtype), "crc32": zlib.crc32(raw.data)}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _class_paths(strategy: Any) -> Iterator[str]:
    """Yield the class path of a strategy given as data and of those inside it."""
    if isinstance(strategy, Mapping):
        if "class_path" in strategy:
            yield strategy["class_path"]
        strategy = list(strategy.values())
    if isinstance(strategy, list):
        for value in strategy:
            yield from _class_paths(value)


def _check_record(record: Any, fields: Mapping[str, tuple[type, ...]], where: str) -> None:
    if not isinstance(record, Mapping) or record.keys() != fields.keys():
        found = sorted(record) if isinstance(record, Mapping) else type(record).__name__
        raise FormatError(f"{where} is {found}, not the fields {sorted(fields)}. It is damaged, or newer: {UPGRADE}")
    for field, types in fields.items():
        if type(record[field]) not in types:
            raise FormatError(f"{where}: field {field!r} is {type(record[field]).__name__}.")


def _check_contents(manifest: Mapping[str, Any], where: str) -> None:
    for field, shape in _NESTED.items():
        if field in manifest:
            missing: dict[str, Any] = {"preparation": {}} if field == "base" else {}  # not prepared, as in all files before 0.2
            _check_record(missing | manifest[field], shape, f"{where}: {field}")
    _check_record(manifest["base"]["structure"], {"hash": (str,), "tensors": (dict,)}, f"{where}: base.structure")
    if not all(type(count) is int for count in manifest["base"]["structure"]["tensors"].values()):
        raise FormatError(f"{where}: base.structure counts something else than tensors. It is damaged.")
    for key, record in (manifest["base"]["values"] or {}).items():
        _check_record(record, {"stored": (str,), "entries": (list,)}, f"{where}: base value {key!r}")
        if not all(type(entry) in (float, type(None)) for entry in record["entries"]):
            raise FormatError(f"{where}: base value {key!r} holds something else than numbers. It is damaged.")
    if manifest["adapter_dtype"] not in _ADAPTER_DTYPES:
        raise FormatError(
            f"{where}: adapter_dtype {manifest['adapter_dtype']!r} is none of {', '.join(sorted(_ADAPTER_DTYPES))}."
        )
    for key, record in (manifest["tensors"] | manifest["extra"]).items():
        _check_record(record, _TENSOR, f"{where}: tensor {key!r}")
        if not all(type(side) is int and side >= 0 for side in record["shape"]):
            raise FormatError(f"{where}: tensor {key!r} has the shape {record['shape']}. It is damaged.")


def _strategy(manifest: Mapping[str, Any], where: str) -> PEFTStrategy:
    check_plain(manifest["strategy"], f"{where}: the strategy", values=_STRATEGY_VALUES, finite=True)
    try:
        strategy = resolve(_upgraded(manifest["strategy"], manifest["methods"], where))
        count = sum(1 for _ in _class_paths(strategy.to_dict()))
    except UnknownMethodError as error:
        raise UnknownMethodError(f"{where}: {error} Install the package that brings the method, or upgrade this one.") from error
    except FormatError:
        raise
    except Exception as error:  # every method checks its own values, in its own way
        raise FormatError(f"{where}: the strategy cannot be read: {error}") from error
    if count > MOST_STRATEGIES:
        raise FormatError(f"{where}: the strategy consists of {count} methods; {MOST_STRATEGIES} are the most.")
    return strategy


def _upgraded(data: Any, versions: Mapping[str, Any], where: str) -> Any:
    """Return a strategy given as data with every method in its current version."""
    if isinstance(data, list):
        return [_upgraded(value, versions, where) for value in data]
    if not isinstance(data, Mapping):
        return data
    data = {key: _upgraded(value, versions, where) for key, value in data.items()}
    if "class_path" not in data:
        return data
    info = get_method(str(data["class_path"]))
    saved = versions.get(info.name)
    if type(saved) is not int or saved < 1:
        raise FormatError(f"{where}: the version of method '{info.name}' is {saved!r}, not a number.")
    if saved > info.version:
        raise FormatError(f"{where}: method '{info.name}' has version {saved}, this package knows {info.version}. {UPGRADE}")
    if saved < info.version:
        data["init_args"] = info.cls.upgrade(dict(data.get("init_args") or {}), saved)
    return data
