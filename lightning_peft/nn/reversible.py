"""Reversible coupling of two streams: Liao et al. 2023, "Make Pre-trained Model Reversible", arXiv 2306.00477, section 3.

``y1 = λ x1 + F(x2)``, ``y2 = β x2 + G(y1)``, and back ``x2 = (y2 - G(y1)) / β``, ``x1 = (y1 - F(x2)) / λ``. So a backward pass can walk
down from the outputs and needs no activation of the layers. With λ or β below 1 every division enlarges the rounding error, about ten
times per layer, and the gradients of the lowest of many layers would be noise. Therefore every k-th layer keeps its two inputs, an
anchor: there the walk starts anew, and between two anchors at most k - 1 layers are inverted. k = 1 inverts nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import get_device_states, set_device_states

from lightning_peft.errors import ConflictError
from lightning_peft.nn.bottleneck import BottleneckAdapter
from lightning_peft.types import has_values

Half = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""F or G of one layer: given the stream and the layer's other tensors, in the stream's shape and dtype."""
Check = Literal["off", "warn", "raise"]
MEAN = (0.5, 0.5)
TOLERANCE = 1e-2  # of a reconstructed input, relative; a stream that is further off gives gradients that are


@dataclass(frozen=True)
class Coupling:
    """λ, β, and whether the streams change places between layers."""

    lam: float
    beta: float
    switch: bool

    def forward(
        self, x1: Tensor, x2: Tensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs of the next layer."""
        y1 = self.lam * x1 + f(x2)
        y2 = self.beta * x2 + g(y1)
        return (y2, y1) if self.switch else (y1, y2)

    def inverse(
        self, y1: Tensor, y2: Tensor, f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the inputs from which :meth:`forward` made these."""
        y1, y2 = (y2, y1) if self.switch else (y1, y2)
        x2 = (y2 - g(y1)) / self.beta
        return (y1 - f(x2)) / self.lam, x2


def combined(streams: tuple[Tensor, Tensor], weights: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Return the weighted sum of two streams."""
    return (weights[0] * streams[0] + weights[1] * streams[1]).to(dtype)


class RandomState:
    """Random numbers and autocast as they were at one moment, for a call that runs again.

    Args:
        x: A tensor on the device of the call.
    """

    def __init__(self, x: Tensor) -> None:
        self.device = x.device.type
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(x)
        names = [name for name in dict.fromkeys(("cpu", self.device)) if torch.amp.is_autocast_available(name)]
        self.autocast = [(name, torch.get_autocast_dtype(name), torch.is_autocast_enabled(name)) for name in names]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Run as then; afterwards the generators are where they were."""
        options: dict[str, Any] = {} if self.device in ("cpu", "meta") else {"device_type": self.device}
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self.devices, **options))
            for name, dtype, enabled in self.autocast:
                stack.enter_context(torch.autocast(name, dtype=dtype, enabled=enabled, cache_enabled=False))
            torch.set_rng_state(self.cpu)
            if self.devices:
                set_device_states(self.devices, self.states, device_type=self.device)
            yield


@dataclass(frozen=True)
class ReversibleLayer:
    """One layer of a chain.

    Args:
        f: F.
        g: G.
        tensors: What both are given besides the stream: masks, position embeddings, the output of an encoder.
        parameters: What trains in them.
    """

    f: Half
    g: Half
    tensors: tuple[Tensor, ...]
    parameters: tuple[nn.Parameter, ...]


class ReversibleChain:
    """Layers run one after the other without a graph; :meth:`finish` gives the result that has all their gradients.

    Args:
        coupling: λ, β, switch.
        x: Input of both streams, in their dtype.
        every: k: layers 0, k, 2k, ... keep their inputs.
        check: Keep all inputs and compare the reconstructed ones with them.
        result: What each of the two streams counts in the result.
    """

    def __init__(
        self, coupling: Coupling, x: Tensor, *, every: int, check: Check = "off", result: tuple[float, float] = MEAN
    ) -> None:
        self.coupling, self.every, self.check, self.result = coupling, every, check, result
        self.x1 = self.x2 = x.detach()
        self.layers: list[ReversibleLayer] = []
        self.states: list[tuple[RandomState, RandomState]] = []
        self.anchors: dict[int, tuple[Tensor, Tensor]] = {}
        self.inputs: list[tuple[Tensor, Tensor]] = []

    def append(self, layer: ReversibleLayer) -> None:
        """Run one more layer."""
        if len(self.layers) % self.every == 0:
            self.anchors[len(self.layers)] = self.x1, self.x2
        if self.check != "off":
            self.inputs.append((self.x1, self.x2))
        states: list[RandomState] = []

        def run(half: Half, x: Tensor) -> Tensor:
            states.append(RandomState(x))
            return half(x, layer.tensors)

        with torch.no_grad():
            self.x1, self.x2 = self.coupling.forward(self.x1, self.x2, lambda x: run(layer.f, x), lambda x: run(layer.g, x))
        self.layers.append(layer)
        self.states.append((states[0], states[1]))

    def finish(self, x: Tensor) -> Tensor:
        """Return the streams' weighted sum, in the dtype of ``x``.

        Args:
            x: The input with which the chain was made, with its graph.
        """
        tensors = {id(t): t for layer in self.layers for t in layer.tensors}
        parameters = {id(p): p for layer in self.layers for p in layer.parameters}
        # The function's own arguments, so that whoever waits for the gradients of parameters (DDP) sees them.
        places = {key: i for i, key in enumerate((*tensors, *parameters))}
        result: Tensor = _Chain.apply(self, places, len(tensors), x, *tensors.values(), *parameters.values())  # type: ignore[no-untyped-call]
        return result


