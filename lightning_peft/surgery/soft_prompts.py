"""The mechanics of a soft prompt on an embeddings port, written once for every method that has one.

The stack sees ``[P; Emb(x)]`` wherever it starts a sequence; everything around it keeps seeing the sequence that it passed in:

* ``input_ids`` become ``inputs_embeds`` with the N virtual tokens in front, when the KV cache is empty. Later steps of a generation
  find the prompt in the cache and only have masks and positions shifted.
* 2-D masks get N ones in front, so with left padding the row is ``[prompt][padding][text]``. Positions count the prompt, then the
  text from N on, padding left out: a padded row equals the unpadded one. 4-D masks (static caches) are shifted the same way.
* The N positions are cut off every returned sequence, so labels need no change. Attention maps lose the prompt's rows and keep its
  columns, so that rows still sum to one. A pooler inside the stack (BERT) is given the sequence without the prompt.
* Encoder of an encoder-decoder: the decoder attends to the prompt too, so the encoder's output stays N longer and the decoder's
  ``encoder_attention_mask`` grows to match.

Packed rows (several sequences in one row, told apart by positions) are refused: only the first would have the prompt.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, PortError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Tap
from lightning_peft.surgery.ports import BodyPort, EmbeddingsPort, Port
from lightning_peft.surgery.stack import Call, CallAdapter
from lightning_peft.surgery.tree import is_within, join

BuildPrompt = Callable[[BuildContext, EmbeddingsPort, nn.Module], nn.Module]


def soft_prompt_taps(anatomy: Anatomy, count: int, build: BuildPrompt) -> tuple[Tap, ...]:
    """Return the edits that put a soft prompt of ``count`` tokens on every embeddings port.

    Args:
        anatomy: The model.
        count: N.
        build: Given context, port and embedding layer, returns a module that is called without arguments and gives (N, d).

    Raises:
        PortError: The model has no embeddings port, or a pooler inside a causal stack.
        ConfigError: N leaves no learned position for the text.
    """
    taps: list[Tap] = []
    for port in anatomy.port(EmbeddingsPort):
        if port.max_positions is not None and count >= port.max_positions:
            raise ConfigError(
                f"{count} virtual tokens leave no room: '{port.path or 'the model'}' has {port.max_positions} learned positions. "
                "Use fewer virtual tokens."
            )
        if port.pooler is not None and port.causal:
            raise PortError(
                f"'{port.pooler}' reads position 0 of a causal stack, which the prompt takes. Use a model without pooler."
            )
        reader = _decoder(anatomy, port)
        owner = anatomy.root.get_submodule(port.path)
        make = functools.partial(
            _build, port=port, owner=owner, embedding=_embedding(anatomy, port), count=count, build=build, keep=reader is not None
        )
        taps.append(Tap(port, make))
        if port.pooler is not None:
            taps.append(Tap(Port(path=port.pooler, scope=port.scope), functools.partial(_build_pooler, count=count)))
        if reader is not None:
            names = _parameters(anatomy.root.get_submodule(reader.path))
            if not {"input_ids", "encoder_attention_mask"} <= set(names):
                raise PortError(
                    f"the decoder '{reader.path}' gets its masks ready-made, so it cannot be shown the encoder's prompt. Use prefix "
                    "tuning with this model."
                )
            taps.append(Tap(reader, functools.partial(_build_reader, names=names)))
    return tuple(taps)


def _decoder(anatomy: Anatomy, port: EmbeddingsPort) -> BodyPort | None:
    outer, _, scope = port.scope.rpartition(".")
    bodies = [b for b in anatomy.ports.get("body", ()) if isinstance(b, BodyPort) and b.scope == join(outer, "decoder")]
    return bodies[0] if scope == "encoder" and bodies else None


def _embedding(anatomy: Anatomy, port: EmbeddingsPort) -> str:
    """Return the path of the embedding relative to the port's module, by which the module itself finds it."""
    tree = anatomy.tree
    paths = [port.embedding, *(alias for alias, first in tree.aliases.items() if first == port.embedding)]
    inside = [path for path in paths if is_within(path, port.path)]
    if not inside:
        raise PortError(f"the embedding '{port.embedding}' is not part of '{port.path}'; correct the anatomy of this model.")
    return inside[0].removeprefix(port.path).removeprefix(".")


def _parameters(module: nn.Module) -> tuple[str, ...]:
    names = tuple(inspect.signature(type(module).forward).parameters)
    return names[1:]


