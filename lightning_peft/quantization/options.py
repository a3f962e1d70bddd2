"""All that can be said about quantizing a model: how weights are stored, which stay dense, how the base is prepared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.preparation import LoftQ

Quantizable: TypeAlias = "str | Mapping[str, Any] | Quantization | QuantizeOptions"


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """All that can be said about quantizing a model, as one value.

    Args:
        config: How weights are stored.
        skip: Layers to leave dense: roles, names, endings of names, globs or ``re:`` patterns.
        loftq: Prepare the base with LoftQ.
    """

    config: Quantization = dataclasses.field(default_factory=Quantization)
    skip: tuple[str, ...] = ()
    loftq: LoftQ | None = None

    @classmethod
    def parse(
        cls,
        value: Quantizable,
        *,
        skip: Sequence[str] | str | None = None,
        loftq: LoftQ | Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> QuantizeOptions:
        """Return the options that a scheme's name, or a mapping with fields of :class:`Quantization`, ``skip`` and ``loftq``, spells.

        Raises:
            ConfigError: A field is unknown, a value is, or one is given twice.
        """
        if isinstance(value, QuantizeOptions):
            return value
        if not isinstance(value, (str, Mapping, Quantization)):
            raise ConfigError(f"quantization={value!r} is neither a scheme such as 'nf4' nor a mapping of options.")
        fields: dict[str, Any] = {"scheme": value} if isinstance(value, str) else {}
        fields |= value.to_dict() if isinstance(value, Quantization) else value if isinstance(value, Mapping) else {}
        for name, given in {**(options or {}), "skip": skip, "loftq": loftq}.items():
            if given is None:
                continue
            if isinstance(value, Mapping) and name in value:
                raise ConfigError(f"quantization: {name} is given twice, {value[name]!r} and {given!r}.")
            fields[name] = given
        left, prepared = fields.pop("skip", None) or (), fields.pop("loftq", None)
        left = (left,) if isinstance(left, str) else left
        if not isinstance(left, (list, tuple)) or not all(isinstance(name, str) and name for name in left):
            raise ConfigError(f"quantization: skip={left!r}, but it is a list of names of layers.")
        known = [field.name for field in dataclasses.fields(Quantization)]
        for name in fields:
            if name not in known:
                names = [*known, "skip", "loftq"]
                raise ConfigError(
                    f"quantization has no option {name!r}; options: {', '.join(names)}.{did_you_mean(str(name), names)}"
                )
        return cls(config=Quantization.parse(fields), skip=tuple(left), loftq=LoftQ.parse(prepared))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which :meth:`parse` makes this value again."""
        more: dict[str, Any] = {"skip": list(self.skip)} if self.skip else {}
        if self.loftq is not None:
            more["loftq"] = self.loftq.to_dict()
        return {**self.config.to_dict(), **more}

    def skipping(self, names: Sequence[str]) -> QuantizeOptions:
        """Return these options with more layers left dense."""
        return dataclasses.replace(self, skip=tuple(dict.fromkeys((*self.skip, *names))))