class _Chain(torch.autograd.Function):
    """Gradients of a chain, from its outputs, its anchors and what its layers were given."""

    @staticmethod
    def forward(ctx: Any, chain: ReversibleChain, places: dict[int, int], count: int, x: Tensor, *inputs: Tensor) -> Tensor:
        tensors, ctx.places = inputs[:count], places
        ctx.given = [[places[id(t)] for t in layer.tensors] for layer in chain.layers]
        ctx.layers = [(layer.f, layer.g, layer.parameters) for layer in chain.layers]  # their tensors are autograd's to keep
        ctx.states, ctx.coupling, ctx.check, ctx.inputs = chain.states, chain.coupling, chain.check, chain.inputs
        ctx.anchored, ctx.dtype, ctx.moving = list(chain.anchors), x.dtype, [t.requires_grad for t in tensors]
        anchors = [t for pair in chain.anchors.values() for t in pair]
        ctx.save_for_backward(chain.x1, chain.x2, *anchors, *tensors)
        ctx.result = chain.result
        return combined((chain.x1, chain.x2), chain.result, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        lam, beta, switch = ctx.coupling.lam, ctx.coupling.beta, ctx.coupling.switch
        y1, y2, *saved = ctx.saved_tensors
        anchors = {number: (saved[2 * i], saved[2 * i + 1]) for i, number in enumerate(ctx.anchored)}
        tensors = saved[2 * len(anchors) :]
        sums: dict[int, Tensor] = {}
        d1, d2 = (weight * gradient.to(y1.dtype) for weight in ctx.result)
        for number in reversed(range(len(ctx.layers))):
            f, g, parameters = ctx.layers[number]
            given, moving = [tensors[i] for i in ctx.given[number]], [ctx.moving[i] for i in ctx.given[number]]
            places = [i for i, m in zip(ctx.given[number], moving, strict=True) if m] + [ctx.places[id(p)] for p in parameters]
            at = _Local(given, moving, parameters, places, sums)
            before_f, before_g = ctx.states[number]
            # Below the first layer nothing may want a gradient.
            moves = number > 0 or ctx.needs_input_grad[3]
            if switch:
                y1, y2, d1, d2 = y2, y1, d2, d1
            if number in anchors:
                x1, x2 = anchors[number]
                value, pull_f = at(f, x2, before_f, moves)
                y1 = lam * x1 + value
                _, pull = at(g, y1, before_g)
                d1 = d1 + pull(d2)
                d1, d2 = lam * d1, beta * d2 + pull_f(d1)
            else:
                value, pull = at(g, y1, before_g)
                x2 = (y2 - value) / beta
                d1 = d1 + pull(d2)
                value, pull = at(f, x2, before_f)
                x1 = (y1 - value) / lam
                d1, d2 = lam * d1, beta * d2 + pull(d1)
            if ctx.check != "off" and has_values(x1):
                _compare(number, (x1, x2), ctx.inputs[number], ctx.check)
            y1, y2 = x1, x2
        whole = (d1 + d2).to(ctx.dtype) if ctx.needs_input_grad[3] else None
        return None, None, None, whole, *(sums.get(i) for i in range(len(ctx.places)))


class _Local:
    """Runs halves of one layer once more, with a graph of their own, and adds up what their backward passes give."""

    def __init__(
        self,
        given: list[Tensor],
        moving: list[bool],
        parameters: Sequence[nn.Parameter],
        places: list[int],
        sums: dict[int, Tensor],
    ) -> None:
        self.given, self.moving, self.parameters, self.places, self.sums = given, moving, parameters, places, sums

    def __call__(
        self, half: Half, x: Tensor, before: RandomState, moves: bool = True
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        x = x.detach().requires_grad_(moves)
        given = [t.detach().requires_grad_(m) for t, m in zip(self.given, self.moving, strict=True)]
        with torch.enable_grad(), before.restored():
            value = half(x, given)
        wanted = [x] * moves + [t for t in given if t.requires_grad] + list(self.parameters)

        def pull(gradient: Tensor) -> Tensor:
            if not wanted or not value.requires_grad:
                return torch.zeros_like(x)
            found = list(torch.autograd.grad(value, wanted, gradient, allow_unused=True))
            dx = found.pop(0) if moves else None
            for place, add in zip(self.places, found, strict=True):
                if add is not None:
                    self.sums[place] = self.sums[place] + add if place in self.sums else add
            return torch.zeros_like(x) if dx is None else dx

        return value.detach(), pull


def _compare(number: int, found: tuple[Tensor, Tensor], kept: tuple[Tensor, Tensor], check: Check) -> None:
    """Compare the reconstructed inputs of a layer with those that it had."""
    for name, ours, theirs in zip(("x1", "x2"), found, kept, strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=torch.finfo(theirs.dtype).tiny))
        if not error <= TOLERANCE:
            text = (
                f"reversible layer {number}: the reconstructed {name} is off by {error:.1e} of its size, more than {TOLERANCE:g}; the "
                "gradients below are too. Take a smaller anchor_every, or lam and beta nearer to 1."
            )
            if check == "raise":
                raise ConflictError(text)
            warnings.warn(text, stacklevel=2)


class StreamAdapter(BottleneckAdapter):
    """A bottleneck that is F or G by itself: ``W_up φ(W_down x + b_down) + b_up``, (..., d) -> (..., d)."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.ad(x)
