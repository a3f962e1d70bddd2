"""DoRA, arXiv 2402.09353: W' = m ⊙ V / ‖V‖ row by row, V = W + c·BA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConflictError, MergeError
from tests.backbones import BACKBONES, MLP, run

D = torch.float64


def mlp(dtype: torch.dtype = D) -> MLP:
    torch.manual_seed(0)
    return MLP().to(dtype)


X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def install(model: nn.Module, **options: Any) -> lp.Handle:
    return lp.inject(model, lp.DoRA(**{"rank": 4, "targets": "all-linear", **options}))


def randomize(handle: lp.Handle, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=D).to(p.dtype) * scale)


def direction(adapter: Any, W: Tensor) -> Tensor:
    """V = W + c·BA."""
    return W + adapter.scaling * adapter.lora_B @ adapter.lora_A


def adapted(adapter: Any, W: Tensor) -> Tensor:
    """W' as the paper writes it (equation 5)."""
    V = direction(adapter, W)
    return adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)


def test_golden_vector() -> None:
    layer = nn.Linear(2, 2, bias=False, dtype=D)
    model = nn.Sequential(layer)
    handle = lp.inject(model, lp.DoRA(rank=1, alpha=0.5, targets="0"))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    handle.load_state_dict(
        {
            "0.lora_A": torch.tensor([[1.0, 1.0]], dtype=D),
            "0.lora_B": torch.tensor([[1.0], [-1.0]], dtype=D),
            "0.magnitude": torch.tensor([10.0, 2.0], dtype=D),
        }
    )
    expected = torch.tensor([[6.139406, 7.893522], [-0.632456, 1.897367]], dtype=D)
    torch.testing.assert_close(model(torch.eye(2, dtype=D)).T.detach(), expected, rtol=0, atol=1e-6)
    handle.merge()
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6)


def test_count_names_shapes_and_start() -> None:
    model = mlp()
    plain = model(X).detach()
    handle = install(model)
    assert handle.num_trainable() == 704 + 32 + 64 == 800
    assert {k: tuple(v.shape) for k, v in handle.state_dict().items()} == {
        "l1.lora_A": (4, 48), "l1.lora_B": (32, 4), "l1.magnitude": (32,),
        "l2.lora_A": (4, 32), "l2.lora_B": (64, 4), "l2.magnitude": (64,),
    }  # fmt: skip
    torch.testing.assert_close(handle.state_dict()["l1.magnitude"], model.l1.weight.norm(dim=1).detach())
    torch.testing.assert_close(model(X).detach(), plain, rtol=0, atol=1e-14)


def test_rows_of_the_new_weight_have_the_trained_length_whatever_the_direction() -> None:
    model = mlp()
    handle = install(model)
    randomize(handle, 2.0)  # some magnitudes become negative, and turn their row round
    adapter = handle.entries[0].adapter
    with torch.no_grad():
        W = adapted(adapter, model.l1.weight)
        x_of_rows = model.l1(torch.eye(48, dtype=D)) - model.l1.bias
        torch.testing.assert_close(x_of_rows.T, W)
        torch.testing.assert_close(x_of_rows.T.norm(dim=1), adapter.magnitude.abs())
        assert (adapter.magnitude < 0).any()
        # The length of V is without effect: V twice as long gives the same W'.
        V = direction(adapter, model.l1.weight)
        model.l1.weight.copy_(2 * V - (V - model.l1.weight))
        torch.testing.assert_close(model.l1(torch.eye(48, dtype=D)) - model.l1.bias, x_of_rows)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("name", ["l1", "l2"])  # with and without bias
