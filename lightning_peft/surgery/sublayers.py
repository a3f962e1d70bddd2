"""The mechanics of an adapter beside a sub-layer: it reads what the sub-layer's first layer reads, and edits what its last one gives.

No module has to stand for the sub-layer: some models keep its layers side by side in the block. Two edits work together. One on the first
layer notes its input; the one on the last layer takes the note and runs the adapter, for which the sub-layer is one layer. The note
lives in a thread local on the way from the one to the other, so nothing of it stays on a module, and a block that is recomputed, or runs
a second time, notes anew.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor

from lightning_peft.errors import PortError
from lightning_peft.surgery.edits import Attach, Build, Edit, Wrap
from lightning_peft.surgery.sites import LayerCall, Site, split_input
from lightning_peft.surgery.stack import AttachEntry, Call, CallAdapter, CallEntry

if TYPE_CHECKING:
    from lightning_peft.surgery.inject import Surgery


Pair: TypeAlias = tuple[str, str, str]
"""What the two edits of one adapter have in common: name of the handle, part of a composition, key of the last layer."""


class _Running(threading.local):
    """Inputs that were noted in this thread. torch.compile can follow a thread local, but no context variable."""

    def __init__(self) -> None:
        self.inputs: dict[Pair, Tensor] = {}


_RUNNING = _Running()


def beside(first: Site, last: Site, build: Build) -> tuple[Edit, Edit]:
    """Return the edits that run an adapter beside the sub-layer from ``first`` to ``last``.

    Args:
        first: The layer that reads the sub-layer's input.
        last: The layer that gives its output; the adapter is installed there.
        build: Returns the adapter. Its ``base`` is the sub-layer, to be called with the sub-layer's own input ``x``, once.
    """
    return NoteEdit(first, last), BesideEdit(last, build)


@dataclass(frozen=True)
class NoteEdit(Edit):
    """Notes the input of ``first`` for the adapter on ``last``."""

    first: Site
    last: Site

    @property
    def place(self) -> tuple[str, str]:
        return self.first.path, self.label

    def wrapped(self, wrap: Wrap) -> Edit:
        return self  # what is noted is the input, whatever the adapter on the last layer makes of it

    def apply(self, surgery: Surgery) -> None:
        module, adapter = self.first.module(surgery.root), NoteTap(_pair(surgery, self.last, self.label))
        surgery.add_entry(CallEntry(surgery.name, self.label or None, module, self.first.path, adapter, self.label))


@dataclass(frozen=True)
class BesideEdit(Attach):
    """An adapter on the last layer of a sub-layer that reads the sub-layer's input."""

    def apply(self, surgery: Surgery) -> None:
        module, adapter = self._build(surgery)
        path, member = self.place
        pair = _pair(surgery, self.site, self.label)
        surgery.add_entry(BesideEntry(surgery.name, member or None, module, path, adapter, self.label, site=self.site, pair=pair))


def _pair(surgery: Surgery, last: Site, label: str) -> Pair:
    return surgery.name, label, last.key


class NoteTap(CallAdapter):
    """Notes the input of a layer.

    Args:
        pair: Name of the note.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def reset_parameters(self) -> None:
        """Nothing to do: it has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        _RUNNING.inputs[self.pair], _ = split_input(self, args, kwargs)
        return base(*args, **kwargs)


@dataclass(eq=False, kw_only=True)
class BesideEntry(AttachEntry):
    """An adapter that is given a sub-layer.

    Args:
        pair: Name of the note with the sub-layer's input.
    """

    pair: Pair

    def run(self, inner: Call, *args: Any, **kwargs: Any) -> Any:
        """Call the adapter around the sub-layer.

        Raises:
            PortError: The first layer did not run before the last one.
        """
        hidden, rest = split_input(self.module, args, kwargs)
        x = _RUNNING.inputs.pop(self.pair, None)
        if x is None:
            raise PortError(
                f"'{self.path}' ran before the first layer of its sub-layer, so what it reads is not known. Target another sub-layer."
            )
        base = SublayerCall(self.site, self.module, inner, rest, hidden)
        return base.finish(hidden, self.adapter(base, x))


class SublayerCall(LayerCall):
    """A sub-layer during one call: its other layers have run, the last one is to run on what they gave, ``hidden``."""

    def __init__(self, site: Site, module: Any, inner: Call, rest: Any, hidden: Tensor) -> None:
        super().__init__(site, module, inner, rest)
        self._hidden = hidden

    def __call__(self, x: Tensor, /) -> Tensor:
        return super().__call__(self._hidden)
