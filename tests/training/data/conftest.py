"""Tiny tokenizers, built in memory, and files to read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat sat on the mat . Classify : Answer spam ham user assistant system hello there friend",
    "win money now call this number ; see you at home tonight ok",
] * 4
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def _byte_bpe() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """``make_tokenizer(adds_bos=, adds_eos=, pad=, eos=, chat=, metaspace=)``."""
    byte_level = _byte_bpe().to_str()

    def make(
        *,
        adds_bos: bool = False,
        adds_eos: bool = False,
        pad: str | None = "<pad>",
        eos: str | None = "</s>",
        chat: str | None = None,
        metaspace: bool = False,
    ) -> PreTrainedTokenizerFast:
        if metaspace:
            raw = Tokenizer(models.BPE())
            raw.pre_tokenizer = pre_tokenizers.Metaspace()
            raw.decoder = decoders.Metaspace()
            alphabet = sorted(set("".join(CORPUS)) | {"\n", "▁"})
            raw.train_from_iterator(
                CORPUS,
                trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False),
            )
        else:
            raw = Tokenizer.from_str(byte_level)
        parts = [*(["<s>"] if adds_bos else []), "$A", *(["</s>"] if adds_eos else [])]
        ids = [(t, raw.token_to_id(t)) for t in ("<s>", "</s>")]
        raw.post_processor = processors.TemplateProcessing(single=" ".join(parts), special_tokens=ids)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token=eos, pad_token=pad)
        tokenizer.chat_template = chat
        return tokenizer

    return make


@pytest.fixture(scope="session")
def bert_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece that splits long words, with [CLS] and [SEP]."""
    raw = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.train_from_iterator(
        ["cat dog sun play run the a big", "ing er ed un s"] * 3,
        trainers.WordPieceTrainer(
            vocab_size=200,
            special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
            initial_alphabet=list("abcdefghijklmnopqrstuvwxyz"),
            show_progress=False,
        ),
    )
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", raw.token_to_id("[CLS]")), ("[SEP]", raw.token_to_id("[SEP]"))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """``jsonl(rows, name=)`` writes the rows and returns the path."""

    def write(rows: list[dict[str, Any]], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def sms(jsonl: Callable[..., str]) -> str:
    """Forty different messages, one in four spam."""
    return jsonl([{"text": f"call number {i} now", "label": "spam" if i % 4 == 0 else "ham"} for i in range(40)])
