"""``quantize``: store the linear layers of any module in few bits, layer by layer, in place."""

from __future__ import annotations

import ctypes
import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, ConflictError
from lightning_peft.quantization.backend import backend_for, backend_of
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.options import Quantizable, QuantizeOptions
from lightning_peft.quantization.preparation import LoftQ, codes_of, recipe_of
from lightning_peft.surgery.anatomy import Anatomy, Family, anatomy_of
from lightning_peft.surgery.selection import LeftDense, Selection, is_conv1d, select
from lightning_peft.surgery.stack import noop_pre_hook
from lightning_peft.surgery.targets import Matcher

REPORT = "_peft_quantization"
MUCH = 0.2  # share of bytes left dense above which a warning says so
HOOKS = frozenset(nn.Module().__dict__) - {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


@dataclass(frozen=True)
class QuantizationReport:
    """What quantizing a model did; plain values.

    Args:
        config: How weights are stored.
        layers: Paths of the quantized layers.
        left: Weights that stay dense, with reasons.
        before: Bytes of all parameters before.
        quantized: Bytes of the quantized weights, statistics included.
        dense: Bytes of all parameters that stay dense.
    """

    config: Quantization
    layers: tuple[str, ...]
    left: tuple[LeftDense, ...]
    before: int
    quantized: int
    dense: int

    @property
    def after(self) -> int:
        """Bytes of the model."""
        return self.quantized + self.dense

    @property
    def share_dense(self) -> float:
        """Share of the model's bytes that could not be reduced: dense ones over all of them before."""
        return self.dense / max(self.before, 1)

    def __str__(self) -> str:
        config = self.config
        how = (
            f"blocks of {config.block_size}{', double quantization' if config.double_quant else ''}"
            if config.bits == 4
            else "rows"
        )
        lines = [
            f"{len(self.layers)} layers in {config.scheme} ({how}): {_size(self.before)} -> {_size(self.after)}; "
            f"{self.share_dense:.1%} of the bytes stay dense"
        ]
        groups: dict[str, list[LeftDense]] = {}
        for part in self.left:
            groups.setdefault(part.reason, []).append(part)
        rows = [(sum(p.nbytes for p in parts), reason, parts) for reason, parts in groups.items()]
        for nbytes, reason, parts in sorted(rows, key=lambda row: -row[0]):
            more = f" and {len(parts) - 1} more" if parts[1:] else ""
            lines.append(f"  dense {_size(nbytes):>9}  {parts[0].key}{more}: {reason}")
        rest = self.dense - sum(row[0] for row in rows)
        lines += [f"  dense {_size(rest):>9}  norms and biases"] * bool(rest)
        return "\n".join(lines)


def quantize(
    model: nn.Module,
    quantization: Quantizable = "nf4",
    *,
    skip: Sequence[str] | str | None = None,
    loftq: LoftQ | Mapping[str, Any] | None = None,
    anatomy: Family | Mapping[str, Any] | str | None = None,
    **options: Any,
) -> nn.Module:
    """Store the linear layers of a model in few bits, in place, and return the model.

    Layer by layer: each dense weight is freed before the next one is quantized. A layer keeps its identity, and with it its place in
    the model (all of them, where it is registered twice), its hooks and its train or eval mode; its class becomes that of the quantized
    layer, its weight is frozen. HF's Conv1D (GPT-2) becomes a quantized linear layer too. Output heads, embeddings, routers, layers
    whose weight another module's forward reads (``nn.MultiheadAttention``) and experts in one 3-D tensor stay dense;
    :func:`quantization_report` tells which and why.

    Args:
        model: Any module, with dense weights, before adapters are injected and before an optimizer or a wrapper knows its parameters.
        quantization: ``nf4``, ``fp4``, ``int8``; a mapping with the fields of :class:`Quantization`, ``skip`` and ``loftq``; or a
            :class:`Quantization`.
        skip: Layers to leave dense besides: roles, names, endings of names, globs or ``re:`` patterns. Whole parts, too.
        loftq: Prepare the base (arXiv 2310.08659): ``{"rank": r, "iterations": T, "targets": [...]}``. The factors are kept on the
            layers, for ``LoRA(init="loftq")``.
        anatomy: Roles of an architecture that the package does not know.
        **options: Further fields of :class:`Quantization`, such as ``block_size=128``.

    Raises:
        ConfigError: An option is unknown or out of range.
        DependencyError: The backend is not installed.
        ConflictError: Layers are quantized or adapted already, tied, or in use by an optimizer or wrapper.
        UnsupportedLayerError: A weight has no values, or a dtype that cannot be stored.
        TargetError: ``skip`` matches nothing, or no layer is left.

    Everything is checked before the first change; the model is untouched when one of these is raised.
    """
    asked = QuantizeOptions.parse(quantization, skip=skip, loftq=loftq, options=options)
    backend_for(asked.config)
    described = anatomy_of(model, anatomy)
    selection = select(described, asked.config, asked.skip)
    make = layer_maker(asked, described, selection)
    for path in selection.paths:
        layer = described.tree[path]
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        assert weight is not None
        with torch.no_grad():
            become(layer, make(path, canonical(layer, weight.detach()), None if bias is None else bias.detach()))
        del weight
        give_back()
    settle(described, selection, asked)
    return model


def canonical(layer: nn.Module, weight: Tensor) -> Tensor:
    """Return a dense weight of a linear layer as (out, in), contiguous."""
    return (weight.T if is_conv1d(layer) else weight).contiguous()


Make: TypeAlias = Callable[[str, Tensor, Tensor | None], nn.Linear]


def layer_maker(asked: QuantizeOptions, anatomy: Anatomy, selection: Selection) -> Make:
    """Return the function that makes the quantized layer of (path, dense weight, bias), after checking LoftQ against the model."""
    config, loftq = asked.config, asked.loftq
    backend = backend_for(config)
    prepared: set[str] = set()
    if loftq is not None:
        matcher = Matcher(anatomy)
        for pattern in loftq.targets or ():
            roles = anatomy.role_names(pattern)
            found = {site.path for role in roles for site in anatomy.roles[role]} if roles else set(matcher.paths(pattern))
            if not found & set(selection.paths):
                raise ConfigError(f"loftq: targets: '{pattern}' names none of the quantized layers.")
            prepared |= found
        prepared = prepared if loftq.targets is not None else set(selection.paths)
        for path in (path for path in selection.paths if path in prepared):
            weight = anatomy.tree[path]._parameters["weight"]
            assert weight is not None
            loftq.check(weight.shape, path)

    def make(path: str, weight: Tensor, bias: Tensor | None) -> nn.Linear:
        if loftq is not None and path in prepared:
            return loftq.layer(weight, bias, config)
        return backend.linear(weight, bias, config)

    return make


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # no C library that could be asked
        return None
    return trim


def give_back() -> None:
    """Return freed memory to the system, layer by layer: glibc keeps blocks below 32 MiB, and small ones in between pin them."""
    trim = _trim()
    if trim is not None:
        trim(0)


def become(layer: nn.Module, built: nn.Linear) -> None:
    """Turn a dense layer, which keeps its identity, hooks and mode, into a newly made quantized one."""
    state, new, training = layer.__dict__, built.__dict__, layer.training
    for name, value in new.items():
        if name not in HOOKS:
            state[name] = value
        elif isinstance(value, dict):
            state[name].update(value)
    layer.__class__ = built.__class__
    layer.training = training
    for tensor in built._parameters.values():  # bitsandbytes' weights know their layer
        if tensor is not None and getattr(tensor, "module", None) is built:
            tensor.__dict__["module"] = layer


def settle(anatomy: Anatomy, selection: Selection, asked: QuantizeOptions) -> QuantizationReport:
    """Finish a model whose layers are quantized: keep torch off its fast path, tell transformers, note the report and warn."""
    tree = anatomy.tree
    for path in selection.paths:
        above = [module for prefix, module in tree.modules.items() if path.startswith(f"{prefix}.") or (not prefix and path)]
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in above):
            tree[path].register_forward_pre_hook(noop_pre_hook)  # a hook makes torch leave the path that reads dense weights
        for module in above:
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
    report = _report(anatomy, selection, asked.config)
    anatomy.root.__dict__[REPORT] = report
    if tree.hf_roots and "transformers" in sys.modules:
        from lightning_peft.loading.streamed import tell_transformers

        for root in tree.hf_roots:
            tell_transformers(tree[root])
    if report.share_dense > MUCH:
        largest = max(report.left, key=lambda part: part.nbytes, default=None)
        most = "" if largest is None else f", most of all '{largest.key}' ({largest.reason})"
        warnings.warn(
            f"{report.share_dense:.0%} of the bytes of {type(anatomy.root).__name__} stay dense{most}; see lp.quantization_report(model).",
            stacklevel=3,
        )
    return report


