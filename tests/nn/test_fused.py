"""The fused low-rank layer against plain operations: values, gradients, what it keeps, and where it must not be used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.nn import fused
from lightning_peft.nn.fused import Operand, low_rank_linear

N, IN, OUT, R = (2, 5), 7, 6, 3


def tensors(dtype: torch.dtype, *, bias: bool, gain: bool, adapter: torch.dtype | None = None) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    adapter = adapter or dtype

    def new(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(of)

    made = {"x": new(*N, IN), "W": new(OUT, IN), "b": new(OUT) if bias else None}
    made |= {"A": new(R, IN, of=adapter), "B": new(OUT, R, of=adapter), "gain": new(OUT, of=adapter) if gain else None}
    return {k: v if v is None or k == "W" else v.requires_grad_() for k, v in made.items()}


def fuse(t: dict[str, Any], **options: Any) -> Tensor:
    operand = Operand(t["W"], None, t["b"], t["W"].dtype)
    return low_rank_linear(t["x"], operand, t["A"], t["B"], scaling=0.5, gain=t["gain"], **options)


def reference(t: dict[str, Any], kept: Tensor | None = None) -> Tensor:
    read = t["x"] if kept is None else t["x"] * kept
    y = t["x"] @ t["W"].T + 0.5 * (read @ t["A"].T) @ t["B"].T
    y = y if t["gain"] is None else y * t["gain"]
    return y if t["b"] is None else y + t["b"]


def gradients(y: Tensor, t: dict[str, Any]) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    names = [k for k, v in t.items() if v is not None and v.requires_grad]
    return dict(zip(names, torch.autograd.grad((y * weights).sum(), [t[k] for k in names]), strict=True))


CASES = list(itertools.product((False, True), (False, True)))


@pytest.mark.parametrize(("bias", "gain"), CASES)
def test_equals_plain_operations(bias: bool, gain: bool) -> None:
    t = tensors(torch.float64, bias=bias, gain=gain)
    y, expected = fuse(t), reference(t)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients(y, t), gradients(expected, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_gradient_of_a_gain_of_zero(bias: bool) -> None:
    t = tensors(torch.float64, bias=bias, gain=True)
    with torch.no_grad():
        t["gain"][[1, 4]] = 0.0
    torch.testing.assert_close(gradients(fuse(t), t), gradients(reference(t), t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("bias", "gain"), CASES)
def test_bf16_base_with_fp32_adapter(bias: bool, gain: bool) -> None:
    t = tensors(torch.bfloat16, bias=bias, gain=gain, adapter=torch.float32)
    exact = {k: v if v is None else v.detach().double().requires_grad_(v.requires_grad) for k, v in t.items()}
    y, expected = fuse(t), reference(exact)
    assert y.dtype == torch.bfloat16
    assert (y - expected).norm() < 0.01 * expected.norm()
    found, wanted = gradients(y, t), gradients(expected, exact)
    assert {k: v.dtype for k, v in found.items()} == {k: t[k].dtype for k in found}
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 0.01 * wanted[name].norm(), name


def kept_entries(shape: tuple[int, ...], dropout: float, seed: int) -> Tensor:
    return fused._Dropped(torch.Size(shape), torch.device("cpu"), dropout, seed).zero_(torch.ones(shape)).bool()


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_regenerates_the_mask_of_the_forward(bias: bool) -> None:
    t = tensors(torch.float64, bias=bias, gain=False)
    torch.manual_seed(3)
    kept = kept_entries((10, IN), 0.4, int(torch.randint(2**62, ())))
    assert 0 < kept.sum() < kept.numel()
    torch.manual_seed(3)
    y, expected = fuse(t, dropout=0.4), reference(t, kept.view(*N, IN).double() / 0.6)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(y, t), gradients(expected, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [1e-7, 0.001, 0.05, 0.5, 0.97, 1 - 2**-24])
def test_dropout_drops_each_entry_at_its_rate_independently(dropout: float) -> None:
    kept = kept_entries((400, 1000), dropout, 5)

    def near(found: Tensor, rate: float, count: int) -> bool:
        return abs(float(found) - rate) <= 5 * (rate * (1 - rate) / count) ** 0.5 + 1 / count

    assert near((~kept).double().mean(), dropout, kept.numel())
    for part in (kept[0], kept[-1], kept[:, 0], kept[:, -1]):  # nothing is special at an end
        assert near((~part).double().mean(), dropout, part.numel())
    for a, b in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:])):
        assert near((~a & ~b).double().mean(), dropout**2, a.numel())
    assert torch.equal(kept, kept_entries((400, 1000), dropout, 5))
    assert not 0.001 <= dropout <= 0.97 or not torch.equal(kept, kept_entries((400, 1000), dropout, 6))


def test_result_may_be_changed_in_place() -> None:
    for bias, gain in CASES:
        if gain and not bias:
            continue  # the product is what the backward pass of the gain reads
        t = tensors(torch.float64, bias=bias, gain=gain)
        found = gradients(fuse(t).relu_(), t)
        torch.testing.assert_close(found, gradients(reference(t).relu(), t), rtol=1e-12, atol=1e-12)
    t = tensors(torch.float64, bias=False, gain=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(fuse(t).relu_(), t)


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Collect the bytes that autograd keeps, each storage once."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        yield seen


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_the_input_once_and_r_columns(dropout: float) -> None:
    t = tensors(torch.float32, bias=True, gain=False)
    constants = sum(t[k].numel() * 4 for k in ("W", "A", "B"))
    with kept_bytes() as seen:
        y = fuse(t, dropout=dropout)
    rows = t["x"].numel() // IN
    assert sum(seen.values()) == constants + rows * (IN + R) * 4
    assert y.grad_fn is not None
    with torch.no_grad(), kept_bytes() as seen:
        fuse(t, dropout=dropout)
    assert not seen


def test_keeps_no_input_when_A_is_frozen() -> None:
    t = tensors(torch.float32, bias=False, gain=False)
    t["A"].requires_grad_(False)
    with kept_bytes() as seen:
        y = fuse(t)
    assert t["x"].data_ptr() not in seen
    torch.testing.assert_close(gradients(y, t), gradients(reference(t), t))


def test_no_gradient_of_the_input_where_nobody_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    t = tensors(torch.float64, bias=False, gain=False)
    t["x"] = t["x"].detach()
    products: list[str] = []
    plain = fused._matrix
    monkeypatch.setattr(fused, "_matrix", lambda *a: products.append("W") or plain(*a))
    found = gradients(fuse(t), t)
    assert products == ["W"]  # forward only
    assert set(found) == {"A", "B"}


def test_checkpointing_recomputes_the_same_mask() -> None:
    t = tensors(torch.float64, bias=True, gain=False)
    torch.manual_seed(0)
    direct = gradients(fuse(t, dropout=0.5), t)
    torch.manual_seed(0)
    again = gradients(checkpoint(lambda x: fuse({**t, "x": x}, dropout=0.5), t["x"], use_reentrant=False), t)
    assert direct.keys() == again.keys()
    assert all(torch.equal(direct[k], again[k]) for k in direct)


def test_autocast_equals_plain_operations() -> None:
    t = tensors(torch.float32, bias=True, gain=False)
    with torch.autocast("cpu", torch.bfloat16):
        y = fuse(t)
        read = F.linear(F.linear(t["x"], t["A"]), t["B"]) * 0.5
        expected = F.linear(t["x"], t["W"], t["b"]) + read
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    found, wanted = gradients(y, t), gradients(expected, t)
    assert {k: v.dtype for k, v in found.items()} == dict.fromkeys(found, torch.float32)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() < 0.02 * wanted[name].norm(), name
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(fuse(t), t), found)  # a backward inside the context


def test_float64_is_not_cast_by_autocast() -> None:
    t = tensors(torch.float64, bias=True, gain=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fuse(t), reference({k: v for k, v in t.items()}).double(), rtol=0.05, atol=0.05)
        assert fuse(t).dtype == torch.float64


# ---- where a layer is fused


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the calls of the fused function."""
    seen: list[int] = []
    from lightning_peft.surgery import sites

    plain = sites.low_rank_linear
    monkeypatch.setattr(sites, "low_rank_linear", lambda *a, **k: seen.append(1) or plain(*a, **k))
    return seen


