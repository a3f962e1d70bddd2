"""MoRA: Jiang et al. 2024, "MoRA: High-Rank Updating for Parameter-Efficient Fine-Tuning", arXiv 2405.12130.

``h = W x + expand(M compress(x))`` with one square matrix M, as many numbers as LoRA's two thin ones, between two maps that do not
train. The types are those of the authors' code: 1 is "sharing" (equation 6), 6 is "rotation" (equation 9).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.nn.adapter import BaseLayer, BuildContext, DeltaModule

MoRAType = Literal[1, 2, 3, 4, 6]
_ROWS = 1024  # of the identity at once, from which ΔW is computed


def side_of(rank: int, out_features: int, in_features: int, types: Sequence[MoRAType]) -> int:
    """Return r̂, the side of a square with as many entries as LoRA of this rank has (section 3.2); even for rotations."""
    side = math.floor(math.sqrt((out_features + in_features) * rank) + 0.5)
    return side - side % 2 if 6 in types else side


def compress(x: Tensor, side: int, mora_type: MoRAType) -> Tensor:
    """Map ``(..., in)`` to what M reads: ``(..., r̂)``, of type 6 ``(..., ⌈in/r̂⌉, r̂)``.

    Types 1 and 4 add up features r̂ apart, types 2 and 3 neighbours; type 6 keeps blocks of r̂ features and rotates each by its number.
    """
    if mora_type in (2, 3):
        few, many = x.shape[-1] // side, x.shape[-1] % side  # the first groups have one member more
        longer, rest = x.split([many * (few + 1), (side - many) * few], dim=-1)
        sums = [longer.unflatten(-1, (many, few + 1)).sum(-1), rest.unflatten(-1, (side - many, few)).sum(-1)]
        return torch.cat(sums, dim=-1)
    padded = torch.cat([x, x[..., : -x.shape[-1] % side]], dim=-1)  # by the first features once more
    blocks: Tensor = padded.unflatten(-1, (-1, side))
    if mora_type != 6:
        return blocks.sum(-2)
    cos, sin = _rotation(blocks)
    first, second = blocks.chunk(2, dim=-1)
    return blocks * cos + torch.cat([-second, first], dim=-1) * sin


def expand(y: Tensor, out_features: int, mora_type: MoRAType) -> Tensor:
    """Map what M gives to ``(..., out)``: types 2 and 4 repeat each entry, the others the whole until it is long enough."""
    if mora_type in (2, 4):
        few, many = out_features // y.shape[-1], out_features % y.shape[-1]
        return torch.cat([y[..., :many].repeat_interleave(few + 1, -1), y[..., many:].repeat_interleave(few, -1)], dim=-1)
    if mora_type == 6:
        y = y.flatten(-2)
    return torch.cat([y] * -(-out_features // y.shape[-1]), dim=-1)[..., :out_features]


def _rotation(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``(n, r̂)`` of rotary position embedding for block numbers 0 ... n-1."""
    count, side = blocks.shape[-2:]
    wide = torch.promote_types(blocks.dtype, torch.float32)
    numbers = torch.arange(count, dtype=wide, device=blocks.device)
    frequencies = 10000.0 ** -(torch.arange(0, side, 2, dtype=wide, device=blocks.device) / side)
    angles = torch.outer(numbers, torch.cat([frequencies, frequencies]))
    return angles.cos().to(blocks.dtype), angles.sin().to(blocks.dtype)


class SquareMatrixAdapter(DeltaModule):
    """ΔW = expand ∘ M ∘ compress with ``mora_M`` (r̂, r̂), which starts at zero; one per expert on an expert stack.

    Args:
        context: Place, dtype and seed.
        side: r̂.
        mora_type: Which maps stand around M.
        dropout: Probability on the branch's input, in training.
    """

    def __init__(self, context: BuildContext, *, side: int, mora_type: MoRAType, dropout: float) -> None:
        super().__init__(context)
        self.side, self.mora_type, self.dropout = side, mora_type, dropout
        self.mora_M = context.empty(*context.spec.batch, side, side)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.mora_M)

    def branches(self) -> list[tuple[MoRAType, Tensor]]:
        """Return the types of maps in use, and M between each."""
        return [(self.mora_type, self.mora_M)]

    def branch(self, x: Tensor) -> Tensor:
        """Return ΔW x: (..., in) -> (..., out)."""
        terms = []
        for mora_type, M in self.branches():
            if mora_type == 6 and M.dim() > 2:
                M = M.unsqueeze(-3)  # experts, and within each the blocks
            read = compress(x, self.side, mora_type)
            terms.append(expand(read @ M.mT.to(x.dtype), self.spec.out_features, mora_type))
        return sum(terms[1:], terms[0])

    def forward(self, base: BaseLayer, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); only a linear layer reads its input feature by feature."""
        if self.spec.kind != "linear":
            return super().forward(base, x)
        return base(x) + self.branch(F.dropout(x, self.dropout, self.training))

    def delta(self) -> Tensor:
        identity = torch.eye(self.spec.in_features, dtype=self.mora_M.dtype, device=self.mora_M.device)
        return torch.cat([self.branch(rows) for rows in identity.split(_ROWS)], dim=-2).mT
