"""Loading a Lightning checkpoint into a module with adapters: strict about adapters, lenient about a base that is not in the file."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.checkpoint import check_base, live_keys, manifests_of, strip_wrappers
from lightning_peft.errors import CompatibilityError, MergeError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.stack import RESERVED
from lightning_peft.surgery.tree import is_within
from lightning_peft.training.adapted_root import find_handle, other_keys, path_of
from lightning_peft.training.shards import Shards, tensors_of
from lightning_peft.types import in_pieces

if TYPE_CHECKING:
    from lightning_peft.training.trainer_hooks import Owner


def prepare(
    checkpoint: dict[str, Any], where: str, module: nn.Module, installed: list[tuple[Owner, Handle]], shards: Shards | None = None
) -> dict[str, Any]:
    """Check a loaded checkpoint against the module; nothing has been changed when it raises.

    Args:
        checkpoint: What Lightning read from the file.
        where: Names the file in messages.
        module: The LightningModule, adapters installed.
        installed: The callbacks and their adapters.
        shards: How the module lies over the ranks, if it does; its keys then stay as they are in the file.

    Returns:
        The checkpoint; for one that was made before PEFT, one that loads the base and starts everything else afresh.

    Raises:
        FormatError: A manifest is malformed, or of a newer format.
        CompatibilityError: Adapter tensors are missing, foreign or of another shape; or the adapter belongs to another base.
        MergeError: An adapter of the module is merged.
    """
    if shards is None:
        checkpoint = checkpoint | {
            part: renamed(checkpoint[part], module) for part in ("state_dict", "current_model_state") if checkpoint.get(part)
        }
    shapes = {id(tensor): tensor.shape if shards is None else shards.shape(tensor) for tensor in tensors_of(module).values()}
    state = {strip_wrappers(key): value for key, value in checkpoint["state_dict"].items()}
    adapter_keys = {key for key in state if RESERVED in key.split(".")}
    if "peft" not in checkpoint and not adapter_keys:
        return _before_peft(checkpoint, where, module, installed)
    known: set[str] = set()
    for owner, handle in installed:
        if handle.merged:
            raise MergeError(
                f"{where} cannot be loaded while adapter '{owner.name}' is merged into the base; unmerge() it first."
            )
        root = strip_wrappers(path_of(module, handle.root) or "")
        live = live_keys(handle, root)
        known |= set(live.values())
        _check_adapter(checkpoint, where, owner.name, handle, live, state, shapes)
        if "peft" in checkpoint:
            verdict = check_base(handle, manifests_of(checkpoint, where)[owner.name])
            if verdict is not None:
                owner.say(module, f"the base weights could not be compared with those of {where} (meta device or packed).")
    foreign = sorted(adapter_keys - known)
    if foreign:
        raise CompatibilityError(
            f"{where} also holds '{foreign[0]}', an adapter tensor that this module has no place for. Add the PEFTCallback that made "
            "it, with its name and strategy."
        )
    _check_extras(checkpoint, where, module, installed, state, shapes)
    for _, handle in installed:
        handle.calibrated = True  # what came from data is among the tensors
    return checkpoint


def renamed(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a state under the module's own keys: one of the two may be compiled, or wrapped otherwise."""
    own = {strip_wrappers(key): key for key in module.state_dict()}
    return {own.get(strip_wrappers(key), key): value for key, value in state.items()}


