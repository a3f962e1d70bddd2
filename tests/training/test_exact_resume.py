"""A run that is interrupted anywhere, in any way, and resumed gives the uninterrupted one, bit for bit, on one process."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from tests.training import faults
from tests.training.test_callback_resume import Stateful
from tests.training.toys import Plain, callback, loader, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")


class Stopped(Exception):
    """What goes wrong."""


HOOKS = [
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


class Stop(pl.Callback):
    """Does something when a hook is called for the n-th time."""

    def __init__(self, hook: str, times: int, how: Any = Stopped) -> None:
        self.hook, self.times, self.how = hook, times, how
        setattr(self, hook, self._called)

    def _called(self, *args: Any, **kwargs: Any) -> None:
        self.times -= 1
        if self.times == 0:
            if isinstance(self.how, type):
                raise self.how
            os.kill(os.getpid(), self.how)


def interrupted(folder: Path, name: str, stop: Stop, start: Path | None = None, **options: Any) -> Path | None:
    """Run until it stops; return what was saved then, or None if it came to its end."""
    keep = faults.SaveOnException(folder / f"from-{stop.hook}-{random.random()}.ckpt")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        faults.fit(folder, name, stop, keep, start=start, **options)
    except (Stopped, SystemExit):
        return keep.path
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return None


def assert_same(whole: Any, resumed: Any) -> None:
    assert faults.differing(faults.state(*whole), faults.state(*resumed)) == []


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_an_exception_in_any_hook(hook: str, accumulate: int, tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": accumulate}
    whole = faults.fit(tmp_path, **options)
    path = interrupted(tmp_path, "lora", Stop(hook, random.Random(f"{hook}{accumulate}").randint(1, 3)), **options)
    assert path is not None
    assert_same(whole, faults.fit(tmp_path, start=path, **options))


STOPS = {
    "exception": ("on_after_backward", Stopped),
    "ctrl-c": ("on_before_backward", KeyboardInterrupt),
    "sigterm": ("on_train_batch_start", signal.SIGTERM),
}
BY_TURNS = [
    pytest.param(name, *STOPS[stop], id=f"{stop}-{name}", marks=() if i % len(STOPS) == j else pytest.mark.slow)
    for i, name in enumerate(faults.STRATEGIES)
    for j, stop in enumerate(STOPS)
]


@pytest.mark.parametrize(("name", "hook", "how"), BY_TURNS)
def test_strategies(name: str, hook: str, how: Any, tmp_path: Path) -> None:
    whole = faults.fit(tmp_path, name)
    times = random.Random(f"{name}{hook}").randint(2, 13)
    path = interrupted(tmp_path, name, Stop(hook, times, how))
    assert path is not None
    assert_same(whole, faults.fit(tmp_path, name, start=path))


LOOPS: dict[str, dict[str, Any]] = {
    "epochs": {},
    "epochs and steps": {"max_steps": 1000},
    "steps": {"max_epochs": -1, "max_steps": 13},
    "no validation": {"limit_val_batches": 0},
    "no validation, steps": {"limit_val_batches": 0, "max_steps": 1000},
    "validation inside": {"val_check_interval": 2},
    "validation across epochs": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "every second epoch": {"check_val_every_n_epoch": 2, "max_steps": 1000},
    "windows": {"accumulate_grad_batches": 2, "val_check_interval": 3},
    "windows, steps": {"accumulate_grad_batches": 3, "max_steps": 1000, "limit_val_batches": 0},
}
QUICK = ("epochs and steps", "no validation", "validation across epochs", "windows, steps")
EACH = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOOPS]


@pytest.mark.parametrize("name", EACH)
def test_one_interruption_after_another(name: str, tmp_path: Path) -> None:
    """What a resumed run saves must be as good as what a fresh one saves."""
    options = LOOPS[name]
    whole = faults.fit(tmp_path, "adalora", **options)
    luck, path, lives = random.Random(name), None, 0
    while lives < 6:
        stop = Stop(luck.choice(HOOKS), luck.randint(1, 3))
        at = interrupted(tmp_path, "adalora", stop, path, **options)
        path, lives = (path, 6) if at is None and lives > 2 else (at or path, lives + (at is not None))
    assert path is not None
    assert_same(whole, faults.fit(tmp_path, "adalora", start=path, **options))


@pytest.mark.parametrize("name", EACH)
def test_every_checkpoint_of_every_step(name: str, tmp_path: Path) -> None:
    """What is left after a SIGKILL: a file of some step, and nothing was saved when it died."""
    options = LOOPS[name]
    whole = faults.fit(tmp_path, keep={"every_n_train_steps": 1}, **options)
    files = sorted(tmp_path.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert len(files) == whole[1].global_step
    some = random.Random(name).sample(files[:-1], 3)
    for path in {*some, files[4 // options.get("accumulate_grad_batches", 1)]}:  # and one of the end of an epoch
        assert_same(whole, faults.fit(tmp_path, start=path, **options))


@pytest.mark.parametrize("name", EACH)
def test_every_checkpoint_of_every_validation_and_epoch(name: str, tmp_path: Path) -> None:
    options = LOOPS[name]
    keep = {"save_on_train_epoch_end": options.get("limit_val_batches") == 0, "every_n_epochs": 1}
    whole = faults.fit(tmp_path, keep=keep, **options)
    files = sorted(tmp_path.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    assert files
    for path in files[:-1]:
        assert_same(whole, faults.fit(tmp_path, start=path, **options))


# ---------------------------------------------------------------------- what a note of counters alone would not make exact


class WithStatistics(Plain):
    """A new head with running statistics, which every batch moves, also one that is done again."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))

    def forward(self, x: Any) -> Any:
        return self.head(self.net(x))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch["input_ids"].float()
        return ((self(torch.nn.functional.pad(x, (0, 32 - x.shape[1]))) - 1) ** 2).mean()


