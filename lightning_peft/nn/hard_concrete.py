"""Gates that are exactly 0 or 1 with a probability that can be learnt, and changes of weights behind them.

Hard concrete: Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", arXiv 1712.01312, equations 10 to 12.
In diff pruning: Guo et al. 2021, arXiv 2012.07463, section 3.1; the constants are those of its authors' code (temperature 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule
from lightning_peft.types import stable_seed

LOW, HIGH = -1.5, 1.5  # l and r, to which the concrete variable is stretched before it is cut to [0, 1]
CLOSED, OPEN = -50.0, 50.0  # α at which a gate is exactly 0 or 1, whatever the noise
_LEAST = 1e-6


def gate(alpha: Tensor, uniform: Tensor | None = None) -> Tensor:
    """Return ``z = clamp(s (r - l) + l, 0, 1)`` with s = σ(log u - log(1 - u) + α); without noise s = σ(α), as in evaluation."""
    if uniform is None:
        s = torch.sigmoid(alpha)
    else:
        u = uniform.clamp(_LEAST, 1 - _LEAST)
        s = torch.sigmoid(u.log() - (-u).log1p() + alpha)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(alpha: Tensor) -> Tensor:
    """Return P(z > 0) = σ(α - log(-l / r))."""
    return torch.sigmoid(alpha - math.log(-LOW / HIGH))


class GatedDifference(MergeableModule):
    """W + z ⊙ w, weight and bias as one vector: ``diff_w`` (n,), which starts at zero, behind gates of ``diff_alpha`` (n,).

    Structured: z is the product of an entry's gate and that of its tensor, ``diff_alpha_group`` (1,), or (2,) with a bias.

    Args:
        context: Place, dtype and seed.
        alpha: Start of every α.
        structured: Each tensor has a gate as well.
        biases: The bias of the layer is part of it.
    """

    # The step of the run, from which the noise of the gates is drawn; None outside. It changes between an optimizer's step and the next
    # forward only, so that recomputation and all forwards of one step see the same gates, and so do all ranks.
    step: int | None = None

    def __init__(self, context: BuildContext, *, alpha: float, structured: bool, biases: bool) -> None:
        super().__init__(context)
        spec = context.spec
        self.alpha, self.biases = alpha, biases and spec.has_bias
        self.sizes = [math.prod((*spec.batch, spec.out_features, spec.in_features)), *[spec.out_features] * self.biases]
        self.diff_w = context.empty(sum(self.sizes))
        self.diff_alpha = context.empty(sum(self.sizes))
        self.diff_alpha_group = context.empty(len(self.sizes)) if structured else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.diff_w)
        for alpha in (self.diff_alpha, self.diff_alpha_group):
            if alpha is not None:
                torch.nn.init.constant_(alpha, self.alpha)

    def difference(self, *, drawn: bool = False) -> Tensor:
        """Return z ⊙ w (n,).

        Args:
            drawn: With gates drawn for this step, as in training; else the deterministic ones.
        """
        entry, group = self.diff_alpha, self.diff_alpha_group
        noise: list[Tensor | None] = [None, None]
        if drawn:
            device = self.diff_w.device
            generator = torch.Generator(device).manual_seed(stable_seed(self.seed, self.step))
            noise = [torch.rand(n, generator=generator, device=device, dtype=entry.dtype) for n in (len(entry), len(self.sizes))]
        z = gate(entry, noise[0])
        return self.diff_w * (z if group is None else z * self._spread(gate(group, noise[1])))

    @property
    def fixed(self) -> bool:
        """Every gate is open or closed for good."""
        return bool((self.diff_alpha.detach().abs() >= OPEN).all())

    def open_gates(self) -> Tensor:
        """Return the expected number of entries whose gates are open, a scalar: Σ P(z > 0) P(z_g > 0)."""
        entry, group = open_probability(self.diff_alpha), self.diff_alpha_group
        return (entry if group is None else entry * self._spread(open_probability(group))).sum()

    @torch.no_grad()
    def fix(self, kept: Tensor) -> None:
        """Let the entries of ``kept`` (n,) be the only ones that change from now on, with the values that they have."""
        self.diff_w.copy_(self.difference().masked_fill(~kept, 0.0))
        self.diff_alpha.copy_(torch.where(kept, OPEN, CLOSED).to(self.diff_alpha))
        if self.diff_alpha_group is not None:
            self.diff_alpha_group.fill_(OPEN)

    def _spread(self, per_tensor: Tensor) -> Tensor:
        return torch.cat([value.expand(size) for value, size in zip(per_tensor.unbind(), self.sizes, strict=True)])

    def _changes(self, *, drawn: bool) -> tuple[Tensor, Tensor | None]:
        """Return ΔW ``(*batch, out, in)`` and Δb (out,)."""
        spec = self.spec
        weight, *bias = self.difference(drawn=drawn).split(self.sizes)
        return weight.view(*spec.batch, spec.out_features, spec.in_features), bias[0] if bias else None

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, bias = self._changes(drawn=self.training and self.step is not None)
        y = base.full_rank(x, weight)
        return y if bias is None else y + base.along_channels(bias).to(y)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._added(weight, bias, 1)

    def unmerged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        return self._added(weight, bias, -1)

    def _added(self, weight: Tensor, bias: Tensor | None, sign: int) -> tuple[Tensor, Tensor | None]:
        change, of_bias = self._changes(drawn=False)
        if bias is not None and of_bias is not None:
            bias = bias + sign * of_bias.to(bias)
        return weight + sign * change.to(weight), bias
