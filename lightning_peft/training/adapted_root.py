"""Where adapters go inside a LightningModule: the adapted root, targets as the user sees them, extra modules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from lightning_peft.errors import ConflictError, TargetError, did_you_mean
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.fingerprint import strip_wrappers
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.surgery.stack import RESERVED, stack_of, stacks
from lightning_peft.surgery.targets import REGEX, Targets
from lightning_peft.surgery.tree import is_within


def find_root(module: nn.Module, attribute: str | None) -> tuple[str, nn.Module]:
    """Return (path, module) of the adapted root.

    Args:
        module: The LightningModule.
        attribute: Dotted path of the root in it; ``""`` for the LightningModule itself; None for its only child with parameters,
            or itself when there are several.

    Raises:
        TargetError: There is no module at this path.
    """
    if attribute is None:
        holders = [n for n, child in module.named_children() if n != RESERVED and next(child.parameters(), None) is not None]
        own = next(module.parameters(recurse=False), None)
        attribute = holders[0] if len(holders) == 1 and own is None else ""
    path, root = attribute, _submodule(module, attribute, "module")
    while isinstance(compiled := root._modules.get("_orig_mod"), nn.Module):  # what torch.compile wraps is the model
        path, root = f"{path}._orig_mod" if path else "_orig_mod", compiled
    return path, root


def path_of(module: nn.Module, child: nn.Module) -> str | None:
    """Return the path of ``child`` in ``module``, or None when it is not in there."""
    return next((path for path, other in module.named_modules() if other is child), None)


def find_handle(module: nn.Module, name: str) -> Handle | None:
    """Return the adapter ``name`` that is installed on ``module`` or below it, or None."""
    return handles(module).get(name)


def localized(strategy: PEFTStrategy, path: str, anatomy: Anatomy) -> PEFTStrategy:
    """Return the strategy with targets relative to the adapted root, however the user wrote them (``net.0`` or ``0``).

    Names and globs may start with the root's path; roles and regular expressions are always the root's own.
    """
    if not path or path.split(".")[0] in anatomy.root._modules:  # a child of that name: the pattern means it
        return strategy
    return _localized(strategy, functools.partial(_strip, head=f"{path}.", anatomy=anatomy))


def _localized(strategy: PEFTStrategy, strip: Callable[[Any], Any]) -> PEFTStrategy:
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(strategy):
        value = getattr(strategy, field.name)
        if isinstance(value, Targets):
            parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            value = Targets(**{k: strip(v) for k, v in parts.items()})
        elif field.name.endswith("_per_target") and isinstance(value, Mapping):
            value = {strip(k): v for k, v in value.items()}
        elif isinstance(value, PEFTStrategy):
            value = _localized(value, strip)
        elif isinstance(value, tuple) and any(isinstance(v, PEFTStrategy) for v in value):
            value = tuple(_localized(v, strip) if isinstance(v, PEFTStrategy) else v for v in value)
        if value != getattr(strategy, field.name):
            changes[field.name] = value
    return dataclasses.replace(strategy, **changes) if changes else strategy


def strip_root(options: QuantizeOptions, path: str, anatomy: Anatomy) -> QuantizeOptions:
    """Return options with names of layers relative to the adapted root, as :func:`localized` does for a strategy."""
    if not path or path.split(".")[0] in anatomy.root._modules:
        return options
    head, loftq = f"{path}.", options.loftq
    if loftq is not None and loftq.targets is not None:
        loftq = dataclasses.replace(loftq, targets=_strip(loftq.targets, head=head, anatomy=anatomy))
    return dataclasses.replace(options, skip=_strip(options.skip, head=head, anatomy=anatomy), loftq=loftq)


def _strip(value: Any, *, head: str, anatomy: Anatomy) -> Any:
    if isinstance(value, tuple):
        return tuple(_strip(v, head=head, anatomy=anatomy) for v in value)
    if not isinstance(value, str) or value.startswith(REGEX) or anatomy.role_names(value):
        return value
    return value.removeprefix(head)


def find_extras(module: nn.Module, root: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Return the extra modules by their path in the LightningModule; given as seen there, or relative to the root.

    Raises:
        TargetError: There is no such module.
        ConflictError: One holds the adapted root or adapted layers.
    """
    found: dict[str, nn.Module] = {}
    for path in paths:
        holder = root if not _has(module, path) and _has(root, path) else module
        extra = _submodule(holder, path, "extra_modules")
        full = path_of(module, extra)
        assert full is not None
        if any(child is root for child in extra.modules()):
            raise ConflictError(f"extra module '{path}' holds the adapted root; name a task head or another part beside it.")
        adapted = next((p for p, _, _ in stacks(extra)), None)
        if adapted is not None:
            raise ConflictError(
                f"extra module '{path}' trains whole, but '{path}{'.' if adapted else ''}{adapted}' has an adapter too. Exclude it "
                "from the targets, or from extra_modules."
            )
        found[full] = extra
    return found


