"""Typed errors. Each message names the value, the rule it broke and the remedy, and comes before anything is changed.

Every class is also the built-in error a caller would guess, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PEFTError(Exception):
    """Base class of all errors raised on purpose by lightning_peft."""


class ConfigError(PEFTError, ValueError):
    """A hyperparameter, option or configuration field is unknown, of the wrong type or out of range."""


class UnknownMethodError(ConfigError):
    """No strategy is registered under this name."""


class TargetError(PEFTError, ValueError):
    """Targets match nothing, name an unknown role, or match a module that the method cannot adapt."""


class UnsupportedLayerError(TargetError):
    """The module exists, but its layer kind, output or storage is not supported by this method."""


class PortError(PEFTError, ValueError):
    """The model lacks the port (embeddings, attention_kv, residual, body) that the method needs, or it cannot be reached."""


class ConflictError(PEFTError, ValueError):
    """Two edits, adapters or names contradict each other."""


class MergeError(PEFTError, RuntimeError):
    """A merge or unmerge that would give a wrong number, or an operation that the merged state forbids."""


class CompatibilityError(PEFTError, ValueError):
    """The adapter was made for another base model, root or configuration."""


class FormatError(PEFTError, ValueError):
    """A file is truncated, corrupted, foreign, or of a newer format."""


class DataError(PEFTError, ValueError):
    """A data set, column or label is missing, empty or unusable."""


class DependencyError(PEFTError, ImportError):
    """An optional package is missing; the message holds the install line."""


class AdapterBypassedError(PEFTError, RuntimeError):
    """An adapted module did not run in a complete forward, so its adapter has no effect."""


class DeadAdapterError(PEFTError, RuntimeError):
    """A trainable adapter tensor received no gradient or did not move."""


def did_you_mean(name: str, options: Iterable[str], *, count: int = 3) -> str:
    """Return ``" Did you mean 'a' or 'b'?"``, or an empty string when nothing is close."""
    if len(name) > 200:  # no name, and the search takes time and memory for every character
        return ""
    close = difflib.get_close_matches(name, list(options), n=count, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
