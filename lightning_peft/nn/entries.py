"""A frozen linear layer with a few entries of its weight changed, as one autograd function.

``y = (W + ΔW) x + b`` with ΔW given as (position, value). Written as separate operations, autograd keeps W + ΔW of every layer until
the backward pass: a second copy of the model. Here it is made again there, and the whole gradient of one weight exists for a moment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.nn.fused import Operand, product_dtype


def scattered(positions: Tensor, values: Tensor, *shape: int) -> Tensor:
    """Return zeros of a shape with values at positions of the flattened tensor, in the dtype of the values."""
    zeros = values.new_zeros(shape)
    return zeros.view(-1).index_add(0, positions, values).view(shape)


def changed_linear(x: Tensor, operand: Operand, positions: Tensor, values: Tensor, unpacked: Tensor | None = None) -> Tensor:
    """Return ``x (W + ΔW)ᵀ + b``.

    Args:
        x: (..., in), for which :meth:`Operand.fits` holds.
        operand: The frozen layer.
        positions: (n,), in the flattened W.
        values: (n,), those of ΔW.
        unpacked: W, where the caller has just unpacked it; not kept.

    Returns:
        (..., out), in the dtype that the layer alone would return.
    """
    computed = x.to(product_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _ChangedLinear.apply(  # type: ignore[no-untyped-call]
            computed, operand.weight, operand.bias, positions, values, operand.unpack, unpacked
        )
    return y if operand.unpack is None else y.to(x.dtype)


def _changed(
    weight: Tensor, unpack: Any, unpacked: Tensor | None, positions: Tensor, values: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return W + ΔW for a product in ``dtype``: summed in the wider dtype of the two and rounded once, as a merge does it."""
    stored = weight if unpack is None else unpacked
    changed = unpack() if stored is None else stored.clone()
    # The layout stays: with another one the product would round differently.
    if changed.T.is_contiguous():  # as transformers' Conv1D has it
        out_features, in_features = changed.shape
        flat, positions = changed.T.view(-1), positions % in_features * out_features + positions // in_features
    else:
        changed = changed.contiguous()
        flat = changed.view(-1)
    flat.index_put_((positions,), (flat[positions] + values).to(flat.dtype))
    return changed.to(dtype)


class _ChangedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        values: Tensor,
        unpack: Any,
        unpacked: Tensor | None,
    ) -> Tensor:
        dtype, rows = x.dtype, x.reshape(-1, x.shape[-1])
        W = _changed(weight, unpack, unpacked, positions, values, dtype)
        y = x.new_empty(*x.shape[:-1], W.shape[0])  # not a view of the product, which the caller could not change in place
        flat = y.view(-1, W.shape[0])
        if bias is None:
            torch.mm(rows, W.T, out=flat)
        else:
            torch.addmm(bias.to(dtype), rows, W.T, out=flat)
        ctx.save_for_backward(x if ctx.needs_input_grad[4] else None, weight if unpack is None else None, positions, values)
        ctx.unpack, ctx.shape, ctx.dtype = unpack, x.shape, dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0].reshape(-1, grads[0].shape[-1])
        x, weight, positions, values = ctx.saved_tensors
        wanted, of_x, of_bias, of_values = ctx.needs_input_grad, None, None, None
        with torch.autocast(g.device.type, enabled=False):
            if wanted[0]:
                W = _changed(weight, ctx.unpack, None, positions, values, ctx.dtype)
                of_x = (g @ W).view(ctx.shape)
            if wanted[2]:
                of_bias = g.sum(0).to(ctx.bias_dtype)
            if wanted[4]:
                of_values = (g.T @ x.reshape(-1, x.shape[-1])).view(-1).index_select(0, positions).to(values.dtype)
        return of_x, None, of_bias, None, of_values, None, None
