"""Targets: which weights of a model a method adapts, as an immutable value that YAML can spell."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

from torch import nn

from lightning_peft.errors import ConfigError, TargetError, UnsupportedLayerError, did_you_mean
from lightning_peft.nn.adapter import LayerKindName
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.builder import in_order, spellings
from lightning_peft.surgery.layers import CONTAINERS, MODULE, LinearKind, layer_kind
from lightning_peft.surgery.sites import Site, attention_sites, make_site
from lightning_peft.surgery.tree import join

ALL_LINEAR = "all-linear"
REGEX = "re:"
MOST_LAYERS = 99_999  # no model has more blocks; a range is spelled out
Kinds = Collection[LayerKindName] | None
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Which weights to adapt.

    A pattern is, in this order: ``"all-linear"``; a role or role prefix (``attention.query``, ``mlp``, ``decoder``); a path or
    the end of a path at a dot (``q_proj``, ``mlp.fc1``; a plain list means what ``target_modules`` means in HF peft); a glob over
    whole paths (``*.layers.0.*``, ``*`` also crosses dots); ``re:`` and a regular expression that matches the whole path.

    ``"all-linear"`` is every linear layer (HF's fused Conv1D included) of the base model: not the head, not routers, not the
    children of an nn.MultiheadAttention, not routed experts, and not layers known never to run. Layers under layer-drop are in:
    they run in some steps.

    Args:
        include: Patterns.
        exclude: Patterns whose matches are left out.
        layers: Only blocks with these numbers, counted within each stack; layers outside blocks are left out.
    """

    include: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "include", _strings(self.include, "include"))
        object.__setattr__(self, "exclude", _strings(self.exclude, "exclude"))
        object.__setattr__(self, "layers", None if self.layers is None else _numbers(self.layers))
        if not self.include:
            raise ConfigError('Targets: `include` is empty; name a role, a module, a pattern or "all-linear".')

    @classmethod
    def parse(cls, value: Targets | str | Sequence[str] | Mapping[str, Any] | None) -> Targets | None:
        """Return targets from a string, a list of strings, or a mapping with the fields; None stays None.

        Raises:
            ConfigError: A field is unknown or a value has the wrong type.
        """
        if value is None or isinstance(value, Targets):
            return value
        if isinstance(value, str):
            return cls(include=(value,))
        if isinstance(value, Mapping):
            names = [f.name for f in fields(cls)]
            for key in value:
                if key not in names:
                    raise ConfigError(
                        f"Targets: unknown field '{key}'.{did_you_mean(str(key), names)} Fields: {', '.join(names)}."
                    )
            if "include" not in value:
                raise ConfigError('Targets: `include` is missing; name a role, a module, a pattern or "all-linear".')
            return cls(**value)
        return cls(include=_strings(value, "targets"))

    def resolve(self, anatomy: Anatomy, *, kinds: Kinds = None, prefix: str = "") -> tuple[Site, ...]:
        """Return the weights named, in model order, none twice; a whole fused weight takes the place of its parts.

        Args:
            anatomy: The model.
            kinds: Layer kinds that the method can adapt. A module named outright must be one of them; ``all-linear``, role
                prefixes, globs and regular expressions skip the others. With ``module`` among them, any module may be named.
            prefix: Path of the adapted root inside the user's LightningModule; patterns may contain it or not.

        Raises:
            TargetError: A pattern matches nothing, or a container or a layer that never runs.
            UnsupportedLayerError: A module named outright has no weight, or not of these kinds.
        """
        matcher = Matcher(anatomy, prefix.rstrip("."))
        found = {site for pattern in self.include for site in matcher.sites(pattern, kinds)}
        for pattern in self.exclude:
            left_out = matcher.paths(pattern)
            found = {site for site in found if site.path not in left_out and not matcher.is_role(site, pattern)}
        if not found:
            raise TargetError(f"{self} excludes all that it includes; nothing is left to adapt.")
        if self.layers is not None:
            found = self._in_layers(anatomy, found)
        # One weight reached under several names (a role and a path) is one site; the one that knows its role stays.
        unique = {(site.path, site.tensor, site.rows): site for site in sorted(found, key=lambda site: site.role or "")}
        whole = {(site.path, site.tensor) for site in unique.values() if site.rows is None}
        kept = (site for site in unique.values() if site.rows is None or (site.path, site.tensor) not in whole)
        return in_order(anatomy.tree, kept)

    def _in_layers(self, anatomy: Anatomy, sites: set[Site]) -> set[Site]:
        count = max(anatomy.layers.values(), default=-1) + 1
        assert self.layers is not None
        outside = [number for number in self.layers if number >= count]
        if outside:
            raise TargetError(f"Targets: layers {outside} do not exist; this model has {count} blocks, numbered from 0.")
        kept = {site for site in sites if anatomy.block_index(site.path) in self.layers}
        if not kept:
            raise TargetError(f"{self}: no matched module lies in these layers; the matches are outside the blocks.")
        return kept


