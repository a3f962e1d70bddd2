"""Closed formulas of methods.md F6 for a decoder-only transformer with a gated feed-forward layer; the reference of the tests here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoder:
    """Layers L, hidden size h = n_q · d_h, n_kv heads of keys and values, feed-forward size f, vocabulary V."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def kv(self) -> int:
        return self.kv_heads * self.hidden // self.heads

    def forward_flops(self, batch: int, length: int, logits: int | None = None) -> int:
        """L(4bsh² + 4bs·h·n_kv·d_h + 4bs²h + 6bshf) + 2bshV; ``logits`` positions per row instead of all."""
        b, s, h = batch, length, self.hidden
        block = 4 * b * s * h * h + 4 * b * s * h * self.kv + 4 * b * s * s * h + 6 * b * s * h * self.ffn
        return self.layers * block + 2 * b * (s if logits is None else logits) * h * self.vocab

    def decode_flops(self, batch: int, cached: int) -> int:
        """One token that attends to ``cached`` positions and to itself."""
        b, h = batch, self.hidden
        block = 4 * b * h * h + 4 * b * h * self.kv + 4 * b * (cached + 1) * h + 6 * b * h * self.ffn
        return self.layers * block + 2 * b * h * self.vocab

    def kv_cache(self, batch: int, length: int, itemsize: int) -> int:
        """2·b·s·L·n_kv·d_h·e"""
        return 2 * batch * length * self.layers * self.kv * itemsize
