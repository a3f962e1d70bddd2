"""ΔW as a product of small matrices that is not the usual one: entry by entry, or of Kronecker.

LoHa: Hyeon-Woo et al. 2021, "FedPara", arXiv 2108.06098, equation 2, as a branch beside W: Yeh et al. 2023, "LyCORIS", arXiv
2309.14859, section 3. LoKr: the same paper; Edalati et al. 2022, "KronA", arXiv 2212.10650, for whole factors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule, fill_kaiming


class HadamardAdapter(DeltaModule):
    """ΔW = c·(A₁B₁) ⊙ (A₂B₂) of rank up to r²: ``hada_w1_a``, ``hada_w2_a`` (out, r), ``hada_w1_b``, ``hada_w2_b`` (r, in).

    Args:
        context: Place, dtype and seed.
        rank: r.
        scaling: c.
        dropout: Probability on the branch's input, in training.
    """

    def __init__(self, context: BuildContext, *, rank: int, scaling: float, dropout: float) -> None:
        super().__init__(context)
        spec = context.spec
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        self.hada_w1_a = context.empty(*spec.batch, spec.out_features, rank)
        self.hada_w1_b = context.empty(*spec.batch, rank, spec.in_features)
        self.hada_w2_a = context.empty(*spec.batch, spec.out_features, rank)
        self.hada_w2_b = context.empty(*spec.batch, rank, spec.in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator = self.generator()
        fill_kaiming(self.hada_w1_a, self.rank, generator)
        fill_kaiming(self.hada_w1_b, self.spec.in_features, generator)
        fill_kaiming(self.hada_w2_a, self.rank, generator)
        torch.nn.init.zeros_(self.hada_w2_b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A (r², in) and B (out, r²) with ΔW = c·BA: products of every row of B₁ with every row of B₂, columns of A₁ and A₂."""
        A = self.hada_w1_b.unsqueeze(-2) * self.hada_w2_b.unsqueeze(-3)
        B = self.hada_w1_a.unsqueeze(-1) * self.hada_w2_a.unsqueeze(-2)
        return A.flatten(-3, -2), B.flatten(-2)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out), without ever making ΔW; a grouped convolution has no factors of its whole."""
        if self.spec.groups > 1:
            return super().forward(base, x)
        return base.low_rank(x, *self.factors(), scaling=self.scaling, dropout=self.dropout if self.training else 0.0)

    def delta(self) -> Tensor:
        return self.scaling * (self.hada_w1_a @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)


def factorized(size: int, factor: int = -1) -> tuple[int, int]:
    """Return m, n with m · n = size as LyCORIS and HF peft choose them.

    Args:
        size: The number to factorise.
        factor: m, where it divides ``size``; else the largest m to accept. -1 takes m and n as close to each other as they come, m ≤ n.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor < 0 else factor
    m, n = 1, size
    while m < n:
        larger = next(d for d in range(m + 1, size + 1) if size % d == 0)
        if larger > most:
            break
        m, n = larger, size // larger
    return min(m, n), max(m, n)


class KroneckerAdapter(DeltaModule):
    """ΔW = c·W₁ ⊗ W₂ with ``lokr_w1`` (o₁, i₁) and ``lokr_w2`` (o₂, i₂), out = o₁o₂ and in = i₁i₂.

    W₂ is the product of ``lokr_w2_a`` (o₂, r) and ``lokr_w2_b`` (r, i₂) where that is smaller, W₁ too if asked. In a convolution i₁i₂
    are its channels, and each entry of W₂ is a kernel.

    Args:
        context: Place, dtype and seed.
        rank: r.
        scaling: c.
        dropout: Probability on the branch's input, in training.
        factor: o₁ and i₁, see :func:`factorized`.
        decompose_both: W₁ is a product of two as well where that is smaller.
    """

    def __init__(
        self, context: BuildContext, *, rank: int, scaling: float, dropout: float, factor: int, decompose_both: bool
    ) -> None:
        super().__init__(context)
        spec = context.spec
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        (out_1, out_2), (in_1, in_2) = (factorized(n, factor) for n in (spec.out_features, spec.in_features // spec.kernel))
        self._add(context, "lokr_w1", out_1, in_1, decomposed=decompose_both and rank < max(out_1, in_1) / 2)
        self._add(context, "lokr_w2", out_2, in_2 * spec.kernel, decomposed=rank < max(out_2, in_2) / 2)
        self.reset_parameters()

    def _add(self, context: BuildContext, name: str, rows: int, columns: int, *, decomposed: bool) -> None:
        batch = self.spec.batch
        if decomposed:
            self.register_parameter(f"{name}_a", context.empty(*batch, rows, self.rank))
            self.register_parameter(f"{name}_b", context.empty(*batch, self.rank, columns))
        else:
            self.register_parameter(name, context.empty(*batch, rows, columns))

    def reset_parameters(self) -> None:
        generator = self.generator()
        for name, parameter in self.named_parameters():
            if name in ("lokr_w1", "lokr_w1_a"):
                torch.nn.init.zeros_(parameter)
            else:
                fill_kaiming(parameter, parameter.shape[-1], generator)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return W₁ and W₂."""
        return self._factor("lokr_w1"), self._factor("lokr_w2")

    def _factor(self, name: str) -> Tensor:
        if name in self._parameters:
            return self.get_parameter(name)
        return self.get_parameter(f"{name}_a") @ self.get_parameter(f"{name}_b")

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out). For a linear layer (W₁ ⊗ W₂) x is W₁ X W₂ᵀ, x written as a matrix X (i₁, i₂)."""
        if self.spec.kind != "linear":
            return super().forward(base, x)
        w1, w2 = (w.to(x.dtype) for w in self.factors())
        X: Tensor = F.dropout(x, self.dropout, self.training).unflatten(-1, (w1.shape[1], w2.shape[1]))
        return base(x) + self.scaling * (w1 @ (X @ w2.mT)).flatten(-2)

    def delta(self) -> Tensor:
        w1, w2 = self.factors()
        product = self.scaling * w1[..., :, None, :, None] * w2[..., None, :, None, :]
        return product.flatten(-2).flatten(-3, -2)
