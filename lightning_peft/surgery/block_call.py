"""One call of a block, taken apart so that it can be made again with other hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lightning_peft.errors import ConflictError, PortError
from lightning_peft.surgery.stack import Call


class _Hole:
    """Stands for a tensor among the arguments of a call."""


_TENSOR = _Hole()


class BlockCall:
    """One call of a block, to be made with other hidden states, once or more.

    Args:
        base: The block's forward.
        names: Its parameter names; the first one is the hidden states.
        args: Positional arguments.
        kwargs: Named arguments.
    """

    def __init__(self, base: Call, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.base, self.names = base, names
        self.out: Any = None
        self.read: set[int] = set()  # which of the tensors beside its hidden states later blocks read
        self.x: Tensor = args[0] if args else kwargs[names[0]]
        self.dtype = self.x.dtype
        self._args: tuple[Any, ...] = (None, *args[1:]) if args else ()
        self._kwargs = {name: value for name, value in kwargs.items() if args or name != names[0]}
        self._leaves: list[Any] = []
        self._spec: Any = None

    def __call__(self, x: Tensor, given: Sequence[Tensor] | None = None) -> Tensor:
        """Run the block on ``x``, with ``given`` in place of its other tensors; its whole result is left in ``out`` without them."""
        args, kwargs = self._args, self._kwargs
        if given is not None:
            tensors = iter(given)
            args, kwargs = tree_unflatten([next(tensors) if leaf is _TENSOR else leaf for leaf in self._leaves], self._spec)
        x = x.to(self.dtype)
        out = self.base(x, *args[1:], **kwargs) if args else self.base(**{self.names[0]: x}, **kwargs)
        if given is None or not torch.is_grad_enabled():
            self.out = out if self.out is None else self.out  # of two halves the first one's, which has run the attention
        elif any(t.requires_grad for i, t in enumerate(beside(out)) if i in self.read):
            raise ConflictError(
                "a reversible block makes a tensor for later blocks (T5's position bias) from something that trains, which would get no "
                "gradient. Exclude that tensor from what trains."
            )
        first = out[0] if type(out) is tuple and out else out
        if not isinstance(first, Tensor):
            raise PortError(
                f"a block returned {type(out).__name__}; a reversible block returns its hidden states, or a tuple that begins with them."
            )
        return first

    def give_up_tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of the arguments, and hold them no longer: from now on they are given."""
        leaves, self._spec = tree_flatten((self._args, self._kwargs))
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._args, self._kwargs = (), {}
        del self.x
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    def cached(self) -> bool:
        """Return whether a KV cache with earlier positions is among the arguments."""
        caches = [c for c in (*self._args, *self._kwargs.values()) if hasattr(c, "get_seq_length")]
        return any(int(cache.get_seq_length()) > 0 for cache in caches)

    def without(self, caches: Mapping[str, int]) -> BlockCall:
        """Return the same call with no KV cache."""
        kwargs = {name: None if name in caches and name != "use_cache" else v for name, v in self._kwargs.items()}
        places = {place for name, place in caches.items() if name != "use_cache"}
        args = tuple(None if i in places else v for i, v in enumerate(self._args))
        if args:
            return BlockCall(self.base, self.names, (self.x, *args[1:]), kwargs)
        return BlockCall(self.base, self.names, (), {self.names[0]: self.x, **kwargs})

    def result(self, hidden: Tensor) -> Any:
        """Return the block's result with other hidden states."""
        out, self.out = self.out, None
        return (hidden, *out[1:]) if type(out) is tuple else hidden


def beside(out: Any) -> list[Tensor]:
    """Return the tensors that a block gives beside its hidden states."""
    return [leaf for leaf in tree_leaves(out[1:]) if isinstance(leaf, Tensor)] if type(out) is tuple else []


def without_gradient(x: Tensor, number: int) -> Tensor:
    """Return hidden states between reversible blocks, for which a backward pass raises.

    Args:
        x: The hidden states behind a block, without a graph.
        number: Of the block.
    """
    hidden: Tensor = _NoGradient.apply(x.detach().requires_grad_(), number)  # type: ignore[no-untyped-call]
    return hidden


class _NoGradient(torch.autograd.Function):
    """Hidden states between reversible blocks: a loss on them would train nothing below, so it raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        ctx.number = number
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ConflictError(
            f"a loss on the hidden states behind block {ctx.number}, which lie between reversible blocks and have no gradient. Use the "
            "body's result only, set layers to the number of blocks below them, or anchor_every=0 to keep all activations."
        )
