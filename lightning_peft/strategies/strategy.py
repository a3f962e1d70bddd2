"""What a strategy is: one PEFT method with its hyperparameters, an immutable value that is its own configuration."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias, get_args

from torch import Tensor

from lightning_peft.errors import ConfigError, FormatError, TargetError, UnsupportedLayerError
from lightning_peft.nn.adapter import LayerKindName
from lightning_peft.quantization.config import Scheme
from lightning_peft.strategies.schedule import Schedule
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.handle import Handle, Slot
from lightning_peft.surgery.layers import DENSE, Storage, storage_of
from lightning_peft.surgery.sites import Site
from lightning_peft.surgery.targets import Targets
from lightning_peft.types import Family, FrozenDict, freeze, thaw

Calibration: TypeAlias = Mapping[str, Tensor]
TargetsLike: TypeAlias = Targets | str | list[str] | None
ALL_KINDS: frozenset[LayerKindName] = frozenset({"linear", "embedding", "conv", "norm", "tensor"})
QUANTIZED: frozenset[Storage] = frozenset(get_args(Scheme))
ALL_STORAGES: frozenset[Storage] = QUANTIZED | {DENSE}


@dataclass(frozen=True, kw_only=True)
class MethodInfo:
    """The one record of a method: what it is and what it promises. Every promise is tested by the contract suite.

    Args:
        name: Registry name.
        family: Family of the survey taxonomy.
        summary: One sentence.
        paper: Title and arXiv id.
        version: Version of the method's tensors and fields in adapter files.
        lr: Suggested learning rate for AdamW.
        weight_decay: Suggested weight decay.
        mergeable: Its effect can be written into the base weights.
        identity_at_init: The output is the base's, bit for bit, before the first step.
        adds_positions: It adds positions to the sequence or to the keys and values.
        ports: Ports of the anatomy that it needs.
        layer_kinds: Layer kinds that it can adapt; empty when it adapts no layer.
        storages: How the weights of the base may be stored where it trains. Without quantized ones it trains the stored weights
            themselves; without ``dense`` at least one of the layers that it adapts has to be quantized.
        base_quantization: Scheme in which the method wants its base, for ``quantization="auto"``.
        default_roles: Roles that ``targets=None`` means; empty when the method takes no targets, or needs no roles to know them.
        from_data: It starts from statistics of the training data, see :meth:`PEFTStrategy.calibrate`.
        may_rest: Names of tensors that may stay where they are in the first steps.
        example: Small hyperparameters with which the contract suite tests the method.
    """

    name: str
    family: Family
    summary: str
    paper: str
    version: int = 1
    lr: float = 1e-3
    weight_decay: float = 0.0
    mergeable: bool = False
    identity_at_init: bool = True
    adds_positions: bool = False
    ports: tuple[str, ...] = ()
    layer_kinds: frozenset[LayerKindName] = frozenset()
    storages: frozenset[Storage] = ALL_STORAGES
    base_quantization: Scheme | None = None
    default_roles: tuple[str, ...] = ()
    from_data: bool = False
    may_rest: tuple[str, ...] = ()
    example: Mapping[str, Any] = dataclasses.field(default_factory=FrozenDict)
    cls: type[PEFTStrategy] = dataclasses.field(init=False, repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class PEFTStrategy(ABC):
    """One PEFT method with its hyperparameters.

    Args:
        targets: Which layers to adapt: a role (``attention.query``), a name or path suffix (``q_proj``), a glob, ``re:`` and a
            regular expression, ``all-linear``, a list of these, or a ``Targets`` with exclusions and layer numbers. None means
            the method's default roles.
    """

    info: ClassVar[MethodInfo]
    targets: TargetsLike = None

    def __post_init__(self) -> None:
        check_types(type(self), {field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        object.__setattr__(self, "targets", Targets.parse(self.targets))
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, freeze(getattr(self, field.name)))
        self.validate()

    def validate(self) -> None:
        """Check the hyperparameters; raise :class:`ConfigError` on the first that breaks a rule."""

    @abstractmethod
    def plan(self, anatomy: Anatomy) -> Plan:
        """Return what the method changes in this model. Pure: reads roles and shapes, works on meta tensors."""

    @property
    def mergeable(self) -> bool:
        """The effect can be written into the base weights; the method's promise, or what these hyperparameters leave of it."""
        return self.info.mergeable

    @property
    def identity_at_init(self) -> bool:
        """The output is the base's, bit for bit, before the first step; as :attr:`mergeable`."""
        return self.info.identity_at_init

    @property
    def adds_positions(self) -> bool:
        """It adds positions to the sequence or to the keys and values; as :attr:`mergeable`."""
        return self.info.adds_positions

    @property
    def base_quantization(self) -> Scheme | None:
        """Scheme in which the base should be stored, None for no wish; as :attr:`mergeable`."""
        return self.info.base_quantization

    @property
    def from_data(self) -> bool:
        """It starts from statistics of the training data; as :attr:`mergeable`."""
        return self.info.from_data

    def calibrate(self, handle: Handle, batches: Iterable[Any], loss: Callable[[Any], Tensor]) -> Calibration:
        """Return what the adapter's own tensors start from, found in data; called by :func:`lightning_peft.calibrate`.

        Args:
            handle: The adapter, installed and switched off. The base is in eval mode, and given back as it was afterwards.
            batches: Training data; no more of it is drawn than is needed.
            loss: Runs the model on a batch, or an example of one, and returns a scalar.

        Returns:
            Owned tensors by slot key, equal on all ranks. They have their shapes from the plan already, so that an adapter file or a
            checkpoint, which holds them, needs no data.
        """
        return {}

    @property
    def suggested(self) -> tuple[float, float]:
        """Learning rate and weight decay for AdamW; as :attr:`mergeable`."""
        return self.info.lr, self.info.weight_decay

    def check_base(self, anatomy: Anatomy) -> None:
        """Check that a base is one from which the method can start. Not asked of a base on which a trained adapter is put.

        Raises:
            UnsupportedLayerError: The method is one for quantized bases, and the layers that it adapts are dense.
        """
        wanted = self.info.storages
        if DENSE in wanted:
            return
        sites = self.sites(anatomy)
        if not any(storage_of(site.module(anatomy.root)) in wanted for site in sites):
            name, scheme = type(self).__name__, self.info.base_quantization or min(wanted)
            raise UnsupportedLayerError(
                f"{name}: none of the {len(sites)} layers that it adapts is quantized, such as '{sites[0].key}'. Quantize the base "
                f"first: lp.quantize(model, '{scheme}'), or quantization='auto' of PEFTLightningModule and PEFTCallback. For a dense "
                "base take the method without the Q."
            )

    def schedule(self, handle: Handle) -> Schedule:
        """Return what the method does during training; nothing by default."""
        return Schedule()

    def group_options(self, slot: Slot) -> dict[str, float]:
        """Return ``lr_scale`` and ``weight_decay`` of an owned tensor, where they differ from the user's."""
        return {}

    def may_rest(self, slot: Slot) -> bool:
        """Return whether an owned tensor may stay where it is in the first steps (``MethodInfo.may_rest``)."""
        return any(fnmatch.fnmatchcase(name, p) for name in (slot.key, slot.attribute) for p in self.info.may_rest)

    def sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """Return the sites that the targets, or the method's default roles, name in this model."""
        if self.targets is None:
            return anatomy.default_sites(self.info.default_roles)
        assert isinstance(self.targets, Targets)
        sites = self.targets.resolve(anatomy, kinds=self.info.layer_kinds)
        if not sites:
            raise TargetError(f"{type(self).__name__}: targets {self.targets} leave no layer of {self.info.layer_kinds}.")
        return sites

    @classmethod
    def upgrade(cls, init_args: dict[str, Any], version: int) -> dict[str, Any]:
        """Return the arguments that an older version of this method saved, as the current version spells them.

        A method that raises its ``MethodInfo.version`` overrides this, so that its old adapter files load for ever.

        Raises:
            FormatError: No way from ``version`` is known.
        """
        raise FormatError(f"{cls.__name__}: files of version {version} cannot be read by version {cls.info.version}.")

    def to_dict(self, *, defaults: bool = False) -> dict[str, Any]:
        """Return ``{"class_path": ..., "init_args": ...}`` of plain values; :func:`lightning_peft.resolve` reads it back.

        Args:
            defaults: Spell out fields that have their default value too, as files do: a default may change one day.
        """
        args = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if defaults or value != _default(field):
                args[field.name] = plain(value, defaults=defaults)
        return {"class_path": type(self).__name__, "init_args": args}


