"""Edits: the vocabulary in which every method says what it changes. Data until :func:`apply_plan` installs them."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.adapter import AdapterModule, BuildContext, MergeableModule
from lightning_peft.nn.gates import BuildGate, GatedAdapter
from lightning_peft.surgery.anatomy import Anatomy, Port
from lightning_peft.surgery.layers import DENSE, parameter, storage_of
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.stack import AttachEntry, CallAdapter, CallEntry, ReparametrizeEntry

if TYPE_CHECKING:
    from lightning_peft.surgery.inject import Surgery

Build = Callable[[BuildContext], AdapterModule]
BuildCall = Callable[[BuildContext], CallAdapter]
BuildShared = Callable[[BuildContext], nn.Module]
Wrap = Callable[..., AdapterModule]
"""Given a context and, as ``build``, what builds the inner adapter, returns the outer one."""


@dataclass(frozen=True)
class Edit(ABC):
    """One change of a model. Frozen; ``apply`` is called once by the surgery, after all checks of all edits.

    Args:
        label: Which part of a composition made the edit; empty outside compositions.
    """

    label: str = field(default="", kw_only=True)

    @property
    @abstractmethod
    def place(self) -> tuple[str, str]:
        """(path, detail): two edits of one plan with the same place conflict."""

    def check(self, surgery: Surgery) -> None:
        """Raise a typed error if the edit cannot be applied; change nothing."""

    @abstractmethod
    def apply(self, surgery: Surgery) -> None:
        """Install; every step registers its undo with the surgery first."""

    def labelled(self, label: str) -> Edit:
        """Return the edit as part ``label`` of a composition."""
        return replace(self, label=join(label, self.label))

    def wrapped(self, wrap: Wrap) -> Edit:
        """Return the edit with another adapter around the one that it would install.

        Raises:
            UnsupportedLayerError: It installs no adapter that sees a layer's input.
        """
        raise UnsupportedLayerError(
            f"'{self.place[0] or 'the root'}': {type(self).__name__} installs no adapter beside the forward of a layer, so there is nothing "
            "to gate or to mix. Compose it with the gated or mixed part, or exclude the layer."
        )

    def gated(self, gate: BuildGate, anatomy: Anatomy) -> Edit:
        """Return the edit with a learned gain on what its adapter changes.

        Raises:
            UnsupportedLayerError: As :meth:`wrapped`.
        """
        return self.wrapped(functools.partial(GatedAdapter, gate=gate))


def join(*names: str | None) -> str:
    """Join the non-empty names with ``-``, which names may contain and paths may not."""
    return "-".join(n for n in names if n)


@dataclass(frozen=True)
class SiteEdit(Edit):
    """An edit of one weight."""

    site: Site
    build: Build

    @property
    def place(self) -> tuple[str, str]:
        return self.site.path, join(self.label, self.site.member)

    def _build(self, surgery: Surgery) -> tuple[nn.Module, AdapterModule]:
        module = self.site.module(surgery.root)
        context = surgery.context(
            self.site.path,
            self.site.spec,
            functools.partial(loaded_weight, self.site, module),
            self.place,
            self.label,
            residual=functools.partial(self.site.residual, module),
        )
        return module, self.build(context)


def loaded_weight(site: Site, module: nn.Module) -> Tensor:
    """Return the canonical weight of a site, detached.

    Raises:
        UnsupportedLayerError: It lies on the meta device.
    """
    weight = site.weight(module)
    if weight.is_meta:
        raise UnsupportedLayerError(
            f"'{site.key}' is on the meta device, and this initialisation reads the base weight. Load the weights before injecting, "
            "or choose an initialisation that needs none."
        )
    return weight


@dataclass(frozen=True)
class Attach(SiteEdit):
    """An adapter joins the forward of the module at ``site.path``, which it calls itself."""

    def wrapped(self, wrap: Wrap) -> Edit:
        return replace(self, build=functools.partial(wrap, build=self.build))

    def apply(self, surgery: Surgery) -> None:
        module, adapter = self._build(surgery)
        path, member = self.place
        surgery.add_entry(AttachEntry(surgery.name, member or None, module, path, adapter, self.label, site=self.site))


@dataclass(frozen=True)
class Reparametrize(SiteEdit):
    """The weight of ``site`` takes the value that a mergeable adapter gives it, for the length of the module's forward."""

    def apply(self, surgery: Surgery) -> None:
        module, adapter = self._build(surgery)
        if not isinstance(adapter, MergeableModule):
            raise UnsupportedLayerError(
                f"'{self.site.key}' can be adapted through its weight only, and {type(adapter).__name__} is not a change of a weight."
            )
        path, member = self.place
        surgery.add_entry(ReparametrizeEntry(surgery.name, member or None, module, path, adapter, self.label, site=self.site))


