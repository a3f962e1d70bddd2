"""What all PEFT callbacks of one Trainer do through its Lightning strategy object (single device, DDP, FSDP, ...).

Callback hooks alone cannot do it: ``save_weights_only=True`` skips ``on_save_checkpoint``, the model is restored before
``on_load_checkpoint``, no hook lies between the restore and the cast to 16 bit, and a learning-rate finder trains before
``on_fit_start`` of the other callbacks. The strategy object is on every one of these paths.

Wrapped on the instance, once however many callbacks there are, for the life of the Trainer (``trainer.save_checkpoint`` works after
``fit`` too): ``lightning_module_state_dict``, ``optimizer_state``, ``save_checkpoint``, ``load_checkpoint``, ``setup_optimizers``,
and ``convert_module`` of the precision plug-in.

A checkpoint file is the same under all strategies. Lightning's FSDP strategies would gather the whole model to write one, and number
the optimizer's states by all parameters, frozen ones too, which no other strategy does; so what trains is gathered here
(``shards``). Their folders of pieces are written by them, and read by any strategy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.checkpoint import (
    ShardedCheckpoint,
    is_sharded,
    live_keys,
    load_checkpoint,
    manifest_of,
    stamp,
    strip_wrappers,
)
from lightning_peft.checkpoint.durable import write_durably
from lightning_peft.errors import ConfigError
from lightning_peft.surgery.handle import Handle
from lightning_peft.training import calibrating, restoring, units
from lightning_peft.training.adapted_root import other_keys, path_of
from lightning_peft.training.bookmark import Bookmark
from lightning_peft.training.namespace import is_a
from lightning_peft.training.shards import SHARDED, Shards, tensors_of
from lightning_peft.types import in_pieces

ATTRIBUTE = "_peft_hooks"


class Owner(Protocol):
    """What a PEFT callback offers here."""

    name: str

    @property
    def checkpoint(self) -> str:
        """What a checkpoint holds: ``adapter`` or ``full``."""

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint."""

    def handle_of(self, module: nn.Module) -> Handle | None:
        """Return this callback's adapter on a LightningModule, or None."""

    def extras_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return this callback's extra modules by path."""

    def install(self, module: nn.Module) -> Handle:
        """Install the adapter if it is not there."""

    def reach_optimizers(self, strategy: Any) -> None:
        """Bring the trainable parameters into the strategy's optimizers."""

    def finish_step(self, trainer: Any, *, idle: bool) -> bool:
        """Do what belongs to an optimizer step after it, once; return False where an earlier call was interrupted in it."""

    def say(self, module: nn.Module, text: str) -> None:
        """Print on rank zero."""


