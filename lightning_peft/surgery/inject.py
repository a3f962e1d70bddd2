"""Installing a plan: every check first, then every edit, and nothing at all when one of them fails."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, ConflictError, FormatError, MergeError, TargetError
from lightning_peft.nn.adapter import BuildContext, LayerSpec
from lightning_peft.quantization.backend import prepare
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan, Train
from lightning_peft.surgery.fingerprint import base_fingerprint
from lightning_peft.surgery.handle import Handle, Slot
from lightning_peft.surgery.layers import CONTAINERS, MODULE, parameter
from lightning_peft.surgery.recompute import RecomputedForward
from lightning_peft.surgery.stack import (
    RESERVED,
    AdaptedForward,
    AdapterStack,
    AttachEntry,
    CallEntry,
    Entry,
    ReparametrizeEntry,
    noop_pre_hook,
    run_adapters,
    stack_of,
    stacks,
)
from lightning_peft.types import AdapterDtype, resolve_adapter_dtype, stable_seed

NAME = re.compile(r"[A-Za-z0-9_-]+")
SHARED = "shared"
_NESTED = "_peft_use_nested_tensor"


class Surgery:
    """One installation in progress. Edits act through it, so that undo is written once."""

    def __init__(
        self, root: nn.Module, anatomy: Anatomy, handle: Handle, adapter_dtype: AdapterDtype, room: int | None = None
    ) -> None:
        self.root, self.anatomy, self.handle, self.adapter_dtype, self.room = root, anatomy, handle, adapter_dtype, room
        self.name = handle.name
        # Not drawn from the global generator, whose state stays untouched, but following the user's seed.
        self.seed = torch.initial_seed()

    @functools.cached_property
    def _has_fast_path(self) -> bool:
        """Some module is torch's own transformer; asked once, since walking up from every layer is slow."""
        return any(isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerEncoder)) for m in self.anatomy.tree.modules.values())

    @property
    def handles(self) -> dict[str, Handle]:
        """Handles already installed on the root."""
        stack = stack_of(self.root)
        return {} if stack is None else stack._handles

    def undo(self, step: Callable[..., object], *args: object) -> None:
        """Note how to take the next change back."""
        self.handle._restore.append(functools.partial(step, *args))

    def context(
        self,
        path: str,
        spec: LayerSpec,
        weight: Callable[[], Tensor],
        place: tuple[str, ...],
        label: str = "",
        residual: Callable[[], tuple[Tensor, Tensor] | None] = lambda: None,
    ) -> BuildContext:
        """Return what the adapter at ``path`` may know when it is built."""
        dtype = resolve_adapter_dtype(self.adapter_dtype, spec.dtype)
        seed = stable_seed(self.seed, self.name, *place)
        prefix = f"{label}-" if label else ""
        shared = {n.removeprefix(prefix): m for n, m in self.handle.shared.items() if n.startswith(prefix)}
        return BuildContext(path, spec, weight, dtype, spec.device, seed, shared, residual, self._claim)

    def _claim(self, entries: int) -> None:
        if self.room is None:
            return
        self.room -= entries
        if self.room < 0:
            raise FormatError(
                f"{type(self.handle.strategy).__name__} would make more adapter tensors than the file holds; one of {entries:,} numbers "
                "finds no room. The strategy in the file was changed, or the model is another one."
            )

    def call_context(self, path: str, place: tuple[str, ...], label: str = "") -> BuildContext:
        """Return what an adapter of a whole call may know."""
        spec = MODULE.spec(self.root.get_submodule(path), "")
        return self.context(path, spec, _no_weight, place, label)

    def open(self, path: str) -> AdapterStack:
        """Return the stack of the module at ``path``, installing it on first use."""
        module = self.root.get_submodule(path)
        self.undo(_close, module)
        stack = stack_of(module)
        if stack is None:
            stack = AdapterStack(module)
            if isinstance(module, CONTAINERS):
                module.__dict__[RESERVED] = stack  # a child would be counted by len(net) and reached by net[-1]
            else:
                module.add_module(RESERVED, stack)
            module.forward = AdaptedForward(run_adapters, module)
            self._leave_fast_path(path, module, stack)
        return stack

    def _holding(self, path: str) -> AdapterStack:
        """Return the stack at ``path``, where state_dict() and to() find the tensors it is about to get: as a child."""
        stack, module = self.open(path), self.root.get_submodule(path)
        if module.__dict__.pop(RESERVED, None) is not None:
            module.add_module(RESERVED, stack)
        return stack

    def _leave_fast_path(self, path: str, module: nn.Module, stack: AdapterStack) -> None:
        if not self._has_fast_path:
            return
        parents = [self.root.get_submodule(path[: m.start()]) for m in re.finditer(r"\.", path)]
        parents += [self.root] if path else []
        if any(isinstance(p, nn.TransformerEncoderLayer) for p in parents):
            hook = module.register_forward_pre_hook(noop_pre_hook)
            stack._on_close.append(functools.partial(_drop_pre_hook, module, hook.id))
        for parent in parents:
            if isinstance(parent, nn.TransformerEncoder):
                parent.__dict__.setdefault(_NESTED, parent.use_nested_tensor)
                parent.use_nested_tensor = False
                stack._on_close.append(functools.partial(_restore_nested_tensor, parent))

    def add_shared(self, name: str, module: nn.Module) -> None:
        """Keep a module that several adapters of this handle use, once, at the root."""
        stack = self._holding("")
        self.undo(stack.discard, self.name)
        stack.register(self.name, f"{SHARED}-{name}", module)
        self.handle.shared[name] = module
        self._own(module, f"{SHARED}-{name}", name.rpartition("-")[0])

    def add_entry(self, entry: Entry) -> None:
        """Install an adapter on its module and own its tensors."""
        stack = self._holding(entry.path)
        if isinstance(entry, ReparametrizeEntry):
            below = [e for e in stack._entries if not isinstance(e, ReparametrizeEntry)]
            if below:
                raise ConflictError(
                    f"'{entry.path}' already has '{below[0].name}' around its forward; a reparametrized weight would act below it, "
                    "against the install order. Install this one first, or choose other targets."
                )
        if isinstance(entry, AttachEntry) and entry.reads_base_weight:
            below = [e for e in stack._entries if isinstance(e, AttachEntry) and e.site.overlaps(entry.site)]
            if below:
                raise ConflictError(
                    f"'{entry.site.key}' already has '{below[0].name}', and {type(entry.adapter).__name__} reads the weight of the base "
                    "in its forward, where that one's effect is not. Install this one first, or choose other targets."
                )
        owner = next((e for e in stack._entries if isinstance(e, CallEntry) and e.exclusive), None)
        if owner is not None and isinstance(entry, CallEntry) and entry.exclusive:
            raise ConflictError(
                f"'{entry.path or 'the root'}' is already run by adapter '{owner.name}'; a container has one owner."
            )
        self.undo(stack.discard, self.name)
        self.undo(setattr, stack, "_ran", stack._ran)  # the stack may be another adapter's
        stack.add(entry)
        entry.conditional = self.anatomy.conditional(entry.path)
        self.handle.entries.append(entry)
        self._own(entry.adapter, entry.key, entry.label)

    def _own(self, adapter: nn.Module, key: str, label: str) -> None:
        for path, owner in adapter.named_modules():
            prefix = ".".join(p for p in (key, path) if p)
            tensors = {n: t for n, t in owner._parameters.items() if t is not None}
            tensors |= {n: t for n, t in owner._buffers.items() if t is not None and n not in owner._non_persistent_buffers_set}
            for attribute, tensor in tensors.items():
                file_key = f"{prefix}.{attribute}" if prefix else attribute
                self.handle.slots.append(Slot(owner, attribute, file_key, tensor.requires_grad, label=label))

    def claim(self, path: str, tensor: str, label: str) -> None:
        """Train a parameter of the base in place; its original value is kept for ``disabled()`` and ``remove()``."""
        dotted, _, attribute = tensor.rpartition(".")
        owner = self.root.get_submodule(".".join(p for p in (path, dotted) if p))
        value = getattr(owner, attribute)
        key = ".".join(p for p in (path, tensor) if p)
        taken = [h.name for h in self.handles.values() if any(s.claimed and s.tensor() is value for s in h.slots)]
        if taken or any(s.claimed and s.tensor() is value for s in self.handle.slots):
            raise ConflictError(
                f"'{key}' is already trained by {f'adapter {taken[0]!r}' if taken else 'another part of this adapter'}."
            )
        self.handle.slots.append(Slot(owner, attribute, key, trainable=True, claimed=True, label=label))
        self.handle._originals[key] = value.detach().clone()

    def prepare_base(self) -> None:
        """Make quantized layers safe to train and read while adapters are installed; the last handle out puts them back."""
        stack = self.open("")
        if not stack._handles:
            stack._on_close.append(prepare(self.root))

    def register(self) -> None:
        """Enter the handle into the root's registry and freeze the base."""
        stack = self.open("")
        if not stack._handles:
            stack._frozen = [
                (module, name, p.requires_grad)
                for path, module in self.root.named_modules()
                if RESERVED not in path.split(".")
                for name, p in module._parameters.items()
                if p is not None
            ]
        self.undo(_unregister, self.root, self.name)
        stack._handles[self.name] = self.handle
        _freeze(stack)


