"""Rows from files and from the ``datasets`` package; duplicates, splits and few-shot subsets by seed.

A row is a plain dict from column to value. Everything here is deterministic and touches no global random state.
"""

from __future__ import annotations

import csv
import importlib
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_peft.errors import DataError, DependencyError, did_you_mean
from lightning_peft.types import stable_seed

Row = dict[str, Any]
DataFormat = Literal["auto", "jsonl", "csv", "tsv", "text", "datasets"]
TextUnit = Literal["line", "paragraph", "file"]

_SUFFIXES: dict[str, DataFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_HUB_SPLITS = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How to read a source.

    Args:
        format: ``"auto"`` goes by the suffix; a name without a known suffix that is no file belongs to ``datasets``.
        encoding: text encoding of files; a byte order mark is dropped.
        column_names: names of the columns of a CSV or TSV file without a header line.
        text_unit: what one row of a text file is.
    """

    format: DataFormat = "auto"
    encoding: str = "utf-8"
    column_names: tuple[str, ...] | None = None
    text_unit: TextUnit = "line"

    def resolve_format(self, source: str) -> DataFormat:
        """Return the format of ``source``; :class:`DataError` when it cannot be told or the file does not exist."""
        path = Path(source)
        chosen = _SUFFIXES.get(path.suffix.lower()) if self.format == "auto" else self.format
        if chosen == "datasets" or (chosen is None and not path.exists()):
            return "datasets"
        if not path.is_file():
            names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise DataError(f"data file {source!r} does not exist.{did_you_mean(path.name, names)}")
        if chosen is None:
            raise DataError(
                f"cannot tell the format of {source!r} from its suffix {path.suffix!r}; known: {', '.join(_SUFFIXES)}. "
                "Set data_format to jsonl, csv, tsv or text."
            )
        return chosen

    def read(self, source: str) -> dict[str, list[Row]]:
        """Return the rows of ``source`` by split: ``{"train": rows}`` for a file, every split of ``datasets``."""
        chosen = self.resolve_format(source)
        hub = chosen == "datasets"
        splits = _read_datasets(source) if hub else {"train": self._read_file(Path(source), chosen)}
        for name, rows in splits.items():
            if not rows:
                raise DataError(f"{source!r} holds no rows (split {name}).")
        return splits

    def _read_file(self, path: Path, chosen: DataFormat) -> list[Row]:
        encoding = "utf-8-sig" if self.encoding.lower() in {"utf-8", "utf8"} else self.encoding
        try:
            with path.open(encoding=encoding, newline="" if chosen in {"csv", "tsv"} else None) as handle:
                if chosen == "jsonl":
                    return _read_json(path, handle.read())
                if chosen == "text":
                    return [{"text": unit} for unit in _text_units(handle.read(), self.text_unit)]
                return list(self._read_table(path, handle, chosen))
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path} is not valid {self.encoding} (byte {error.start}); set encoding, for example latin-1."
            ) from error

    def _read_table(self, path: Path, lines: Iterable[str], chosen: DataFormat) -> Iterator[Row]:
        # TSV knows no quoting (IANA text/tab-separated-values): a lone quotation mark must not swallow lines.
        table = csv.reader(lines) if chosen == "csv" else csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = list(self.column_names) if self.column_names else next(table, [])
            if len(set(header)) != len(header):
                raise DataError(f"{path} names a column twice: {header}.")
            for values in table:
                if not values:
                    continue
                if len(values) != len(header):
                    raise DataError(
                        f"{path}, line {table.line_num}: {len(values)} values for {len(header)} columns {header}. "
                        "Set column_names if the file has no header line."
                    )
                yield dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {table.line_num}: {error}; store long or irregular text as JSONL.") from error


def _read_json(path: Path, content: str) -> list[Row]:
    """Read one JSON object per line, or one JSON array of objects."""
    rows: list[Row] = []
    try:
        if content.lstrip().startswith("["):
            rows = json.loads(content)
        else:
            for number, line in enumerate(content.split("\n"), start=1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number} is {type(row).__name__}, expected an object with named columns.")
    return rows


def _text_units(content: str, unit: TextUnit) -> list[str]:
    if unit == "file":
        return [content] if content.strip() else []
    if unit == "line":
        return [line for line in content.split("\n") if line.strip()]
    paragraphs: list[list[str]] = [[]]
    for line in content.split("\n"):
        if line.strip():
            paragraphs[-1].append(line)
        elif paragraphs[-1]:
            paragraphs.append([])
    return ["\n".join(lines) for lines in paragraphs if lines]


def load_hub(source: str) -> Any:
    """Load ``"name"`` or ``"name:configuration"`` with ``datasets``; :class:`DependencyError` if not installed."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DependencyError(
            f"{source!r} is no file with a known suffix, so it is read with the package 'datasets', which is not "
            "installed: pip install datasets (or give the path of a JSONL, CSV, TSV or text file)."
        ) from error
    name, _, configuration = source.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None)
    except (FileNotFoundError, ValueError, ConnectionError) as error:
        raise DataError(f"datasets cannot load {source!r}: {error}") from error


