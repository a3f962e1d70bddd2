"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lightning_peft.untrusted import inside


@contextmanager
def staged(directory: str | os.PathLike[str], last: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder to write into; at the end all that is in it moves into ``directory``, over files of the same name.

    Everything is synced to the disk before the first file moves, so that a full disk or an error leaves ``directory`` as it was.

    Args:
        directory: The folder; made if needed.
        last: Names of files that move after all others, in this order: those that describe the rest.

    Raises:
        FormatError: A folder in it that would be written to is a link out of it.
        OSError: It cannot be written.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield staging
        written = [path for path in staging.rglob("*") if path.is_file()]
        for path in written:
            sync(path)
            inside(folder, str(path.relative_to(staging).parent))
        rank = {name: place for place, name in enumerate(last)}
        for path in sorted(written, key=lambda p: rank.get(p.name, -1)):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
        sync(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