def adapted(make: Callable[[], nn.Module], strategy: lp.PEFTStrategy) -> tuple[nn.Module, lp.Handle]:
    torch.manual_seed(0)
    net = make()
    handle = lp.inject(net, strategy)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return net, handle


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(IN, 8), nn.ReLU(inplace=True), nn.Linear(8, OUT, bias=False))


@pytest.mark.parametrize("method", [lp.LoRA, lp.DoRA])
def test_linear_layers_are_fused(monkeypatch: pytest.MonkeyPatch, method: type[lp.LoRA]) -> None:
    net, _ = adapted(two_layers, method(rank=2, targets="all-linear"))
    seen = calls(monkeypatch)
    net(torch.randn(3, IN)).sum().backward()
    assert len(seen) == 2


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("why", ["forward", "second", "trained", "subclass", "compile"])
def test_plain_operations_where_something_else_would_be_skipped(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(OwnForward(IN, OUT) if why == "subclass" else nn.Linear(IN, OUT))
    if why == "forward":  # as accelerate does
        inner = net[0].forward
        net[0].forward = lambda x: inner(x) + 1
    x = torch.randn(3, IN)
    base = net(x)
    handle = lp.inject(net, lp.LoRA(rank=2, targets="all-linear"))
    if why == "second":
        lp.inject(net, lp.LoRA(rank=2, targets="all-linear"), name="other")
    if why == "trained":
        net[0].weight.requires_grad_(True)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p))
    seen = calls(monkeypatch)
    run = torch.compile(net, backend="eager", fullgraph=True) if why == "compile" else net
    y = run(x)
    delta = handle.entries[0].adapter.delta()
    torch.testing.assert_close(y, base + x @ delta.T)
    assert len(seen) == (1 if why == "second" else 0)  # of two adapters the inner one lies on the layer itself
    if why == "trained":
        y.sum().backward()
        assert net[0].weight.grad is not None


