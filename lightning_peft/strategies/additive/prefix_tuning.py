"""Prefix tuning: Li & Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv 2101.00190, equation 3.

Every attention module sees p learned keys and values in front of its own: ``softmax(Q [K_p; K]ᵀ / √d_h) [V_p; V]``. With
``projection=True`` they are ``Z = W_2 tanh(W_1 E + b_1) + b_2``, the paper's way to stable training; without, they are trained
directly, as in P-tuning v2 (arXiv 2110.07602).

Positions: the text starts at position 0, as without the prefix. The paper's code and HF peft feed the prefix as
``past_key_values``, by which the text starts at position p, as with ``shift_positions=True``.
Encoder-decoder models get a prefix in the encoder's, the decoder's and the cross attention, each with a trunk E, W_1 of its own.
The width of E is that of the keys (kv_heads x head_dim), as in HF peft; the paper's models have no grouped queries.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_peft.errors import TargetError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.virtual_tokens import PrefixTokens, PrefixTrunk, ProjectedPrefix
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import BuildShared, Plan
from lightning_peft.surgery.ports import AttentionPort
from lightning_peft.surgery.positions import position_taps
from lightning_peft.surgery.prefixes import prefix_tap


@register(
    name="prefix_tuning",
    family="additive",
    summary="Trains keys and values of virtual tokens in every attention layer.",
    paper="Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190",
    lr=5e-3,
    identity_at_init=False,
    adds_positions=True,
    ports=("attention_kv",),
    example={"num_virtual_tokens": 3},
)
@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PEFTStrategy):
    """Learned keys and values in front of those of every attention module. Not an identity at the start: they take attention.

    Works with ``attn_implementation`` sdpa and eager.

    Args:
        num_virtual_tokens: p. The paper uses 5 (table-to-text) to 200 (summarisation).
        projection: Compute keys and values with an MLP from p embeddings (the paper's reparametrisation).
        projection_size: Width of the MLP's hidden layer; the paper uses 512, and 800 for summarisation.
        dropout: Dropout on keys and values in training.
        init_std: Standard deviation of keys and values at the start, without ``projection``; 1 in P-tuning v2's code.
        shift_positions: The text starts at position p, as in the paper's code and in HF peft, and not at 0. Models with learned
            positions have p fewer for it.
    """

    num_virtual_tokens: int = 20
    projection: bool = False
    projection_size: int = 512
    dropout: float = 0.0
    init_std: float = 1.0
    shift_positions: bool = False

    def validate(self) -> None:
        require(self.num_virtual_tokens >= 1, self, "num_virtual_tokens", "it must be at least 1")
        require(self.projection_size >= 1, self, "projection_size", "it must be at least 1")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(self.init_std > 0.0, self, "init_std", "it must be positive")
        if self.targets is not None:
            raise TargetError(f"{type(self).__name__} acts on every attention module; `targets` has no meaning. Leave it out.")

    def plan(self, anatomy: Anatomy) -> Plan:
        ports = anatomy.port(AttentionPort)
        shifts = position_taps(anatomy, self.num_virtual_tokens) if self.shift_positions else ()
        if not self.projection:
            tokens = functools.partial(_build_tokens, count=self.num_virtual_tokens, std=self.init_std, dropout=self.dropout)
            return Plan((*(prefix_tap(port, tokens) for port in ports), *shifts))
        widths: dict[str, int] = {}
        for port in ports:
            widths[_trunk(port)] = max(widths.get(_trunk(port), 0), _width(port))
        shared: Mapping[str, BuildShared] = {
            name: functools.partial(PrefixTrunk, count=self.num_virtual_tokens, width=width, middle=self.projection_size)
            for name, width in widths.items()
        }
        projected = functools.partial(_build_projected, dropout=self.dropout)
        return Plan((*(prefix_tap(port, projected) for port in ports), *shifts), shared)


def _width(port: AttentionPort) -> int:
    return port.kv_heads * port.head_dim


def _trunk(port: AttentionPort) -> str:
    """Name of the shared trunk: one for each stack, and one for its cross attention."""
    return "_".join(part for part in ("prefix", port.scope.replace(".", "_"), "cross" if port.cross else "") if part)


def _build_tokens(context: BuildContext, port: AttentionPort, *, count: int, std: float, dropout: float) -> PrefixTokens:
    return PrefixTokens(context, count=count, width=_width(port), std=std, dropout=dropout)


def _build_projected(context: BuildContext, port: AttentionPort, *, dropout: float) -> ProjectedPrefix:
    trunk = context.shared[_trunk(port)]
    assert isinstance(trunk, PrefixTrunk)
    return ProjectedPrefix(context, trunk=trunk, width=_width(port), dropout=dropout)
