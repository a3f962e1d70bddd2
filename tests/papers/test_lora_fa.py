"""LoRA-FA, arXiv 2308.03303: A is frozen, so no layer keeps its input; HF peft's preconditioned gradient."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import UnsupportedLayerError
from tests.papers.toys import D, X, check_dense, install, mlp, randomize, shapes, train

OPTIONS: dict[str, Any] = dict(rank=4, alpha=8.0, targets="all-linear")


def test_names_and_count() -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, lp.LoRAFA(**OPTIONS))
    assert torch.equal(model(X), plain)
    assert handle.num_trainable() == 4 * (32 + 64)
    assert shapes(handle) == shapes(install(mlp(), lp.LoRA(**OPTIONS))), "a file has both factors"
    assert {s.attribute for s in handle.trainable_slots()} == {"lora_B"}


def test_forward_gradients_and_merge_are_those_of_the_dense_model() -> None:
    model = mlp()
    handle = install(model, lp.LoRAFA(**OPTIONS))
    randomize(handle)
    check_dense(model, handle, lambda a, W: W + 2.0 * a.lora_B @ a.lora_A)


def test_A_never_moves_and_spans_the_rows_of_the_change() -> None:
    model = mlp()
    handle = install(model, lp.LoRAFA(**OPTIONS))
    before = [e.adapter.lora_A.clone() for e in handle.entries]
    train(model, handle, 4)
    for entry, A in zip(handle.entries, before, strict=True):
        assert torch.equal(entry.adapter.lora_A, A)
        assert entry.adapter.lora_A.grad is None
        delta = entry.adapter.delta().detach()
        assert torch.linalg.matrix_rank(delta) == torch.linalg.matrix_rank(torch.cat([A, delta])) == 4


def test_no_layer_keeps_its_input() -> None:
    def kept(strategy: lp.PEFTStrategy) -> int:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(D)
        install(model, strategy)
        seen: dict[int, int] = {}

        def keep(t: torch.Tensor) -> torch.Tensor:
            if t.shape == (50, 64):
                seen[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(torch.randn(50, 64, dtype=D))
        return len(seen)

    assert kept(lp.LoRA(rank=4, targets="all-linear")) == 2
    assert kept(lp.LoRAFA(rank=4, targets="all-linear")) == 0


def test_preconditioned_steps_are_those_of_hf_peft() -> None:
    import peft
    from peft.optimizers import create_lorafa_optimizer

    model = mlp(torch.float32)
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["l1", "l2"]))
    handle = install(model, lp.LoRAFA(precondition=True, **OPTIONS))
    with torch.no_grad():
        for entry in handle.entries:
            theirs.base_model.model.get_submodule(entry.path).lora_A["default"].weight.copy_(entry.adapter.lora_A)
    reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=8, lr=1e-2)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2, eps=1e-6, weight_decay=0.0)
    schedule = handle.strategy.schedule(handle)
    x = X.float()
    for _ in range(3):
        for net, step in ((model, optimizer), (theirs, reference)):
            net(x).square().sum().backward()
            if net is model:
                schedule.before_step(optimizer)
            step.step()
            net.zero_grad()
    for entry in handle.entries:
        layer = theirs.base_model.model.get_submodule(entry.path)
        assert entry.adapter.lora_B.abs().max() > 0.01
        # Theirs multiplies in bf16 where the machine can.
        torch.testing.assert_close(entry.adapter.lora_B, layer.lora_B["default"].weight, rtol=2e-2, atol=2e-3)


def test_the_preconditioned_gradient_is_the_best_change_of_the_weight() -> None:
    model = mlp()
    handle = install(model, lp.LoRAFA(precondition=True, **OPTIONS))
    randomize(handle)
    a = handle.entries[0].adapter
    weight = (model.l1.weight + a.delta()).detach().requires_grad_()
    (full,) = torch.autograd.grad((torch.tanh(nn.functional.linear(X, weight, model.l1.bias)) ** 2).sum(), weight)
    (torch.tanh(model.l1(X)) ** 2).sum().backward()
    handle.strategy.schedule(handle).before_step(torch.optim.SGD(handle.trainable_parameters(), lr=0.1))
    # Of all changes G A of c·BA's direction, the one nearest to the gradient of W: a least-squares problem.
    best = torch.linalg.lstsq(a.scaling * a.lora_A.T, full.T).solution.T
    torch.testing.assert_close(a.lora_B.grad, best, rtol=1e-5, atol=1e-7)


def test_an_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError):
        install(nn.Sequential(nn.Embedding(10, 8)), lp.LoRAFA(rank=2, targets="0"))


def test_preconditioning_a_grouped_convolution_is_refused() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    with pytest.raises(UnsupportedLayerError, match="grouped"):
        install(grouped, lp.LoRAFA(rank=2, targets="0", precondition=True))
    install(grouped, lp.LoRAFA(rank=2, targets="0"))
