"""Rows to token sequences, one encoder per task. What is learned, what is cut and what is only read is decided here.

Cutting never touches a completion, a special token or the words of a template: only the text that columns inserted, and
for plain text the text itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.errors import DataError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data.sources import Row
from lightning_peft.training.data.templates import TextSpec, cell, split_words
from lightning_peft.training.data.tokenization import FIXED, Span, TextEncoder, Tokens, keep_positions

TruncationSide = Literal["left", "right"]
Ints = array  # array("i"): four bytes a token, where a list of ints needs up to 36


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row.

    Attributes:
        input_ids: (length,).
        labels: (length,) with -100 where there is no loss; for seq2seq the decoder's labels (target length,); for
            sequence classification the class index; None where the collator makes them or there are none.
        prompt_length: how many leading ids are the prompt.
        token_type_ids: (length,), if the tokenizer has them.
        word_ids: (length,), -1 for specials; masked LM only.
        answer: the text to be generated, if it is known.
        answer_label: its index among the fixed answers or the choices, -100 if there are none or it is not known.
        choices: the tokens of each answer choice; multiple choice only.
        texts: their texts.
    """

    input_ids: Ints[int]
    labels: Ints[int] | int | None = None
    prompt_length: int = 0
    token_type_ids: Ints[int] | None = None
    word_ids: Ints[int] | None = None
    answer: str | None = None
    answer_label: int = IGNORE
    choices: tuple[Ints[int], ...] = ()
    texts: tuple[str, ...] = ()


class TooLong(Exception):
    """A row is longer than the limit and is not, or cannot be, cut. Caught and counted by the caller."""

    def __init__(self, length: int, *, fixed: bool) -> None:
        super().__init__(length, fixed)
        self.length = length
        self.fixed = fixed


class RowEncoder(ABC):
    """Encodes rows of one task.

    Args:
        spec: what the columns mean.
        text: the tokenizer's rules.
        labels: the allowed labels; their positions are the class indices.
        max_length: limit of ``input_ids`` and of labels.
        side: where too long rows are cut; None never cuts.
    """

    def __init__(
        self, spec: TextSpec, text: TextEncoder, *, labels: Sequence[str], max_length: int, side: TruncationSide | None
    ) -> None:
        self.spec = spec
        self.text = text
        self.label_index = {label: index for index, label in enumerate(labels)}
        self.max_length = max_length
        self.side = side
        self.cut = 0  # rows that were shortened

    @abstractmethod
    def encode(self, row: Row, *, target: bool) -> Example:
        """Encode a row, without labels if not ``target``; :class:`TooLong` if it does not fit."""

    def keep(self, groups: Sequence[int], room: int | None = None) -> list[int]:
        """Return the positions of a sequence that stay, all of them if it fits into ``room`` (default: the limit)."""
        room = self.max_length if room is None else room
        if len(groups) <= room:
            return list(range(len(groups)))
        if self.side is None:
            raise TooLong(len(groups), fixed=False)
        kept = keep_positions(groups, room, self.side)
        if kept is None:
            raise TooLong(len(groups), fixed=True)
        self.cut += 1
        return kept


