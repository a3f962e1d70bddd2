"""PROMPT_TUNING, P_TUNING and PREFIX_TUNING: one tensor ``prompt_embeddings``, with what a network computed as its values.

HF's text starts at position p behind a prefix. So it does here with ``shift_positions=True``; without, the keys of models with rotary
embeddings are rotated on the way out, which comes to the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import CompatibilityError, FormatError
from lightning_peft.interop.table import Fields, Format, Parsed, Written, integer
from lightning_peft.nn.virtual_tokens import PromptTokens
from lightning_peft.strategies.additive.p_tuning import PTuning, PTuningV2
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning
from lightning_peft.strategies.additive.prompt_tuning import PromptTuning
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.ports import AttentionPort, EmbeddingsPort
from lightning_peft.surgery.positions import rotate_keys
from lightning_peft.surgery.prefixes import PrefixTap
from lightning_peft.surgery.soft_prompts import SoftPrompt

EMBEDDINGS = "prompt_embeddings"
_SHAPE = frozenset({"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"})


def _computed(tokens: torch.nn.Module) -> Any:
    """Return what a module of virtual tokens gives in evaluation."""
    training = tokens.training
    tokens.eval()
    try:
        with torch.no_grad():
            return tokens()
    finally:
        tokens.train(training)


@dataclass(frozen=True, kw_only=True)
class PromptFormat(Format):
    """PROMPT_TUNING and P_TUNING, whose encoder is not in the file."""

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        taps = [entry.adapter for entry in handle.entries if isinstance(entry.adapter, SoftPrompt)]
        port = _one_port(anatomy)
        rows: Tensor = _computed(taps[0].tokens)
        strategy: Any = handle.strategy
        more: dict[str, Any] = {}
        if isinstance(strategy, PTuning):
            more = {
                "encoder_reparameterization_type": strategy.encoder.upper(),
                "encoder_hidden_size": strategy.hidden_size or port.hidden,
                "encoder_num_layers": strategy.lstm_layers,
                "encoder_dropout": strategy.dropout,
            }
        else:
            more = {"prompt_tuning_init": "RANDOM"}
        return Written({**_sizes(anatomy, len(rows), port.hidden), **more}, {EMBEDDINGS: rows.detach()})

    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        count, rows = integer(file.config.get("num_virtual_tokens"), "num_virtual_tokens", file.where), _embeddings(file)
        port = _one_port(anatomy)
        # Of an encoder-decoder HF keeps a second half, which nothing reads.
        if rows.shape not in ((count, port.hidden), (2 * count, port.hidden)):
            raise CompatibilityError(
                f"{file.where}: {EMBEDDINGS} has shape {tuple(rows.shape)}, and {count} virtual tokens of this model have "
                f"{(count, port.hidden)}. It was made for another base model."
            )
        return PromptTuning(num_virtual_tokens=count)

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        slot = next(slot for slot in part.slots if isinstance(slot.owner, PromptTokens))
        return {slot.key: _embeddings(file)[: len(slot.tensor())]}

    def takes(self, file: Parsed, key: str) -> bool:
        return key == EMBEDDINGS


def _one_port(anatomy: Anatomy) -> EmbeddingsPort:
    ports = anatomy.port(EmbeddingsPort)
    if len(ports) > 1:
        raise CompatibilityError(f"HF peft knows one soft prompt in a model, and {type(anatomy.root).__name__} has {len(ports)}.")
    if ports[0].pooler is not None:
        raise CompatibilityError(
            f"'{ports[0].pooler}' reads position 0, which is the first virtual token in HF peft and [CLS] here: the two are different "
            "functions, with different weights. Train the soft prompt where it is to be used."
        )
    return ports[0]


def _embeddings(file: Parsed) -> Tensor:
    rows = file.rest.get(EMBEDDINGS)
    if rows is None or rows.dim() != 2:
        raise FormatError(f"{file.where} holds no matrix '{EMBEDDINGS}'. The file is incomplete.")
    return rows


def _sizes(anatomy: Anatomy, count: int, width: int) -> dict[str, Any]:
    ports = [port for port in anatomy.ports.get(AttentionPort.name, ()) if isinstance(port, AttentionPort)]
    heads, layers = (ports[0].kv_heads, len({port.layer for port in ports})) if ports else (1, 1)
    return {
        "num_virtual_tokens": count,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
    }


@dataclass(frozen=True, kw_only=True)
class PrefixFormat(Format):
    """PREFIX_TUNING: (p, layers x (key, value) x kv_heads x head_dim), after the MLP."""

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        strategy: Any = handle.strategy
        ports = _attention(anatomy)
        taps = {entry.path: entry.adapter for entry in handle.entries if isinstance(entry.adapter, PrefixTap)}
        parts: list[Tensor] = []
        for port in ports:
            key, value = _computed(taps[port.path].tokens)
            parts += [key if strategy.shift_positions else rotate_keys(anatomy.root, port, key, len(key)), value]
        width = ports[0].kv_heads * ports[0].head_dim
        rows = torch.cat([part.detach() for part in parts], dim=1)
        sizes = _sizes(anatomy, len(rows), width) | {"num_layers": len(ports), "prefix_projection": False}
        return Written(sizes | {"encoder_hidden_size": width}, {EMBEDDINGS: rows})

    def strategy(self, file: Parsed, anatomy: Anatomy) -> PEFTStrategy:
        rows, ports = _embeddings(file), _attention(anatomy)
        width = sum(2 * port.kv_heads * port.head_dim for port in ports)
        if file.config.get("num_transformer_submodules") not in (None, 1) or rows.shape[1] != width or not len(rows):
            raise CompatibilityError(
                f"{file.where}: {EMBEDDINGS} has shape {tuple(rows.shape)}, and a prefix of this model is {width} wide. It was made for "
                "another base model."
            )
        return PrefixTuning(num_virtual_tokens=len(rows), shift_positions=True)

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        ports = _attention(anatomy)
        widths = [port.kv_heads * port.head_dim for port in ports for _ in range(2)]
        pieces = iter(_embeddings(file).split(widths, dim=1))
        values = {port.path: (next(pieces), next(pieces)) for port in ports}
        found: dict[str, Tensor] = {}
        for entry in part.entries:
            if isinstance(entry.adapter, PrefixTap):
                key, value = values[entry.path]
                found |= {f"{entry.key}.tokens.key": key, f"{entry.key}.tokens.value": value}
        return found

    def takes(self, file: Parsed, key: str) -> bool:
        return key == EMBEDDINGS


def _attention(anatomy: Anatomy) -> list[AttentionPort]:
    """Return the attention modules in the order of their layers.

    Raises:
        CompatibilityError: The model has an encoder and a decoder, or layers of different widths.
    """
    ports = list(anatomy.port(AttentionPort))
    if len({port.scope for port in ports}) > 1 or any(port.cross or port.layer is None for port in ports):
        raise CompatibilityError(
            f"{type(anatomy.root).__name__}: HF peft puts the prefix of an encoder-decoder model into the decoder's self-attention only, and "
            "counts its positions; here all attention has one. The two are different methods."
        )
    if len({(port.kv_heads, port.head_dim) for port in ports}) > 1:
        raise CompatibilityError(
            f"{type(anatomy.root).__name__}: HF peft has one width of prefix for all layers, and these differ."
        )
    return sorted(ports, key=lambda port: port.layer or 0)


PROMPT_TUNING = PromptFormat(
    peft_type="PROMPT_TUNING",
    methods=(PromptTuning,),
    fields=Fields(
        free=_SHAPE | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    ),
)
P_TUNING = PromptFormat(
    peft_type="P_TUNING",
    methods=(PTuning,),
    fields=Fields(
        free=_SHAPE | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    ),
)
PREFIX_TUNING = PrefixFormat(
    peft_type="PREFIX_TUNING",
    methods=(PrefixTuning, PTuningV2),
    fields=Fields(free=_SHAPE | {"encoder_hidden_size", "prefix_projection", "init_weights"}),
)
