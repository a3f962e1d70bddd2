"""``lightning-peft convert``: adapters from one format into another, and onto the hub.

To write HF peft's format a base model is needed for its shapes and layer kinds; its config is enough, unless the method reads the weights
(DoRA, PiSSA, OLoRA, prompts that start from words, ``--as-lora`` of methods that multiply) or a trained head goes along. The own format
records the values of its base, so to write it the weights are always read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lightning_peft.checkpoint import AdapterFile, check_base, read_adapter, save_adapter
from lightning_peft.errors import ConfigError, PEFTError, UnsupportedLayerError
from lightning_peft.hub import local_copy
from lightning_peft.interop import HFExport, is_hf_folder, load_hf, push, save_hf
from lightning_peft.interop.files import HFFile, read_folder
from lightning_peft.loading.base import AUTO_CLASSES, BaseSource, load_model
from lightning_peft.strategies.install import reinstall
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.serve import open_adapter

To = Literal["hf", "native"]
_TASKS = {
    "CAUSAL_LM": "causal_lm",
    "SEQ_2_SEQ_LM": "seq2seq_lm",
    "SEQ_CLS": "sequence_classification",
    "TOKEN_CLS": "token_classification",
}


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    to: To,
    base: str | None = None,
    revision: str | None = None,
    as_lora: int | bool = False,
    repository: str | None = None,
    private: bool = False,
) -> str:
    """Convert an adapter and return what was done, as text.

    Args:
        source: Folder of the own format, Lightning ``.ckpt``, folder of HF peft, or the id of a repository on the hub.
        output: New folder; None with ``repository`` writes none.
        to: Format of the output.
        base: Base model; None takes the one that the adapter names.
        revision: Branch, tag or commit of a source on the hub.
        as_lora: See :func:`lightning_peft.interop.save_hf`.
        repository: Push the result there as well.
        private: Make a new repository private.

    Raises:
        ConfigError: The output is not empty, no base is named, or the options contradict each other.
        PEFTError: As :func:`lightning_peft.interop.save_hf` and :func:`lightning_peft.interop.load_hf`.
    """
    if output is None and repository is None:
        raise ConfigError("convert: name a folder for the result, or a repository (--push).")
    if output is not None and Path(output).exists() and any(Path(output).iterdir()):
        raise ConfigError(f"'{output}' is not empty; name a new folder for the converted adapter.")
    if to == "native" and as_lora:
        raise ConfigError("convert: --as-lora belongs to --to hf; the own format holds every method as it is.")
    place = local_copy(source, revision)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch if output is None else output)
        lines = _to_hf(place, folder, base, as_lora) if to == "hf" else _to_native(place, folder, base)
        if output is not None:
            lines.insert(0, f"{'HF peft' if to == 'hf' else 'own'} format: {folder}")
        if repository is not None:
            lines.append(f"pushed: {push(folder, repository, private=private)}")
    return "\n".join(lines)


def _to_hf(source: Path, folder: Path, base: str | None, as_lora: int | bool) -> list[str]:
    if is_hf_folder(source):
        if not as_lora:
            raise ConfigError(
                f"'{source}' is in HF peft's format already; with --as-lora its change of the weights becomes a LoRA."
            )
        return _told(save_hf(_hf_handle(source, base), folder, as_lora=as_lora))
    adapter = read_adapter(source)
    if not adapter.extra_state and not as_lora and (handle := _on_config(adapter, base)) is not None:
        with contextlib.suppress(UnsupportedLayerError):  # it reads the weights after all
            return _told(save_hf(handle, folder))
    quantized = bool(adapter.manifest["base"].get("preparation"))
    handle = open_adapter(source, base, quantized=quantized, speaks=False)[0]
    return _told(save_hf(handle, folder, as_lora=as_lora, modules_to_save=_heads(adapter, handle)))


def _told(export: HFExport) -> list[str]:
    lines = [f"type: {export.peft_type}", *(f"note: {note}" for note in export.notes)]
    if export.errors:
        worst = max(export.errors, key=export.errors.__getitem__)
        lines.append(f"relative error of the change: at most {export.errors[worst]:.2e} ({worst})")
    return lines


def _to_native(source: Path, folder: Path, base: str | None) -> list[str]:
    if source.exists() and not is_hf_folder(source):
        raise ConfigError(f"'{source}' is in the own format already. Say --to hf.")
    handle = _hf_handle(source, base)
    save_adapter(handle, folder)
    return [f"method: {type(handle.strategy).__name__}"]


def _hf_handle(source: Path, base: str | None) -> Handle:
    """Return an adapter of HF peft on its base."""
    file = read_folder(source)
    config = file.config
    name = base or config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"'{source}' does not say which base model it belongs to; name it with --base.")
    known = config.get("revision") if base is None and isinstance(config.get("revision"), str) else None
    task, place = _TASKS.get(str(config.get("task_type")), "causal_lm"), BaseSource(name=name, revision=known)
    model, labels = load_model(place, task).model, None
    if (rows := _classes(file)) not in (None, getattr(model.config, "num_labels", None)):
        labels = [f"LABEL_{i}" for i in range(rows)]  # HF's files know no names
        model = load_model(place, task, labels).model
    handle = load_hf(model, source)
    handle.usage |= {"base": name, "revision": known} | ({} if labels is None else {"labels": labels})
    return handle


def _classes(file: HFFile) -> int | None:
    """Return how many classes the head in a file has; None without a head."""
    ends = tuple(f".{head}.weight" for head in ("classifier", "score", "classifier.out_proj"))
    return next((len(tensor) for key, tensor in file.tensors.items() if key.endswith(ends)), None)


def _heads(adapter: AdapterFile, handle: Handle) -> Sequence[str]:
    """Return the modules of the base whose tensors were trained and saved beside the adapter."""
    root = adapter.manifest["root"]
    keys = [key.removeprefix(f"{root}.") for key in adapter.extra_state if not root or key.startswith(f"{root}.")]
    live = dict(handle.root.named_modules())
    return tuple(dict.fromkeys(path for key in keys if (path := key.rpartition(".")[0]) in live))


def _on_config(adapter: AdapterFile, base: str | None) -> Handle | None:
    """Return an adapter on a model without weights, made from the config of its base; None where that is not enough."""
    usage = adapter.manifest.get("usage", {})
    name = base or usage.get("base")
    if not isinstance(name, str) or usage.get("special_tokens"):
        return None
    import transformers

    source = BaseSource(name=name, **({"revision": usage.get("revision")} if base is None else {}))
    where, options = source.arguments()
    try:
        config = transformers.AutoConfig.from_pretrained(where, **options)
        labels = usage.get("labels")
        if labels:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        with torch.device("meta"):
            model = getattr(transformers, AUTO_CLASSES[usage.get("task", "causal_lm")]).from_config(config)
        check_base(model, adapter.manifest)
        handle = reinstall(model, adapter.strategy, adapter.manifest["name"], adapter_dtype=adapter.manifest["adapter_dtype"])
        _fill(handle, adapter)
    except (PEFTError, OSError, ValueError, KeyError, NotImplementedError):
        return None  # the whole base is loaded then, and says what is wrong
    handle.usage = dict(usage)
    return handle


def _fill(handle: Handle, adapter: AdapterFile) -> None:
    """Put the tensors of a file into the slots of an adapter on the meta device."""
    for slot in handle.slots:
        value, old = adapter.state[slot.key], slot.tensor()
        if value.shape != old.shape:
            raise ConfigError(f"'{slot.key}' does not fit")
        if isinstance(old, nn.Parameter):
            slot.owner._parameters[slot.attribute] = nn.Parameter(value, requires_grad=slot.trainable)
        else:
            slot.owner._buffers[slot.attribute] = value
