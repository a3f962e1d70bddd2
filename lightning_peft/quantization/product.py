"""The product of a frozen quantized layer, which unpacks its weight in the forward pass and again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

#: Stored tensors and a dtype to the dense weight (out, in), newly made.
Unpack = Callable[..., Tensor]


def quantized_linear(
    x: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    stored: tuple[Tensor, ...],
    unpack: Unpack,
    product: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Return ``x Wᵀ + b``, computed in ``dtype`` and returned in x's.

    Under autocast, its dtype takes the place of ``dtype``, as it does for a dense layer. Nothing but ``stored`` is kept for the
    backward pass: not the dense weight and not x.

    Args:
        x: (..., in).
        bias: (out,) or None; cast for the product, never changed.
        dtype: dtype of the product.
        stored: The tensors of the stored weight.
        unpack: ``unpack(*stored, dtype=...)`` is the dense weight (out, in).
        product: ``product(x, bias, *stored)`` in place of ``x @ unpack(...).T + bias``, where codes are multiplied as they are.

    Returns:
        (..., out), differentiable in x and the bias.
    """
    device = x.device.type
    if dtype != torch.float64 and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        y: Tensor = _QuantizedLinear.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), None if bias is None else bias.to(dtype), unpack, product, *stored
        )
    return y.to(x.dtype)


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, unpack: Unpack, product: Callable[..., Tensor] | None, *stored: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*stored)
        ctx.unpack = unpack
        if product is not None:
            return product(x, bias, *stored)
        return F.linear(x, unpack(*stored, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        stored = ctx.saved_tensors
        with torch.autocast(g.device.type, enabled=False):
            of_x = g @ ctx.unpack(*stored, dtype=g.dtype) if ctx.needs_input_grad[0] else None
        of_bias = g.reshape(-1, g.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None, None, *(None for _ in stored)