def test_gradients_are_those_of_the_dense_formula(name: str, detach: bool) -> None:
    model = mlp()
    handle = install(model, detach_norm=detach)
    randomize(handle)
    layer, adapter = model.get_submodule(name), {e.path: e.adapter for e in handle.entries}[name]
    x = torch.randn(7, layer.in_features, dtype=D, requires_grad=True)
    weights = torch.randn(7, layer.out_features, dtype=D)
    parameters = [x, adapter.lora_A, adapter.lora_B, adapter.magnitude]
    y = layer(x)
    found = torch.autograd.grad((y * weights).sum(), parameters)
    V = direction(adapter, layer.weight)
    norm = V.norm(dim=1, keepdim=True)
    dense = F.linear(x, adapter.magnitude[:, None] * V / (norm.detach() if detach else norm), layer.bias)
    expected = torch.autograd.grad((dense * weights).sum(), parameters)
    torch.testing.assert_close(y, dense, rtol=1e-12, atol=1e-12)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_detached_gradient_in_closed_form() -> None:
    model = mlp()
    handle = install(model)
    randomize(handle)
    adapter = handle.entries[0].adapter
    g = torch.randn(5, 32, dtype=D)
    (model.l1(X) * g).sum().backward()
    with torch.no_grad():
        V = direction(adapter, model.l1.weight)
        norm, outer = V.norm(dim=1), g.T @ X
        scaled = (adapter.magnitude / norm)[:, None] * outer
        torch.testing.assert_close(adapter.lora_B.grad, adapter.scaling * scaled @ adapter.lora_A.T)
        torch.testing.assert_close(adapter.lora_A.grad, adapter.scaling * adapter.lora_B.T @ scaled)
        torch.testing.assert_close(adapter.magnitude.grad, (outer * V).sum(1) / norm)


@pytest.mark.parametrize("detach", [True, False])
def test_the_exact_gradient_does_not_change_the_length_of_a_direction(detach: bool) -> None:
    # Over a base of zeros V = c·BA, and W' does not depend on the lengths of B's rows. The detached norm neglects this.
    model = mlp()
    nn.init.zeros_(model.l1.weight)
    handle = install(model, detach_norm=detach)
    randomize(handle)
    adapter = handle.entries[0].adapter
    (model.l1(X) * torch.randn(5, 32, dtype=D)).sum().backward()
    along = (adapter.lora_B.grad * adapter.lora_B).sum(1).abs()
    assert (along.max() > 0.1) if detach else (along.max() < 1e-12)


