"""Anatomy: the roles, blocks, ports and known traps of one model, so that a method never names an architecture.

A view of a model that planning reads and nothing changes. It comes from data of a known family (:mod:`.architectures`), from a user's
own data of the same shape, or is inferred from facts (:mod:`.inference`); which one it was stands in ``family`` and in
:meth:`Anatomy.describe`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lightning_peft.errors import PortError, TargetError, did_you_mean
from lightning_peft.surgery.builder import AnatomyBuilder, in_order, spellings
from lightning_peft.surgery.families import Family
from lightning_peft.surgery.inference import infer
from lightning_peft.surgery.ports import AttentionPort, BodyPort, EmbeddingsPort, Port
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.tree import ModuleTree, is_within

__all__ = ["Anatomy", "AttentionPort", "BodyPort", "EmbeddingsPort", "Family", "Port", "anatomy_of"]

INFERRED = "inferred"
TORCH_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
P = TypeVar("P", bound=Port)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """What is known about one model. All paths are relative to ``root``.

    Args:
        root: The adapted root.
        family: Name of the known family, or ``"inferred"``.
        roles: Full role name (``attention.query``, ``encoder.attention.query``) -> sites in model order.
        blocks: Paths of the transformer blocks of all scopes, in model order.
        ports: Port name -> ports in model order; a port that the model lacks is absent.
        tree: Paths of the model without adapters.
        layers: Block path -> index within its stack.
        optional: Paths that may legally not run, with everything below them.
        notes: What was inferred or left out, for :meth:`describe`.
    """

    root: nn.Module
    family: str
    roles: Mapping[str, tuple[Site, ...]]
    blocks: tuple[str, ...]
    ports: Mapping[str, tuple[Port, ...]]
    tree: ModuleTree = field(repr=False)
    layers: Mapping[str, int] = field(repr=False)
    optional: tuple[str, ...] = ()
    bypasses: Mapping[str, str] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()

    def role_names(self, role: str) -> tuple[str, ...]:
        """Return the full role names that ``role`` means, none if it is no role of this model.

        A prefix means everything below it, and a name without scope means all scopes: ``attention.query`` is also
        ``encoder.attention.query`` and ``decoder.cross_attention.query``.
        """
        return tuple(full for full in self.roles if any(is_within(name, role) for name in spellings(full)))

    def sites(self, role: str) -> tuple[Site, ...]:
        """Return the sites of a role, of a role prefix (``mlp``, ``encoder``), or of a role in all scopes, in model order.

        Raises:
            TargetError: The model has no such role; names the nearest and all roles found.
        """
        names = self.role_names(role) if role else ()
        if not names:
            raise TargetError(
                f"This model ({self.family}) has no role '{role}'.{did_you_mean(role, self.roles)} "
                f"Roles found: {', '.join(self.roles) or 'none'}."
            )
        return in_order(self.tree, {site for name in names for site in self.roles[name]})

    def default_sites(self, roles: Collection[str]) -> tuple[Site, ...]:
        """Return the sites of a method's default roles, for ``targets=None``.

        Raises:
            TargetError: The anatomy is inferred, so that a default would be a guess, or a role is missing.
        """
        if self.family == INFERRED:
            raise TargetError(
                f"{type(self.root).__name__} is no architecture that lightning_peft knows, so the default targets "
                f'({", ".join(roles)}) would be a guess. Set targets, for example to "all-linear" or to some of the roles '
                f"found: {', '.join(self.roles) or 'none'}."
            )
        return in_order(self.tree, {site for role in roles for site in self.sites(role)})

    def port(self, kind: type[P]) -> tuple[P, ...]:
        """Return the ports of one kind, typed.

        Raises:
            PortError: The model has none.
        """
        found = tuple(port for port in self.ports.get(kind.name, ()) if isinstance(port, kind))
        if not found:
            raise PortError(
                f"{type(self.root).__name__} ({self.family}) has no port '{kind.name}', which this method needs. "
                f"Ports found: {', '.join(self.ports) or 'none'}."
            )
        return found

    def block_of(self, path: str) -> str | None:
        """Return the path of the block that holds the module at ``path``, or None outside blocks."""
        while path and path not in self.layers:
            path = path.rpartition(".")[0]
        return path or None

    def block_index(self, path: str) -> int | None:
        """Return the index of the block that holds ``path``, counted within its stack, or None outside blocks."""
        block = self.block_of(path)
        return None if block is None else self.layers[block]

    def partner(self, site: Site, role: str, other: str) -> Site | None:
        """Return the site that has the role ``other`` beside a site with the role ``role``: same block, same scope.

        None if the site does not have that role, or the block has no such layer. Partners of ``attention`` roles are found for
        cross attention too.
        """
        if site.role is None or not site.role.endswith(role):
            return None
        block, owner = self.block_of(site.path), site.path.rpartition(".")[0]
        found = [s for s in self.roles.get(site.role.removesuffix(role) + other, ()) if self.block_of(s.path) == block]
        # Of several, as with shared experts, the one in the same module.
        return min(found, key=lambda s: not is_within(s.path, owner), default=None)

    def conditional(self, path: str) -> bool:
        """Return whether the module at ``path`` may legally not run in a forward: routed experts, layers under layer-drop."""
        return any(is_within(path, optional) for optional in self.optional)

    def bypassed(self, path: str) -> str | None:
        """Return reason and remedy if the module at ``path`` is known never to run its forward, else None."""
        return self.bypasses.get(path)

    def describe(self) -> str:
        """Return a printable account: where the anatomy comes from, roles, blocks, ports, conditional and bypassed modules."""
        source = "inferred from names and structure" if self.family == INFERRED else f"family {self.family}"
        lines = [f"{type(self.root).__name__}: {source}; {len(self.blocks)} blocks"]
        width = max((len(role) for role in self.roles), default=0)
        for role, sites in self.roles.items():
            spec = sites[0].spec
            shape = "" if spec.kind == "module" else f" {tuple((*spec.batch, spec.out_features, spec.in_features))}"
            lines.append(f"  {role:<{width}}  {len(sites):>3} x {sites[0].key or '(root)'}{shape}")
        for name, ports in self.ports.items():
            lines.append(f"  port {name}: {', '.join(p.path or '(root)' for p in ports[:3])}{', ...' if ports[3:] else ''}")
        lines += [f"  may not run: {', '.join(self.optional[:3])}{', ...' if self.optional[3:] else ''}"] * bool(self.optional)
        for reason in dict.fromkeys(self.bypasses.values()):
            paths = [path for path, other in self.bypasses.items() if other == reason]
            lines.append(f"  never runs: {paths[0]}{f' and {len(paths) - 1} more' if paths[1:] else ''}: {reason}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def anatomy_of(model: nn.Module, anatomy: Family | Mapping[str, Any] | str | Path | None = None) -> Anatomy:
    """Describe a model: by the user's own data if given, by the data of a known family, else by inference.

    Args:
        model: The adapted root; it may be on the meta device and may have adapters.
        anatomy: A family, a mapping with its fields, or the path of a YAML file.

    Raises:
        ConfigError: The user's own data has wrong fields.
        TargetError: The user's own data does not fit the model.
    """
    tree = ModuleTree(model)
    builder = AnatomyBuilder(tree)
    family = builder.add_known() if anatomy is None else builder.add_given(Family.load(anatomy))
    if family is None:
        builder = infer(tree, tuple(builder.notes))
        family = "torch" if any(isinstance(m, TORCH_LAYERS) for m in tree.modules.values()) else INFERRED
    return Anatomy(
        root=model,
        family=family,
        roles=builder.sorted_roles(),
        blocks=tuple(sorted(builder.layers, key=tree.order.__getitem__)),
        ports={name: tuple(ports) for name, ports in builder.ports.items() if ports},
        tree=tree,
        layers=builder.layers,
        optional=tuple(builder.optional),
        bypasses=builder.bypasses,
        notes=tuple(builder.notes),
    )
