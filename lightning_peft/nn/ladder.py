"""The side network of ladder side tuning: Sung et al. 2022, arXiv 2206.06522, section 3 and figure 2.

``h_0 = D_0 x``; for every used block i with backbone output h^b_i: ``h ← μ_i h + (1 - μ_i) D_i h^b_i``, ``μ_i = σ(α_i / T)``,
``h ← Block_i(h)``; at the end ``Up · LN(h)``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import BuildContext, fill_kaiming

TEMPERATURE = 0.1


class SideBlock(nn.Module):
    """A small pre-norm transformer block of width w: ``h += Attn(LN h)``, ``h += W_2 gelu(W_1 LN h)``.

    Args:
        context: Place, dtype and seed.
        width: w.
        heads: Attention heads; 0 leaves the attention out.
    """

    def __init__(self, context: BuildContext, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        if heads:
            self.attention_norm_weight, self.attention_norm_bias = context.empty(width), context.empty(width)
            self.qkv_weight, self.qkv_bias = context.empty(3 * width, width), context.empty(3 * width)
            self.out_weight, self.out_bias = context.empty(width, width), context.empty(width)
        self.mlp_norm_weight, self.mlp_norm_bias = context.empty(width), context.empty(width)
        self.up_weight, self.up_bias = context.empty(4 * width, width), context.empty(4 * width)
        self.down_weight, self.down_bias = context.empty(width, 4 * width), context.empty(width)

    def fill(self, generator: torch.Generator) -> None:
        """Norms to the identity, biases to zero, matrices like ``nn.Linear``."""
        for name, value in self.named_parameters():
            if name.endswith("norm_weight"):
                nn.init.ones_(value)
            elif value.dim() == 1:
                nn.init.zeros_(value)
            else:
                fill_kaiming(value, value.shape[1], generator)

    def forward(self, h: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """(B, S, w) -> (B, S, w); ``mask`` as in ``scaled_dot_product_attention``: boolean (True is visible) or additive."""
        if self.heads:
            x = _norm(h, self.attention_norm_weight, self.attention_norm_bias)
            qkv = _linear(x, self.qkv_weight, self.qkv_bias)
            q, k, v = (
                t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1)
            )  # (B, heads, S, w / heads)
            if mask is not None and mask.dtype != torch.bool:
                mask = mask.to(q.dtype)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
            h = h + _linear(mixed.transpose(1, 2).flatten(2), self.out_weight, self.out_bias)
        x = _norm(h, self.mlp_norm_weight, self.mlp_norm_bias)
        return h + _linear(F.gelu(_linear(x, self.up_weight, self.up_bias)), self.down_weight, self.down_bias)


class LadderNetwork(nn.Module):
    """The ladder: ``down`` (n + 1, w, d), gates ``alpha`` (n,), n side blocks, ``up`` (d, w).

    Args:
        context: Place, dtype and seed.
        hidden: d, width of the backbone's hidden states.
        width: w.
        steps: n, the number of used blocks.
        heads: Heads of the side blocks; 0 leaves the attention out.
        zero: Start with Up = 0.
    """

    def __init__(self, context: BuildContext, *, hidden: int, width: int, steps: int, heads: int, zero: bool) -> None:
        super().__init__()
        self.seed, self.zero = context.seed, zero
        self.down, self.alpha = context.empty(steps + 1, width, hidden), context.empty(steps)
        self.blocks = nn.ModuleList(SideBlock(context, width=width, heads=heads) for _ in range(steps))
        self.norm_weight, self.norm_bias = context.empty(width), context.empty(width)
        self.up = context.empty(hidden, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Gates to 0.5, norms to the identity, matrices like ``nn.Linear``, Up to zero if asked; the same on every rank."""
        generator = torch.Generator().manual_seed(self.seed)
        fill_kaiming(self.down, self.down.shape[2], generator)
        nn.init.zeros_(self.alpha)
        for block in self.blocks:
            assert isinstance(block, SideBlock)
            block.fill(generator)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)
        if self.zero:
            nn.init.zeros_(self.up)
        else:
            fill_kaiming(self.up, self.up.shape[1], generator)

    def gates(self) -> Tensor:
        """Return μ (n,), exactly 0.5 at the start."""
        return torch.sigmoid(self.alpha / TEMPERATURE)

    def forward(self, x: Tensor, rungs: Sequence[Tensor], masks: Sequence[Tensor | None], causal: bool) -> Tensor:
        """Return what the ladder adds to, or puts in place of, the backbone's output.

        Args:
            x: Embeddings, (B, S, d).
            rungs: Outputs of the n used blocks, (B, S, d) each.
            masks: Their attention masks.
            causal: Position i sees positions up to i, where there is no mask.

        Returns:
            (B, S, d), in the dtype of ``x``.
        """
        gates = self.gates().to(x.dtype)
        h = _linear(x, self.down[0])
        for i, (block, rung, mask) in enumerate(zip(self.blocks, rungs, masks, strict=True)):
            h = block(gates[i] * h + (1 - gates[i]) * _linear(rung, self.down[i + 1]), mask, causal)
        return _linear(_norm(h, self.norm_weight, self.norm_bias), self.up)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype))
