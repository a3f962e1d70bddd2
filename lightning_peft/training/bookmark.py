"""Where a run continues from: the end of its last complete optimizer step, whenever the checkpoint was asked for.

A checkpoint may be asked for at any moment: between the batches of an accumulation window, or after an exception, a signal or Ctrl-C
in the middle of a batch. Weights and optimizer are then still those of the last complete step, but Lightning's counters, the loader
and the random states are further: the batches since would be lost (lightning 2.6). So these are noted whenever a step is complete,
after each validation and at the end of each epoch, and that note goes into the checkpoint. It costs a copy of a few kilobytes.

Continuing has gaps of its own in Lightning 2.6.6, which :meth:`Bookmark.resume` closes:

- A checkpoint from the end of a batch after which validation is due resumes after that validation, which never ran. At the last batch
  of an epoch the epoch is then counted without having begun, so that the next resume skips the rest of it.
- With ``max_steps`` a finished epoch is entered and counted once more: with ``max_epochs`` beside it the run ends one epoch short.
- In an epoch that was resumed, ``ReduceLROnPlateau`` is not updated at the end.
- Where something has asked for ``estimated_stepping_batches`` before the restore, the loaders' states are not restored.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from lightning_peft.checkpoint import strip_wrappers
from lightning_peft.checkpoint.durable import require_intact
from lightning_peft.surgery.handle import Handle
from lightning_peft.training import rng
from lightning_peft.training.adapted_root import other_keys

Kind = Literal["start", "step", "validation", "epoch"]


class Stepper(Protocol):
    """What a PEFT callback offers here."""

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""

    def extras_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return this callback's extra modules by path."""

    def handle_of(self, module: nn.Module) -> Handle | None:
        """Return this callback's adapter on a LightningModule, or None."""

    def finish_step(self, trainer: Any, *, idle: bool) -> bool:
        """Do what belongs to an optimizer step after it, once; return False where an earlier call was interrupted in it."""


@dataclass(frozen=True)
class Place:
    """A point of a run that it can continue from.

    Args:
        kind: Before the first batch, after an optimizer step, after a validation, or at the end of an epoch.
        steps: Optimizer steps so far.
        batches: Batches begun so far, in all epochs.
        loops: State of Lightning's fit loop, loaders included.
        rng: Random states of this rank, or of all ranks where they come from a checkpoint.
        buffers: Copies of the buffers that train beside the adapter (running statistics of a new head), by key.
    """

    kind: Kind
    steps: int
    batches: int
    loops: dict[str, Any]
    rng: list[rng.RNGState]
    buffers: dict[str, Tensor]


