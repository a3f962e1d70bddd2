"""OLoRA, arXiv 2406.01775: LoRA that starts from the QR decomposition of W, which stays as it is."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import UnsupportedLayerError
from tests.papers.toys import D, X, check_dense, install, mlp, randomize, train

STRATEGY = lp.LoRA(rank=4, alpha=8.0, init="olora", targets="all-linear")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (D, 1e-13)])
def test_it_starts_at_the_base_and_leaves_its_weight(dtype: torch.dtype, tolerance: float) -> None:
    model = mlp(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(X.to(dtype)).detach()
    handle = install(model, STRATEGY)
    assert not STRATEGY.identity_at_init
    assert (model(X.to(dtype)) - plain).abs().max() <= tolerance
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert handle.num_trainable() == 704


def test_factors_are_those_of_qr() -> None:
    model = mlp()
    for entry in install(model, STRATEGY).entries:
        A, B, W = entry.adapter.lora_A.detach(), entry.adapter.lora_B.detach(), entry.module.weight
        torch.testing.assert_close(B.T @ B, torch.eye(4, dtype=D))
        assert A[:, :4].tril(-1).abs().max() < 1e-12, "upper trapezoidal"
        # The first columns of W are spanned by the first of Q.
        torch.testing.assert_close((B @ A)[:, :4], W[:, :4])


def test_the_model_is_that_of_hf_peft_with_its_residual_base() -> None:
    import peft

    model = mlp(torch.float32)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["l1", "l2"], init_lora_weights="olora")
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    handle = install(model, STRATEGY)
    for entry in handle.entries:
        layer = theirs.base_model.model.get_submodule(entry.path)
        torch.testing.assert_close(entry.adapter.lora_A, layer.lora_A["default"].weight, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(entry.adapter.lora_B, layer.lora_B["default"].weight, rtol=1e-5, atol=1e-6)
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            layer.lora_A["default"].weight.copy_(entry.adapter.lora_A)
            layer.lora_B["default"].weight.copy_(entry.adapter.lora_B)
    torch.testing.assert_close(model(X.float()), theirs(X.float()), rtol=1e-5, atol=1e-5)


def test_forward_gradients_and_merge_are_those_of_the_dense_model() -> None:
    model = mlp()
    handle = install(model, STRATEGY)
    starts = {id(e.adapter): 2.0 * (e.adapter.lora_B @ e.adapter.lora_A).detach() for e in handle.entries}
    randomize(handle)
    assert all(torch.linalg.matrix_rank(e.adapter.delta()) == 8 for e in handle.entries)
    check_dense(model, handle, lambda a, W: W + 2.0 * a.lora_B @ a.lora_A - starts[id(a)])


def test_the_start_is_saved_and_not_recomputed(tmp_path: Path) -> None:
    model = mlp()
    handle = install(model, STRATEGY)
    train(model, handle, 3)
    lp.save_adapter(handle, tmp_path / "a")
    fresh = mlp()
    loaded = lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))
    assert {s.attribute for s in loaded.slots if not s.trainable} == {"initial_A", "initial_B"}


def test_a_grouped_convolution_and_meta_weights_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="olora.*grouped"):
        install(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lp.LoRA(rank=2, init="olora", targets="0"))
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(UnsupportedLayerError, match="meta"):
        install(model, STRATEGY)
