"""VPT: Jia et al. 2022, "Visual Prompt Tuning", arXiv 2203.12119, section 3.2.

Shallow: ``[x_1, Z_1, E_1] = L_1([x_0, P, E_0])``, and Z goes on through all blocks; deep: ``[x_i, _, E_i] = L_i([x_{i-1}, P_{i-1},
E_{i-1}])``, a prompt of its own for every block. Deviation: the prompt stands behind the patches, or in front of them all (deep),
instead of behind ``[CLS]``, which is the same to a transformer that has added its positions before.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from lightning_peft.errors import ConfigError, TargetError
from lightning_peft.nn.adapter import BuildContext
from lightning_peft.nn.virtual_tokens import PromptTokens
from lightning_peft.strategies.registry import register
from lightning_peft.strategies.strategy import PEFTStrategy, require
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.surgery.patch_prompts import patch_prompt_taps
from lightning_peft.surgery.ports import PatchesPort


@register(
    name="visual_prompt_tuning",
    family="additive",
    summary="Trains virtual patches beside those of the image, in every block or at the first one.",
    paper="Visual Prompt Tuning, arXiv 2203.12119",
    lr=5e-3,
    identity_at_init=False,
    adds_positions=True,
    ports=("patches",),
    example={"num_virtual_tokens": 3},
)
@dataclass(frozen=True, kw_only=True)
class VisualPromptTuning(PEFTStrategy):
    """Prompts among the patches of a vision transformer, or of any stack of blocks that reads (batch, length, width) without masks.

    Args:
        num_virtual_tokens: N; the paper chooses among 1, 5, 10, 50, 100 and 200.
        deep: A prompt for every block (VPT-Deep); False for one at the first block (VPT-Shallow), by which the hidden states between
            the blocks, where something reads them, have N more positions.
        dropout: Dropout on the prompts, in training.
        hidden: d, for models that do not tell it.
    """

    num_virtual_tokens: int = 10
    deep: bool = True
    dropout: float = 0.0
    hidden: int | None = None

    def validate(self) -> None:
        require(self.num_virtual_tokens >= 1, self, "num_virtual_tokens", "it must be at least 1")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "a probability below 1 is needed")
        require(self.hidden is None or self.hidden >= 1, self, "hidden", "it must be at least 1")
        if self.targets is not None:
            raise TargetError("VisualPromptTuning acts on whole stacks of blocks; `targets` has no meaning. Leave it out.")

    def plan(self, anatomy: Anatomy) -> Plan:
        for port in anatomy.port(PatchesPort):
            if self.hidden is None and port.hidden is None:
                raise ConfigError(
                    f"VisualPromptTuning: the width of the hidden states of '{port.path or type(anatomy.root).__name__}' is unknown. Set "
                    "hidden."
                )
        build = functools.partial(_build_tokens, count=self.num_virtual_tokens, hidden=self.hidden, dropout=self.dropout)
        return Plan(patch_prompt_taps(anatomy, self.num_virtual_tokens, build, deep=self.deep))


def _build_tokens(context: BuildContext, port: PatchesPort, *, count: int, hidden: int | None, dropout: float) -> PromptTokens:
    width = hidden or port.hidden
    assert width is not None
    # Glorot's bound for the patch embedding, from the authors' code; prompts are as large as embedded patches.
    bound = math.sqrt(6.0 / ((port.patch or width) + width))
    return PromptTokens(context, count=count, width=width, bound=bound, dropout=dropout)
