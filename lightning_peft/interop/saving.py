"""``save_hf`` and ``push``: adapters of here in the format of Hugging Face peft."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError
from lightning_peft.hub import push_folder
from lightning_peft.interop import lora, parts
from lightning_peft.interop.as_lora import write_as_lora
from lightning_peft.interop.files import PREFIX, write_folder
from lightning_peft.interop.registry import PROMPTS, format_for
from lightning_peft.interop.table import Format, Written
from lightning_peft.interop.views import only_child, parts_of, relative, without_claims
from lightning_peft.strategies.selective.bitfit import BitFit
from lightning_peft.strategies.selective.token_rows import TokenRows
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy, anatomy_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.tree import ModuleTree, is_within

PROMPT_PREFIX = "base_model."
VERSION = "0.21.2"  # of peft, whose format is written
TASKS = {
    "causal_lm": "CAUSAL_LM",
    "seq2seq_lm": "SEQ_2_SEQ_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}
_ENDS = (("ForCausalLM", "CAUSAL_LM"), ("LMHeadModel", "CAUSAL_LM"), ("ForSequenceClassification", "SEQ_CLS"))


@dataclass(frozen=True)
class HFExport:
    """What was written.

    Args:
        folder: The folder.
        peft_type: HF's type of the adapter.
        notes: What the file does not hold of the adapter, or holds in another form.
        errors: ‖ΔW − BA‖ / ‖ΔW‖ of each layer that was approximated (``as_lora``); empty when nothing was.
    """

    folder: Path
    peft_type: str
    notes: tuple[str, ...] = ()
    errors: Mapping[str, float] = field(default_factory=dict)


def save_hf(
    handle: Handle,
    folder: str | os.PathLike[str],
    *,
    as_lora: int | bool = False,
    modules_to_save: Sequence[str] = (),
    root: str | None = None,
) -> HFExport:
    """Save an adapter as a folder that Hugging Face peft loads with ``PeftModel.from_pretrained``.

    Methods that HF has are written as they are; ReLoRA's rounds, DyLoRA at its rank in use, PiSSA and OLoRA as plain LoRA, which they
    equal. Prefixes and P-tuned prompts are written without the network that computed them.

    Args:
        handle: The adapter, not merged.
        folder: The folder; made if needed.
        as_lora: Write the change of the weights as a plain LoRA: True for its exact rank, a number for at most that rank, with the error
            in the result. Only for methods that change weights.
        modules_to_save: Further modules to save whole, as they are now, such as a trained head (``classifier``).
        root: Path of the base model inside the adapted root (``model``), whose name is left out of the keys. None finds it: the Hugging
            Face model that holds all that is adapted, or the only child of a LightningModule.

    Returns:
        What was written.

    Raises:
        CompatibilityError: HF peft has no type that computes the same.
        ConfigError, UnsupportedLayerError, MergeError: It has, and cannot say this of it. Nothing is written then.
    """
    handle._forbid_merged("save_hf()")
    handle._forbid_disabled("save_hf()")
    handle.verify()
    handle._forbid_pieces("save_hf()", (slot.tensor() for slot in handle.slots))
    handle = relative(handle, _base_path(handle, root))
    anatomy = anatomy_of(handle.root)
    flat = list(parts_of(handle))
    errors: dict[str, float] = {}
    if as_lora:
        main = without_claims(handle)
        peft_type, others = "LORA", [part for part in flat if all(slot.claimed for slot in part.slots)]
        written, errors = write_as_lora(main, anatomy, as_lora)
        prefix = PREFIX
        inside = {s.key: s.tensor().detach() for part in flat if part not in others for s in part.slots if s.claimed}
        bias, biases = lora.write_biases(inside, main, {entry.path for entry in main.entries})
        written = Written(written.config | {"bias": bias}, written.tensors | biases)
    else:
        main, others = _main_part(flat)
        table = _table(main.strategy)
        table.check(main.strategy)
        peft_type, prefix = table.peft_type, PROMPT_PREFIX if table.peft_type in PROMPTS else PREFIX
        written = table.write(main, anatomy)
    config, tensors = dict(written.config), dict(written.tensors)
    _add_others(others, peft_type, main, anatomy, config, tensors)
    task = _task(handle)
    claimed = [s.key for part in others if not isinstance(part.strategy, (TokenRows, BitFit)) for s in part.slots if s.claimed]
    heads = [name for name in _HEADS.get(task or "", ()) if name in anatomy.tree and peft_type in PROMPTS]
    saved, values = parts.write_modules(claimed, anatomy, [*modules_to_save, *heads])
    if saved and peft_type == "TRAINABLE_TOKENS":
        raise ConfigError(
            f"{peft_type} of HF peft has no modules_to_save. Save the adapter without {saved}, or together with a LoRA."
        )
    if task in _HEADS and not saved:
        task = None  # HF would look for the head in the file
    if task is None and peft_type in PROMPTS:
        task = "FEATURE_EXTRACTION"  # without a task HF leaves a prompt out
    tensors |= {prefix + key.removeprefix(PREFIX): value for key, value in values.items()}
    empty = next((key for key, value in tensors.items() if value.is_meta), None)
    if empty is not None:
        raise CompatibilityError(f"'{empty}' lies on the meta device, which holds no values. Materialise the model first.")
    common = {
        "peft_type": peft_type,
        "task_type": task,
        "base_model_name_or_path": _name(handle),
        "revision": handle.usage.get("revision"),
        "inference_mode": True,
        "peft_version": VERSION,
    }
    if peft_type != "TRAINABLE_TOKENS":
        common["modules_to_save"] = saved or None
    place = write_folder(folder, common | config, tensors)
    return HFExport(place, peft_type, tuple(_notes(main.strategy, bool(as_lora))), errors)


def push(
    source: Handle | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    **options: Any,
) -> str:
    """Upload an adapter to the Hugging Face hub, in HF peft's format, and return the address of its repository.

    Args:
        source: An adapter, or a folder: of :func:`save_hf`, of HF peft, or of the own format, which is uploaded as it is.
        repo_id: ``user/name``; made if it does not exist.
        private: Make a new repository private.
        revision: Branch; made if it does not exist.
        message: Commit message.
        **options: Of :func:`save_hf`, where ``source`` is an adapter.

    Raises:
        FormatError: The folder holds no adapter; the hub refuses it or cannot be reached.
        DependencyError: huggingface_hub is missing.
    """
    commit = message or "Upload adapter with lightning-peft"
    if isinstance(source, Handle):
        with tempfile.TemporaryDirectory() as folder:
            save_hf(source, folder, **options)
            return push_folder(Path(folder), repo_id, private=private, revision=revision, message=commit)
    if options:
        raise ConfigError(f"push: {sorted(options)} belong to an adapter on a model, and '{source}' is a folder.")
    folder_path = Path(source)
    if not any((folder_path / name).is_file() for name in ("adapter_config.json", "adapter.json")):
        raise FormatError(f"'{source}' is no adapter folder; it holds neither adapter_config.json nor adapter.json.")
    return push_folder(folder_path, repo_id, private=private, revision=revision, message=commit)


def _table(strategy: PEFTStrategy) -> Format:
    table = format_for(strategy)
    if table is None:
        merges = " or write its change of the weights as a LoRA (as_lora=True)," if strategy.mergeable else ""
        raise CompatibilityError(
            f"HF peft has no type for {type(strategy).__name__}. Keep the own format (lp.save_adapter),{merges} or merge it."
        )
    return table


def _base_path(handle: Handle, root: str | None) -> str:
    """Return the path of the base model inside the adapted root."""
    paths = [entry.path for entry in handle.entries] + [slot.key.rpartition(".")[0] for slot in handle.slots if slot.claimed]
    tree = ModuleTree(handle.root)
    if root is not None:
        if root and root not in tree:
            raise ConfigError(f"root={root!r} is no module of {type(handle.root).__name__}.")
        found = root
    else:
        holding = [path for path in tree.hf_roots if all(is_within(own, path) for own in paths)]
        found = holding[0] if holding else only_child(handle.root) if _is_lightning(handle.root) else ""
    outside = [path for path in paths if not is_within(path, found)]
    if outside:
        raise ConfigError(f"'{outside[0]}' is adapted and lies outside of the base model '{found}'. Name another root.")
    return found


def _is_lightning(module: nn.Module) -> bool:
    return any(cls.__name__ == "LightningModule" for cls in type(module).__mro__)


def _main_part(found: list[Handle]) -> tuple[Handle, list[Handle]]:
    """Return the part that gives the file its type, and those that stand beside it.

    Raises:
        CompatibilityError: HF cannot say them in one file.
    """
    if len(found) == 1:
        return found[0], []
    beside = [part for part in found if isinstance(part.strategy, TokenRows) or all(slot.claimed for slot in part.slots)]
    mains = [part for part in found if part not in beside] or [part for part in found if format_for(part.strategy) is not None]
    if len(mains) != 1:
        names = ", ".join(type(part.strategy).__name__ for part in found)
        raise CompatibilityError(
            f"HF peft has one method in a file, with token rows, biases and whole modules beside a LoRA; this is {names}. Save it in the "
            "own format (lp.save_adapter), or its change of the weights with as_lora=True."
        )
    return mains[0], [part for part in found if part is not mains[0]]


def _add_others(
    others: list[Handle], peft_type: str, main: Handle, anatomy: Anatomy, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Add token rows and biases to a LoRA."""
    tokens = [part for part in others if isinstance(part.strategy, TokenRows)]
    trained = [part for part in others if isinstance(part.strategy, BitFit)]
    if (tokens or trained) and peft_type != "LORA":
        raise CompatibilityError(
            f"HF peft has token rows and biases beside a LoRA only, not beside {peft_type}. Save them apart."
        )
    if len(tokens) > 1 or (trained and config.get("bias", "none") != "none"):
        raise CompatibilityError("HF peft has one set of token rows and one of biases in a file. Save them apart.")
    for part in tokens:
        tables = parts.write_tokens(part, anatomy)
        config["trainable_token_indices"] = {path: ids for path, (ids, _) in tables.items()}
        tensors |= {f"{PREFIX}{path}.{parts.INSIDE}": rows for path, (_, rows) in tables.items()}
    for part in trained:
        claimed = {slot.key: slot.tensor().detach() for slot in part.slots}
        beside = [slot.key for other in others if other is not part for slot in other.slots if slot.claimed]
        config["bias"], values = lora.write_biases(claimed, main, {entry.path for entry in main.entries}, beside)
        tensors |= values


