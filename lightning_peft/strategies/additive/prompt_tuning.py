"""Prompt tuning: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

``E_in = [P; Emb(x)]`` (section 2): N trained embeddings in front of the text, nothing else trains. Deviations from the paper: AdamW
instead of Adafactor is assumed by the suggested learning rate (the paper's is 0.3 with Adafactor), and ``init="vocabulary"`` draws
from the whole vocabulary instead of its 5,000 most frequent tokens, which a model does not know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.virtual_tokens import PromptTokens
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.ports import EmbeddingsPort
from lightning_peft.surgery.soft_prompts import soft_prompt_taps


@register(
    name="prompt_tuning",
    family="additive",
    summary="Trains embeddings of virtual tokens in front of the text.",
    paper="The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691",
    lr=1e-2,
    identity_at_init=False,
    adds_positions=True,
    ports=("embeddings",),
    example={"num_virtual_tokens": 3},
)
@dataclass(frozen=True, kw_only=True)
class PromptTuning(PEFTStrategy):
    """A soft prompt at the input of the model; of an encoder-decoder, at its encoder.

    Labels, masks and outputs keep the length of the text. On models with learned positions the text has N positions fewer.

    Args:
        num_virtual_tokens: N. The paper uses 100 for most results; small models and short texts do with fewer.
        init: ``random`` (uniform between -0.5 and 0.5) or ``vocabulary`` (embeddings of random tokens of the vocabulary).
    """

    num_virtual_tokens: int = 20
    init: Literal["random", "vocabulary"] = "random"

    def validate(self) -> None:
        require(self.num_virtual_tokens >= 1, self, "num_virtual_tokens", "it must be at least 1")
        require(self.init in ("random", "vocabulary"), self, "init", "it is one of random, vocabulary")
        if self.targets is not None:
            raise TargetError("PromptTuning acts on the model's input; `targets` has no meaning. Leave it out.")

    def plan(self, anatomy: Anatomy) -> Plan:
        build = functools.partial(_build_tokens, count=self.num_virtual_tokens, from_vocabulary=self.init == "vocabulary")
        return Plan(soft_prompt_taps(anatomy, self.num_virtual_tokens, build))


def _build_tokens(
    context: BuildContext, port: EmbeddingsPort, embedding: nn.Module, *, count: int, from_vocabulary: bool
) -> PromptTokens:
    rows = None
    if from_vocabulary:
        weight = embedding.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise ConfigError(
                f"PromptTuning: init='vocabulary' reads '{port.embedding}', which is on the meta device. Load the weights first, or use "
                "init='random'."
            )
        generator = torch.Generator().manual_seed(context.seed)
        ids = torch.randint(weight.shape[0], (count,), generator=generator).to(weight.device)
        with torch.no_grad():
            rows = embedding(ids)  # through the layer: some scale what they look up
    return PromptTokens(context, count=count, width=port.hidden, rows=rows)
