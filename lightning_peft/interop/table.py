"""What a table of one HF type says, and the engine that reads and writes every type that adapts layers by its table.

A table names the tensors and fields of a type on both sides; :class:`LayerFormat` does the rest: keys, targets, ranks and alphas per
target, checks. Types with rules of their own override a method of it.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, UnsupportedLayerError, did_you_mean
from lightning_peft.interop.files import PREFIX
from lightning_peft.interop.names import address, hf_targets, named, our_targets
from lightning_peft.nn.adapter import MergeableModule
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.layers import Conv1DKind, ConvKind
from lightning_peft.surgery.sites import Site, make_site
from lightning_peft.surgery.stack import AttachEntry, ReparametrizeEntry

LINEAR, CONV1D, EMBEDDING, CONV = "linear", "Conv1D", "embedding", "conv"


def words(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


# Fields of every type: they say where the adapter is and where it comes from, and are dealt with for all types alike.
COMMON = words(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision task_type target_modules exclude_modules "
    "layers_to_transform layers_pattern modules_to_save fan_in_fan_out"
)


@dataclass(frozen=True)
class Layer:
    """One adapted weight: its address (see :func:`.names.address`), the key of its tensors here, site, module and adapter."""

    path: str
    key: str
    site: Site
    module: nn.Module
    adapter: nn.Module

    @property
    def kind(self) -> str:
        """What HF calls the layer: ``linear``, ``Conv1D`` (of GPT-2), ``embedding``, ``conv``, ``norm`` or ``tensor``."""
        return CONV1D if isinstance(self.site.kind, Conv1DKind) else self.site.spec.kind

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the stored weight; of a convolution with its kernel."""
        return tuple(self.module.weight.shape) if isinstance(self.site.kind, ConvKind) else ()  # type: ignore[arg-type]


def layers_of(handle: Handle) -> list[Layer]:
    """Return the adapted weights of a handle, or of a part of a composition, in install order."""
    return [
        Layer(address(e.site), e.key, e.site, e.module, e.adapter)
        for e in handle.entries
        if isinstance(e, (AttachEntry, ReparametrizeEntry)) and isinstance(e.adapter, MergeableModule)
    ]


Convert = Callable[[Tensor, Layer], Tensor]


def as_is(tensor: Tensor, layer: Layer) -> Tensor:
    """Return the tensor."""
    return tensor


def column(tensor: Tensor, layer: Layer) -> Tensor:
    """(n,) -> (n, 1)."""
    return tensor[:, None]


def kernel(tensor: Tensor, layer: Layer) -> Tensor:
    """Of a convolution: (r, in x kernel size) -> (r, in, *kernel)."""
    return tensor.unflatten(-1, layer.weight_shape[1:]) if layer.kind == CONV else tensor


def pointwise(tensor: Tensor, layer: Layer) -> Tensor:
    """Of a convolution: (out, r) -> (out, r, 1, 1)."""
    return tensor.reshape(*tensor.shape, *(1,) * (len(layer.weight_shape) - 2)) if layer.kind == CONV else tensor


@dataclass(frozen=True)
class Row:
    """One tensor of an adapter.

    Args:
        ours: Its attribute here.
        theirs: The end of its key in the file.
        store: Brings it into the shape and meaning that it has there.
        load: The way back; None means that only the shape differs.
        kinds: Kinds of layers that have it; None for all.
    """

    ours: str
    theirs: str
    store: Convert = as_is
    load: Convert | None = None
    kinds: frozenset[str] | None = None

    def of(self, layer: Layer) -> bool:
        """Return whether the adapter of a layer has this tensor."""
        return hasattr(layer.adapter, self.ours) and (self.kinds is None or layer.kind in self.kinds)


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The fields of a config.

    Args:
        same: Field there -> field of our strategy with the same meaning and values.
        only: Field there -> the values under which the type is what it is here, and what else it would be.
        free: Fields that say nothing about what a trained adapter computes.
        own: Fields that the type's code reads.
    """

    same: Mapping[str, str] = field(default_factory=dict)
    only: Mapping[str, tuple[tuple[Any, ...], str]] = field(default_factory=dict)
    free: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Check that nothing in a config means something else than what is read. Warns of unknown fields that are off.

        Raises:
            FormatError: A field is unknown.
            CompatibilityError: A field asks for a variant that is not here.
        """
        known = COMMON | {*self.same, *self.only} | self.free | self.own
        off = [name for name, value in config.items() if name not in known and value in (None, False, [], {}, "")]
        if off:  # what newer versions of peft can do, and this adapter does not
            warnings.warn(f"{where}: unknown fields that are off: {', '.join(off)}.", stacklevel=4)
        for name, value in config.items():
            if name in off:
                continue
            if name not in known:
                raise FormatError(
                    f"{where}: unknown field {name!r} of {config['peft_type']}={value!r}.{did_you_mean(name, known)} It may change what the "
                    "adapter computes. If it does not, delete it from the config."
                )
            if name in self.only and not any(value == v and type(value) is type(v) for v in self.only[name][0]):
                raise CompatibilityError(f"{where}: {name}={value!r}: {self.only[name][1]}.")