def _task(handle: Handle) -> str | None:
    """Return HF's task type, by what the adapter was trained for or by the class of the model."""
    known = TASKS.get(str(handle.usage.get("task")))
    if known is not None:
        return known
    name, settings = type(handle.root).__name__, getattr(handle.root, "config", None)
    if name.endswith("ForConditionalGeneration") and getattr(settings, "is_encoder_decoder", False):
        return "SEQ_2_SEQ_LM"
    return next((task for end, task in _ENDS if name.endswith(end)), None)


def _name(handle: Handle) -> str | None:
    name = handle.usage.get("base") or getattr(getattr(handle.root, "config", None), "_name_or_path", None)
    return str(name) if name else None


def _notes(strategy: PEFTStrategy, approximated: bool) -> list[str]:
    name = type(strategy).__name__
    if approximated:
        return [f"{name} was written as a plain LoRA."]
    if getattr(strategy, "init", None) in ("pissa", "olora"):
        return [f"{name} with init='{strategy.init}' was written as a plain LoRA of twice its rank, for the unchanged base."]  # type: ignore[attr-defined]
    if getattr(strategy, "init", None) == "loftq":
        return ["It was trained on a base that LoftQ has quantized, and holds for one that is quantized in the same way only."]
    notes = {
        "ReLoRA": "The rounds were written as one LoRA of the sum of their ranks.",
        "DyLoRA": "The ranks were cut to the one in use; the file holds no larger ones.",
        "PTuning": "The prompt was written without the network that computed it, so it cannot be trained on as P-tuning.",
        "AdaLoRA": "The allocation of ranks is over in this file.",
        "MoRA": "Only the fork of MoRA's authors reads it: released versions of HF peft have no use_mora.",
    }
    if getattr(strategy, "projection", False):
        return ["The prefix was written without the network that computed it, so it cannot be trained on with it."]
    return [notes[name]] if name in notes else []
