"""The rows of every split: read, labels checked, duplicates removed, split by seed. No tokenizer is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.errors import ConfigError, DataError, did_you_mean
from lightning_peft.training.data.sources import (
    Reader,
    Row,
    few_shot,
    require_columns,
    row_key,
    split_rows,
    without_duplicates,
)
from lightning_peft.training.data.templates import TextSpec, cell, split_words


@dataclass(kw_only=True)
class RowStore:
    """Reads what the paths name, once; the arguments are those of :class:`PEFTDataModule`.

    Attributes:
        duplicates: exact duplicates that were removed, after :attr:`splits`.
    """

    spec: TextSpec
    reader: Reader
    data_path: str | None = None
    val_path: str | None = None
    test_path: str | None = None
    predict_path: str | None = None
    predict_texts: list[str] | None = None
    label_names: dict[str, str] = field(default_factory=dict)
    few_shot: int | None = None
    deduplicate: bool = True
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    seed: int = 0
    duplicates: int = 0

    def __post_init__(self) -> None:
        if min(self.val_fraction, self.test_fraction) < 0 or self.val_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} must be >= 0 and sum to < 1."
            )
        if self.few_shot is not None and (self.few_shot < 1 or self._tagged or self.spec.choices_column):
            raise ConfigError(f"few_shot={self.few_shot} must be >= 1 and needs one label per row.")
        if self.predict_path is not None and self.predict_texts is not None:
            raise ConfigError("give predict_path or predict_texts, not both.")

    @property
    def paths(self) -> list[str]:
        """All sources that are named."""
        return [path for path in (self.data_path, self.val_path, self.test_path, self.predict_path) if path is not None]

    @property
    def columns(self) -> list[str]:
        """The columns that training and evaluation use."""
        label = [self.spec.label_column] if self.few_shot is not None else []
        return list(dict.fromkeys([*self.spec.input_columns, *self.spec.target_columns, *label]))

    @property
    def labels(self) -> list[str]:
        """The allowed labels in the order of their class indices; empty if the task has none."""
        if self.spec.labels is not None:
            return list(self.spec.labels)
        rows = self._named.get("train", [])
        if not (self.spec.uses_label or self.few_shot is not None):
            return []
        found = {label for row in rows for label in self._labels_of(row)}
        if not found:
            raise ConfigError("without data_path the labels are not known: give labels.")
        return sorted(found, key=lambda label: (not label.isdecimal(), int(label) if label.isdecimal() else 0, label))

    @cached_property
    def splits(self) -> dict[str, list[Row]]:
        """The rows of ``train``, ``val`` and ``test``, as far as there are any, ready to be tokenised."""
        splits = dict(self._named)
        if not splits:
            return splits
        if self.spec.uses_label or self.few_shot is not None:
            self._check_labels(splits)
        if "train" in splits:
            rows = without_duplicates(splits["train"], self.columns) if self.deduplicate else splits["train"]
            self.duplicates, splits["train"] = len(splits["train"]) - len(rows), rows
            fractions = {"val": self.val_fraction, "test": self.test_fraction}
            missing = {name: share for name, share in fractions.items() if name not in splits and share > 0}
            if missing:
                splits |= split_rows(splits["train"], missing, self.seed)
            self._warn_of_overlap(splits)
            if self.few_shot is not None:
                splits["train"] = few_shot(
                    splits["train"], lambda row: cell(row, self.spec.label_column), self.labels, self.few_shot, self.seed
                )
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())
        rank_zero_info(f"Data: {counts} rows; {self.duplicates} exact duplicates removed before splitting.")
        return splits

    def predict_rows(self) -> list[Row]:
        """Return the rows to predict, which need the input columns only."""
        columns = self.spec.input_columns
        if self.predict_texts is not None:
            if len(columns) != 1:
                raise DataError(f"predict_texts fill one column, but {columns} are needed; give predict_path.")
            chat = self.spec.messages_column is not None
            rows: list[Row] = [{columns[0]: [{"role": "user", "content": text}] if chat else text} for text in self.predict_texts]
        elif self.predict_path is not None:
            found = self.reader.read(self.predict_path)
            rows = found.get("test") or next(iter(found.values()))
            require_columns(rows, columns, repr(self.predict_path))
        else:
            raise DataError("there is nothing to predict: give predict_texts or predict_path.")
        blank = [number for number, row in enumerate(rows) if self.spec.is_blank(row, target=False)]
        if blank or not rows:
            raise DataError(f"rows to predict must have a text; blank are {blank[:10]} of {len(rows)} rows.")
        return rows

    @cached_property
    def _named(self) -> dict[str, list[Row]]:
        """The rows as read, without blank ones, labels under their names."""
        sources: dict[str, tuple[str, list[Row]]] = {}
        if self.data_path is not None:
            sources = {name: (self.data_path, rows) for name, rows in self.reader.read(self.data_path).items()}
        for name, path in (("val", self.val_path), ("test", self.test_path)):
            if path is not None:
                found = self.reader.read(path)
                sources[name] = (path, found.get(name) or found.get("train") or next(iter(found.values())))
        splits: dict[str, list[Row]] = {}
        for name, (path, rows) in sources.items():
            require_columns(rows, self.columns, repr(path))
            kept = [row for row in rows if not self.spec.is_blank(row, target=True)]
            if not kept:
                raise DataError(f"{path!r}: all {len(rows)} rows are blank in the columns {self.columns}.")
            if len(kept) < len(rows):
                rank_zero_info(f"Data: {len(rows) - len(kept)} of {len(rows)} rows of {path!r} are blank and left out.")
            splits[name] = [self._with_names(row) for row in kept]
        return splits

    @property
    def _tagged(self) -> bool:
        return self.spec.task == "token_classification"

    def _with_names(self, row: Row) -> Row:
        column = self.spec.label_column
        if column not in row or not (self.spec.uses_label or self.few_shot is not None):
            return row
        values = split_words(row[column] or ()) if self._tagged else [cell(row, column)]
        names = [self.label_names.get(value, value) for value in values]
        return {**row, column: names if self._tagged else names[0]}

    def _labels_of(self, row: Row) -> list[str]:
        value = row.get(self.spec.label_column)
        return list(value or ()) if self._tagged else [cell(row, self.spec.label_column)]

    def _check_labels(self, splits: dict[str, list[Row]]) -> None:
        labels = self.labels
        for name, rows in splits.items():
            strange = Counter(label for row in rows for label in self._labels_of(row)).copy()
            for label in labels:
                strange.pop(label, None)
            if strange:
                raise DataError(
                    f"column {self.spec.label_column!r} ({name}) holds labels that are not in {labels[:20]}: "
                    f"{dict(strange.most_common(5))}.{did_you_mean(next(iter(strange)), labels)} Add them to labels, or "
                    "map them with label_names."
                )

    def _warn_of_overlap(self, splits: dict[str, list[Row]]) -> None:
        """Say how many evaluation rows are also training rows; evaluation files are never changed."""
        train = {row_key(row, self.columns) for row in splits["train"]}
        for name in ("val", "test"):
            rows: Sequence[Row] = splits.get(name, ())
            common = sum(row_key(row, self.columns) in train for row in rows)
            if common:
                rank_zero_warn(f"{common} of {len(rows)} rows of {name} are also in the training data.")
