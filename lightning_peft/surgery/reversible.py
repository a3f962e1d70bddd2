"""The mechanics of a reversible body: its blocks carry two streams, keep no activations, and run again in the backward pass.

The body's own forward runs its blocks, with the masks, positions and caches that it makes; so every kind of body is supported that
passes one tensor from block to block. The adapter on the body opens the record of the call. The one on each block reads the two streams
from that record, runs F and G without a graph, writes the new streams back, and hands on what would be the result, which the next
block ignores. The last one gives the body the result with all gradients (:class:`.ReversibleChain`). The record lives in a
thread local for the length of the call, so nothing of it stays on a module.

* A block is given its input in the dtype of its own, while the streams stay in fp32 (float64 in float64): what 16 bits keep is gone
  after two or three divisions.
* What a block returns beside its hidden states is passed on as it is, without gradient (T5's position bias). Where it would need one
  the backward pass raises; so does a gradient for the hidden states between blocks, which a model may return too.
* Without gradients the blocks run once, and fill a KV cache as always: a block's keys and values come from the stream that it reads, so
  generation with a cache is that without. With gradients the cache stays empty, as under gradient checkpointing.
* The attention and the MLP half of a block: the block runs with the layers of the other half skipped, which leaves the residual sum and
  so the half alone. Whether the two halves make the block is compared at the first call.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConflictError, PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.reversible import Check, Coupling, ReversibleChain, ReversibleLayer, combined
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.block_call import BlockCall, beside, without_gradient
from lightning_peft.surgery.edits import Replace, Tap
from lightning_peft.surgery.halves import SkipTap, skipping
from lightning_peft.surgery.passes import captured
from lightning_peft.surgery.ports import BodyPort, Port
from lightning_peft.surgery.recompute import cache_parameters, recomputed_elsewhere, without_cache
from lightning_peft.surgery.stack import Call, CallAdapter, stack_of
from lightning_peft.types import has_values, in_pieces

Part = Literal["block", "adapter", "attention", "mlp"]


@dataclass(frozen=True)
class Arrangement:
    """How a body becomes reversible.

    Args:
        f: What F is.
        g: What G is.
        coupling: λ, β, switch.
        every: Every so many layers keep their inputs; 0 keeps all activations, by plain autograd.
        every_low: The same where the blocks compute in 16 bits.
        check: Compare reconstructed inputs with kept ones.
        result: What each of the two streams counts in the body's hidden states.
    """

    f: Part
    g: Part
    coupling: Coupling
    every: int
    every_low: int
    check: Check
    result: tuple[float, float]


def reversible_edits(
    anatomy: Anatomy, port: BodyPort, count: int, arrangement: Arrangement, build: Callable[[BuildContext], nn.Module] | None
) -> tuple[Tap, ...]:
    """Return the edits that make the first ``count`` blocks of a body reversible.

    Args:
        anatomy: The model.
        port: The body.
        count: Number of reversible blocks.
        arrangement: F, G and the rest.
        build: Returns the adapter of one block, called with (B, S, d) in the streams' dtype; None where neither F nor G is one.
    """
    paths = port.blocks[:count]
    blocks = tuple(anatomy.root.get_submodule(path) for path in paths)
    taps: list[Tap] = [Replace(port, functools.partial(_build_body, arrangement=arrangement, blocks=blocks))]
    for number, (path, block) in enumerate(zip(paths, blocks, strict=True)):
        make = functools.partial(_build_block, block=block, number=number, arrangement=arrangement, build=build)
        taps.append(Tap(Port(path=path, scope=port.scope), make))
    return tuple(taps)


def _build_body(context: BuildContext, *, arrangement: Arrangement, blocks: tuple[nn.Module, ...]) -> ReversibleBody:
    return ReversibleBody(arrangement, blocks)


def _build_block(
    context: BuildContext,
    *,
    block: nn.Module,
    number: int,
    arrangement: Arrangement,
    build: Callable[[BuildContext], nn.Module] | None,
) -> ReversibleBlock:
    names = tuple(inspect.signature(type(block).forward).parameters)[1:]
    return ReversibleBlock(block, number, names, arrangement, None if build is None else build(context))


class _Running(threading.local):
    """The record of the body that runs in this thread. torch.compile can follow a thread local, but no context variable."""

    run: _Run | None = None


_RUNNING = _Running()


class ReversibleBody(CallAdapter):
    """Runs the body with a record of its streams.

    Args:
        arrangement: F, G and the rest.
        blocks: The reversible blocks; held without being registered.
    """

    blocks: tuple[nn.Module, ...]

    def __init__(self, arrangement: Arrangement, blocks: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.arrangement = arrangement
        object.__setattr__(self, "blocks", blocks)

    def reset_parameters(self) -> None:
        """Nothing to do: it has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the body.

        Raises:
            PortError: A block did not run.
            ConflictError: The model recomputes its blocks too, or they are sharded.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._check()
        run = _Run(self.arrangement, len(self.blocks))
        outer, _RUNNING.run = _RUNNING.run, run
        try:
            with recomputed_elsewhere(self.blocks):
                out = base(*args, **kwargs)
        finally:
            _RUNNING.run = outer
        if run.done != len(self.blocks):
            raise PortError(
                f"{run.done} of {len(self.blocks)} reversible blocks ran. Turn layer drop off, or make fewer blocks reversible (layers)."
            )
        return out

    def _check(self) -> None:
        for block in self.blocks:
            if block.training and getattr(block, "gradient_checkpointing", False) is True:
                raise ConflictError(
                    "the model recomputes its activations by itself, and reversible blocks do so too. Call "
                    "gradient_checkpointing_disable() on the model."
                )
            if in_pieces(block.parameters()):
                raise ConflictError(
                    "reversible blocks run again in the backward pass, where a sharded model (FSDP) has given their weights away. Train "
                    "with DDP or on one device, or take another method."
                )


