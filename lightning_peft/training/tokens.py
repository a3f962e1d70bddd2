"""Added special tokens: in the tokenizer, and as new rows of the embeddings that train while the old ones stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_peft.errors import ConfigError
from lightning_peft.strategies.hybrid.compose import Compose
from lightning_peft.strategies.selective.token_rows import TokenRows
from lightning_peft.strategies.strategy import PEFTStrategy


def add_special_tokens(tokenizer: Any, tokens: Sequence[str]) -> None:
    """Let the tokenizer know ``tokens`` as special ones; those that it has stay what they are.

    Raises:
        ConfigError: There is no tokenizer.
    """
    if tokenizer is None:
        raise ConfigError("special_tokens need a tokenizer: give tokenizer=, or a base that comes with one.")
    tokenizer.add_tokens(list(tokens), special_tokens=True)


def with_new_rows(strategy: PEFTStrategy, model: nn.Module, tokenizer: Any, tokens: Sequence[str]) -> PEFTStrategy:
    """Make room for ``tokens`` in the embeddings and return the strategy that trains their rows as well.

    Must run before the injection. New rows start as the mean of the old ones: the same on every rank and in every process.

    Raises:
        ConfigError: The model cannot resize its embeddings.
    """
    ids = sorted(tokenizer.convert_tokens_to_ids(list(tokens)))
    resize_embeddings(model, len(tokenizer))
    if strategy.info.name == "full":  # trains all rows
        return strategy
    return Compose(parts=(strategy, TokenRows(ids=tuple(ids))))


def resize_embeddings(model: Any, size: int) -> None:
    """Give the embeddings at least ``size`` rows; new ones start as the mean of the old ones.

    Raises:
        ConfigError: The model cannot resize its embeddings.
    """
    if not hasattr(model, "resize_token_embeddings"):
        raise ConfigError(f"special_tokens: {type(model).__name__} has no resize_token_embeddings(); use an HF model.")
    old = model.get_input_embeddings().weight.shape[0]
    if size <= old:
        return
    with torch.random.fork_rng(devices=[]):  # transformers draws the new rows, which are overwritten below
        model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and not weight.is_meta:
            with torch.no_grad():
                weight[old:] = weight[:old].to(torch.float32).mean(0).to(weight.dtype)
