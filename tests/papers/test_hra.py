"""HRA, arXiv 2405.17484: a product of Householder reflections."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.orthogonal import ReflectionAdapter
from tests.papers.toys import D, X, check_dense, context, install, mlp, randomize, shapes

STRATEGY = lp.HRA(rank=4, targets="all-linear")


def product(u: Tensor) -> Tensor:
    """H_1 ... H_r, one after the other."""
    found = torch.eye(u.shape[0], dtype=D)
    for column in u.T:
        found = found @ (torch.eye(u.shape[0], dtype=D) - 2 * torch.outer(column, column) / column.dot(column))
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (D, 1e-13)])
def test_names_count_and_start(dtype: torch.dtype, tolerance: float) -> None:
    model = mlp(dtype)
    plain = model(X.to(dtype))
    handle = install(model, STRATEGY)
    assert shapes(handle) == {"l1.hra_u": (48, 4), "l2.hra_u": (32, 4)}
    assert handle.num_trainable() == 320
    assert (model(X.to(dtype)) - plain).abs().max() <= tolerance
    for entry in handle.entries:
        u = entry.adapter.hra_u
        assert torch.equal(u[:, 0::2], u[:, 1::2])
        assert 0.6 < u.abs().max() <= 2**-0.5


def test_forward_gradients_and_merge_are_those_of_the_dense_model() -> None:
    model = mlp()
    handle = install(model, STRATEGY)
    randomize(handle)
    check_dense(model, handle, lambda a, W: W @ product(a.hra_u))


def test_the_product_is_orthogonal_and_the_change_of_low_rank() -> None:
    model = mlp()
    before = model.l1.weight.clone()
    handle = install(model, STRATEGY)
    randomize(handle)
    U, P = handle.entries[0].adapter.factors()
    T = torch.eye(48, dtype=D) - P @ U.T
    torch.testing.assert_close(T, product(handle.entries[0].adapter.hra_u))
    torch.testing.assert_close(T @ T.T, torch.eye(48, dtype=D))
    assert torch.linalg.det(T) > 0
    handle.merge()
    assert torch.linalg.matrix_rank(model.l1.weight - before) == 4
    torch.testing.assert_close(model.l1.weight @ model.l1.weight.T, before @ before.T)


def test_parity_with_hf_peft() -> None:
    import peft

    model = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.HRAConfig(r=4, target_modules=["l1", "l2"])).to(D)
    handle = install(model, STRATEGY)
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            theirs.base_model.model.get_submodule(entry.path).hra_u["default"].copy_(entry.adapter.hra_u)
    handle.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model.l1.weight, merged.l1.weight, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(X), merged(X), rtol=1e-10, atol=1e-10)


def test_every_expert_of_a_stack_has_its_own_reflections() -> None:
    adapter = ReflectionAdapter(context(6, 8, batch=(3,)), rank=2)
    torch.nn.init.normal_(adapter.hra_u)
    weight = torch.randn(3, 6, 8, dtype=D)
    merged, _ = adapter.merged(weight, None)
    torch.testing.assert_close(merged, torch.stack([w @ product(u) for w, u in zip(weight, adapter.hra_u, strict=True)]))
    torch.testing.assert_close(adapter.unmerged(merged, None)[0], weight)


def test_rank_per_target() -> None:
    handle = install(mlp(), lp.HRA(rank=4, targets="all-linear", rank_per_target={"l2": 2}))
    assert [e.adapter.rank for e in handle.entries] == [4, 2]


def test_odd_ranks_and_those_beyond_the_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="rank=3.*even"):
        lp.HRA(rank=3)
    with pytest.raises(ConfigError, match="rank_per_target.*even"):
        lp.HRA(rank_per_target={"l1": 1})
    with pytest.raises(ConfigError, match="rank=40.*l2.*32"):
        install(mlp(), lp.HRA(rank=40, targets="all-linear"))
