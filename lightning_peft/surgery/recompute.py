"""Gradient checkpointing: a block keeps its input only, and runs again when the backward pass needs what it computed.

Chen et al. 2016, arXiv 1604.06174. Of L blocks that each keep A bytes and pass on h bytes, L·h + A are left instead of L·A, for one
more forward of each block; every k-th block alone keeps L·(1 − 1/k)·A + L/k·h + A.

One mechanism for every model. The forward on the instance of a block (as in :mod:`.stack`, so that nothing is renamed and copies,
pickles and torch.compile work) calls ``torch.utils.checkpoint`` around what was there before: the block with its adapters. transformers'
own switch is not used, because it

* asks for the gradient of the embeddings (``enable_input_require_grads``), and with it for a backward pass below the first adapter;
  what frozen inputs need is only that the checkpoint does not look at them (``use_reentrant=False``);
* acts in train mode only, while ``from_pretrained`` gives a model in eval mode. Here a block recomputes whenever gradients are
  recorded, and never under ``no_grad``.

Random numbers and autocast are those of the first run. A KV cache is not filled while gradients are recorded: the second run would
append to it again. A body that a side network runs under ``no_grad`` keeps nothing, so there nothing runs twice; blocks that something
else recomputes (:func:`recomputed_elsewhere`) are left to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from lightning_peft.errors import ConfigError, ConflictError, TargetError, did_you_mean
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.passes import captured
from lightning_peft.surgery.stack import AdaptedForward, Call, stack_of
from lightning_peft.surgery.targets import Matcher
from lightning_peft.surgery.tree import is_within

CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_LEFT_EMPTY = "_peft_left_empty"


@dataclass(frozen=True, kw_only=True)
class GradientCheckpointing:
    """Which blocks run again in the backward pass, and where their inputs wait for it.

    Args:
        every: Every k-th block of each stack; the others keep their activations.
        offload: The inputs of the blocks wait in CPU memory, pinned where they come from CUDA. Changes nothing on the CPU.
        reentrant: torch's older implementation: its forward records no graph, so it is a little faster, but ``torch.autograd.grad``
            and parameters that several backward passes share (DDP with ``find_unused_parameters``) fail, and what leaves a block
            beside its result (router logits that a model records) has no gradient. Inputs that are frozen are no problem here.
        blocks: The modules to recompute, in the words of :class:`.Targets`: roles, paths or their ends, globs, ``re:``; a list of
            modules means its members. None takes the blocks that the anatomy knows.

    Raises:
        ConfigError: A value is of the wrong type or out of range, or two contradict each other.
    """

    every: int = 1
    offload: bool = False
    reentrant: bool = False
    blocks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if type(self.every) is not int or self.every < 1:
            raise ConfigError(f"GradientCheckpointing: every={self.every!r}, but it counts blocks: 1 or more.")
        for name in ("offload", "reentrant"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"GradientCheckpointing: {name}={getattr(self, name)!r} is neither true nor false.")
        if self.offload and self.reentrant:
            raise ConfigError("GradientCheckpointing: offload=True needs reentrant=False, which keeps one tensor per block.")
        if self.blocks is not None:
            blocks = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
            if not isinstance(blocks, Sequence) or not blocks or not all(isinstance(b, str) and b for b in blocks):
                raise ConfigError(f"GradientCheckpointing: blocks={self.blocks!r} is neither a path nor a list of paths.")
            object.__setattr__(self, "blocks", tuple(blocks))

    @classmethod
    def parse(cls, value: GradientCheckpointing | Mapping[str, Any] | bool | None) -> GradientCheckpointing | None:
        """Return the value that ``True`` or a mapping of fields spells; False and None mean no checkpointing.

        Raises:
            ConfigError: A field is unknown, or a value is.
        """
        if value is None or isinstance(value, GradientCheckpointing):
            return value
        if isinstance(value, bool):
            return cls() if value else None
        if not isinstance(value, Mapping):
            raise ConfigError(f"gradient_checkpointing={value!r} is neither true, false nor a mapping of options.")
        known = [f.name for f in dataclasses.fields(cls)]
        for name in value:
            if name not in known:
                hint = did_you_mean(str(name).removeprefix("use_"), known)
                raise ConfigError(f"GradientCheckpointing has no option {name!r}; options: {', '.join(known)}.{hint}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, from which :meth:`parse` makes this one again."""
        return {**dataclasses.asdict(self), "blocks": None if self.blocks is None else list(self.blocks)}


