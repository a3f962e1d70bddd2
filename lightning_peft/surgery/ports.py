"""Ports: the places of a model where a tap can read or change what flows, beside single layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lightning_peft.surgery.families import Positions, Stack
from lightning_peft.surgery.tree import ModuleTree, is_within, join

ATTENTION_INTERFACE = "ALL_ATTENTION_FUNCTIONS"


@dataclass(frozen=True, kw_only=True)
class Port:
    """A place that a tap can reach.

    Args:
        path: Module whose call carries the port, relative to the adapted root.
        scope: Scope of the stack that it belongs to, ``""`` if the model has one stack.
    """

    name: ClassVar[str] = ""
    path: str
    scope: str


@dataclass(frozen=True, kw_only=True)
class EmbeddingsPort(Port):
    """The stack that turns ``input_ids`` or ``inputs_embeds`` into hidden states. Encoder-decoder models: their encoder.

    Args:
        embedding: Path of the input embedding; its output is what ``inputs_embeds`` takes.
        hidden: Width of ``inputs_embeds`` (ELECTRA's is smaller than its hidden states).
        causal: Position i sees positions up to i only.
        positions: How the stack knows positions.
        max_positions: Longest sequence that absolute positions allow; None without them.
        pooler: Path of a module inside that reads position 0 of the output, or None.
        padding_position: RoBERTa's way to count: padding has this position, the first token the next one. Else None.
    """

    name: ClassVar[str] = "embeddings"
    embedding: str
    hidden: int
    causal: bool
    positions: Positions
    max_positions: int | None
    pooler: str | None = None
    padding_position: int | None = None


@dataclass(frozen=True, kw_only=True)
class AttentionPort(Port):
    """An attention module that goes through transformers' attention interface: keys ``(batch, kv_heads, length, head_dim)``.

    Args:
        kv_heads: Number of key/value heads.
        head_dim: Width of one head.
        causal: The module's own causal flag.
        cross: It reads the output of another stack.
        layer: Index of its block within the scope, or None outside blocks.
    """

    name: ClassVar[str] = "attention_kv"
    kv_heads: int
    head_dim: int
    causal: bool
    cross: bool
    layer: int | None


@dataclass(frozen=True, kw_only=True)
class BodyPort(Port):
    """The module that owns the blocks and runs them in order.

    Args:
        blocks: Paths of its blocks.
        hidden: Width of the hidden states, or None where no config tells it.
    """

    name: ClassVar[str] = "body"
    blocks: tuple[str, ...]
    hidden: int | None


@dataclass(frozen=True, kw_only=True)
class PatchesPort(BodyPort):
    """A body that reads image patches, or other vectors: nothing in its stack embeds tokens.

    Args:
        patch: Numbers in one patch (channels x height x width), or None where no patch embedding is known.
    """

    name: ClassVar[str] = "patches"
    patch: int | None = None


def first_int(owners: tuple[object, ...], names: tuple[str, ...]) -> int | None:
    """Return the first positive integer attribute among ``names`` (outer loop) of ``owners`` (inner loop)."""
    for name in names:
        for owner in owners:
            value = getattr(owner, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def heads(module: nn.Module, config: object) -> tuple[int | None, int | None]:
    """Return (attention heads, key/value heads) of an attention module; its own numbers go before the config's."""
    count = first_int((module,), ("num_heads", "num_attention_heads", "n_heads", "n_head"))
    count = count or first_int((config,), ("num_attention_heads", "num_heads"))
    groups = first_int((module,), ("num_key_value_groups",))
    own = first_int((module,), ("num_kv_heads", "num_key_value_heads"))
    if own is None and groups is not None and count is not None:
        own = count // groups
    return count, own or first_int((config,), ("num_key_value_heads",)) or count


def hidden_width(module: nn.Module, config: object) -> int | None:
    """Return the width of the hidden states of a stack, from its own config or the model's."""
    return first_int((getattr(module, "config", None), config), ("hidden_size", "d_model", "n_embd"))


def uses_attention_interface(module: nn.Module) -> bool:
    """Return whether the forward of the module's class looks its attention function up in transformers' registry."""
    forward: object = type(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    code = getattr(forward, "__code__", None)
    return code is not None and ATTENTION_INTERFACE in code.co_names


def attention_ports(
    tree: ModuleTree, at: str, scope: str, layer_of: dict[str, int], config: object, is_cross: tuple[str, ...]
) -> Iterator[AttentionPort]:
    """Yield the attention ports below ``at``.

    Args:
        tree: The model.
        at: Path of the stack.
        scope: Its scope.
        layer_of: Block path -> index.
        config: Config of the enclosing HF model.
        is_cross: Paths of the modules known to be cross attention.
    """
    for path, module in tree.below(at):
        if not uses_attention_interface(module):
            continue
        own = getattr(module, "config", None) or config
        count, kv_heads = heads(module, own)
        head_dim = first_int((module, own), ("head_dim", "attention_head_size", "key_value_proj_dim"))
        width = hidden_width(module, own)
        if head_dim is None and width and count:
            head_dim = width // count
        if kv_heads is None or head_dim is None:
            continue
        yield AttentionPort(
            path=path,
            scope=scope,
            kv_heads=kv_heads,
            head_dim=head_dim,
            causal=bool(getattr(module, "is_causal", False)),
            cross=any(is_within(path, cross) for cross in is_cross),
            layer=next((index for block, index in layer_of.items() if is_within(path, block)), None),
        )


def embeddings_port(tree: ModuleTree, at: str, stack: Stack, scope: str, config: object) -> EmbeddingsPort | None:
    """Return the embeddings port of a stack, or None if it takes no ``inputs_embeds``."""
    table = join(at, stack.embedding or "")
    if not stack.tokens or stack.embedding is None or table not in tree:
        return None
    module = tree[table]
    width = getattr(module, "embedding_dim", None)
    if not isinstance(width, int):
        return None
    causal = bool(getattr(config, stack.causal, False)) if isinstance(stack.causal, str) else stack.causal
    limit = first_int((config,), ("max_position_embeddings",)) if stack.positions == "absolute" else None
    learned = next((m for p, m in tree.below(at) if p.endswith("position_embeddings")), None)
    padding: int | None = getattr(learned, "padding_idx", None)
    if limit is not None and padding is not None:
        limit -= padding + 1  # RoBERTa counts positions from padding_idx + 1 on
    pooler = join(at, stack.pooler or "")
    return EmbeddingsPort(
        path=at,
        scope=scope,
        embedding=tree.canonical(table),
        hidden=width,
        causal=causal,
        positions=stack.positions,
        max_positions=limit,
        pooler=pooler if stack.pooler is not None and pooler in tree else None,
        padding_position=padding,
    )
