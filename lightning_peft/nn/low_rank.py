"""The low-rank branch of LoRA.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:
``h = W x + (alpha / r) B A x``. Rank-stabilised scaling ``alpha / sqrt(r)``: Kalajdzievski 2023, arXiv 2312.03732.
PiSSA initialisation: Meng et al. 2024, arXiv 2404.02948, equations 2 to 4. LoftQ: Li et al. 2023, arXiv 2310.08659, algorithm 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule, fill_kaiming, fill_normal

LoRAInit = Literal["default", "gaussian", "pissa", "loftq"]


class LowRankAdapter(DeltaModule):
    """ΔW = c·BA with ``lora_A`` (r, in) and ``lora_B`` (out, r / groups); one pair per expert on an expert stack.

    Args:
        context: Place, dtype and seed.
        rank: r.
        scaling: c, that is alpha / r or alpha / sqrt(r).
        dropout: Probability on the branch's input, in training.
        init: ``default`` (A uniform, B zero), ``gaussian`` (A normal with standard deviation 1/r, B zero), ``pissa`` (principal
            singular vectors of W) or ``loftq`` (c·BA is the best rank-r part of what the storage of W has lost). PiSSA keeps W: its
            initial product c·B0·A0 is subtracted in the branch. LoftQ starts as ``default`` where nothing was kept of the loss, as
            on a dense base, on which an adapter that was trained elsewhere is loaded.
    """

    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, context: BuildContext, *, rank: int, scaling: float, dropout: float, init: LoRAInit) -> None:
        super().__init__(context)
        spec = context.spec
        self.rank, self.scaling, self.dropout, self.init = rank, scaling, dropout, init
        self.lora_A = context.empty(*spec.batch, rank, spec.in_features)
        self.lora_B = context.empty(*spec.batch, spec.out_features, rank // spec.groups)
        self.reset_parameters()
        if init == "pissa":
            self._start_from_principal_components(context.weight())
        if init == "loftq" and (residual := context.residual()) is not None:
            self._start_from_residual(*residual)

    def reset_parameters(self) -> None:
        generator = self.generator()
        # A look-up selects columns of A: with A random and B zero only the few rows of a batch would ever move B together.
        first, second = (self.lora_B, self.lora_A) if self.spec.kind == "embedding" else (self.lora_A, self.lora_B)
        if self.spec.kind == "embedding":
            fill_normal(first, 1.0, generator)
        elif self.init == "gaussian":
            fill_normal(first, 1.0 / self.rank, generator)
        else:
            fill_kaiming(first, self.spec.in_features, generator)
        torch.nn.init.zeros_(second)

    def _start_from_principal_components(self, weight: Tensor) -> None:
        # W = U S Vᵀ; B = U_r (S_r / c)^(1/2), A = (S_r / c)^(1/2) V_rᵀ, so that c·BA is the best rank-r part of W.
        U, S, Vh = torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False)
        root = (S[..., : self.rank] / self.scaling).sqrt()
        with torch.no_grad():
            self.lora_A.copy_(root[..., :, None] * Vh[..., : self.rank, :])
            self.lora_B.copy_(U[..., : self.rank] * root[..., None, :])
        # Saved, never recomputed: singular vectors are unique only up to sign and, for ties, rotation.
        self.register_buffer("initial_A", self.lora_A.detach().clone())
        self.register_buffer("initial_B", self.lora_B.detach().clone())

    def _start_from_residual(self, L: Tensor, R: Tensor) -> None:
        # The factors come with the singular values falling, so the first columns are the best of fewer. LoftQ knows no scaling.
        with torch.no_grad():
            self.lora_A.copy_(R[: self.rank])
            self.lora_B.copy_(L[:, : self.rank] / self.scaling)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A, B) with ΔW = c·BA; PiSSA appends its initial factors, which doubles the rank."""
        if self.init == "pissa":
            return torch.cat([self.lora_A, self.initial_A], dim=-2), torch.cat([self.lora_B, -self.initial_B], dim=-1)
        return self.lora_A, self.lora_B

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the branch computes in the dtype of the activation."""
        return base.low_rank(x, *self.factors(), scaling=self.scaling, dropout=self.dropout if self.training else 0.0)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * self.spec.compose(B, A)
