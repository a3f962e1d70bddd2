"""``PEFTCallback``: parameter-efficient fine-tuning of any LightningModule by any Trainer, with nothing else changed."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoint import AdapterFile
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, did_you_mean
from lightning_peft.strategies.install import inject
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.inject import NAME
from lightning_peft.surgery.stack import RESERVED, stack_of
from lightning_peft.training import export, restoring, rng, table
from lightning_peft.training.adapted_root import find_extras, find_handle, find_root, localized, path_of, train_whole
from lightning_peft.training.initial import read_initial, start_from
from lightning_peft.training.late import install_after_configure_model
from lightning_peft.training.modes import BaseModes, has_statistics
from lightning_peft.training.namespace import is_a, overrides
from lightning_peft.training.optimizers import reach, split_groups
from lightning_peft.training.sentinel import GradientSentinel
from lightning_peft.training.trainer_hooks import TrainerHooks, other_keys
from lightning_peft.types import AdapterDtype

Holds = Literal["adapter", "full"]
Reaction = Literal["raise", "warn", "off"]
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


@dataclass(eq=False)
class _Run:
    """What one ``fit``, ``validate``, ``test`` or ``predict`` keeps; nothing of it is pickled or copied with the callback."""

    stage: str
    undo: list[Callable[[], object]] = field(default_factory=list)
    modes: BaseModes | None = None
    schedule: Schedule | None = None
    sentinel: GradientSentinel | None = None
    stepping: list[Optimizer] = field(default_factory=list)
    step: int = 0
    scale: float | None = None
    finished: bool = False
    saved_schedule: dict[str, Any] | None = None
    resumed: list[rng.RNGState] | None = None
    pending_init: AdapterFile | None = None


class PEFTCallback(pl.Callback):
    """Trains adapters on a frozen base inside any LightningModule, under any Trainer of ``lightning.pytorch`` or ``pytorch_lightning``.

    The module, its optimizer code and the checkpoint callback stay as they are. Adapters are installed before the Trainer wraps the
    module and calls ``configure_optimizers``; modules that are built late (``setup``, ``configure_model``) get theirs as soon as they
    are there. During training the adapted root is in train mode except for running statistics, which belong to the frozen base.

    A ``.ckpt`` holds the adapters, everything else that trains (extra modules whole; outside the adapted root, parameters that train
    and persistent buffers), and what an exact resume needs, random states of each rank included. ``fit(ckpt_path=...)`` is strict
    about adapters and refuses another base. A full checkpoint from before PEFT becomes the base, with fresh adapters.

    After ``fit``, adapter folders ``last`` and, if a checkpoint callback kept a best file, ``best`` lie in ``<log_dir>/adapter``
    (``<default_root_dir>/adapter`` without a logger; one level deeper for names other than ``default``), with the tokenizer of the
    LightningModule or data module. Not under ``fast_dev_run``, nor when ``fit`` did not end by itself.

    Under ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` call :meth:`apply` before ``fit``; else the trained adapter would stay in
    the child processes. Place the callback before weight averaging callbacks, which copy the module in ``setup``.

    Args:
        strategy: A strategy, a name (``lora``), ``{class_path: LoRA, init_args: {rank: 4}}``, or a list, which composes. Target names
            may be relative to the LightningModule (``net.0``) or to the adapted root (``0``).
        name: Name of the adapter; several callbacks with different names work side by side.
        module: Path of the adapted root in the LightningModule; ``""`` is the LightningModule itself. None: its only child with
            parameters, else itself.
        extra_modules: Paths of further modules that train whole and are saved with the adapter, such as a new task head.
        checkpoint: What a ``.ckpt`` holds: ``adapter`` or ``full`` (the base as well).
        init_from: An adapter folder or ``.ckpt`` from which a fresh run starts, with optimizer and steps at zero.
        merge_on_end: Merge the adapter into the base at the end of ``fit``, after every checkpoint is written.
        adapter_dtype: dtype of the adapter's parameters; ``auto`` is fp32 and stays so under ``precision="bf16-true"``.
        base_dropout: Keep the base's own dropout active in training.
        gradient_sentinel: What to do when a trainable tensor gets no gradient or does not move in the first two effective steps.
        export: Write the adapter folders after ``fit``; a path puts them there.
        anatomy: Roles of an architecture that the package does not know: a mapping, or the path of a YAML file.
        verbose: Print the table and what was decided.

    Raises:
        ConfigError: An option is unknown or out of range, or the strategy cannot do what is asked.
        UnknownMethodError: No strategy has this name.

    Example:
        >>> callback = PEFTCallback({"class_path": "LoRA", "init_args": {"rank": 4}}, module="net")
        >>> callback.strategy.rank
        4
    """

    def __init__(
        self,
        strategy: PEFTStrategy | str | dict[str, Any] | list[Any],
        *,
        name: str = "default",
        module: str | None = None,
        extra_modules: Sequence[str] = (),
        checkpoint: Holds = "adapter",
        init_from: str | os.PathLike[str] | None = None,
        merge_on_end: bool = False,
        adapter_dtype: AdapterDtype = "auto",
        base_dropout: bool = True,
        gradient_sentinel: Reaction = "raise",
        export: bool | str = True,
        anatomy: dict[str, Any] | str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        self.strategy = resolve(strategy)
        resolve(
            self.strategy.to_dict()
        )  # what a checkpoint will say of it; a class that is not registered could not be read back
        self.name = name
        self.module = module
        self.extra_modules = (extra_modules,) if isinstance(extra_modules, str) else tuple(extra_modules)
        self.checkpoint = checkpoint
        self.init_from = None if init_from is None else os.fspath(init_from)
        self.merge_on_end = merge_on_end
        self.adapter_dtype = adapter_dtype
        self.base_dropout = base_dropout
        self.gradient_sentinel = gradient_sentinel
        self.export = export
        self.anatomy = anatomy
        self.verbose = verbose
        self._run: _Run | None = None
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"PEFTCallback: name={name!r}, but only letters, digits, '_' and '-' can be part of parameter names."
            )
        for option, kind in (("checkpoint", Holds), ("gradient_sentinel", Reaction), ("adapter_dtype", AdapterDtype)):
            value, allowed = getattr(self, option), get_args(kind)
            if value not in allowed:
                hint = did_you_mean(str(value), allowed)
                raise ConfigError(f"PEFTCallback: {option}={value!r}, but it is one of {', '.join(allowed)}.{hint}")
        if merge_on_end and not self.strategy.mergeable:
            raise ConfigError(
                f"PEFTCallback: merge_on_end=True, but {type(self.strategy).__name__} cannot be merged into a weight."
            )

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; one per adapter name."""
        return f"lightning_peft.PEFTCallback[{self.name}]"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    @property
    def run(self) -> _Run:
        """State of the run in progress."""
        assert self._run is not None, "PEFTCallback.setup has not been called"
        return self._run

    # ------------------------------------------------------------------ installing

    def apply(self, module: nn.Module) -> Handle:
        """Install the adapter on a LightningModule now; a second call changes nothing.

        Needed before ``fit`` under launchers that train in child processes, and inside ``configure_model`` between building a
        module and sharding it with ``fully_shard``.

        Returns:
            The handle of the adapter.

        Raises:
            PEFTError: The adapter cannot be installed; the module is as it was.
        """
        return self.install(module)

    def install(self, module: nn.Module) -> Handle:
        """Install the adapter if it is not there, and let the extra modules train."""
        handle = self.handle_of(module)
        if handle is None:
            handle = self._inject(module)
        else:
            path = path_of(module, handle.root)
            wanted = localized(self.strategy, path or "", anatomy_of(handle.root, self.anatomy))
            if handle.strategy != wanted:
                raise ConflictError(
                    f"adapter '{self.name}' is installed already as {handle.strategy}, and this callback asks for {wanted}. Use "
                    "the same strategy, another name, or handles(model)[name].remove() first."
                )
        train_whole(handle, self.extras_of(module).values())
        return handle

    def _inject(self, module: nn.Module) -> Handle:
        path, root = find_root(module, self.module)
        if any(is_a(m, "FSDPModule") for m in root.modules()):
            raise ConflictError(
                f"'{path or type(module).__name__}' is sharded already (fully_shard), and adapters have to be there before. Call "
                "callback.apply(self) in configure_model, between building the module and sharding it."
            )
        find_extras(module, root, self.extra_modules)
        anatomy = anatomy_of(root, self.anatomy)
        strategy = localized(self.strategy, path, anatomy)
        start = None if self.init_from is None else read_initial(self.init_from, self.name, strategy, root)
        handle = inject(root, strategy, self.name, adapter_dtype=self.adapter_dtype, anatomy=self.anatomy)  # type: ignore[arg-type]
        try:
            find_extras(module, root, self.extra_modules)  # once more: an extra module must not have adapters in it
            if start is not None:
                self._start_from(start, module, handle)
        except BaseException:
            handle.remove()
            raise
        return handle

    def _start_from(self, start: AdapterFile, module: nn.Module, handle: Handle) -> None:
        assert self.init_from is not None
        if not any(tensor.is_meta for tensor in handle.state_dict().values()):
            start_from(start, self.init_from, module, handle)
        elif self._run is None:
            raise CompatibilityError("init_from: the module is on the meta device, which holds no values. Materialise it first.")
        else:
            self._run.pending_init = start  # on_fit_start comes after Lightning has materialised the module

    def handle_of(self, module: nn.Module) -> Handle | None:
        """Return this callback's adapter on ``module``, or None before it is installed."""
        return find_handle(module, self.name)

    def extras_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the extra modules by their path in ``module``."""
        handle = self.handle_of(module)
        root = handle.root if handle is not None else find_root(module, self.module)[1]
        return find_extras(module, root, self.extra_modules)

    def _handle(self, module: nn.Module) -> Handle:
        handle = self.handle_of(module)
        if handle is None:
            raise ConflictError(
                f"adapter '{self.name}' is gone from {type(module).__name__}: a hook has built the model anew after it was installed. "
                "Build it once (`if self.net is None`) in setup or configure_model."
            )
        return handle

    def setup(self, trainer: Any, pl_module: pl.LightningModule, stage: str) -> None:
        """Install the adapter now, or arrange for it to happen once the module is built."""
        self._check_neighbours(trainer)
        installed = self.handle_of(pl_module) is not None
        self._check_launcher(trainer, stage, installed)
        self._run = _Run(stage)
        TrainerHooks.enter(trainer.strategy, self)
        builds = overrides(pl_module, "configure_model")
        # A module that is built in `setup` is not here yet; weight averaging that copies the module right after us is no reason to wait.
        late = builds or (
            overrides(pl_module, "setup") and not any(is_a(c, "StochasticWeightAveraging") for c in trainer.callbacks)
        )
        if installed or not late:
            self._install_for(pl_module)
        elif builds or not is_a(trainer.strategy, "ModelParallelStrategy"):  # else Lightning's own error about configure_model
            self.run.undo.append(install_after_configure_model(pl_module, self._install_for))

    def _check_neighbours(self, trainer: Any) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]
        early = next((c for c in before if is_a(c, *AVERAGING)), None)
        if early is not None:
            raise ConflictError(
                f"{type(early).__name__} stands before PEFTCallback and would copy the module without adapters. Put PEFTCallback "
                "first in Trainer(callbacks=[...])."
            )

    def _check_launcher(self, trainer: Any, stage: str, installed: bool) -> None:
        if stage != "fit" or not is_a(trainer.strategy.launcher, "_MultiProcessingLauncher"):
            return
        if not installed:
            raise ConflictError(
                f"{type(trainer.strategy).__name__} trains in child processes, and adapters installed there do not come back with "
                "the trained values. Call callback.apply(module) before trainer.fit."
            )
        if self.merge_on_end:
            raise ConfigError(
                "merge_on_end=True under a launcher with child processes: the parent would get a merged base and an active adapter. "
                "Call handles(module)[name].merge() after fit instead."
            )

    def _install_for(self, module: nn.Module) -> None:
        """Install, and prepare the module for this stage: at once, since a learning-rate finder trains before ``on_fit_start``."""
        handle, run = self.install(module), self.run
        if run.stage == "fit":
            self._check_unmerged(handle)
        if run.modes is not None:
            return
        run.undo.append(restoring.lenient(module, (self.name,)).remove)
        trainer: Any = module.trainer
        if trainer.strategy.restore_checkpoint_after_setup:
            strict: Any = module._strict_loading
            module._strict_loading = False  # type: ignore[assignment]  # these raise for each missing key before any hook can judge
            run.undo.append(functools.partial(setattr, module, "_strict_loading", strict))
        run.modes = BaseModes(handle.root, self.extras_of(module).values(), base_dropout=self.base_dropout)
        if run.stage == "fit":
            self._check_statistics(module, handle)
            run.modes.apply()
            run.undo += [run.modes.restore, run.modes.excuse_from_warning(trainer.fit_loop)]

    def _check_unmerged(self, handle: Handle) -> None:
        if handle.merged:
            raise ConflictError(
                f"adapter '{self.name}' is merged into the base, so it cannot train. unmerge() it, or remove() it and start anew."
            )

    def _check_statistics(self, module: Any, handle: Handle) -> None:
        swa = any(is_a(c, "StochasticWeightAveraging") for c in module.trainer.callbacks)
        if swa and any(has_statistics(m) for m in handle.root.modules()):
            raise ConfigError(
                "StochasticWeightAveraging recomputes the running statistics of BatchNorm, which belong to the frozen base and are in "
                "no adapter file. Use EMAWeightAveraging."
            )

    # ------------------------------------------------------------------ fit

    def reach_optimizers(self, strategy: Any) -> None:
        """Bring the adapter into the optimizers that ``configure_optimizers`` made, or that were made before it was there."""
        module = strategy.lightning_module
        handle = self._handle(module)
        extras = [p for extra in self.extras_of(module).values() for p in extra.parameters() if p.requires_grad]
        added = reach(strategy.optimizers, handle.root.parameters(), [*handle.trainable_parameters(), *extras])
        if added:
            which = type(strategy.optimizers[0]).__name__
            self.say(module, f"{added} tensors of adapter '{self.name}' joined the first group of {which}.")
        options = [(s.tensor(), handle.strategy.group_options(s)) for s in handle.trainable_slots()]
        split_groups(strategy.optimizers, strategy.lr_scheduler_configs, options)  # type: ignore[arg-type]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the method's schedule and the sentinel, and show the table."""
        handle, run = self._handle(pl_module), self.run
        handle.verify()
        assert run.modes is not None
        run.modes.apply()
        if run.pending_init is not None:
            start, run.pending_init = run.pending_init, None
            self._start_from(start, pl_module, handle)
        self._start_schedule(trainer, handle)
        if self.verbose and trainer.is_global_zero:
            others = self._others(pl_module)
            counted = table.budget(handle, others, trainer.optimizers, full=self.checkpoint == "full")
            table.show(table.render(handle, path_of(pl_module, handle.root) or "", others, counted))

    def _start_schedule(self, trainer: pl.Trainer, handle: Handle) -> None:
        run = self.run
        schedule = handle.strategy.schedule(handle)
        if type(schedule) is Schedule:
            return
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ConfigError(
                f"{type(handle.strategy).__name__} plans over the whole run; set max_epochs or max_steps of the Trainer."
            )
        schedule.on_start(int(total))
        if run.saved_schedule is not None:
            schedule.load_state_dict(run.saved_schedule)
        run.schedule = schedule

    def _others(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return what trains beside the adapter, by key."""
        keys = other_keys(module, [(self, self._handle(module))])
        return {k: p for k, p in module.named_parameters() if k in keys and p.requires_grad and RESERVED not in k.split(".")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of where training starts, after everything is restored."""
        run = self.run
        run.step = trainer.global_step
        run.scale = _scale(trainer)
        if self.gradient_sentinel != "off":
            extras = self.extras_of(pl_module)
            named = {f"{path}.{n}": p for path, m in extras.items() for n, p in m.named_parameters() if p.requires_grad}
            run.sentinel = GradientSentinel(self._handle(pl_module), named)
        restoring.warn_of_stateless_loader(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep running statistics still, whatever has called ``train()`` in between."""
        assert self.run.modes is not None
        self.run.modes.hold()
        self.run.resumed = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore random states again where Lightning has entered a finished epoch once more and made an iterator for nothing.

        It does so when a run that counts steps (``max_steps``) resumes; the iterator has drawn a seed.
        """
        run = self.run
        if run.resumed is not None:
            rng.restore_rank(run.resumed)
            run.resumed = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the method's penalty to the loss."""
        schedule = self.run.schedule
        penalty = None if schedule is None else schedule.penalty()
        if penalty is not None:
            scale = _scale(trainer) or 1.0
            loss.add_((penalty * (scale / trainer.accumulate_grad_batches)).to(loss.device, loss.dtype))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Gradients are whole and unscaled here, and not clipped yet."""
        run = self.run
        if run.schedule is not None:
            run.schedule.before_step(optimizer)
        if run.sentinel is not None:
            run.sentinel.before_step(optimizer)
        run.stepping.append(optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the adapter runs and, after a step, let the schedule and the sentinel see it."""
        run = self.run
        self._check_ran(pl_module)
        stepped, run.stepping = run.stepping, []
        if trainer.global_step == run.step:
            return
        run.step, before, run.scale = trainer.global_step, run.scale, _scale(trainer)
        skipped = before is not None and run.scale is not None and run.scale < before
        if run.sentinel is not None:  # before the schedule, which may put back what a step has moved (masks)
            report = run.sentinel.after_step(skipped=skipped or outputs is None)
            if run.sentinel.done:
                sentinel, run.sentinel = run.sentinel, None
                if report is not None:
                    sentinel.close(self.gradient_sentinel, report)
        if run.schedule is not None:
            for optimizer in stepped or (None,):
                run.schedule.after_step(optimizer, skipped=skipped)

    def _check_ran(self, module: nn.Module, *, training: bool = True) -> None:
        """Raise if the module has run and some adapter has not; the root's own forward checks by itself where it is called."""
        handle = self._handle(module)
        if handle.checked or handle.merged:
            return
        stacks = [stack_of(entry.module) for entry in handle.entries]
        if training or any(stack is not None and stack._ran for stack in stacks):  # a validation that skips the model is none
            handle.check_ran()

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check that the adapter runs."""
        self._check_ran(pl_module, training=False)

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check that the adapter runs."""
        self._check_ran(pl_module, training=False)

    def on_predict_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check that the adapter runs."""
        self._check_ran(pl_module, training=False)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return random states of all ranks, the schedule's state and what trains; every rank has to call it."""
        run = self._run
        if run is None or run.stage != "fit":
            return {}
        schedule = {} if run.schedule is None else run.schedule.state_dict()
        return {"rng": rng.gather_rng_states(), "schedule": schedule}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore random states at once (``on_train_start`` is too late, the sampler has drawn its seed), and the schedule."""
        run = self.run
        if run.stage != "fit":  # Lightning restores callbacks for test and predict too, which are no continuation of a run
            return
        run.resumed = state_dict["rng"]
        rng.restore_rank(run.resumed)
        run.saved_schedule = state_dict["schedule"]
        if run.schedule is not None:  # strategies that restore after on_fit_start
            run.schedule.load_state_dict(run.saved_schedule)

    # ------------------------------------------------------------------ end

    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Write the adapter folders."""
        self.run.finished = True
        if self.export is False or trainer.fast_dev_run:
            return
        folder = export.folder_of(trainer, self.name, self.export)
        if is_a(trainer.strategy, "FSDPStrategy", "ModelParallelStrategy"):
            warnings.warn(
                "adapter folders are not written from sharded parameters; make them from a consolidated checkpoint with "
                "load_adapter and save_adapter.",
                stacklevel=2,
            )
            return
        if trainer.is_global_zero:
            installed = TrainerHooks.enter(trainer.strategy, self).installed()
            written = [export.export_last(folder, trainer, pl_module, self._handle(pl_module), installed)]
            best = export.export_best(folder, trainer, pl_module, self.name)
            self.say(pl_module, "adapter folders: " + ", ".join(str(p) for p in (*written, best) if p is not None))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge if asked, after all ``on_fit_end`` hooks, and leave nothing on the module that was there for the run only."""
        if self._run is None:
            return
        if self.merge_on_end and self._run.finished:
            self._handle(pl_module).merge()
            self.say(pl_module, f"adapter '{self.name}' is merged into the base.")
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo what was there for the run only; Lightning does not call ``teardown`` after an error."""
        self._close()

    def _close(self) -> None:
        run, self._run = self._run, None
        while run is not None and run.undo:
            run.undo.pop()()

    def say(self, module: nn.Module, text: str) -> None:
        """Print on rank zero."""
        trainer = getattr(module, "_trainer", None)
        if self.verbose and (trainer is None or trainer.is_global_zero):
            print(f"[PEFT] {text}")


def _scale(trainer: Any) -> float | None:
    """Return the gradient scaler's factor under fp16, which also tells whether a step was skipped."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