def adapt(site: Site, build: Build) -> Attach | Reparametrize:
    """Return the edit that puts an adapter on ``site``, by the way in which the layer can be reached."""
    return Attach(site, build) if site.spec.has_input else Reparametrize(site, build)


@dataclass(frozen=True)
class Tap(Edit):
    """An adapter reads or changes what flows through a port; the tap's own module knows the port's mechanics."""

    port: Port
    build: BuildCall
    exclusive: ClassVar[bool] = False

    @property
    def place(self) -> tuple[str, str]:
        return self.port.path, self.label

    def apply(self, surgery: Surgery) -> None:
        path, member = self.place
        adapter = self.build(surgery.call_context(path, self.place, self.label))
        module = surgery.root.get_submodule(path)
        surgery.add_entry(CallEntry(surgery.name, member or None, module, path, adapter, self.label, exclusive=self.exclusive))


@dataclass(frozen=True)
class Replace(Tap):
    """A container (body, blocks) is run by a new module, which owns its forward. One per container."""

    exclusive: ClassVar[bool] = True


@dataclass(frozen=True)
class Train(Edit):
    """An existing parameter of the base trains in place, whole."""

    path: str
    tensor: str

    @property
    def place(self) -> tuple[str, str]:
        return self.path, f"={self.tensor}"

    def wrapped(self, wrap: Wrap) -> Edit:
        return self  # it is no adapter

    def check(self, surgery: Surgery) -> None:
        module = surgery.root.get_submodule(self.path)
        value, storage = parameter(module, self.tensor), storage_of(module)
        if storage != DENSE and self.tensor == "weight":
            raise UnsupportedLayerError(
                f"'{self.path}.{self.tensor}' is stored as {storage}, whose codes cannot train. Take a method that leaves the stored "
                "weights alone, such as lora, exclude the layer, or load the base model unquantized."
            )
        if not isinstance(value, nn.Parameter) or not value.dtype.is_floating_point:
            raise UnsupportedLayerError(
                f"'{self.path}.{self.tensor}' ({value.dtype}) cannot train: only floating-point parameters do. Exclude it, or load "
                "the base model unquantized."
            )

    def apply(self, surgery: Surgery) -> None:
        surgery.claim(self.path, self.tensor, self.label)


@dataclass(frozen=True)
class Plan:
    """All changes of one strategy to one model.

    Args:
        edits: In install order.
        shared: Modules used by several edits, by name; they live once under the adapted root's ``peft``.
    """

    edits: tuple[Edit, ...]
    shared: Mapping[str, BuildShared] = field(default_factory=dict)

    def changed(self, change: Callable[[Edit], Edit]) -> Plan:
        """Return the plan with every adapter changed; parameters of the base train as they did.

        Raises:
            UnsupportedLayerError: There is no adapter to change.
        """
        edits = tuple(map(change, self.edits))
        if all(new is old for new, old in zip(edits, self.edits, strict=True)):
            raise UnsupportedLayerError(
                "the strategy installs no adapters but trains parameters of the base in place, of which there is nothing to gate or to mix. Put "
                "it beside the gated or mixed one: Compose(parts=[...])."
            )
        return replace(self, edits=edits)