def _report(anatomy: Anatomy, selection: Selection, config: Quantization) -> QuantizationReport:
    quantized = 0
    for path in selection.paths:
        layer, backend = anatomy.tree[path], backend_of(anatomy.tree[path])
        assert backend is not None
        assert isinstance(layer, nn.Linear)
        quantized += backend.nbytes(layer)
    dense = selection.vectors + sum(part.nbytes for part in selection.left)
    return QuantizationReport(config, selection.paths, selection.left, selection.before, quantized, dense)


def quantization_report(model: nn.Module) -> QuantizationReport | None:
    """Return what :func:`quantize` did to a model or to a part of it, or None if it was not called for it."""
    return next((report for module in model.modules() if (report := module.__dict__.get(REPORT)) is not None), None)


def require_same(model: nn.Module, asked: QuantizeOptions) -> bool:
    """Return whether a model has quantized layers, all of them stored as ``asked``; False if it has none.

    Raises:
        ConflictError: They are stored in another way, or were prepared in another way.
    """
    layers = [(path, module) for path, module in model.named_modules() if backend_of(module) is not None]
    for path, layer in layers:
        backend = backend_of(layer)
        assert backend is not None
        assert isinstance(layer, nn.Linear)
        found, recipe = codes_of(backend.config(layer)), recipe_of(layer)
        iterations = 1 if recipe is None else recipe["iterations"]
        wanted = 1 if asked.loftq is None else asked.loftq.iterations
        everywhere = recipe is not None or (asked.loftq is not None and asked.loftq.targets is None)
        if found != codes_of(asked.config) or (everywhere and iterations != wanted):
            raise ConflictError(
                f"'{path}' is quantized already as {found}{f', LoftQ with {iterations} iterations' if recipe else ''}, and "
                f"quantization asks for {codes_of(asked.config)}{f', LoftQ with {wanted} iterations' if wanted > 1 else ''}. Quantize the "
                "dense model once, or leave quantization out and use the model as it is."
            )
    return bool(layers)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"
