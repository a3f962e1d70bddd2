"""Which modules the patterns of a HF config name, and the patterns that name given modules, there and here."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

from lightning_peft.errors import FormatError, TargetError
from lightning_peft.nn.adapter import LayerKindName
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.layers import layer_kind
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import REGEX, Targets, values_for
from lightning_peft.surgery.tree import ModuleTree

ALL_LINEAR = "all-linear"
_MOST_CHARACTERS, _MOST_REPEATS = 20_000, 4
T = TypeVar("T")


def hf_pattern(text: Any, where: str, head: str = "") -> re.Pattern[str]:
    """Compile a regular expression that stands in a file.

    Raises:
        FormatError: It is none, or one whose search could take for ever: a repeated group, or many repeats in a row.
    """
    if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
        raise FormatError(f"{where}: {str(text)[:100]!r} is no pattern.")
    repeats = max((len(re.findall(r"[*+{]", part)) for part in text.split("|")), default=0)
    if re.search(r"\)[*+{]", text) or repeats > _MOST_REPEATS:
        raise FormatError(
            f"{where}: the pattern {text[:100]!r} repeats a group, or more than {_MOST_REPEATS} parts. Simplify it."
        )
    try:
        return re.compile(f"{head}({text})")
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError(f"{where}: {text[:100]!r} is no regular expression: {error}.") from error


def value_at(patterns: Mapping[str, T], path: str, default: T, where: str) -> T:
    """Return the value for a module as HF's ``rank_pattern`` and ``alpha_pattern`` give it: the first key that is a suffix or matches."""
    for key, value in patterns.items():
        if re.fullmatch(r"\^?[\w.]+\$?", key):  # a plain name, as nearly all are; the dot matches anything there too
            plain = key.removeprefix("^").removesuffix("$")
            if path == plain or (not key.startswith("^") and path.endswith(f".{plain}")):
                return value
        elif hf_pattern(key, where, head=r"(.*\.)?").fullmatch(path):
            return value
    return default


def named(config: Mapping[str, Any], tree: ModuleTree, where: str) -> set[str] | None:
    """Return the modules with a weight that ``target_modules`` and its companions name; None where that is HF's own knowledge.

    Raises:
        FormatError: A pattern is malformed.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if targets is None or targets == ALL_LINEAR or (isinstance(targets, list) and ALL_LINEAR in targets):
        return None
    saved = [f"(^|.*\\.){re.escape(name)}($|\\..*)" for name in strings(config.get("modules_to_save"), "modules_to_save", where)]
    found = {path for path, module in tree.modules.items() if path and layer_kind(module) is not None}
    found = {path for path in found if _matches(targets, path, "target_modules", where)}
    if isinstance(targets, list) and config.get("layers_to_transform") not in (None, []):
        found = {path for path in found if _in_layers(config, path, where)}
    if excluded:
        found = {path for path in found if not _matches(excluded, path, "exclude_modules", where)}
    return {path for path in found if not any(re.match(name, path) for name in saved)}


def _matches(patterns: Any, path: str, field: str, where: str) -> bool:
    if isinstance(patterns, str):
        return hf_pattern(patterns, f"{where}: {field}").fullmatch(path) is not None
    return any(path == name or path.endswith(f".{name}") for name in strings(patterns, field, where))


def _in_layers(config: Mapping[str, Any], path: str, where: str) -> bool:
    given, patterns = config["layers_to_transform"], config.get("layers_pattern")
    layers = given if isinstance(given, list) else [given]
    if not all(type(number) is int for number in layers):
        raise FormatError(f"{where}: layers_to_transform={given!r} are no layer numbers.")
    names = [patterns] if isinstance(patterns, str) else strings(patterns, "layers_pattern", where)
    if not all(re.fullmatch(r"[\w.]+", name) for name in names):
        raise FormatError(f"{where}: layers_pattern={patterns!r} is no name of a list of layers.")
    tests = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in names] or [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for m in (re.match(test, path) for test in tests) if m), None)
    return match is not None and int(match[1]) in layers


def strings(value: Any, field: str, where: str) -> list[str]:
    """Return a list of strings of a config, empty for None.

    Raises:
        FormatError: It is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise FormatError(f"{where}: {field}={str(value)[:100]!r} is no list of names.")
    return value


def leaves(paths: Collection[str]) -> list[str]:
    """Return the last parts of paths, each once, in order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in paths))


def hf_targets(paths: Sequence[str], tree: ModuleTree) -> list[str] | str:
    """Return ``target_modules`` by which HF peft finds exactly these modules: short names where they suffice."""
    wanted = set(paths)
    for names in (leaves(paths), list(paths)):
        found = {path for path in tree.modules if any(path == name or path.endswith(f".{name}") for name in names)}
        if found == wanted:
            return names
    return "|".join(re.escape(path) for path in paths)


def hf_values(values: Mapping[str, T], default: T) -> dict[str, T]:
    """Return ``rank_pattern`` or ``alpha_pattern``: the values that differ from the default, by whole path."""
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def address(site: Site) -> str:
    """Return the path of an adapted module, or of the parameter where that is a stack of matrices (experts)."""
    return f"{site.path}.{site.tensor}" if site.spec.batch else site.path


def our_targets(paths: Sequence[str], anatomy: Anatomy, kinds: Collection[LayerKindName] | None) -> Targets:
    """Return targets that name exactly the modules at these paths, with short names where they suffice.

    Raises:
        TargetError: A path does not exist, or has nothing that can be adapted.
    """
    wanted = set(paths)
    for names in (leaves(paths), list(paths)):
        targets = Targets(include=tuple(names))
        try:
            found = targets.resolve(anatomy, kinds=kinds)
        except TargetError:
            continue
        if {address(site) for site in found} == wanted and len(found) == len(wanted):
            return targets
    return Targets(include=tuple(REGEX + re.escape(path) for path in paths))


def our_values(values: Mapping[str, T], default: T, sites: Sequence[Site], anatomy: Anatomy) -> dict[str, T]:
    """Return values per target: those that differ from the default, by last part of the path where that says it."""
    wanted = tuple(values[address(site)] for site in sites)
    by_leaf: dict[str, T] = {}
    for path, value in values.items():
        by_leaf.setdefault(path.rpartition(".")[2], value)
    short = {leaf: value for leaf, value in by_leaf.items() if value != default}
    whole = {REGEX + re.escape(path): value for path, value in values.items() if value != default}
    try:
        if values_for(sites, short, default, anatomy) == wanted:
            return short
    except TargetError:
        pass
    return whole
