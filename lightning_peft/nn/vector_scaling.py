"""VeRA: Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv 2310.11454, equation 2.

``h = W x + Λ_b B Λ_d A x`` with frozen random A and B, shared by all layers, and trained diagonals.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule


class SharedProjections(nn.Module):
    """Frozen random ``vera_A`` (r, widest in) and ``vera_B`` (widest out, r); smaller layers use a slice of them.

    They are buffers in files as well, so that an adapter never depends on a random generator staying the same.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, context: BuildContext, *, rank: int, widest_in: int, widest_out: int, seed: int) -> None:
        super().__init__()
        self.projection_seed = seed
        self.register_buffer("vera_A", context.empty(rank, widest_in).detach())
        self.register_buffer("vera_B", context.empty(widest_out, rank).detach())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform with gain sqrt(2), A drawn before B, as the paper's code and HF peft do."""
        generator = torch.Generator().manual_seed(self.projection_seed)
        for matrix in (self.vera_A, self.vera_B):
            bound = math.sqrt(2.0) * math.sqrt(3.0 / matrix.shape[1])
            with torch.no_grad():
                matrix.copy_(torch.empty(matrix.shape).uniform_(-bound, bound, generator=generator))


class VectorScaledAdapter(DeltaModule):
    """ΔW = diag(λ_b) B diag(λ_d) A with trained ``vera_lambda_d`` (r,) and ``vera_lambda_b`` (out,)."""

    def __init__(self, context: BuildContext, *, rank: int, dropout: float, d_initial: float) -> None:
        super().__init__(context)
        self.dropout, self.d_initial = dropout, d_initial
        # A reference that is not registered: the projections are stored, saved and counted once, at the root.
        object.__setattr__(self, "projections", context.shared["vera"])
        self.vera_lambda_d = context.empty(rank)
        self.vera_lambda_b = context.empty(context.spec.out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.vera_lambda_d, self.d_initial)
        nn.init.zeros_(self.vera_lambda_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r, in) and B (out, r) with the diagonals multiplied in: ΔW = B A."""
        shared: SharedProjections = self.projections  # type: ignore[assignment]
        A, B = shared.vera_A[:, : self.spec.in_features], shared.vera_B[: self.spec.out_features]
        return self.vera_lambda_d[:, None] * A, self.vera_lambda_b[:, None] * B

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return base.low_rank(x, *self.factors(), dropout=self.dropout if self.training else 0.0)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return B @ A
