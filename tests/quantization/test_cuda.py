"""On CUDA: the two backends hold the same codes and compute the same to rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_peft.quantization.backend import backend_for
from lightning_peft.quantization.config import Quantization

pytestmark = pytest.mark.gpu


def both(scheme: Any, weight: Tensor, bias: Tensor | None = None, **options: Any) -> list[tuple[Any, Any]]:
    configs = [Quantization(scheme=scheme, backend=name, **options) for name in ("torch", "bitsandbytes")]  # type: ignore[arg-type]
    return [(backend_for(c), backend_for(c).linear(weight, bias, c)) for c in configs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_codes_are_equal(scheme: str, dtype: torch.dtype) -> None:
    for shape in ((64, 64), (33, 1000), (96, 520), (512, 1024)):
        weight = torch.randn(shape, device="cuda").to(dtype)
        options = {} if scheme == "int8" else {"double_quant": False}
        (torch_, ours), (bnb, theirs) = both(scheme, weight, **options)
        # A number halfway between two values may fall to either side; FP4 has two codes for 0, which stand for the same.
        a, b = torch_.dequantize(ours, torch.float32), bnb.dequantize(theirs, torch.float32)
        assert (a != b).float().mean() < 1e-3
        if scheme == "nf4":
            assert (ours.weight != theirs.weight).float().mean() < 1e-3


@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_doubly_quantized_scales_are_close(scheme: str) -> None:
    """The CPU, whose rounding the reference has, tells 65536 scales apart, CUDA all."""
    (torch_, ours), (bnb, theirs) = both(scheme, torch.randn(512, 1024, device="cuda"))
    torch.testing.assert_close(torch_.dequantize(ours), bnb.dequantize(theirs), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 4, 300])
@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_product_and_gradient(scheme: str, rows: int) -> None:
    weight, bias = torch.randn(256, 512, device="cuda"), torch.randn(256, device="cuda")
    (_, ours), (_, theirs) = both(scheme, weight, bias, **({} if scheme == "int8" else {"double_quant": False}))
    results = []
    for layer in (ours, theirs):
        x = torch.randn(rows, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).requires_grad_()
        y = layer(x)
        results.append((y, torch.autograd.grad(y.sin().sum(), x)[0]))
    tolerance = {"rtol": 5e-2, "atol": 1.0} if scheme == "int8" else {"rtol": 1e-2, "atol": 5e-2}
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_moves_between_devices_are_exact(backend: Any, scheme: Any) -> None:
    config = Quantization(scheme=scheme, backend=backend)
    chosen = backend_for(config)
    layer = chosen.linear(torch.randn(64, 128), torch.randn(64), config)
    dense = chosen.dequantize(layer)
    undo = chosen.densify(layer, torch.randn(64, 128))
    layer.cuda()
    undo()
    assert layer.weight.is_cuda
    assert torch.equal(chosen.dequantize(layer).cpu(), dense)
    layer(torch.randn(2, 128, device="cuda"))
    assert torch.equal(chosen.dequantize(layer.cpu()), dense)
