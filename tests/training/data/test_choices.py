"""Multiple choice: fixed choices and choices of each row, their tokens, batches, statistics, and what is wrong with rows."""

from __future__ import annotations

import csv
import json

import pytest

from lightning_peft.errors import CompatibilityError, ConfigError, DataError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data import PEFTDataModule

from .conftest import CHATML

PROMPT = "Classify: {text}\nAnswer:"
ROWS = [
    {"text": "hello there friend", "options": ["spam", "ham", "see you tonight"], "label": 1},
    {"text": "win", "options": ["call now"], "label": 0},
    {"text": "the cat sat", "options": ["ham", "spam"], "label": "spam"},
]


def _module(stage, **options):
    dm = PEFTDataModule(**{"task": "multiple_choice", "prompt": PROMPT, "val_fraction": 0.0, "batch_size": 4, **options})
    dm.setup(stage)
    return dm


def _batch(stage="test", **options):
    return next(iter(getattr(_module(stage, **options), f"{stage}_dataloader")()))


def _own(path, tokenizer, **options):
    return _batch(test_path=path, choices="options", completion=" {choice}", tokenizer=tokenizer, **options)


def _texts(tokenizer, batch, key="input_ids"):
    real = batch["attention_mask"] == 1 if key == "input_ids" else batch[key] != IGNORE
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch[key], real, strict=True)]


def test_the_prompt_stands_before_every_choice(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_bos=True)
    batch = _own(jsonl(ROWS), tok)
    assert set(batch) == {"input_ids", "attention_mask", "choice_labels", "choice_counts", "answer_labels", "example_ids"}
    expected = [f"{PROMPT.format(text=row['text'])} {choice}</s>" for row in ROWS for choice in row["options"]]
    assert _texts(tok, batch) == [f"<s>{text}" for text in expected]
    assert _texts(tok, batch, "choice_labels") == [f" {choice}</s>" for row in ROWS for choice in row["options"]]
    assert batch["choice_counts"].tolist() == [3, 1, 2]
    assert batch["answer_labels"].tolist() == [1, 0, 1]
    labelled = batch["choice_labels"] != IGNORE
    assert (batch["choice_labels"][labelled] == batch["input_ids"][labelled]).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()


def test_the_encoder_reads_an_example_once(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_eos=True)  # as T5
    batch = _batch(test_path=jsonl(ROWS), task="seq2seq_multiple_choice", choices="options", tokenizer=tok)
    assert _texts(tok, batch) == [f"{PROMPT.format(text=row['text'])}</s>" for row in ROWS]
    assert _texts(tok, batch, "choice_labels") == [f"{choice}</s>" for row in ROWS for choice in row["options"]]
    assert batch["choice_counts"].tolist() == [3, 1, 2]


@pytest.mark.parametrize("task", ["multiple_choice", "seq2seq_multiple_choice"])
def test_fixed_choices_are_the_labels_in_other_words(make_tokenizer, sms, task):
    tok = make_tokenizer()
    options = {"test_path": sms, "tokenizer": tok, "labels": ["ham", "spam"], "task": task}
    batch = _batch(choices=["see you", "call now"], completion=" {choice}", **options)
    assert batch["answer_labels"].tolist() == [1, 0, 0, 0]
    assert batch["choice_counts"].tolist() == [2] * 4
    assert _texts(tok, batch, "choice_labels")[:2] == [" see you</s>", " call now</s>"]
    assert _texts(tok, _batch(**options), "choice_labels")[:2] == ["ham</s>", "spam</s>"]


def test_labels_of_the_data_and_their_names(make_tokenizer, jsonl):
    rows = [{"text": f"call {i}", "label": i % 2} for i in range(6)]
    options = {"data_path": jsonl(rows), "tokenizer": make_tokenizer()}
    dm = _module("fit", label_names={"0": "ham", "1": "spam"}, choices=["ok", "win"], **options)
    assert dm.labels == ["ham", "spam"]
    assert [example.answer_label for example in dm.dataset("train")] == [0, 1] * 3
    with pytest.raises(ConfigError, match=r"3 choices \['a', 'b', 'c'\] for 2 labels \['0', '1'\]"):
        _module("fit", choices=["a", "b", "c"], **options)


def test_few_shot(make_tokenizer, sms):
    options = {"data_path": sms, "tokenizer": make_tokenizer(), "few_shot": 3}
    answers = [example.answer_label for example in _module("fit", **options).dataset("train")]
    assert sorted(answers) == [0] * 3 + [1] * 3
    with pytest.raises(ConfigError, match="few_shot=3"):
        _module("fit", choices="options", **options)


