"""P-tuning: Liu et al. 2021, "GPT Understands, Too", arXiv 2103.10385; and its second version, deep prompts.

``P = MLP(BiLSTM(E))`` or ``MLP(E)``: a soft prompt whose embeddings a small network computes from trained ones, which ties them to each
other. The prompt stands in front of the text; the paper's templates, which set it between the words of a cloze question, are not made.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from lightning_peft.errors import TargetError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.virtual_tokens import EncoderKind, PromptEncoder
from lightning_peft.strategies.additive.prefix_tuning import PrefixTuning
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.ports import EmbeddingsPort
from lightning_peft.surgery.soft_prompts import soft_prompt_taps


@register(
    name="p_tuning",
    family="additive",
    summary="Trains a small network that computes the embeddings of virtual tokens in front of the text.",
    paper="GPT Understands, Too, arXiv 2103.10385",
    lr=1e-3,
    identity_at_init=False,
    adds_positions=True,
    ports=("embeddings",),
    example={"num_virtual_tokens": 3, "hidden_size": 8},
)
@dataclass(frozen=True, kw_only=True)
class PTuning(PEFTStrategy):
    """A soft prompt at the input of the model, computed by an MLP or an LSTM; of an encoder-decoder, at its encoder.

    Args:
        num_virtual_tokens: N.
        encoder: ``mlp`` (three layers) or ``lstm`` (bidirectional, then two layers), as HF peft builds them.
        hidden_size: Width of the network; None means that of the embeddings.
        lstm_layers: Layers of the LSTM.
        dropout: Dropout between the layers of the LSTM, in training.
    """

    num_virtual_tokens: int = 20
    encoder: EncoderKind = "mlp"
    hidden_size: int | None = None
    lstm_layers: int = 2
    dropout: float = 0.0

    def validate(self) -> None:
        require(self.num_virtual_tokens >= 1, self, "num_virtual_tokens", "it must be at least 1")
        require(self.hidden_size is None or self.hidden_size >= 1, self, "hidden_size", "it must be at least 1")
        require(self.lstm_layers >= 1, self, "lstm_layers", "it must be at least 1")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        deep = self.encoder == "lstm" and self.lstm_layers > 1
        require(deep or self.dropout == 0.0, self, "dropout", "it lies between the layers of an LSTM of two or more")
        if self.targets is not None:
            raise TargetError("PTuning acts on the model's input; `targets` has no meaning. Leave it out.")

    def plan(self, anatomy: Anatomy) -> Plan:
        return Plan(soft_prompt_taps(anatomy, self.num_virtual_tokens, functools.partial(_build_encoder, strategy=self)))


def _build_encoder(context: BuildContext, port: EmbeddingsPort, embedding: nn.Module, *, strategy: PTuning) -> PromptEncoder:
    return PromptEncoder(
        context,
        count=strategy.num_virtual_tokens,
        width=port.hidden,
        kind=strategy.encoder,
        hidden=strategy.hidden_size or port.hidden,
        layers=strategy.lstm_layers,
        dropout=strategy.dropout,
    )


@register(
    name="p_tuning_v2",
    family="additive",
    summary="Deep prompts: trains keys and values of virtual tokens in every attention layer, directly.",
    paper="P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks, arXiv 2110.07602",
    lr=5e-3,
    identity_at_init=False,
    adds_positions=True,
    ports=PrefixTuning.info.ports,
    example={"num_virtual_tokens": 3, "dropout": 0.0},
)
@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Prefix tuning with the defaults of the authors' code: no MLP, dropout 0.1 on keys and values. For classifiers with a trained head.

    The options are those of :class:`PrefixTuning`. The authors' lengths go from 4 (easy tasks) to 128 tokens.
    """

    num_virtual_tokens: int = 20
    dropout: float = 0.1
