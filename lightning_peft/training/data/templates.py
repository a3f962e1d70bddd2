"""What the columns mean: tasks, prompt and completion templates, and which columns each of them needs."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any, Literal

from lightning_peft.errors import ConfigError
from lightning_peft.training.data.sources import Row
from lightning_peft.training.data.tokenization import Span

Task = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "multiple_choice",
    "seq2seq_multiple_choice",
    "sequence_classification",
    "token_classification",
]
CHOICE = "choice"
"""What stands for an answer choice in the completion of a multiple-choice task."""


def parse_template(template: str) -> list[tuple[str, str | None]]:
    r"""Return ``(text, column or None)`` pieces of a template such as ``"Classify: {text}\nAnswer:"``.

    A column name may hold any character but braces; ``{{`` and ``}}`` stand for braces.

    Raises:
        ConfigError: unbalanced braces, or an empty or formatted field.
    """
    try:
        pieces = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"template {template!r}: {error}; write {{{{ and }}}} for braces.") from error
    for _, name, form, conversion in pieces:
        if name == "" or form or conversion:
            raise ConfigError(f"template {template!r}: a field is a column name in braces, such as {{text}}.")
    return [(text, name) for text, name, _, _ in pieces]


def template_columns(template: str) -> list[str]:
    """Return the columns of a template, each once, in order."""
    return list(dict.fromkeys(name for _, name in parse_template(template) if name is not None))


def cell(row: Row, column: str) -> str:
    """Return a value as text; a missing value is the empty text."""
    value = row.get(column)
    return "" if value is None else str(value)


def split_words(value: Any) -> list[str]:
    """Return a list of words or tags; a text is split at white space."""
    return value.split() if isinstance(value, str) else [str(item) for item in value]


def render(template: str, row: Row) -> tuple[str, list[Span]]:
    """Return the filled template and the character ranges of the inserted values."""
    text, spans = "", []
    for literal, name in parse_template(template):
        text += literal
        if name is not None:
            value = cell(row, name)
            spans.append((len(text), len(text) + len(value)))
            text += value
    return text, spans


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """What the columns mean; the part of :class:`PEFTDataModule`'s arguments that the encoders need.

    Raises:
        ConfigError: arguments that contradict each other or the task.
    """

    task: Task = "causal_lm"
    text_column: str = "text"
    text_pair_column: str | None = None
    prompt: str | None = None
    completion: str | None = None
    chat_template: bool = False
    system_prompt: str | None = None
    messages_column: str | None = None
    label_column: str = "label"
    labels: tuple[str, ...] | None = None
    choices: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        causal, chooses = self.task in ("causal_lm", "multiple_choice"), self.has_choices
        generative = chooses or self.task in ("causal_lm", "seq2seq_lm")
        rules = [
            (self.messages_column and self.task != "causal_lm", "messages_column needs task causal_lm"),
            (self.messages_column and (self.prompt or self.completion), "give messages_column or prompt, not both"),
            (self.completion and not generative, f"task {self.task} has no completion"),
            (self.task == "causal_lm" and self.completion and not self.prompt, "completion needs a prompt"),
            (self.task == "seq2seq_lm" and not self.completion, "task seq2seq_lm needs a completion"),
            (
                self.task == "token_classification" and self.prompt,
                "task token_classification reads words, not a prompt",
            ),
            (self.chat_template and not (self.prompt and causal), "chat_template needs a prompt"),
            (self.system_prompt and not self.chat_template, "system_prompt needs chat_template"),
            (
                self.text_pair_column and (self.task != "sequence_classification" or self.prompt),
                "text_pair_column needs task sequence_classification without a prompt",
            ),
            (self.choices is not None and not chooses, f"task {self.task} has no choices"),
            (
                not isinstance(self.choices, str) and any(not choice.strip() for choice in self.choices or ()),
                f"a choice of {self.choices} is blank",
            ),
            (
                (self.choices_column or "").startswith("["),
                f"choices={self.choices!r} is no column; quote the words of a list, since YAML takes no and yes for truth values",
            ),
            (self.labels and self.choices_column, "labels are for fixed choices; those of a column belong to their row"),
            (
                chooses and template_columns(self.completion_template or "") not in ([], [CHOICE]),
                f"with task {self.task} the completion may only name {{{CHOICE}}}",
            ),
        ]
        for broken, rule in rules:
            if broken:
                raise ConfigError(f"PEFTDataModule: {rule}.")
        for template in (self.prompt, self.completion_template):
            if template is not None and not template_columns(template):
                raise ConfigError(f"template {template!r} names no column; write {{{self.text_column}}} where it goes.")
        if self.fixed_answers:
            others = set(template_columns(self.completion_template or "")) - {self.label_column}
            if others:
                raise ConfigError(
                    f"with labels, completion {self.completion!r} may only name {{{self.label_column}}}, not "
                    f"{sorted(others)}: every label must give one answer."
                )

    @property
    def completion_template(self) -> str | None:
        """The completion as a template; a bare column name means that column."""
        if self.completion is None and self.has_choices:
            return "{" + CHOICE + "}"
        if self.completion is None or "{" in self.completion:
            return self.completion
        return "{" + self.completion + "}"

    @property
    def has_choices(self) -> bool:
        """Whether one of several answer choices is right."""
        return self.task in ("multiple_choice", "seq2seq_multiple_choice")

    @property
    def choices_column(self) -> str | None:
        """The column that holds each row's own choices."""
        return self.choices if isinstance(self.choices, str) else None

    @property
    def uses_label(self) -> bool:
        """Whether the label column is read and checked."""
        if self.has_choices:
            return self.choices_column is None
        if self.task in ("sequence_classification", "token_classification"):
            return True
        return self.completion is not None and self.label_column in template_columns(self.completion_template or "")

    @property
    def fixed_answers(self) -> bool:
        """Whether every completion is one of a few known answers, so that labels can be scored or compared."""
        return self.labels is not None and self.uses_label and self.completion is not None and not self.has_choices

    @property
    def input_columns(self) -> list[str]:
        """The columns needed to predict."""
        return [*self.text_columns, *([self.choices_column] if self.choices_column else [])]

    @property
    def text_columns(self) -> list[str]:
        """The columns with what is read."""
        if self.messages_column is not None:
            return [self.messages_column]
        if self.prompt is not None:
            return template_columns(self.prompt)
        return [self.text_column, *([self.text_pair_column] if self.text_pair_column else [])]

    @property
    def target_columns(self) -> list[str]:
        """The columns needed to train and evaluate on top of :attr:`input_columns`."""
        if self.has_choices:
            return [self.label_column]
        if self.completion is not None:
            return template_columns(self.completion_template or "")
        return [self.label_column] if self.uses_label else []

    def source_text(self, row: Row) -> tuple[str, list[Span]]:
        """Return the text that the model reads and the ranges of it that may be cut."""
        return render(self.prompt if self.prompt is not None else "{" + self.text_column + "}", row)

    def target_text(self, row: Row) -> str:
        """Return the text that the model is to write."""
        return render(self.completion_template or "", row)[0]

    def is_blank(self, row: Row, *, target: bool) -> bool:
        """Whether a row has nothing to read, or nothing to write where ``target`` asks for it."""
        columns = [self.text_columns]
        if target and (self.completion is not None or self.has_choices):
            columns.append(self.target_columns)
        return any(all(row.get(name) in ([], ()) or not cell(row, name).strip() for name in group) for group in columns)
