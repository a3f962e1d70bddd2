"""What the data code asks of a Hugging Face tokenizer, and the few rules that keep its specials right.

A tokenizer is never changed here: no pad token is set, no side is switched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from lightning_peft.errors import ConfigError, DataError
from lightning_peft.nn.chunked_loss import IGNORE

Message = Mapping[str, Any]
Span = tuple[int, int]
FIXED = -1
"""The group of a token that truncation never removes."""


@runtime_checkable
class Tokenizer(Protocol):
    """The part of ``transformers.PreTrainedTokenizerBase`` that is used. Any object with it will do."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    mask_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any
    is_fast: bool

    def __call__(self, text: Any = None, text_pair: Any = None, **kwargs: Any) -> Any: ...

    def __len__(self) -> int: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(slots=True)
class Tokens:
    """A sequence under construction.

    Attributes:
        ids: token ids, (length,).
        labels: ids with loss, ``IGNORE`` elsewhere, (length,).
        groups: per token the inserted text it belongs to, or ``FIXED``; the longest group is cut first, (length,).
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, labels: Sequence[int] | None = None, groups: Sequence[int] | None = None) -> None:
        """Append tokens; without ``labels`` they carry no loss, without ``groups`` they are never cut."""
        self.ids += ids
        self.labels += labels if labels is not None else [IGNORE] * len(ids)
        self.groups += groups if groups is not None else [FIXED] * len(ids)


def keep_positions(groups: Sequence[int], limit: int, side: Literal["left", "right"]) -> list[int] | None:
    """Return the positions that stay when a sequence is cut to ``limit`` tokens; None if too many are fixed.

    Tokens leave the longest group first, at its ``side``; fixed tokens stay.
    """
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        if group != FIXED:
            members.setdefault(group, []).append(position)
    excess = len(groups) - limit
    if excess > sum(map(len, members.values())):
        return None
    sizes = {group: len(positions) for group, positions in members.items()}
    while excess > 0:
        longest, *others = sorted(sizes, key=lambda group: sizes[group], reverse=True)
        second = sizes[others[0]] if others else 0
        step = min(excess, max(1, sizes[longest] - second))
        sizes[longest] -= step
        excess -= step
    removed: set[int] = set()
    for group, positions in members.items():
        drop = len(positions) - sizes[group]
        removed.update(positions[:drop] if side == "left" else positions[len(positions) - drop :])
    return [position for position in range(len(groups)) if position not in removed]


class TextEncoder:
    """Text to token ids: specials exactly once, and no token across a boundary that the caller draws.

    Args:
        tokenizer: a fast Hugging Face tokenizer (the Rust kind: offsets and word ids are needed).

    Raises:
        ConfigError: the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{type(tokenizer).__name__} is not a fast tokenizer, so it has no offsets and word ids; load it with "
                "AutoTokenizer.from_pretrained(..., use_fast=True)."
            )
        self.tokenizer = tokenizer
        bare = self._ids("a")
        full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
        self.start_ids: list[int] = full[:start]  # what the tokenizer puts before a text, such as BOS
        # SentencePiece-like tokenizers put a space before every text: in the middle of a sequence that space is wrong.
        self._anchor = "\n" if self._ids(" a") == bare else ""
        self._anchor_ids = self._ids(self._anchor) if self._anchor else []
        self.eos_id = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id
        self.pad_id: int = pad if pad is not None else (self.eos_id if self.eos_id is not None else 0)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def require_eos(self) -> int:
        """Return the id of EOS, which ends what the model learns to generate."""
        if self.eos_id is None:
            raise ConfigError("the tokenizer has no EOS token, so a generated text could not end; set tokenizer.eos_token.")
        return self.eos_id

    def encode(self, text: str, spans: Sequence[Span] = (), *, continued: bool = False) -> tuple[list[int], list[int]]:
        """Return (ids, groups) of ``text`` without specials of the tokenizer.

        Args:
            text: may contain special tokens as text, such as a rendered chat template.
            spans: character ranges of inserted text; tokens wholly inside ``spans[i]`` get group ``i``.
            continued: the text follows other tokens of the same sequence.
        """
        anchor = self._anchor if continued else ""
        encoded = self.tokenizer(anchor + text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
        skip = len(self._anchor_ids)
        if anchor and ids[:skip] == self._anchor_ids:
            ids, offsets = ids[skip:], [(a - len(anchor), b - len(anchor)) for a, b in offsets[skip:]]
        elif anchor:  # the text merges with the anchor
            return self.encode(text, spans)
        groups = [_group(text, offset, spans) for offset in offsets]
        return ids, groups

    def start(self, ids: Sequence[int]) -> list[int]:
        """Return the specials to put before ``ids``: those of the tokenizer, unless ``ids`` begins with them."""
        return [] if list(ids[: len(self.start_ids)]) == self.start_ids else self.start_ids

    def with_specials(self, text: str, pair: str | None = None) -> Any:
        """Return the tokenizer's own encoding of a text or a pair, with its specials and a mask of them."""
        return self.tokenizer(text, pair, add_special_tokens=True, return_special_tokens_mask=True)

    def chat(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        """Render ``messages`` with the chat template; ``generation`` adds the head of the assistant's turn."""
        if self.tokenizer.chat_template is None:
            raise ConfigError("the tokenizer has no chat template; set tokenizer.chat_template or use prompt and completion.")
        try:
            rendered = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # Jinja raises what the template's author chose
            raise DataError(f"the chat template refuses a conversation: {error}") from error
        return str(rendered)

    def chat_turns(self, messages: Sequence[Message], spans: Mapping[int, Sequence[Span]]) -> tuple[Tokens, int]:
        """Tokenise a conversation with loss on the assistant's turns only.

        Each assistant turn is a segment of its own from the end of the generation head to the end of its message, so
        the tokens before it are those seen when generating. Its loss ends at its last EOS (the line break that many
        templates put behind has none); the last turn gets an EOS if the template writes none.

        Args:
            messages: ``{role, content}`` each.
            spans: per message index the character ranges of its content that truncation may cut.

        Returns:
            The tokens and the position at which the last answer begins: the length if it is not there yet.

        Raises:
            DataError: the template does not render a conversation turn by turn, so the turns cannot be found.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        open_ended = messages[-1]["role"] != "assistant"
        whole = self.chat(messages, generation=open_ended)
        marked = [{**message, "content": _mark(index)} for index, message in enumerate(messages)]
        allowed = _locate(whole, self.chat(marked, generation=open_ended), messages, spans) if spans else []
        tokens, cursor, last = Tokens(), 0, 0

        def segment(end: int) -> tuple[list[int], list[int]]:
            shifted = [(a - cursor, b - cursor) for a, b in allowed]
            return self.encode(whole[cursor:end], shifted, continued=cursor > 0)

        for turn in turns:
            head = self.chat(messages[:turn], generation=True) if turn else ""
            body = self.chat(messages[: turn + 1]) if turn + 1 < len(messages) else whole
            if not (head and body.startswith(head) and whole.startswith(body)):
                raise DataError(
                    "cannot find the assistant's turns: the chat template does not render the conversation turn by "
                    f"turn (message {turn}). Begin with a user turn, or give one assistant turn per row, or another template."
                )
            ids, groups = segment(len(head))
            tokens.add(ids, groups=groups)
            cursor, last = len(head), len(tokens.ids)
            ids, _ = segment(len(body))
            ends = [i for i, token in enumerate(ids) if token == self.require_eos()]
            if not ends and turn == len(messages) - 1:
                ids = [*ids, self.require_eos()]
            counted = ends[-1] + 1 if ends else len(ids)
            tokens.add(ids, labels=[*ids[:counted], *[IGNORE] * (len(ids) - counted)])
            cursor = len(body)
        ids, groups = segment(len(whole))
        tokens.add(ids, groups=groups)
        return tokens, len(tokens.ids) if open_ended else last


def _group(text: str, offset: Span, spans: Sequence[Span]) -> int:
    """Return the range that a token lies in; white space of the template may stick to it, as in ``" word"``."""
    start, end = offset
    token = text[start:end]
    if token.strip():
        start += len(token) - len(token.lstrip())
    return next((i for i, (a, b) in enumerate(spans) if a <= start and end <= b and start < end), FIXED)


def _locate(whole: str, skeleton: str, messages: Sequence[Message], spans: Mapping[int, Sequence[Span]]) -> list[Span]:
    """Return where ranges of the contents lie in the rendered conversation.

    ``skeleton`` is the same conversation rendered with ``_mark(i)`` for the content of message i, so that a content is
    never confused with the template's own words. Nothing is returned for a template that rewrites contents.
    """
    found: list[Span] = []
    position = cursor = 0
    for index, message in enumerate(messages):
        at = skeleton.find(_mark(index), cursor)
        content = str(message["content"])
        begin = position + at - cursor
        if at < 0 or whole[position:begin] != skeleton[cursor:at]:
            return []
        shift = 0 if whole.startswith(content, begin) else len(content) - len(content.lstrip())
        content = content if not shift and whole.startswith(content, begin) else content.strip()
        if not whole.startswith(content, begin):
            return []
        cursor, position = at + len(_mark(index)), begin + len(content)
        found += [(begin + max(0, start - shift), min(begin + end - shift, position)) for start, end in spans.get(index, ())]
    return found


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"  # private use characters, which no text has