@dataclass(eq=False)
class Recompute:
    """What the forward of one block knows.

    Args:
        option: How to recompute; the block is one of those that do if ``active``.
        active: False: the block only leaves the cache empty, as its neighbours do.
        caches: Names under which the forward may take a KV cache, or be asked for one -> their positions.
        inner: The forward found on the instance; None is the class's.
    """

    option: GradientCheckpointing
    active: bool
    caches: dict[str, int]
    inner: Call | None

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block so that it can run again."""
        call: Call = self.inner or functools.partial(type(module).forward, module)
        if not torch.is_grad_enabled() or module in _ELSEWHERE.blocks:
            return call(*args, **kwargs)
        if self.caches:
            args, kwargs = without_cache(self, module, self.caches, args, kwargs)
        if not self.active:
            return call(*args, **kwargs)
        if not torch.compiler.is_compiling():
            call = captured(call)  # a second pass over the batch may run before this one is recomputed
        if self.option.reentrant:
            return _reentrant(module, call, args, kwargs)
        return _non_reentrant(call, args, kwargs, offload=self.option.offload)


def without_cache(
    asker: object, module: nn.Module, caches: Mapping[str, int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block that will run again, so that it fills no KV cache.

    Args:
        asker: Who asks, one for each block: the same cache a second time is one that should hold the first call's positions.
        module: The block.
        caches: Its :func:`cache_parameters`.
        args: Its positional arguments.
        kwargs: Its named arguments.

    Raises:
        ConflictError: The cache holds earlier positions, or should.
    """
    positional, named = list(args), dict(kwargs)
    for name, position in caches.items():
        holder: Any = named if name in named else positional
        key: Any = name if name in named else position
        if holder is positional and position >= len(positional):
            continue
        if name == "use_cache":
            holder[key] = False
        elif holder[key] is not None:
            if not torch.compiler.is_compiling():
                _refuse_filled(asker, module, holder[key])
            holder[key] = None
    return tuple(positional), named


def _refuse_filled(asker: object, module: nn.Module, cache: Any) -> None:
    """Raise unless the cache is one that the model has just made, for nobody to read."""
    reused = hasattr(cache, "__dict__") and id(asker) in vars(cache).get(_LEFT_EMPTY, ())
    if reused or _filled(cache):
        raise ConflictError(
            f"{type(module).__name__}: a KV cache that {'should hold' if reused else 'holds'} earlier positions, with gradients on, in a "
            "block whose activations are recomputed. The block runs twice, so it cannot fill a cache. Pass the whole sequence, "
            "generate under torch.no_grad(), or leave gradient checkpointing (or the reversible method) out."
        )
    vars(cache).setdefault(_LEFT_EMPTY, set()).add(id(asker))


class _Elsewhere(threading.local):
    """Blocks that something else recomputes in this thread, now."""

    blocks: Collection[nn.Module] = ()


_ELSEWHERE = _Elsewhere()


@contextlib.contextmanager
def recomputed_elsewhere(blocks: Collection[nn.Module]) -> Iterator[None]:
    """Inside, these blocks are recomputed by the caller, and gradient checkpointing leaves them alone."""
    before, _ELSEWHERE.blocks = _ELSEWHERE.blocks, blocks
    try:
        yield
    finally:
        _ELSEWHERE.blocks = before


