"""VeRA, arXiv 2310.11454: one pair of random matrices, shared, stored and counted once; two trained vectors per layer."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import UnsupportedLayerError
from tests.backbones import BACKBONES, MLP

D = torch.float64


X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def adapted(rank: int = 8, seed: int = 0) -> tuple[MLP, lp.Handle]:
    torch.manual_seed(0)
    model = MLP().to(D)
    handle = lp.inject(model, lp.VeRA(rank=rank, targets="all-linear", projection_seed=seed))
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p))
    return model, handle


def projections(model: nn.Module) -> tuple[Tensor, Tensor]:
    shared = [m for m in model.modules() if hasattr(m, "vera_A")]
    assert len(shared) == 1
    return shared[0].vera_A, shared[0].vera_B


def test_equation_and_count() -> None:
    model, handle = adapted()
    assert handle.num_trainable() == (32 + 8) + (64 + 8) == 112
    A, B = projections(model)
    assert (A.shape, B.shape) == ((8, 48), (64, 8)), "the widest layers set the sizes"
    for entry, inside, outside in zip(handle.entries, (48, 32), (32, 64), strict=True):
        a = entry.adapter
        delta = torch.diag(a.vera_lambda_b) @ B[:outside] @ torch.diag(a.vera_lambda_d) @ A[:, :inside]
        torch.testing.assert_close(a.delta(), delta)
        assert torch.linalg.matrix_rank(delta) <= 8
    l1, l2 = (e.adapter.delta() for e in handle.entries)
    with torch.no_grad():
        hidden = torch.tanh(nn.functional.linear(X, model.l1.weight + l1, model.l1.bias))
        torch.testing.assert_close(model(X), hidden @ (model.l2.weight + l2).T)


def test_parity_with_hf_peft_from_the_same_seed() -> None:
    import peft

    model, handle = adapted()
    torch.manual_seed(0)
    config = peft.VeraConfig(r=8, target_modules=["l1", "l2"], projection_prng_key=0)
    theirs = peft.get_peft_model(MLP(), config).to(D).base_model.model
    A, B = projections(model)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.get_submodule(entry.path)
            # The same draws: float32 there, so the last digits differ.
            torch.testing.assert_close(layer.vera_A["default"].to(D), A, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(layer.vera_B["default"].to(D), B, rtol=1e-6, atol=1e-6)
            layer.vera_lambda_d["default"].copy_(entry.adapter.vera_lambda_d)
            layer.vera_lambda_b["default"].copy_(entry.adapter.vera_lambda_b)
        torch.testing.assert_close(model(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_projections_follow_their_own_seed() -> None:
    (a, _), (b, _), (c, _) = adapted(), adapted(), adapted(seed=1)
    assert torch.equal(projections(a)[0], projections(b)[0])
    assert not torch.equal(projections(a)[0], projections(c)[0])


def test_projections_are_stored_counted_and_saved_once(tmp_path: Path) -> None:
    model, handle = adapted()
    A, B = projections(model)
    assert [k for k in model.state_dict() if k.endswith("vera_A")] == ["peft.default.shared-vera.vera_A"]
    assert sum(k.endswith("vera_A") for k in handle.state_dict()) == 1
    assert not any(p is A or p is B for p in model.parameters())
    lp.save_adapter(handle, tmp_path / "a")
    size = sum(f.stat().st_size for f in (tmp_path / "a").glob("*.safetensors"))
    values = A.numel() + B.numel() + handle.num_trainable()
    assert values * 8 <= size < values * 8 + 2000
    torch.manual_seed(0)
    fresh = MLP().to(D)
    lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_their_own_projections(how: str) -> None:
    model, _ = adapted()
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    A, _ = projections(twin)
    entries = lp.handles(twin)["default"].entries
    assert all(e.adapter.projections.vera_A is A for e in entries)
    assert A is not projections(model)[0]
    expected = model(X).detach()
    A.zero_()
    assert torch.equal(model(X), expected), "the original has its own"
    assert not torch.equal(twin(X), expected)


def test_projections_move_with_the_model() -> None:
    model, handle = adapted()
    model.to(torch.float32)
    A, _ = projections(model)
    assert A.dtype == torch.float32
    assert all(e.adapter.projections.vera_A is A for e in handle.entries)
    model(X.float())
    model.to("meta")
    assert projections(model)[0].is_meta
    assert all(e.adapter.projections.vera_A.is_meta for e in handle.entries)


def test_projections_do_not_train() -> None:
    model, handle = adapted()
    before = [t.clone() for t in projections(model)]
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(projections(model), before, strict=True))


def test_two_veras_on_one_model_keep_their_own_projections() -> None:
    model, _ = adapted()
    expected = model(X).detach()
    second = lp.inject(model, lp.VeRA(rank=4, targets="l1", projection_seed=5), "second")
    assert torch.equal(model(X), expected)
    assert len([m for m in model.modules() if hasattr(m, "vera_A")]) == 2
    second.remove()
    assert torch.equal(model(X), expected)
    assert len([m for m in model.modules() if hasattr(m, "vera_A")]) == 1


def test_composed_veras_keep_their_own_projections() -> None:
    model = MLP()
    parts = (lp.VeRA(rank=2, targets="l1"), lp.VeRA(rank=3, targets=["l1", "l2"], projection_seed=4))
    handle = lp.inject(model, lp.Compose(parts=parts))
    ranks = {e.label: e.adapter.projections.vera_A.shape[0] for e in handle.entries}
    assert ranks == {"0": 2, "1": 3}
    model(X.float())


def test_a_weight_without_an_input_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError):
        lp.inject(BACKBONES["torch_encoder"].fresh(), lp.VeRA(rank=2))
