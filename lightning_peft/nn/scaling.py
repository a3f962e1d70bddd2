"""Learned scales, with and without shifts, of what a layer reads or writes.

(IA)³: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv 2205.05638,
section 3.3: ``l ⊙ (W x + b)`` on keys and values, ``W (l ⊙ x) + b`` on the way down of the feed-forward layer.
SSF: Lian et al. 2022, "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", arXiv 2210.08823:
``γ ⊙ (W x + b) + β`` after every operation.

The products are taken in the dtype of the scales, fp32: near 1, bf16 has no number between 1 and 1.0078, so that a scale rounded to
it would stay at 1 however it is trained.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.nn.adapter import BaseLayer, BuildContext, MergeableModule, fill_normal

Side = Literal["input", "output"]
ScaleShiftInit = Literal["identity", "normal"]


class LearnedScaling(MergeableModule):
    """(IA)³: ``ia3_l``, one factor for each output feature (out,) or input feature (in,); one row per expert on an expert stack.

    Args:
        context: Place and dtype.
        side: What is scaled: the layer's ``output``, bias included, or its ``input``.
    """

    def __init__(self, context: BuildContext, *, side: Side) -> None:
        super().__init__(context)
        self.side = side
        spec = context.spec
        self.ia3_l = context.empty(*spec.batch, spec.in_features if side == "input" else spec.out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones: the identity."""
        nn.init.ones_(self.ia3_l)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.side == "input":
            return base((x * self.ia3_l).to(x.dtype))
        y = base(x)
        return (y * base.along_channels(self.ia3_l)).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.side == "input":
            return (weight * self.ia3_l[..., None, :]).to(weight.dtype), bias
        return (weight * self.ia3_l[..., :, None]).to(weight.dtype), None if bias is None else (bias * self.ia3_l).to(bias.dtype)


class ScaleAndShift(MergeableModule):
    """SSF: ``scale`` γ (out,) and ``shift`` β (out,) on a layer's output.

    A layer that has no bias and is reached through its weight only (an RMSNorm, a projection of nn.MultiheadAttention) has no place for
    β; there γ trains alone, on the weight. Anywhere else a layer without bias gets one when this is merged.

    Args:
        context: Place, dtype and seed.
        init: ``identity`` (γ = 1, β = 0) or ``normal``, the paper's: N(1, 0.02²) and N(0, 0.02²).
    """

    shift: nn.Parameter | None

    def __init__(self, context: BuildContext, *, init: ScaleShiftInit) -> None:
        super().__init__(context)
        self.init, spec = init, context.spec
        self.scale = context.empty(*spec.batch, spec.out_features)
        self.shift = context.empty(*spec.batch, spec.out_features) if spec.has_input or spec.has_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        generator, std = self.generator(), 0.02 if self.init == "normal" else 0.0
        fill_normal(self.scale, std, generator)
        with torch.no_grad():
            self.scale.add_(1.0)
        if self.shift is not None:
            fill_normal(self.shift, std, generator)

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = base(x)
        scaled = y * base.along_channels(self.scale)
        return (scaled if self.shift is None else scaled + base.along_channels(self.shift)).to(y.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scaled = None if bias is None else self.scale * bias
        shifted = scaled if self.shift is None else self.shift if scaled is None else scaled + self.shift
        new_bias = None if shifted is None else shifted.to(weight.dtype if bias is None else bias.dtype)
        return (weight * self.scale[..., :, None]).to(weight.dtype), new_bias
