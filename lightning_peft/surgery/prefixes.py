"""The mechanics of learned keys and values on attention ports, written once for every method that has them.

``out = softmax(Q [K_p; K]ᵀ / √d_h) [V_p; V]``. The attention module looks its attention function up in transformers' registry by a
name in its config; an adapted module gets a copy of that config with the name of :func:`prefix_attention`, which adds the prefixes of
the module's active adapters and calls the function that the original config names. So

* nothing of a prefix enters the KV cache: each call adds it once, after the cache was read (``past_key_values``, the usual way, breaks
  under activation checkpointing);
* with the adapters disabled the arguments pass through untouched;
* the model's own config, which makes the masks and is saved, stays as it is. The copy goes when the last adapter of the module does.

Prefixes of several handles stand in install order: the first one is nearest to the text. Attention maps, where returned, have the
prefix's columns in front.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.gates import BuildGate, Gate
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import BuildCall, Edit, Tap
from lightning_peft.surgery.ports import AttentionPort
from lightning_peft.surgery.sites import split_input
from lightning_peft.surgery.stack import Call, CallAdapter, bypass_error, stack_of
from lightning_peft.surgery.tree import is_within

if TYPE_CHECKING:
    from lightning_peft.surgery.inject import Surgery

ATTENTION = "lightning_peft_prefix"
BASE_CONFIG = "_peft_base_config"
SUPPORTED = ("sdpa", "eager")

BuildPrefix = Callable[[BuildContext, AttentionPort], nn.Module]


class _Running(threading.local):
    """Gains of the prefixes whose attention module runs in this thread: nothing that varies per call lies on a module."""

    def __init__(self) -> None:
        self.gains: dict[int, Tensor] = {}


_RUNNING = _Running()


@dataclass(frozen=True)
class PrefixEdit(Tap):
    """A tap on an attention port that also sends the module's attention through :func:`prefix_attention`."""

    port: AttentionPort

    def gated(self, gate: BuildGate, anatomy: Anatomy) -> Edit:
        """Return the edit with a gain on keys and values; the gate reads what the attention module reads.

        Raises:
            PortError: How wide that is is not known.
        """
        roles = (sites for role, sites in anatomy.roles.items() if role.endswith("attention.query"))
        width = next((s.spec.in_features for sites in roles for s in sites if is_within(s.path, self.port.path)), None)
        if width is None:
            raise PortError(
                f"'{self.port.path}' has no layer that is known as its attention.query, so the width of what a gate would read is not "
                "known. Take the prefix without a gate, or describe the model (anatomy=)."
            )
        return replace(self, build=functools.partial(_build_gated, build=self.build, gate=functools.partial(gate, width=width)))

    def check(self, surgery: Surgery) -> None:
        """Raise :class:`PortError` unless the module uses an attention function that can take a prefix."""
        module = surgery.root.get_submodule(self.port.path)
        _attention_function(module, _implementation(module))
        if getattr(module, "reorder_and_upcast_attn", False) and _implementation(module) == "eager":
            raise PortError(
                f"'{self.port.path}' has reorder_and_upcast_attn, which with eager attention leaves the attention interface. Load "
                "the model with attn_implementation='sdpa'."
            )

    def apply(self, surgery: Surgery) -> None:
        super().apply(surgery)
        module = surgery.root.get_submodule(self.port.path)
        original: Any = module.config
        if not hasattr(original, BASE_CONFIG):
            register_attention()
            config = copy.copy(original)
            setattr(config, BASE_CONFIG, original)
            config._attn_implementation_internal = ATTENTION
            stack = stack_of(module)
            assert stack is not None
            stack._on_close.append(functools.partial(setattr, module, "config", original))
            module.config = config


def prefix_tap(port: AttentionPort, build: BuildPrefix) -> PrefixEdit:
    """Return the edit that puts a prefix on an attention port.

    Args:
        port: The attention module.
        build: Given context and port, returns a module that is called without arguments and gives keys and values, each
            ``(p, kv_heads x head_dim)``.
    """
    return PrefixEdit(port, functools.partial(_build, port=port, build=build))


def _build(context: BuildContext, *, port: AttentionPort, build: BuildPrefix) -> PrefixTap:
    return PrefixTap(build(context, port), port.path)


def _build_gated(context: BuildContext, *, build: BuildCall, gate: BuildGate) -> CallAdapter:
    tap = build(context)
    assert isinstance(tap, PrefixTap)
    tap.gate = gate(context)
    return tap