class CausalEncoder(RowEncoder):
    """Causal LM: plain text, prompt and completion, prompt in a chat template, or whole conversations."""

    def encode(self, row: Row, *, target: bool) -> Example:
        spec = self.spec
        answer = self._answer(row) if target else None
        if spec.messages_column is not None or spec.chat_template:
            messages, spans = self._conversation(row, target=target)
            tokens, prompt_length = self.text.chat_turns(messages, {})
            if len(tokens.ids) > self.max_length:  # only now it matters what may be cut; finding it costs a rendering
                tokens, prompt_length = self.text.chat_turns(messages, spans)
        elif spec.prompt is not None:
            tokens, prompt_length = self._prompted(row, answer)
        else:
            tokens = self._plain(row, target=target)
            prompt_length = 0 if target else len(tokens.ids)
        kept = self.keep(tokens.groups)
        plain = spec.prompt is None and spec.messages_column is None
        if plain and target and len(kept) < len(tokens.ids) and self.side == "right":
            kept.pop()  # the EOS: the text goes on
        return Example(
            input_ids=array("i", [tokens.ids[i] for i in kept]),
            labels=array("i", [tokens.labels[i] for i in kept]) if target else None,
            prompt_length=sum(i < prompt_length for i in kept),
            answer=answer,
            answer_label=self.label_index.get(cell(row, spec.label_column), IGNORE) if spec.fixed_answers else IGNORE,
        )

    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens with loss that a completion has in any row: the answer and its end."""
        if self.spec.chat_template:
            turns = [*self._system(), {"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
            return [label for label in self.text.chat_turns(turns, {})[0].labels if label != IGNORE]
        return self._completion(answer)

    def _completion(self, answer: str) -> list[int]:
        ids, _ = self.text.encode(answer, continued=True)
        eos = self.text.require_eos()
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _prompted(self, row: Row, answer: str | None) -> tuple[Tokens, int]:
        ids, groups = self.text.encode(*self.spec.source_text(row))
        tokens = Tokens()
        tokens.add(self.text.start(ids))
        tokens.add(ids, groups=groups)
        prompt_length = len(tokens.ids)
        if answer is not None:
            completion = self._completion(answer)
            tokens.add(completion, labels=completion)
        return tokens, prompt_length

    def _plain(self, row: Row, *, target: bool) -> Tokens:
        """``[BOS] text [EOS]`` with loss on all but the first token; without EOS when it is to be continued."""
        ids, groups = self.text.encode(*self.spec.source_text(row))
        tokens = Tokens()
        tokens.add(self.text.start(ids))
        tokens.add(ids, labels=ids, groups=groups)
        if target:
            tokens.add([self.text.require_eos()], labels=[self.text.require_eos()])
        tokens.labels[0] = IGNORE  # nothing comes before it, so no position predicts it
        return tokens

    def _system(self) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.spec.system_prompt}] if self.spec.system_prompt else []

    def _conversation(self, row: Row, *, target: bool) -> tuple[list[Mapping[str, Any]], dict[int, list[Span]]]:
        """Return the messages and, by message, the ranges that may be cut: the texts of users and tools."""
        if self.spec.messages_column is None:
            prompt, spans = self.spec.source_text(row)
            turns = [*self._system(), {"role": "user", "content": prompt}]
            where = {len(turns) - 1: spans}
            return [*turns, *([{"role": "assistant", "content": self.spec.target_text(row)}] if target else [])], where
        messages = check_messages(row[self.spec.messages_column], self.spec.messages_column, target=target)
        while (messages[-1]["role"] == "assistant") != target:  # learn up to the last answer; predict the next one
            messages.pop()
        return messages, {
            index: [(0, len(message["content"]))]
            for index, message in enumerate(messages)
            if message["role"] not in ("assistant", "system")
        }

    def _answer(self, row: Row) -> str | None:
        if self.spec.messages_column is not None:
            messages = check_messages(row[self.spec.messages_column], self.spec.messages_column, target=True)
            return next(str(m["content"]) for m in reversed(messages) if m["role"] == "assistant")
        return self.spec.target_text(row) if self.spec.completion is not None else None


def check_messages(value: Any, column: str, *, target: bool) -> list[Mapping[str, Any]]:
    """Return a conversation after checking that it is a list of ``{role, content}`` with an assistant turn to learn."""
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"column {column!r} must hold a list of {{role, content}}, not {value!r:.80}.")
    for message in value:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"column {column!r}: a message needs the texts 'role' and 'content', got {message!r:.80}.")
    wanted = {"assistant"} if target else {message["role"] for message in value} - {"assistant"}
    if not any(message["role"] in wanted for message in value):
        lack = "an assistant turn to learn" if target else "a turn to answer"
        raise DataError(f"column {column!r}: a conversation lacks {lack}: {value!r:.80}.")
    return list(value)


class EncoderOnlyEncoder(RowEncoder):
    """Masked LM and sequence classification: the tokenizer's own encoding of a text or a pair."""

    def encode(self, row: Row, *, target: bool) -> Example:
        spec = self.spec
        pair = cell(row, spec.text_pair_column) if spec.text_pair_column else None
        example, _ = self._encode(self.text.with_specials(spec.source_text(row)[0], pair), words=spec.task == "masked_lm")
        if spec.task == "masked_lm" or not target:
            return example
        return Example(
            input_ids=example.input_ids,
            token_type_ids=example.token_type_ids,
            labels=self.label_index[cell(row, spec.label_column)],
        )

    def _encode(self, encoded: Any, *, words: bool) -> tuple[Example, list[int]]:
        special = encoded["special_tokens_mask"]
        segments = encoded.sequence_ids()
        mask_id = self.text.tokenizer.mask_token_id
        fixed = [s and i != mask_id for s, i in zip(special, encoded["input_ids"], strict=True)]
        kept = self.keep([FIXED if f else (segment or 0) for f, segment in zip(fixed, segments, strict=True)])
        types = encoded.get("token_type_ids")
        word_ids = _unique_words(encoded.word_ids(), segments, special)
        return (
            Example(
                input_ids=array("i", [encoded["input_ids"][i] for i in kept]),
                token_type_ids=array("i", [types[i] for i in kept]) if types is not None else None,
                word_ids=array("i", [word_ids[i] for i in kept]) if words else None,
            ),
            kept,
        )


