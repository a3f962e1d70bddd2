"""Overwrites a checkpoint and dies at a chosen moment, by Lightning's way of writing and by ours. Run by a test, since it forks."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.cloud_io import _atomic_save

from lightning_peft import files
from lightning_peft.checkpoint.durable import damage, save_file


def die(*args: Any, **kwargs: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def die_in_a_copy() -> None:
    send = os.sendfile

    def some(out: int, into: int, offset: int, count: int) -> NoReturn:
        send(out, into, offset, 4096)
        die()

    os.sendfile = some  # type: ignore[assignment]


def die_before(name: str) -> Callable[[], None]:
    return lambda: setattr(os, name, die)


def die_after_the_move() -> None:
    files.sync = die


MOMENTS: dict[str, tuple[Callable[..., None], Callable[[], None]]] = {
    "lightning, copying": (_atomic_save, die_in_a_copy),
    "ours, written": (save_file, die_before("fsync")),
    "ours, synced": (save_file, die_before("replace")),
    "ours, moved": (save_file, die_after_the_move),
}


def main(path: Path) -> None:
    tempfile.tempdir = "/dev/shm"
    for name, (save, arrange) in MOMENTS.items():
        save_file({"step": 1, "tensor": torch.zeros(100_000)}, path)
        pid = os.fork()
        if pid == 0:
            arrange()
            save({"step": 2, "tensor": torch.ones(100_000)}, path)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), name
        broken = damage(path)
        print(f"{name}: {'damaged' if broken else torch.load(path, weights_only=True)['step']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
