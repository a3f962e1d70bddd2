"""LoftQ, arXiv 2310.08659, as initialisation of LoRA and as base preparation (methods.md C1.4)."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.preparation import loftq_factors
from tests.backbones import BACKBONES

X = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers large enough that quantization loses something that low rank can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(48, 64), nn.Linear(64, 96, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(x)))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


@pytest.fixture(scope="module", params=["torch", "bitsandbytes"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def prepared(rank: int = 4, iterations: int = 1, scheme: str = "nf4", **options: Any) -> Net:
    model = net()
    lp.quantize(model, scheme, loftq={"rank": rank, "iterations": iterations}, **options)
    return model


def error(model: nn.Module, path: str) -> tuple[float, float]:
    """Return ‖W − Q‖ and ‖W − (Q + c·BA)‖ of an adapted layer, W as it was before."""
    W = net().get_submodule(path).weight.detach().double()
    layer = model.get_submodule(path)
    Q = dequantized(layer).double()
    (adapter,) = [e.adapter for h in lp.handles(model).values() for e in h.entries if e.path == path]
    return float((W - Q).norm()), float((W - Q - adapter.delta().detach().double()).norm())


def error_of_plain(path: str) -> float:
    """Return ‖W − quant(W)‖."""
    model = net()
    lp.quantize(model, "nf4")
    return float((net().get_submodule(path).weight.detach() - dequantized(model.get_submodule(path))).norm())


def dequantized(layer: nn.Module) -> Tensor:
    backend = backend_of(layer)
    assert backend is not None
    assert isinstance(layer, nn.Linear)
    return backend.dequantize(layer)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("alpha", [1.0, 4.0, 32.0])
def test_starts_closer_to_the_dense_weight_than_plain_quantization_whatever_the_scaling(
    alpha: float, scheme: str, backend: str
) -> None:
    model = prepared(scheme=scheme, backend=backend)
    handle = lp.inject(model, lp.LoRA(rank=4, alpha=alpha, targets="all-linear", init="loftq"))
    assert not handle.strategy.identity_at_init
    for entry in handle.entries:
        plain, loftq = error(model, entry.path)
        assert loftq < 0.97 * plain
        # One iteration is the best rank-r approximation of what was lost (Eckart-Young).
        W = net().get_submodule(entry.path).weight.detach()
        lost = W - dequantized(entry.module)
        U, S, Vh = torch.linalg.svd(lost.double(), full_matrices=False)
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(entry.adapter.delta().detach().double(), best, rtol=0, atol=1e-6)
    dense, quantized = net()(X), prepared(scheme=scheme, backend=backend)(X)
    assert (model(X) - dense).norm() < (quantized - dense).norm()


def test_the_error_falls_with_the_iterations() -> None:
    errors = []
    for iterations in range(1, 6):
        model = prepared(iterations=iterations)
        lp.inject(model, lp.LoRA(rank=4, targets="all-linear", init="loftq"))
        if iterations == 1:  # whose codes are those of plain quantization
            errors.append([error(model, path)[0] for path in ("l1", "l2")])
        errors.append([error(model, path)[1] for path in ("l1", "l2")])
    for before, after in itertools.pairwise(errors):
        assert all(b < a for a, b in zip(before, after, strict=True))


def test_many_iterations_of_a_high_rank_stay_below_plain_quantization() -> None:
    # Rounding anew is no optimal step: where the rank is a large part of the matrix the sequence need not fall, but it stays below.
    plain = [error_of_plain(path) for path in ("l1", "l2")]
    model = prepared(rank=16, iterations=5)
    lp.inject(model, lp.LoRA(rank=16, targets="all-linear", init="loftq"))
    assert all(error(model, path)[1] < 0.7 * p for path, p in zip(("l1", "l2"), plain, strict=True))


def test_a_smaller_rank_takes_the_first_factors_of_one_iteration() -> None:
    model = prepared(rank=8)
    handle = lp.inject(model, lp.LoRA(rank=3, alpha=6.0, targets="l1", init="loftq"))
    L, R = loftq_factors(model.l1)
    adapter = handle.entries[0].adapter
    assert torch.equal(adapter.lora_A.detach(), R[:3])
    torch.testing.assert_close(adapter.lora_B.detach(), L[:, :3] / 2.0)
    S = torch.linalg.svdvals(L @ R)
    torch.testing.assert_close(torch.linalg.svdvals(adapter.delta())[:3], S[:3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [lp.LoRA, lp.DoRA, lp.QLoRA, lp.QDoRA])
def test_the_lora_family_starts_from_the_factors(method: type[lp.LoRA], tmp_path: Path) -> None:
    model = prepared()
    handle = lp.inject(model, method(rank=4, dropout=0.0, targets="all-linear", init="loftq"))
    W = {path: net().get_submodule(path).weight.detach() for path in ("l1", "l2")}
    for entry in handle.entries:
        new, _ = entry.adapter.merged(entry.site.weight(entry.module), None)
        plain, _ = error(model, entry.path)
        assert (new.detach() - W[entry.path]).norm() < 0.97 * plain
    before = {k: v.clone() for k, v in handle.state_dict().items()}
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    model(X).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(v, before[k]) for k, v in handle.state_dict().items())
    expected = model(X).detach()
    lp.save_adapter(handle, tmp_path / "adapter")
    plain_base = net()
    lp.quantize(plain_base, "nf4")  # one iteration leaves the codes of plain quantization, so the adapter fits it
    lp.load_adapter(plain_base, tmp_path / "adapter")
    assert torch.equal(plain_base(X), expected)


def test_slices_of_a_fused_weight_take_their_rows() -> None:
    model = BACKBONES["gpt2"].fresh()
    W = model.transformer.h[0].attn.c_attn.weight.detach().T.clone()
    with pytest.warns(UserWarning, match="stay dense"):
        lp.quantize(model, "nf4", loftq={"rank": 4})
    handle = lp.inject(model, lp.LoRA(rank=4, init="loftq"))
    layer = model.transformer.h[0].attn.c_attn
    lost = W - dequantized(layer)
    L, R = loftq_factors(layer)
    for entry in handle.entries[:2]:
        rows = slice(0, 16) if entry.member == "query" else slice(32, 48)
        torch.testing.assert_close(entry.adapter.delta().detach(), L[rows] @ R, rtol=1e-4, atol=1e-6)
        assert (lost[rows] - entry.adapter.delta()).norm() < lost[rows].norm()


def refused(model: nn.Module, strategy: lp.PEFTStrategy, kind: type[Exception], match: str) -> None:
    before, twin = list(model.state_dict()), copy.deepcopy(model)
    with pytest.raises(kind, match=match):
        lp.inject(model, strategy)
    assert list(model.state_dict()) == before
    assert lp.handles(model) == {}
    assert torch.equal(model(X), twin(X))


def test_a_base_without_factors_is_refused() -> None:
    strategy = lp.LoRA(rank=4, targets="all-linear", init="loftq")
    refused(net(), strategy, UnsupportedLayerError, r"lp.quantize\(model, loftq=")
    plain = net()
    lp.quantize(plain, "nf4")
    refused(plain, strategy, UnsupportedLayerError, r"lp.quantize\(model, loftq=")
    partly = net()
    lp.quantize(partly, "nf4", loftq={"rank": 4, "targets": ["l2"]})
    refused(partly, strategy, UnsupportedLayerError, "'l1'")
    lp.inject(partly, lp.LoRA(rank=4, targets="l2", init="loftq"))


def test_ranks_that_do_not_fit_the_preparation_are_refused() -> None:
    refused(prepared(rank=4), lp.LoRA(rank=5, targets="l1", init="loftq"), ConfigError, "rank 4, which is the most")
    twice = prepared(rank=4, iterations=2)
    refused(twice, lp.LoRA(rank=3, targets="l1", init="loftq"), ConfigError, "exactly this rank")
    refused(
        twice,
        lp.LoRA(rank=4, targets="all-linear", rank_per_target={"l2": 2}, init="loftq"),
        ConfigError,
        "rank=2 at 'l2'",
    )


def test_a_layer_that_became_dense_is_refused() -> None:
    model = prepared()
    handle = lp.inject(model, lp.LoRA(rank=4, targets="all-linear", init="loftq"))
    handle.merge(quantized="dense")
    handle.remove()
    refused(model, lp.LoRA(rank=4, targets="all-linear", init="loftq"), UnsupportedLayerError, "loftq")