class PrefixTap(CallAdapter):
    """Holds the prefix of one attention module; :func:`prefix_attention` reads it inside the module's forward.

    Args:
        tokens: Called without arguments, gives keys and values.
        path: Path of the attention module.
    """

    gate: Gate | None  # gives the gain of keys and values from what the attention module reads; None is 1

    def __init__(self, tokens: nn.Module, path: str) -> None:
        super().__init__()
        self.tokens, self.path, self.gate = tokens, path, None
        self.reached = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_attention()  # a model unpickled in a fresh process finds its attention function

    def reset_parameters(self) -> None:
        self.tokens.reset_parameters()  # type: ignore[operator]
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the attention module.

        Raises:
            AdapterBypassedError: The module ran without calling its attention function, so the prefix had no effect.
        """
        if self.gate is not None:
            hidden, _ = split_input(self, args, kwargs)
            _RUNNING.gains[id(self)] = self.gate(hidden)[..., None]  # (B, 1, 1, 1), as keys and values are
        out = base(*args, **kwargs)
        if not self.reached:
            raise bypass_error("prefix", [self.path])
        return out

    def prefix(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the prefix, (B, kv_heads, p, d_h) like ``key`` and ``value``, for the call that runs."""
        prefix_key, prefix_value = (_as_heads(t, like) for t, like in zip(self.tokens(), (key, value), strict=True))
        gain = _RUNNING.gains.pop(id(self), None)
        if gain is None:
            return prefix_key, prefix_value
        return prefix_key * gain.to(key.dtype), prefix_value * gain.to(value.dtype)


def register_attention() -> None:
    """Make :func:`prefix_attention` known to transformers; does no harm twice."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, prefix_attention)


def prefix_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention of an adapted module.

    Args:
        module: The attention module.
        query: (B, heads, Q, d_h).
        key: (B, kv_heads, K, d_h), from the cache where there is one.
        value: (B, kv_heads, K, d_v).
        attention_mask: None, or (B or 1, heads or 1, Q, K), boolean (True is visible) or additive.
        **kwargs: What the module passes to its attention function; ``position_bias`` (T5) has one column per key.

    Returns:
        What the module's own attention function returns: (B, Q, heads, d_v) and the attention map or None.

    Raises:
        PortError: The implementation or the kind of mask cannot take a prefix.
    """
    name = _implementation(module)
    attend = _attention_function(module, name)
    stack = stack_of(module)
    assert stack is not None
    taps = [e.adapter for e in stack._entries if e.active and isinstance(e.adapter, PrefixTap)]
    if taps and kwargs.get("cache") is not None:
        raise PortError(
            "a prefix does not work with a paged cache (continuous batching). Generate with a dynamic or static cache."
        )
    for tap in taps:
        tap.reached = True
        prefix_key, prefix_value = tap.prefix(key, value)
        count, bias = prefix_key.shape[2], kwargs.get("position_bias")
        if attention_mask is None and name == "sdpa" and query.shape[2] > 1 and _is_causal(module, kwargs):
            # Without a mask sdpa would build the causal one itself: aligned at the upper left, so that later keys (the free rest
            # of a static cache) are invisible. It is written out, to let every query see the prefix.
            length = query.shape[2]
            key, value = key[:, :, :length], value[:, :, :length]
            bias = None if bias is None else bias[..., :length]
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        if attention_mask is not None:
            attention_mask = _widen(attention_mask, count)
        if bias is not None:
            kwargs["position_bias"] = F.pad(bias, (count, 0))
    return attend(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


def _as_heads(prefix: Tensor, like: Tensor) -> Tensor:
    """(p, kv_heads x d) -> (B, kv_heads, p, d), in the dtype of the keys or values ``like``."""
    batch, heads, _, width = like.shape
    if prefix.shape[1] != heads * width:
        raise PortError(
            f"a prefix of width {prefix.shape[1]} does not fit keys or values of {heads} heads x {width}: the attention module expands them "
            "before its attention function, which prefixes do not support."
        )
    split: Tensor = prefix.to(like.dtype).unflatten(1, (heads, width))
    return split.transpose(0, 1).expand(batch, -1, -1, -1)


def _widen(mask: Any, count: int) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        shown = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise PortError(
            f"a prefix cannot lengthen an attention mask given as {shown}. Use attn_implementation='sdpa' or 'eager'."
        )
    return F.pad(mask, (count, 0), value=True if mask.dtype == torch.bool else 0.0)


def _is_causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _implementation(module: nn.Module) -> str:
    """Return the attention implementation of the original config, now: ``set_attn_implementation`` may have changed it."""
    config = getattr(module, "config", None)
    original = getattr(config, BASE_CONFIG, config)
    name = getattr(original, "_attn_implementation", None) or "eager"
    if config is None or name not in SUPPORTED:
        raise PortError(
            f"{type(module).__name__} uses the attention implementation '{name}'; a prefix works with {' and '.join(SUPPORTED)}. Load the "
            "model with attn_implementation='sdpa'."
        )
    return str(name)


def _attention_function(module: nn.Module, name: str) -> Callable[..., Any]:
    scope: dict[str, Any] = inspect.unwrap(type(module).forward).__globals__
    found = scope.get("eager_attention_forward") if name == "eager" else scope["ALL_ATTENTION_FUNCTIONS"][name]
    if found is None:
        raise PortError(
            f"{type(module).__name__} has no eager attention function. Load the model with attn_implementation='sdpa'."
        )
    return found  # type: ignore[no-any-return]
