"""Causal LM: what carries loss, specials exactly once, padding, cutting, chat, packing, answers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.training.data import PEFTDataModule

from .conftest import CHATML

PROMPT = "Classify: {text}\nAnswer:"


def _batch(split="train", **options):
    options = {"val_fraction": 0.0, "batch_size": 4, **options}
    dm = PEFTDataModule(**options)
    dm.setup({"train": "fit", "val": "validate"}.get(split, split))
    loader = getattr(dm, f"{split}_dataloader")()
    return dm, next(iter(loader))


def _labelled(batch, row=0):
    return batch["labels"][row][batch["labels"][row] != -100].tolist()


def _real(batch, row=0):
    return batch["input_ids"][row][batch["attention_mask"][row] == 1].tolist()


def test_loss_is_on_the_completion_and_its_eos_only(make_tokenizer, jsonl):
    tok = make_tokenizer()
    _, batch = _batch(data_path=jsonl([{"text": "hello there", "y": "spam"}]), tokenizer=tok, prompt=PROMPT, completion=" {y}")
    assert tok.decode(_real(batch)) == "Classify: hello there\nAnswer: spam</s>"
    assert tok.decode(_labelled(batch)) == " spam</s>"
    assert _labelled(batch)[-1] == tok.eos_token_id


def test_completion_may_be_a_bare_column(make_tokenizer, jsonl):
    tok = make_tokenizer()
    _, batch = _batch(data_path=jsonl([{"text": "hello", "y": "ham"}]), tokenizer=tok, prompt=PROMPT, completion="y")
    assert tok.decode(_labelled(batch)) == "ham</s>"


def test_no_token_merges_across_prompt_and_completion(make_tokenizer, jsonl):
    tok = make_tokenizer()
    # "spam" is one token of this vocabulary, so the joined text would have one token across the boundary
    assert len(tok(" spam")["input_ids"]) == 1
    _, batch = _batch(data_path=jsonl([{"text": " sp", "y": "am"}]), tokenizer=tok, prompt="{text}", completion="y")
    ids = _real(batch)
    assert ids != [*tok(" spam")["input_ids"], tok.eos_token_id]
    prompt = tok(" sp")["input_ids"]
    assert ids[: len(prompt)] == prompt
    assert tok.decode(_labelled(batch)) == "am</s>"


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_bos_is_never_there_twice(make_tokenizer, jsonl, adds_bos, written):
    tok = make_tokenizer(adds_bos=adds_bos, adds_eos=True)
    prompt = ("<s>" if written else "") + PROMPT
    _, batch = _batch(data_path=jsonl([{"text": "a", "y": "b"}]), tokenizer=tok, prompt=prompt, completion="y")
    ids = _real(batch)
    assert ids.count(tok.bos_token_id) == int(adds_bos or written)
    assert ids.count(tok.eos_token_id) == 1
    if adds_bos or written:
        assert ids[0] == tok.bos_token_id


def test_chat_template_that_writes_bos_gets_no_second_one(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_bos=True, chat="{{ bos_token }}" + CHATML)
    rows = [{"text": "hello", "y": "ham"}]
    _, batch = _batch(data_path=jsonl(rows), tokenizer=tok, prompt="{text}", completion="y", chat_template=True)
    assert _real(batch).count(tok.bos_token_id) == 1


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_pad_that_is_eos_hides_no_eos(make_tokenizer, jsonl, pad):
    tok = make_tokenizer(pad=pad)
    rows = [{"text": "hello there friend at home", "y": "spam"}, {"text": "a", "y": "ham"}]
    dm, batch = _batch(data_path=jsonl(rows), tokenizer=tok, prompt=PROMPT, completion="y")
    assert dm.text.pad_id == tok.eos_token_id
    assert tok.pad_token == pad  # the tokenizer is as it was
    for row in range(2):
        assert _labelled(batch, row)[-1] == tok.eos_token_id
        assert (batch["labels"][row] == tok.eos_token_id).sum() == 1
        assert (batch["labels"][row][batch["attention_mask"][row] == 0] == -100).all()


def test_right_padding_to_train_and_left_padding_to_generate(make_tokenizer, jsonl):
    tok = make_tokenizer()
    path = jsonl([{"text": "hello there friend at home", "y": "spam"}, {"text": "a", "y": "ham"}])
    options = {"tokenizer": tok, "prompt": PROMPT, "completion": "y"}
    _, train = _batch(data_path=path, **options)
    assert (train["attention_mask"].diff(dim=1) <= 0).all()
    assert set(train) == {"input_ids", "attention_mask", "labels"}  # a HF model takes them as they are
    _, test = _batch("test", test_path=path, eval_prompts=True, **options)
    _, predict = _batch("predict", predict_path=path, **options)
    for batch in (test, predict):
        mask = batch["prompt_attention_mask"]
        assert (mask.diff(dim=1) >= 0).all()
        assert (mask[:, -1] == 1).all()
        assert (mask[1] == 0).any()
        for row, text in enumerate(["hello there friend at home", "a"]):
            ids = batch["prompt_input_ids"][row][mask[row] == 1].tolist()
            assert ids == tok(f"Classify: {text}\nAnswer:")["input_ids"]
    assert (test["attention_mask"].diff(dim=1) <= 0).all()
    assert test["answers"] == ["spam", "ham"]
    assert "labels" not in predict
    assert torch.equal(predict["input_ids"], predict["prompt_input_ids"])
    assert predict["example_ids"].tolist() == [0, 1]


def test_prompt_of_evaluation_is_the_beginning_of_the_training_sequence(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_bos=True, chat=CHATML, eos="<|im_end|>")
    rows = [{"text": "hello there friend " * 9, "y": "spam"}]
    options = {"prompt": PROMPT, "completion": "y", "chat_template": True, "max_length": 40, "truncation": "left"}
    _, batch = _batch("test", test_path=jsonl(rows), tokenizer=tok, eval_prompts=True, **options)
    prompt = batch["prompt_input_ids"][0].tolist()
    assert _real(batch)[: len(prompt)] == prompt
    assert batch["labels"][0][: len(prompt)].unique().tolist() == [-100]
    assert tok.decode(prompt).endswith("Answer:<|im_end|>\n<|im_start|>assistant\n")


def test_chat_loss_is_on_the_assistants_turns_only(make_tokenizer, jsonl):
    tok = make_tokenizer(chat=CHATML, eos="<|im_end|>")
    messages = [
        {"role": "system", "content": "ok"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello friend"},
        {"role": "user", "content": "see you"},
        {"role": "assistant", "content": "tonight"},
    ]
    _, batch = _batch(data_path=jsonl([{"chat": messages}]), tokenizer=tok, messages_column="chat")
    assert tok.decode(_labelled(batch)) == "hello friend<|im_end|>tonight<|im_end|>"
    assert tok.decode(_real(batch)) == tok.apply_chat_template(messages, tokenize=False)
    assert _real(batch) == tok.apply_chat_template(messages, tokenize=True)["input_ids"]


def test_chat_template_without_eos_gets_one_at_the_end(make_tokenizer, jsonl):
    tok = make_tokenizer(chat=CHATML)  # ends turns with <|im_end|>, but EOS is </s>
    rows = [{"text": "hello", "y": "ham"}]
    _, batch = _batch(data_path=jsonl(rows), tokenizer=tok, prompt="{text}", completion="y", chat_template=True)
    assert _labelled(batch)[-1] == tok.eos_token_id
    assert tok.decode(_labelled(batch)).startswith("ham<|im_end|>")


def test_chat_prediction_ends_with_the_generation_head(make_tokenizer, jsonl):
    tok = make_tokenizer(chat=CHATML, eos="<|im_end|>")
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "friend"},
        {"role": "user", "content": "see you"},
    ]
    _, batch = _batch("predict", predict_path=jsonl([{"chat": messages}]), tokenizer=tok, messages_column="chat")
    expected = tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tok.decode(batch["prompt_input_ids"][0]) == expected


def test_chat_template_that_rewrites_history_is_refused(make_tokenizer, jsonl):
    last_only = "{{ messages[-1]['content'] }}"
    tok = make_tokenizer(chat=last_only)
    rows = [{"chat": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "ok"}]}]
    with pytest.raises(DataError, match=r"row 0.*turn by turn"):
        _batch(data_path=jsonl(rows), tokenizer=tok, messages_column="chat")


@pytest.mark.parametrize(
    "messages",
    ["hello", [], [{"role": "user"}], [{"role": "user", "content": "x"}]],
    ids=["text", "empty", "no content", "no answer"],
)
def test_bad_conversation(make_tokenizer, jsonl, messages):
    tok = make_tokenizer(chat=CHATML)
    with pytest.raises(DataError, match="chat"):
        _batch(data_path=jsonl([{"chat": messages}]), tokenizer=tok, messages_column="chat")


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cutting_takes_the_column_and_nothing_else(make_tokenizer, jsonl, side, chat):
    tok = make_tokenizer(chat=CHATML, eos="<|im_end|>", adds_bos=not chat)
    words = " ".join(f"call {i}" for i in range(60))
    options = {"prompt": PROMPT, "completion": "y", "chat_template": chat, "truncation": side, "max_length": 50}
    dm, batch = _batch(data_path=jsonl([{"text": words, "y": "spam"}]), tokenizer=tok, **options)
    text = tok.decode(_real(batch))
    assert len(_real(batch)) == 50
    assert tok.decode(_labelled(batch)).startswith("spam<|im_end|>")
    inner = text[text.index("Classify:") + len("Classify:") : text.index("\nAnswer:")]
    assert inner.strip() in words
    assert inner.strip().endswith("59") == (side == "left")
    assert inner.strip().startswith("call 0") == (side == "right")
    if chat:
        assert text.startswith("<|im_start|>user\nClassify:")
    assert dm.reports["train"].cut == 1


def test_two_columns_are_cut_from_the_longer(make_tokenizer, jsonl):
    tok = make_tokenizer()
    rows = [{"doc": "call this number " * 30, "q": "hello there friend", "y": "ham"}]
    options = {"prompt": "{doc}\nQ: {q}\n", "completion": "y", "truncation": "right", "max_length": 32}
    _, batch = _batch(data_path=jsonl(rows), tokenizer=tok, **options)
    assert "\nQ: hello there friend\n" in tok.decode(_real(batch))


@pytest.mark.parametrize(
    ("truncation", "rows", "match"),
    [
        ("error", [{"text": "call " * 50, "y": "ham"}], r"1 of 2 rows.*max_length=20.*truncation is 'error'.*row 0"),
        ("left", [{"text": "a", "y": "call " * 50}], r"even without the text that may be cut.*row 0"),
        ("drop", [{"text": "a", "y": "call " * 50}, {"text": "a", "y": "now " * 50}], None),
    ],
)
def test_too_long_rows(make_tokenizer, jsonl, truncation, rows, match):
    rows = [*rows, {"text": "a", "y": "ham"}]
    options = {"prompt": "{text}:", "completion": "y", "max_length": 20, "truncation": truncation}
    if match:
        with pytest.raises(DataError, match=match):
            _batch(data_path=jsonl(rows), tokenizer=make_tokenizer(), **options)
    else:
        dm, batch = _batch(data_path=jsonl(rows), tokenizer=make_tokenizer(), **options)
        assert (dm.reports["train"].dropped, len(batch["labels"])) == (2, 1)


def test_nothing_left_after_dropping(make_tokenizer, jsonl):
    with pytest.raises(DataError, match="no row of train is left"):
        _batch(data_path=jsonl([{"text": "call " * 50}]), tokenizer=make_tokenizer(), max_length=5, truncation="drop")


def test_plain_text(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_bos=True)
    _, batch = _batch(data_path=jsonl([{"text": "hello there"}]), tokenizer=tok)
    assert tok.decode(_real(batch)) == "<s>hello there</s>"
    assert _labelled(batch) == _real(batch)[1:]
    _, cut = _batch(data_path=jsonl([{"text": "hello there " * 20}]), tokenizer=tok, max_length=10, truncation="right")
    assert tok.eos_token_id not in _real(cut)  # the text goes on


def test_packing_loses_nothing_and_pads_nothing(make_tokenizer, jsonl):
    tok = make_tokenizer()
    texts = [f"call number {i} now" for i in range(9)]
    dm, _ = _batch(data_path=jsonl([{"text": t} for t in texts]), tokenizer=tok, packing=True, max_length=16)
    blocks = dm.dataset("train")
    joined = [i for block in blocks for i in block.input_ids]
    assert joined == [i for t in texts for i in [*tok(t)["input_ids"], tok.eos_token_id]][: len(joined)]
    assert {len(block.input_ids) for block in blocks[:-1]} == {16}
    assert all(block.labels[0] == -100 for block in blocks)  # no predecessor, no loss
    with pytest.raises(ConfigError, match="packing"):
        PEFTDataModule(packing=True, prompt="{text}", completion="y")


def test_metaspace_tokenizer_gets_no_extra_space_in_the_middle(make_tokenizer, jsonl):
    tok = make_tokenizer(metaspace=True)
    rows = [{"text": "hello", "y": "spam"}]
    _, batch = _batch(data_path=jsonl(rows), tokenizer=tok, prompt="{text}:", completion=" {y}")
    assert tok.decode(_real(batch)[:-1]) == "hello: spam"
    _, batch = _batch(data_path=jsonl(rows), tokenizer=tok, prompt="{text}:", completion="{y}")
    assert tok.decode(_real(batch)[:-1]) == "hello:spam"


@pytest.mark.parametrize("chat", [False, True])
def test_fixed_answers(make_tokenizer, sms, chat):
    tok = make_tokenizer(chat=CHATML, eos="<|im_end|>")
    options = {"labels": ["ham", "spam"], "prompt": PROMPT, "completion": " {label}", "chat_template": chat}
    dm, batch = _batch("test", test_path=sms, tokenizer=tok, **options)
    assert dm.labels == ["ham", "spam"]
    assert batch["answer_labels"].tolist() == [1, 0, 0, 0]
    assert batch["answers"] == [" spam", " ham", " ham", " ham"]
    assert batch["answer_input_ids"].shape == batch["answer_attention_mask"].shape
    assert batch["answer_input_ids"].shape[:2] == (4, 2)
    for row in range(4):  # prompt + right answer = the labelled sequence
        right = batch["answer_labels"][row]
        mask = batch["answer_attention_mask"][row, right] == 1
        assert batch["answer_input_ids"][row, right][mask].tolist() == _labelled(batch, row)
    _, train = _batch(data_path=sms, tokenizer=tok, **options)
    assert "answers" not in train


def test_fixed_answers_must_depend_on_the_label_only():
    with pytest.raises(ConfigError, match="every label must give one answer"):
        PEFTDataModule(labels=["a"], prompt="{text}", completion="{label} {why}")


def test_label_names_reach_the_completion(make_tokenizer, jsonl):
    tok = make_tokenizer()
    options = {"labels": ["ham", "spam"], "label_names": {"0": "ham", "1": "spam"}, "prompt": PROMPT}
    _, batch = _batch(data_path=jsonl([{"text": "hello", "label": 1}]), tokenizer=tok, completion="label", **options)
    assert tok.decode(_labelled(batch)) == "spam</s>"


def test_labelled_tokens_are_counted(make_tokenizer, sms):
    dm = PEFTDataModule(data_path=sms, tokenizer=make_tokenizer(), prompt=PROMPT, completion="label", val_fraction=0)
    dm.setup("fit")
    counted = sum(int((batch["labels"] != -100).sum()) for batch in dm.train_dataloader())
    length = {label: len(dm.text.tokenizer(label)["input_ids"]) + 1 for label in ("ham", "spam")}
    assert counted == dm.reports["train"].labelled == 30 * length["ham"] + 10 * length["spam"]


def test_hf_model_takes_a_batch(make_tokenizer, sms):
    from transformers import LlamaConfig, LlamaForCausalLM

    tok = make_tokenizer()
    _, batch = _batch(data_path=sms, tokenizer=tok, prompt=PROMPT, completion="label")
    config = LlamaConfig(vocab_size=len(tok), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert LlamaForCausalLM(config)(**batch).loss.isfinite()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"completion": "y"}, "completion needs a prompt"),
        ({"messages_column": "m", "prompt": "{a}"}, "not both"),
        ({"chat_template": True}, "chat_template needs a prompt"),
        ({"system_prompt": "x", "prompt": "{a}"}, "system_prompt needs chat_template"),
        ({"prompt": "no column"}, "names no column"),
        ({"prompt": "{a"}, "write {{ and }} for braces"),
        ({"prompt": "{}"}, "column name in braces"),
        ({"task": "seq2seq_lm"}, "needs a completion"),
        ({"task": "causal"}, "unknown task.*causal_lm"),
        ({"max_length": 1}, "max_length must be at least 2, got 1"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "sum to < 1"),
        ({"eval_prompts": True}, "nothing to generate"),
        ({"labels": ["a", "a"]}, "labels must differ"),
        ({"predict_texts": ["a"], "predict_path": "b"}, "not both"),
        ({"truncation": "middle"}, "truncation must be"),
    ],
)
def test_contradicting_arguments(options, match):
    with pytest.raises(ConfigError, match=match):
        PEFTDataModule(**options)


def test_slow_tokenizer_is_refused(make_tokenizer, sms):
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match="Slow is not a fast tokenizer"):
        _batch(data_path=sms, tokenizer=Slow())