def test_the_choices_of_a_table_are_json(make_tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "options", "label"])
        writer.writerows([[row["text"], json.dumps(row["options"]), row["label"]] for row in ROWS])
    batch = _own(str(path), make_tokenizer())
    assert batch["answer_labels"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("answer", "index"), [(0, 0), (2, 2), ("2", 0), ("0", 1), ("ham", 2), ("1", 1)]
)  # a text is looked for among the choices first
def test_an_answer_is_a_text_or_an_index(make_tokenizer, jsonl, answer, index):
    batch = _own(jsonl([{"text": "win", "options": [2, 0, "ham"], "label": answer}]), make_tokenizer())
    assert batch["answer_labels"].tolist() == [index]


def test_datasets_of_the_hub(make_tokenizer, monkeypatch):
    monkeypatch.setattr("lightning_peft.training.data.sources.load_hub", lambda source: {"test": ROWS[1:], "train": ROWS[:1]})
    dm = _module("fit", data_path="some/set", data_format="datasets", choices="options", tokenizer=make_tokenizer())
    assert dm.reports["train"].choices == 3


def test_a_chat_template(make_tokenizer, jsonl):
    tok = make_tokenizer(chat=CHATML, eos="<|im_end|>")
    batch = _batch(test_path=jsonl(ROWS[:1]), choices="options", chat_template=True, system_prompt="ok", tokenizer=tok)
    head = f"<|im_start|>system\nok<|im_end|>\n<|im_start|>user\n{PROMPT.format(text=ROWS[0]['text'])}<|im_end|>\n"
    assert _texts(tok, batch)[2] == f"{head}<|im_start|>assistant\nsee you tonight<|im_end|>"
    assert _texts(tok, batch, "choice_labels")[2] == "see you tonight<|im_end|>"


def test_prediction_has_the_texts_and_no_answer(make_tokenizer, sms, jsonl):
    tok = make_tokenizer()
    rows = jsonl([{key: row[key] for key in ("text", "options")} for row in ROWS])
    batch = _batch("predict", predict_path=rows, choices="options", tokenizer=tok)
    assert batch["choices"] == [row["options"] for row in ROWS]
    assert batch["answer_labels"].tolist() == [IGNORE] * 3
    fixed = _batch("predict", predict_texts=["win", "ok"], labels=["ham", "spam"], choices=["no", "yes"], tokenizer=tok)
    assert fixed["choices"] == [["no", "yes"]] * 2
    assert fixed["choice_counts"].tolist() == [2, 2]
    with pytest.raises(DataError, match="fill one column"):
        _batch("predict", predict_texts=["win"], choices="options", tokenizer=tok)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prompt_is_cut_until_the_longest_choice_fits(make_tokenizer, jsonl, side):
    tok = make_tokenizer()
    long = {"text": "call " * 60, "options": ["ham", "see you at home tonight ok"], "label": 0}
    dm = _module("test", test_path=jsonl([long]), choices="options", tokenizer=tok, max_length=40, truncation=side)
    batch = next(iter(dm.test_dataloader()))
    assert batch["input_ids"].shape == (2, 40)
    assert _texts(tok, batch)[1].endswith("\nAnswer:see you at home tonight ok</s>")
    assert _texts(tok, batch)[0].startswith("Classify:")
    assert dm.reports["test"].cut == 1


@pytest.mark.parametrize("task", ["multiple_choice", "seq2seq_multiple_choice"])
def test_too_long_rows(make_tokenizer, jsonl, task):
    rows = [{"text": "win", "options": ["ham", "call " * 60], "label": 0}, ROWS[0]]
    options = {"test_path": jsonl(rows), "task": task, "choices": "options", "tokenizer": make_tokenizer(), "max_length": 40}
    with pytest.raises(DataError, match="1 of 2 rows.*even without the text that may be cut.*row 0"):
        _module("test", truncation="left", **options)
    assert _module("test", truncation="drop", **options).reports["test"].dropped == 1


def test_statistics(make_tokenizer, jsonl, caplog):
    with caplog.at_level("INFO"):
        dm = _module("test", test_path=jsonl(ROWS), choices="options", tokenizer=make_tokenizer())
    report = dm.reports["test"]
    assert (report.rows, report.choices, report.labelled) == (3, 6, 3)
    assert f"test 3 rows, {report.tokens:,} tokens, 6 choices, 3 labels" in caplog.text


