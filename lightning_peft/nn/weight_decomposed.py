"""DoRA: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353, equations 5 and 6.

``W' = m ⊙ V / ‖V‖`` with V = W + c·BA and one norm per output row; the norm is a constant in the backward pass (section 4.3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule
from lightning_peft.nn.low_rank import LoRAInit, LowRankAdapter


class WeightDecomposedAdapter(LowRankAdapter):
    """Trains the directions of W's rows by ``lora_A``, ``lora_B`` and their lengths by ``magnitude`` (out,).

    Args:
        context: Place, dtype and seed.
        rank: r.
        scaling: c, that is alpha / r or alpha / sqrt(r).
        dropout: Probability on the branch's input, in training.
        init: Start of A and B; see :class:`LowRankAdapter`.
        detach_norm: The norm receives no gradient, as the paper proposes; False follows it exactly.
    """

    reads_base_weight = True

    def __init__(
        self, context: BuildContext, *, rank: int, scaling: float, dropout: float, init: LoRAInit, detach_norm: bool
    ) -> None:
        super().__init__(context, rank=rank, scaling=scaling, dropout=dropout, init=init)
        self.detach_norm = detach_norm
        self.magnitude = context.empty(*context.spec.batch, context.spec.out_features)
        with torch.no_grad():
            # By the same formula as in every forward, so that m / ‖V‖ starts at 1 exactly.
            self.magnitude.copy_(self._norm(context.weight(), *self.factors()))

    def _norm(self, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """Return ‖W + c·BA‖ of every row, in fp32 or better.

        ‖W‖² + 2c⟨WAᵀ, B⟩ + c²⟨B(AAᵀ), B⟩ takes r columns where the sum itself would take a second matrix of W's size.
        """
        wide = torch.promote_types(W.dtype, torch.float32)
        squares = torch.linalg.vector_norm(W, dim=-1, dtype=wide).square()
        if self.spec.groups > 1:  # a convolution's rows see their own group of A only
            V = W.to(wide) + self.scaling * self.spec.compose(B, A).to(wide)
            squares = torch.linalg.vector_norm(V, dim=-1).square()
        else:
            cross = (W @ A.mT.to(W.dtype)).to(wide)
            A, B = A.to(wide), B.to(wide)
            squares = squares + self.scaling * ((2 * cross + self.scaling * (B @ (A @ A.mT))) * B).sum(-1)
        norm: Tensor = squares.clamp_min(torch.finfo(wide).tiny).sqrt()  # a row of zeros keeps its output of 0
        return norm

    def _gain(self, W: Tensor) -> Tensor:
        """Return m / ‖V‖, (out,)."""
        A, B = self.factors()
        if self.detach_norm:
            A, B = A.detach(), B.detach()
        with torch.autocast(W.device.type, enabled=False):  # the norm of V must not be that of a rounded V
            return self.magnitude / self._norm(W, A, B)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        dropout = self.dropout if self.training else 0.0
        return base.low_rank(x, *self.factors(), scaling=self.scaling, dropout=dropout, gain=self._gain(base.weight()))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._gain(weight).to(weight.dtype)[..., None] * (weight + self.delta().to(weight.dtype)), bias

    unmerged = MergeableModule.unmerged  # the lengths of V's rows are lost in W', so only a backup brings W back
