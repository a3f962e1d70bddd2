"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lightning_peft.untrusted import inside

STAGING = ".saving-"
_ABANDONED = 3600.0  # seconds without a write, after which a file beside its place belongs to a process that was killed


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
    staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
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


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write into; at the end it takes the place of ``path`` in one move, synced to the disk.

    At every moment ``path`` is the file before or the new one, whole, also when the process is killed or the power fails. A kill
    leaves a ``.saving-…`` file beside it, which a later call in the same folder removes after an hour.

    Args:
        path: The file; its folder is made if needed.

    Raises:
        OSError: The disk is full or the folder cannot be written; ``path`` is as it was.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{STAGING}*"):
        if left.is_file() and time.time() - left.stat().st_mtime > _ABANDONED:
            left.unlink(missing_ok=True)
    beside = folder / f"{STAGING}{uuid.uuid4().hex}"  # of its own, should two processes write the same file
    try:
        with beside.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync(folder)


def sync(path: Path) -> None:
    """Make a file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