def _check_extras(
    checkpoint: Mapping[str, Any],
    where: str,
    module: nn.Module,
    installed: list[tuple[Owner, Handle]],
    state: Mapping[str, Any],
    shapes: Mapping[int, torch.Size],
) -> None:
    """Check that what trains beside the adapters is the same in the file and in the module."""
    wanted = other_keys(module, installed)
    tensors = tensors_of(module)
    missing = sorted(wanted & {strip_wrappers(name) for name, _ in module.named_parameters()} - state.keys())
    if missing:
        raise CompatibilityError(
            f"{where} lacks {_listed(missing)}, which trains here beside the adapter. Leave it out of extra_modules (or freeze it) as in "
            "the run that saved the file, or start a new run with PEFTCallback(init_from=...)."
        )
    roots = [strip_wrappers(path_of(module, handle.root) or "") for _, handle in installed]
    manifests = manifests_of(checkpoint, where).values() if "peft" in checkpoint else ()
    saved = {key for manifest in manifests for key in manifest["extra"]}
    # Outside the adapted roots it may have been frozen or not at the time; below them it trains as an extra module only.
    surplus = sorted(key for key in saved - wanted if any(is_within(key, root) for root in roots))
    if surplus:
        modules = sorted({key.rpartition(".")[0] for key in surplus})
        raise CompatibilityError(
            f"{where} also holds {_listed(surplus)}, which trained beside the adapter and is frozen here. Give PEFTCallback the "
            f"extra_modules of the run that saved it, such as extra_modules={modules[:3]}."
        )
    for key in sorted(wanted & state.keys() & tensors.keys()):
        shape = shapes[id(tensors[key])]
        if state[key].shape != shape:
            raise CompatibilityError(
                f"{where}: '{key}' has shape {tuple(state[key].shape)}, the module expects {tuple(shape)}. Build the module "
                "with the same head (number of labels)."
            )


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
    return ", ".join(f"'{key}'" for key in keys[:3]) + more


def _check_adapter(
    checkpoint: Mapping[str, Any],
    where: str,
    name: str,
    handle: Handle,
    live: dict[str, str],
    state: Mapping[str, Any],
    shapes: Mapping[int, torch.Size],
) -> None:
    if "peft" in checkpoint:
        manifests = manifests_of(checkpoint, where)
        if name not in manifests:
            raise CompatibilityError(
                f"{where} has no adapter '{name}', but {', '.join(repr(n) for n in manifests)}. Give the callback that name, or start "
                "from it with PEFTCallback(init_from=...)."
            )
    missing = [key for key in live.values() if key not in state]
    if missing:
        raise CompatibilityError(
            f"{where} lacks {len(missing)} of {len(live)} tensors of adapter '{name}', such as '{missing[0]}'. It was made with "
            "another strategy or other targets, or is damaged; the base is not touched."
        )
    for slot in handle.slots:
        found, shape = state[live[slot.key]], shapes.get(id(slot.tensor()), slot.tensor().shape)
        if found.shape != shape:
            raise CompatibilityError(
                f"{where}: '{live[slot.key]}' has shape {tuple(found.shape)}, the module expects {tuple(shape)}. It was "
                "made with another rank or for another base."
            )


def _before_peft(
    checkpoint: dict[str, Any], where: str, module: nn.Module, installed: list[tuple[Owner, Handle]]
) -> dict[str, Any]:
    """Load the base from a full checkpoint that knows no adapters, and install fresh ones on it."""
    if in_pieces(module.parameters()):
        raise CompatibilityError(
            f"{where} was made before PEFT, and cannot become the base of a module that is sharded. Load it into the module before "
            "sharding (module.load_state_dict), and train from there without ckpt_path."
        )
    low = next((path for path, part in module.named_modules() if backend_of(part) is not None), None)
    if low is not None:
        raise CompatibilityError(
            f"{where} was made before PEFT and holds dense weights, and '{low}' is quantized. Load it into the dense module first "
            "(module.load_state_dict), then quantize and train from there without ckpt_path."
        )
    state = checkpoint["state_dict"]
    base = {k: v for k, v in module.state_dict().items() if RESERVED not in k.split(".")}
    missing = sorted(base.keys() - state.keys())
    if missing:
        raise CompatibilityError(
            f"{where} holds no adapter, and it is no full checkpoint of {type(module).__name__} either: '{missing[0]}' is not in it. "
            "Resume from a checkpoint that was saved with this PEFTCallback."
        )
    foreign = sorted(state.keys() - base.keys())
    if foreign:
        raise CompatibilityError(
            f"{where} was made before PEFT, of another module: {type(module).__name__} has no place for {_listed(foreign)}. Build the "
            "module as it was then."
        )
    for key, tensor in base.items():
        if isinstance(tensor, Tensor) and tensor.shape != state[key].shape:
            raise CompatibilityError(
                f"{where} was made before PEFT, of another module: '{key}' has shape {tuple(state[key].shape)}, "
                f"{type(module).__name__} expects {tuple(tensor.shape)}. Build the module with the same sizes (number of labels)."
            )
    for _, handle in reversed(installed):
        handle.remove()
    try:
        module.load_state_dict(state)
    finally:
        for owner, _ in installed:
            owner.install(module)
    installed[0][0].say(
        module, f"{where} was made before PEFT: its weights are the base now; adapters, optimizer, epoch and step start afresh."
    )
    fresh = {k: v for k, v in checkpoint.items() if k != "loops"}
    return fresh | {
        "state_dict": module.state_dict(), "callbacks": {}, "optimizer_states": [], "lr_schedulers": [], "epoch": 0, "global_step": 0
    }  # fmt: skip


