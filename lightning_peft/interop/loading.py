"""``load_hf``: adapters of Hugging Face peft on a model here."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError
from lightning_peft.hub import local_copy
from lightning_peft.interop import lora, parts
from lightning_peft.interop.files import HFFile, read_folder
from lightning_peft.interop.names import strings
from lightning_peft.interop.registry import PROMPTS, format_of
from lightning_peft.interop.saving import PROMPT_PREFIX, TASKS
from lightning_peft.interop.table import Format, Parsed
from lightning_peft.interop.views import only_child, part_of
from lightning_peft.strategies.hybrid.compose import Compose
from lightning_peft.strategies.install import reinstall
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.strategies.selective.bitfit import BitFit
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy, Family, anatomy_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.tree import ModuleTree, join


def load_hf(
    model: nn.Module,
    source: str | os.PathLike[str],
    name: str = "default",
    revision: str | None = None,
    *,
    anatomy: Family | Mapping[str, Any] | None = None,
) -> Handle:
    """Install an adapter that was saved by Hugging Face peft (or by :func:`save_hf`) on a model, in place.

    Args:
        model: The base model, or a LightningModule that holds it.
        source: The adapter's folder, or the id of its repository on the hub.
        name: Name under which it is installed.
        revision: Branch, tag or commit on the hub.
        anatomy: Roles of an architecture that the package does not know, as given to ``inject``.

    Returns:
        The handle: it trains, merges, saves, and is removed like any other. Modules of ``modules_to_save`` are a part of it.

    Raises:
        FormatError: The files are missing, damaged or have an unknown field or tensor.
        CompatibilityError: The type, or a variant of it, is not here; or it was made for another base model.
        PEFTError: As :func:`lightning_peft.inject`.

    Whatever is raised, the model is left as it was.
    """
    file = read_folder(local_copy(source, revision))
    table = format_of(file.config, file.where)
    table.fields.check(file.config, file.where)
    layers, rest = file.grouped(table.suffixes())
    base = _base_for(model, layers, anatomy)
    parsed = Parsed(file.config, layers, {key.removeprefix(PROMPT_PREFIX): t for key, t in rest.items()}, file.where)
    if table.peft_type not in PROMPTS:
        parsed = replace(parsed, rest=rest)
    parsed = table.addressed(parsed, base)
    tables = parts.tables_in_lora(parsed, base) if table.peft_type == "LORA" else {}
    modules = parts.read_modules(parsed, _without_base(_left(table, parsed), parsed, base), base)
    main = table.strategy(parsed, base)
    found: list[tuple[PEFTStrategy, Callable[[Handle], dict[str, Tensor]]]] = []
    if modules is not None and getattr(main, "bias", "none") == "all":  # a bias of a whole module trains once
        assert isinstance(main, LoRA)
        main, rest_of = replace(main, bias="none"), lora.biases_outside(base, modules.owners)
        found.append((BitFit(targets=rest_of), lambda part: lora.read_biases(parsed, part)))
    found.insert(0, (main, lambda part: table.state(parsed, part, base)))
    if tables:
        rows = parts.token_strategy({path: ids for path, (ids, _) in tables.items()}, base, file.where)
        found.append((rows, lambda part: parts.token_state(part, tables, base, file.where)))
    if modules is not None:
        parameters = modules.parameters
        found.append((modules.strategy(base), lambda part: dict(parameters)))
    strategy = found[0][0] if len(found) == 1 else Compose(parts=tuple(single for single, _ in found))
    handle = reinstall(base.root, strategy, name, adapter_dtype="auto", anatomy=anatomy, room=_room(table, file))
    try:
        values: dict[str, Tensor] = {}
        for i, (single, state) in enumerate(found):
            values |= state(handle if len(found) == 1 else part_of(handle, i, single))
        meta = next((slot.key for slot in handle.slots if slot.tensor().is_meta), None)
        if meta is not None:
            raise CompatibilityError(f"'{meta}' lies on the meta device, which holds no values. Materialise the model first.")
        handle.load_state_dict(values)
    except BaseException:
        handle.remove()
        raise
    handle.usage = _usage(file.config)
    return handle


def _base_for(model: nn.Module, layers: Mapping[str, Any], given: Family | Mapping[str, Any] | None) -> Anatomy:
    """Return the anatomy of the module in ``model`` that has the adapted paths: the model, the HF model in it, or its only child."""
    tree = ModuleTree(model)
    paths = dict.fromkeys(["", *tree.hf_roots, only_child(model)])
    fits = [p for p in paths if all(join(p, path.replace(".base_layer", "")) in tree for path in layers)]
    if not layers:  # prompts: any model fits, so the innermost one that is known as a model
        fits = [*tree.hf_roots, ""]
    return anatomy_of(model.get_submodule(fits[0] if fits else ""), given)


def _left(table: Format, file: Parsed) -> dict[str, Tensor]:
    """Return the tensors that are neither the method's nor token rows: those of whole modules, and copies of the base."""
    names = strings(file.config.get("modules_to_save"), "modules_to_save", file.where)
    left = {}
    for key, tensor in file.rest.items():
        own = table.takes(file, key) or key.endswith(f".{parts.INSIDE}")
        # With bias="all" HF writes the biases of whole modules three times.
        again = own and (".modules_to_save." in key or ".original_module." in key)
        if not again and (not own or parts.saved_under(key, names) is not None):
            left[key] = tensor
    return left


def _without_base(rest: Mapping[str, Tensor], file: Parsed, anatomy: Anatomy) -> dict[str, Tensor]:
    """Return the tensors that are no copies of base weights, which HF puts into files of adapted embeddings.

    Raises:
        CompatibilityError: Such a copy is not what the model has.
    """
    live, kept = dict(anatomy.root.state_dict(keep_vars=True)), {}
    for key, value in rest.items():
        plain = key.replace(".base_layer.", ".")
        target = live.get(plain)
        same = (
            target is not None
            and target.shape == value.shape
            and torch.equal(target.detach(), value.to(target.device, target.dtype))
        )
        if plain != key and not same:
            raise CompatibilityError(
                f"{file.where} carries the base weight '{plain}', and the model's is another one: the base was resized or changed. Resize "
                "the token embeddings as it was done there, or load that base."
            )
        saved = any(plain.startswith(f"{n}.") or f".{n}." in plain for n in file.config.get("modules_to_save") or ())
        if not same or saved:
            kept[plain] = value
    return kept


def _room(table: Format, file: HFFile) -> int | None:
    """Return how many numbers the tensors of the adapter may have; what is missing in the file is told by name later."""
    if table.peft_type in ("ADALORA", "VERA"):  # bounded by the layers, and by the rank in the file
        return None
    return 2 * sum(tensor.numel() for tensor in file.tensors.values())


def _usage(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the config says about the use of the adapter."""
    tasks = {theirs: ours for ours, theirs in TASKS.items()}
    found = {
        "base": config.get("base_model_name_or_path"),
        "revision": config.get("revision"),
        "task": tasks.get(str(config.get("task_type"))),
    }
    return {key: value for key, value in found.items() if isinstance(value, str) and value}
