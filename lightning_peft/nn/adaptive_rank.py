"""The SVD-shaped branch of AdaLoRA: Zhang et al. 2023, arXiv 2303.10512, equation 3: ``W + P Λ Q``, here ``c·B diag(E) A``."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule, fill_normal
from lightning_peft.types import whole


class AdaptiveRankAdapter(DeltaModule):
    """ΔW = γ / (r + 1e-5) · B diag(E) A with ``lora_A`` (r, in), ``lora_E`` (r, 1), ``lora_B`` (out, r).

    A triplet (row of A, entry of E, column of B) is switched off by E = 0; it keeps its gradient and may come back.
    """

    def __init__(self, context: BuildContext, *, rank: int, alpha: float, dropout: float) -> None:
        super().__init__(context)
        self.rank, self.dropout = rank, dropout
        self.scaling = alpha / (rank + 1e-5)
        self.lora_A = context.empty(rank, context.spec.in_features)
        self.lora_E = context.empty(rank, 1)
        self.lora_B = context.empty(context.spec.out_features, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = self.generator()
        fill_normal(self.lora_A, 0.02, generator)
        fill_normal(self.lora_B, 0.02, generator)
        torch.nn.init.zeros_(self.lora_E)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        A = self.lora_E * self.lora_A
        return base.low_rank(x, A, self.lora_B, scaling=self.scaling, dropout=self.dropout if self.training else 0.0)

    def delta(self) -> Tensor:
        return self.scaling * self.spec.compose(self.lora_B, self.lora_A * self.lora_E)

    def orthogonality(self) -> Tensor:
        """Return ``‖A Aᵀ − I‖_F + ‖Bᵀ B − I‖_F`` (equation 4, not squared, as in the authors' code)."""
        A, B = whole(self.lora_A), whole(self.lora_B)
        identity = torch.eye(self.rank, dtype=A.dtype, device=A.device)
        rows: Tensor = torch.linalg.matrix_norm(A @ A.T - identity)
        columns: Tensor = torch.linalg.matrix_norm(B.T @ B - identity)
        return rows + columns