@dataclass(frozen=True)
class Parsed:
    """A file taken apart: config, tensors of adapted modules by path and suffix, the others by key without ``base_model.model.``."""

    config: Mapping[str, Any]
    layers: Mapping[str, Mapping[str, Tensor]]
    rest: Mapping[str, Tensor]
    where: str


@dataclass(frozen=True)
class Written:
    """What is written: the config's fields, and the tensors by their whole key."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Format(ABC):
    """One peft type.

    Args:
        peft_type: Its name in the config.
        methods: Our strategies that are written in it.
        fields: Its config.
    """

    peft_type: str
    methods: tuple[type[PEFTStrategy], ...]
    fields: Fields

    def suffixes(self) -> tuple[str, ...]:
        """Return the ends of the keys that belong to adapted modules."""
        return ()

    def check(self, strategy: PEFTStrategy) -> None:
        """Check that the config has words for the options of a strategy.

        Raises:
            ConfigError: It has not.
        """

    @abstractmethod
    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        """Return config and tensors of a handle, or of a part of a composition.

        Raises:
            UnsupportedLayerError: HF's type adapts no such layer.
            CompatibilityError: It cannot say what the adapter does.
        """

    def addressed(self, file: Parsed, anatomy: Anatomy) -> Parsed:
        """Return the file with its layers by address."""
        return file

    @abstractmethod
    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        """Return the strategy of a checked file."""

    @abstractmethod
    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        """Return the tensors for the slots of a freshly installed handle, by their key here."""

    def takes(self, file: Parsed, key: str) -> bool:
        """Return whether a tensor that belongs to no adapted module is the type's own."""
        return False