class Matcher:
    """Matches patterns against the modules of one model.

    Args:
        anatomy: The model.
        prefix: Path of the adapted root as the user sees it, without the last dot.
    """

    def __init__(self, anatomy: Anatomy, prefix: str = "") -> None:
        self.anatomy = anatomy
        self.prefix = prefix

    @cached_property
    def known(self) -> dict[str, list[Site]]:
        """Sites of the anatomy's roles by path: the whole weights and raw tensors, not modules."""
        sites: dict[str, list[Site]] = {}
        for role_sites in self.anatomy.roles.values():
            for site in role_sites:
                if site.kind is not MODULE:
                    sites.setdefault(site.path, []).append(site)
        return sites

    @cached_property
    def names(self) -> tuple[tuple[str, str], ...]:
        """(path, spelling) pairs: with and without prefix, under all aliases, in model order."""
        tree = self.anatomy.tree
        pairs = [(path, path) for path in tree.modules] + [(first, alias) for alias, first in tree.aliases.items()]
        return tuple((path, name) for path, own in pairs for name in dict.fromkeys((own, join(self.prefix, own))) if name)

    def sites(self, pattern: str, kinds: Kinds) -> tuple[Site, ...]:
        """Return what an include pattern names."""
        if pattern == ALL_LINEAR:
            return self._all_linear(kinds)
        roles = self.anatomy.role_names(pattern)
        if roles:
            return self._of_role(pattern, roles, kinds)
        tensors = tuple(self._tensors(pattern))
        if tensors:
            return self._allowed(pattern, tensors, kinds, outright=True)
        paths = self._matches(pattern)
        if not paths:
            raise self._no_match(pattern)
        if is_broad(pattern):
            return self._of_broad(pattern, paths, kinds)
        return tuple(site for path in paths for site in self._named(pattern, path, kinds))

    def paths(self, pattern: str) -> frozenset[str]:
        """Return the module paths that an exclude pattern matches; a path below a matched module is matched too.

        Raises:
            TargetError: It is neither a role nor matches a module, so it would silently exclude nothing.
        """
        if self.anatomy.role_names(pattern):
            return frozenset()
        paths = [site.path for site in self._all_linear(None)] if pattern == ALL_LINEAR else self._matches(pattern)
        if not paths:
            raise self._no_match(pattern)
        return frozenset(below for path in paths for below, _ in self.anatomy.tree.below(path))

    def modules(self, pattern: str) -> tuple[str, ...]:
        """Return the paths of the modules that a role or a pattern names, whatever they are.

        Raises:
            TargetError: There are none.
        """
        roles = self.anatomy.role_names(pattern)
        paths = [site.path for role in roles for site in self.anatomy.roles[role]] or self._matches(pattern)
        if not paths:
            raise self._no_match(pattern)
        return tuple(dict.fromkeys(paths))

    def is_role(self, site: Site, pattern: str) -> bool:
        """Return whether a site belongs to the role, role prefix or unscoped role ``pattern``."""
        return any(site in self.anatomy.roles[role] for role in self.anatomy.role_names(pattern))

    def matches(self, site: Site, pattern: str) -> bool:
        """Return whether ``pattern`` names the site: by role, or by its module's path."""
        if self.anatomy.role_names(pattern):
            return self.is_role(site, pattern)
        return site.path in self._matches(pattern) or site in self._tensors(pattern)

    def _matches(self, pattern: str) -> list[str]:
        test = _path_test(pattern)
        return list(dict.fromkeys(path for path, name in self.names if test(name)))

    def _tensors(self, pattern: str) -> Iterator[Site]:
        """Yield the raw-tensor sites whose parameter is named: ``experts.gate_up_proj``, ``self_attn.in_proj_weight``."""
        if is_broad(pattern):
            return
        test = _path_test(pattern)
        for sites in self.known.values():
            for site in sites:
                if site.spec.kind == "tensor" and (test(name := join(site.path, site.tensor)) or test(join(self.prefix, name))):
                    yield site

    def _all_linear(self, kinds: Kinds) -> tuple[Site, ...]:
        anatomy = self.anatomy
        heads = {site.path for role, sites in anatomy.roles.items() if "head" in spellings(role) for site in sites}
        found = tuple(
            self._whole(path)
            for path, module in anatomy.tree.modules.items()
            if isinstance(layer_kind(module), LinearKind)
            and path not in heads
            and anatomy.bypassed(path) is None
            and not self.is_router(path)
            and "experts" not in path.split(".")[:-1]
        )
        if not found:
            raise TargetError(f'"{ALL_LINEAR}": {type(anatomy.root).__name__} has no linear layer beside its head.')
        return self._allowed(ALL_LINEAR, found, kinds, outright=False)

    def is_router(self, path: str) -> bool:
        """Return whether the module at ``path`` chooses among experts."""
        owner, _, name = path.rpartition(".")
        has_experts = join(owner, "experts") in self.anatomy.tree
        return name == "router" or (has_experts and ("gate" in name.split("_") or "router" in name))

    def _of_role(self, pattern: str, roles: tuple[str, ...], kinds: Kinds) -> tuple[Site, ...]:
        sites = tuple(site for role in roles for site in self.anatomy.roles[role])
        return self._allowed(pattern, sites, kinds, outright=any(pattern in spellings(role) for role in roles))

    def _allowed(self, pattern: str, sites: tuple[Site, ...], kinds: Kinds, *, outright: bool) -> tuple[Site, ...]:
        """Keep sites of the kinds; raise if none is left, or if one named outright is not."""
        kept = sites if kinds is None else tuple(site for site in sites if site.spec.kind in kinds)
        if not kept or (outright and len(kept) < len(sites)):
            wrong = next(site for site in sites if site not in kept)
            raise UnsupportedLayerError(
                f"'{pattern}' matches '{wrong.key}' of kind '{wrong.spec.kind}', but this method adapts "
                f"{', '.join(sorted(kinds or ())) or 'no'} layers. Target another layer."
            )
        return kept

    def _of_attention(self, path: str) -> tuple[Site, ...]:
        """Return the weights of an nn.MultiheadAttention at ``path``, or the one that a child of it stands for."""
        if isinstance(self.anatomy.tree[path], nn.MultiheadAttention):
            return attention_sites(self.anatomy.root, path)
        owner, _, child = path.rpartition(".")
        if path and isinstance(self.anatomy.tree[owner], nn.MultiheadAttention):
            return attention_sites(self.anatomy.root, owner, "output" if child == "out_proj" else None)
        return ()

    def _of_broad(self, pattern: str, paths: Sequence[str], kinds: Kinds) -> tuple[Site, ...]:
        found: list[Site] = []
        for path in paths:
            attention = self._of_attention(path)
            if attention:
                found += attention
            elif layer_kind(self.anatomy.tree[path]) is None:
                found += self.known.get(path, ())
            elif self.anatomy.bypassed(path) is None:
                found.append(self._whole(path))
        kept = tuple(site for site in found if kinds is None or site.spec.kind in kinds)
        if not kept:
            raise UnsupportedLayerError(
                f"'{pattern}' matches {len(paths)} modules, but none with a weight that this method can adapt"
                f"{'' if kinds is None else ' (' + ', '.join(sorted(kinds)) + ')'}."
            )
        return kept

    def _named(self, pattern: str, path: str, kinds: Kinds) -> tuple[Site, ...]:
        """Return the sites of a module named outright."""
        anatomy, module = self.anatomy, self.anatomy.tree[path]
        if isinstance(module, CONTAINERS):
            children = ", ".join(repr(child) for child in anatomy.tree.children(path)[:3])
            raise TargetError(
                f"'{pattern}' matches '{path}', a {type(module).__name__}. A container is never adapted, since its children run "
                f"in its place; target its children, for example {children or 'another module'}."
            )
        if kinds is not None and "module" in kinds:
            as_layer = layer_kind(module) is not None and self._whole(path).spec.kind in kinds
            if not as_layer and anatomy.bypassed(path) is None:
                return (make_site(anatomy.root, path, kind=MODULE),)
        attention = self._of_attention(path)
        if attention:
            return self._allowed(pattern, attention, kinds, outright=True)
        reason = anatomy.bypassed(path)
        if reason is not None:
            raise TargetError(f"'{pattern}' matches '{path}', whose forward never runs: {reason}.")
        # Expert stacks have no `weight`; make_site raises for what has none at all, naming its children.
        sites = (self._whole(path),) if layer_kind(module) is not None else tuple(self.known.get(path, ()))
        return self._allowed(pattern, sites or (make_site(anatomy.root, path),), kinds, outright=True)

    def _whole(self, path: str) -> Site:
        """Return the site of a module's whole weight, with its role if it has one."""
        known = next((site for site in self.known.get(path, ()) if site.rows is None and site.tensor == "weight"), None)
        return known or make_site(self.anatomy.root, path)

    def _no_match(self, pattern: str) -> TargetError:
        tree, roles = self.anatomy.tree, self.anatomy.roles
        leaves = dict.fromkeys(path.rpartition(".")[2] for path in tree.modules if path)
        options = [*roles, *(leaf for leaf in leaves if not leaf.isdigit()), ALL_LINEAR]
        near = did_you_mean(pattern, options) or did_you_mean(pattern, [name for _, name in self.names])
        return TargetError(
            f"'{pattern}' matches no role and no module of {type(self.anatomy.root).__name__} ({self.anatomy.family}).{near} "
            f"Roles: {', '.join(roles) or 'none'}."
        )


