"""LoKr, arXiv 2309.14859, and KronA, arXiv 2212.10650: Kronecker products."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.products import KroneckerAdapter, factorized
from tests.papers.toys import D, X, check_dense, context, install, mlp, randomize, shapes

SIZES = {
    "whole": (4, False, {"l1.lokr_w1": (4, 6), "l1.lokr_w2": (8, 8), "l2.lokr_w1": (8, 4), "l2.lokr_w2": (8, 8)}, 184),
    "second decomposed": (
        1,
        False,
        {
            "l1.lokr_w1": (4, 6), "l1.lokr_w2_a": (8, 1), "l1.lokr_w2_b": (1, 8),
            "l2.lokr_w1": (8, 4), "l2.lokr_w2_a": (8, 1), "l2.lokr_w2_b": (1, 8),
        },
        88,
    ),
    "both decomposed": (
        2,
        True,
        {
            "l1.lokr_w1_a": (4, 2), "l1.lokr_w1_b": (2, 6), "l1.lokr_w2_a": (8, 2), "l1.lokr_w2_b": (2, 8),
            "l2.lokr_w1_a": (8, 2), "l2.lokr_w1_b": (2, 4), "l2.lokr_w2_a": (8, 2), "l2.lokr_w2_b": (2, 8),
        },
        108,
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize(("rank", "both", "expected", "count"), SIZES.values(), ids=SIZES)


def strategy(rank: int, both: bool, **options: Any) -> lp.LoKr:
    return lp.LoKr(rank=rank, alpha=3.0, decompose_both=both, targets="all-linear", **options)


def whole(adapter: Any) -> Tensor:
    own = dict(adapter.named_parameters())
    first, second = (own[n] if n in own else own[n + "_a"] @ own[n + "_b"] for n in ("lokr_w1", "lokr_w2"))
    return torch.kron(first, second) * 3.0 / adapter.rank


@pytest.mark.parametrize(
    ("size", "pair"),
    [
        (768, (24, 32)), (1024, (32, 32)), (3072, (48, 64)), (4096, (64, 64)), (11008, (86, 128)), (14336, (112, 128)),
        (32000, (160, 200)), (127, (1, 127)), (256, (16, 16)), (128, (8, 16)), (1, (1, 1)),
    ],
)  # fmt: skip
def test_factorisation(size: int, pair: tuple[int, int]) -> None:
    assert factorized(size) == pair


@pytest.mark.parametrize("size", [1, 2, 12, 48, 97, 360, 577])
@pytest.mark.parametrize("factor", [-1, 1, 2, 5, 8, 16, 1000])
def test_factorisation_as_in_hf_peft(size: int, factor: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert factorized(size, factor) == factorization(size, factor)


@EVERY
def test_names_count_and_identity(rank: int, both: bool, expected: dict[str, Any], count: int) -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, strategy(rank, both))
    assert shapes(handle) == expected
    assert handle.num_trainable() == count
    assert torch.equal(model(X), plain)


@EVERY
def test_forward_gradients_and_merge_are_those_of_the_dense_model(rank: int, both: bool, expected: Any, count: int) -> None:
    model = mlp()
    handle = install(model, strategy(rank, both))
    randomize(handle)
    check_dense(model, handle, lambda a, W: W + whole(a))


def test_rank_is_the_product_of_those_of_the_factors() -> None:
    handle = install(mlp(), strategy(4, False))
    randomize(handle)
    assert [int(torch.linalg.matrix_rank(e.adapter.delta())) for e in handle.entries] == [4 * 8, 4 * 8]


@EVERY
@pytest.mark.parametrize("factor", [-1, 4, 8])
def test_parity_with_hf_peft(rank: int, both: bool, expected: Any, count: int, factor: int) -> None:
    import peft

    model = mlp()
    config = peft.LoKrConfig(r=rank, alpha=3, decompose_both=both, decompose_factor=factor, target_modules=["l1", "l2"])
    theirs = peft.get_peft_model(copy.deepcopy(model), config).to(D)
    handle = install(model, strategy(rank, both, factor=factor))
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            for name, value in entry.adapter.named_parameters():
                getattr(theirs.base_model.model.get_submodule(entry.path), name)["default"].copy_(value)
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-10, atol=1e-10)
    handle.merge()
    torch.testing.assert_close(model.l1.weight, theirs.merge_and_unload().l1.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_equals_its_dense_form_and_that_of_hf_peft(rank: int, groups: int) -> None:
    import peft

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(12, 6, (3, 2), stride=2, padding=1, groups=groups)).to(D)
    plain = copy.deepcopy(model)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoKrConfig(r=rank, alpha=4, target_modules=["0"])).to(D)
    handle = install(model, lp.LoKr(rank=rank, alpha=4.0, targets="0"))
    randomize(handle)
    a = handle.entries[0].adapter
    x = torch.randn(2, 12, 8, 8, dtype=D)
    with torch.no_grad():
        for name, value in a.named_parameters():
            parameter = getattr(theirs.base_model.model[0], name)["default"]
            parameter.copy_(value.reshape(parameter.shape))
        plain[0].weight += a.delta().reshape(plain[0].weight.shape)
        torch.testing.assert_close(model(x), plain(x))
        torch.testing.assert_close(model(x), theirs(x))


def test_every_expert_of_a_stack_has_its_own_product() -> None:
    options: dict[str, Any] = dict(rank=1, scaling=3.0, dropout=0.0, factor=-1, decompose_both=True)
    adapter = KroneckerAdapter(context(6, 12, batch=(3,)), **options)
    for p in adapter.parameters():
        torch.nn.init.normal_(p)
    w1, w2 = adapter.factors()
    torch.testing.assert_close(adapter.delta(), torch.stack([3.0 * torch.kron(w1[e], w2[e]) for e in range(3)]))


def test_the_activation_is_the_only_large_tensor_in_the_forward() -> None:
    model = nn.Sequential(nn.Linear(256, 256)).to(D)
    handle = install(model, lp.LoKr(rank=2, targets="0"))
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model(torch.randn(3, 256, dtype=D))
    assert handle.num_trainable() < 2000
    assert max(kept) < 2000, "ΔW has 65536 entries and is never made"


@pytest.mark.parametrize("factor", [0, -2])
def test_a_wrong_factor_names_itself(factor: int) -> None:
    with pytest.raises(ConfigError, match="factor"):
        lp.LoKr(factor=factor)
