"""The benchmark scripts run as they stand, on tiny models: what they report is real, only small."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lightning_peft as lp
from tests.benchmarks import quickstart_vs_hf, tweets
from tests.examples.test_scripts import tiny_bert
from tests.training.data.conftest import SPECIALS, _byte_bpe


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    raw = PreTrainedTokenizerFast(tokenizer_object=_byte_bpe(), bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    ids = {f"{name}_token_id": SPECIALS.index(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    config = LlamaConfig(
        vocab_size=len(raw), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, **ids
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    raw.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft 0.21 asks transformers 5.23 by its old name
@pytest.mark.filterwarnings("ignore:lr=0.02 is above")  # a model this small learns in a few steps only so
def test_both_contenders_learn_the_same_rows(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart_vs_hf.py"])
    rows = [(f"win money now {i}", "spam") if i % 2 else (f"the cat sat at home {i}", "ham") for i in range(160)]
    arguments = [
        f"--model.base={tiny_llama}",
        f"--data.data_path={write(tmp_path / 'sms.csv', rows)}",
        "--data.test_fraction=0.2",
    ]
    arguments += ["--trainer.max_steps=12", "--model.lr=0.02", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    result = quickstart_vs_hf.compare(1, *arguments)
    assert [len(result.ratios(clock)) for clock in (0, 1)] == [12, 12]
    assert result.fit > result.seconds(0) > 0
    assert result.apart < 1e-5  # the same start, the same batches, the same steps: at most rounding is left
    assert result.ours == result.theirs
    text = quickstart_vs_hf.table([result, result])
    assert "accuracy ours - HF +0.0000" in text
    assert "nan" not in text


def test_other_batches_than_the_rivals_are_noticed() -> None:
    class Rival:
        def run(self, steps: int) -> list[torch.Tensor]:
            return [torch.zeros(1, 2)] * steps

    class Trainer:
        global_step = max_steps = 1

    turns = quickstart_vs_hf.InTurn(rival=Rival())
    turns.on_train_start(None, None)
    with pytest.raises(AssertionError, match="same batches"):
        turns.on_train_batch_end(Trainer(), None, None, {"input_ids": torch.ones(1, 2)}, 0)


def test_tweets(tmp_path: Path) -> None:
    words = {"negative": "later !", "neutral": "today .", "positive": "prize now"}
    rows = [(f"i will call you {words[label]} {'! ' * i}", label) for i in range(30) for label in tweets.LABELS]
    source = write(tmp_path / "tweets.csv", [*rows, *rows[:10], ("call me", "neutral"), ("call me", "positive")])
    split = tweets.sample(source, 0, train=60, test=30)
    texts = {name: [row["text"] for row in part] for name, part in split.items()}
    assert {name: len(set(part)) for name, part in texts.items()} == {"train": 60, "test": 30}
    assert not set(texts["train"]) & set(texts["test"])
    assert "call me" not in texts["train"] + texts["test"]  # it has two labels

    base = tiny_bert(tmp_path / "bert")
    scores = {"TF-IDF + LR": [tweets.floor(split)]}
    for name, (strategy, lr) in tweets.CONTENDERS.items():
        small = lp.LoRA(rank=2, targets=strategy.targets) if isinstance(strategy, lp.LoRA) else strategy
        scores[name] = [tweets.train(base, split, small, seed=0, steps=4, lr=lr)]
    assert scores["head"][0].trained == 16 * 3 + 3  # the new classifier, weight and bias
    assert scores["full"][0].trained == scores["full"][0].parameters
    # rank 2, two blocks: four square projections and the two layers of the feed-forward, and the classifier
    assert scores["lora"][0].trained == 2 * 2 * (4 * (16 + 16) + 2 * (16 + 32)) + 51
    assert scores["head"][0].size < scores["lora"][0].size < scores["full"][0].size
    assert [scores[name][0].lr for name in tweets.CONTENDERS] == [1e-3, 2e-4, 2e-5]  # what the strategies suggest
    assert all(0 <= s.accuracy <= 1 and math.isfinite(s.f1) for each in scores.values() for s in each)
    assert len(tweets.table(scores).splitlines()) == 5