@dataclass(frozen=True, kw_only=True)
class LayerFormat(Format):
    """A type that adapts layers.

    Args:
        rows: Its tensors.
        layers: Kinds of layers that HF adapts with it.
    """

    rows: tuple[Row, ...]
    layers: frozenset[str]

    def suffixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.theirs for row in self.rows))

    # ------------------------------------------------------------------ here -> there

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        found = layers_of(handle)
        for layer in found:
            self.check_layer(layer)
        strategy, tensors = handle.strategy, {}
        for layer in found:
            for row in self.rows:
                if row.of(layer):
                    value = row.store(getattr(layer.adapter, row.ours).detach(), layer)
                    tensors[f"{PREFIX}{layer.path}.{row.theirs}"] = value
        config = {theirs: getattr(strategy, ours) for theirs, ours in self.fields.same.items() if hasattr(strategy, ours)}
        config |= self.where(found, anatomy) | self.config(handle, found)
        return Written(config, tensors)

    def where(self, found: list[Layer], anatomy: Anatomy) -> dict[str, Any]:
        """Return the fields that say which modules are adapted."""
        paths = list(dict.fromkeys(layer.path for layer in found if not layer.site.spec.batch))
        fields: dict[str, Any] = {"target_modules": hf_targets(paths, anatomy.tree)}
        if CONV1D in self.layers:
            fields["fan_in_fan_out"] = any(layer.kind == CONV1D for layer in found)
        return fields

    def config(self, handle: Handle, found: list[Layer]) -> dict[str, Any]:
        """Return the fields that are not simply those of the strategy."""
        return {}

    def check_layer(self, layer: Layer) -> None:
        """Check that HF has this kind of layer for this type.

        Raises:
            UnsupportedLayerError: It has not.
        """
        spec = layer.site.spec
        if layer.site.rows is not None:
            raise UnsupportedLayerError(
                f"'{layer.site.key}' is a part of a fused weight, which {self.peft_type} of HF peft adapts whole only. Save it with "
                "as_lora=True, or train the whole layer by its name."
            )
        if layer.kind not in self.layers or spec.groups > 1:
            what = "a grouped convolution" if spec.groups > 1 else f"a layer of kind '{layer.kind}'"
            raise UnsupportedLayerError(
                f"'{layer.site.key}' is {what}, which {self.peft_type} of HF peft does not adapt. Exclude it, or save another method "
                "with as_lora."
            )

    # ------------------------------------------------------------------ there -> here

    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        cls = self.cls(file.config)
        sites = self.sites(file, anatomy)
        targets = our_targets([address(site) for site in sites], anatomy, cls.info.layer_kinds)
        args = {ours: file.config[theirs] for theirs, ours in self.fields.same.items() if theirs in file.config}
        return cls(**{"targets": targets, **args, **self.args(file, sites, anatomy)})

    def cls(self, config: Mapping[str, Any]) -> type[PEFTStrategy]:
        """Return the strategy that a config describes."""
        return self.methods[0]

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        """Return the fields of the strategy that are not simply those of the config."""
        return {}

    def sites(self, file: Parsed, anatomy: Anatomy) -> list[Site]:
        """Return the adapted weights, and check that they are those that the config names.

        Raises:
            CompatibilityError: The model has no such module, or the file lacks one that its config names.
        """
        if not file.layers:
            raise FormatError(f"{file.where} holds no tensor of {self.peft_type}.")
        missing = [path for path in file.layers if path not in anatomy.tree]
        if missing:
            raise CompatibilityError(
                f"{file.where} adapts '{missing[0]}', which {type(anatomy.root).__name__} has not."
                f"{did_you_mean(missing[0], anatomy.tree.modules)} It was made for another base model."
            )
        meant = named(file.config, anatomy.tree, file.where)
        if meant is not None and meant != file.layers.keys():
            lost, odd = sorted(meant - file.layers.keys())[:3], sorted(file.layers.keys() - meant)[:3]
            raise CompatibilityError(
                f"{file.where}: the config names {len(meant)} modules of this model, and there are tensors for {len(file.layers)}: none for "
                f"{lost or 'nothing'}, unasked ones for {odd or 'nothing'}. The file is incomplete, or made for another base model."
            )
        return [make_site(anatomy.root, path) for path in sorted(file.layers, key=anatomy.tree.order.__getitem__)]

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer in layers_of(part):
            self.check_layer(layer)
            given = dict(file.layers[layer.path])
            for row in self.rows:
                if not row.of(layer):
                    continue
                slot: Tensor = getattr(layer.adapter, row.ours).detach()
                value, shape = given.pop(row.theirs, None), tuple(row.store(slot, layer).shape)
                if value is None:
                    raise FormatError(f"{file.where}: '{PREFIX}{layer.path}.{row.theirs}' is missing. The file is incomplete.")
                if tuple(value.shape) != shape:
                    raise CompatibilityError(
                        f"{file.where}: '{PREFIX}{layer.path}.{row.theirs}' has shape {tuple(value.shape)}, and {shape} is what belongs to this "
                        "config and this model."
                    )
                found[f"{layer.key}.{row.ours}"] = (value if row.load is None else row.load(value, layer)).reshape(slot.shape)
            if given:
                raise FormatError(f"{file.where}: '{PREFIX}{layer.path}.{min(given)}' belongs to no tensor of this config.")
        return found


def check_kernel(layer: Layer) -> None:
    """Check that HF's branch beside a convolution reads the input as the convolution does: it knows no dilation and no padding mode.

    Raises:
        UnsupportedLayerError: It would not.
    """
    module: Any = layer.module
    if layer.kind == CONV and (any(step != 1 for step in module.dilation) or module.padding_mode != "zeros"):
        raise UnsupportedLayerError(
            f"'{layer.path}' has dilation {module.dilation} and padding mode '{module.padding_mode}', which HF peft's branch does not have: it "
            "computes something else. Exclude it, or merge the adapter."
        )


def integer(value: Any, name: str, where: str) -> int:
    """Return a positive whole number of a config.

    Raises:
        FormatError: It is none.
    """
    if type(value) is not int or value < 1:
        raise FormatError(f"{where}: {name}={value!r} is no positive whole number.")
    return value


def number(value: Any, name: str, where: str) -> float:
    """Return a finite positive number of a config.

    Raises:
        FormatError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise FormatError(f"{where}: {name}={value!r} is no positive number.")
    return float(value)


def whole(value: float) -> int | float:
    """Return a number as an integer where it is one up to rounding; HF writes alphas so."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded


def most_common(values: Iterable[Any]) -> Any:
    """Return the value that occurs most often, the first of several."""
    items = list(values)
    return max(dict.fromkeys(items), key=items.count)


def require_one(values: Iterable[Any], what: str, peft_type: str) -> Any:
    """Return the value that all layers share.

    Raises:
        ConfigError: They have several.
    """
    distinct = list(dict.fromkeys(values))
    if len(distinct) != 1:
        raise ConfigError(f"{peft_type} of HF peft has one {what} for all layers, and the adapter has {distinct[:4]}.")
    return distinct[0]
