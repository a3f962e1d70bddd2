"""``.ckpt`` files and crashes: written whole or not at all; a damaged one is told from an intact one, and the one before is found.

What Lightning 2.6.6 does by itself: it writes into the system's folder for temporary files and moves the file to its place. Where
that folder is on another file system (a tmpfs, the local disk of a cluster's node), moving is copying over the old file: a kill in
the middle leaves half a file under the final name, and of ``last.ckpt`` nothing else. Nothing is synced, so that a power cut may
leave empty files.
"""

from __future__ import annotations

import functools
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_peft.checkpoint.reading import load_checkpoint
from lightning_peft.errors import FormatError
from lightning_peft.files import replacing

_RESUMES = ("loops", "optimizer_states", "state_dict")  # a file without one (save_weights_only) is none to continue from


def write_durably(checkpoint_io: Any) -> None:
    """Let Lightning's own ``TorchCheckpointIO`` object write local files with :func:`save_file`; any other is left alone."""
    if type(checkpoint_io).__name__ == "TorchCheckpointIO" and "save_checkpoint" not in vars(checkpoint_io):
        checkpoint_io.save_checkpoint = functools.partial(_save, checkpoint_io.save_checkpoint)


def _save(original: Callable[..., None], checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
    place = local(path)
    if place is None or storage_options is not None:
        original(checkpoint, path, storage_options=storage_options)
    else:
        save_file(checkpoint, place)


def local(path: Any) -> Path | None:
    """Return a path as one of the local file system, or None for what lies elsewhere (``s3://…``)."""
    text = os.fspath(path).removeprefix("file://")
    return None if "://" in text else Path(text).expanduser()


def save_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint file in place of the one that may lie there.

    Raises:
        OSError: The disk is full, the folder is read-only or the like; the file before is as it was.
    """
    buffer = io.BytesIO()  # torch's own writer turns a full disk into a RuntimeError about positions in the file
    torch.save(checkpoint, buffer)
    try:
        with replacing(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        before = "The file before is as it was" if path.is_file() else "Nothing was written"
        raise OSError(
            error.errno,
            f"{error.strerror}: cannot write the checkpoint of {buffer.tell():,} bytes. {before}; make room, or give another folder "
            "(ModelCheckpoint(dirpath=...)), and resume from the last checkpoint",
            str(path),
        ) from error


def require_intact(path: Any) -> None:
    """Check the bytes of a local checkpoint file, if there is one.

    Raises:
        FormatError: It is damaged. The message names the newest intact checkpoint in the same folder.
    """
    place = local(path)
    found = damage(place) if place is not None and place.is_file() else None
    if place is None or found is None:
        return
    other = newest_intact(place)
    if other is None:
        advice = "No other checkpoint to resume from lies beside it."
    else:
        checkpoint = load_checkpoint(other)
        advice = (
            f"The newest intact one beside it is '{other}' (step {checkpoint.get('global_step')}): resume with that ckpt_path."
        )
    raise FormatError(f"'{path}' is damaged: {found}. {advice}")


def damage(path: Path) -> str | None:
    """Return what is wrong with the bytes of a file that ``torch.save`` wrote, or None.

    torch itself reads flipped bits as numbers; the checksums in the file are compared here.
    """
    if path.stat().st_size == 0:
        return "it is empty"
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                return "it is compressed, which torch.save does not do"
            # Without checksums after torch.serialization.set_crc32_options(False).
            broken = archive.testzip() if any(entry.CRC for entry in entries) else None
    except Exception as error:  # damaged bytes can fail anywhere
        return f"it is truncated, or no checkpoint ({next(iter(str(error).splitlines()), type(error).__name__)})"
    return None if broken is None else f"its part '{broken}' is not what was written"


def newest_intact(damaged: Path) -> Path | None:
    """Return the newest other file in the folder of a damaged one that a run can be resumed from, or None."""
    others = [path for path in damaged.parent.glob(f"*{damaged.suffix}") if path.is_file() and not path.samefile(damaged)]
    for path in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
        if damage(path) is not None:
            continue
        try:
            checkpoint = load_checkpoint(path)
        except FormatError:
            continue
        if all(part in checkpoint for part in _RESUMES):
            return path
    return None
