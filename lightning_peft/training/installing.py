"""Installing the adapter of a callback on a LightningModule: by hand, or in ``setup`` before anything looks at its parameters."""

from __future__ import annotations

import functools
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn

from lightning_peft.checkpoint import AdapterFile
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError
from lightning_peft.loading.quantize import quantization_report, require_same
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.install import LATER, inject
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy, anatomy_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks, recomputed_blocks
from lightning_peft.training import restoring
from lightning_peft.training.adapted_root import find_extras, find_handle, find_root, localized, path_of, train_whole
from lightning_peft.training.initial import read_initial, start_from
from lightning_peft.training.late import install_after_configure_model
from lightning_peft.training.modes import BaseModes, has_statistics
from lightning_peft.training.namespace import is_a, overrides
from lightning_peft.training.optimizers import reach, split_groups
from lightning_peft.training.quantizing import check_quantized, check_run, quantize_base, require_before
from lightning_peft.training.run_state import Run
from lightning_peft.training.shards import SHARDED, agree
from lightning_peft.training.trainer_hooks import TrainerHooks
from lightning_peft.types import AdapterDtype

AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class Installer(pl.Callback):
    """The part of :class:`PEFTCallback` that ends where training begins; its options are described there."""

    strategy: PEFTStrategy
    name: str
    module: str | None
    extra_modules: tuple[str, ...]
    checkpoint: str
    init_from: str | None
    merge_on_end: bool | Literal["requantize", "dense"]
    quantization: QuantizeOptions | None
    follows_method: bool  # `quantization` is the method's wish, not the user's
    adapter_dtype: AdapterDtype
    base_dropout: bool
    gradient_checkpointing: GradientCheckpointing | None
    anatomy: dict[str, Any] | str | None
    verbose: bool
    _id: str  # tells adapters that this callback installed from others
    _run: Run | None

    @property
    def run(self) -> Run:
        """State of the run in progress."""
        assert self._run is not None, "PEFTCallback.setup has not been called"
        return self._run

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
        """Install the adapter if it is not there, and let the extra modules train.

        Raises:
            ConflictError: It is there with another strategy; or somebody else installed it, so that ``init_from`` would be ignored.
        """
        handle = self.handle_of(module)
        if handle is None:
            handle = self._inject(module)
        else:
            check_quantized(handle.root, self.checkpoint)
            asked = self._asked(handle.root)
            if asked is not None:
                require_before(handle, asked)
            path = path_of(module, handle.root)
            wanted = localized(self.strategy, path or "", anatomy_of(handle.root, self.anatomy))
            if handle.strategy != wanted:
                raise ConflictError(
                    f"adapter '{self.name}' is installed already as {handle.strategy}, and this callback asks for {wanted}. Use "
                    "the same strategy, another name, or handles(model)[name].remove() first."
                )
            if self.init_from is not None and handle.installer != self._id:
                raise ConflictError(
                    f"adapter '{self.name}' is installed already, so init_from='{self.init_from}' would be ignored. Leave init_from out "
                    "to go on with the adapter as it is, or remove it first: handles(model)[name].remove()."
                )
        agree(handle)
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
        asked = self._asked(root)
        self._quantize(asked, module, path, anatomy, strategy)
        later = LATER if strategy.from_data else None  # from data, once it is clear that no checkpoint brings it
        dtype, data = self.adapter_dtype, self.anatomy
        handle = inject(root, strategy, self.name, adapter_dtype=dtype, anatomy=data, calibration=later)  # type: ignore[arg-type]
        handle.installer = self._id
        if asked is not None:
            handle.usage["quantization"] = asked.to_dict()
        try:
            find_extras(module, root, self.extra_modules)  # once more: an extra module must not have adapters in it
            if start is not None:
                self._start_from(start, module, handle)
        except BaseException:
            handle.remove()
            raise
        if self._run is not None:
            self._run.fresh = handle
        return handle

    def _asked(self, root: nn.Module) -> QuantizeOptions | None:
        """Return how the base is to be stored; the method's own wish yields to a base that is quantized in another way."""
        if self.quantization is None or not self.follows_method:
            return self.quantization
        try:
            require_same(root, self.quantization)
        except ConflictError:
            return None
        return self.quantization

    def _quantize(
        self, asked: QuantizeOptions | None, module: nn.Module, path: str, anatomy: Anatomy, strategy: PEFTStrategy
    ) -> None:
        if asked is not None and self.checkpoint != "full":
            extras = find_extras(module, anatomy.root, self.extra_modules).values()
            quantize_base(asked, path, anatomy, strategy, extras, self.anatomy)
        check_quantized(anatomy.root, self.checkpoint)
        report = quantization_report(anatomy.root)
        if report is not None:
            self.say(module, f"base: {report}")

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
        self._check_strategy(trainer, stage, installed)
        self._run = Run(stage)
        owner: Any = self  # PEFTCallback has the rest of what an owner offers
        self._run.bookmark = TrainerHooks.enter(trainer.strategy, owner).bookmark
        if stage == "fit":
            self._run.bookmark.reset()
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

    def _check_strategy(self, trainer: Any, stage: str, installed: bool) -> None:
        if is_a(trainer.strategy, "DeepSpeedStrategy"):
            raise ConfigError(
                "DeepSpeedStrategy keeps parameters, optimizers and checkpoints in a form of its own, which is not supported. Use DDP, "
                "FSDP2 (ModelParallelStrategy) or FSDP1."
            )
        if stage == "fit" and self.merge_on_end and is_a(trainer.strategy, *SHARDED):
            raise ConfigError(
                f"merge_on_end={self.merge_on_end!r} under {type(trainer.strategy).__name__}: weights that lie in pieces cannot be merged "
                "into. Merge afterwards in one process: lp.load_adapter(model, folder).merge()."
            )
        if stage != "fit" or not is_a(trainer.strategy.launcher, "_MultiProcessingLauncher"):
            return
        if not installed:
            raise ConflictError(
                f"{type(trainer.strategy).__name__} trains in child processes, and adapters installed there do not come back with "
                "the trained values. Call callback.apply(module) before trainer.fit."
            )
        if self.merge_on_end:
            raise ConfigError(
                f"merge_on_end={self.merge_on_end!r} under a launcher with child processes: the parent would get a merged base and an active adapter. "
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
        if run.stage == "fit":
            check_run(handle, trainer, self.merge_on_end)
        if trainer.strategy.restore_checkpoint_after_setup:
            strict: Any = module._strict_loading
            module._strict_loading = False  # type: ignore[assignment]  # these raise for each missing key before any hook can judge
            run.undo.append(functools.partial(setattr, module, "_strict_loading", strict))
        run.modes = BaseModes(handle.root, self.extras_of(module).values(), base_dropout=self.base_dropout)
        if run.stage == "fit":
            self._check_statistics(module, handle)
            run.modes.apply()
            run.undo += [run.modes.restore, run.modes.excuse_from_warning(trainer.fit_loop)]
            self._checkpoint_blocks(module, handle)

    def _checkpoint_blocks(self, module: nn.Module, handle: Handle) -> None:
        if self.gradient_checkpointing is None:
            return
        root, path = handle.root, path_of(module, handle.root) or ""
        anatomy = anatomy_of(root, self.anatomy)
        self.run.undo.append(checkpoint_blocks(root, anatomy, self.gradient_checkpointing, prefix=path))
        names = recomputed_blocks(root)
        self.say(
            module, f"gradient checkpointing: {len(names)} modules run again in the backward pass, '{names[0]}' to '{names[-1]}'."
        )

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

    def say(self, module: nn.Module, text: str) -> None:
        """Print on rank zero."""
        trainer = getattr(module, "_trainer", None)
        if self.verbose and (trainer is None or trainer.is_global_zero):
            print(f"[PEFT] {text}")
