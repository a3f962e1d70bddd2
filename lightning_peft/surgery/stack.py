"""The reserved child ``peft`` of an adapted module, and the forward that runs it.

Installing an adapter sets ``module.forward`` on the instance to :class:`AdaptedForward`, a ``functools.partial`` of a module-level
function: of the ways to do it, this one survives deepcopy, pickle and torch.compile. Class, parameter names, state-dict keys and
values of the base module stay what they were.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import AdapterBypassedError, ConflictError
from lightning_peft.nn.adapter import AdapterModule, MergeableModule
from lightning_peft.surgery.layers import parameter
from lightning_peft.surgery.sites import LayerCall, Site, split_input

if TYPE_CHECKING:
    from lightning_peft.surgery.handle import Handle

RESERVED = "peft"
Call = Callable[..., Any]


class CallAdapter(nn.Module, ABC):
    """An adapter of a whole call instead of one tensor: soft prompts, side networks."""

    traced_alone: ClassVar[bool] = True  # a block with it can run outside its body, as for the estimate of its cost
    innermost: ClassVar[bool] = False  # it runs inside the adapters installed before it: what these pass on is what it reads

    @abstractmethod
    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output, given its forward ``base`` with the adapters installed before this one."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Initialise all parameters, the same way on every rank."""


@dataclass(eq=False)
class Entry(ABC):
    """One adapter on one module.

    Args:
        name: Name of the handle.
        member: Tells apart several adapters of one handle on one module.
        module: The adapted module.
        path: Its path, relative to the adapted root.
        adapter: The adapter's module.
        label: Which part of a composition it belongs to; empty outside compositions.
        conditional: The module may legally not run in a complete forward.
    """

    name: str
    member: str | None
    module: nn.Module
    path: str
    adapter: nn.Module
    label: str = ""
    conditional: bool = False
    enabled: bool = True
    merged: bool = False

    @property
    def active(self) -> bool:
        """The adapter takes part in the forward."""
        return self.enabled and not self.merged

    @property
    def key(self) -> str:
        """Prefix of this adapter's tensors in files: ``<path>[.<member>]``."""
        return ".".join(p for p in (self.path, self.member) if p)


