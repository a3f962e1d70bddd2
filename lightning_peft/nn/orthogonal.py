"""Multiplicative methods: the input is turned before the layer reads it, so the layer may be stored in any way.

OFT: Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv 2306.07280; on the input side as in HF
peft: ``h = W Rᵀ x`` (the paper multiplies R from the left of W). HRA: Yuan et al. 2024, "Bridging The Gap between Low-rank and
Orthogonal Adaptation via Householder Reflection Adaptation", arXiv 2405.17484: ``h = W H_1 ... H_r x``.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule, fill_kaiming


class InputTransform(MergeableModule):
    """W' = W T with a trained matrix T (in, in)."""

    @abstractmethod
    def applied(self, rows: Tensor, *, transposed: bool) -> Tensor:
        """Return ``rows T``, or ``rows Tᵀ``: (*batch, n, in) -> the same shape."""

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return base(self.applied(x, transposed=True))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.applied(weight, transposed=False), bias


class BlockRotationAdapter(InputTransform):
    """T = Rᵀ with R = diag(R_1, ..., R_k), R_i = (I − Q_i)(I + Q_i)⁻¹, Q_i skew-symmetric: ``oft_R`` (k, β(β − 1)/2).

    Args:
        context: Place, dtype and seed.
        block_size: β, a divisor of in.
        share_blocks: All blocks are one.
        neumann_terms: Instead of the inverse, so many terms of its series: less exact, no factorisation. 0 for the inverse.
        epsilon: Keep ‖Q_i‖ within ε / sqrt(k) (COFT, section 3.3 of the paper); None for no bound.
    """

    def __init__(
        self, context: BuildContext, *, block_size: int, share_blocks: bool, neumann_terms: int, epsilon: float | None
    ) -> None:
        super().__init__(context)
        self.block_size, self.neumann_terms, self.epsilon = block_size, neumann_terms, epsilon
        self.blocks = context.spec.in_features // block_size
        stored = 1 if share_blocks else self.blocks
        self.oft_R = context.empty(*context.spec.batch, stored, block_size * (block_size - 1) // 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.oft_R)

    def skew(self) -> Tensor:
        """Return Q (*batch, k or 1, β, β), in fp32 or better; its upper triangles are the rows of ``oft_R``."""
        entries = self.oft_R.to(torch.promote_types(self.oft_R.dtype, torch.float32))
        rows, columns = torch.triu_indices(self.block_size, self.block_size, 1, device=entries.device)
        upper = entries.new_zeros(*entries.shape[:-1], self.block_size, self.block_size)
        upper[..., rows, columns] = entries
        Q = upper - upper.mT
        if self.epsilon is not None:
            bound = self.epsilon / self.oft_R.shape[-2] ** 0.5
            Q = Q * (bound / torch.linalg.matrix_norm(Q, keepdim=True).clamp_min(bound))
        return Q

    def rotation(self) -> Tensor:
        """Return R_1 ... R_k, (*batch, k, β, β); with Neumann's series only nearly orthogonal."""
        with torch.autocast(self.oft_R.device.type, enabled=False):
            Q = self.skew()
            identity = torch.eye(self.block_size, dtype=Q.dtype, device=Q.device)
            if self.neumann_terms:
                R = power = identity - Q  # (I − Q) Σ (−Q)^i = I − 2Q + 2Q² − ... ± Q^n
                for _ in range(self.neumann_terms - 2):
                    power = -power @ Q
                    R = R + power
            else:
                R = torch.linalg.solve(identity + Q, (identity - Q).expand_as(Q), left=False)
        return R.expand(*R.shape[:-3], self.blocks, *R.shape[-2:])

    def applied(self, rows: Tensor, *, transposed: bool) -> Tensor:
        R = self.rotation()
        return self._times(rows, R if transposed else R.mT)

    def _times(self, rows: Tensor, blocks: Tensor) -> Tensor:
        equation = "...nkb,...kbc->...nkc" if self.spec.batch else "...kb,kbc->...kc"
        return torch.einsum(equation, rows.unflatten(-1, (self.blocks, self.block_size)), blocks.to(rows.dtype)).flatten(-2)

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._times(weight, torch.linalg.inv(self.rotation().mT)), bias


class ReflectionAdapter(InputTransform):
    """T = H_1 ... H_r with H_i = I − 2 u_i u_iᵀ / ‖u_i‖²: ``hra_u`` (in, r).

    The product is I − U S⁻¹ Uᵀ with unit columns in U and S = ½I + the part of UᵀU above its diagonal (r x r), so that the input is
    read once and not r times.

    Args:
        context: Place, dtype and seed.
        rank: r, even: the columns start in equal pairs, whose reflections cancel.
    """

    def __init__(self, context: BuildContext, *, rank: int) -> None:
        super().__init__(context)
        self.rank = rank
        self.hra_u = context.empty(*context.spec.batch, context.spec.in_features, rank)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        half = torch.empty_like(self.hra_u[..., ::2])
        fill_kaiming(half, self.rank // 2, self.generator())
        with torch.no_grad():
            self.hra_u.copy_(half.repeat_interleave(2, -1))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U (*batch, in, r) and P = U S⁻¹, with T = I − P Uᵀ, in fp32 or better."""
        with torch.autocast(self.hra_u.device.type, enabled=False):
            u = self.hra_u.to(torch.promote_types(self.hra_u.dtype, torch.float32))
            U = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
            S = (U.mT @ U).triu(1) + 0.5 * torch.eye(self.rank, dtype=U.dtype, device=U.device)
            return U, torch.linalg.solve_triangular(S, U, upper=True, left=False)

    def applied(self, rows: Tensor, *, transposed: bool) -> Tensor:
        U, P = (factor.to(rows.dtype) for factor in self.factors())
        read, write = (U, P) if transposed else (P, U)
        return rows - (rows @ read) @ write.mT

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.applied(weight, transposed=True), bias
