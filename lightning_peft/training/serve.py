"""A trained adapter on its base, outside a Trainer: generate texts, or merge into a plain model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_peft.checkpoint import load_adapter, read_adapter
from lightning_peft.errors import ConfigError, FormatError
from lightning_peft.loading.base import BaseSource, load_model, load_tokenizer
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.data import PEFTDataModule
from lightning_peft.training.generation import generate
from lightning_peft.training.tasks import TASKS
from lightning_peft.training.tokens import add_special_tokens, resize_embeddings

PROMPT_FIELDS = ("prompt", "chat_template", "system_prompt")
_TEXTS = ("base", "revision", "dtype", "task", "tokenizer", *PROMPT_FIELDS)
_LISTS = ("labels", "special_tokens")
MOST_ROWS = 100_000  # labels or special tokens of a file; each becomes a row of a matrix


def open_adapter(
    adapter: str | os.PathLike[str], base: str | None = None, *, quantized: bool = True, speaks: bool = True
) -> tuple[Handle, Any, dict[str, Any]]:
    """Load the base that an adapter names, with the adapter installed.

    Args:
        adapter: Adapter folder or Lightning ``.ckpt``.
        base: Name or folder of the base; None takes the one that the adapter names.
        quantized: Quantize a base that the adapter names as it was in training.
        speaks: Load the tokenizer; without, only where tokens were added to it, by which the embedding grew.

    Returns:
        The handle (the model is ``handle.root``, in eval mode), the tokenizer (None for a task without text), and how the adapter
        was trained to be used.

    Raises:
        ConfigError: No base is named.
        FormatError, CompatibilityError: As :func:`lightning_peft.load_adapter`.
    """
    usage = _usage(adapter)
    name = base or usage.get("base")
    if not name:
        raise ConfigError(f"'{adapter}' does not say which base model it belongs to; name it with --base.")
    known: dict[str, Any] = {key: usage.get(key) for key in ("revision", "quantization")} if base is None else {}
    source = BaseSource(name=name, dtype=usage.get("dtype", "auto"), **(known if quantized else known | {"quantization": None}))
    folder, task = Path(adapter), usage.get("task", "causal_lm")
    model, tokenizer = load_model(source, task, usage.get("labels")).model, None
    if TASKS[task].reads_text and (speaks or usage.get("special_tokens")):
        own = str(folder) if (folder / "tokenizer_config.json").is_file() else usage.get("tokenizer")
        tokenizer = load_tokenizer(source if own is None else BaseSource(name=own))
        add_special_tokens(tokenizer, usage.get("special_tokens", ()))
        resize_embeddings(model, len(tokenizer))
    handle = load_adapter(model, adapter)
    model.eval()
    return handle, tokenizer, usage


def _usage(adapter: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says about how its adapter is used, checked.

    Raises:
        FormatError: A field has the wrong type, or the task is unknown.
    """
    usage: dict[str, Any] = read_adapter(adapter).manifest.get("usage", {})
    for field, value in usage.items():
        if field in _TEXTS:
            fits = isinstance(value, str)
        elif field in _LISTS:
            fits = isinstance(value, (list, tuple)) and len(value) <= MOST_ROWS and all(isinstance(text, str) for text in value)
        else:
            continue
        if value is not None and not fits:
            raise FormatError(f"'{adapter}': its usage has {field}={str(value)[:100]!r}, which is no such thing. It is damaged.")
    task = usage.get("task", "causal_lm")
    if task not in TASKS:
        raise FormatError(f"'{adapter}' was trained for the task '{task}', none of {', '.join(TASKS)}. Upgrade the package.")
    return usage


def generate_text(
    adapter: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    base: str | None = None,
    raw: bool = False,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """Return what the adapted model writes after each text.

    Args:
        adapter: Adapter folder or Lightning ``.ckpt``.
        texts: Each is put into the prompt that the adapter was trained with.
        base: Name or folder of the base; None takes the one that the adapter names.
        raw: Take each text as the whole prompt.
        seed: Seed of sampling.
        **options: Arguments of the model's ``generate``.
    """
    handle, tokenizer, usage = open_adapter(adapter, base)
    if usage.get("task", "causal_lm") not in ("causal_lm", "seq2seq_lm"):
        raise ConfigError(f"'{adapter}' was trained for {usage['task']}, which generates no text. Use `lightning-peft predict`.")
    prompt = {} if raw else {field: usage[field] for field in PROMPT_FIELDS if usage.get(field) is not None}
    data = PEFTDataModule(predict_texts=list(texts), tokenizer=tokenizer, batch_size=1, max_length=10**6, **prompt)
    data.setup("predict")
    torch.manual_seed(seed)
    answers: list[str] = []
    for batch in data.predict_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert isinstance(ids, Tensor)
        assert isinstance(mask, Tensor)
        answers += generate(handle.root, tokenizer, ids, mask, options)
    return [answer.strip() for answer in answers]


def merge_adapter(adapter: str | os.PathLike[str], output: str | os.PathLike[str], *, base: str | None = None) -> Path:
    """Merge an adapter into its base and save a plain transformers model, with its tokenizer if it reads text; return the folder.

    An adapter that was trained on a quantized base is merged into the dense one, unless the base was prepared (LoftQ): then the layers
    are unpacked as they were in training.

    Raises:
        ConfigError: ``output`` exists and is not empty.
        MergeError: The method cannot be merged.
    """
    folder = Path(output)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"'{folder}' is not empty; name a new folder for the merged model.")
    prepared = bool(read_adapter(adapter).manifest["base"].get("preparation"))
    handle, tokenizer, _ = open_adapter(adapter, base, quantized=prepared)
    handle.merge(quantized="dense")
    handle.remove()
    model: Any = handle.root
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