class ReversibleBlock(CallAdapter):
    """One block of a reversible body.

    Args:
        block: Its module; held without being registered.
        number: Its place in the body.
        names: Parameter names of its forward; the first one is the hidden states.
        arrangement: F, G and the rest.
        adapter: What F or G is where they are no part of the block.
    """

    traced_alone: ClassVar[bool] = False
    block: nn.Module

    def __init__(
        self, block: nn.Module, number: int, names: tuple[str, ...], arrangement: Arrangement, adapter: nn.Module | None
    ) -> None:
        super().__init__()
        self.number, self.names, self.arrangement = number, names, arrangement
        self.caches = cache_parameters(block)
        self.adapter = adapter
        self.compared = not {arrangement.f, arrangement.g} <= {"attention", "mlp"}
        self.searched: set[Part] = set()
        object.__setattr__(self, "block", block)

    def reset_parameters(self) -> None:
        if self.adapter is not None:
            self.adapter.reset_parameters()  # type: ignore[operator]

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the block on the streams.

        Raises:
            PortError: The block runs outside its body, out of order, or changes the shape of the hidden states.
            ConflictError: It is asked to fill a KV cache with gradients on.
        """
        run = _RUNNING.run
        if run is None or run.done != self.number:
            raise PortError(
                f"reversible block {self.number} was called {'outside its body' if run is None else f'as number {run.done}'}. Blocks run in "
                "order, inside the module that owns them; turn layer drop and the model's own gradient checkpointing off."
            )
        if run.records():
            args, kwargs = without_cache(self, self.block, self.caches, args, kwargs)
        call = BlockCall(base, self.names, args, kwargs)
        if not self.compared and not torch.compiler.is_compiling() and has_values(call.x):
            self._compare(call)
        return run.step(self, call)

    def part(self, which: Part, call: BlockCall, x: Tensor, given: Sequence[Tensor] | None = None) -> Tensor:
        """Return F or G of ``x`` (B, S, d), in the shape and dtype of ``x``."""
        if which == "adapter":
            assert self.adapter is not None
            out: Tensor = self.adapter(x)
        else:
            with skipping("mlp" if which == "attention" else "attention" if which == "mlp" else None):
                out = call(x, given)
        if out.shape != x.shape:
            raise PortError(
                f"block {self.number} makes {tuple(out.shape)} of {tuple(x.shape)}; only blocks that keep the shape of the hidden "
                "states can be reversible. Set layers to the number of those before it."
            )
        if given is not None and torch.is_grad_enabled() and which not in self.searched:
            self._search(out, x, given)
            self.searched.add(which)
        return out.to(x.dtype)

    def layer(self, call: BlockCall) -> ReversibleLayer:
        """Return the block as a layer of a chain, with one call's arguments."""
        tensors = call.give_up_tensors()
        parameters = tuple(p for p in self.block.parameters() if p.requires_grad)
        f, g = (captured(functools.partial(_part_again, self, part, call)) for part in (self.arrangement.f, self.arrangement.g))
        return ReversibleLayer(f, g, tensors, parameters)

    def _search(self, out: Tensor, x: Tensor, given: Sequence[Tensor]) -> None:
        """Look in the graph of a block that runs again for what trains and is not the block's own: it would get no gradient."""
        known = {id(t) for t in (x, *given, *self.block.parameters())}
        todo, seen = [out.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", x)) not in known:
                raise ConflictError(
                    f"reversible block {self.number} reads a tensor that trains and belongs to no module of the block, such as a prefix that "
                    "all blocks share. It would get no gradient. Take that method out, or use one whose tensors lie in the block."
                )
            todo += [next_node for next_node, _ in node.next_functions]

    def _compare(self, call: BlockCall) -> None:
        """Compare the two halves, one after the other, with the block.

        Raises:
            PortError: They are not the same function.
        """
        if call.cached():
            return  # what it sees depends on the cache; the next call without one will do
        modes = [(m, m.training) for m in self.block.modules()]
        try:
            for module, _ in modes:
                module.training = False
            self._check_order()
            with torch.no_grad():
                bare, x = call.without(self.caches), call.x
                whole = bare(x)
                halves = self.part("mlp", bare, self.part("attention", bare, x))
        finally:
            for module, mode in modes:
                module.training = mode
        error = float((halves - whole).norm() / (whole.norm() + 1e-6))
        if not error <= (1e-3 if whole.dtype.itemsize >= 4 else 5e-2):
            raise PortError(
                f"block {self.number}: its attention half and its MLP half, one after the other, are not the block (they differ by "
                f"{error:.1e}); attention and MLP may read the same input. Take variant 1 or 2."
            )
        self.compared = True

    def _check_order(self) -> None:
        """Raise if an adapter lies around the skipped layers, and so would run when they do not."""
        for module in self.block.modules():
            stack = stack_of(module)
            entries = [] if stack is None else stack._entries
            skips = [i for i, e in enumerate(entries) if isinstance(e.adapter, SkipTap)]
            if skips and skips[-1] + 1 < len(entries):
                raise ConflictError(
                    f"adapter '{entries[-1].name}' was installed on '{entries[-1].path}' after the reversible method, which leaves that "
                    "layer out in one half of the block. Install the reversible method last, or take variant 1 or 2."
                )


def _part_again(block: ReversibleBlock, which: Part, call: BlockCall, x: Tensor, given: Sequence[Tensor]) -> Tensor:
    with recomputed_elsewhere((block.block,)):
        return block.part(which, call, x, given)


class _Run:
    """The streams of one call of a body.

    Args:
        arrangement: F, G and the rest.
        count: Number of reversible blocks.
    """

    def __init__(self, arrangement: Arrangement, count: int) -> None:
        self.arrangement, self.count = arrangement, count
        self.done = 0
        self.start: Tensor | None = None
        self.passed: Tensor | None = None  # what the last block gave
        self.streams: tuple[Tensor, Tensor] | None = None
        self.chain: ReversibleChain | None = None
        self.made: dict[int, tuple[BlockCall, int, Tensor]] = {}  # what blocks gave beside their hidden states, held

    def records(self) -> bool:
        """Return whether the blocks will run again."""
        # Compiled, the graph is the compiler's, which chooses by itself what to keep and what to compute again.
        return self.arrangement.every > 0 and torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def step(self, block: ReversibleBlock, call: BlockCall) -> Any:
        """Run one block and return what the body is to pass on."""
        if self.passed is not None and self.passed is not call.x and not torch.compiler.is_compiling():
            raise PortError(
                f"the model changes the hidden states between its blocks {self.done - 1} and {self.done}, where two streams run. Set layers to "
                f"{self.done}, or take another method."
            )
        start = self.start = call.x if self.start is None else self.start
        last = self.done + 1 == self.count
        if self.records():
            hidden = self._recorded(block, call, start, last)
        else:
            if self.streams is None:
                wide = start.to(torch.promote_types(start.dtype, torch.float32))
                self.streams = wide, wide
            parts = (functools.partial(block.part, part, call) for part in (self.arrangement.f, self.arrangement.g))
            self.streams = self.arrangement.coupling.forward(*self.streams, *parts)
            hidden = combined(self.streams, self.arrangement.result, start.dtype)
        self.done, self.passed = self.done + 1, hidden
        return call.result(hidden)

    def _recorded(self, block: ReversibleBlock, call: BlockCall, start: Tensor, last: bool) -> Tensor:
        if self.chain is None:
            wide = start.to(torch.promote_types(start.dtype, torch.float32))
            low = wide.dtype != start.dtype or torch.is_autocast_enabled(start.device.type)
            every = self.arrangement.every_low if low else self.arrangement.every
            a = self.arrangement
            self.chain = ReversibleChain(a.coupling, wide, every=every, check=a.check, result=a.result)
        layer = block.layer(call)
        for tensor in layer.tensors:
            if id(tensor) in self.made:
                maker, place, _ = self.made[id(tensor)]
                maker.read.add(place)
        self.chain.append(layer)
        self.made |= {id(t): (call, i, t) for i, t in enumerate(beside(call.out)) if id(t) not in self.made}
        if last:
            return self.chain.finish(start)
        between = combined((self.chain.x1, self.chain.x2), self.arrangement.result, start.dtype)
        return without_gradient(between, self.done)