def _build(
    context: BuildContext, *, port: EmbeddingsPort, owner: nn.Module, embedding: str, count: int, build: BuildPrompt, keep: bool
) -> SoftPrompt:
    tokens = build(context, port, owner.get_submodule(embedding))
    return SoftPrompt(tokens, port, owner, embedding, count, _parameters(owner), keep)


def _build_pooler(context: BuildContext, *, count: int) -> PoolerTap:
    return PoolerTap(count)


def _build_reader(context: BuildContext, *, names: tuple[str, ...]) -> ReaderTap:
    return ReaderTap(names)


class SoftPrompt(CallAdapter):
    """Runs a stack with virtual tokens in front.

    Args:
        tokens: Called without arguments, gives the prompt (N, d).
        port: The stack.
        owner: Its module. Held without being registered; the embedding is looked up in it at every call, since
            ``resize_token_embeddings`` replaces it.
        embedding: Path of the embedding in ``owner``.
        count: N.
        names: Parameter names of the stack's forward.
        keep: Leave the prompt in the output, for a decoder that reads it.
    """

    owner: nn.Module

    def __init__(
        self,
        tokens: nn.Module,
        port: EmbeddingsPort,
        owner: nn.Module,
        embedding: str,
        count: int,
        names: tuple[str, ...],
        keep: bool,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.port, self.embedding, self.count, self.names, self.keep = port, embedding, count, names, keep
        object.__setattr__(self, "owner", owner)

    def reset_parameters(self) -> None:
        self.tokens.reset_parameters()  # type: ignore[operator]

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the stack.

        Raises:
            PortError: Prompt and text exceed the learned positions, a static cache is full, or masks come per layer type.
        """
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        ids, embeds, cache = call.get("input_ids"), call.get("inputs_embeds"), call.get("past_key_values")
        source: Tensor | None = ids if embeds is None else embeds
        if source is None:
            return base(**call)  # the stack's own error says what is missing
        past = 0 if cache is None else int(cache.get_seq_length())
        batch, length = source.shape[:2]
        self._check_room(past, length, cache)
        self._set_positions(call, past, batch, length)
        mask = call.get("attention_mask")
        if mask is not None:
            capacity = _static_length(cache)
            call["attention_mask"] = _lengthen(mask, self.count, causal=self.port.causal, start=past == 0, capacity=capacity)
        if past:
            return base(**call)
        if embeds is None:
            embeds = self.owner.get_submodule(self.embedding)(ids)
        prompt = self.tokens().to(device=embeds.device, dtype=embeds.dtype).expand(batch, -1, -1)  # (B, N, d)
        call["input_ids"], call["inputs_embeds"] = None, torch.cat([prompt, embeds], dim=1)  # (B, N + S, d)
        types = call.get("token_type_ids")
        if types is not None:
            call["token_type_ids"] = torch.cat([types.new_zeros(types.shape[0], self.count), types], dim=1)
        out = base(**call)
        return out if self.keep else _strip(out, self.count, self.count + length)

    def _check_room(self, past: int, length: int, cache: Any) -> None:
        total = past + length + (0 if past else self.count)
        limit = self.port.max_positions
        if limit is not None and total > limit:
            raise PortError(
                f"{total - self.count} tokens and {self.count} virtual tokens exceed the {limit} learned positions of "
                f"'{self.port.path or 'the model'}'. Cut the text to {limit - self.count} tokens."
            )
        if any(getattr(layer, "is_sliding", False) for layer in _static_layers(cache)):
            raise PortError("a soft prompt does not work with a static sliding-window cache. Generate with a dynamic cache.")
        if not past:
            _grow(cache, self.count)
        capacity = _static_length(cache)
        if capacity is not None and total > capacity:
            raise PortError(
                f"the static cache holds {capacity} positions, {total} are needed with {self.count} virtual tokens. Make it "
                f"{self.count} longer."
            )

    def _set_positions(self, call: dict[str, Any], past: int, batch: int, length: int) -> None:
        """Give the text its positions after the prompt. Where the stack would count the same way itself, leave it to it."""
        if "position_ids" not in self.names:
            return
        ids, mask, positions = call.get("input_ids"), call.get("attention_mask"), call.get("position_ids")
        padding = self.port.padding_position
        first = 0 if padding is None else padding + 1
        if positions is not None:
            if mask is None and not past and self.port.causal and not torch.compiler.is_compiling():
                if bool((positions.diff(dim=-1) != 1).any()):
                    raise PortError(
                        "position_ids that do not count up by one mean several sequences packed into one row, of which only the first "
                        "would have the soft prompt. Do not pack, pass an attention mask, or use prefix tuning."
                    )
                # transformers takes any step in positions for the start of a packed sequence, unless there is a mask.
                call["attention_mask"] = positions.new_ones(batch, length)
            text = positions + self.count  # (B or 1, S)
        elif padding is not None:
            if past or ids is None:
                return
            text = (ids != padding).cumsum(-1) + self.count + padding  # padding tokens are not counted
        elif self.port.causal and isinstance(mask, Tensor) and mask.dim() == 2:
            left = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # (B, 1): padding before the text
            text = torch.arange(mask.shape[1], device=mask.device)[None] - left
            text = text.clamp(min=0)[:, -length:] + self.count
        else:
            return
        if not past:
            prompt = torch.arange(first, first + self.count, device=text.device, dtype=text.dtype)
            text = torch.cat([prompt.expand(*text.shape[:-1], -1), text], dim=-1)
        call["position_ids"] = text


class PoolerTap(CallAdapter):
    """Hides the prompt from a pooler, which reads position 0 for ``[CLS]``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def reset_parameters(self) -> None:
        """Nothing to do: a pooler tap has no parameters."""

    def forward(self, base: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """(B, N + S, d) -> what the pooler makes of (B, S, d)."""
        return base(hidden_states[:, self.count :], *args, **kwargs)


class ReaderTap(CallAdapter):
    """Lets a decoder see the encoder's prompt: its encoder mask becomes as long as what it reads."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names

    def reset_parameters(self) -> None:
        """Nothing to do: a reader tap has no parameters."""

    def forward(self, base: Call, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder."""
        call = {**dict(zip(self.names, args, strict=False)), **kwargs}
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.dim() == 2 and mask.shape[1] < states.shape[1]:
            call["encoder_attention_mask"] = _lengthen(mask, states.shape[1] - mask.shape[1])
        return base(**call)


def _lengthen(mask: Any, count: int, *, causal: bool = False, start: bool = False, capacity: int | None = None) -> Tensor:
    """Return the mask with ``count`` visible columns in front.

    Args:
        mask: ``(B, S)`` of ones, or ``(B, 1 or H, Q, K)``, boolean (True is visible) or additive.
        count: N.
        causal: Prompt rows see the prompt up to themselves; else the whole prompt and all text that any row sees.
        start: The prompt is part of the queries, so N rows come on top as well.
        capacity: Length of a static cache; columns beyond it are cut.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        shown = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else type(mask).__name__
        raise PortError(
            f"a soft prompt cannot lengthen an attention mask given as {shown}. Pass a 2-D mask; generate with a dynamic cache."
        )
    if mask.dim() == 2:
        return torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1)
    visible, hidden = (True, False) if mask.dtype == torch.bool else (0.0, torch.finfo(mask.dtype).min)
    shape = mask.shape
    wide = torch.cat([mask.new_full((*shape[:3], count), visible), mask], dim=-1)
    if start:
        if causal:
            top = mask.new_full((*shape[:2], count, count + shape[3]), hidden)
            seen = torch.ones(count, count, dtype=torch.bool, device=mask.device).tril()
            top[..., :count] = top[..., :count].masked_fill(seen, visible)
        else:
            top = wide.amax(dim=-2, keepdim=True) if mask.dtype != torch.bool else wide.any(dim=-2, keepdim=True)
            top = top.expand(-1, -1, count, -1)
        wide = torch.cat([top, wide], dim=-2)
    return wide if capacity is None else wide[..., :capacity]


def _static_layers(cache: Any) -> list[Any]:
    return [layer for layer in getattr(cache, "layers", ()) if getattr(layer, "is_compileable", False)]


def _static_length(cache: Any) -> int | None:
    return next((layer.max_cache_len for layer in _static_layers(cache)), None)


def _grow(cache: Any, count: int) -> None:
    """Make a static cache that is not allocated yet longer by the prompt: generate() measures it by the text alone."""
    for layer in _static_layers(cache):
        if not layer.is_initialized:
            layer.max_cache_len += count


def _strip(value: Any, count: int, total: int) -> Any:
    """Cut the first ``count`` of ``total`` positions off hidden states (B, total, d) and off the rows of attention maps."""
    if isinstance(value, Tensor):
        if value.dim() == 3 and value.shape[1] == total:
            return value[:, count:]
        return value[:, :, count:] if value.dim() == 4 and value.shape[2] == total else value
    if isinstance(value, MutableMapping):
        for name in list(value):
            value[name] = _strip(value[name], count, total)
        return value
    if type(value) in (tuple, list):
        return type(value)(_strip(item, count, total) for item in value)
    return value
