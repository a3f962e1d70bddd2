"""The side network of ladder side tuning: Sung et al. 2022, arXiv 2206.06522, section 3 and figure 2.

``h_0 = D_0 x``; for every used block i with backbone output h^b_i: ``h ← μ_i h + (1 - μ_i) D_i h^b_i``, ``μ_i = σ(α_i / T)``,
``h ← Block_i(h)``; at the end ``Up · LN(h)``. The side blocks of a decoder attend to the output ``LN(h)`` of the encoder's side network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.nn.adapter import BuildContext, fill_kaiming

TEMPERATURE = 0.1
UpStart = Literal["zero", "random", "none"]


@dataclass(frozen=True)
class Attended:
    """What the positions of a sequence may look at.

    Args:
        memory: Output of another side network, (B, T, w), for cross attention.
        causal: Position i sees positions up to i, where the mask does not say what each one sees.
    """

    memory: Tensor | None = None
    causal: bool = False


@dataclass(frozen=True)
class Rung:
    """What flowed through one block of the backbone.

    Args:
        x: Its input, (B, S, d).
        y: Its output, (B, S, d).
        mask: Its attention mask as ``scaled_dot_product_attention`` takes it, boolean (True is visible) or additive.
        memory_mask: That of its cross attention.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None
    memory_mask: Tensor | None = None


