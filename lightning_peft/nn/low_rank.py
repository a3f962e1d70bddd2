"""The low-rank branch of LoRA.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, equation 3:
``h = W x + (alpha / r) B A x``. Rank-stabilised scaling ``alpha / sqrt(r)``: Kalajdzievski 2023, arXiv 2312.03732.
PiSSA initialisation: Meng et al. 2024, arXiv 2404.02948, equations 2 to 4. OLoRA: Büyükakyüz 2024, arXiv 2406.01775, algorithm 1.
LoftQ: Li et al. 2023, arXiv 2310.08659, algorithm 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule, fill_kaiming, fill_normal

LoRAInit = Literal["default", "gaussian", "pissa", "olora", "loftq"]
FROM_WEIGHT: frozenset[LoRAInit] = frozenset({"pissa", "olora"})
"""Initialisations that take A and B from W, and subtract what they start with."""


class LowRankAdapter(DeltaModule):
    """ΔW = c·BA with ``lora_A`` (r, in) and ``lora_B`` (out, r / groups); one pair per expert on an expert stack.

    Args:
        context: Place, dtype and seed.
        rank: r.
        scaling: c, that is alpha / r or alpha / sqrt(r).
        dropout: Probability on the branch's input, in training.
        init: ``default`` (A uniform, B zero), ``gaussian`` (A normal with standard deviation 1/r, B zero), ``pissa`` (principal
            singular vectors of W), ``olora`` (the first r columns and rows of W's QR decomposition) or ``loftq`` (c·BA is the best
            rank-r part of what the storage of W has lost). PiSSA and OLoRA keep W: their initial product c·B0·A0 is subtracted in the
            branch. LoftQ starts as ``default`` where nothing was kept of the loss, as
            on a dense base, on which an adapter that was trained elsewhere is loaded.
    """

    projections = (("lora_A",), ("lora_B",))
    initial_A: Tensor
    initial_B: Tensor

    def __init__(self, context: BuildContext, *, rank: int, scaling: float, dropout: float, init: LoRAInit) -> None:
        super().__init__(context)
        spec = context.spec
        self.rank, self.scaling, self.dropout, self.init = rank, scaling, dropout, init
        self.lora_A = context.empty(*spec.batch, rank, spec.in_features)
        self.lora_B = context.empty(*spec.batch, spec.out_features, rank // spec.groups)
        self.reset_parameters()
        if init in FROM_WEIGHT:
            self._start_from_weight(context.weight())
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

    def _start_from_weight(self, weight: Tensor) -> None:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if self.init == "pissa":
            # W = U S Vᵀ; B = U_r (S_r / c)^(1/2), A = (S_r / c)^(1/2) V_rᵀ, so that c·BA is the best rank-r part of W.
            U, S, Vh = torch.linalg.svd(wide, full_matrices=False)
            root = (S[..., : self.rank] / self.scaling).sqrt()
            A, B = root[..., :, None] * Vh[..., : self.rank, :], U[..., : self.rank] * root[..., None, :]
        else:
            Q, R = torch.linalg.qr(wide)  # B has orthonormal columns; OLoRA does not divide by c
            A, B = R[..., : self.rank, :], Q[..., : self.rank]
        with torch.no_grad():
            self.lora_A.copy_(A)
            self.lora_B.copy_(B)
        # Saved, never recomputed: the vectors are unique only up to sign and, for ties, rotation.
        self.register_buffer("initial_A", self.lora_A.detach().clone())
        self.register_buffer("initial_B", self.lora_B.detach().clone())

    def _start_from_residual(self, L: Tensor, R: Tensor) -> None:
        # The factors come with the singular values falling, so the first columns are the best of fewer. LoftQ knows no scaling.
        with torch.no_grad():
            self.lora_A.copy_(R[: self.rank])
            self.lora_B.copy_(L[:, : self.rank] / self.scaling)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return (A, B) with ΔW = c·BA; PiSSA and OLoRA append their initial factors, which doubles the rank."""
        if self.init in FROM_WEIGHT:
            return torch.cat([self.lora_A, self.initial_A], dim=-2), torch.cat([self.lora_B, -self.initial_B], dim=-1)
        return self.lora_A, self.lora_B

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); the branch computes in the dtype of the activation."""
        return base.low_rank(x, *self.factors(), scaling=self.scaling, dropout=self.dropout if self.training else 0.0)

    def product(self) -> tuple[Tensor, Tensor, float]:
        """Return (A, B, c) with ΔW = c·BA, as evaluation and merging see it."""
        return *self.factors(), self.scaling

    def delta(self) -> Tensor:
        A, B, scaling = self.product()
        return scaling * self.spec.compose(B, A)


class FrozenReadAdapter(LowRankAdapter):
    """LoRA whose random factor A stays as it is drawn.

    LoRA-FA: Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", arXiv 2308.03303.
    The backward pass needs ``A x`` (..., r) then, and not x (..., in).
    """

    def __init__(self, context: BuildContext, *, rank: int, scaling: float, dropout: float, init: LoRAInit) -> None:
        super().__init__(context, rank=rank, scaling=scaling, dropout=dropout, init=init)
        self.lora_A.requires_grad_(False)


class NestedRankAdapter(LowRankAdapter):
    """LoRA of which any first b rows of A and columns of B are a LoRA of rank b: ``ΔW = c_b B[:, :b] A[:b]``.

    DyLoRA: Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
    Adaptation", arXiv 2210.07558, algorithm 1.

    Args:
        context: Place, dtype and seed.
        rank: R, the largest b.
        scaling: c at R.
        power: c_b = c (R / b)^power: 1 for alpha / b, 1/2 for alpha / sqrt(b).
        dropout: Probability on the branch's input, in training.
        init: ``default`` or ``gaussian``.
        frozen: Only the b-th row and column learn in a step, those before them are constants.
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        rank: int,
        scaling: float,
        power: float,
        dropout: float,
        init: LoRAInit,
        frozen: bool,
    ) -> None:
        super().__init__(context, rank=rank, scaling=scaling, dropout=dropout, init=init)
        self.power, self.frozen = power, frozen
        self.trained_rank = self.used_rank = rank  # b of the next step, and b in evaluation and when merged

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.training:
            return base.low_rank(x, *self._nested(self.used_rank), scaling=self._scaling(self.used_rank))
        b = self.trained_rank
        A, B = self._nested(b)
        if self.frozen:
            A = torch.cat([A[..., : b - 1, :].detach(), A[..., b - 1 :, :]], dim=-2)
            B = torch.cat([B[..., : b - 1].detach(), B[..., b - 1 :]], dim=-1)
        return base.low_rank(x, A, B, scaling=self._scaling(b), dropout=self.dropout)

    def _nested(self, b: int) -> tuple[Tensor, Tensor]:
        return self.lora_A[..., :b, :], self.lora_B[..., :b]

    def _scaling(self, b: int) -> float:
        return float(self.scaling * (self.rank / b) ** self.power)

    def product(self) -> tuple[Tensor, Tensor, float]:
        return *self._nested(self.used_rank), self._scaling(self.used_rank)