def is_broad(pattern: str) -> bool:
    """Return whether a pattern is a glob or a regular expression, which skip what they cannot adapt."""
    return pattern.startswith(REGEX) or any(sign in pattern for sign in "*?")


def _path_test(pattern: str) -> Callable[[str], object]:
    if pattern.startswith(REGEX):
        try:
            return re.compile(pattern.removeprefix(REGEX)).fullmatch
        except re.error as error:
            raise TargetError(f"'{pattern}' is no regular expression: {error}.") from error
    if is_broad(pattern):
        return re.compile(fnmatch.translate(pattern)).match
    return lambda name: name == pattern or name.endswith("." + pattern)


def value_for(site: Site, patterns: Mapping[str, T], default: T, anatomy: Anatomy) -> T:
    """Return the value of the first pattern (role, name or suffix, glob, ``re:``) that names the site, else ``default``."""
    matcher = Matcher(anatomy)
    return next((value for pattern, value in patterns.items() if matcher.matches(site, pattern)), default)


def values_for(sites: Sequence[Site], patterns: Mapping[str, T], default: T, anatomy: Anatomy) -> tuple[T, ...]:
    """Return one value per site, as :func:`value_for` gives it.

    Raises:
        TargetError: A pattern decides about no site: it names none of them, or earlier patterns name all that it does.
    """
    matcher = Matcher(anatomy)
    chosen = [next((pattern for pattern in patterns if matcher.matches(site, pattern)), None) for site in sites]
    for pattern in patterns:
        if pattern not in chosen:
            known = any(matcher.matches(site, pattern) for site in sites)
            why = "an earlier pattern names every layer that it does" if known else "it names none of the adapted layers"
            raise TargetError(
                f"'{pattern}' sets a value for no target: {why}.{did_you_mean(pattern, [site.key for site in sites])}"
            )
    return tuple(default if pattern is None else patterns[pattern] for pattern in chosen)


def _strings(value: object, name: str) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v for v in values):
        raise ConfigError(f"Targets: `{name}` must be a string or a list of strings, got {value!r}.")
    return tuple(values)


def _numbers(value: object) -> tuple[int, ...]:
    """Return layer numbers from integers and inclusive ranges: ``[0, "4-7"]``."""
    values = (value,) if isinstance(value, (int, str)) else value
    items = list(values) if isinstance(values, (list, tuple, range)) else [None]
    numbers: set[int] = set()
    for item in items:
        match = re.fullmatch(r"(\d{1,5})-(\d{1,5})", item) if isinstance(item, str) else None
        one = range(item, item + 1) if type(item) is int and 0 <= item <= MOST_LAYERS else range(0)
        chosen = range(int(match[1]), int(match[2]) + 1) if match else one
        if not chosen:
            raise ConfigError(f'Targets: `layers` takes numbers from 0 to {MOST_LAYERS} and ranges such as "4-7", got {value!r}.')
        numbers.update(chosen)
    return tuple(sorted(numbers))
