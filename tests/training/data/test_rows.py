"""Reading, splitting, few-shot, and bad input."""

from __future__ import annotations

import json
import sys
import types

import pytest

from lightning_peft.errors import ConfigError, DataError, DependencyError
from lightning_peft.training.data import PEFTDataModule
from lightning_peft.training.data.sources import Reader, without_duplicates

ROWS = [{"text": 'say "hi', "label": "ham"}, {"text": "win, now", "label": "spam"}]


def _rows(split="train", **options):
    return PEFTDataModule(**{"val_fraction": 0.0, "prompt": "{text}:", "completion": "label", **options}).rows.splits[split]


def test_formats(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    (tmp_path / "a.csv").write_text('text,label\n"say ""hi",ham\n"win, now",spam\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text('text\tlabel\nsay "hi\tham\nwin, now\tspam\n')
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv"):
        assert _rows(data_path=str(tmp_path / name)) == ROWS
    (tmp_path / "raw").write_text('ham\tsay "hi\nspam\twin, now\n')
    options = {"data_format": "tsv", "column_names": ["label", "text"]}
    assert _rows(data_path=str(tmp_path / "raw"), **options) == ROWS


def test_a_lone_quotation_mark_swallows_no_lines_of_a_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('label\ttext\nham\t"so what\nspam\twin\n')
    assert [row["text"] for row in _rows(data_path=str(tmp_path / "a.tsv"))] == ['"so what', "win"]


@pytest.mark.parametrize(("unit", "count"), [("line", 3), ("paragraph", 2), ("file", 1)])
def test_text_files(tmp_path, unit, count):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\nthree\n")
    rows = Reader(text_unit=unit).read(str(tmp_path / "a.txt"))["train"]
    assert len(rows) == count
    assert "three" in rows[-1]["text"]


def test_encoding(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,ham\n".encode("latin-1"))
    with pytest.raises(DataError, match="not valid utf-8.*latin-1"):
        _rows(data_path=str(tmp_path / "a.csv"))
    assert _rows(data_path=str(tmp_path / "a.csv"), encoding="latin-1")[0]["text"] == "café"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]", "row 1 is int"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "text,label\na,b,c\n", "line 2: 3 values for 2 columns"),
        ("a.csv", "text,text\na,b\n", "names a column twice"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.csv", "text,label\n,ham\n", "all 1 rows are blank"),
        ("a.csv", "Text,label\na,b\n", "no column 'text'.*Did you mean 'Text'"),
        ("a.xlsx", "x", "cannot tell the format.*data_format"),
    ],
)
def test_bad_files(tmp_path, name, content, match):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=match):
        _rows(data_path=str(tmp_path / name))


def test_missing_file_names_the_nearest(sms):
    with pytest.raises(DataError, match="does not exist. Did you mean 'data.jsonl'"):
        _rows(data_path=sms.replace("data.jsonl", "datas.jsonl"))


def test_hub_data_set(monkeypatch):
    calls = []

    def load_dataset(name, configuration):
        calls.append((name, configuration))
        return {"train": ROWS, "validation": ROWS[:1], "unsupervised": ROWS}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    dm = PEFTDataModule(data_path="glue:sst2", task="sequence_classification")
    dm.prepare_data()
    assert calls == [("glue", "sst2")]
    with pytest.warns(UserWarning, match="1 of 1 rows of val are also in the training data"):
        splits = dm.rows.splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 2, "val": 1}


def test_hub_data_set_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match="pip install datasets"):
        PEFTDataModule(data_path="ag_news").prepare_data()


def test_duplicates_are_removed_before_splitting(jsonl):
    rows = [{"text": f"call {i % 30}", "label": "ham", "id": i} for i in range(90)]
    dm = PEFTDataModule(data_path=jsonl(rows), prompt="{text}:", completion="label", val_fraction=0.2, test_fraction=0.2, seed=3)
    splits = dm.rows.splits
    texts = {name: {row["text"] for row in part} for name, part in splits.items()}
    assert dm.rows.duplicates == 60
    assert {name: len(part) for name, part in splits.items()} == {"train": 18, "val": 6, "test": 6}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 30
    kept = PEFTDataModule(data_path=jsonl(rows), prompt="{text}:", completion="label", deduplicate=False, val_fraction=0)
    assert len(kept.rows.splits["train"]) == 90


def test_first_of_the_duplicates_stays_in_its_place():
    rows = [{"a": 1, "n": 0}, {"a": 2, "n": 1}, {"a": 1, "n": 2}]
    assert without_duplicates(rows, ["a"]) == rows[:2]


def test_split_depends_on_the_seed_only(sms):
    import random

    def val(seed):
        random.seed()
        return _rows("val", data_path=sms, val_fraction=0.25, seed=seed)

    assert val(1) == val(1)
    assert val(1) != val(2)


def test_own_files_are_not_split(sms, jsonl):
    val = jsonl([{"text": "see you", "label": "ham"}], "val.jsonl")
    splits = PEFTDataModule(data_path=sms, val_path=val, prompt="{text}", completion="label").rows.splits
    assert (len(splits["train"]), len(splits["val"])) == (40, 1)


def test_few_shot(sms):
    def shots(seed):
        return _rows(data_path=sms, few_shot=3, seed=seed)

    assert sorted(row["label"] for row in shots(0)) == ["ham"] * 3 + ["spam"] * 3
    assert shots(0) == shots(0)
    assert shots(0) != shots(1)
    with pytest.raises(DataError, match=r"few_shot=11.*{'spam': 10}"):
        _rows(data_path=sms, few_shot=11)
    with pytest.raises(DataError, match=r"few_shot=2.*{'other': 0}"):
        _rows(data_path=sms, few_shot=2, labels=["ham", "spam", "other"])
    with pytest.raises(ConfigError, match="few_shot=0"):
        _rows(data_path=sms, few_shot=0)


def test_label_that_is_not_in_the_list(sms):
    with pytest.raises(DataError, match=r"'label' \(train\).*not in \['ham', 'spams'\].*{'spam': 10}.*Did you mean 'spams'"):
        _rows(data_path=sms, labels=["ham", "spams"])


def test_missing_columns(sms):
    with pytest.raises(DataError, match="no column 'labels'.*Did you mean 'label'"):
        _rows(data_path=sms, completion="labels")
    with pytest.raises(DataError, match="no column 'txt'.*Did you mean 'text'"):
        _rows(data_path=sms, prompt="{txt}")


def test_bad_data_is_found_before_the_tokenizer_is_needed(sms):
    with pytest.raises(DataError, match="no column"):
        PEFTDataModule(data_path=sms, text_column="body").setup("fit")


def test_too_few_rows_to_split(jsonl):
    with pytest.raises(DataError, match="too few to split"):
        _rows(data_path=jsonl(ROWS), val_fraction=0.4, test_fraction=0.4)