def _no_weight() -> Tensor:
    raise TargetError("this place has no weight of its own")


def _close(module: nn.Module) -> None:
    """Take the stack off a module that needs it no longer; the last one out restores the forward."""
    stack = stack_of(module)
    if stack is None or not stack.empty:
        return
    module._modules.pop(RESERVED, None)
    module.__dict__.pop(RESERVED, None)
    if isinstance(outer := module.__dict__.get("forward"), RecomputedForward):  # gradient checkpointing, switched on later
        outer.recompute.inner = stack._inner
    else:
        del module.forward
        if stack._inner is not None:
            module.forward = stack._inner
    for step in stack._on_close:
        step()


def _drop_pre_hook(module: nn.Module, key: int) -> None:
    # A function of the module: a bound `dict.pop` would not be copied by deepcopy, and the copy would unhook the original.
    module._forward_pre_hooks.pop(key, None)


def _restore_nested_tensor(encoder: nn.TransformerEncoder) -> None:
    if not any(path for path, _, _ in stacks(encoder)):
        encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED)


def _unregister(root: nn.Module, name: str) -> None:
    stack = stack_of(root)
    assert stack is not None
    stack._handles.pop(name, None)
    if stack._handles:
        _freeze(stack)
        return
    for module, attribute, flag in stack._frozen:
        value = module._parameters.get(attribute)
        if value is not None:
            value.requires_grad_(flag)
    stack._frozen = []