class Bookmark:
    """The place that a Trainer's runs would continue from; wraps methods of its strategy and of its precision plug-in.

    Args:
        strategy: Lightning's strategy object.
        owners: The PEFT callbacks of the Trainer, which may still grow.
    """

    def __init__(self, strategy: Any, owners: Mapping[str, Stepper]) -> None:
        self.strategy = strategy
        self.owners = owners
        self.reset()
        for name in ("lightning_module_state_dict", "save_checkpoint", "load_checkpoint", "setup_optimizers"):
            setattr(strategy, name, functools.partial(getattr(self, f"_{name}"), getattr(strategy, name)))
        plugin = strategy.precision_plugin
        plugin._after_closure = functools.partial(self._after_closure, plugin._after_closure)

    def reset(self) -> None:
        """Forget the run before."""
        self.place: Place | None = None
        self.moved = False  # the optimizer has begun to change the weights, and the step is not noted yet
        self.told_to_stop = False  # by SIGTERM, all ranks at the end of the same batch
        self._loaded: dict[str, Any] = {}  # counters of the checkpoint that the run resumes from
        self._resumed: list[rng.RNGState] | None = None
        self._buffers: list[tuple[str, nn.Module, str]] = []

    @property
    def module(self) -> Any:
        """The LightningModule of the run."""
        return self.strategy.lightning_module

    @property
    def trainer(self) -> Any:
        """The Trainer of the run."""
        return self.module.trainer

    # ------------------------------------------------------------------ noting

    def mark(self, kind: Kind) -> None:
        """Note that the run may continue from here."""
        loop = self.trainer.fit_loop
        progress = loop.epoch_loop.batch_progress
        if kind == "validation" and (self.place is None or self.place.batches != progress.total.ready or self.moved):
            return  # in the middle of an accumulation window: the gradients so far are in no checkpoint
        if kind == "epoch":  # after a resume that had no batch left in this epoch
            _not_restarting(loop.epoch_loop)
        loops = loop.state_dict()
        if kind == "step":  # within on_train_batch_end: the batch is complete but for the counter
            for counts in (loops["epoch_loop.batch_progress"][part] for part in ("total", "current")):
                counts["completed"] = counts["processed"]
        self.place = Place(kind, self.trainer.global_step, progress.total.ready, loops, [rng.rng_state()], self._copies())
        self.moved = False

    def settle(self, *, idle: bool = False) -> None:
        """Finish and note an optimizer step, if one is complete that is not noted yet: in, or before, ``on_train_batch_end``.

        Args:
            idle: The step had no loss.
        """
        trainer = self.trainer
        if self.place is None or trainer.global_step == self.place.steps:
            return
        if trainer.interrupted and (trainer.world_size > 1 or not self._schedulers_followed(self.place)):
            return  # after an error other ranks may never come
        batches = trainer.fit_loop.epoch_loop.batch_progress.total
        if batches.processed == batches.ready and all([owner.finish_step(trainer, idle=idle) for owner in self.owners.values()]):
            self.mark("step")

    def _schedulers_followed(self, place: Place) -> bool:
        """Return whether the learning rates are those after the step; they come between the step and ``on_train_batch_end``."""
        loop = self.trainer.fit_loop.epoch_loop
        configs = [c for c in self.trainer.lr_scheduler_configs if not c.reduce_on_plateau]
        if not self.module.automatic_optimization:
            return True
        due = sum((loop.batch_idx + 1) % c.frequency == 0 for c in configs if c.interval == "step")
        if loop._num_ready_batches_reached():
            due += sum((self.trainer.current_epoch + 1) % c.frequency == 0 for c in configs if c.interval == "epoch")
        before = place.loops["epoch_loop.scheduler_progress"]["total"]["completed"]
        now = loop.scheduler_progress.total
        return bool(now.ready == now.completed >= before + due)

    def state_dict(self, *, alone: bool = False) -> dict[str, Any]:
        """Return what a callback keeps of the place in a checkpoint; every rank has to call it, unless this one is ``alone``."""
        states = [rng.rng_state()] if self.place is None else self.place.rng
        if not alone and len(states) == 1:
            states = rng.gather_rng_states(states[0])
        return {"rng": states, "place": None if self.place is None else self.place.kind, "torn": self.moved}

    def _after_closure(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Gradients are final; what comes next is the optimizer's update."""
        original(*args, **kwargs)
        self.moved = True

    def _setup_optimizers(self, original: Callable[[Any], None], trainer: Any) -> None:
        if trainer.state.fn == "fit" and self.place is None:
            self.mark_start(trainer)
        original(trainer)

    def mark_start(self, trainer: Any) -> None:
        """Note the random states of the moment at which a run that resumes has just restored its own."""
        loop = trainer.fit_loop
        batches = loop.epoch_loop.batch_progress.total.ready
        self.place = Place("start", trainer.global_step, batches, loop.state_dict(), [rng.rng_state()], {})

    # ------------------------------------------------------------------ saving

    def _lightning_module_state_dict(self, original: Callable[[], Any]) -> Any:
        self.settle()  # the first thing that Lightning asks for; a schedule may still change weights
        return original()

    def _save_checkpoint(self, original: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.place is not None and "loops" in checkpoint:
            if self.moved:
                warnings.warn(
                    "the run was interrupted while the optimizer changed the weights, or before the schedulers followed. The checkpoint "
                    "holds values of two steps, so that a run resumed from it is not exactly the uninterrupted one; from the "
                    "checkpoint before it is.",
                    stacklevel=2,
                )
            checkpoint["loops"] = {**checkpoint["loops"], "fit_loop": self.place.loops}
            checkpoint["epoch"] = self.place.loops["epoch_progress"]["current"]["completed"]
            if self.told_to_stop and len(self.place.rng) == 1:
                states = rng.gather_rng_states(self.place.rng[0])
                for owner in self.owners.values():
                    checkpoint.get("callbacks", {}).get(owner.state_key, {}).update(rng=states)
            if self.place.batches != self.trainer.fit_loop.epoch_loop.batch_progress.total.ready:
                self._turn_back(checkpoint, self.place.buffers)
        return original(checkpoint, *args, **kwargs)

    @staticmethod
    def _turn_back(checkpoint: dict[str, Any], buffers: Mapping[str, Tensor]) -> None:
        # Batches since the place have moved running statistics, and will do so again. (EMA's average is not what is trained on.)
        part = "current_model_state" if "current_model_state" in checkpoint else "state_dict"
        state = checkpoint[part]
        checkpoint[part] = {k: buffers.get(strip_wrappers(k), v) for k, v in state.items()}

    # ------------------------------------------------------------------ resuming

    def _load_checkpoint(self, original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        require_intact(path)
        checkpoint = original(path, *args, **kwargs)
        if self.trainer.state.fn == "fit":
            self.reset()
            self._loaded = copy.deepcopy({part: checkpoint[part] for part in ("loops", "global_step") if part in checkpoint})
        return checkpoint

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the random states, and note where the checkpoint continues."""
        rng.restore_rank(state["rng"])
        if len(self._loaded) < 2 or state.get("place") is None:  # written before there were places: Lightning's own way
            return
        loops = self._loaded["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["total"]["ready"]
        self.place = Place(state["place"], self._loaded["global_step"], batches, loops, state["rng"], {})
        self._resumed = state["rng"]
        if state.get("torn"):
            warnings.warn(
                "the checkpoint was written in the middle of an optimizer step: it holds values of two steps, so that the run is not "
                "exactly the uninterrupted one. Resume from an earlier checkpoint to repeat that one.",
                stacklevel=2,
            )

    def resume(self) -> None:
        """Let Lightning go on exactly at the place; called in ``on_train_start``, by every callback."""
        if not self._buffers:
            self._buffers = list(self._find_buffers())
        states, self._resumed = self._resumed, None
        if self.place is not None:
            self.place = dataclasses.replace(self.place, buffers=self._copies())
        if states is None or self.place is None:
            return
        loop = self.trainer.fit_loop
        epoch = loop.epoch_loop
        if self.place.kind in ("validation", "epoch") and any(c.reduce_on_plateau for c in self.trainer.lr_scheduler_configs):
            warnings.warn(
                f"the checkpoint was written at the end of {self.place.kind}, before ReduceLROnPlateau saw what it monitors, and Lightning "
                "does not keep that: the scheduler misses it, so that the run is not exactly the uninterrupted one. It is from "
                "checkpoints of single steps (ModelCheckpoint(every_n_train_steps=...)).",
                stacklevel=2,
            )
        if self.place.kind == "start" or loop.restarted_on_epoch_end:
            if loop.restarted_on_epoch_end:  # where steps are counted
                loop.epoch_progress.increment_completed()
            _not_restarting(loop, loop.epoch_loop, loop.epoch_loop.val_loop)
        elif loop.restarting:
            if loop._combined_loader_states_to_load:  # set up before the restore, by `estimated_stepping_batches`
                loop._load_combined_loader_states()
                iter(loop._data_fetcher)
            if len(states) == rng.rank_and_world()[1]:
                rng.restore_rank(states)  # making the loaders' iterators has drawn from them
            self._within_epoch(loop, epoch)

    def _within_epoch(self, loop: Any, epoch: Any) -> None:
        assert self.place is not None
        batches = epoch.batch_progress
        due = epoch._should_check_val_fx(loop._data_fetcher)
        over = batches.is_last_batch or batches.current.ready >= self.trainer.num_training_batches
        if due and self.place.kind == "step":  # it has not run yet: as if it had been interrupted in its first batch
            epoch.val_loop.batch_progress.reset_on_run()
            epoch.val_loop._restart_stage = "restarted_mid_evaluation"
        elif self.place.kind == "step":
            epoch._batches_that_stepped += 1
        if over and not due:
            epoch.val_loop._has_run = True  # else Lightning would go on with a batch too many
        if not over or (due and self.place.kind == "step"):
            loop._restarting = False  # the epoch ends as any other: what plateau schedulers monitor will be there

    def _copies(self) -> dict[str, Tensor]:
        return {key: getattr(owner, name).clone() for key, owner, name in self._buffers}

    def _find_buffers(self) -> Iterable[tuple[str, nn.Module, str]]:
        module = self.module
        installed = [(owner, handle) for owner in self.owners.values() if (handle := owner.handle_of(module)) is not None]
        keys = other_keys(module, installed)
        for path, part in module.named_modules():
            for name, buffer in part._buffers.items():
                key = strip_wrappers(f"{path}.{name}" if path else name)
                if buffer is not None and key in keys:
                    yield key, part, name


def _not_restarting(*loops: Any) -> None:
    """Let loops that were restored begin anew, instead of going on in what is complete."""
    for loop in loops:
        loop._restarting = False
        loop.reset_restart_stage()


__all__ = ["Bookmark", "Place"]
