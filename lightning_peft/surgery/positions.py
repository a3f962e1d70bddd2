"""Where the text starts to count: at a position after virtual tokens instead of at 0."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.errors import PortError, UnsupportedLayerError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Tap
from lightning_peft.surgery.ports import AttentionPort, EmbeddingsPort
from lightning_peft.surgery.stack import Call, CallAdapter, stack_of

FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # their rotation by a position is the same for every length of text


def position_taps(anatomy: Anatomy, count: int) -> tuple[Tap, ...]:
    """Return the edits that let the text of every stack start at position ``count``.

    Raises:
        PortError: The model knows positions by their distance only (T5), so nothing can be shifted.
    """
    taps = []
    for port in anatomy.port(EmbeddingsPort):
        module = anatomy.root.get_submodule(port.path)
        names = tuple(inspect.signature(type(module).forward).parameters)[1:]
        if "position_ids" not in names:
            raise PortError(f"{type(module).__name__} takes no position_ids, so its text cannot start at position {count}.")
        taps.append(Tap(port, functools.partial(_build, port=port, owner=module, names=names, count=count)))
    return tuple(taps)


def _build(context: BuildContext, *, port: EmbeddingsPort, owner: nn.Module, names: tuple[str, ...], count: int) -> PositionTap:
    return PositionTap(port, owner, names, count)


class PositionTap(CallAdapter):
    """Adds ``count`` to the positions that a stack gives to its text, and to those of soft prompts in front of it.

    It runs inside the soft prompts, whenever they were installed, so that it counts the text from behind them, as the KV cache does.

    Args:
        port: The stack.
        owner: Its module; held without being registered.
        names: Parameter names of its forward.
        count: The first position. The counts of several taps on one stack add up.
    """

    innermost: ClassVar[bool] = True
    owner: nn.Module

    def __init__(self, port: EmbeddingsPort, owner: nn.Module, names: tuple[str, ...], count: int) -> None:
        super().__init__()
        self.port, self.names, self.count = port, names, count
        object.__setattr__(self, "owner", owner)

    def reset_parameters(self) -> None:
        """Nothing to do: a position tap has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the stack.

        Raises:
            PortError: The text would go beyond the learned positions.
        """
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, cache, positions = call.get("input_ids"), call.get("past_key_values"), call.get("position_ids")
        source: Tensor | None = ids if call.get("inputs_embeds") is None else call["inputs_embeds"]
        if source is None:
            return base(**call)
        past = 0 if cache is None else int(cache.get_seq_length())
        if self.port.max_positions is not None:
            self._check_room(past + source.shape[1], self.port.max_positions)
        padding = self.port.padding_position
        if positions is not None:
            positions = positions + self.count
        elif padding is not None and ids is not None:
            real = ids != padding
            positions = (real.cumsum(-1) + past + self.count) * real + padding
        else:
            start = past + self.count + (0 if padding is None else padding + 1)
            positions = torch.arange(start, start + source.shape[1], device=source.device)[None]
        call["position_ids"] = positions
        return base(**call)

    def _check_room(self, length: int, limit: int) -> None:
        stack = stack_of(self.owner)
        assert stack is not None
        first = sum(e.adapter.count for e in stack._entries if e.active and isinstance(e.adapter, PositionTap))
        if first + length > limit:
            raise PortError(
                f"{length} tokens from position {first} on exceed the {limit} learned positions. Cut the text to {limit - first} tokens."
            )


def rotate_keys(root: nn.Module, port: AttentionPort, keys: Tensor, by: int) -> Tensor:
    """Return keys (n, kv_heads x head_dim) as if they stood ``by`` positions further on, by the model's own rotary embedding.

    A query at position i + p sees keys k as one at position i sees them rotated by -p: how the text counts can be put into the keys.

    Raises:
        PortError: The model has no rotary embedding, or one that depends on the length of the text.
        UnsupportedLayerError: It has no values yet.
    """
    attention = root.get_submodule(port.path)
    scope: dict[str, Any] = inspect.unwrap(type(attention).forward).__globals__
    rotate = scope.get("apply_rotary_pos_emb")
    rotary = next((m for n, m in root.named_modules() if n.endswith("rotary_emb") and hasattr(m, "inv_freq")), None)
    kind = getattr(rotary, "rope_type", None)
    if rotate is None or rotary is None or kind not in FIXED_ROPE:
        what = "no rotary embedding" if rotate is None or rotary is None else f"rotary embeddings of type {kind}"
        raise PortError(
            f"'{port.path}' has {what}, so how its text counts cannot be put into the keys of a prefix. Train with shift_positions=True."
        )
    if rotary.inv_freq.is_meta:
        raise UnsupportedLayerError(f"the rotary embedding of '{port.path}' is on the meta device. Load the model first.")
    heads = keys.unflatten(1, (port.kv_heads, port.head_dim)).transpose(0, 1)[None]  # (1, kv_heads, n, head_dim)
    places = torch.full((1, keys.shape[0]), by, device=keys.device)
    cos, sin = rotary(heads, places)
    scale = (cos.square() + sin.square()).sqrt()  # some rotary embeddings scale as well
    if cos.shape[-1] != port.head_dim:
        raise PortError(f"'{port.path}' rotates a part of its heads only; train with shift_positions=True.")
    _, rotated = rotate(heads, heads, cos / scale, sin / scale)
    out: Tensor = rotated[0].transpose(0, 1).flatten(1)
    return out
