"""Tracing one block of each kind: a deep stack repeats itself, so what one of equal blocks did is booked for all of them.

Two calls are equal if the blocks have the same layers, adapters, dtypes, settings and trainable tensors, and the inputs the same
shapes and need of gradient. The first one runs for itself, forward and backward. Then a stand-in takes its place, and that of all
equal ones: it takes as much memory and as many operations, forward and backward, and gives tensors of the same shapes, so that
everything around it happens as it would.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_peft.cost.tracer import Tracer
from lightning_peft.nn.adapter import AdapterModule
from lightning_peft.surgery.recompute import RecomputedForward

_OWN_NUMBER = re.compile(r"(layer|block)_?(idx|index|id|number|num)$")
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class _Shape:
    """What is known of a tensor without its numbers."""

    size: torch.Size
    dtype: torch.dtype
    moves: bool  # requires a gradient

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.dtype, tensor.requires_grad)

    @property
    def nbytes(self) -> int:
        return self.size.numel() * self.dtype.itemsize


@dataclass
class Cost:
    """What one call of a block takes.

    Args:
        rise: Bytes of the forward's peak above its start.
        kept: Bytes more alive after the forward than before, outputs left out: saved for the backward pass, or put into a cache.
        cached: Bytes of the tensors that were put into a KV cache; where they are parts of larger ones, less than ``kept``.
        flops: Operations of the forward.
        holds: Which of the arguments the backward pass needs, by position.
        out: The outputs, tensors as :class:`_Shape`; and how they were nested.
        back_rise: Bytes of the backward's peak above its start.
        back_flops: Operations of the backward, recomputed ones included.
        trains: Which of the block's parameters get a gradient, by position.
        trains_outside: Parameters of other modules that get one too.
    """

    rise: int
    kept: int
    cached: int
    flops: int
    holds: list[int]
    out: tuple[list[Any], Any]
    back_rise: int = 0
    back_flops: int = 0
    trains: list[int] = field(default_factory=list)
    trains_outside: list[nn.Parameter] = field(default_factory=list)


class Blocks:
    """Runs stand-ins for the blocks of a model inside ``with``.

    Args:
        tracer: The mode under which the model runs.
        model: The model.
        blocks: Its blocks, none in another, and the :func:`signature` of each.
    """

    def __init__(self, tracer: Tracer, model: nn.Module, blocks: Mapping[nn.Module, Hashable]) -> None:
        self.tracer, self.blocks = tracer, blocks
        self.costs: dict[Hashable, Cost] = {}
        self.cached = 0  # bytes that stand-ins would have put into a cache
        self._elsewhere = 0  # bytes booked for that
        self.gradients: set[nn.Parameter] = set()  # those that stand-ins have made
        inside = {id(p) for block in blocks for p in block.parameters()}
        self._outside = [p for p in model.parameters() if p.requires_grad and id(p) not in inside]

    def __enter__(self) -> Blocks:
        self._before = [block.__dict__.get("forward") for block in self.blocks]
        for block in self.blocks:
            block.forward = _Guarded(self, block, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for block, before in zip(self.blocks, self._before, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
        self.tracer.book(-self._elsewhere - sum(self._gradient_bytes(p) for p in self.gradients))

    def make_gradient(self, parameter: nn.Parameter) -> None:
        """Book the gradient of a parameter, once."""
        if parameter not in self.gradients:
            self.gradients.add(parameter)
            self.tracer.book(self._gradient_bytes(parameter))

    def _gradient_bytes(self, parameter: nn.Parameter) -> int:
        return int(parameter.nbytes * self.tracer.gradient_share)

    def call(self, block: nn.Module, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the stand-in of a block."""
        leaves, nesting = tree_flatten((args, kwargs))
        key = (self.blocks[block], torch.is_grad_enabled(), tuple(map(_described, leaves)))
        cost = self.costs.get(key)
        fills = cost is None  # the block itself has filled its cache
        if cost is None:
            with self.tracer.unwatched():
                cost = self.costs[key] = self._measure(block, inner, leaves, nesting)
        return self._stand_in(block, cost, leaves, fills)

    def _measure(self, block: nn.Module, inner: Callable[..., Any], leaves: list[Any], nesting: Any) -> Cost:
        """Run a block by itself, forward and backward, and leave everything as it was."""
        tracer, saved = self.tracer, set()

        def pack(tensor: Tensor) -> Tensor:
            saved.add(tensor.untyped_storage()._cdata)
            return tensor

        flops, not_here = tracer.flops, tracer.not_here
        alone = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in leaves]
        args, kwargs = tree_unflatten(alone, nesting)
        still = [weakref.ref(x) if isinstance(x, Tensor) and not x.requires_grad else None for x in alone]
        del alone
        watch, cached = tracer.watch(), sum(map(cached_bytes, leaves))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = inner(*args, **kwargs)
        watch.stop()
        del args, kwargs
        results, form = tree_flatten(out)
        shapes = [_Shape.of(r) if isinstance(r, Tensor) else r for r in results]
        size = sum(s.nbytes for s in shapes if isinstance(s, _Shape))
        kept = max(0, tracer.live - watch.start - size)
        # Saved by an operation, or for the second run of a block that recomputes.
        holds = [
            i
            for i, (x, ref) in enumerate(zip(leaves, still, strict=True))
            if isinstance(x, Tensor) and (x.untyped_storage()._cdata in saved or (ref is not None and ref() is not None))
        ]
        cost = Cost(watch.rise, kept, sum(map(cached_bytes, leaves)) - cached, watch.flops, holds, (shapes, form))
        del out
        flowing = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
        if flowing:
            del results
            slopes = [torch.empty_like(r) for r in flowing]
            watch = tracer.watch()
            torch.autograd.backward(flowing, slopes)
            watch.stop()
            cost.back_rise, cost.back_flops = watch.rise, watch.flops
            own = list(block.parameters())
            cost.trains = [i for i, p in enumerate(own) if p.grad is not None]
            cost.trains_outside = [p for p in self._outside if p.grad is not None]
            for parameter in (*own, *cost.trains_outside):
                parameter.grad = None
        # The gradients were freed as wholes.
        tracer.live += tracer.not_here - not_here
        tracer.flops, tracer.not_here = flops, not_here
        return cost

    def _stand_in(self, block: nn.Module, cost: Cost, leaves: list[Any], filled: bool) -> Any:
        self.tracer.flops += cost.flops
        self.tracer.reached(self.tracer.live + cost.rise)
        shapes, form = cost.out
        if any(isinstance(s, _Shape) and s.moves for s in shapes):
            moving = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad] or [torch.empty(0, requires_grad=True)]
            own = list(block.parameters())
            parameters = [own[i] for i in cost.trains] + cost.trains_outside
            held = [leaves[i].detach() for i in cost.holds]
            made = iter(_StandIn.apply(self, cost, parameters, held, *moving))  # type: ignore[no-untyped-call]
        else:
            made = iter([torch.empty(s.size, dtype=s.dtype) for s in shapes if isinstance(s, _Shape)])
            if not filled:
                self.cached += cost.cached
                self._elsewhere += cost.kept
                self.tracer.book(cost.kept)
        return tree_unflatten([next(made) if isinstance(s, _Shape) else s for s in shapes], form)