def _filled(cache: Any) -> bool:
    cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder model
    if not hasattr(cache, "get_seq_length"):
        return True  # a tuple of keys and values
    for question in (cache.get_seq_length, getattr(cache, "has_previous_state", bool)):
        with contextlib.suppress(ValueError):  # it has layers of the other kind only: attention, or linear attention
            if int(question()) > 0:
                return True
    return False


def _non_reentrant(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *, offload: bool) -> Any:
    """Checkpoint a call. What it keeps is its first tensor; the others (masks, rotary tables) all blocks have in common."""
    where: int | str | None = next((i for i, a in enumerate(args) if isinstance(a, Tensor)), None)
    if where is None:
        where = next((name for name, a in kwargs.items() if isinstance(a, Tensor)), None)
    if where is None:
        return call(*args, **kwargs)
    x: Tensor = args[where] if isinstance(where, int) else kwargs[where]
    if isinstance(where, int):  # not held by the function too, or it would stay on the device
        args = (*args[:where], None, *args[where + 1 :])
    else:
        kwargs = {**kwargs, where: None}
    function = functools.partial(_call_with, call, where, args, kwargs)
    with torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda) if offload else contextlib.nullcontext():
        return checkpoint(function, x, use_reentrant=False)


def _call_with(call: Call, where: int | str, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
    if isinstance(where, int):
        return call(*args[:where], x, *args[where + 1 :], **kwargs)
    return call(*args, **{**kwargs, where: x})


def _reentrant(module: nn.Module, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Checkpoint a call by an autograd function, which sees the gradients of its arguments and results only.

    So every tensor becomes an argument or a result, however deep it lies; and one more argument wants a gradient, in place of
    inputs that are frozen. Nothing that trains here or below: nothing to recompute.
    """
    leaves, spec = tree_flatten((args, kwargs))
    wanted = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
    if not wanted and not any(p.requires_grad for p in module.parameters()):
        return call(*args, **kwargs)
    results: list[Any] = []

    def run(anchor: Tensor, *leaves: Any) -> tuple[Any, ...]:
        args, kwargs = tree_unflatten(leaves, spec)
        flat, result = tree_flatten(call(*args, **kwargs))
        results[:] = [result]
        return tuple(flat)

    flat = checkpoint(run, torch.empty(0, requires_grad=True), *leaves, use_reentrant=True)
    return tree_unflatten(flat, results[0])


def run_block(module: nn.Module, recompute: Recompute, /, *args: Any, **kwargs: Any) -> Any:
    """Forward of every block under gradient checkpointing."""
    return recompute.run(module, args, kwargs)


class RecomputedForward(AdaptedForward):
    """``partial(run_block, module, recompute)``."""

    @property
    def recompute(self) -> Recompute:
        """What it knows."""
        found: Recompute = self.args[1]
        return found


def checkpoint_blocks(
    root: nn.Module, anatomy: Anatomy, option: GradientCheckpointing, *, prefix: str = ""
) -> Callable[[], None]:
    """Let blocks of a model recompute their activations from now on.

    Blocks that do so already, in the same way, are left alone. Adapters may be installed and removed before and after.

    Args:
        root: The model.
        anatomy: What is known about it.
        option: Which blocks, and how.
        prefix: Path of the root as the user sees it, which ``option.blocks`` may contain or not.

    Returns:
        What takes it back; a second call does nothing.

    Raises:
        TargetError: No blocks are known and none are named, or a pattern matches none.
        ConflictError: The model recomputes its activations by itself, or a block does so in another way.
    """
    chosen = _named(anatomy, option.blocks, prefix) if option.blocks is not None else anatomy.blocks
    if not chosen:
        children = [name for name, _ in root.named_children()]
        raise TargetError(
            f"gradient_checkpointing: no blocks are known of {type(root).__name__} ({anatomy.family}). Name the modules to "
            f"recompute: gradient_checkpointing={{'blocks': [...]}}, paths or globs; it has {', '.join(children[:8]) or 'no children'}."
        )
    own = next((path for path, m in anatomy.tree.modules.items() if getattr(m, "gradient_checkpointing", False) is True), None)
    if own is not None:
        raise ConflictError(
            f"'{own or type(root).__name__}' recomputes its activations by itself; both would run each block three times. Call "
            "gradient_checkpointing_disable() on the model, or leave gradient_checkpointing out."
        )
    count: Counter[str] = Counter()
    active: set[str] = set()
    for path in chosen:
        stack = path.rpartition(".")[0]
        active |= {path} if count[stack] % option.every == 0 else set()
        count[stack] += 1
    caches = {path: cache_parameters(anatomy.tree[path]) for path in dict.fromkeys((*chosen, *anatomy.blocks))}
    empty = any(caches[path] for path in active)  # then in all blocks, lest a cache be filled in part
    made: list[tuple[nn.Module, RecomputedForward]] = []
    for path, names in caches.items():
        module = anatomy.tree[path]
        if not _same(path, module, option) and (path in active or (empty and names)):
            recompute = Recompute(option, path in active, names, module.__dict__.get("forward"))
            made.append((module, RecomputedForward(run_block, module, recompute)))
    for module, forward in made:
        module.forward = forward
    return functools.partial(_take_back, made)


def recomputed_blocks(root: nn.Module) -> list[str]:
    """Return the paths of the modules that recompute their activations, in model order."""
    return [path for path, module in root.named_modules() if (found := _found(module)) is not None and found.recompute.active]


def _named(anatomy: Anatomy, patterns: tuple[str, ...], prefix: str) -> tuple[str, ...]:
    """Return the modules that patterns name, lists as their members, in model order; none that lies inside another."""
    matcher, found = Matcher(anatomy, prefix), set[str]()
    for pattern in patterns:
        for path in matcher.modules(pattern):
            is_list = isinstance(anatomy.tree[path], (nn.ModuleList, nn.ModuleDict))
            found |= set(anatomy.tree.children(path)) if is_list else {path}
    outermost = {path for path in found if not any(path != other and is_within(path, other) for other in found)}
    return tuple(sorted(outermost, key=anatomy.tree.order.__getitem__))


def cache_parameters(module: nn.Module) -> dict[str, int]:
    """Return the names under which a block's forward may take a KV cache, or be asked for one -> their positions."""
    if getattr(module, "_can_checkpoint_with_cache", False):  # transformers' word for layers that only read a cache
        return {}
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    positions = {p.name: i for i, p in enumerate(parameters)}
    found = {name: positions.get(name, len(parameters)) for name in (*CACHES, "use_cache") if name in positions or takes_any}
    return found if takes_any or found.keys() & set(CACHES) else {}


def _same(path: str, module: nn.Module, option: GradientCheckpointing) -> bool:
    found = _found(module)
    if found is not None and found.recompute.option != option:
        raise ConflictError(
            f"'{path}' is under gradient checkpointing already, with {found.recompute.option}, and {option} is asked for. Ask once."
        )
    return found is not None


def _found(module: nn.Module) -> RecomputedForward | None:
    stack = stack_of(module)
    for forward in (module.__dict__.get("forward"), None if stack is None else stack._inner):
        if isinstance(forward, RecomputedForward):
            return forward
    return None


def _take_back(made: list[tuple[nn.Module, RecomputedForward]]) -> None:
    while made:
        module, forward = made.pop()
        stack = stack_of(module)
        if module.__dict__.get("forward") is forward:
            del module.forward
            if forward.recompute.inner is not None:
                module.forward = forward.recompute.inner
        elif stack is not None and stack._inner is forward:
            stack._inner = forward.recompute.inner
        else:  # somebody's own forward is around it
            forward.recompute.active, forward.recompute.caches = False, {}