def _freeze(stack: AdapterStack) -> None:
    """Freeze every base parameter that no handle has claimed."""
    for module, attribute, _ in stack._frozen:
        value = module._parameters.get(attribute)
        if value is not None and value.requires_grad:
            value.requires_grad_(False)
    for handle in stack._handles.values():
        for slot in handle.slots:
            if slot.claimed:
                slot.tensor().requires_grad_(True)


def apply_plan(
    root: nn.Module,
    plan: Plan,
    anatomy: Anatomy,
    strategy: Any,
    *,
    name: str,
    adapter_dtype: AdapterDtype = "auto",
    room: int | None = None,
) -> Handle:
    """Install ``plan`` on ``root`` and return its handle; on any error the model is left bit-identical.

    Args:
        root: The model.
        plan: What to change.
        anatomy: What is known about the model.
        strategy: What made the plan.
        name: Name of the adapter.
        adapter_dtype: dtype of its parameters.
        room: The most numbers that its own tensors may have together: those of the file that they are for. None sets no bound.

    Raises:
        FormatError: ``room`` is too little.
        ConfigError: The name has characters other than letters, digits, ``_`` and ``-``.
        TargetError: The plan changes nothing.
        ConflictError: The name is taken, two edits share a place, or the base has a child ``peft`` of its own.
    """
    handle = Handle(root, name, strategy)
    surgery = Surgery(root, anatomy, handle, adapter_dtype, room)
    _check(surgery, plan)
    try:
        surgery.prepare_base()
        handle.base_fingerprint = base_fingerprint(root)
        with torch.inference_mode(False):  # parameters made in inference mode could never train
            for shared, build in plan.shared.items():
                surgery.add_shared(shared, build(surgery.call_context("", (SHARED, shared))))
            for edit in plan.edits:
                edit.apply(surgery)
        surgery.register()
    except BaseException:
        while handle._restore:
            handle._restore.pop()()
        raise
    return handle


def _check(surgery: Surgery, plan: Plan) -> None:
    name = surgery.name
    if not NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r}: use letters, digits, '_' and '-' only; it becomes part of parameter names.")
    if name in surgery.handles:
        raise ConflictError(f"an adapter named '{name}' is installed already. Choose another name, or remove() it first.")
    if not plan.edits:
        raise TargetError(f"{type(surgery.handle.strategy).__name__} would change nothing in {type(surgery.root).__name__}.")
    inner = [path for path, _, stack in stacks(surgery.root) if path and stack._handles]
    if inner:
        raise ConflictError(f"'{inner[0]}' is an adapted root already; inject into that module, or remove() its adapters first.")
    outer = [(path, e.name) for path, _, stack in stacks(surgery.root) for e in stack._entries if e.name not in surgery.handles]
    if outer:
        raise ConflictError(
            f"'{outer[0][0] or 'the root'}' belongs to adapter '{outer[0][1]}' of an enclosing module. Inject into that module, or "
            "remove() the adapter."
        )
    for path, module in surgery.root.named_modules():
        if hasattr(module, RESERVED) and stack_of(module) is None:
            raise ConflictError(f"'{path or 'the root'}' has an attribute '{RESERVED}' of its own, a name reserved for adapters.")
    places: set[tuple[str, str]] = set()
    for edit in plan.edits:
        if edit.place in places:
            raise ConflictError(f"two edits of one strategy meet at {edit.place[0] or 'the root'!r}; narrow their targets.")
        places.add(edit.place)
        edit.check(surgery)
    _check_merged(surgery, plan)


def _check_merged(surgery: Surgery, plan: Plan) -> None:
    """Refuse adapters over a merged one, and training a weight that holds one: originals would be kept with its effect inside."""
    held = {id(parameter(e.module, e.site.tensor)): h.name for h in surgery.handles.values() for e in h.merged_entries()}
    for edit in plan.edits:
        if isinstance(edit, Train):
            name = held.get(id(parameter(surgery.root.get_submodule(edit.path), edit.tensor)))
        else:
            name = next(iter(held.values()), None)
        if name is not None:
            raise MergeError(f"adapter '{name}' is merged into the base; unmerge() it before installing '{surgery.name}'.")
