"""Quantized models as files: safetensors and a JSON description, bit for bit, and no pickle.

``model.safetensors`` holds what is dense, by state-dict key; ``quantized.safetensors`` the stored weights of the quantized layers, as
``<path>/<tensor>``; ``quantized.json`` says how they are stored. Beside them lies the config of a transformers model, so that the
folder is a base for :class:`~lightning_peft.loading.base.BaseSource` like any other.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, FormatError
from lightning_peft.files import staged
from lightning_peft.loading.quantize import become, quantization_report
from lightning_peft.quantization.backend import backend_for, backend_of
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.preparation import FACTORS, note, recipe_of
from lightning_peft.surgery.stack import stacks
from lightning_peft.surgery.tree import ModuleTree, join
from lightning_peft.untrusted import check_safetensors, parse_json, read_text

METHOD = "lightning_peft"  # what config.json of a saved transformers model names as its quantization
FORMAT = 1
DENSE, QUANTIZED, DESCRIPTION = "model.safetensors", "quantized.safetensors", "quantized.json"
LEFT, RIGHT = "loftq.left", "loftq.right"
DTYPES = ("float64", "float32", "bfloat16", "float16")  # that a layer computes in


@dataclasses.dataclass(frozen=True)
class SavedLayers:
    """Quantized layers as read from a folder.

    Args:
        where: Names the folder in messages.
        records: Path -> shape, storage, recipe, whether it has a bias.
        tensors: Path -> stored tensors by name.
    """

    where: str
    records: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, dict[str, Tensor]]

    def build(self) -> dict[str, nn.Linear]:
        """Return the layers by path, without biases.

        Raises:
            FormatError: The stored tensors of a layer are not those that its description asks for.
        """
        built: dict[str, nn.Linear] = {}
        for path, record in self.records.items():
            tensors, config = dict(self.tensors[path]), Quantization.parse(record["quantization"])
            if (LEFT in tensors) != (RIGHT in tensors):
                raise FormatError(f"{self.where}, layer '{path}': one of LoftQ's two factors is missing. It is damaged.")
            factors = (tensors.pop(LEFT), tensors.pop(RIGHT)) if LEFT in tensors else None
            try:
                layer = backend_for(config).from_state(tuple(record["shape"]), tensors, None, config)
            except FormatError as error:
                raise FormatError(f"{self.where}, layer '{path}': {error}") from error
            built[path] = layer.to(getattr(torch, record["dtype"]))  # no code changes; it is what the layer computes in
            note(layer, factors, record.get("recipe"))
        return built

    def place(self, model: nn.Module, built: Mapping[str, nn.Linear]) -> None:
        """Turn the layers of a model, which have their biases, into the built ones."""
        tree = ModuleTree(model)
        for path, new in built.items():
            layer = tree[_resolve(tree, path, self.where)]
            layer.__dict__.pop("weight", None)
            bias = layer._parameters.get("bias")
            if bias is not None:
                new.bias = nn.Parameter(bias.detach(), requires_grad=False)
            become(layer, new)


def save_quantized(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Save a quantized model into a folder, in place of the one that may lie there; atomically, see :func:`~.files.staged`.

    A transformers model is read back by name (``BaseSource(name=folder)``), which gives all dense weights the dtype asked for, as for
    any base; any model with :func:`load_quantized`, bit for bit.

    Returns:
        The folder.

    Raises:
        ConfigError: No layer is quantized.
        ConflictError: Adapters are installed: save those with ``save_adapter``, and the base without them.
        FormatError: A tensor has no values (meta device).
    """
    adapted = next((path for path, _, _ in stacks(model)), None)
    if adapted is not None:
        raise ConflictError(
            f"'{adapted or 'the model'}' has adapters. Save them with save_adapter(handle, ...), then remove() them (after merge(), if "
            "their effect is to stay) and save the base."
        )
    tree = ModuleTree(model)
    layers = {path: module for path, module in tree.modules.items() if backend_of(module) is not None}
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no quantized layer. Quantize it first, or save it as any dense model.")
    records: dict[str, dict[str, Any]] = {}
    stored: dict[str, Tensor] = {}
    for path, layer in layers.items():
        backend = backend_of(layer)
        assert backend is not None
        assert isinstance(layer, nn.Linear)
        recipe = recipe_of(layer)
        records[path] = {
            "shape": [layer.out_features, layer.in_features],
            "quantization": {**backend.config(layer).to_dict(), "backend": backend.name},
            "dtype": str(backend.dense_dtype(layer)).removeprefix("torch."),
            **({} if recipe is None else {"recipe": recipe}),
        }
        tensors = dict(backend.state(layer))
        factors = layer.__dict__.get(FACTORS)
        if factors is not None:
            tensors |= {LEFT: factors[0], RIGHT: factors[1]}
        stored |= {f"{path}/{name}": tensor for name, tensor in tensors.items()}
    dense, ties = _dense_tensors(tree, layers)
    meta = next((key for key, tensor in {**dense, **stored}.items() if tensor.is_meta), None)
    if meta is not None:
        raise FormatError(f"'{meta}' has no values (meta device). Materialise the model before saving it.")
    report = quantization_report(model)
    description = {
        "format": FORMAT,
        "layers": records,
        "ties": ties,
        "left": [] if report is None else [dataclasses.asdict(p) for p in report.left],
    }
    text = json.dumps(description, indent=1, ensure_ascii=False)
    stamp = {"format": "pt", "description": hashlib.sha256(text.encode()).hexdigest()}
    with staged(directory, last=(DENSE, QUANTIZED, DESCRIPTION)) as staging:
        _save_config(model, staging)
        try:
            save_file(_own(dense), staging / DENSE, metadata=stamp)
            save_file(_own(stored), staging / QUANTIZED, metadata=stamp)
        except SafetensorError as error:
            raise OSError(f"cannot write into '{directory}': {error}. What lay there is as it was.") from error
        (staging / DESCRIPTION).write_text(text + "\n", encoding="utf-8")
    return Path(directory)