def train_whole(handle: Handle, extras: Collection[nn.Module]) -> None:
    """Let all parameters of the extra modules train, also while other handles come and go; undone by ``handle.remove()``."""
    stack = stack_of(handle.root)
    assert stack is not None
    owned = {id(m) for extra in extras for m in extra.modules()}
    frozen = [entry for entry in stack._frozen if id(entry[0]) in owned]
    stack._frozen = [entry for entry in stack._frozen if id(entry[0]) not in owned]
    for owner, name, flag in frozen:
        handle._restore.append(functools.partial(_set_flag, owner, name, flag))
    for extra in extras:
        for parameter in extra.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(True)


class HasExtras(Protocol):
    """What has extra modules: a PEFT callback."""

    def extras_of(self, module: nn.Module) -> dict[str, nn.Module]:
        """Return the extra modules by path."""


def other_keys(module: nn.Module, installed: Sequence[tuple[HasExtras, Handle]]) -> set[str]:
    """Return the keys that go into a checkpoint beside the adapters'.

    These are all tensors of extra modules; and outside the adapted roots, parameters that train and persistent buffers, except
    buffers of a part whose parameters are all frozen (a teacher).
    """
    whole = [path for owner, _ in installed for path in owner.extras_of(module)]
    roots = [path_of(module, handle.root) or "" for _, handle in installed]
    keys: set[str] = set()
    for path, child in module.named_modules():
        extra = any(is_within(path, w) for w in whole)
        if not extra and any(is_within(path, r) for r in roots):
            continue
        named = [n for n, p in child._parameters.items() if p is not None and (extra or p.requires_grad)]
        if extra or _trains(module, path):
            hidden = child._non_persistent_buffers_set
            named += [n for n, b in child._buffers.items() if b is not None and n not in hidden]
        keys |= {strip_wrappers(f"{path}.{name}" if path else name) for name in named}
    return keys


def _trains(module: nn.Module, path: str) -> bool:
    """Return whether the nearest part with parameters, from ``path`` upwards, has one that trains."""
    while True:
        part = module.get_submodule(path)
        flags = [p.requires_grad for p in part.parameters()]
        if flags or not path:
            return any(flags)
        path = path.rpartition(".")[0]


def _set_flag(owner: nn.Module, name: str, flag: bool) -> None:
    value = owner._parameters.get(name)
    if value is not None:
        value.requires_grad_(flag)


def _has(module: nn.Module, path: str) -> bool:
    return any(p == path for p, _ in module.named_modules(remove_duplicate=False))


def _submodule(module: nn.Module, path: str, option: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except (AttributeError, RuntimeError) as error:  # RuntimeError: a property of that name, such as a LightningModule's trainer
        paths = [p for p, _ in module.named_modules() if p and RESERVED not in p.split(".")]
        raise TargetError(
            f"PEFTCallback({option}='{path}'): {type(module).__name__} has no such module.{did_you_mean(path, paths)}"
        ) from error
