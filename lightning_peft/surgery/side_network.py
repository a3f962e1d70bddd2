"""The mechanics of a side network on a body port: the frozen body runs without gradient, a small network reads its blocks.

Two kinds of adapters work together. One on each block writes what flows through the block into the record of the running call; the
one on the body opens that record, runs the body under ``no_grad``, and gives the record to the network. The record lives
in a thread local for the length of the call, so nothing of it stays on a module.

Of an encoder-decoder model both stacks get a network, and the decoder's reads the encoder's. The way from the one to the other is the
encoder's output: behind its S positions stand further ones that hold the side network's (B, S, w), row after row. So it survives
whatever is done with that output (repeated for beams, handed to generate()); the decoder takes it off again, and so does the model before
it returns the encoder's output. The frozen decoder reads what it always did.

Everything inside the body is without gradient: another adapter in there would not train.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.ladder import Attended, Rung
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Replace, Tap
from lightning_peft.surgery.ports import AttentionPort, BodyPort, EmbeddingsPort, Port
from lightning_peft.surgery.stack import Call, CallAdapter
from lightning_peft.surgery.tree import is_within

Output = Literal["add", "replace", "hand_on"]
KNOWN_MASKS = ("attention_mask", "mask", "src_mask", "src_key_padding_mask")


class _Running(threading.local):
    """The record of the body that runs in this thread. torch.compile can follow a thread local, but no context variable."""

    record: dict[int, Rung] | None = None


_RUNNING = _Running()


def is_causal(anatomy: Anatomy, port: BodyPort) -> bool | None:
    """Return whether positions of a body see earlier ones only; None where nothing tells it.

    Raises:
        PortError: The blocks take (length, batch, d).
    """
    if port.scope.rpartition(".")[2] in ("encoder", "decoder") and pair_of(anatomy) is not None:
        return port.scope.endswith("decoder")
    blocks = [anatomy.root.get_submodule(path) for path in port.blocks]
    layers = [block for block in blocks if isinstance(block, nn.TransformerEncoderLayer)]
    if len(layers) == len(blocks):
        if not all(layer.self_attn.batch_first for layer in layers):
            raise PortError(
                "the blocks take (length, batch, d). Build them with batch_first=True, or let the side blocks not attend."
            )
        return False  # causality comes with the mask
    stacks = [p for p in anatomy.ports.get("embeddings", ()) if isinstance(p, EmbeddingsPort) and is_within(port.path, p.path)]
    attentions = [
        p for p in anatomy.ports.get("attention_kv", ()) if isinstance(p, AttentionPort) and is_within(p.path, port.path)
    ]
    if not stacks and not attentions:
        return None
    return any(p.causal for p in stacks) or any(p.causal and not p.cross for p in attentions)


def pair_of(anatomy: Anatomy) -> tuple[BodyPort, BodyPort] | None:
    """Return the bodies of encoder and decoder of an encoder-decoder model, None of any other model."""
    bodies = anatomy.port(BodyPort)
    scopes = [port.scope.rpartition(".") for port in bodies]
    if len(bodies) != 2 or [scope[2] for scope in scopes] != ["encoder", "decoder"] or scopes[0][0] != scopes[1][0]:
        return None
    return bodies[0], bodies[1]


def side_network_edits(
    anatomy: Anatomy,
    port: BodyPort,
    used: tuple[int, ...],
    build: Callable[[BuildContext], nn.Module],
    *,
    output: Output,
    causal: bool,
    attends: bool,
    memory: int | None = None,
) -> tuple[Tap, ...]:
    """Return the edits that run a side network beside the body at ``port``.

    Args:
        anatomy: The model.
        port: The body.
        used: Indices of the blocks that the network reads, ascending.
        build: Returns the network, called with embeddings, block outputs, masks and ``causal``; gives (B, S, d).
        output: ``add`` its result to the body's output, ``replace`` that, or ``hand_on`` the result to the decoder's network.
        causal: What the network is told.
        attends: The network mixes positions, so masks matter to it and a KV cache is refused.
        memory: Width of what the encoder's network hands on to this one; None: nothing.
    """
    body = anatomy.root.get_submodule(port.path)
    pooler = getattr(body, "pooler", None)
    make = functools.partial(
        _build_body,
        build=build,
        output=output,
        causal=causal,
        attends=attends,
        used=used,
        pooler=pooler,
        names=_names(body),
        memory=memory,
    )
    taps: list[Tap] = [Replace(port, make)]
    for index in sorted({0, *used}):
        path = port.blocks[index]
        names = _names(anatomy.root.get_submodule(path))
        taps.append(
            Tap(Port(path=path, scope=port.scope), functools.partial(_build_rung, index=index, names=names, attends=attends))
        )
    return tuple(taps)


def hide_memory(width: int) -> Tap:
    """Return the edit that takes what an encoder's network hands on off the encoder's output, where the whole model returns that."""
    return Tap(Port(path="", scope=""), functools.partial(_build_hide, width=width))


def _build_hide(context: BuildContext, *, width: int) -> HideMemory:
    return HideMemory(width)


class HideMemory(CallAdapter):
    """Takes what an encoder's network hands on off ``encoder_last_hidden_state``.

    Args:
        width: w.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def reset_parameters(self) -> None:
        """Nothing to do: it has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        out = base(*args, **kwargs)
        states = getattr(out, "encoder_last_hidden_state", None)
        if states is not None:
            out.encoder_last_hidden_state = _unpack(states, self.width)[0]
        return out


def _pack(states: Tensor, side: Tensor) -> Tensor:
    """Return (B, S, d) with (B, S, w) behind it, in as many rows of width d as that takes."""
    row = side.to(states.dtype).flatten(1)
    row = F.pad(row, (0, -row.shape[1] % states.shape[2]))
    return torch.cat([states, row.unflatten(1, (-1, states.shape[2]))], dim=1)


def _unpack(states: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Invert :func:`_pack`.

    Raises:
        PortError: Nothing stands behind the states.
    """
    total, d = states.shape[1:]
    length = total * d // (d + width)
    if length + -(-length * width // d) != total:
        raise PortError(
            f"the encoder's output has {total} positions, which cannot be its own and those of its side network. Run the model's own "
            "encoder with the adapter on it, and pass its output whole."
        )
    return states[:, :length], states[:, length:].flatten(1)[:, : length * width].unflatten(1, (length, width))


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _build_body(context: BuildContext, *, build: Callable[[BuildContext], nn.Module], **options: Any) -> SideBody:
    return SideBody(build(context), **options)


def _build_rung(context: BuildContext, *, index: int, names: tuple[str, ...], attends: bool) -> RungTap:
    return RungTap(index, names, attends)


class RungTap(CallAdapter):
    """Writes what flows through a block into the record of the running body, if one runs.

    Args:
        index: Index of the block.
        names: Parameter names of its forward; the first one is the hidden states.
        attends: The side network needs the block's mask.
    """

    def __init__(self, index: int, names: tuple[str, ...], attends: bool) -> None:
        super().__init__()
        self.index, self.names, self.attends = index, names, attends

    def reset_parameters(self) -> None:
        """Nothing to do: it has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the block."""
        out = base(*args, **kwargs)
        record = _RUNNING.record
        if record is not None:
            call = {**dict(zip(self.names, args, strict=False)), **kwargs}
            mask = _sdpa_mask(call) if self.attends else None
            cross = _sdpa_mask({"mask": call.get("encoder_attention_mask")}) if self.attends else None
            record[self.index] = Rung(call[self.names[0]].detach(), _first_tensor(out).detach(), mask, cross)
        return out


class SideBody(CallAdapter):
    """Runs the body without gradient and the side network on its record.

    Args:
        network: The side network.
        output: ``add`` or ``replace``.
        causal: Told to the network.
        attends: The network mixes positions.
        used: Indices of the blocks that it reads.
        pooler: A pooler inside the body, which reads the new output instead; held without being registered.
        names: Parameter names of the body's forward.
        memory: Width of what the encoder's network hands on to this one, or None.
    """

    pooler: nn.Module | None

    def __init__(
        self,
        network: nn.Module,
        *,
        output: Output,
        causal: bool,
        attends: bool,
        used: tuple[int, ...],
        pooler: nn.Module | None,
        names: tuple[str, ...],
        memory: int | None,
    ) -> None:
        super().__init__()
        self.network, self.memory = network, memory
        self.output, self.causal, self.attends, self.used, self.names = output, causal, attends, used, names
        object.__setattr__(self, "pooler", pooler)

    def reset_parameters(self) -> None:
        self.network.reset_parameters()  # type: ignore[operator]

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run body and side network.

        Raises:
            PortError: A KV cache holds earlier positions, which an attending side network does not have; a block did not run; the
                encoder's network handed nothing on.
        """
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        cache, memory = call.get("past_key_values"), None
        if self.memory is not None:
            if call.get("encoder_hidden_states") is None:
                raise PortError(
                    "the decoder's side network reads the encoder's, and there are no encoder_hidden_states. Pass them."
                )
            states, memory = _unpack(call["encoder_hidden_states"], self.memory)
            args, kwargs = (), {**call, "encoder_hidden_states": states}
            _check_memory_mask(call.get("encoder_attention_mask"), states.shape[1])
        if self.attends and cache is not None and int(cache.get_seq_length()) > 0:
            raise PortError(
                "the side network attends over all positions and keeps no cache of its own. Generate with use_cache=False, or build it "
                "without attention (heads=0)."
            )
        record: dict[int, Rung] = {}
        outer, _RUNNING.record = _RUNNING.record, record
        try:
            with torch.no_grad():
                out = base(*args, **kwargs)
        finally:
            _RUNNING.record = outer
        missing = [i for i in {0, *self.used} if i not in record]
        if missing:
            raise PortError(
                f"block {missing[0]} did not run, but the side network reads it. Turn layer drop off, or leave the block out."
            )
        rungs = [record[i] for i in self.used]
        side = self.network(record[0].x, rungs, Attended(memory, self.causal))
        return self._finish(out, side)

    def _finish(self, out: Any, side: Tensor) -> Any:
        if isinstance(out, Tensor):
            if self.output == "hand_on":
                return _pack(out, side)
            side = side.to(out.dtype)
            return out + side if self.output == "add" else side
        if isinstance(out, tuple):
            return (self._finish(out[0], side), *out[1:])
        last = out.last_hidden_state
        out.last_hidden_state = self._finish(last, side)
        states = getattr(out, "hidden_states", None)
        if states and states[-1] is last and self.output != "hand_on":  # what DeBERTa reads
            out.hidden_states = (*states[:-1], out.last_hidden_state)
        if getattr(out, "pooler_output", None) is not None and self.pooler is not None:
            out.pooler_output = self.pooler(out.last_hidden_state)
        return out


def _check_memory_mask(mask: Any, length: int) -> None:
    if isinstance(mask, Tensor) and mask.shape[-1] != length:
        raise PortError(
            f"the decoder's encoder_attention_mask has {mask.shape[-1]} positions, the encoder's output {length} besides what its side "
            "network hands on. Pass the mask with which the encoder ran, and its output whole."
        )


def _first_tensor(out: Any) -> Tensor:
    value = out if isinstance(out, Tensor) else out[0]
    assert isinstance(value, Tensor)
    return value


def _sdpa_mask(call: Mapping[str, Any]) -> Tensor | None:
    """Return a block's mask as sdpa takes it: None, or (B or 1, heads or 1, S, S), boolean (True is visible) or additive."""
    masks = {name: value for name, value in call.items() if "mask" in name and isinstance(value, Tensor)}
    masks.pop("encoder_attention_mask", None)
    unknown = [name for name in masks if name not in KNOWN_MASKS]
    if unknown:
        raise PortError(
            f"the side network cannot read the mask '{unknown[0]}' of this block. Build it without attention (heads=0)."
        )
    found: Tensor | None = None
    for name, mask in masks.items():
        if name.startswith("src"):  # torch's own layers: True is hidden
            if mask.dim() > 2:
                raise PortError(
                    f"the side network cannot read '{name}' with {mask.dim()} dimensions. Pass (length, length), or set heads=0."
                )
            mask = ~mask if mask.dtype == torch.bool else mask
            shown = mask[:, None, None, :] if name == "src_key_padding_mask" else mask[None, None]
        else:
            mask = mask if mask.is_floating_point() and mask.dim() > 2 else mask.bool()  # integers: one is visible
            shown = mask[:, None, None, :] if mask.dim() == 2 else mask
        found = shown if found is None else _both(found, shown)
    return found


def _both(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.bool:
        return a & b
    additive = [
        torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, float("-inf")) if m.dtype == torch.bool else m for m in (a, b)
    ]
    return additive[0] + additive[1]
