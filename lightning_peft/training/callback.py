"""``PEFTCallback``: parameter-efficient fine-tuning of any LightningModule by any Trainer, with nothing else changed."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.checkpoint import require_base
from lightning_peft.errors import CompatibilityError, ConfigError, PEFTError, did_you_mean
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.inject import NAME
from lightning_peft.surgery.recompute import GradientCheckpointing
from lightning_peft.surgery.stack import RESERVED, stack_of
from lightning_peft.training import calibrating, export, peak, restoring, table
from lightning_peft.training.adapted_root import other_keys, path_of
from lightning_peft.training.bookmark import Bookmark
from lightning_peft.training.installing import Installer
from lightning_peft.training.namespace import is_a
from lightning_peft.training.run_state import Run
from lightning_peft.training.second_pass import Repeater
from lightning_peft.training.sentinel import GradientSentinel
from lightning_peft.training.shards import SHARDED, Shards
from lightning_peft.training.trainer_hooks import TrainerHooks, kept_keys
from lightning_peft.types import AdapterDtype

Holds = Literal["adapter", "full"]
Reaction = Literal["raise", "warn", "off"]


class PEFTCallback(Installer):
    """Trains adapters on a frozen base inside any LightningModule, under any Trainer of ``lightning.pytorch`` or ``pytorch_lightning``.

    The module, its optimizer code and the checkpoint callback stay as they are. Adapters are installed before the Trainer wraps the
    module and calls ``configure_optimizers``; modules that are built late (``setup``, ``configure_model``) get theirs as soon as they
    are there. During training the adapted root is in train mode except for running statistics, which belong to the frozen base.

    A ``.ckpt`` holds the adapters, everything else that trains (extra modules whole; outside the adapted root, parameters that train
    and persistent buffers), and what an exact resume needs, random states of each rank included. ``fit(ckpt_path=...)`` is strict
    about adapters and refuses another base. A full checkpoint from before PEFT becomes the base, with fresh adapters. Whenever a
    checkpoint is written, by an exception or a signal too, it continues from the end of the last complete optimizer step. Files are
    written whole or not at all; one that is damaged is refused, and the newest intact one beside it named.

    After ``fit``, adapter folders ``last`` and, if a checkpoint callback kept a best file, ``best`` lie in ``<log_dir>/adapter``
    (``<default_root_dir>/adapter`` without a logger; one level deeper for names other than ``default``), with the tokenizer of the
    LightningModule or data module. Not under ``fast_dev_run``, nor when ``fit`` did not end by itself.

    A ``.ckpt`` is the same under DDP, FSDP1 and FSDP2 and on one process, and resumes under any of them. Under FSDP2 a module that shards
    itself in ``configure_model`` calls :meth:`apply` before; see :func:`lightning_peft.shard`.

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
        merge_on_end: Merge the adapter into the base at the end of ``fit``, after every checkpoint is written. On a quantized base it
            says what becomes of the quantized weights: ``requantize`` or ``dense`` (see :meth:`Handle.merge`).
        quantization: Store the base's linear layers in few bits before the adapter is installed: ``nf4``, ``fp4``, ``int8``, or a
            mapping with the fields of :class:`Quantization`, ``skip`` and ``loftq``, as :func:`lightning_peft.quantize` takes them.
            Extra modules stay dense. A base that is stored that way already is used as it is. ``auto`` does what the method is made
            for: NF4 for QLoRA unless the base is quantized in another way, nothing for most methods.
        adapter_dtype: dtype of the adapter's parameters; ``auto`` is fp32 and stays so under ``precision="bf16-true"``.
        base_dropout: Keep the base's own dropout active in training.
        gradient_checkpointing: Recompute the activations of blocks in the backward pass instead of keeping them, while ``fit`` runs:
            ``True``, or the options ``every`` (every k-th block), ``offload`` (block inputs wait in CPU memory), ``reentrant`` and
            ``blocks`` (paths or globs, where the model's blocks are not known).
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
        merge_on_end: bool | Literal["requantize", "dense"] = False,
        quantization: str | dict[str, Any] | None = "auto",
        adapter_dtype: AdapterDtype = "auto",
        base_dropout: bool = True,
        gradient_checkpointing: bool | dict[str, Any] = False,
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
        self.follows_method = quantization == "auto"
        wanted = self.strategy.base_quantization if self.follows_method else quantization
        self.quantization = None if wanted is None else QuantizeOptions.parse(wanted)
        self.adapter_dtype = adapter_dtype
        self.base_dropout = base_dropout
        self.gradient_checkpointing = GradientCheckpointing.parse(gradient_checkpointing)
        self.gradient_sentinel = gradient_sentinel
        self.export = export
        self.anatomy = anatomy
        self.verbose = verbose
        self._id = uuid.uuid4().hex
        self._run: Run | None = None
        self._ended: dict[str, Any] = {}  # state after the last fit: checkpoints are written after an error, and by the user
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"PEFTCallback: name={name!r}, but only letters, digits, '_' and '-' can be part of parameter names."
            )
        for option, kind in (("checkpoint", Holds), ("gradient_sentinel", Reaction), ("adapter_dtype", AdapterDtype)):
            value, allowed = getattr(self, option), get_args(kind)
            if value not in allowed:
                hint = did_you_mean(str(value), allowed)
                raise ConfigError(f"PEFTCallback: {option}={value!r}, but it is one of {', '.join(allowed)}.{hint}")
        if merge_on_end not in (False, True, "requantize", "dense"):
            raise ConfigError(f"PEFTCallback: merge_on_end={merge_on_end!r} is none of false, true, 'requantize', 'dense'.")
        if self.quantization is not None and checkpoint == "full":
            raise ConfigError(
                "PEFTCallback: checkpoint='full' with quantization: torch cannot load quantized weights from a .ckpt. Use "
                "checkpoint='adapter', and keep the base itself with lp.save_quantized(base, folder)."
            )
        if merge_on_end and not self.strategy.mergeable:
            raise ConfigError(
                f"PEFTCallback: merge_on_end={merge_on_end!r}, but {type(self.strategy).__name__} cannot be merged into a weight."
            )

    @property
    def _bookmark(self) -> Bookmark:
        assert self.run.bookmark is not None
        return self.run.bookmark

    @property
    def state_key(self) -> str:
        """Key of this callback's state in a checkpoint; one per adapter name."""
        return f"lightning_peft.PEFTCallback[{self.name}]"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None, "_ended": {}}

    # ------------------------------------------------------------------ fit

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the method's schedule and the sentinel, and show the table."""
        handle, run = self._handle(pl_module), self.run
        handle.verify()
        assert run.modes is not None
        run.modes.apply()
        if run.pending_init is not None:
            start, run.pending_init = run.pending_init, None
            require_base(handle, start.manifest)  # on meta there were no values to compare
            self._start_from(start, pl_module, handle)
        self._start_schedule(trainer, pl_module, handle)
        if self.verbose and trainer.is_global_zero:
            others = self._others(pl_module)
            shards = Shards(trainer.strategy.model or pl_module)
            counted = table.budget(handle, others, trainer.optimizers, shards, full=self.checkpoint == "full")
            table.show(table.render(handle, path_of(pl_module, handle.root) or "", others, counted, shards))
            run.peak = peak.watch(pl_module)

    def _start_schedule(self, trainer: pl.Trainer, pl_module: pl.LightningModule, handle: Handle) -> None:
        run = self.run
        schedule = handle.strategy.schedule(handle)
        if type(schedule) is Schedule:
            return
        total = trainer.estimated_stepping_batches
        if math.isinf(total):
            raise ConfigError(
                f"{type(handle.strategy).__name__} plans over the whole run; set max_epochs or max_steps of the Trainer."
            )
        if is_a(trainer.strategy, "FSDPStrategy"):
            raise ConfigError(
                f"{type(handle.strategy).__name__} reads its parameters between steps, when FSDP1 has only slices of them. Use FSDP2 "
                "(ModelParallelStrategy) or DDP."
            )
        wish = schedule.second_pass()
        if wish is not None:
            run.repeater = Repeater(handle, wish, by_itself=is_a(pl_module, "PEFTLightningModule"))
            run.undo.append(run.repeater.close)
            run.repeater.check(trainer, self.gradient_checkpointing)
        run.undo.append(schedule.on_end)
        schedule.on_start(int(total))
        if run.saved_schedule:  # empty in what a finder saves: it starts before this hook
            schedule.load_state_dict(run.saved_schedule)
        run.schedule = schedule

    def _others(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Return what trains beside the adapter, by key."""
        keys = other_keys(module, [(self, self._handle(module))])
        return {k: p for k, p in module.named_parameters() if k in keys and p.requires_grad and RESERVED not in k.split(".")}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take note of where training starts, after everything is restored."""
        run = self.run
        calibrating.require(self._handle(pl_module))
        run.fresh = None
        run.step = trainer.global_step
        run.scale = _scale(trainer)
        self._bookmark.resume()
        if self.gradient_sentinel != "off":
            extras = self.extras_of(pl_module)
            named = {f"{path}.{n}": p for path, m in extras.items() for n, p in m.named_parameters() if p.requires_grad}
            run.sentinel = GradientSentinel(self._handle(pl_module), named)
        restoring.warn_of_stateless_loader(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep running statistics still, whatever has called ``train()`` in between."""
        assert self.run.modes is not None
        self.run.modes.hold()
        if self.run.peak is not None:
            self.run.peak.saw(batch)
        if self.run.repeater is not None:
            self.run.repeater.open()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the run may continue from here."""
        self._bookmark.mark("epoch")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note that the run may continue from here."""
        if self.run.stage == "fit" and not trainer.sanity_checking:
            self._bookmark.mark("validation")

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add to the loss the method's penalty, and what a second pass over the batch gave."""
        schedule, repeater = self.run.schedule, self.run.repeater
        found = None if schedule is None else schedule.penalty(), None if repeater is None else repeater.take(pl_module)
        for term in found:
            if term is not None:
                scale = _scale(trainer) or 1.0
                loss.add_((term * (scale / trainer.accumulate_grad_batches)).to(loss.device, loss.dtype))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        """Gradients are whole and unscaled here, and not clipped yet."""
        run = self.run
        if run.sentinel is not None:
            run.sentinel.before_step(optimizer)
        if run.schedule is not None and _holds(optimizer, self._handle(pl_module)):
            run.schedule.before_step(optimizer)
            run.stepping = optimizer

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the adapter runs and, after a step, let the schedule and the sentinel see it."""
        self._check_ran(pl_module)
        if self.run.repeater is not None:
            self.run.repeater.end(pl_module)
        self._bookmark.settle(idle=outputs is None)
        self.run.stepping = None

    def second_pass(self, first: Callable[[], Tensor], again: Callable[[], Tensor]) -> Tensor | None:
        """Return what the method adds to the loss from a second pass over the batch, a mean over rows; None without one.

        For a ``training_step`` whose model's output is not what is scored; any other module has its second pass without a word.

        Args:
            first: Returns the logits of the first pass, (rows, classes).
            again: Runs the model once more and returns those of the second one.
        """
        repeater = None if self._run is None else self._run.repeater
        return None if repeater is None else repeater.run(first(), again)

    def finish_step(self, trainer: Any, *, idle: bool) -> bool:
        """Let the schedule and the sentinel see an optimizer step, once; return False where that was interrupted before.

        Args:
            trainer: The Trainer.
            idle: The step had no loss.
        """
        run = self._run
        if run is None or run.finishing:
            return False
        if trainer.global_step == run.step:
            return True
        run.finishing = True
        stepped, run.stepping = run.stepping, None
        run.step, before, run.scale = trainer.global_step, run.scale, _scale(trainer)
        skipped = before is not None and run.scale is not None and run.scale < before
        if run.sentinel is not None:  # before the schedule, which may put back what a step has moved (masks)
            report = run.sentinel.after_step(skipped=skipped or idle)
            if run.sentinel.done:
                sentinel, run.sentinel = run.sentinel, None
                if report is not None:
                    sentinel.close(self.gradient_sentinel, report)
        if run.schedule is not None and stepped is not None:
            # Once, however many optimizers there are: its plan counts like estimated_stepping_batches.
            run.schedule.after_step(stepped, skipped=skipped)
        run.finishing = False
        return True

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
        """Return random states of all ranks and the schedule's state, of the last ``fit`` if none runs; every rank has to call it."""
        run = self._run
        if run is not None and run.stage == "fit":
            return {**self._bookmark.state_dict(), "schedule": run.schedule_state()}
        return self._ended

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore random states at once (``on_train_start`` is too late, the sampler has drawn its seed), and the schedule."""
        run = self.run
        if run.stage != "fit":  # Lightning restores callbacks for test and predict too, which are no continuation of a run
            return
        if run.pending_init is not None and any(slot.tensor().is_meta for slot in self._handle(self._bookmark.module).slots):
            raise CompatibilityError(
                "ckpt_path was read while the module is on the meta device, which holds no values, so that it would start from init_from "
                "again. Use a strategy that restores after it has made the module (restore_checkpoint_after_setup), or leave meta out."
            )
        run.pending_init = None  # the checkpoint is of a run that has begun from it
        self._bookmark.load_state_dict(state_dict)
        run.saved_schedule = state_dict["schedule"]
        if run.schedule is not None and run.saved_schedule:  # strategies that restore after on_fit_start
            run.schedule.load_state_dict(run.saved_schedule)

    # ------------------------------------------------------------------ end

    def on_fit_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Print the peak of memory, and write the adapter folders."""
        self.run.finished = True
        if self.run.peak is not None:
            loss: Any = "chunked" if is_a(pl_module, "PEFTLightningModule") else "full"
            self.say(pl_module, self.run.peak.describe(self._handle(pl_module).root, trainer, loss))
        if self.export is False or trainer.fast_dev_run:
            return
        folder = export.folder_of(trainer, self.name, self.export)
        hooks = TrainerHooks.enter(trainer.strategy, self)
        installed = hooks.installed()
        state = hooks.whole_state(kept_keys(pl_module, installed))
        if trainer.is_global_zero:
            written = [export.export_last(folder, trainer, pl_module, self._handle(pl_module), installed, state)]
            best = export.export_best(folder, trainer, pl_module, self.name)
            self.say(pl_module, "adapter folders: " + ", ".join(str(p) for p in (*written, best) if p is not None))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Merge if asked, after all ``on_fit_end`` hooks, and leave nothing on the module that was there for the run only."""
        if self._run is None:
            return
        if self.merge_on_end and self._run.finished:
            into: Any = self.merge_on_end if isinstance(self.merge_on_end, str) else None
            self._handle(pl_module).merge(quantized=into)
            self.say(pl_module, f"adapter '{self.name}' is merged into the base.")
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Undo what was there for the run only; Lightning does not call ``teardown`` after an error.

        An adapter that this run installed and did not come to train goes too: it holds nothing, as when a checkpoint was refused.
        """
        fresh = None if self._run is None else self._run.fresh
        if self._run is not None and self._run.stage == "fit" and self._run.bookmark is not None:
            with contextlib.suppress(PEFTError):  # the run has failed already
                self._bookmark.settle()
            self._bookmark.told_to_stop = is_a(exception, "SIGTERMException")
        self._close(failed=True)
        if fresh is not None and not is_a(trainer.strategy, *SHARDED):
            fresh.remove()

    def _close(self, *, failed: bool = False) -> None:
        run, self._run = self._run, None
        if run is not None and run.stage == "fit" and run.fresh is None and run.bookmark is not None:
            # After an error other ranks may never come.
            self._ended = {**run.bookmark.state_dict(alone=failed), "schedule": run.schedule_state()}
        while run is not None and run.undo:
            run.undo.pop()()


def _holds(optimizer: Optimizer, handle: Handle) -> bool:
    """Return whether an optimizer trains tensors of an adapter."""
    owned = {id(p) for p in handle.trainable_parameters()}
    return any(id(p) in owned for group in optimizer.param_groups for p in group["params"])


def _scale(trainer: Any) -> float | None:
    """Return the gradient scaler's factor under fp16, which also tells whether a step was skipped."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())
