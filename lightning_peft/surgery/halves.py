"""The two halves of a transformer block, attention and MLP, as functions of their own, without naming an architecture.

A block computes ``x + Attn(x)``, then ``x + Mlp(x)``, with norms before or behind. If the layers of one half give zero, the residual sum
leaves the other half alone. A norm that lies behind a skipped half's sum (post-norm blocks) passes its input on.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from lightning_peft.errors import PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Edit, Tap
from lightning_peft.surgery.ports import Port
from lightning_peft.surgery.sites import Site, split_input
from lightning_peft.surgery.stack import Call, CallAdapter
from lightning_peft.surgery.tree import is_within

Half = Literal["attention", "mlp"]
MLP = ("mlp.up", "mlp.gate", "mlp.down")


class _Running(threading.local):
    """The half that blocks skip in this thread, now."""

    skipped: Half | None = None


_RUNNING = _Running()


@contextmanager
def skipping(half: Half | None) -> Iterator[None]:
    """Inside, blocks with the edits of :func:`half_edits` run without one half."""
    outer, _RUNNING.skipped = _RUNNING.skipped, half
    try:
        yield
    finally:
        _RUNNING.skipped = outer


def half_edits(anatomy: Anatomy, block: str) -> tuple[Edit, ...]:
    """Return the edits that let a block run without its attention or without its MLP.

    Raises:
        PortError: The anatomy does not know the layers of the halves.
    """
    inside = {role: [s for s in sites if is_within(s.path, block)] for role, sites in anatomy.roles.items()}
    up, gate, down = (_of(inside, name) for name in MLP)
    attentions = _attentions(inside)
    if not up or not down or not attentions or block in attentions:
        raise PortError(
            f"the attention and the MLP half of block '{block}' ({anatomy.family}) are not known: the roles mlp.up, mlp.down, "
            f"attention.query and attention.output are needed, in modules of their own. Take variant 1 or 2, or describe the model (anatomy=)."
        )
    widths = {site.path: site.spec.out_features for site in (*gate, *up, *down)}
    for path in widths:  # gate and up in one matrix
        widths[path] = sum({s.rows: s.spec.out_features for s in (*gate, *up, *down) if s.path == path}.values())
    edits = [_skip(path, "mlp", width) for path, width in widths.items()]
    last = {s.path for s in _of(inside, "mlp_norm")}
    norms = {s.path for s in _of(inside, "norm")} - last if last else set()  # behind the attention's sums
    edits += [_skip(path, "mlp", None) for path in sorted(last)]
    for path in attentions:
        holds = any(is_within(norm, path) for norm in norms)
        edits.append(_skip(path, "attention", None if holds else 0))
    edits += [_skip(n, "attention", None) for n in sorted(norms) if not any(is_within(n, path) for path in attentions)]
    return tuple(edits)


def _of(inside: dict[str, list[Site]], name: str) -> list[Site]:
    return [site for role, sites in inside.items() if role == name or role.endswith(f".{name}") for site in sites]


def _attentions(inside: dict[str, list[Site]]) -> list[str]:
    """Return the smallest modules that hold query and output, of self and of cross attention."""
    found: dict[str, list[str]] = {}
    for role, sites in inside.items():
        kind, _, part = role.rpartition(".")
        if part in ("query", "output") and kind.rpartition(".")[2] in ("attention", "cross_attention"):
            found.setdefault(kind, []).extend(site.path for site in sites)
    return [_common(paths) for paths in found.values() if paths]


def _common(paths: list[str]) -> str:
    first, *rest = (path.split(".") for path in paths)
    count = 0
    while count < len(first) and all(path[: count + 1] == first[: count + 1] for path in rest):
        count += 1
    return ".".join(first[:count])


def _skip(path: str, half: Half, width: int | None) -> Tap:
    build = functools.partial(_build_skip, half=half, width=width)
    return Tap(Port(path=path, scope=""), build, label="skip")


def _build_skip(context: BuildContext, *, half: Half, width: int | None) -> SkipTap:
    return SkipTap(half, width)


class SkipTap(CallAdapter):
    """Leaves a module out while its half is skipped.

    Args:
        half: The half that it belongs to.
        width: The module gives zeros of this width then, 0 for that of its input; None: it passes its input on.
    """

    def __init__(self, half: Half, width: int | None) -> None:
        super().__init__()
        self.belongs, self.width = half, width
        self.results: int | None = None  # length of the tuple that it returns, learnt from a whole call; None: a tensor

    def reset_parameters(self) -> None:
        """Nothing to do: it has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or not."""
        if _RUNNING.skipped != self.belongs:
            out = base(*args, **kwargs)
            self.results = len(out) if isinstance(out, tuple) else None
            return out
        x, _ = split_input(self, args, kwargs)
        out = x if self.width is None else _zeros(x, self.width or x.shape[-1])
        return out if self.results is None else (out, *(None,) * (self.results - 1))


def _zeros(x: Tensor, width: int) -> Tensor:
    return x.new_zeros(()).expand(*x.shape[:-1], width)