def test_hooks_of_the_layer_run_and_may_change_it(monkeypatch: pytest.MonkeyPatch) -> None:
    net, handle = adapted(lambda: nn.Sequential(nn.Linear(IN, OUT)), lp.LoRA(rank=2, targets="all-linear"))
    x = torch.randn(3, IN)
    plain = net(x)
    net[0].register_forward_hook(lambda m, a, y: y * 2)
    net[0].register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    torch.testing.assert_close(
        net(x), 2 * (plain + F.linear(torch.ones_like(x), net[0].weight + handle.entries[0].adapter.delta()))
    )


def test_a_trained_bias_gets_its_gradient() -> None:
    net, _ = adapted(lambda: nn.Sequential(nn.Linear(IN, OUT)), lp.LoRA(rank=2, targets="all-linear", bias="adapted"))
    net(torch.randn(3, IN)).sum().backward()
    torch.testing.assert_close(net[0].bias.grad, torch.full((OUT,), 3.0))


def test_nothing_runs_backward_below_the_first_adapter() -> None:
    net = nn.Sequential(nn.Linear(IN, 8), nn.Linear(8, 8), nn.Linear(8, OUT))
    lp.inject(net, lp.LoRA(rank=2, targets=["1"]))
    outputs: dict[int, Tensor] = {}
    for i, layer in enumerate(net[:3]):
        layer.register_forward_hook(lambda m, a, y, i=i: outputs.__setitem__(i, y))
    net(torch.randn(3, IN)).sum().backward()
    assert [outputs[i].requires_grad for i in range(3)] == [False, True, True]