def load_quantized(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a folder that :func:`save_quantized` wrote into a model of the same structure, in place, and return the model.

    Args:
        model: Dense, as its class builds it; its values do not matter, and parameters may lie on the meta device.
        directory: The folder.

    Raises:
        FormatError: The folder is incomplete, damaged, or of a newer format.
        CompatibilityError: The model has other tensors than the saved one.
        ConflictError: The model has quantized layers or adapters already.
        DependencyError: The backend is not installed.

    Everything is checked before the first change.
    """
    folder = Path(directory)
    description = _description(folder)
    where = f"'{folder}'"
    tree = ModuleTree(model)
    busy = next((path for path, module in tree.modules.items() if backend_of(module) is not None), None)
    busy = next((path for path, _, _ in stacks(model)), None) if busy is None else busy
    if busy is not None:
        raise ConflictError(f"'{busy or 'the model'}' is quantized or adapted already. Load into a fresh dense model.")
    saved = _read(folder, description)
    dense = _load(folder / DENSE, folder)
    loose = sorted(set(description["ties"].values()) - dense.keys())
    if loose:
        raise FormatError(f"{where}: tensors are tied to '{loose[0]}', which is not there. It is damaged.")
    slots = _slots(tree, {_resolve(tree, path, where) for path in saved.records})
    wanted, found = set(slots), set(dense) | set(description["ties"])
    if wanted != found:
        raise CompatibilityError(
            f"{where} was saved from another model: {type(model).__name__} lacks {sorted(found - wanted)[:3] or 'nothing'} of it and has "
            f"{sorted(wanted - found)[:3] or 'nothing'} besides."
        )
    for key, (owner, name) in slots.items():
        tensor, shape = getattr(owner, name), tuple(dense[description["ties"].get(key, key)].shape)
        if tuple(tensor.shape) != shape:
            raise CompatibilityError(f"{where}: '{key}' has shape {shape}, the model expects {tuple(tensor.shape)}.")
    for path, record in saved.records.items():
        layer = tree[_resolve(tree, path, where)]
        weight = layer._parameters.get("weight")
        if weight is None or weight.numel() != record["shape"][0] * record["shape"][1]:
            raise CompatibilityError(f"{where}: '{path}' is a layer of shape {record['shape']}, the model has another one there.")
    built = saved.build()
    parameters = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in dense.items()}
    for key, (owner, name) in slots.items():
        source = description["ties"].get(key, key)
        if name in owner._parameters:
            parameter = parameters[source]
            parameter.requires_grad = parameter.is_floating_point() and bool(getattr(owner, name).requires_grad)
            owner._parameters[name] = parameter
        else:
            owner._buffers[name] = dense[source]
    saved.place(model, built)
    return model


def read_layers(model: nn.Module, checkpoint_files: Any) -> SavedLayers:
    """Read the quantized layers that lie beside the files of a transformers model, and take their dense weights off the model.

    Raises:
        FormatError: The folder is not one that :func:`save_quantized` wrote.
    """
    folder = Path(checkpoint_files[0]).parent
    saved = _read(folder, _description(folder))
    tree = ModuleTree(model)
    for path in saved.records:
        layer = tree[_resolve(tree, path, saved.where)]
        # No parameter, so that nothing is read, drawn or moved for it; a tensor, since models ask for it when they draw values.
        weight = layer._parameters.pop("weight")
        assert weight is not None
        marked: Any = weight.detach()
        marked._is_hf_initialized = True
        layer.__dict__["weight"] = marked
    return saved


def is_saved(folder: str | os.PathLike[str]) -> bool:
    """Return whether :func:`save_quantized` wrote the folder."""
    return os.path.isfile(Path(folder).expanduser() / DESCRIPTION)  # False also for a name too long for a file


def _dense_tensors(tree: ModuleTree, layers: Mapping[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the dense tensors by key, and for each tied one the key that holds it."""
    dense: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[int, str] = {}
    for key, (owner, name) in _slots(tree, layers).items():
        tensor = getattr(owner, name)
        if id(tensor) in first:
            ties[key] = first[id(tensor)]
        else:
            first[id(tensor)], dense[key] = key, tensor.detach()
    return dense, ties


def _slots(tree: ModuleTree, quantized: Any) -> dict[str, tuple[nn.Module, str]]:
    """Return (module, attribute) of every dense parameter and persistent buffer by key."""
    slots: dict[str, tuple[nn.Module, str]] = {}
    for path, module in tree.modules.items():
        names = [name for name, value in module._parameters.items() if value is not None]
        hidden = module._non_persistent_buffers_set
        if path in quantized:
            names = [name for name in names if name == "bias"]
        else:
            names += [name for name, value in module._buffers.items() if value is not None and name not in hidden]
        slots |= {join(path, name): (module, name) for name in names}
    return slots


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors takes them: on the CPU, contiguous, each with a storage of its own."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        plain[key] = value.clone() if place in seen and value.numel() else value
        seen.add(place)
    return plain


def _save_config(model: nn.Module, folder: Path) -> None:
    """Write what transformers needs to build the model."""
    described: Any = model
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained") or not hasattr(model, "save_pretrained"):
        return
    config.save_pretrained(str(folder))
    if callable(getattr(model, "can_generate", None)) and described.can_generate():
        described.generation_config.save_pretrained(str(folder))
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["quantization_config"] = {"quant_method": METHOD}
    values["architectures"] = [type(model).__name__]
    values["dtype"] = str(described.dtype).removeprefix("torch.")
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FormatError(f"'{folder}' has no {DESCRIPTION}: it is no folder that save_quantized wrote, or not all of it.")
    text = read_text(path)
    description = parse_json(text, f"'{path}'")
    if not isinstance(description, dict) or type(description.get("format")) is not int:
        raise FormatError(f"'{path}' does not describe a quantized model.")
    if description["format"] > FORMAT:
        raise FormatError(f"'{path}' has format {description['format']}, this package reads up to {FORMAT}. Upgrade the package.")
    if description.keys() != {"format", "layers", "ties", "left"}:
        raise FormatError(f"'{path}' has the fields {sorted(description)}; it is damaged.")
    _check_fields(description, f"'{path}'")
    for name in (DENSE, QUANTIZED):
        try:
            check_safetensors(folder / name)
            with safe_open(folder / name, framework="pt") as file:
                stamp = (file.metadata() or {}).get("description")
        except (OSError, SafetensorError) as error:
            raise FormatError(f"'{folder / name}' is missing or damaged: {error}") from error
        if stamp != hashlib.sha256(text.removesuffix("\n").encode()).hexdigest():
            raise FormatError(
                f"'{folder / name}' does not belong to {DESCRIPTION}: one of them was changed, or saving was interrupted between the two. "
                "Save again."
            )
    return description


def _check_fields(description: Mapping[str, Any], where: str) -> None:
    layers, ties = description["layers"], description["ties"]
    if not isinstance(layers, dict) or not isinstance(ties, dict) or not all(isinstance(key, str) for key in ties.values()):
        raise FormatError(f"{where}: its layers or ties are no objects. It is damaged.")
    for path, record in layers.items():
        shape = record.get("shape") if isinstance(record, dict) else None
        if (
            not isinstance(shape, list)
            or len(shape) != 2
            or not all(type(side) is int and side > 0 for side in shape)
            or not isinstance(record.get("quantization"), dict)
            or record.get("dtype") not in DTYPES
            or not isinstance(record.get("recipe", {}), dict)
        ):
            raise FormatError(f"{where}: what it says about layer '{path}' is damaged: {str(record)[:200]}.")


def _load(path: Path, folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"'{path}' is missing or damaged: {error}. Take another copy of '{folder}'.") from error


def _read(folder: Path, description: Mapping[str, Any]) -> SavedLayers:
    tensors: dict[str, dict[str, Tensor]] = {path: {} for path in description["layers"]}
    for key, tensor in _load(folder / QUANTIZED, folder).items():
        path, _, name = key.partition("/")
        if path not in tensors:
            raise FormatError(f"'{folder / QUANTIZED}' holds '{key}', of which {DESCRIPTION} says nothing. It is damaged.")
        tensors[path][name] = tensor
    for record in description["layers"].values():
        backend_for(Quantization.parse(record["quantization"]))
    return SavedLayers(f"'{folder}'", description["layers"], tensors)


def _resolve(tree: ModuleTree, path: str, where: str) -> str:
    """Return where a saved layer is in a model, which may have a head that the saved one lacks, or the other way round."""
    prefixes = [str(getattr(tree.root, "base_model_prefix", "") or "")]
    for candidate in (path, *(join(p, path) for p in prefixes if p), *(path.removeprefix(f"{p}.") for p in prefixes if p)):
        if candidate in tree:
            return tree.canonical(candidate)
    raise CompatibilityError(f"{where} was saved from another model: {type(tree.root).__name__} has no layer '{path}'.")
