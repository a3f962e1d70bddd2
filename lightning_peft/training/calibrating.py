"""Calibration in a Trainer: the user's own ``training_step`` on the attached train dataloader, once, before the first step.

A module whose ``training_step`` is more than a loss (manual optimization, weights by what other batches hold) may have a method
``calibration_loss(batch)``, which is called instead.

It runs when ``configure_optimizers`` is about to, which is after the restore, so that a checkpoint or an adapter file that brings the
result makes it unnecessary; after ``setup`` and ``configure_model``; on the device of the run; and before anybody trains. The adapter
is installed by then, which the optimizers need, and switched off.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.connectors.data_connector import _process_dataloader, _request_dataloader
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor

from lightning_peft.errors import ConfigError, ConflictError
from lightning_peft.strategies.calibration import measure
from lightning_peft.strategies.install import start_from
from lightning_peft.surgery.handle import Handle
from lightning_peft.training.rng import restore_rng_state, rng_state
from lightning_peft.types import in_pieces

_BEFOREHAND = (
    "with calibration=lp.calibrate(model, strategy, batches, loss) before fit; PEFTCallback takes the adapter as it is then."
)


def calibrate(trainer: Any, handle: Handle) -> None:
    """Calibrate an adapter that waits for it; anything else is left alone.

    Raises:
        ConfigError: The ``training_step`` is not one that a batch can be given to from outside.
        DataError: There is no data, or its batches cannot be cut into examples.
    """
    parameters = list(handle.root.parameters())
    if handle.calibrated or in_pieces(parameters) or any(p.is_meta for p in parameters):
        return  # a checkpoint of a sharded module is restored later; without one `require` refuses
    with _left_alone(trainer), _train_batches(trainer) as batches:
        start_from(handle, measure(handle, batches, functools.partial(_loss, trainer), trainer.lightning_module))


def require(handle: Handle) -> None:
    """Check, when training is about to begin, that the adapter has what it starts from.

    Raises:
        ConflictError: It has not: the base is sharded or on meta, and no checkpoint brought it.
    """
    if not handle.calibrated:
        raise ConflictError(
            f"adapter '{handle.name}' starts from data, and cannot be calibrated on a base that lies in pieces (FSDP) or on the meta device. "
            f"Inject {_BEFOREHAND}"
        )


class _TrainBatches:
    """The train batches of one epoch as ``training_step`` gets them."""

    def __init__(self, trainer: Any, loader: CombinedLoader) -> None:
        self.trainer, self.loader = trainer, loader

    def __iter__(self) -> Iterator[Any]:
        strategy, module = self.trainer.strategy, self.trainer.lightning_module
        for batch, _, _ in self.loader:
            batch = self.trainer.precision_plugin.convert_input(batch)
            yield strategy.batch_to_device(module._on_before_batch_transfer(batch, dataloader_idx=0), dataloader_idx=0)


@contextmanager
def _train_batches(trainer: Any) -> Iterator[Iterable[Any]]:
    """Give the train dataloader as ``fit_loop.setup_data`` prepares it, and take back that it was read."""
    loop = trainer.fit_loop
    source = _request_dataloader(loop._data_source)
    combined = CombinedLoader(source.flattened if isinstance(source, CombinedLoader) else source, "max_size_cycle")
    # The state of a loader that has one, and of generators of its own, is part of the run.
    states = [(part, part.state_dict()) for part in combined.flattened if hasattr(part, "load_state_dict")]
    generators = [(generator, generator.get_state()) for part in combined.flattened for generator in _generators(part)]
    combined.flattened = [_process_dataloader(trainer, TrainerFn.FITTING, RunningStage.TRAINING, p) for p in combined.flattened]
    combined.limits = [_limit(trainer.limit_train_batches, part) for part in combined.flattened]
    try:
        yield () if trainer.limit_train_batches == 0 else _TrainBatches(trainer, combined)
    finally:
        combined.reset()
        if loop._combined_loader is not None:  # somebody has asked for the length of the run: it is open already
            iter(loop._data_fetcher)
        for generator, state in generators:
            generator.set_state(state)
        for part, state in states:
            part.load_state_dict(state)


def _limit(share: int | float, loader: Any) -> int | float:
    """Return how many batches of a loader the Trainer uses: a number, or a share of them."""
    if isinstance(share, int):
        return share
    return int(len(loader) * share) if share < 1 and hasattr(loader, "__len__") else math.inf


def _generators(loader: Any) -> list[torch.Generator]:
    holders = (loader, *(getattr(loader, name, None) for name in ("sampler", "batch_sampler")))
    holders += (getattr(getattr(loader, "batch_sampler", None), "sampler", None),)
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _loss(trainer: Any, batch: Any) -> Tensor:
    module = trainer.lightning_module
    more: tuple[int, ...] = ()
    own = getattr(module, "calibration_loss", None)
    if own is None:
        accepted = list(inspect.signature(module.training_step).parameters)
        if not module.automatic_optimization or "dataloader_iter" in accepted:
            why = "draws its batches" if module.automatic_optimization else "optimizes"
            raise ConfigError(
                f"the training_step of {type(module).__name__} {why} by itself, so that it cannot be asked for the loss of a batch. Give the "
                f"module a method calibration_loss(batch) that returns it. Or inject {_BEFOREHAND}"
            )
        own, more = module.training_step, (0,) * (len(accepted) > 1)  # batch_idx
    with trainer.precision_plugin.train_step_context():
        out = own(batch, *more)
    loss = out.get("loss") if isinstance(out, dict) else out
    if not isinstance(loss, Tensor):
        raise ConfigError(
            f"the training_step of {type(module).__name__} returned {type(loss).__name__} for a batch of the calibration, not a loss. Inject "
            f"{_BEFOREHAND}"
        )
    return loss


@contextmanager
def _left_alone(trainer: Any) -> Iterator[None]:
    """Inside, nothing is logged; afterwards random states and metrics are as if nothing had run."""
    module: Any = trainer.lightning_module
    state, loggers = rng_state(), trainer.loggers
    # Metrics of torchmetrics. They need not be empty: a checkpoint may have brought their states.
    metrics = [m for m in module.modules() if hasattr(m, "_update_count") and callable(getattr(m, "reset", None))]
    counted = [{name: copy.deepcopy(getattr(m, name)) for name in ("_update_count", *m._defaults)} for m in metrics]
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.callback(_put_back, module, name, module.__dict__.get(name))
            object.__setattr__(module, name, _silent)
        stack.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger() for _ in loggers]
        try:
            yield
        finally:
            for metric in metrics:
                metric.reset()  # one that is made of others resets these, so all go first
            for metric, values in zip(metrics, counted, strict=True):
                for name, value in values.items():
                    setattr(metric, name, value)
            restore_rng_state(state)


def _silent(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""


def _put_back(module: Any, name: str, value: Any) -> None:
    if value is None:
        del module.__dict__[name]
    else:
        object.__setattr__(module, name, value)
