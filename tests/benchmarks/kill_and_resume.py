"""Training that is killed (SIGKILL) at random moments, half of them while a checkpoint is written, and resumed each time.

    python tests/benchmarks/kill_and_resume.py [--kills 50] [--seed 0] [--plain] [--folder PATH]

Every life is a process that trains a tiny llama with dropout, random order, accumulation and validations that move the random states,
and saves after every optimizer step; checkpoints carry 16 MB of ballast, so that writing takes a while. After each kill every
checkpoint in the folder is read, and the newest one resumed. After every step all that trains, the optimizer, the rates and the
random states are compared with the uninterrupted run, bit for bit. Exit status 1 if anything is lost or differs. ``--plain`` leaves writing to Lightning, with the folder for
temporary files on another file system, as on most clusters. It prints a table.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: lives are forked, which threads do not survive
sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_peft.checkpoint import durable
from lightning_peft.checkpoint.reading import load_checkpoint
from lightning_peft.errors import FormatError
from lightning_peft.training import trainer_hooks
from tests.training import faults

TIMEOUT = 120.0  # seconds for one life, far above what it takes
KEPT: dict[str, dict[str, Any]] = {  # what ModelCheckpoint keeps; a file is new at every step, or overwritten in place
    "newest": {"save_top_k": 1},
    "newest and last": {"save_top_k": 1, "save_last": True},
    "last": {"save_top_k": 0, "save_last": True},
}


@dataclass(frozen=True)
class Setting:
    """One kind of run."""

    strategy: str
    kept: str
    options: dict[str, Any]

    @property
    def text(self) -> str:
        return f"{self.strategy}, keeps {self.kept}, {', '.join(f'{k}={v}' for k, v in self.options.items())}"


SETTINGS = [
    Setting("lora", "newest", {"max_epochs": 6, "val_check_interval": 2}),
    Setting("adalora", "newest and last", {"max_epochs": 8, "accumulate_grad_batches": 2}),
    Setting("qlora", "last", {"max_epochs": 5, "max_steps": 1000}),
    Setting("prefix", "newest", {"max_epochs": -1, "max_steps": 24, "limit_val_batches": 0}),
    Setting("vera", "newest and last", {"max_epochs": 10, "check_val_every_n_epoch": 2, "accumulate_grad_batches": 3}),
]


class Told(ModelCheckpoint):
    """Says when a save begins and when it is complete."""

    pipe: int

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        os.write(self.pipe, b"saving 0 0\n")
        super()._save_checkpoint(trainer, filepath)
        os.write(self.pipe, f"saved {trainer.global_step} 0\n".encode())


class Fingerprints(pl.Callback):
    """Says after every step what the run holds."""

    def __init__(self, pipe: int, ballast: int) -> None:
        self.pipe, self.ballast, self.step = pipe, ballast, -1

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.step = trainer.global_step
        os.write(self.pipe, b"training 0 0\n")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            os.write(self.pipe, f"step {self.step} {fingerprint(pl_module, trainer)}\n".encode())

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["ballast"] = torch.full((self.ballast,), trainer.global_step % 256, dtype=torch.uint8)


def fingerprint(module: Any, trainer: Any) -> int:
    checksum = 0
    for _, tensor in sorted(faults.state(module, trainer).items()):
        checksum = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, checksum)
    return checksum


def train(setting: Setting, folder: Path | None, start: Path | None, pipe: int, ballast: int) -> None:
    """Live: train to the end, from the start or from a checkpoint."""
    faults.seed()
    callbacks: list[Any] = [Fingerprints(pipe, ballast)]
    if folder is not None:
        keep = Told(folder, filename="{step}", every_n_train_steps=1, **KEPT[setting.kept])
        keep.pipe = pipe
        callbacks.append(keep)
    module = faults.module(setting.strategy)
    run = faults.trainer(folder or Path(tempfile.gettempdir()), *callbacks, **setting.options)
    run.fit(module, faults.loader(), faults.loader(4, shuffle=False), ckpt_path=start)
    os.write(pipe, f"end {run.global_step} {fingerprint(module, run)}\n".encode())


class Life:
    """A process that trains; what it said, and how it ended.

    Args:
        task: What it does; gets the pipe to speak into.
    """

    def __init__(self, task: Callable[[int], None]) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self._heard: list[float] = []
        self._rest = b""
        self._reader, writer = os.pipe()
        sys.stdout.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._be(task, writer)
        os.close(writer)

    @staticmethod
    def _be(task: Callable[[int], None], writer: int) -> NoReturn:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            warnings.simplefilter("ignore")
            task(writer)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def _hear(self, until: float) -> bool:
        """Listen for one chunk; False when there will be no more."""
        ready, _, _ = select.select([self._reader], [], [], max(0.0, until - time.monotonic()))
        if ready:
            chunk = os.read(self._reader, 65536)
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            self.lines += [(kind, int(step), int(value)) for kind, step, value in (line.decode().split() for line in lines)]
            self._heard += [time.monotonic()] * len(lines)
            return bool(chunk)
        return True

    def _longest_save(self) -> float:
        times: dict[str, list[float]] = {kind: [] for kind in ("saving", "saved")}
        for (kind, _, _), moment in zip(self.lines, self._heard, strict=True):
            times.setdefault(kind, []).append(moment)
        return max((end - begin for begin, end in zip(times["saving"], times["saved"], strict=False)), default=0.05)

    def count(self, kind: str) -> int:
        """How often it said something."""
        return sum(k == kind for k, _, _ in self.lines)

    def run(self, luck: random.Random | None) -> Life:
        """Wait for the end; with ``luck``, kill it at a random moment after training has begun, half of the time in a save."""
        end = time.monotonic() + TIMEOUT
        aim, times = (
            ("saving", luck.randint(2, 5)) if luck and luck.random() < 0.5 else ("step", luck.randint(1, 5) if luck else 0)
        )
        moment = end
        try:
            while time.monotonic() < moment and self._hear(moment):
                if luck is not None and moment == end and self.count(aim) >= times:
                    moment = time.monotonic() + luck.random() * (self._longest_save() if aim == "saving" else 0.2)
        finally:
            late = time.monotonic() >= moment
            if late:
                os.kill(self._pid, signal.SIGKILL)
            _, status = os.waitpid(self._pid, 0)
            while self._hear(end + TIMEOUT):  # what it said before it died
                pass
            os.close(self._reader)
        self.killed = os.WIFSIGNALED(status)
        if (late and moment == end) or (not self.killed and os.WEXITSTATUS(status)):
            raise RuntimeError(f"a life failed, or did not end in {TIMEOUT} seconds")
        return self

    def prints(self) -> dict[int, int]:
        """Fingerprints by step; the end of training under -1."""
        return {step if kind == "step" else -1: value for kind, step, value in self.lines if kind in ("step", "end")}

    @property
    def saved(self) -> int:
        """The step of the last save that was complete."""
        return max((step for kind, step, _ in self.lines if kind == "saved"), default=0)

    @property
    def during_save(self) -> bool:
        """It was killed while it saved."""
        return self.killed and self.count("saving") > self.count("saved")


def live(setting: Setting, folder: Path | None, start: Path | None, *, luck: random.Random | None, ballast: int) -> Life:
    """Train in a process of its own, from the start or from a checkpoint; see :meth:`Life.run`."""
    return Life(lambda pipe: train(setting, folder, start, pipe, ballast)).run(luck)


@dataclass
class Tally:
    """What the lives of one setting come to."""

    setting: Setting
    steps: int = 0
    lives: int = 0
    kills: int = 0
    during_save: int = 0
    files: int = 0
    unreadable: int = 0
    none_left: int = 0
    lost: int = 0
    compared: int = 0
    different: int = 0
    left_behind: int = 0


def newest(folder: Path, tally: Tally) -> tuple[Path | None, int]:
    """Read every checkpoint; return the newest that can be read, and its step."""
    best: tuple[Path | None, int] = (None, 0)
    for path in sorted(folder.glob("*.ckpt")):
        tally.files += 1
        try:
            assert durable.damage(path) is None
            step = int(load_checkpoint(path)["global_step"])
        except (AssertionError, FormatError):
            tally.unreadable += 1
            continue
        if best[0] is None or step > best[1]:
            best = (path, step)
    return best


def run(setting: Setting, kills: int, folder: Path, luck: random.Random, *, ballast: int) -> Tally:
    """Kill and resume until ``kills`` kills are done; runs that come to their end begin anew."""
    whole = live(setting, None, None, luck=None, ballast=ballast).prints()
    tally = Tally(setting, steps=max(whole))
    start: Path | None = None
    saved = 0
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    while True:
        last = tally.kills >= kills
        life = live(setting, folder, start, luck=None if last else luck, ballast=ballast)
        tally.lives += 1
        for step, value in life.prints().items():
            tally.compared += 1
            tally.different += whole.get(step) != value
        tally.left_behind = max(tally.left_behind, len(list(folder.glob(".saving-*"))))
        if not life.killed:
            if last:
                return tally
            shutil.rmtree(folder)
            folder.mkdir()
            start, saved = None, 0
            continue
        tally.kills += 1
        tally.during_save += life.during_save
        saved = max(saved, life.saved)
        start, step = newest(folder, tally)
        tally.none_left += start is None and saved > 0
        tally.lost += max(0, saved - step)
        saved = step


def table(tallies: list[Tally]) -> str:
    columns = ["steps", "lives", "kills", "during_save", "files", "unreadable", "none_left", "lost", "compared", "different"]
    head = [*columns, "run"]
    rows = [[*(str(getattr(t, c)) for c in columns), t.setting.text] for t in tallies]
    rows.append([*(str(sum(getattr(t, c) for t in tallies)) for c in columns), "all"])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(columns))]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in [head, *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ballast", type=int, default=16 << 20, help="bytes that are added to every checkpoint")
    parser.add_argument("--plain", action="store_true", help="Lightning writes the files")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    luck = random.Random(given.seed)
    if given.plain:
        trainer_hooks.write_durably = lambda checkpoint_io: None
        tempfile.tempdir = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=given.folder or "/tmp") as folder:
        shares = [given.kills // len(SETTINGS) + (i < given.kills % len(SETTINGS)) for i in range(len(SETTINGS))]
        tallies = [
            run(setting, share, Path(folder) / "run", luck, ballast=given.ballast)
            for setting, share in zip(SETTINGS, shares, strict=True)
            if share
        ]
    print(table(tallies))
    return int(any(t.unreadable or t.none_left or t.lost or t.different for t in tallies))


if __name__ == "__main__":
    sys.exit(main())