class SideAttention(nn.Module):
    """``h + O softmax(Q Kᵀ) V`` with a norm in front; keys and values from ``h`` or from another sequence of width w.

    Args:
        context: Place, dtype and seed.
        width: w.
        heads: Attention heads.
    """

    def __init__(self, context: BuildContext, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_weight, self.norm_bias = context.empty(width), context.empty(width)
        self.qkv_weight, self.qkv_bias = context.empty(3 * width, width), context.empty(3 * width)
        self.out_weight, self.out_bias = context.empty(width, width), context.empty(width)

    def forward(self, h: Tensor, mask: Tensor | None, *, memory: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, S, w) -> (B, S, w)."""
        x = _norm(h, self.norm_weight, self.norm_bias)
        if memory is None:
            parts = _linear(x, self.qkv_weight, self.qkv_bias).chunk(3, dim=-1)
        else:
            w = h.shape[-1]
            read = _linear(memory.to(x.dtype), self.qkv_weight[w:], self.qkv_bias[w:])
            parts = (_linear(x, self.qkv_weight[:w], self.qkv_bias[:w]), *read.chunk(2, dim=-1))
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in parts)  # (B, heads, S, w / heads)
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        if causal and mask is not None and mask.shape[-2] == 1:  # it hides padding only, the same for every position
            later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
            mask = mask & ~later if mask.dtype == torch.bool else mask.masked_fill(later, -torch.inf)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None)
        return h + _linear(mixed.transpose(1, 2).flatten(2), self.out_weight, self.out_bias)


class SideBlock(nn.Module):
    """A small pre-norm transformer block of width w: ``h += Attn(LN h)``, ``h += Cross(LN h)``, ``h += W_2 gelu(W_1 LN h)``.

    Args:
        context: Place, dtype and seed.
        width: w.
        inner: Width inside the MLP.
        heads: Attention heads; 0 leaves the attention out.
        cross: It attends to the output of another side network too.
    """

    def __init__(self, context: BuildContext, *, width: int, inner: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.attention = SideAttention(context, width=width, heads=heads) if heads else None
        self.cross = SideAttention(context, width=width, heads=heads) if heads and cross else None
        self.mlp_norm_weight, self.mlp_norm_bias = context.empty(width), context.empty(width)
        self.up_weight, self.up_bias = context.empty(inner, width), context.empty(inner)
        self.down_weight, self.down_bias = context.empty(width, inner), context.empty(width)

    def fill(self, generator: torch.Generator) -> None:
        """Norms to the identity, biases to zero, matrices like ``nn.Linear``."""
        for name, value in self.named_parameters():
            if name.endswith("norm_weight"):
                nn.init.ones_(value)
            elif value.dim() == 1:
                nn.init.zeros_(value)
            else:
                fill_kaiming(value, value.shape[1], generator)

    def forward(self, h: Tensor, rung: Rung, attended: Attended) -> Tensor:
        """(B, S, w) -> (B, S, w)."""
        if self.attention is not None:
            h = self.attention(h, rung.mask, causal=attended.causal)
        if self.cross is not None:
            h = self.cross(h, rung.memory_mask, memory=attended.memory)
        x = _norm(h, self.mlp_norm_weight, self.mlp_norm_bias)
        return h + _linear(F.gelu(_linear(x, self.up_weight, self.up_bias)), self.down_weight, self.down_bias)


class LadderNetwork(nn.Module):
    """The ladder: ``down`` (n + 1, w, d), gates ``alpha`` (n,), n side blocks, ``up`` (d, w).

    Args:
        context: Place, dtype and seed.
        hidden: d, width of the backbone's hidden states.
        width: w.
        inner: Width inside the side blocks' MLPs.
        steps: n, the number of used blocks.
        heads: Heads of the side blocks; 0 leaves the attention out.
        up: How ``up`` starts: at ``zero``, or ``random``; ``none`` leaves it out, for a network that another one reads.
        cross: The side blocks attend to the output of another side network.
        pruned: Returns the weights of the used blocks, of which the side blocks then start as small copies.
    """

    def __init__(
        self,
        context: BuildContext,
        *,
        hidden: int,
        width: int,
        inner: int,
        steps: int,
        heads: int,
        up: UpStart,
        cross: bool = False,
        pruned: Callable[[], Sequence[BlockWeights]] | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.start = context.seed, up
        self.down, self.alpha = context.empty(steps + 1, width, hidden), context.empty(steps)
        self.blocks = nn.ModuleList(SideBlock(context, width=width, inner=inner, heads=heads, cross=cross) for _ in range(steps))
        self.norm_weight, self.norm_bias = context.empty(width), context.empty(width)
        self.up = None if up == "none" else context.empty(hidden, width)
        self.reset_parameters()
        if pruned is not None:
            self._prune(pruned())

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
        if self.up is not None and self.start == "random":
            fill_kaiming(self.up, self.up.shape[1], generator)
        elif self.up is not None:
            nn.init.zeros_(self.up)

    @torch.no_grad()
    def _prune(self, base: Sequence[BlockWeights]) -> None:
        """Start from the base's own blocks, cut down to the w hidden channels whose weights are largest in L1 norm (section 3.3)."""
        score = torch.stack([weights.channels() for weights in base]).sum(0)
        kept = score.topk(self.down.shape[1]).indices.sort().values
        picks = F.one_hot(kept, self.down.shape[2]).to(self.down)
        self.down.copy_(picks.expand_as(self.down))
        if self.up is not None and self.start == "random":
            self.up.copy_(picks.T)
        for block, weights in zip(self.blocks, base, strict=True):
            assert isinstance(block, SideBlock)
            rows = weights.units().topk(block.up_weight.shape[0]).indices.sort().values
            block.up_weight.copy_(weights.up[rows][:, kept])
            block.down_weight.copy_(weights.down[kept][:, rows])
            for attention, parts in ((block.attention, weights.attention), (block.cross, weights.cross)):
                if attention is not None and parts is not None:
                    _prune_attention(attention, parts, kept)

    def gates(self) -> Tensor:
        """Return μ (n,), exactly 0.5 at the start."""
        return torch.sigmoid(self.alpha / TEMPERATURE)

    def forward(self, x: Tensor, rungs: Sequence[Rung], attended: Attended) -> Tensor:
        """Return what the ladder adds to, or puts in place of, the backbone's output.

        Args:
            x: Embeddings, (B, S, d).
            rungs: The n used blocks.
            attended: What else the side blocks look at.

        Returns:
            (B, S, d), in the dtype of ``x``; (B, S, w) without ``up``.
        """
        gates = self.gates().to(x.dtype)
        h = _linear(x, self.down[0])
        for i, (block, rung) in enumerate(zip(self.blocks, rungs, strict=True)):
            h = block(gates[i] * h + (1 - gates[i]) * _linear(rung.y, self.down[i + 1]), rung, attended)
        h = _norm(h, self.norm_weight, self.norm_bias)
        return h if self.up is None else _linear(h, self.up)


AttentionWeights = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one block of the backbone, canonical (out, in).

    Args:
        up: (d_ff, d).
        down: (d, d_ff).
        attention: Query, key, value and output of its self attention.
        cross: The same of its cross attention.
    """

    up: Tensor
    down: Tensor
    attention: AttentionWeights | None = None
    cross: AttentionWeights | None = None

    def channels(self) -> Tensor:
        """Return the L1 norm (d,) of what reads and writes each hidden channel."""
        score = self.up.abs().sum(0) + self.down.abs().sum(1)
        for parts in (self.attention, self.cross):
            if parts is not None:
                *readers, output = parts
                score = score + sum(m.abs().sum(0) for m in readers if m.shape[1] == len(score)) + output.abs().sum(1)
        return score.float()

    def units(self) -> Tensor:
        """Return the L1 norm (d_ff,) of each unit of the MLP."""
        return (self.up.abs().sum(1) + self.down.abs().sum(0)).float()


def _prune_attention(side: SideAttention, parts: AttentionWeights, kept: Tensor) -> None:
    """Copy the largest dimensions of every head; left as it is where the base has other heads or widths."""
    query, key, value, output = parts
    heads, width = side.heads, side.out_weight.shape[0]
    size = width // heads  # of a side head
    total = query.shape[0]
    if total % heads or key.shape[0] % (total // heads) or total // heads < size or key.shape[1] != query.shape[1]:
        return
    share = total // key.shape[0]  # query heads for one key head
    q, k, v, o = (m.unflatten(0, (-1, total // heads)) for m in (query, key, value, output.T))  # (heads, d_h, d)
    k, v = (m.repeat_interleave(share, 0) for m in (k, v))
    for place, pair in ((0, (q, k)), (2, (v, o))):
        picks = torch.stack([m.abs().sum(-1) for m in pair]).sum(0).topk(size, dim=1).indices.sort(1).values
        first, second = (m.gather(1, picks[..., None].expand(-1, -1, m.shape[2])).flatten(0, 1)[:, kept] for m in pair)
        if place == 0:
            side.qkv_weight[: 2 * width].copy_(torch.cat([first, second]))
        else:
            side.qkv_weight[2 * width :].copy_(first)
            side.out_weight.copy_(second.T)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), bias.to(x.dtype))