def test_filler_rows_have_no_answer_but_keep_their_choices(make_tokenizer, sms):
    dm = _module("test", test_path=sms, tokenizer=make_tokenizer(), labels=["ham", "spam"], batch_size=3)
    known = 0
    for rank in range(3):
        dm.trainer = type("Fake", (), {"distributed_sampler_kwargs": {"rank": rank, "num_replicas": 3}})()
        for batch in dm.test_dataloader():
            assert ((batch["answer_labels"] == IGNORE) == (batch["example_ids"] == -1)).all()
            assert ((batch["choice_labels"] != IGNORE).sum(1) > 0).all()
            assert batch["choice_counts"].sum() == len(batch["choice_labels"])
            known += int((batch["answer_labels"] != IGNORE).sum())
    assert known == 40


def test_a_position_with_other_choices_is_refused(make_tokenizer, sms):
    def loader(choices):
        return _module("fit", data_path=sms, tokenizer=make_tokenizer(), choices=choices).train_dataloader()

    old = loader(["no", "yes"])
    next(iter(old))
    loader(["no", "yes"]).load_state_dict(old.state_dict())
    with pytest.raises(CompatibilityError, match="content"):
        loader(["no", "ok"]).load_state_dict(old.state_dict())


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"label": "hamm"}, r"test, row 0: the answer 'hamm' .column 'label'. is neither.*Did you mean 'ham'"),
        ({"label": 2}, "answer 2 .*index below 2"),
        ({"label": -1}, "answer -1"),
        ({"label": True}, "answer True"),
        ({"options": []}, "holds no choices"),
        ({"options": ["ham", " "]}, "choice 1 of .*blank"),
        ({"options": ["ham", None]}, "choice 1 of .*blank"),
        ({"options": ["ham", "spam", "ham"]}, "choices 0 and 2 .*are the same"),
        ({"options": "ham, spam"}, r"must hold a list of choices .*\[\"yes\", \"no\"\].*'ham, spam'"),
        ({"options": [["ham"], "spam"]}, "must hold a list"),
        ({"options": None}, "must hold a list"),
    ],
)
@pytest.mark.parametrize("task", ["multiple_choice", "seq2seq_multiple_choice"])
def test_bad_rows(make_tokenizer, jsonl, row, match, task):
    rows = [{"text": "hello", "options": ["spam", "ham"], "label": "ham", **row}]
    with pytest.raises(DataError, match=match):
        _batch(test_path=jsonl(rows), task=task, choices="options", tokenizer=make_tokenizer())


def test_a_missing_column(make_tokenizer, jsonl):
    with pytest.raises(DataError, match="no column 'option'.*Did you mean 'options'"):
        _batch(test_path=jsonl(ROWS), choices="option", tokenizer=make_tokenizer())
    with pytest.raises(DataError, match="no column 'answer'"):
        _batch(test_path=jsonl(ROWS), choices="options", label_column="answer", tokenizer=make_tokenizer())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"choices": ["a", " "]}, "blank"),
        ({"choices": "options", "labels": ["a"]}, "labels are for fixed choices"),
        ({"task": "causal_lm", "choices": ["a"]}, "task causal_lm has no choices"),
        ({"completion": "{label}"}, "may only name {choice}"),
        ({"completion": " yes {text} {choice}"}, "may only name {choice}"),
        ({"completion": "label"}, "may only name {choice}"),
        ({"chat_template": True, "task": "seq2seq_multiple_choice"}, "chat_template"),
        ({"eval_prompts": True}, "nothing to generate"),
        ({"packing": True}, "packing"),
        ({"messages_column": "chat"}, "messages_column needs task causal_lm"),
    ],
)
def test_options_that_contradict_each_other(options, match):
    with pytest.raises(ConfigError, match=match):
        PEFTDataModule(**{"task": "multiple_choice", "prompt": PROMPT, **options})


def test_a_label_of_zero_is_no_blank(make_tokenizer, jsonl):
    """Also where it is written as a completion."""
    path = jsonl([{"text": "win", "label": 0}, {"text": "ok", "label": 1}, {"text": "hello", "label": ""}])
    dm = _module("fit", task="causal_lm", data_path=path, completion=" {label}", tokenizer=make_tokenizer())
    assert len(dm.dataset("train")) == 2
