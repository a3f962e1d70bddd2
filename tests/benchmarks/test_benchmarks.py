"""The benchmark scripts run as they stand, on tiny models: what they report is real, only small."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lightning_peft as lp
from tests.benchmarks import contenders, mora_vs_lora_uuid, profile_step, quickstart_vs_hf, step_cost, tweets
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


def test_mora_against_lora_on_pairs_of_uuids(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mora_vs_lora_uuid, "CONTENDERS", {"lora": lp.LoRA(rank=4), "mora": lp.MoRA(rank=4)})
    arguments = ["--seeds", "0", "1", "--pairs", "6", "--steps", "4", "--out", str(tmp_path / "out" / "curves")]
    found = mora_vs_lora_uuid.main(arguments, base=str(tiny_llama))
    lora, mora = (found[name] for name in ("lora", "mora"))
    # rank 4 on query and value (32 x 32) of two blocks; the square of MoRA has the same size
    assert [memory.trained for memory in (lora[0], mora[0])] == [2 * 2 * 4 * 64, 2 * 2 * 16**2]
    assert lora[0].losses[0] == pytest.approx(mora[0].losses[0])  # the same batch, before anything has changed
    assert lora[0].losses[0] != lora[1].losses[0]  # another seed, other pairs
    saved = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert saved["settings"]["pairs"] == 6
    assert [len(memory["losses"]) for each in saved["methods"].values() for memory in each] == [4] * 4
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "mora" in capsys.readouterr().out.splitlines()[-1]


def test_digits_are_counted_where_they_stand() -> None:
    values = ["0123", "4567"]
    assert mora_vs_lora_uuid.score([" 0123", "4567"], values) == (1.0, 1.0)
    assert mora_vs_lora_uuid.score(["0129 and more", ""], values) == (3 / 8, 0.0)
    rows = mora_vs_lora_uuid.pairs(3, 5)
    assert rows == mora_vs_lora_uuid.pairs(3, 5) != mora_vs_lora_uuid.pairs(4, 5)
    assert {len(text) for row in rows for text in row.values()} == {mora_vs_lora_uuid.DIGITS}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("name", [name for name, row in step_cost.ROWS.items() if not row.absolute])
def test_contenders_of_a_row_compute_the_same_and_train(name: str, tiny_llama: Path) -> None:
    row, shape = step_cost.ROWS[name], {"base": str(tiny_llama), "batch": 2, "length": 8, "threads": torch.get_num_threads()}
    losses = {}
    for side in row.sides:
        step = contenders.prepare(row.contender(side, shape))()
        losses[side] = [step() for _ in range(4)]
    first = losses["hf"][0]
    assert losses["ours"][0] == pytest.approx(first, rel=1e-3 if row.options.get("dtype") else 1e-5)
    assert losses["limit"][0] == pytest.approx(first, rel=0.02)  # of a quantized base: the loss of the dense one
    assert len(set(losses["limit"])) == 1  # nothing trains
    for side in set(row.sides) - {"limit"}:
        assert len(set(losses[side])) == 4, side


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_injection_of_both_reaches_all_linear_layers_of_7b() -> None:
    for side in step_cost.ROWS["injection"].sides:
        assert contenders.prepare(contenders.Contender(side=side))()() == 224


def test_limit_and_full_take_only_the_dtype_of_a_row() -> None:
    row, shape = step_cost.ROWS["qlora"], {"base": "x"}
    assert row.contender("limit", shape) == contenders.Contender(side="limit", base="x", dtype="bfloat16")
    assert row.contender("ours", shape).quantized
    row = step_cost.ROWS["loss"]
    assert row.contender("ours", shape).chunked
    assert row.contender("hf", shape) == step_cost.ROWS["lora-fp32"].contender("hf", shape)  # measured once


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_step_cost_writes_ratios_and_a_picture(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = step_cost.replace(step_cost.ROWS["lora-fp32"], sides=("limit", "ours"))  # a process takes seconds to import torch
    monkeypatch.setitem(step_cost.ROWS, "lora-fp32", small)
    monkeypatch.delitem(step_cost.ALLOCATORS, "live")
    out = tmp_path / "cost"
    step_cost.main(["--rows", "lora-fp32", "--steps", "2", "--tokens", "2x8", "--base", str(tiny_llama), "--out", str(out)])
    saved = json.loads(out.with_suffix(".json").read_text())
    row = saved["rows"]["lora-fp32"]
    assert saved["tokens"] == [2, 8]
    for figures in row["contenders"].values():
        assert len(figures["wall"]) == len(figures["cpu"]) == 2
        assert len(figures["value"]) == 2 + step_cost.WARM_UP
        assert 0 < figures["memory"]["peak"] < figures["memory"]["imports"]
        assert figures["memory"]["peak_rss"] > 0
    middle, low, high = row["ratios"]["ours"]["wall"]
    assert 0 < low <= high
    assert middle > 0
    assert row["ratios"]["limit"]["memory"] == 1
    assert "at most 1.08" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_picture_of_all_rows(tmp_path: Path) -> None:
    bars = {"wall": [1.2, 1.1, 1.3], "cpu": [1.2, 1.1, 1.3], "memory": 1.4, "live": 1.1}
    results = {name: {"ratios": {side: bars for side in row.sides}} for name, row in step_cost.ROWS.items()}
    step_cost.draw(results, tmp_path / "all.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_contender_that_fails_is_an_error_with_its_traceback() -> None:
    with pytest.raises(step_cost.ContenderError, match="no-such-folder"):
        step_cost.peak_memory(contenders.Contender(side="limit", base="/no-such-folder"))


def test_profile_names_what_ours_computes_beside_the_limit(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = str(torch.get_num_threads())
    profile_step.main(["lora-fp32", "--base", str(tiny_llama), "--tokens", "2x8", "--steps", "1", "--threads", threads])
    printed = capsys.readouterr().out
    optimizer = next(line.split() for line in printed.splitlines() if line.startswith("Optimizer.step#AdamW"))
    assert float(optimizer[-6]) > float(optimizer[-5]) == 0
    assert "ratio" in printed.splitlines()[-1]
