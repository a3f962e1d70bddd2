"""Prompt tuning: Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv 2104.08691.

``E_in = [P; Emb(x)]`` (section 2): N trained embeddings in front of the text, nothing else trains. Deviations from the paper: AdamW
instead of Adafactor is assumed by the suggested learning rate (the paper's is 0.3 with Adafactor), and ``init="vocabulary"`` draws
from the whole vocabulary where ``init_ids`` does not name the 5,000 most frequent tokens, which a model does not know.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, TargetError, UnsupportedLayerError
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
        init: ``random`` (uniform between -0.5 and 0.5), ``vocabulary`` (embeddings of random tokens of the vocabulary, or of
            ``init_ids``) or ``text`` (embeddings of ``init_ids`` in their order, repeated or cut to N).
        init_ids: Token ids, as the model's tokenizer gives them: ``tokenizer("Classify: spam or ham?").input_ids`` for ``text``, the
            frequent tokens to choose from for ``vocabulary``.
    """

    num_virtual_tokens: int = 20
    init: Literal["random", "vocabulary", "text"] = "random"
    init_ids: tuple[int, ...] = ()

    def validate(self) -> None:
        require(self.num_virtual_tokens >= 1, self, "num_virtual_tokens", "it must be at least 1")
        require(all(i >= 0 for i in self.init_ids), self, "init_ids", "token ids are not negative")
        require(self.init != "text" or len(self.init_ids) > 0, self, "init_ids", "init='text' needs the token ids of the text")
        require(self.init != "random" or not self.init_ids, self, "init_ids", "init='random' reads no tokens; set init to 'text'")
        if self.targets is not None:
            raise TargetError("PromptTuning acts on the model's input; `targets` has no meaning. Leave it out.")

    def plan(self, anatomy: Anatomy) -> Plan:
        return Plan(soft_prompt_taps(anatomy, self.num_virtual_tokens, functools.partial(_build_tokens, strategy=self)))


def _build_tokens(context: BuildContext, port: EmbeddingsPort, embedding: nn.Module, *, strategy: PromptTuning) -> PromptTokens:
    count, rows = strategy.num_virtual_tokens, None
    if strategy.init != "random":
        rows = _rows(context, port, embedding, strategy)
    return PromptTokens(context, count=count, width=port.hidden, rows=rows)


def _rows(context: BuildContext, port: EmbeddingsPort, embedding: nn.Module, strategy: PromptTuning) -> Tensor:
    """Return the embeddings (N, d) of the tokens from which the prompt starts."""
    weight, count, given = embedding.weight, strategy.num_virtual_tokens, strategy.init_ids
    assert isinstance(weight, Tensor)
    if given and max(given) >= weight.shape[0]:
        raise ConfigError(
            f"PromptTuning: init_ids holds {max(given)}, but '{port.embedding}' has {weight.shape[0]} rows. Take the ids from the "
            "tokenizer of this model."
        )
    if weight.is_meta:
        raise UnsupportedLayerError(
            f"PromptTuning: init='{strategy.init}' reads '{port.embedding}', which is on the meta device. Load the weights first, or use "
            "init='random'."
        )
    if strategy.init == "text":
        ids = torch.tensor([given[i % len(given)] for i in range(count)])
    else:
        pool = torch.tensor(given) if given else torch.arange(weight.shape[0])
        ids = pool[torch.randint(len(pool), (count,), generator=torch.Generator().manual_seed(context.seed))]
    with torch.no_grad():
        rows: Tensor = embedding(ids.to(weight.device))  # through the layer: some scale what they look up
    return rows
