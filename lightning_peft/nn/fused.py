"""A frozen linear layer and its low-rank branch as one autograd function.

``y = g ⊙ (W x + c B A drop(x)) + b``. Written as separate operations, autograd keeps the input twice (three times with dropout),
and the branch's output is a tensor of its own, forward and backward. Here the input is kept once, the branch is accumulated into
the layer's output in place, a dropout mask is drawn again in the backward pass instead of being kept, and a quantized weight is
unpacked again instead of being kept dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lightning_peft.types import has_values

# Not DTensor and other subclasses, whose operations are not these; the cost model runs layers on fake tensors.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


@dataclass(frozen=True)
class Operand:
    """A layer whose forward is exactly ``x Wᵀ + b``.

    Args:
        weight: W (out, in), or the codes of a quantized W.
        unpack: Returns a quantized W (out, in), newly made; None where ``weight`` is W.
        bias: (out,) or None.
        dtype: dtype of W and of the product.
    """

    weight: Tensor
    unpack: Callable[[], Tensor] | None
    bias: Tensor | None
    dtype: torch.dtype

    def fits(self, x: Tensor) -> bool:
        """Return whether :func:`low_rank_linear` of ``x`` is what the layer and a branch beside it compute.

        Otherwise the two have to run as separate operations: W trains, tensors are sharded, the layer casts its input for itself,
        a compiler runs (which fuses by its own rules).
        """
        if torch.compiler.is_compiling() or self.weight.requires_grad or type(x) not in _PLAIN:
            return False
        if self.unpack is not None:
            return self.dtype == product_dtype(x)
        if type(self.weight) not in _PLAIN:
            return False
        return self.dtype == x.dtype or (product_dtype(x) != x.dtype and self.dtype != torch.float64)


def low_rank_linear(
    x: Tensor,
    operand: Operand,
    A: Tensor,
    B: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    gain: Tensor | None = None,
    unpacked: Tensor | None = None,
) -> Tensor:
    """Return ``gain ⊙ (x Wᵀ + scaling · drop(x) Aᵀ Bᵀ) + b``.

    Args:
        x: (..., in), for which :meth:`Operand.fits` holds.
        operand: The frozen layer.
        A: (r, in).
        B: (out, r).
        scaling: c.
        dropout: Probability of dropping an entry of the branch's input, below 1.
        gain: (out,), or None for 1. Not with dropout, where the methods that have a gain mean something else.
        unpacked: W, where the caller has just unpacked it; not kept.

    Returns:
        (..., out), in the dtype that the layer alone would return.
    """
    computed = x.to(product_dtype(x))
    # Drawn from the CPU's generator, which no device has to be asked for; checkpointing restores it before it recomputes.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _LowRankLinear.apply(  # type: ignore[no-untyped-call]
            computed, operand.weight, operand.bias, A, B, gain, operand.unpack, unpacked, scaling, dropout, seed
        )
    return y if operand.unpack is None else y.to(x.dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer multiplies ``x``: that of autocast where it is on."""
    device = x.device.type
    if x.dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