def _unique_words(words: Sequence[int | None], segments: Sequence[int | None], special: Sequence[int]) -> list[int]:
    """Return word numbers that differ between the two texts of a pair; -1 for specials."""
    numbers: dict[tuple[int | None, int], int] = {}
    return [
        -1 if word is None or s else numbers.setdefault((segment, word), len(numbers))
        for word, segment, s in zip(words, segments, special, strict=True)
    ]


class TokenClassificationEncoder(EncoderOnlyEncoder):
    """Words and tags: the first piece of a word carries its tag, the others and the specials carry -100."""

    def encode(self, row: Row, *, target: bool) -> Example:
        words = split_words(row[self.spec.text_column])
        encoded = self.text.tokenizer(words, is_split_into_words=True, add_special_tokens=True, return_special_tokens_mask=True)
        example, kept = self._encode(encoded, words=False)
        if not target:
            return example
        tags = split_words(row[self.spec.label_column])
        if len(tags) != len(words):
            raise DataError(f"{len(words)} words but {len(tags)} tags: {words[:8]}, {tags[:8]}.")
        of_token = encoded.word_ids()
        labels = [
            IGNORE if word is None or (i > 0 and of_token[i - 1] == word) else self.label_index[tags[word]]
            for i, word in enumerate(of_token)
        ]
        return Example(
            input_ids=example.input_ids,
            token_type_ids=example.token_type_ids,
            labels=array("i", [labels[i] for i in kept]),
        )


class Seq2SeqEncoder(EncoderOnlyEncoder):
    """Encoder text and decoder labels; both with the specials that the tokenizer gives a source and a target."""

    def encode(self, row: Row, *, target: bool) -> Example:
        example, _ = self._encode(self.text.with_specials(self.spec.source_text(row)[0]), words=False)
        if not target:
            return example
        answer = self.spec.target_text(row)
        labels = self.answer_ids(answer)
        if len(labels) > self.max_length:
            raise TooLong(len(labels), fixed=True)
        index = self.label_index.get(cell(row, self.spec.label_column), IGNORE) if self.spec.fixed_answers else IGNORE
        return Example(input_ids=example.input_ids, labels=array("i", labels), answer=answer, answer_label=index)

    def answer_ids(self, answer: str) -> list[int]:
        """Return the decoder's labels for a target: the tokenizer's encoding, with EOS at its end."""
        ids = list(self.text.tokenizer(text_target=answer, add_special_tokens=True)["input_ids"])
        return ids if ids and ids[-1] == self.text.require_eos() else [*ids, self.text.require_eos()]


def pack(examples: Sequence[Example], length: int) -> list[Example]:
    """Join plain-text examples in order and cut them into blocks of ``length`` tokens; the last block may be shorter.

    A block is one sequence to the model: tokens attend to the documents before theirs in the same block, with only EOS
    (and BOS) between them. That is GPT-style training; nothing is padded and no token is lost.
    """
    ids, labels = array("i"), array("i")
    for example in examples:
        assert isinstance(example.labels, array)
        ids.extend(example.input_ids)
        labels.extend(example.labels)
    for start in range(0, len(ids), length):
        labels[start] = IGNORE  # the first token of a block has no predecessor
    return [
        Example(input_ids=ids[start : start + length], labels=labels[start : start + length])
        for start in range(0, len(ids), length)
        if len(ids) - start > 1
    ]
