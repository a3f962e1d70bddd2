"""A site: one weight of one module that an adapter can adapt, and the view of it that the adapter is given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lightning_peft.errors import UnsupportedLayerError
from lightning_peft.nn.adapter import LayerSpec
from lightning_peft.nn.entries import changed_linear, scattered
from lightning_peft.nn.fused import Operand, low_rank_linear
from lightning_peft.quantization.preparation import loftq_factors
from lightning_peft.surgery.layers import MODULE, TENSOR, LayerKind, Rows, TensorKind, dense, layer_kind, parameter
from lightning_peft.surgery.passes import pass_number


@dataclass(frozen=True)
class Site:
    """Where an adapter goes.

    Args:
        path: Module whose forward is adapted, relative to the adapted root; ``""`` is the root itself.
        kind: How the module stores its weight.
        spec: Logical shape of the weight, or of its ``rows``.
        tensor: Parameter name of the weight, relative to the module.
        rows: The part of a fused weight, or None for all of it.
        member: Tells apart several sites on one module (``query`` and ``value`` of a fused projection).
        role: The role under which the anatomy knows the site, if any.
    """

    path: str
    kind: LayerKind
    spec: LayerSpec
    tensor: str = "weight"
    rows: Rows | None = None
    member: str | None = None
    role: str | None = None

    @property
    def key(self) -> str:
        """``path`` or ``path[member]``, as shown to the user."""
        return f"{self.path}[{self.member}]" if self.member else self.path

    def overlaps(self, other: Site) -> bool:
        """Return whether another site of the same module has rows of this one's weight."""
        return self.tensor == other.tensor and (self.rows is None or other.rows is None or self.rows == other.rows)

    def module(self, root: nn.Module) -> nn.Module:
        """Return the module at ``path``."""
        return root.get_submodule(self.path)

    def weight(self, module: nn.Module) -> Tensor:
        """Return the canonical weight ``(*batch, out, in)`` of this site, detached."""
        full = self.kind.canonical(dense(module, self.tensor))
        return full if self.rows is None else self.rows.take(full, -2)

    def residual(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """Return factors L (out, r), R (r, in) of what quantization has lost of this weight, W ≈ weight + L R; None without any."""
        factors = loftq_factors(module)
        if factors is None or self.rows is None:
            return factors
        return self.rows.take(factors[0], 0), factors[1]

    def bias_name(self, module: nn.Module) -> str | None:
        """Return the parameter name of the bias, or None."""
        if isinstance(self.kind, TensorKind):
            return self.kind.bias_name(module, self.tensor)
        return "bias" if self.spec.has_bias else None

    def bias(self, module: nn.Module) -> Tensor | None:
        """Return the bias of this site, detached, or None."""
        name = self.bias_name(module)
        if name is None:
            return None
        full = parameter(module, name).detach()
        return full if self.rows is None else self.rows.take(full, -1)

    def effective(self, module: nn.Module, weight: Tensor, full: Tensor) -> Tensor:
        """Return the stored-shape tensor in which this site's part of ``full`` (stored shape) is the canonical ``weight``."""
        if self.rows is not None:
            weight = self.rows.put(self.kind.canonical(full), weight, -2)
        return self.kind.stored(weight, full)


def make_site(
    root: nn.Module,
    path: str,
    *,
    kind: LayerKind | None = None,
    tensor: str = "weight",
    rows: Rows | None = None,
    member: str | None = None,
    role: str | None = None,
) -> Site:
    """Describe the weight ``tensor`` of the module at ``path``.

    Raises:
        UnsupportedLayerError: The module stores no weight that can be adapted, or stores it as integers.
    """
    module = root.get_submodule(path)
    kind = kind or layer_kind(module)
    weight = getattr(module, tensor, None)
    if kind is None and isinstance(weight, Tensor) and is_lazy(weight):
        raise UnsupportedLayerError(
            f"'{path}' ({type(module).__name__}) is lazy and has no shape yet. Run one forward before injecting."
        )
    if kind is None:
        raise UnsupportedLayerError(
            f"'{path}' is a {type(module).__name__}, which has no weight that an adapter can attach to. Target one of its "
            f"children: {', '.join(n for n, _ in module.named_children()) or 'it has none'}."
        )
    spec = kind.spec(module, tensor)
    if kind is not MODULE and not spec.dtype.is_floating_point:
        raise UnsupportedLayerError(
            f"'{path}' stores its weight as {spec.dtype}, and no quantization backend knows the layer ({type(module).__name__}). "
            "Quantize with lp.quantize or bitsandbytes, load the base model unquantized, or exclude the layer."
        )
    if rows is not None:
        spec = replace(spec, out_features=rows.count(spec.out_features))
    return Site(path=path, kind=kind, spec=spec, tensor=tensor, rows=rows, member=member, role=role)


def attention_sites(root: nn.Module, path: str, part: str | None = None, role: str | None = None) -> tuple[Site, ...]:
    """Return the sites of an ``nn.MultiheadAttention``, whose forward reads the weights of its children directly.

    Args:
        root: The adapted root.
        path: Path of the attention module.
        part: ``query``, ``key``, ``value`` or ``output``; None for the whole input projection and the output projection.
        role: Role to note on the sites.
    """
    module = root.get_submodule(path)
    if not isinstance(module, nn.MultiheadAttention):
        raise UnsupportedLayerError(f"'{path}' is a {type(module).__name__}, not an nn.MultiheadAttention.")
    width = module.embed_dim
    fused = module.in_proj_weight is not None
    order = {"query": 0, "key": 1, "value": 2}

    def site(name: str) -> Site:
        if name == "output":
            return make_site(root, path, kind=TENSOR, tensor="out_proj.weight", member="output", role=role)
        if fused:
            rows = Rows(order[name] * width, (order[name] + 1) * width)
            return make_site(root, path, kind=TENSOR, tensor="in_proj_weight", rows=rows, member=name, role=role)
        return make_site(root, path, kind=TENSOR, tensor=f"{name[0]}_proj_weight", member=name, role=role)

    if part is not None:
        return (site(part),)
    if fused:
        whole = make_site(root, path, kind=TENSOR, tensor="in_proj_weight", member="input", role=role)
        return (whole, site("output"))
    return tuple(site(name) for name in (*order, "output"))


class LayerCall:
    """The adapted layer during one call; implements :class:`lightning_peft.nn.adapter.BaseLayer`.

    Lives for one call only, so nothing that varies per call is stored on a module.
    """

    def __init__(self, site: Site, module: nn.Module, inner: Callable[..., Any], rest: Callable[[Tensor], Any]) -> None:
        self.site, self.module, self._inner, self._arguments = site, module, inner, rest
        self.spec = site.spec
        self._full: Tensor | None = None
        self._full_input: Tensor | None = None
        self._tail: tuple[Any, ...] | None = None
        self._weight: Tensor | None = None  # once per call: a quantized weight is unpacked for it
        self._last: tuple[Tensor, Tensor] | None = None  # input and output of the last run: gates ask twice

    def __call__(self, x: Tensor, /) -> Tensor:
        if not self._has_run(x):
            self._last = (x, self._run(x))
        assert self._last is not None
        return self._last[1]

    def _has_run(self, x: Tensor) -> bool:
        return self._last is not None and self._last[0] is x

    def _run(self, x: Tensor) -> Tensor:
        args, kwargs = self._arguments(x)
        out = self._inner(*args, **kwargs)
        if type(out) is tuple and out and isinstance(out[0], Tensor):
            self._tail, out = out[1:], out[0]
        elif not isinstance(out, Tensor):
            raise UnsupportedLayerError(
                f"'{self.site.path}' ({type(self.module).__name__}) returned {type(out).__name__}; an adapter edits a tensor or "
                "the first tensor of a tuple. Target a layer inside it."
            )
        if self.site.rows is None:
            return out
        self._full, self._full_input = out, x
        return self.site.rows.take(out, self.site.kind.channel_dim)

    @property
    def pass_number(self) -> int | None:
        return pass_number()

    def weight(self) -> Tensor:
        if self._weight is None:
            self._weight = self.site.weight(self.module)
        return self._weight

    def along_channels(self, values: Tensor) -> Tensor:
        return self.site.kind.along_channels(values)

    def low_rank(
        self, x: Tensor, A: Tensor, B: Tensor, *, scaling: float = 1.0, dropout: float = 0.0, gain: Tensor | None = None
    ) -> Tensor:
        dropout = dropout if x.is_floating_point() else 0.0
        operand = self._operand()
        if operand is not None and operand.fits(x) and not (dropout and gain is not None) and not self._has_run(x):
            return low_rank_linear(x, operand, A, B, scaling=scaling, dropout=dropout, gain=gain, unpacked=self._weight)
        kind = self.site.kind
        read = F.dropout(x, dropout) if dropout else x
        branch = kind.mix(self.module, scaling * kind.project(self.module, read, A), B, self.spec.groups)
        if gain is None:
            return self(x) + branch
        of_read = self(read)
        y = of_read if read is x else self(x)
        g, b = kind.along_channels(gain).to(y.dtype), self._bias(y.dtype)
        return g * (y - b + branch) + b if read is x else y + (g - 1) * (of_read - b) + g * branch

    def full_rank(self, x: Tensor, delta: Tensor, *, dropout: float = 0.0) -> Tensor:
        read = F.dropout(x, dropout) if dropout and x.is_floating_point() else x
        return self(x) + self.site.kind.project(self.module, read, delta)

    def entries(self, x: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        operand = self._operand()
        if operand is not None and operand.fits(x):
            return changed_linear(x, operand, positions, values, self._weight)
        return self.full_rank(x, scattered(positions, values, self.spec.out_features, self.spec.in_features))

    def _operand(self) -> Operand | None:
        """Return the layer as an operand of a fused product, if nothing but its own forward would run."""
        inner = self._inner
        alone = isinstance(inner, functools.partial) and inner.func is type(self.module).forward
        return self.site.kind.operand(self.module) if alone and self.site.rows is None else None

    def _bias(self, dtype: torch.dtype) -> Tensor | float:
        """Return the bias as it lies along the channels of the output, 0 without one."""
        name = self.site.bias_name(self.module)
        if name is None:
            return 0.0
        full = parameter(self.module, name)
        return self.site.kind.along_channels(full if self.site.rows is None else self.site.rows.take(full, -1)).to(dtype)

    def finish(self, x: Tensor, y: Tensor) -> Any:
        """Return the layer's whole output: the adapted part put back among the rows and tuple entries left alone."""
        if self.site.rows is not None:
            if self._full is None or self._full_input is not x:
                self(x)  # the other rows of a fused layer see the original input
            assert self._full is not None
            y = self.site.rows.put(self._full, y, self.site.kind.channel_dim)
        return y if self._tail is None else (y, *self._tail)


def split_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Return the first tensor argument of a call and a function that gives the arguments with it replaced."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return value, lambda x, i=i: ((*args[:i], x, *args[i + 1 :]), kwargs)
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            return value, lambda x, name=name: (args, {**kwargs, name: x})
    raise UnsupportedLayerError(f"{type(module).__name__} was called without a tensor; an adapter has nothing to read.")
