"""The example scripts run as they stand, on tiny models; their real assets are fetched by a slow test only."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples import hf_callback, masked_lm, quickstart
from lightning_peft.checkpoint import read_adapter

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "i",
    "will",
    "call",
    "you",
    "have",
    "a",
    "prize",
    "!",
    ".",
    "now",
    "later",
    "today",
]

SENTIMENT = {"have a prize": "positive", "call later": "neutral", "will": "negative"}


def tiny_bert(folder: Path) -> Path:
    """An encoder without a language-model head, as MiniLM is."""
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=64, **size)).save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path) -> Path:
    """A language model with the words and the tokenizer of :func:`tiny_bert`."""
    tiny_bert(folder)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **size)).save_pretrained(folder)
    names = {f"{n}_token": f"[{n.upper()}]" for n in ("pad", "unk")} | {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast.from_pretrained(folder, **names).save_pretrained(folder)
    return folder


def test_masked_lm(tmp_path: Path) -> None:
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text"], *([f"i will call you {w} {'.' * n}"] for w in ("now", "later") for n in range(1, 30))]
        )
    base = tiny_bert(tmp_path / "bert")
    found = masked_lm.main(str(base), str(tmp_path / "texts.csv"), steps=3, folder=str(tmp_path / "run"))
    assert list(found) == masked_lm.TEXTS
    assert all(len(words) == 1 for words in found.values())
    assert (tmp_path / "run" / "adapter" / "last" / "adapter.safetensors").is_file()


def test_callback_around_a_transformers_model(tmp_path: Path) -> None:
    rows = [["text", "label"], *([f"you {w} {'!' * n}", label] for n in range(1, 12) for w, label in SENTIMENT.items())]
    with (tmp_path / "tweets.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    base = tiny_bert(tmp_path / "bert")
    accuracy = hf_callback.main(str(base), str(tmp_path / "tweets.csv"), rows=30, folder=str(tmp_path / "run"))
    assert 0 <= accuracy <= 1
    saved = read_adapter(tmp_path / "run" / "adapter" / "last")
    assert set(saved.extra_state) == {"model.classifier.weight", "model.classifier.bias"}
    assert all("attention" in key or "dense" in key for key in saved.state)


def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart"])  # LightningCLI warns about pytest's own arguments
    monkeypatch.chdir(tmp_path)
    folder = tiny_llama(tmp_path / "llama")
    rows = [[f"call {'now ' * (n % 5)}{n}", "spam" if n % 3 == 0 else "ham"] for n in range(120)]
    with (tmp_path / "sms.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *rows])
    shown = quickstart.main(folder, tmp_path / "sms.csv", "--trainer.max_steps=2", "--data.test_fraction=0.2")
    assert 0 <= shown["accuracy"] <= 1
    assert shown["bytes"] == Path("runs/quickstart/adapter/last/adapter.safetensors").stat().st_size
    assert "lightning-peft generate runs/quickstart/adapter/last" in capsys.readouterr().out
