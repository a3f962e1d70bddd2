"""Multiple choice: rows with a question, answer choices and the right one, to examples and batches.

The choices are fixed (the classes of the data in the words of ``choices``), or each row brings its own list, of any length. Every
choice is written by the completion template, so that ``" {choice}"`` follows a prompt with a space, and ends as a completion does.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from array import array
from collections.abc import Sequence
from typing import Any

import torch

from lightning_peft.errors import ConfigError, DataError, did_you_mean
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data.collators import Batch, BatchKey, Collator
from lightning_peft.training.data.encoders import CausalEncoder, Example, Ints, RowEncoder, Seq2SeqEncoder, TooLong
from lightning_peft.training.data.sources import Row
from lightning_peft.training.data.templates import CHOICE, cell
from lightning_peft.training.data.tokenization import FIXED, TextEncoder, Tokens


def read_choices(value: Any, column: str) -> tuple[str, ...]:
    """Return the choices in a cell: a list of texts or numbers, in a table the list as JSON.

    Raises:
        DataError: It is no list, it has no entries, or one is blank.
    """
    found = value
    if isinstance(value, str):
        try:
            found = json.loads(value)
        except json.JSONDecodeError:
            found = None
    if not isinstance(found, (list, tuple)) or any(isinstance(item, (list, tuple, dict)) for item in found):
        raise DataError(f'column {column!r} must hold a list of choices (in a table as JSON: ["yes", "no"]), not {value!r:.80}.')
    if not found:
        raise DataError(f"column {column!r} holds no choices.")
    choices = tuple("" if item is None else str(item) for item in found)
    if blank := [i for i, choice in enumerate(choices) if not choice.strip()]:
        raise DataError(f"column {column!r}: choice {blank[0]} of {list(choices)!r:.80} is blank. Leave it out of the list.")
    return choices


def answer_index(value: Any, choices: Sequence[str], column: str) -> int:
    """Return which choice is the right one. A number is its index from 0; a text is the choice itself, or else its index.

    Raises:
        DataError: It is neither.
    """
    text = str(value)
    if not isinstance(value, int) and text in choices:
        return choices.index(text)
    if not isinstance(value, bool) and text.isdecimal() and int(text) < len(choices):
        return int(text)
    raise DataError(
        f"the answer {value!r:.80} (column {column!r}) is neither one of the choices {list(choices)!r:.200} nor an index below "
        f"{len(choices)}.{did_you_mean(text, choices)}"
    )


class ChoiceEncoder(RowEncoder):
    """Encodes the choices of a row; a subclass knows how a prompt and a completion are written for its kind of model."""

    def fixed(self) -> tuple[str, ...]:
        """Return the choices that all rows share, one for each label.

        Raises:
            ConfigError: Their number differs from that of the labels.
        """
        labels, choices = tuple(self.label_index), self.spec.choices
        if choices is None:
            return labels
        if len(choices) != len(labels):
            raise ConfigError(
                f"there are {len(choices)} choices {list(choices)} for {len(labels)} labels {list(labels)}: one each."
            )
        return tuple(choices)

    def choose(self, row: Row, *, target: bool) -> tuple[tuple[str, ...], int]:
        """Return the choices of a row and the index of the right one, -100 if not ``target``."""
        column, answer = self.spec.choices_column, self.spec.label_column
        if column is None:
            return self.fixed(), self.label_index[cell(row, answer)] if target else IGNORE
        choices = read_choices(row.get(column), column)
        return choices, answer_index(row.get(answer), choices, answer) if target else IGNORE

    def tokens(self, choices: Sequence[str]) -> tuple[Ints[int], ...]:
        """Return the tokens of each choice with its end.

        Raises:
            DataError: Two choices are the same.
        """
        ids = tuple(array("i", self.answer_ids(self.spec.target_text({CHOICE: choice}))) for choice in choices)
        for i, one in enumerate(ids):
            if one in ids[:i]:
                raise DataError(f"choices {ids.index(one)} and {i} of {list(choices)!r:.200} are the same. Take one out.")
        return ids

    @abstractmethod
    def answer_ids(self, answer: str) -> list[int]:
        """Return the tokens of a completion and its end."""


class CausalChoiceEncoder(CausalEncoder, ChoiceEncoder):
    """``input_ids`` are the prompt; it is cut so that the longest choice fits behind it."""

    def encode(self, row: Row, *, target: bool) -> Example:
        texts, answer = self.choose(row, target=target)
        choices = self.tokens(texts)
        prompt = self._prompt(row)
        longest = max(map(len, choices))
        kept = self.keep([*prompt.groups, *[FIXED] * longest])
        ids = array("i", [prompt.ids[i] for i in kept if i < len(prompt.ids)])
        return Example(input_ids=ids, prompt_length=len(ids), choices=choices, texts=texts, answer_label=answer)

    def _prompt(self, row: Row) -> Tokens:
        if not self.spec.chat_template:
            return self._prompted(row, None)[0]
        messages, spans = self._conversation(row, target=False)
        return self.text.chat_turns(messages, spans)[0]


class Seq2SeqChoiceEncoder(Seq2SeqEncoder, ChoiceEncoder):
    """``input_ids`` are the encoder's; a choice is what the decoder may write."""

    def encode(self, row: Row, *, target: bool) -> Example:
        texts, answer = self.choose(row, target=target)
        choices = self.tokens(texts)
        if (longest := max(map(len, choices))) > self.max_length:
            raise TooLong(longest, fixed=True)
        source, _ = self._encode(self.text.with_specials(self.spec.source_text(row)[0]), words=False)
        ids, types = source.input_ids, source.token_type_ids
        return Example(input_ids=ids, token_type_ids=types, choices=choices, texts=texts, answer_label=answer)


class ChoiceCollator(Collator):
    """Multiple choice for an encoder-decoder: ``input_ids``, ``attention_mask`` (batch, length), each example once.

    Further keys, for m choices of all examples in their order:

    * ``choice_labels`` (m, choice length): their tokens, -100 elsewhere.
    * ``choice_counts`` (batch,): the number of choices of each example.
    * ``answer_labels`` (batch,): the index of the right choice, -100 where it is not known and for a filler row.
    * ``example_ids`` (batch,): as for generation.
    * ``choices``: the texts, one list per example; only to predict.

    Args:
        text: gives the pad id.
        texts: add ``choices``.
        multiple_of: lengths are padded to a multiple of this.
    """

    def __init__(self, text: TextEncoder, *, texts: bool = False, multiple_of: int = 1) -> None:
        super().__init__(text, multiple_of=multiple_of)
        self.texts = texts

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        batch["choice_labels"] = self.pad([choice for e in examples for choice in e.choices], IGNORE)[0]
        batch["choice_counts"] = torch.tensor([len(e.choices) for e in examples])
        batch["answer_labels"] = torch.tensor([e.answer_label for e in examples])
        batch["example_ids"] = torch.tensor(key.indices)
        if self.texts:
            batch["choices"] = [list(e.texts) for e in examples]


class CausalChoiceCollator(ChoiceCollator):
    """Multiple choice for a decoder: ``input_ids``, ``attention_mask`` and ``choice_labels`` (m, length), the prompt before each choice."""

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        super().extend(batch, examples, key)
        rows = [(e.input_ids, choice) for e in examples for choice in e.choices]
        batch["input_ids"], batch["attention_mask"] = self.pad([[*prompt, *choice] for prompt, choice in rows], self.pad_id)
        batch["choice_labels"] = self.pad([[*[IGNORE] * len(prompt), *choice] for prompt, choice in rows], IGNORE)[0]
