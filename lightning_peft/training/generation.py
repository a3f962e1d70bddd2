"""Prompts to texts, and the likelihood of fixed answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError
from lightning_peft.training.encoded_once import encoded_once

MAX_NEW_TOKENS = 64
"""Where the user sets no length; transformers' own default of 20 tokens counts the prompt in."""


def left_padded(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and mask (batch, length) with the padding of every row moved to the left, where generation needs it."""
    order = torch.argsort(mask, dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def generate(model: nn.Module, tokenizer: Any, ids: Tensor, mask: Tensor, options: Mapping[str, Any]) -> list[str]:
    """Return the texts that the model writes after prompts (batch, length), without the prompts and without specials.

    Args:
        model: An HF model.
        tokenizer: Decodes; gives the pad token, or EOS in its place.
        ids: Prompts.
        mask: 1 where they are no padding.
        options: Arguments of ``model.generate``; greedy and at most 64 new tokens unless they say otherwise.

    Raises:
        ConfigError: The model cannot generate, or there is no tokenizer.
    """
    method: Any = getattr(model, "generate", None)
    if method is None:
        raise ConfigError(f"{type(model).__name__} has no generate(); predicting with this task needs an HF model.")
    if tokenizer is None:
        raise ConfigError("generated ids can only be decoded with a tokenizer: give tokenizer=.")
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
    if not seq2seq:
        ids, mask = left_padded(ids, mask)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    defaults: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": _ends(model, tokenizer), "do_sample": False}
    if "max_length" not in options:
        defaults["max_new_tokens"] = MAX_NEW_TOKENS
    with torch.no_grad():
        out: Tensor = method(input_ids=ids, attention_mask=mask, **{**defaults, **options})
    texts: list[str] = tokenizer.batch_decode(out if seq2seq else out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def _ends(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the tokens that end a text: the model's own (a chat model has several) and the tokenizer's EOS."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = [own] if isinstance(own, int) else list(own or ())
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.append(tokenizer.eos_token_id)
    return ends or None


def answer_scores(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the mean log-likelihood per token of every fixed answer after every prompt, (batch, answers).

    The prompt runs once; its keys and values are shared by all answers.

    Args:
        model: An HF language model in eval mode.
        batch: ``prompt_input_ids``, ``prompt_attention_mask`` (batch, prompt), ``answer_input_ids``, ``answer_attention_mask``
            (batch, answers, length), as ``PEFTDataModule`` makes them.
    """
    prompt, mask = batch["prompt_input_ids"], batch["prompt_attention_mask"]
    answers, real = batch["answer_input_ids"], batch["answer_attention_mask"]
    count = answers.shape[1]
    flat, flat_real = answers.flatten(0, 1), real.flatten(0, 1)
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        logits = _decoder_logits(model, prompt, mask, flat, flat_real, count)
    else:
        logits = _continuation_logits(model, *left_padded(prompt, mask), flat, flat_real, count)
    logp = torch.log_softmax(logits.float(), -1).gather(-1, flat[..., None]).squeeze(-1)
    mean: Tensor = (logp * flat_real).sum(-1) / flat_real.sum(-1)
    return mean.view(-1, count)


def _decoder_logits(model: Any, prompt: Tensor, mask: Tensor, answers: Tensor, real: Tensor, count: int) -> Tensor:
    labels = answers.masked_fill(real == 0, -100)
    decoder = model.prepare_decoder_input_ids_from_labels(labels=labels)
    example = torch.arange(len(prompt), device=prompt.device).repeat_interleave(count)
    with encoded_once(model, example):
        out: Tensor = model(
            input_ids=prompt[example], attention_mask=mask[example], decoder_input_ids=decoder, use_cache=False
        ).logits
    return out


def _continuation_logits(model: Any, prompt: Tensor, mask: Tensor, answers: Tensor, real: Tensor, count: int) -> Tensor:
    """Return logits (batch * answers, length, vocabulary) that predict the answers' tokens after left-padded prompts."""
    named = "position_ids" in inspect.signature(model.forward).parameters

    def run(ids: Tensor, attention: Tensor, **kwargs: Any) -> Any:
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]  # padding on the left takes no position
        return model(input_ids=ids, attention_mask=attention, **({"position_ids": positions} if named else {}), **kwargs)

    whole = torch.cat([mask.repeat_interleave(count, 0), real], 1)
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    with keep_last(head, 1):
        first = run(prompt, mask, use_cache=True)
    cache: Any = getattr(first, "past_key_values", None)
    if not hasattr(cache, "batch_repeat_interleave"):  # no keys and values to share (state-space models)
        ids = torch.cat([prompt.repeat_interleave(count, 0), answers], 1)
        with keep_last(head, answers.shape[1] + 1):
            out: Tensor = run(ids, whole).logits
        return out[:, -answers.shape[1] - 1 : -1]
    logits: Tensor = first.logits[:, -1:].repeat_interleave(count, 0)
    if answers.shape[1] == 1:
        return logits
    cache.batch_repeat_interleave(count)
    rest = run(answers[:, :-1], whole[:, :-1], past_key_values=cache, use_cache=True)
    return torch.cat([logits, rest.logits], 1)


@contextmanager
def keep_last(head: nn.Module | None, count: int) -> Iterator[None]:
    """Let the output head see only the last ``count`` positions: of a prompt no more is needed."""
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][:, -count:], *args[1:]))
    try:
        yield
    finally:
        hook.remove()


def matched(texts: Sequence[str], answers: Sequence[str]) -> list[int]:
    """Return for each text the index of the answer that it equals, white space at the ends aside, or -1."""
    known = {answer.strip(): i for i, answer in enumerate(answers)}
    return [known.get(text.strip(), -1) for text in texts]
