"""Files that others wrote: the bounds that hold before their contents are used, all in one place.

Reading JSON, headers of safetensors files and archives costs time and memory in proportion to the size of the file, and ends in a value
or in a :class:`FormatError`. What the safetensors library refuses itself (offsets that overlap, leave holes or lie outside the file,
sizes that do not fit shape and dtype, unknown dtypes, bytes behind the last tensor) is not checked a second time here.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import torch

from lightning_peft.errors import FormatError

MAX_BYTES = 64 << 20  # of a JSON text; the manifest of an adapter with 100,000 tensors has 15 MB
MAX_VALUES = 2_000_000  # entries of all lists and objects of a JSON text; that manifest has 700,000
MAX_DEPTH = 64  # of lists and objects in one another; a strategy composed of compositions takes 3 per level


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, after following links: one that leads out of the folder is refused.

    Links into the ``blobs`` of the Hugging Face cache that the folder is a snapshot of are as that cache is made.

    Raises:
        FormatError: The path, or the link there, leads somewhere else.
    """
    path = folder / name
    try:
        place, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a zero byte
        raise FormatError(f"'{folder}': {name!r} is no file that can be opened: {error}.") from error
    homes = [home, *(parent.parent / "blobs" for parent in home.parents if parent.name == "snapshots")]
    if not any(place.is_relative_to(allowed) for allowed in homes):
        raise FormatError(f"'{path}' leads out of its folder, to '{place}'. Put a copy of the file in its place if you trust it.")
    return path


def read_text(path: Path) -> str:
    """Return a text file of at most :data:`MAX_BYTES`.

    Raises:
        FormatError: It is longer, or is not UTF-8.
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise FormatError(f"'{path}' has more than {MAX_BYTES >> 20} MiB, the most that is read of such a file.")
    return decoded(data, f"'{path}'")


def decoded(data: bytes, where: str) -> str:
    """Return UTF-8 bytes as a string.

    Raises:
        FormatError: They are none.
    """
    try:
        return data.decode("utf-8")
    except ValueError as error:
        raise FormatError(f"{where} is not JSON: {error}. It is truncated or was changed.") from error


def parse_json(text: str, where: str, *, unique: bool = True) -> Any:
    """Return the value of a JSON text; see :func:`check_plain` for what it may hold.

    Args:
        text: At most :data:`MAX_BYTES` characters.
        where: Names the file in messages.
        unique: Refuse an object that has one key twice, of which readers may take either.

    Raises:
        FormatError: It is no JSON, too long or too deep.
    """
    if sum(text.count(sign) for sign in ",[{") > MAX_VALUES:
        raise FormatError(f"{where} has more than {MAX_VALUES:,} values, the most that is read of such a file.")
    try:
        value = json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError as error:
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels.") from error
    except ValueError as error:
        raise FormatError(f"{where} is not JSON: {error}. It is truncated or was changed.") from error
    check_plain(value, where)
    return value


def check_plain(value: Any, where: str, *, values: int = MAX_VALUES, finite: bool = False) -> None:
    """Check that a value is made of what JSON can hold, in bounded number and depth: nothing later can recurse or loop for ever.

    Args:
        value: From JSON, or from a pickle, where lists can hold themselves, or one list many times.
        where: Names the file in messages.
        values: The most entries of all lists and objects together.
        finite: Refuse NaN and infinities.

    Raises:
        FormatError: Something else is in there, too much or too deep; or an integer that 64 bits do not hold.
    """
    left, characters = values, MAX_BYTES
    todo: list[tuple[Any, int]] = [(value, 0)]
    while todo:
        item, depth = todo.pop()
        if isinstance(item, str):
            characters -= len(item)
            if characters < 0:
                raise FormatError(f"{where} has more than {MAX_BYTES:,} characters, the most that is read of such a file.")
        if not isinstance(item, (dict, list, tuple)):
            _check_leaf(item, where, finite)
            continue
        left -= len(item)
        if left < 0:
            raise FormatError(f"{where} has more than {values:,} values, the most that is read of such a file.")
        if depth == MAX_DEPTH:
            raise FormatError(f"{where} is nested deeper than {MAX_DEPTH} levels.")
        if isinstance(item, dict):
            if not all(isinstance(key, str) for key in item):
                raise FormatError(f"{where} holds an object with keys other than texts. It was made by something else.")
            todo += [(key, depth) for key in item]
            item = item.values()
        todo += [(child, depth + 1) for child in item]


def check_safetensors(path: Path) -> None:
    """Check of a safetensors file what the library does not: the bounds of its header, and that no name stands there twice.

    Raises:
        FormatError: The header is longer than the file, or no JSON within the bounds.
    """
    where = f"the header of '{path}'"
    with path.open("rb") as file:
        length, size = int.from_bytes(file.read(8), "little"), path.stat().st_size
        if length > min(MAX_BYTES, size - 8):
            raise FormatError(f"{where} would have {length:,} bytes, in a file of {size:,}. It is damaged.")
        header = file.read(length)
    parse_json(decoded(header, where), where)


def load_archive(file: Path | io.BytesIO) -> Any:
    """Return what ``torch.save`` wrote, tensors on the CPU, without running anything that it holds (``weights_only=True``).

    An archive is read only if it unpacks to no more than its own size: nothing in it is compressed, and no bytes count twice.

    Raises:
        FormatError: It does not, or is one of the formats before torch 1.6, which name no sizes.
        Exception: It is damaged, or holds other objects; whatever zipfile and torch raise.
    """
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    size = file.stat().st_size if isinstance(file, Path) else file.getbuffer().nbytes
    claimed = sum(entry.file_size for entry in entries)
    plain = all(entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size for entry in entries)
    # The first entry at the start: no directory but the one read here could be taken for that of this archive.
    if not plain or claimed > size or min((entry.header_offset for entry in entries), default=0) != 0:
        raise FormatError(
            f"its archive holds {size:,} bytes and claims {claimed:,}, or is compressed; torch.save writes no such file."
        )
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} stands there twice")
    return found


def _check_leaf(value: Any, where: str, finite: bool) -> None:
    if isinstance(value, str):
        if not _is_text(value):
            raise FormatError(f"{where} holds half of a character: {value[:100]!r}.")
    elif isinstance(value, int):  # bool is one
        if not -(2**63) <= value < 2**63:
            raise FormatError(f"{where} holds an integer of {value.bit_length()} bits; 64 is the most.")
    elif isinstance(value, float):
        if finite and not math.isfinite(value):
            raise FormatError(f"{where} holds the number {value}.")
    elif value is not None:
        raise FormatError(f"{where} holds a {type(value).__name__}, which is no plain value. It was made by something else.")


def _is_text(value: str) -> bool:
    try:
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which no file or terminal takes
        return False