class _Guarded:
    """The forward of a block while stand-ins run."""

    def __init__(self, blocks: Blocks, block: nn.Module, inner: Callable[..., Any]) -> None:
        self.blocks, self.block, self.inner = blocks, block, inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.blocks.call(self.block, self.inner, args, kwargs)


class _StandIn(torch.autograd.Function):
    """Takes the memory of a block that does not run."""

    @staticmethod
    def forward(
        ctx: Any, blocks: Blocks, cost: Cost, parameters: list[nn.Parameter], held: list[Tensor], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        shapes = [s for s in cost.out[0] if isinstance(s, _Shape)]
        out = tuple(torch.empty(s.size, dtype=s.dtype) for s in shapes)
        ctx.mark_non_differentiable(*(t for t, s in zip(out, shapes, strict=True) if not s.moves))
        ctx.blocks, ctx.cost, ctx.parameters = blocks, cost, parameters
        ctx.inputs = [_Shape.of(t) for t in inputs]
        ctx.held = held
        blocks.tracer.book(cost.kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cost, tracer = ctx.cost, ctx.blocks.tracer
        tracer.flops += cost.back_flops
        tracer.reached(tracer.live + cost.back_rise)
        tracer.book(-cost.kept)
        ctx.held = None
        for parameter in ctx.parameters:
            ctx.blocks.make_gradient(parameter)
        return None, None, None, None, *(torch.empty(s.size, dtype=s.dtype) for s in ctx.inputs)


def signature(block: nn.Module) -> Hashable:
    """Return what two blocks must have in common to cost the same: everything but values and their own number."""
    lines: list[Hashable] = []
    for path, module in block.named_modules():
        tensors = [*module._parameters.items(), *module._buffers.items()]
        described = tuple((name, None if t is None else _Shape.of(t)) for name, t in tensors)
        skip = {"seed"} if isinstance(module, AdapterModule) else set()
        settings = tuple(
            (name, value)
            for name, value in vars(module).items()
            if isinstance(value, _PLAIN) and name not in skip and not _OWN_NUMBER.search(name)
        )
        lines.append((path, type(module), described, settings, _callable(vars(module).get("forward"))))
    return tuple(lines)


def cached_bytes(leaf: Any) -> int:
    """Return the bytes of the tensors in a KV cache of transformers, 0 for anything else."""
    if hasattr(leaf, "self_attention_cache"):
        return cached_bytes(leaf.self_attention_cache) + cached_bytes(leaf.cross_attention_cache)
    if isinstance(leaf, Tensor) or not hasattr(leaf, "get_seq_length"):
        return 0
    return sum(t.nbytes for layer in leaf.layers for t in vars(layer).values() if isinstance(t, Tensor) and t.dim())


def _callable(forward: Any) -> Hashable:
    """Return what an instance's own forward runs: adapters, or a wrapper such as checkpointing."""
    if isinstance(forward, RecomputedForward):
        return forward.recompute.active, forward.recompute.option, _callable(forward.recompute.inner)
    return None if forward is None else (type(forward), getattr(forward, "func", None))


def _described(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return _Shape.of(leaf)
    return cast(Hashable, leaf if isinstance(leaf, _PLAIN) else type(leaf))


def outermost(paths: Iterable[str]) -> list[str]:
    """Return the paths that do not lie below another one."""
    found: list[str] = []
    for path in sorted(paths):
        if not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found
