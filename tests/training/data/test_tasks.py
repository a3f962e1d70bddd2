"""Masked LM, seq2seq, sequence and token classification."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.training.data import PEFTDataModule


def _module(split, **options):
    dm = PEFTDataModule(**{"val_fraction": 0.0, "batch_size": 4, **options})
    dm.setup(split)
    return dm


TEXTS = [{"text": "playing dog runed the cat , sunn a big playered"}, {"text": "the dogs"}] * 2 + [
    {"text": f"cat dog run sun play {'the ' * i}"} for i in range(1, 30)
]


def _masked(bert_tokenizer, jsonl, **options):
    return _module("fit", task="masked_lm", data_path=jsonl(TEXTS), tokenizer=bert_tokenizer, **options)


def test_whole_words_are_masked(bert_tokenizer, jsonl):
    dm = _masked(bert_tokenizer, jsonl, mlm_probability=0.5)
    loader = dm.train_dataloader()
    split_words = 0
    for epoch in range(5):
        loader.set_epoch(epoch)
        for key, batch in zip(loader.batch_sampler.keys(), loader, strict=True):
            for row, index in enumerate(key.indices):
                words = dm.dataset("train")[index].word_ids
                chosen = {i for i, label in enumerate(batch["labels"][row].tolist()) if label != -100}
                assert chosen
                assert all(words[i] >= 0 for i in chosen)  # never [CLS], [SEP] or padding
                for i in chosen:
                    pieces = {j for j, word in enumerate(words) if word == words[i]}
                    split_words += len(pieces) > 1
                    assert pieces <= chosen
    assert split_words > 0


def test_single_pieces_may_be_masked_when_asked(bert_tokenizer, jsonl):
    dm = _masked(bert_tokenizer, jsonl, whole_word_masking=False, mlm_probability=0.3)
    broken = False
    loader = dm.train_dataloader()
    for epoch in range(5):
        loader.set_epoch(epoch)
        for key, batch in zip(loader.batch_sampler.keys(), loader, strict=True):
            for row, index in enumerate(key.indices):
                words = dm.dataset("train")[index].word_ids
                chosen = {i for i, label in enumerate(batch["labels"][row].tolist()) if label != -100}
                broken |= any({j for j, w in enumerate(words) if w == words[i]} - chosen for i in chosen)
    assert broken


def test_masking_is_80_10_10_and_covers_the_share(bert_tokenizer, jsonl):
    dm = _module(
        "fit",
        task="masked_lm",
        data_path=jsonl([{"text": " ".join(["cat dog run sun"] * 50) + f" {'a' * (i + 1)}"} for i in range(40)]),
        tokenizer=bert_tokenizer,
        mlm_probability=0.2,
    )
    originals, inputs, total = [], [], 0
    for batch in dm.train_dataloader():
        chosen = batch["labels"] != -100
        originals.append(batch["labels"][chosen])
        inputs.append(batch["input_ids"][chosen])
        total += int(batch["attention_mask"].sum()) - 2 * len(chosen)
    original, now = torch.cat(originals), torch.cat(inputs)
    assert len(now) / total == pytest.approx(0.2, abs=0.01)
    masked = (now == bert_tokenizer.mask_token_id).float().mean().item()
    kept = (now == original).float().mean().item()
    assert masked == pytest.approx(0.8, abs=0.04)
    assert kept == pytest.approx(0.1, abs=0.04)
    random = now[(now != original) & (now != bert_tokenizer.mask_token_id)]
    assert not set(random.tolist()) & set(bert_tokenizer.all_special_ids)
    assert random.unique().numel() > 20


def test_masks_depend_on_seed_epoch_and_row_only(bert_tokenizer, jsonl):
    def masks(batch_size, epoch, seed=0):
        loader = _masked(bert_tokenizer, jsonl, batch_size=batch_size, seed=seed).train_dataloader()
        loader.set_epoch(epoch)
        torch.manual_seed(batch_size)  # the global generator must not matter
        rows = {}
        for key, batch in zip(loader.batch_sampler.keys(), loader, strict=True):
            for row, index in enumerate(key.indices):
                length = int(batch["attention_mask"][row].sum())
                rows[index] = tuple(batch["input_ids"][row][:length].tolist())
        return rows

    assert masks(4, 1) == masks(7, 1)
    assert masks(4, 1) != masks(4, 2)
    assert masks(4, 1) != masks(4, 1, seed=1)


def test_equal_rows_are_masked_differently(bert_tokenizer, jsonl):
    rows = [{"text": "cat dog run sun play the big a " * 4}] * 4
    dm = _module("fit", task="masked_lm", data_path=jsonl(rows), tokenizer=bert_tokenizer, deduplicate=False)
    batch = next(iter(dm.train_dataloader()))
    assert len({tuple(labels) for labels in batch["labels"].tolist()}) == 4


def test_validation_masks_are_the_same_in_every_epoch(bert_tokenizer, jsonl):
    dm = _masked(bert_tokenizer, jsonl, val_fraction=0.3)
    loader = dm.val_dataloader()
    first = [batch["input_ids"] for batch in loader]
    loader.set_epoch(3)
    assert all(torch.equal(a, b["input_ids"]) for a, b in zip(first, loader, strict=True))


def test_masked_prediction_leaves_the_users_mask(bert_tokenizer):
    dm = _module("predict", task="masked_lm", predict_texts=["the [MASK] run"], tokenizer=bert_tokenizer)
    batch = next(iter(dm.predict_dataloader()))
    assert (batch["input_ids"] == bert_tokenizer.mask_token_id).sum() == 1
    assert "labels" not in batch


def test_masked_lm_needs_a_mask_token(make_tokenizer, jsonl):
    dm = _module("fit", task="masked_lm", data_path=jsonl(TEXTS), tokenizer=make_tokenizer())
    with pytest.raises(ConfigError, match="mask token"):
        dm.train_dataloader()


def test_seq2seq(make_tokenizer, jsonl):
    tok = make_tokenizer(adds_eos=True)  # as T5
    path = jsonl([{"text": "hello there", "y": "ham"}, {"text": "a", "y": "see you tonight"}])
    options = {"task": "seq2seq_lm", "prompt": "Answer: {text}", "completion": "y", "tokenizer": tok}
    batch = next(iter(_module("test", test_path=path, eval_prompts=True, **options).test_dataloader()))
    assert tok.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == "Answer: hello there</s>"
    assert tok.decode(batch["labels"][0][batch["labels"][0] != -100]) == "ham</s>"
    assert tok.decode(batch["labels"][1]) == "see you tonight</s>"
    assert torch.equal(batch["prompt_input_ids"], batch["input_ids"])
    assert batch["answers"] == ["ham", "see you tonight"]
    with pytest.raises(DataError, match="even without the text that may be cut"):
        _module("test", test_path=path, truncation="left", max_length=2, **options)


def test_classification_of_texts_and_pairs(bert_tokenizer, jsonl):
    rows = [{"text": "the cat", "text_pair": "a dog", "label": "no"}, {"text": "run", "text_pair": "play sun", "label": "yes"}]
    options = {"task": "sequence_classification", "tokenizer": bert_tokenizer}
    dm = _module("test", test_path=jsonl(rows), labels=["yes", "no"], text_pair_column="text_pair", **options)
    batch = next(iter(dm.test_dataloader()))
    assert batch["labels"].tolist() == [1, 0]
    assert bert_tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1]) == "[CLS] the cat [SEP] a dog [SEP]"
    assert set(batch["token_type_ids"][0].tolist()) == {0, 1}
    single = _module("fit", data_path=jsonl(rows), **options)
    assert single.labels == ["no", "yes"]
    assert "labels" not in next(iter(_module("predict", predict_texts=["run"], labels=["a"], **options).predict_dataloader()))


def test_pair_is_cut_from_the_longer_and_keeps_its_specials(bert_tokenizer, jsonl):
    rows = [{"text": "cat " * 30, "text_pair": "a dog", "label": "no"}]
    options = {"task": "sequence_classification", "tokenizer": bert_tokenizer, "text_pair_column": "text_pair"}
    dm = _module("fit", data_path=jsonl(rows), max_length=10, truncation="right", **options)
    ids = list(dm.dataset("train")[0].input_ids)
    assert bert_tokenizer.decode(ids) == "[CLS] cat cat cat cat cat [SEP] a dog [SEP]"


def test_numeric_labels_keep_their_order(bert_tokenizer, jsonl):
    rows = [{"text": f"cat {'a' * (i + 1)}", "label": i} for i in (10, 9, 0, 2)]
    dm = _module("fit", task="sequence_classification", data_path=jsonl(rows), tokenizer=bert_tokenizer)
    assert dm.labels == ["0", "2", "9", "10"]


@pytest.mark.parametrize("as_text", [False, True])
def test_token_classification(bert_tokenizer, jsonl, as_text):
    words, tags = ["playing", "dog", "zzz"], ["B", "O", "I"]
    row = {"text": " ".join(words), "label": " ".join(tags)} if as_text else {"text": words, "label": tags}
    dm = _module("fit", task="token_classification", data_path=jsonl([row]), labels=["O", "B", "I"], tokenizer=bert_tokenizer)
    batch = next(iter(dm.train_dataloader()))
    pieces = bert_tokenizer(words, is_split_into_words=True).word_ids()
    expected = [-100 if word is None or word == pieces[i - 1] else [1, 0, 2][word] for i, word in enumerate(pieces)]
    assert pieces.count(0) > 1  # a word of several pieces
    assert batch["labels"][0].tolist() == expected


def test_tags_must_match_words(bert_tokenizer, jsonl):
    path = jsonl([{"text": ["a", "cat"], "label": ["O"]}])
    with pytest.raises(DataError, match="row 0: 2 words but 1 tags"):
        _module("fit", task="token_classification", data_path=path, tokenizer=bert_tokenizer)
