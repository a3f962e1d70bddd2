"""Installing adapters on a module that is built later, in ``LightningModule.setup`` or ``configure_model``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

HOOK = "configure_model"


def install_after_configure_model(module: nn.Module, install: Callable[[nn.Module], object]) -> Callable[[], object]:
    """Let ``install`` run after the module's own ``configure_model``, which comes after ``setup`` and before restore and wrap.

    Returns:
        What takes it back; an instance attribute left behind would make the module impossible to pickle.
    """
    hook = module.__dict__.get(HOOK)
    if isinstance(hook, functools.partial) and hook.func is _configure:  # another PEFT callback was here first
        hook.args[2].append(install)
    else:
        hook = functools.partial(_configure, module, getattr(module, HOOK), [install])
        object.__setattr__(module, HOOK, hook)
    return functools.partial(_undo, module, hook, install)


def _configure(module: nn.Module, original: Callable[[], Any], installs: list[Callable[[nn.Module], object]]) -> None:
    original()
    for install in installs:
        install(module)


def _undo(module: nn.Module, hook: functools.partial[None], install: Callable[[nn.Module], object]) -> None:
    if install in hook.args[2]:
        hook.args[2].remove(install)
    if not hook.args[2] and module.__dict__.get(HOOK) is hook:
        del module.__dict__[HOOK]
        original = hook.args[1]
        if getattr(original, "__func__", None) is not getattr(type(module), HOOK):
            object.__setattr__(module, HOOK, original)
