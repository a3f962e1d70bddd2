"""The registry of methods, and the one place where a strategy is made from what a user wrote."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeVar

from lightning_peft.errors import ConfigError, ConflictError, UnknownMethodError, did_you_mean
from lightning_peft.strategies.strategy import MethodInfo, PEFTStrategy

S = TypeVar("S", bound=type[PEFTStrategy])
ENTRY_POINTS = "lightning_peft.methods"
_METHODS: dict[str, MethodInfo] = {}


def register(**info: Any) -> Callable[[S], S]:
    """Class decorator: enter a strategy into the registry under ``name`` (see :class:`MethodInfo` for the fields).

    Raises:
        ConflictError: Another class has this registry name or class name.
    """

    def enter(cls: S) -> S:
        record = MethodInfo(**info)
        object.__setattr__(record, "cls", cls)
        for known in _METHODS.values():
            clash = known.name == record.name or known.cls.__name__ == cls.__name__
            if clash and (known.cls.__module__, known.cls.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ConflictError(
                    f"method '{record.name}' ({cls.__name__}) clashes with {known.cls.__module__}.{known.cls.__name__}."
                )
        cls.info = record
        _METHODS[record.name] = record
        return cls

    return enter


@functools.cache
def _load_entry_points() -> None:
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:  # one broken plug-in must not take the others down
            warnings.warn(f"entry point {entry.name} = {entry.value} could not be loaded: {error}", stacklevel=3)


def list_methods() -> list[MethodInfo]:
    """Return the records of all registered methods, third parties' included, by name."""
    _load_entry_points()
    return sorted(_METHODS.values(), key=lambda m: m.name)


def get_method(name: str) -> MethodInfo:
    """Return the record of the method with this registry or class name.

    Raises:
        UnknownMethodError: No such method; the message suggests the nearest.
    """
    _load_entry_points()
    short = name.rpartition(".")[2]
    for info in _METHODS.values():
        if short in (info.name, info.cls.__name__):
            return info
    options = sorted({*_METHODS, *(m.cls.__name__ for m in _METHODS.values())})
    raise UnknownMethodError(f"unknown method '{name}'.{did_you_mean(short, options)} Known: {', '.join(sorted(_METHODS))}.")


def resolve(spec: PEFTStrategy | str | Mapping[str, Any] | list[Any] | tuple[Any, ...]) -> PEFTStrategy:
    """Return the strategy that ``spec`` describes; the one reading of Python, YAML and checkpoints.

    Args:
        spec: A strategy; a name (``lora``, ``LoRA``); ``{class_path: LoRA, init_args: {rank: 16}}``; or a list of these, which
            composes.

    Raises:
        UnknownMethodError: No such method.
        ConfigError: A field is unknown, of the wrong type or out of range.
    """
    if isinstance(spec, PEFTStrategy):
        return spec
    if isinstance(spec, str):
        return _build(get_method(spec).cls, {})
    if isinstance(spec, (list, tuple)):
        return _build(get_method("compose").cls, {"parts": tuple(spec)})
    if isinstance(spec, Mapping):
        if "class_path" not in spec:
            raise ConfigError(
                f"a strategy given as a mapping needs 'class_path', got keys {sorted(spec)}. Write "
                "{class_path: LoRA, init_args: {rank: 16}}."
            )
        unknown = set(spec) - {"class_path", "init_args"}
        if unknown:
            raise ConfigError(f"strategy: unknown key {sorted(unknown)[0]!r} beside class_path and init_args.")
        path, args = spec["class_path"], spec.get("init_args") or {}
        if not isinstance(path, str) or not isinstance(args, Mapping):
            raise ConfigError(
                f"strategy: class_path={path!r}, init_args={args!r}, but a name and a mapping are needed. Write "
                "{class_path: LoRA, init_args: {rank: 16}}."
            )
        return _build(get_method(path).cls, dict(args))
    raise ConfigError(f"a strategy is a PEFTStrategy, a name, a mapping or a list, not {type(spec).__name__}.")


def _build(cls: type[PEFTStrategy], args: dict[str, Any]) -> PEFTStrategy:
    fields = [f.name for f in dataclasses.fields(cls)]
    for name in args:
        if name not in fields:
            raise ConfigError(
                f"{cls.__name__}: unknown option {name!r}.{did_you_mean(name, fields)} Options: {', '.join(fields)}."
            )
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and f.name not in args
    ]
    if missing:
        raise ConfigError(f"{cls.__name__}: {missing[0]!r} has no default and must be given.")
    return cls(**args)
