"""LoRA+, arXiv 2402.12354: another learning rate for B, through parameter groups."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.training.optimizers import split_groups
from lightning_peft.training.param_groups import parameter_groups, set_rates
from tests.papers.toys import D, X, install, mlp


def optimizer_of(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.01), lr=lr)
    set_rates(optimizer, lr)
    return optimizer


def steps(strategy: lp.PEFTStrategy, count: int) -> list[dict[str, torch.Tensor]]:
    model = mlp()
    handle = install(model, strategy)
    optimizer = optimizer_of(model)
    seen = [copy.deepcopy(handle.state_dict())]
    for _ in range(count):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(copy.deepcopy(handle.state_dict()))
    return seen


OPTIONS: dict[str, Any] = dict(rank=4, alpha=8.0, targets="all-linear")


def test_with_ratio_1_it_is_lora_bit_for_bit() -> None:
    ours, lora = steps(lp.LoRAPlus(ratio=1.0, **OPTIONS), 5), steps(lp.LoRA(**OPTIONS), 5)
    for mine, theirs in zip(ours, lora, strict=True):
        assert all(torch.equal(mine[k], v) for k, v in theirs.items())


def test_the_first_step_of_B_is_ratio_times_that_of_lora_and_A_the_same() -> None:
    ours, lora = steps(lp.LoRAPlus(ratio=16.0, **OPTIONS), 1), steps(lp.LoRA(**OPTIONS), 1)
    for key in lora[0]:
        mine, theirs = ours[1][key] - ours[0][key], lora[1][key] - lora[0][key]
        torch.testing.assert_close(mine, theirs * (16 if key.endswith("lora_B") else 1), rtol=1e-6, atol=1e-9)
    assert any((lora[1][k] != lora[0][k]).any() for k in lora[0] if k.endswith("lora_B"))


def test_groups_are_those_of_hf_peft() -> None:
    import peft

    model = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=["l1", "l2"]))
    from peft.optimizers import create_loraplus_optimizer

    wanted = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16.0)
    names = {id(p): n for n, p in theirs.named_parameters()}
    expected = {
        names[id(p)].removeprefix("base_model.model.").replace(".default.weight", ""): group["lr"]
        for group in wanted.param_groups
        for p in group["params"]
    }
    handle = install(model, lp.LoRAPlus(ratio=16.0, **OPTIONS))
    optimizer = optimizer_of(model, 1e-4)
    keys = {id(s.tensor()): s.key for s in handle.trainable_slots()}
    found = {keys[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert found == pytest.approx(expected)
    assert len(found) == 4


def test_a_users_own_optimizer_is_split() -> None:
    model = mlp()
    handle = install(model, lp.LoRAPlus(ratio=8.0, **OPTIONS))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-3)
    split_groups([optimizer], [], [(s.tensor(), handle.strategy.group_options(s)) for s in handle.trainable_slots()])  # type: ignore[misc]
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for slot in handle.trainable_slots():
        assert rates[id(slot.tensor())] == pytest.approx(8e-3 if slot.attribute == "lora_B" else 1e-3)


def test_an_embedding_and_biases_keep_the_plain_rate() -> None:
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)).to(D)
    handle = install(model, lp.LoRAPlus(rank=2, targets=["0", "1"], bias="adapted"))
    options = {s.key: handle.strategy.group_options(s) for s in handle.trainable_slots()}
    assert {k for k, v in options.items() if v} == {"1.lora_B"}


def test_inside_a_composition() -> None:
    handle = install(mlp(), lp.Compose(parts=(lp.LoRAPlus(rank=2, targets="l1", ratio=4.0), lp.LoRA(rank=2, targets="l2"))))
    options = {s.key: handle.strategy.group_options(s) for s in handle.trainable_slots()}
    assert {k: v for k, v in options.items() if v} == {"l1.0.lora_B": {"lr_scale": 4.0}}


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf")])
def test_a_wrong_ratio_names_itself(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        lp.LoRAPlus(ratio=ratio)
