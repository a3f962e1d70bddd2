"""The losses of T-Few over answer choices.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638, sections
3.1 and 3.2. With ℓ_{c,t} = log p(token t of choice c | input, the tokens before t), n_c tokens in choice c, and right choice r:

    L_LM = −Σ_t ℓ_{r,t}                                  averaged over the tokens of right choices
    β_c  = −Σ_t ℓ_{c,t} / n_c^κ                          κ = 1: the mean
    L_LN = −log softmax(−β)_r                            averaged over examples; 0 where there is one choice
    L_UL = −Σ_{c≠r} Σ_t log(1 − exp ℓ_{c,t} + 0.01)      averaged over the tokens of wrong choices

The prediction is the choice of least β. Padding and, in L_UL, the right choice are masked out. (The authors' code gives them
ℓ = −100 instead, which adds a constant −log 1.01 for each: the same gradients, another value.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.nn.chunked_loss import IGNORE

MARGIN = 0.01
"""What keeps the logarithm of L_UL finite where a wrong token is certain."""


class ChoiceLosses(NamedTuple):
    """Sums, each over what it is averaged over (:func:`choice_counts`); scalars."""

    lm: Tensor
    length_normalized: Tensor
    unlikelihood: Tensor


def choice_scores(logp: Tensor, mask: Tensor, *, length_norm: float = 1.0) -> Tensor:
    """Return β (b, c): the lower, the better; infinite where there is no choice.

    Args:
        logp: ℓ of every token, (b examples, c choices, t tokens); what padding holds does not matter.
        mask: True at real tokens, (b, c, t); all False for a choice that an example does not have.
        length_norm: κ.
    """
    length = mask.sum(-1)
    total = -logp.masked_fill(~mask, 0.0).sum(-1)
    return (total / length.clamp(min=1).to(total.dtype) ** length_norm).masked_fill(length == 0, torch.inf)


def choice_losses(logp: Tensor, mask: Tensor, answer: Tensor, *, length_norm: float = 1.0) -> ChoiceLosses:
    """Return the summed losses.

    Args:
        logp: As for :func:`choice_scores`.
        mask: As for :func:`choice_scores`.
        answer: Index of the right choice, (b,); -100 for an example that shall not count.
        length_norm: κ.
    """
    right, wrong = _sides(mask, answer)
    beta = choice_scores(logp, mask, length_norm=length_norm)
    unlikely = torch.log(MARGIN - torch.expm1(logp.masked_fill(~wrong, -1.0)))
    return ChoiceLosses(
        lm=-logp.masked_fill(~right, 0.0).sum(),
        length_normalized=F.cross_entropy(-beta, answer, ignore_index=IGNORE, reduction="sum"),
        unlikelihood=-unlikely.masked_fill(~wrong, 0.0).sum(),
    )


def choice_counts(mask: Tensor, answer: Tensor) -> tuple[int, int, int]:
    """Return what the three losses are averaged over: tokens of right choices, examples, tokens of wrong choices."""
    right, wrong = _sides(mask, answer)
    lm, examples, unlikely = torch.stack([right.sum(), (answer != IGNORE).sum(), wrong.sum()]).tolist()
    return lm, examples, unlikely


def _sides(mask: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
    """Return the real tokens of right and of wrong choices, each (b, c, t), of examples that count."""
    is_right = torch.arange(mask.shape[1], device=mask.device) == answer[:, None]
    counts = (answer != IGNORE)[:, None, None]
    return mask & is_right[..., None] & counts, mask & ~is_right[..., None] & counts
