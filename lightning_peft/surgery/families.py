"""The words in which an architecture is described: where it keeps its blocks, projections and embeddings.

The known architectures (:mod:`.architectures`) are said in them, and a user's own: in Python (:class:`Family`), as a mapping or in
a YAML file. Anything else is inferred (:mod:`.inference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.types import FrozenDict, freeze

B = TypeVar("B")
Roles = Mapping[str, str | tuple[str, ...]]
Positions = Literal["rotary", "absolute", "relative", "alibi", "none"]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A projection whose rows hold several roles.

    Args:
        parts: Roles in the order of the rows.
        per_head: The parts alternate within each key/value head (GPT-NeoX, Falcon) instead of lying one after the other.
    """

    parts: tuple[str, ...]
    per_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of blocks: an encoder, a decoder, a vision tower, or the only one that a model has.

    Args:
        scope: Prefix of its role names, ``""`` if the family has one stack only.
        path: Module that takes ``input_ids`` (or the images), relative to the base model.
        blocks: ModuleList of the blocks, relative to ``path``.
        roles: Role -> path or paths relative to a block; paths that a model lacks are skipped. An ``nn.MultiheadAttention``
            stands under ``attention`` or ``cross_attention`` and expands to its four projections. ``mlp_norm`` is the norm of a
            post-norm block that reads the sum of the feed-forward sub-layer's input and output.
        fused: Path relative to a block -> the roles among its rows.
        embedding: Input embedding (or patch projection), relative to ``path``.
        tokens: The module at ``path`` takes ``inputs_embeds`` in place of ``input_ids``.
        causal: Position i sees positions up to i only; a string names the config field that says so.
        positions: How the stack knows positions; ``absolute``: a vector per position (learned or sinusoidal) joins the embeddings.
        pooler: Module, relative to ``path``, that reads position 0 of the stack's output.
    """

    scope: str = ""
    path: str = ""
    blocks: str
    roles: Roles = field(default_factory=FrozenDict)
    fused: Mapping[str, Fused] = field(default_factory=FrozenDict)
    embedding: str | None = None
    tokens: bool = True
    causal: bool | str = False
    positions: Positions = "none"
    pooler: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", freeze(self.roles))
        fused = {k: v if isinstance(v, Fused) else _build(Fused, v, f"fused.{k}") for k, v in self.fused.items()}
        object.__setattr__(self, "fused", FrozenDict(fused))


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture. Paths of stacks are relative to the base model: the HF model without head, else the adapted root.

    Args:
        name: Name of the family.
        model_types: Values of ``config.model_type`` that it covers.
        stacks: Its stacks of blocks.
        parts: Scope -> path of a nested HF model with a family of its own (CLIP: two towers).
        roles: Full role name -> path relative to the HF model, for layers outside the blocks.
    """

    name: str
    model_types: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    parts: Mapping[str, str] = field(default_factory=FrozenDict)
    roles: Mapping[str, str] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        stacks = tuple(s if isinstance(s, Stack) else _build(Stack, s, f"stacks[{i}]") for i, s in enumerate(self.stacks))
        object.__setattr__(self, "stacks", stacks)
        object.__setattr__(self, "model_types", tuple(self.model_types))
        object.__setattr__(self, "parts", freeze(self.parts))
        object.__setattr__(self, "roles", freeze(self.roles))
        if not self.stacks and not self.parts:
            raise ConfigError(f"Anatomy '{self.name}' names neither stacks nor parts; give at least one stack with its blocks.")

    @classmethod
    def load(cls, value: Family | Mapping[str, Any] | str | Path) -> Family:
        """Return a family from itself, a mapping, or a YAML file.

        Raises:
            ConfigError: The file is no mapping, or a field is unknown or missing.
        """
        if isinstance(value, Family):
            return value
        if isinstance(value, (str, Path)):
            import yaml  # kept out of the import of the package

            path = Path(value)
            if not path.is_file():
                raise ConfigError(f"No anatomy file at '{path}'. Give a YAML file, a mapping, or a Family.")
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(cls, value, "anatomy")


def _build(cls: type[B], value: object, where: str) -> B:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping with the fields of {cls.__name__}, got {type(value).__name__}.")
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in value:
        if key not in names:
            raise ConfigError(f"{where}: unknown field '{key}'.{did_you_mean(str(key), names)} Fields: {', '.join(names)}.")
    try:
        return cls(**value)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Bypass:
    """Modules whose forward never runs, because their owner reads their weight directly.

    Args:
        owner: Regular expression over the owner's class name.
        children: Paths relative to the owner.
        reason: What happens instead.
        remedy: What to adapt instead.
    """

    owner: str
    children: tuple[str, ...]
    reason: str
    remedy: str