def hf(model: nn.Module, handle: lp.Handle, **options: Any) -> nn.Module:
    """Return HF peft's DoRA with the same weights."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["l1", "l2"], use_dora=True, **options)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            layer.lora_A["default"].weight.copy_(entry.adapter.lora_A)
            layer.lora_B["default"].weight.copy_(entry.adapter.lora_B)
            layer.lora_magnitude_vector["default"].weight.copy_(entry.adapter.magnitude)
    return theirs


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_parity_with_hf_peft(dropout: float) -> None:
    model = mlp(torch.float32)
    plain = copy.deepcopy(model)
    handle = install(model, alpha=8.0, dropout=dropout)
    randomize(handle)
    theirs = hf(plain, handle, lora_dropout=dropout)
    model.train()
    theirs.train()
    outputs = []
    for each in (model, theirs):
        torch.manual_seed(5)  # both draw one mask per layer with torch's own dropout
        x = X.float().requires_grad_(True)
        y = each(x)
        y.square().sum().backward()
        outputs.append((y.detach(), x.grad))
    torch.testing.assert_close(*(o[0] for o in outputs), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(*(o[1] for o in outputs), rtol=2e-4, atol=2e-4)
    for entry in handle.entries:
        layer = theirs.base_model.model.get_submodule(entry.path)
        pairs = [
            (entry.adapter.lora_A, layer.lora_A["default"]),
            (entry.adapter.lora_B, layer.lora_B["default"]),
            (entry.adapter.magnitude, layer.lora_magnitude_vector["default"]),
        ]
        for ours, other in pairs:
            torch.testing.assert_close(ours.grad, other.weight.grad, rtol=2e-4, atol=2e-3)
    handle.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model.l1.weight, merged.l1.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.l2.weight, merged.l2.weight, rtol=1e-5, atol=1e-6)


def test_dropout_acts_on_what_the_adapter_changes_only() -> None:
    model = mlp()
    handle = install(model, dropout=0.5)
    randomize(handle)
    adapter, layer = handle.entries[0].adapter, model.l1
    model.train()
    torch.manual_seed(3)
    found = layer(X)
    torch.manual_seed(3)
    dropped = F.dropout(X, 0.5)
    g = (adapter.magnitude / direction(adapter, layer.weight).norm(dim=1)).detach()
    of_dropped = F.linear(dropped, layer.weight)
    branch = adapter.scaling * F.linear(F.linear(dropped, adapter.lora_A), adapter.lora_B)
    expected = F.linear(X, layer.weight, layer.bias) + (g - 1) * of_dropped + g * branch
    torch.testing.assert_close(found, expected)
    model.eval()
    torch.testing.assert_close(layer(X), F.linear(X, adapted(adapter, layer.weight), layer.bias))


LAYERS: dict[str, tuple[Any, Any, Any]] = {
    "linear": (lambda: nn.Linear(6, 4), "0", lambda: torch.randn(3, 6, dtype=D)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), "0", lambda: torch.randn(3, 6, dtype=D)),
    "grouped convolution": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), "0", lambda: torch.randn(2, 4, 5, 5, dtype=D)),
    "convolution": (lambda: nn.Conv1d(4, 6, 3, stride=2), "0", lambda: torch.randn(2, 4, 9, dtype=D)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), "0", lambda: torch.randint(9, (2, 5))),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", LAYERS)
def test_merged_equals_unmerged_on_every_layer_kind(name: str, training: bool) -> None:
    make, target, inputs = LAYERS[name]
    torch.manual_seed(0)
    model, x = nn.Sequential(make()).to(D), inputs()
    model.train(training)
    weight = model[0].weight.detach().clone()
    handle = lp.inject(model, lp.DoRA(rank=2, targets=target))
    randomize(handle)
    expected = model(x).detach()
    handle.merge()
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-12, atol=1e-12)
    rows = model[0].weight.detach().T if name == "embedding" else model[0].weight.detach().flatten(1)
    torch.testing.assert_close(rows.norm(dim=1), handle.entries[0].adapter.magnitude.detach().abs())
    with pytest.raises(MergeError):
        handle.merge()
    handle.unmerge()
    assert torch.equal(model[0].weight, weight), "the lengths of V are lost in the merged weight, so a backup is kept"


@pytest.mark.parametrize("name", ["gpt2", "torch_encoder", "attention", "t5"])
def test_merged_equals_unmerged_in_models(name: str) -> None:
    backbone = BACKBONES[name]
    model = backbone.fresh(D)
    targets = {"attention": ["attention", "cross", "embed", "lora_head"]}.get(name)
    handle = lp.inject(model, lp.DoRA(rank=2, targets=targets))
    randomize(handle, 0.1)
    expected = run(model, backbone.batch(D))
    handle.merge()
    torch.testing.assert_close(run(model, backbone.batch(D)), expected, rtol=1e-6, atol=1e-6)  # T5 computes its norms in fp32


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_a_row_of_zeros_stays_finite(dtype: torch.dtype, detach: bool) -> None:
    model = mlp(dtype)
    with torch.no_grad():
        model.l2.weight[3] = 0
    handle = install(model, detach_norm=detach)
    assert torch.equal(model(X.to(dtype))[:, 3], torch.zeros(5, dtype=dtype))
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(X.to(dtype)) - 1).square().mean()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in handle.trainable_parameters() if p.grad is not None)
        optimizer.step()
    assert torch.isfinite(model(X.to(dtype))).all()
    handle.merge()
    assert torch.isfinite(model.l2.weight).all()


def test_refused_on_top_of_another_adapter_and_nothing_changes() -> None:
    model = mlp()
    first = lp.inject(model, lp.LoRA(rank=2, targets="l1"), "first")
    randomize(first)
    expected, keys = model(X).detach(), list(model.state_dict())
    with pytest.raises(ConflictError, match="reads the weight of the base"):
        lp.inject(model, lp.DoRA(rank=2, targets="all-linear"), "second")
    assert list(model.state_dict()) == keys
    assert torch.equal(model(X), expected)
    lp.inject(model, lp.DoRA(rank=2, targets="l2"), "elsewhere")


def test_another_adapter_may_lie_on_top() -> None:
    model = mlp()
    below = install(model)
    randomize(below)
    above = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"), "above")
    randomize(above)
    expected = model(X).detach()
    with pytest.raises(MergeError, match="Merge 'default' first"):
        above.merge()
    below.merge()
    above.merge()
    torch.testing.assert_close(model(X).detach(), expected)
    above.unmerge()
    below.unmerge()
    torch.testing.assert_close(model(X).detach(), expected)
