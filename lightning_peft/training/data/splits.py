"""The rows of one split to examples: what each task makes of a row, what became of the rows that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.errors import DataError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data.choices import CausalChoiceEncoder, Seq2SeqChoiceEncoder
from lightning_peft.training.data.encoders import (
    CausalEncoder,
    EncoderOnlyEncoder,
    Example,
    RowEncoder,
    Seq2SeqEncoder,
    TokenClassificationEncoder,
    TooLong,
    pack,
)
from lightning_peft.training.data.progress import tracked
from lightning_peft.training.data.sources import Row
from lightning_peft.training.data.templates import Task

Truncation = Literal["error", "drop", "left", "right"]

ENCODERS: dict[Task, type[RowEncoder]] = {
    "causal_lm": CausalEncoder,
    "masked_lm": EncoderOnlyEncoder,
    "seq2seq_lm": Seq2SeqEncoder,
    "multiple_choice": CausalChoiceEncoder,
    "seq2seq_multiple_choice": Seq2SeqChoiceEncoder,
    "sequence_classification": EncoderOnlyEncoder,
    "token_classification": TokenClassificationEncoder,
}


@dataclass(frozen=True, slots=True)
class SplitReport:
    """What became of one split.

    Attributes:
        rows: examples (blocks if packed).
        cut: rows that were shortened to ``max_length``.
        dropped: rows left out because they were too long.
        tokens: input tokens; of a multiple-choice row those of the prompt.
        labelled: tokens, or rows, with loss; None where the collator draws them (masked LM) or there are none.
        choices: answer choices of all rows.
    """

    rows: int
    cut: int
    dropped: int
    tokens: int
    labelled: int | None
    choices: int = 0


def encode_split(
    split: str, rows: Sequence[Row], encoder: RowEncoder, *, truncation: Truncation, packing: bool, visible: bool
) -> tuple[list[Example], SplitReport]:
    """Tokenise a split; say what was cut or dropped.

    Args:
        split: its name.
        rows: at least one.
        encoder: of the task.
        truncation: what becomes of rows that are too long.
        packing: join the examples into full blocks.
        visible: show a bar.

    Raises:
        DataError: a row is too long, no row is left, or a row does not hold what the task needs.
    """
    examples: list[Example] = []
    too_long: list[tuple[int, TooLong]] = []
    for number, row in enumerate(tracked(rows, f"Tokenizing {split}", len(rows), visible=visible)):
        try:
            examples.append(encoder.encode(row, target=split != "predict"))
        except TooLong as error:
            too_long.append((number, error))
        except DataError as error:
            raise DataError(f"{split}, row {number}: {error}") from error
    limit = encoder.max_length
    if too_long and (truncation != "drop" or split == "predict"):
        number, worst = max(too_long, key=lambda item: item[1].length)
        why = "even without the text that may be cut" if worst.fixed else f"and truncation is {truncation!r}"
        remedy = "raise max_length or set truncation to drop" + ("" if worst.fixed else ", left or right")
        raise DataError(
            f"{len(too_long)} of {len(rows)} rows of {split} are longer than max_length={limit} {why} "
            f"(row {number}: {worst.length} tokens): {remedy}."
        )
    if packing:
        examples = pack(examples, limit)
    if not examples:
        raise DataError(f"no row of {split} is left: all {len(rows)} are longer than max_length={limit}.")
    report = SplitReport(
        rows=len(examples),
        cut=encoder.cut,
        dropped=len(too_long),
        tokens=sum(len(example.input_ids) for example in examples),
        labelled=_count_labels(examples),
        choices=sum(len(example.choices) for example in examples),
    )
    labelled = "" if report.labelled is None else f", {report.labelled:,} labels"
    choices = "" if not report.choices else f", {report.choices:,} choices"
    rank_zero_info(
        f"Data: {split} {report.rows:,} rows, {report.tokens:,} tokens{choices}{labelled}; "
        f"longer than {limit} tokens: {report.cut} cut, {report.dropped} dropped (truncation={truncation})."
    )
    return examples, report


def _count_labels(examples: Sequence[Example]) -> int | None:
    if examples[0].choices:
        return sum(example.answer_label != IGNORE for example in examples) or None
    labels = [example.labels for example in examples if example.labels is not None]
    if not labels:
        return None
    return sum(1 if isinstance(label, int) else len(label) - label.count(IGNORE) for label in labels)