def plain(value: Any, *, defaults: bool = False) -> Any:
    """Return ``value`` as JSON and YAML can hold it: strategies and targets as dicts, tuples as lists."""
    if isinstance(value, PEFTStrategy):
        return value.to_dict(defaults=defaults)
    if isinstance(value, Targets):
        return {f.name: thaw(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(v, defaults=defaults) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v, defaults=defaults) for k, v in value.items()}
    return value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return freeze(field.default_factory())
    return freeze(field.default)


def require(condition: bool, owner: PEFTStrategy, field: str, rule: str) -> None:
    """Raise :class:`ConfigError` naming the field, its value and the rule, unless ``condition`` holds."""
    if not condition:
        raise ConfigError(f"{type(owner).__name__}: {field}={getattr(owner, field)!r}, but {rule}.")


def check_types(cls: type[PEFTStrategy], args: Mapping[str, Any]) -> None:
    """Check plain argument values against the field annotations, as YAML and dicts give them.

    Raises:
        ConfigError: A value has a type that its field does not accept.
    """
    hints = _hints(cls)
    for name, value in args.items():
        if not _fits(value, hints[name]):
            shown = str(hints[name]).replace("typing.", "").replace("lightning_peft.", "")
            raise ConfigError(f"{cls.__name__}: {name}={value!r} is {type(value).__name__}, expected {shown}.")


@functools.cache
def _hints(cls: type[PEFTStrategy]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in arguments
    if origin is not None and type(None) in arguments and value is None:
        return True
    if str(origin) in ("typing.Union", "<class 'types.UnionType'>"):
        return any(_fits(value, a) for a in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (list, tuple):
        inner = arguments[0] if arguments else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, inner) for v in value)
    if origin in (dict, FrozenDict):
        return isinstance(value, Mapping) and all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())
    if hint is Targets:
        return isinstance(value, (Targets, Mapping))
    if isinstance(hint, type) and issubclass(hint, PEFTStrategy):
        return isinstance(value, (hint, Mapping, str))
    return isinstance(value, hint) if isinstance(hint, type) else True