@dataclass(eq=False, kw_only=True)
class AttachEntry(Entry):
    """An adapter that joins the forward of the module: it calls the layer itself."""

    site: Site

    @property
    def reads_base_weight(self) -> bool:
        """The adapter's forward depends on the values of the base weight."""
        return isinstance(self.adapter, AdapterModule) and self.adapter.reads_base_weight

    def run(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        """Call the adapter around ``inner``."""
        x, rest = split_input(self.module, args, kwargs)
        base = LayerCall(self.site, self.module, inner, rest)
        return base.finish(x, self.adapter(base, x))


@dataclass(eq=False, kw_only=True)
class ReparametrizeEntry(Entry):
    """An adapter whose effective weight stands in for the stored one while the module runs."""

    site: Site


@dataclass(eq=False, kw_only=True)
class CallEntry(Entry):
    """A :class:`CallAdapter` around the module's forward."""

    exclusive: bool = False

    def run(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        """Call the adapter around ``inner``."""
        return self.adapter(inner, *args, **kwargs)


class AdapterStack(nn.Module):
    """Adapters of one module in install order; at the adapted root also the registry of handles.

    Children are named after the handle, or ``<handle>.<member>``, so that the state dict is base keys plus
    ``<path>.peft.<name>[.<member>].<parameter>``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.training = module.training
        self._entries: list[Entry] = []
        self._handles: dict[str, Handle] = {}
        self._frozen: list[tuple[nn.Module, str, bool]] = []
        self._ran = False
        # accelerate and others set a forward of their own on the instance: it stays inside and comes back on removal.
        self._inner: Call | None = module.__dict__.get("forward")
        self._on_close: list[Callable[[], object]] = []

    def forward(self, x: Any) -> Any:
        """Return ``x``: an adapted root that is an nn.Sequential runs all its children, this one last."""
        return x

    def add(self, entry: Entry) -> None:
        """Append an adapter; it nests outside those installed before, unless it has to be the innermost one."""
        self.register(entry.name, entry.member, entry.adapter)
        innermost = isinstance(entry.adapter, CallAdapter) and entry.adapter.innermost
        self._entries.insert(0 if innermost else len(self._entries), entry)
        self._ran = False

    def register(self, name: str, member: str | None, adapter: nn.Module) -> None:
        """Make ``adapter`` the child ``name`` or ``name.member``.

        Raises:
            ConflictError: The place is taken, or the name is an attribute of nn.Module.
        """
        holder: nn.Module = self
        if member is not None:
            if name not in self._modules:
                self.add_module(name, nn.Module())
            holder, name = self._modules[name], member  # type: ignore[assignment]
        if hasattr(holder, name):
            raise ConflictError(f"the name '{name}' is taken, or is an attribute of nn.Module; choose another one.")
        holder.add_module(name, adapter.train(self.training))

    def discard(self, name: str) -> None:
        """Drop every adapter of the handle ``name``."""
        self._modules.pop(name, None)
        self._entries = [e for e in self._entries if e.name != name]

    @property
    def empty(self) -> bool:
        """Nothing is left that needs this stack."""
        return not self._entries and not self._handles and not self._modules

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module with its active adapters."""
        self._ran = True
        call: Call = self._inner or functools.partial(type(module).forward, module)
        weights: list[ReparametrizeEntry] = []
        for entry in self._entries:
            if not entry.active:
                continue
            if isinstance(entry, ReparametrizeEntry):
                weights.append(entry)
            else:
                call = functools.partial(entry.run, call)  # type: ignore[attr-defined]
        out = _call_with_weights(module, weights, call, args, kwargs) if weights else call(*args, **kwargs)
        for handle in self._handles.values():
            if not handle.checked and not torch.compiler.is_compiling():
                handle.check_ran()
        return out


def _call_with_weights(
    module: nn.Module, entries: list[ReparametrizeEntry], call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run ``call`` while the effective tensors stand in for the stored ones.

    A name in the instance's ``__dict__`` is found before ``nn.Module.__getattr__`` looks among the parameters, so the registered
    parameter, and with it the state dict and every optimizer, never notices.
    """
    values: dict[str, Tensor] = {}
    for entry in entries:
        assert isinstance(entry.adapter, MergeableModule)
        site = entry.site
        full = values.get(site.tensor, parameter(module, site.tensor))
        part = site.kind.canonical(full)
        part = part if site.rows is None else site.rows.take(part, -2)
        bias_name = site.bias_name(module)
        bias = None if bias_name is None else values.get(bias_name, parameter(module, bias_name))
        bias_part = bias if bias is None or site.rows is None else site.rows.take(bias, -1)
        weight, new_bias = entry.adapter.merged(part, bias_part)
        values[site.tensor] = site.effective(module, weight, full)
        if new_bias is not bias_part and bias_name is not None and bias is not None and new_bias is not None:
            values[bias_name] = new_bias if site.rows is None else site.rows.put(bias, new_bias, -1)
    swapped: list[tuple[nn.Module, str]] = []
    try:
        for name, value in values.items():
            path, _, attribute = name.rpartition(".")
            owner = module.get_submodule(path) if path else module
            owner.__dict__[attribute] = value
            swapped.append((owner, attribute))
        return call(*args, **kwargs)
    finally:
        for owner, attribute in swapped:
            del owner.__dict__[attribute]


def run_adapters(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Forward of every adapted module."""
    stack = stack_of(module)
    assert stack is not None
    return stack.run(module, args, kwargs)


class AdaptedForward(functools.partial):  # type: ignore[type-arg]
    """``partial(run_adapters, module)`` that shows the signature of the class's own forward, which generate() inspects."""

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.args[0]).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])


def noop_pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Do nothing: a child that has a hook makes nn.TransformerEncoderLayer leave its fast path, which calls no child."""


def stack_of(module: nn.Module) -> AdapterStack | None:
    """Return the stack of an adapted module, or None."""
    stack = module._modules.get(RESERVED, module.__dict__.get(RESERVED))
    return stack if isinstance(stack, AdapterStack) else None


def stacks(root: nn.Module) -> Iterator[tuple[str, nn.Module, AdapterStack]]:
    """Yield (path, module, stack) of every adapted module below ``root``."""
    for path, module in root.named_modules():
        stack = stack_of(module)
        if stack is not None:
            yield path, module, stack


def bypass_error(name: str, paths: list[str]) -> AdapterBypassedError:
    """Return the error for adapted modules that did not run."""
    shown = ", ".join(repr(p) for p in paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
    return AdapterBypassedError(
        f"adapter '{name}': the adapted module {shown} did not run in a complete forward, so its adapter has no effect. The model "
        "reads its weight directly, takes a fast path, or does not use it for this input. Exclude it from the targets, or "
        "target the module whose forward runs."
    )
