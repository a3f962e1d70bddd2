"""LoHa, arXiv 2108.06098 and 2309.14859: two low-rank products, entry by entry."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.products import HadamardAdapter
from tests.papers.toys import D, X, check_dense, context, install, mlp, randomize, shapes

STRATEGY = lp.LoHa(rank=4, alpha=8.0, targets="all-linear")


def test_names_count_and_identity() -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, STRATEGY)
    assert handle.num_trainable() == 2 * 4 * (48 + 32 + 32 + 64) == 1408
    assert {k: v for k, v in shapes(handle).items() if k.startswith("l1")} == {
        "l1.hada_w1_a": (32, 4), "l1.hada_w1_b": (4, 48), "l1.hada_w2_a": (32, 4), "l1.hada_w2_b": (4, 48),
    }  # fmt: skip
    assert torch.equal(model(X), plain)


def test_forward_gradients_and_merge_are_those_of_the_dense_model() -> None:
    model = mlp()
    handle = install(model, STRATEGY)
    randomize(handle)
    check_dense(model, handle, lambda a, W: W + 2.0 * (a.hada_w1_a @ a.hada_w1_b) * (a.hada_w2_a @ a.hada_w2_b))


def test_rank_is_the_square_of_that_of_its_factors() -> None:
    handle = install(mlp(), STRATEGY)
    randomize(handle)
    assert [int(torch.linalg.matrix_rank(e.adapter.delta())) for e in handle.entries] == [16, 16]


def test_parity_with_hf_peft() -> None:
    import peft

    model = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(r=4, alpha=8, target_modules=["l1", "l2"])).to(D)
    handle = install(model, STRATEGY)
    for entry in handle.entries:
        layer = theirs.base_model.model.get_submodule(entry.path)
        a = entry.adapter
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a"):  # the same distribution at the start
            bound = getattr(layer, name)["default"].shape[1] ** -0.5
            assert getattr(a, name).abs().max() <= bound
            assert getattr(a, name).abs().max() > 0.8 * bound
        assert layer.hada_w2_b["default"].abs().max() == a.hada_w2_b.abs().max() == 0
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            for name, value in entry.adapter.named_parameters():
                getattr(theirs.base_model.model.get_submodule(entry.path), name)["default"].copy_(value)
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-10, atol=1e-10)
    handle.merge()
    torch.testing.assert_close(model.l1.weight, theirs.merge_and_unload().l1.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_equals_its_dense_form_and_that_of_hf_peft(groups: int) -> None:
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)).to(D)
    plain = copy.deepcopy(model)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoHaConfig(r=2, alpha=4, target_modules=["0"])).to(D)
    handle = install(model, lp.LoHa(rank=2, alpha=4.0, targets="0"))
    randomize(handle)
    a = handle.entries[0].adapter
    x = torch.randn(2, 4, 8, 8, dtype=D)
    with torch.no_grad():
        for name, value in a.named_parameters():
            getattr(theirs.base_model.model[0], name)["default"].copy_(value)
        plain[0].weight += a.delta().reshape(6, 4 // groups, 3, 3)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model(x), theirs(x))


def test_no_tensor_of_the_size_of_the_weight_is_made() -> None:
    model = nn.Sequential(nn.Linear(256, 256)).to(D)
    install(model, lp.LoHa(rank=4, targets="0"))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 256, dtype=D))
    base = model[0].weight.numel()
    assert sorted(kept)[-2] < base / 4
    assert kept.count(base) <= 1, "the base's own weight at most"


def test_every_expert_of_a_stack_has_its_own_product() -> None:
    adapter = HadamardAdapter(context(6, 5, batch=(3,)), rank=2, scaling=0.5, dropout=0.0)
    torch.nn.init.normal_(adapter.hada_w2_b)
    parts = [
        0.5 * (adapter.hada_w1_a[e] @ adapter.hada_w1_b[e]) * (adapter.hada_w2_a[e] @ adapter.hada_w2_b[e]) for e in range(3)
    ]
    torch.testing.assert_close(adapter.delta(), torch.stack(parts))


def test_rank_and_alpha_per_target() -> None:
    handle = install(
        mlp(), lp.LoHa(rank=4, alpha=8.0, targets="all-linear", rank_per_target={"l2": 2}, alpha_per_target={"l1": 1.0})
    )
    assert [(e.adapter.rank, e.adapter.scaling) for e in handle.entries] == [(4, 0.25), (2, 4.0)]


def test_a_rank_beyond_the_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank=40.*l1.*at most 32"):
        install(mlp(), lp.LoHa(rank=40, targets="all-linear"))