def lenient(module: nn.Module, names: tuple[str, ...]) -> RemovableHandle:
    """Let ``load_state_dict`` accept a state without the base, and nothing less than all adapters.

    A hook on the module and not an argument of one call, since WeightAveraging and others load by themselves. It works from the
    adapters that the module (or its deep copy) has, so that it may be copied and pickled.
    """
    hook: RemovableHandle = module.register_load_state_dict_post_hook(functools.partial(_after_load, names))
    return hook


def _after_load(names: tuple[str, ...], module: nn.Module, incompatible: Any) -> None:
    missing = {strip_wrappers(key) for key in incompatible.missing_keys}
    handles = [handle for name in names if (handle := find_handle(module, name)) is not None]
    roots = [strip_wrappers(path_of(module, handle.root) or "") for handle in handles]
    strict = {key for handle, root in zip(handles, roots, strict=True) for key in live_keys(handle, root).values()}
    lost = sorted(key for key in strict if any(m == key or m.endswith("." + key) for m in missing))
    if lost:
        raise CompatibilityError(
            f"the state lacks {len(lost)} adapter tensors, such as '{lost[0]}': the adapter would keep its random values. It was made "
            "with another strategy or other targets."
        )
    frozen = {strip_wrappers(n) for n, p in module.named_parameters() if not p.requires_grad} - strict
    frozen = {key for key in frozen if any(is_within(key, root) for root in roots)}
    absent = {key for key in frozen if any(m == key or m.endswith("." + key) for m in missing)}
    if absent == frozen:  # the base as a whole is elsewhere; a part of it missing is an error as ever
        trained = {strip_wrappers(n) for n, p in module.named_parameters() if p.requires_grad}
        incompatible.missing_keys[:] = [
            k
            for k in incompatible.missing_keys
            if any(strip_wrappers(k) == t or strip_wrappers(k).endswith("." + t) for t in trained)
        ]


def warn_of_stateless_loader(trainer: Any) -> None:
    """Name the loaders that cannot continue in the middle of an epoch, when a run resumes there."""
    loop = trainer.fit_loop
    progress = loop.epoch_loop.batch_progress
    if not (loop.restarting or loop.epoch_loop.restarting) or progress.current.ready == 0 or progress.is_last_batch:
        return
    ahead = loop._data_fetcher.length is None and bool(getattr(loop._data_fetcher, "batches", ()))
    for loader in loop._combined_loader.flattened:
        stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        if stateful and ahead:
            warnings.warn(
                f"{type(loader).__name__} has no length, so Lightning reads it one batch ahead, and saved its state there: the run goes "
                "on without that batch. Give it a __len__, or resume at the end of an epoch.",
                stacklevel=2,
            )
        if not stateful:
            warnings.warn(
                f"the checkpoint is from batch {progress.current.ready} of an epoch, and {type(loader).__name__} over "
                f"{type(getattr(loader, 'dataset', None)).__name__} has no state to continue from: the rest of this epoch sees other "
                "batches than the interrupted run. Resume at the end of an epoch, or use a loader with state_dict (PEFTDataModule has "
                "one).",
                stacklevel=2,
            )