def test_running_statistics_are_turned_back_with_the_window(tmp_path: Path) -> None:
    def fit(*callbacks: Any, start: Path | None = None) -> Any:
        faults.seed()
        module = WithStatistics()
        run = faults.trainer(
            tmp_path, callback(module="net"), *callbacks, max_epochs=2, accumulate_grad_batches=3, limit_val_batches=0
        )
        run.fit(module, faults.loader(), ckpt_path=start)
        return module.state_dict()

    whole = fit()
    keep = faults.SaveOnException(tmp_path / "stopped.ckpt")
    with pytest.raises(Stopped):
        fit(Stop("on_after_backward", 2), keep)
    resumed = fit(start=keep.path)
    assert faults.differing(whole, resumed) == []
    assert whole["head.0.num_batches_tracked"] == 10


def test_a_save_in_the_middle_of_a_window_is_one_of_its_start(tmp_path: Path) -> None:
    class Saves(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / f"batch{batch_idx}.ckpt")

    options = {"accumulate_grad_batches": 3}
    whole = faults.fit(tmp_path, "adalora", Saves(), **options)
    steps = []
    for batch in range(5):
        path = tmp_path / f"batch{batch}.ckpt"
        steps.append(torch.load(path, weights_only=True)["global_step"])
        assert_same(whole, faults.fit(tmp_path, "adalora", start=path, **options))
    assert steps == [2, 2, 3, 3, 4]


class BreaksOff(torch.optim.SGD):
    """Stops when half of the weights have moved."""

    left = 4

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for i, parameter in enumerate(parameters):
            if i == len(parameters) // 2 and (left := self.left - 1) >= 0:
                type(self).left = left
                if left == 0:
                    raise Stopped
            parameter.data.add_(parameter.grad, alpha=-0.01)
        return loss


def test_a_step_that_was_interrupted_is_said(tmp_path: Path) -> None:
    more: dict[str, Any] = {"optimizer": lambda groups: BreaksOff(groups, lr=0.01), "lr": 0.01, "lr_scheduler": None}
    more["callback"] = {"verbose": False, "export": False, "gradient_sentinel": "off"}
    keep = faults.SaveOnException(tmp_path / "torn.ckpt")
    with pytest.warns(UserWarning, match="values of two steps"), pytest.raises(Stopped):
        faults.fit(tmp_path, "lora", keep, more=more)
    with pytest.warns(UserWarning, match="written in the middle of an optimizer step"):
        _, run = faults.fit(tmp_path, "lora", start=keep.path, more=more)
    assert run.global_step == 15  # the step is done again, none is lost


def test_plateau_schedulers_that_miss_an_epoch_are_said(tmp_path: Path) -> None:
    class Plateau(Plain):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "val_loss"}}

    def fit(folder: Path, start: Path | None = None, **keep: Any) -> Any:
        faults.seed()
        module = Plateau()
        checkpoints = ModelCheckpoint(folder, save_top_k=-1, filename="{step}", **keep)
        run = trainer(folder, callback(), checkpoints, max_epochs=5, enable_checkpointing=True)
        run.fit(module, Stateful(loader()), ckpt_path=start)
        return run.optimizers[0].param_groups[0]["lr"], {k: v.clone() for k, v in module.state_dict().items()}

    rate, whole = fit(tmp_path / "steps", every_n_train_steps=1)
    assert rate < 0.01
    for step in (6, 8):  # in an epoch, and at its end: the validation that comes next is run, and the scheduler sees it
        again, resumed = fit(tmp_path / f"from{step}", tmp_path / "steps" / f"step={step}.ckpt", every_n_train_steps=100)
        assert again == rate
        assert faults.differing(whole, resumed) == []
    fit(tmp_path / "epochs")
    with pytest.warns(UserWarning, match="before ReduceLROnPlateau saw"):
        fit(tmp_path / "late", tmp_path / "epochs" / "step=8.ckpt")
