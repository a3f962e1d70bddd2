"""Generation without numbers: reading the prompt, one more token with and without a KV cache, and what the cache weighs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lightning_peft.cost.blocks import Blocks, cached_bytes
from lightning_peft.cost.planned import Planned
from lightning_peft.cost.step import runs
from lightning_peft.surgery.stack import stacks


@dataclass(frozen=True)
class Generation:
    """What generating takes; FLOPs and bytes for the whole batch.

    For a decoder-only transformer these are the closed formulas of methods.md F6: the cache holds 2·b·s·L·n_kv·d_h numbers (of a layer
    with a sliding window, those of its last positions only), a step costs twice the weights it multiplies plus 4·b·t·h of attention.

    Args:
        prefill_flops: Of reading the prompt, with the logits of its last position.
        decode_flops: Of one more token with the cache.
        decode_flops_without_cache: Of one more token without it: the whole text again.
        kv_cache: Bytes of the cache after the prompt, virtual tokens included.
    """

    prefill_flops: int
    decode_flops: int
    decode_flops_without_cache: int
    kv_cache: int


def can_generate(planned: Planned) -> bool:
    """Return whether the model is one of transformers that generates text with a cache."""
    able = getattr(planned.model, "can_generate", None)
    return (
        planned.head is not None and callable(able) and bool(able()) and hasattr(planned.model, "prepare_inputs_for_generation")
    )


def trace_generation(planned: Planned, *, batch: int, prompt: int, again: bool = True) -> Generation:
    """Run a planned model as ``generate`` would: the prompt, then one token.

    Args:
        planned: The model.
        batch: Rows.
        prompt: Tokens of the prompt.
        again: Estimate the token without a cache too; else it is 0.

    Raises:
        ConfigError: The model cannot run this way without numbers.
    """
    tracer, model = planned.tracer, planned.model
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(type(model).forward).parameters else {}
    with _evaluating(planned), runs(planned), torch.no_grad():
        with Blocks(tracer, model, planned.blocks) as blocks:
            watch = tracer.watch()
            out = model(**_texts(planned, batch, prompt), use_cache=True, **last)
            prefill = watch.flops
            more = _next(planned, out, batch)
            kv = blocks.cached + cached_bytes(out.past_key_values)
            del out
            watch = tracer.watch()
            out = model(**more, use_cache=True)
            decode = watch.flops
            del out, more
        whole = 0
        if again:
            with Blocks(tracer, model, planned.blocks):
                watch = tracer.watch()
                model(**_texts(planned, batch, prompt + 1), use_cache=False, **last)
                whole = watch.flops
    tracer.forget_watches()
    return Generation(prefill, decode, whole, kv)


def _texts(planned: Planned, batch: int, length: int) -> dict[str, Any]:
    ids = {"input_ids": torch.zeros(batch, length, dtype=torch.long)}
    if getattr(planned.model.config, "is_encoder_decoder", False):
        ids["decoder_input_ids"] = torch.zeros(batch, 1, dtype=torch.long)
    return ids


def _next(planned: Planned, out: Any, batch: int) -> dict[str, Any]:
    token = torch.zeros(batch, 1, dtype=torch.long)
    if getattr(planned.model.config, "is_encoder_decoder", False):
        return {
            "encoder_outputs": (out.encoder_last_hidden_state,),
            "decoder_input_ids": token,
            "past_key_values": out.past_key_values,
        }
    return {"input_ids": token, "past_key_values": out.past_key_values}


@contextmanager
def _evaluating(planned: Planned) -> Iterator[None]:
    planned.model.eval()
    try:
        yield
    finally:
        planned.model.train()


@contextmanager
def without_adapters(planned: Planned) -> Iterator[None]:
    """Run the base alone."""
    entries = [e for _, _, stack in stacks(planned.model) for e in stack._entries if e.enabled]
    for entry in entries:
        entry.enabled = False
    try:
        yield
    finally:
        for entry in entries:
            entry.enabled = True