class TrainerHooks:
    """The wraps on one strategy object."""

    def __init__(self, strategy: Any) -> None:
        self.strategy = strategy
        self.owners: dict[str, Owner] = {}
        wrapped = ("lightning_module_state_dict", "optimizer_state", "save_checkpoint", "load_checkpoint", "setup_optimizers")
        for name in wrapped:
            setattr(strategy, name, functools.partial(getattr(self, name), getattr(strategy, name)))
        plugin = strategy.precision_plugin
        plugin.convert_module = functools.partial(self.convert_module, plugin.convert_module)
        self.bookmark = Bookmark(strategy, self.owners)
        write_durably(strategy.checkpoint_io)

    @classmethod
    def enter(cls, strategy: Any, owner: Owner) -> TrainerHooks:
        """Let ``owner`` take part in the hooks of a strategy object, wrapping it on first use.

        Raises:
            ConfigError: Two callbacks of one Trainer disagree about what a checkpoint holds.
        """
        hooks: TrainerHooks = strategy.__dict__.get(ATTRIBUTE) or cls(strategy)
        strategy.__dict__[ATTRIBUTE] = hooks
        other = next((o for o in hooks.owners.values() if o.checkpoint != owner.checkpoint and o.name != owner.name), None)
        if other is not None:
            raise ConfigError(
                f"PEFTCallback '{owner.name}' has checkpoint='{owner.checkpoint}' and '{other.name}' has "
                f"'{other.checkpoint}'. One file serves both; give them the same."
            )
        hooks.owners[owner.name] = owner
        return hooks

    @property
    def module(self) -> nn.Module:
        """The LightningModule of the run."""
        module: nn.Module = self.strategy.lightning_module
        return module

    def installed(self) -> list[tuple[Owner, Handle]]:
        """Return the owners whose adapter is on the module, in the order of the callbacks."""
        pairs = ((owner, owner.handle_of(self.module)) for owner in self.owners.values())
        return [(owner, handle) for owner, handle in pairs if handle is not None]

    # ------------------------------------------------------------------ what a checkpoint holds

    def kept(self) -> set[str] | None:
        """Return the state-dict keys that a checkpoint holds; None for all."""
        installed = self.installed()
        if not installed or installed[0][0].checkpoint == "full":
            return None
        return kept_keys(self.module, installed)

    @property
    def sharded(self) -> bool:
        """Parameters lie in pieces on several ranks."""
        return is_a(self.strategy, *SHARDED)

    def _gathers(self) -> bool:
        """Return whether a checkpoint is one file, which holds whole tensors, though they lie in pieces."""
        if not self.sharded or self.kept() is None:
            return False
        if is_a(self.strategy, "FSDPStrategy"):
            return bool(self.strategy._state_dict_type == "full")
        return not self.strategy._save_distributed_checkpoint

    def _shards(self) -> Shards:
        return Shards(self.strategy.model)

    def lightning_module_state_dict(self, original: Callable[[], Any]) -> Any:
        """Return the part of the module's state that a checkpoint holds; where it has to be gathered, on rank zero only."""
        keep = self.kept()
        if keep is not None and self._gathers():
            return self.whole_state(keep)
        with self._filtered():
            return original()

    def whole_state(self, keys: set[str]) -> dict[str, Tensor]:
        """Return tensors of the module by key, whole, on the CPU of rank zero; empty elsewhere. Every rank has to call it."""
        shards, state = self._shards(), {}
        for name, tensor in tensors_of(self.module).items():
            if name in keys:
                whole = shards.whole(tensor, tensor)
                if self.strategy.is_global_zero:
                    state[name] = whole.cpu()
        return state

    def optimizer_state(self, original: Callable[[Any], Any], optimizer: Any) -> Any:
        """Return an optimizer's state; where it has to be gathered, on rank zero only."""
        if not self._gathers():
            return original(optimizer)
        state = self._shards().optimizer_state(getattr(optimizer, "_optimizer", optimizer))
        return state if self.strategy.is_global_zero else {}

    def save_checkpoint(self, original: Callable[..., Any], checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Filter what other callbacks put into the checkpoint, stamp it with the manifests, save it."""
        installed = self.installed()
        if installed:
            keep = self.kept()
            if keep is not None:
                self._filter_others(checkpoint, keep)
            state = {strip_wrappers(k): v for k, v in checkpoint.get("state_dict", {}).items()}
            if self.sharded and not self._gathers():
                state = self.whole_state(kept_keys(self.module, installed))
            manifests = {o.name: m for o, h in installed if (m := self._manifest(o, h, state)) is not None}
            if manifests:
                stamp(checkpoint, manifests)
        return original(checkpoint, *args, **kwargs)

    def _filter_others(self, checkpoint: dict[str, Any], keep: set[str]) -> None:
        # WeightAveraging swaps full state dicts in, in its own hook; StochasticWeightAveraging keeps one in its state.
        holders: list[dict[str, Any]] = [checkpoint]
        holders += [s for s in checkpoint.get("callbacks", {}).values() if isinstance(s, dict)]
        for holder in holders:
            for name in ("state_dict", "current_model_state", "average_model_state"):
                state = holder.get(name)
                if isinstance(state, Mapping):
                    holder[name] = {k: v for k, v in state.items() if strip_wrappers(k) in keep}

    def _manifest(self, owner: Owner, handle: Handle, state: Mapping[str, Any]) -> dict[str, Any] | None:
        root = path_of(self.module, handle.root) or ""
        live = live_keys(handle, strip_wrappers(root))
        if not live.keys() or not set(live.values()) <= state.keys():
            return None  # a rank that holds no state: it is gathered on rank zero only
        others = other_keys(self.module, self.installed()) & state.keys()
        return manifest_of(
            handle,
            root=strip_wrappers(root),
            state={file: state[key] for file, key in live.items()},
            extra_state={key: state[key] for key in sorted(others)},
        )

    @contextmanager
    def _filtered(self) -> Iterator[None]:
        """Inside, ``state_dict()`` of the strategy's root returns kept keys only; DCP loads exactly the keys that it returns."""
        keep = self.kept()
        if keep is None:
            yield
            return
        # FSDP1's own hooks assert that every parameter of a unit is there, so the filter sits outside the outermost one.
        wrapped = is_a(self.strategy.model, "FullyShardedDataParallel")
        root = self.strategy.model if wrapped else self.module
        hook = root.register_state_dict_post_hook(functools.partial(_filter, keep))
        try:
            yield
        finally:
            hook.remove()

    # ------------------------------------------------------------------ loading

    def load_checkpoint(self, original: Callable[..., Any], path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a checkpoint and check it against the module before anything is loaded from it."""
        installed = self.installed()
        pieces = ShardedCheckpoint(Path(path)) if installed and is_sharded(Path(path)) else None
        own = "model" if is_a(self.strategy, "FSDPStrategy") else "state_dict"
        if pieces is not None and self.sharded and pieces.module_key == own:  # each rank reads what it needs
            restoring.prepare(pieces.read(values=False), f"'{path}'", self.module, installed, self._shards())
            with self._filtered():
                return original(path, *args, **kwargs)
        if installed and self.sharded and self.kept() is not None:
            return self._load_pieces(Path(path), *args, **kwargs)
        checkpoint = original(path, *args, **kwargs) if pieces is None else pieces.read()
        if installed and checkpoint.get("state_dict"):
            return restoring.prepare(checkpoint, f"'{path}'", self.module, installed)
        return checkpoint

    def _load_pieces(self, path: Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load whole tensors, which every rank reads, into what lies in pieces, optimizers included."""
        checkpoint = dict(load_checkpoint(path)) if weights_only is not False else torch.load(path, "cpu", weights_only=False)
        shards, live = self._shards(), tensors_of(self.module)
        checkpoint = restoring.prepare(checkpoint, f"'{path}'", self.module, self.installed(), shards)
        for key, value in checkpoint["state_dict"].items():
            shards.write(value, live[strip_wrappers(key)])
        trainer: Any = self.module.trainer
        if trainer.state.fn == "fit":
            states = checkpoint.get("optimizer_states", ())  # Lightning itself says what it thinks of a checkpoint without
            if states and len(states) != len(self.strategy.optimizers):
                raise ConfigError(f"'{path}' holds {len(states)} optimizers, this run has {len(self.strategy.optimizers)}.")
            for optimizer, state in zip(self.strategy.optimizers, states, strict=bool(states)):
                shards.load_optimizer_state(optimizer, state)
        return checkpoint

    # ------------------------------------------------------------------ between restore and fit

    def convert_module(self, original: Callable[[nn.Module], nn.Module], module: nn.Module) -> nn.Module:
        """Cast the module to the Trainer's precision, and give the adapters the wider dtype back that they were made with.

        Done here, after the restore and before the wrap and ``configure_optimizers``: later would be too late for DDP's buckets
        and would lose what a checkpoint restored.
        """
        saved = [
            (slot, slot.tensor().data)
            for _, handle in self.installed()
            for slot in handle.slots
            if not slot.claimed and slot.tensor().is_floating_point() and not slot.tensor().is_meta
        ]
        module = original(module)
        if is_a(self.strategy, "FSDPStrategy"):
            for owner, handle in self.installed():
                units.prepare_fsdp1(self.strategy, handle, functools.partial(owner.say, self.module))
            return module
        narrowed = [(slot, wide) for slot, wide in saved if slot.tensor().dtype.itemsize < wide.dtype.itemsize]
        for slot, wide in narrowed:
            if in_pieces([wide]):  # a DTensor takes no data of another dtype
                slot.owner._parameters[slot.attribute] = nn.Parameter(wide, slot.tensor().requires_grad)
            else:
                slot.tensor().data = wide.to(slot.tensor().device)
        if in_pieces(wide for _, wide in narrowed):
            module._apply(lambda tensor: tensor)  # FSDP2 takes note of new parameters after whatever moves a module
        return module

    def setup_optimizers(self, original: Callable[[Any], None], trainer: Any) -> None:
        """Let adapters that start from data find it, and ``configure_optimizers`` run; then bring the adapters into what it made."""
        for _, handle in self.installed():
            calibrating.calibrate(trainer, handle)
        original(trainer)
        for owner, _ in self.installed():
            owner.reach_optimizers(self.strategy)


def _filter(keep: set[str], module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and strip_wrappers(k[len(prefix) :]) not in keep]:
        del state[key]


def kept_keys(module: nn.Module, installed: list[tuple[Owner, Handle]]) -> set[str]:
    """Return the keys of all adapters, and of everything else that trains."""
    keys = other_keys(module, installed)
    for _, handle in installed:
        keys |= set(live_keys(handle, strip_wrappers(path_of(module, handle.root) or "")).values())
    return keys


__all__ = ["Owner", "TrainerHooks", "kept_keys"]