def _read_datasets(source: str) -> dict[str, list[Row]]:
    loaded = load_hub(source)
    if not isinstance(loaded, dict):  # one Dataset; a DatasetDict is a dict
        return {"train": [dict(row) for row in loaded]}
    splits = {_HUB_SPLITS[name]: [dict(row) for row in loaded[name]] for name in loaded if name in _HUB_SPLITS}
    if not splits:
        raise DataError(f"{source!r} has the splits {sorted(loaded)}, none of {sorted(_HUB_SPLITS)}.")
    return splits


def require_columns(rows: Sequence[Row], columns: Iterable[str], where: str) -> None:
    """Raise :class:`DataError` with the nearest names when a needed column is in no row."""
    present = dict.fromkeys(name for row in rows for name in row)
    for column in columns:
        if column not in present:
            raise DataError(f"{where} has no column {column!r}; it has {list(present)}.{did_you_mean(column, present)}")


def row_key(row: Row, columns: Sequence[str]) -> str:
    """Return the text by which two rows are exact duplicates: the values of the columns that are used."""
    return json.dumps([row.get(column) for column in columns], sort_keys=True, default=str)


def without_duplicates(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    """Return ``rows`` with the first of each set of exact duplicates, in their order."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row_key(row, columns), row)
    return list(first.values())


def split_rows(rows: Sequence[Row], fractions: dict[str, float], seed: int) -> dict[str, list[Row]]:
    """Deal ``rows`` into ``{"train", *fractions}`` by ``seed``; every part keeps the order of the source.

    A fraction > 0 gets at least one row; :class:`DataError` when nothing is left to train on.
    """
    order = list(range(len(rows)))
    random.Random(stable_seed(seed, "split")).shuffle(order)
    parts: dict[str, list[Row]] = {}
    start = 0
    for name, fraction in fractions.items():
        count = max(1, round(len(rows) * fraction)) if fraction > 0 else 0
        parts[name] = [rows[i] for i in sorted(order[start : start + count])]
        start += count
    parts["train"] = [rows[i] for i in sorted(order[start:])]
    if not parts["train"]:
        raise DataError(f"{len(rows)} rows are too few to split by {fractions}: none is left to train on.")
    return parts


def few_shot(rows: Sequence[Row], label_of: Callable[[Row], str], labels: Iterable[str], k: int, seed: int) -> list[Row]:
    """Return ``k`` rows of each of ``labels``, chosen by ``seed``, in the order of the source.

    Raises:
        DataError: a label has fewer than ``k`` rows.
    """
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_label[label_of(row)].append(index)
    short = {label: len(by_label[label]) for label in labels if len(by_label[label]) < k}
    if short:
        raise DataError(f"few_shot={k} needs {k} training rows of each label, but there are only {short}.")
    chosen: list[int] = []
    for label in sorted(by_label):
        chosen += random.Random(stable_seed(seed, "few-shot", label)).sample(by_label[label], k)
    return [rows[index] for index in sorted(chosen)]