class _Dropped:
    """The entries of (n, in) tensors that dropout sets to zero: the same for one seed.

    On the CPU, where drawing a number for every entry takes longer than the product with A, only the distances between dropped
    entries are drawn: they are independent and geometrically distributed. CUDA draws in parallel, and must not wait for a count.
    """

    def __init__(self, shape: torch.Size, device: torch.device, dropout: float, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        self.mask = self.positions = None
        if device.type != "cpu":
            self.mask = torch.rand(shape, generator=generator, device=device) < dropout
            return
        count = shape.numel()
        expected = count * dropout
        drawn = [torch.zeros(1, dtype=torch.long)]
        while True:
            size = int(expected + 6 * math.sqrt(expected)) + 64
            gaps = torch.rand(size, generator=generator).neg_().log1p_().div_(math.log1p(-dropout)).floor_().add_(1)
            drawn.append(gaps.long().cumsum_(0).add_(drawn[-1][-1]))
            if not has_values(gaps) or int(drawn[-1][-1]) > count:
                break
        positions = torch.cat(drawn[1:]).sub_(1)
        self.positions = positions[: int(torch.searchsorted(positions, count))] if has_values(positions) else positions

    def zero_(self, x: Tensor) -> Tensor:
        """Set the entries of a contiguous tensor to zero, in place."""
        if self.mask is not None:
            return x.masked_fill_(self.mask, 0)
        assert self.positions is not None
        x.view(-1).index_fill_(0, self.positions, 0)
        return x


def _matrix(weight: Tensor, unpack: Callable[[], Tensor] | None, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) if unpack is None else unpack()


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        unpack: Callable[[], Tensor] | None,
        unpacked: Tensor | None,
        scaling: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dtype = x.dtype
        rows = read = x.reshape(-1, x.shape[-1])
        if dropout:
            read = _Dropped(rows.shape, x.device, dropout, seed).zero_(rows.clone(memory_format=torch.contiguous_format))
            scaling = scaling / (1 - dropout)
        z = read @ A.T.to(dtype)
        W = _matrix(weight, unpack, dtype) if unpacked is None else unpacked.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        y = x.new_empty(*x.shape[:-1], W.shape[0])  # not a view of the product, which the caller could not change in place
        flat = y.view(-1, W.shape[0])
        if shift is None or gain is not None:
            torch.mm(rows, W.T, out=flat)
        else:
            torch.addmm(shift, rows, W.T, out=flat)
        flat.addmm_(z, B.T.to(dtype), alpha=scaling)
        product = None
        if gain is not None:
            flat.mul_(gain.to(dtype))
            product = y
            y = y if shift is None else y + shift
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(
            x if wanted[3] or wanted[5] else None,
            weight if unpack is None else None,
            A,
            B,
            gain,
            z if wanted[4] else None,
            product if wanted[5] else None,
        )
        ctx.unpack, ctx.scaling, ctx.dropout, ctx.seed = unpack, scaling, dropout, seed
        ctx.shape, ctx.dtype, ctx.device = x.shape, dtype, x.device
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(ctx.device.type, enabled=False):
            return _gradients(ctx, grads[0].reshape(-1, grads[0].shape[-1]))


def _gradients(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of the arguments of :class:`_LowRankLinear`, given that of y as (n, out)."""
    x, weight, A, B, gain, z, product = ctx.saved_tensors
    rows = None if x is None else x.reshape(-1, x.shape[-1])
    wanted, scaling, dtype = ctx.needs_input_grad, ctx.scaling, ctx.dtype
    A_, B_ = A.to(dtype), B.to(dtype)
    of_x = of_bias = of_A = of_B = of_gain = None
    W = _matrix(weight, ctx.unpack, dtype) if wanted[0] or wanted[5] else None
    if wanted[2]:
        of_bias = g.sum(0).to(ctx.bias_dtype)
    if gain is not None:
        if wanted[5]:
            assert W is not None
            assert rows is not None
            of_gain = (g * product.view(g.shape)).sum(0).to(gain.dtype) / gain
            off = (gain == 0).nonzero().flatten() if has_values(gain) else gain.new_empty(0, dtype=torch.long)
            if len(off):  # y says nothing there about what the gain multiplies
                unscaled = rows @ W[off].T + scaling * (rows @ A_.T) @ B_[off].T
                of_gain[off] = (g[:, off] * unscaled).sum(0).to(gain.dtype)
        g = g * gain.to(dtype)
    if wanted[4]:
        of_B = (z.T @ g).mul_(scaling).to(B.dtype).T.contiguous()  # g.T @ z takes MKL twice the time
    if wanted[0] or wanted[3]:
        of_z = (g @ B_).mul_(scaling)
        shape = torch.Size((len(g), ctx.shape[-1]))
        dropped = _Dropped(shape, ctx.device, ctx.dropout, ctx.seed) if ctx.dropout else None
        if wanted[3]:
            assert rows is not None
            read = rows if dropped is None else dropped.zero_(rows.clone(memory_format=torch.contiguous_format))
            of_A = (of_z.T @ read).to(A.dtype)
        if wanted[0]:
            assert W is not None
            of_x = g @ W
            if dropped is None:
                of_x.addmm_(of_z, A_)
            else:
                of_x.add_(dropped.zero_(of_z @ A_))
            of_x = of_x.view(ctx.shape)
    return of_x, None, of_bias, of_A, of_B, of_gain, None, None, None, None, None
