"""Small models, batches, a tokenizer and a quiet Trainer for the tests of PEFTLightningModule; nothing is downloaded."""

from __future__ import annotations

import tempfile
from typing import Any

import lightning.pytorch as pl
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    ViTConfig,
)

VOCABULARY = 48
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]


def llama(*, tied: bool = True, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )


def gpt2(**more: Any) -> GPT2Config:
    return GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2, **more
    )


def bert(**more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        **more,
    )


def t5() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )


def vit(**more: Any) -> ViTConfig:
    return ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, **more
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; ids 0 to 3 are <pad>, <s>, </s>, [MASK]."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "[MASK]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", mask_token="[MASK]"
    )


def ragged(lengths: list[int], *, generator: torch.Generator, prompt: int = 2) -> dict[str, Tensor]:
    """A right-padded causal batch with loss after the first ``prompt`` tokens."""
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(4, VOCABULARY, (length,), generator=generator)
        mask[row, :length] = 1
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def trainer(**options: Any) -> pl.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "default_root_dir": tempfile.mkdtemp(),
    }
    return pl.Trainer(**{**quiet, **options})


def trained(module: pl.LightningModule) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
