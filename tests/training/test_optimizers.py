from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import lr_scheduler as schedulers

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnknownMethodError
from lightning_peft.training.optimizers import reach, split_groups
from tests.training.toys import Plain, adapter_state, callback, loader, registered, same, trainer


def parameters(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


class TestReach:
    def test_frozen_out_and_missing_in_by_identity(self) -> None:
        frozen, kept, new, foreign = parameters(4)  # equal values, so that a comparison of values would mix them up
        frozen.requires_grad_(False)
        foreign.requires_grad_(False)  # the user's own business: not below the adapted root
        optimizer = torch.optim.AdamW([{"params": [frozen, kept]}, {"params": [frozen.clone().detach(), foreign]}])
        groups = [g["params"] for g in optimizer.param_groups]
        assert reach([optimizer], [frozen, kept], [kept, new]) == 1
        assert [id(p) for p in groups[0]] == [id(kept), id(new)]
        assert groups[1][-1] is foreign
        assert optimizer.param_groups[0]["params"] is groups[0]  # the same list: LBFGS and others hold on to it
        assert reach([optimizer], [frozen, kept], [kept, new]) == 0

    def test_present_in_a_second_optimizer_is_present(self) -> None:
        one, two = parameters(2)
        optimizers = [torch.optim.SGD([p], lr=0.1) for p in (one, two)]
        assert reach(optimizers, [], [one, two]) == 0

    def test_emptied_group_stays(self) -> None:
        base, new = parameters(2)
        base.requires_grad_(False)
        optimizer = torch.optim.AdamW([{"params": [base]}, {"params": [new]}])
        scheduler = schedulers.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5])
        reach([optimizer], [base], [new])
        assert [len(g["params"]) for g in optimizer.param_groups] == [0, 1]
        new.sum().backward()
        optimizer.step()
        scheduler.step()

    def test_no_optimizer_is_an_error(self) -> None:
        with pytest.raises(ConfigError, match="no optimizer"):
            reach([], [], parameters(1))


@dataclass
class Config:
    """Lightning's LRSchedulerConfig, as far as it is read."""

    scheduler: Any


SCHEDULERS = [
    lambda o: schedulers.StepLR(o, 2),
    lambda o: schedulers.MultiStepLR(o, [1, 3]),
    lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    lambda o: schedulers.LinearLR(o, 0.1, total_iters=3),
    lambda o: schedulers.ConstantLR(o, 0.5, total_iters=2),
    lambda o: schedulers.ExponentialLR(o, 0.5),
    lambda o: schedulers.CosineAnnealingLR(o, 4),
    lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2),
    lambda o: schedulers.PolynomialLR(o, 4),
    lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.CosineAnnealingLR(o, 3)], milestones=[2]
    ),
    lambda o: schedulers.ChainedScheduler([schedulers.LinearLR(o, 0.1, total_iters=2), schedulers.ExponentialLR(o, 0.5)]),
]


class TestSplit:
    @pytest.mark.parametrize("make", SCHEDULERS)
    def test_late_groups_follow_the_scheduler_like_groups_made_in_time(self, make: Any) -> None:
        one, two, three = parameters(3)
        late = torch.optim.AdamW([one, two, three], lr=0.1)
        scheduler = make(late)
        split_groups([late], [Config(scheduler)], [(two, {"lr_scale": 16.0}), (three, {"weight_decay": 0.0}), (one, {})])
        early = torch.optim.AdamW(
            [{"params": [one]}, {"params": [two], "lr": 1.6}, {"params": [three], "weight_decay": 0.0}], lr=0.1
        )
        reference = make(early)
        assert [[id(p) for p in g["params"]] for g in late.param_groups] == [[id(one)], [id(two)], [id(three)]]
        assert [g["weight_decay"] for g in late.param_groups] == [g["weight_decay"] for g in early.param_groups]
        for _ in range(6):
            assert [g["lr"] for g in late.param_groups] == pytest.approx([g["lr"] for g in early.param_groups])
            assert scheduler.get_last_lr() == pytest.approx(reference.get_last_lr())
            for optimizer, schedule in ((late, scheduler), (early, reference)):
                optimizer.step()
                schedule.step()

    def test_plateau(self) -> None:
        one, two = parameters(2)
        optimizer = torch.optim.SGD([one, two], lr=1.0)
        scheduler = schedulers.ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=0.4)
        split_groups([optimizer], [Config(scheduler)], [(two, {"lr_scale": 2.0})])
        for _ in range(4):
            scheduler.step(1.0)
        assert [g["lr"] for g in optimizer.param_groups] == [0.4, 0.8]

    def test_second_call_changes_nothing_and_states_load(self) -> None:
        one, two = parameters(2)
        options = [(two, {"lr_scale": 2.0})]
        optimizer = torch.optim.AdamW([one, two], lr=0.1)
        split_groups([optimizer], [], options)
        before = copy.deepcopy(optimizer.state_dict())
        split_groups([optimizer], [], options)
        assert optimizer.state_dict() == before
        fresh = torch.optim.AdamW([one, two], lr=0.1)
        split_groups([fresh], [], options)
        fresh.load_state_dict(before)

    def test_scheduler_that_cannot_be_split_is_named(self) -> None:
        one, two = parameters(2)
        optimizer = torch.optim.AdamW([one, two], lr=0.1)
        scheduler = schedulers.OneCycleLR(optimizer, 0.1, total_steps=4)
        with pytest.raises(ConfigError, match="OneCycleLR cannot take more groups"):
            split_groups([optimizer], [Config(scheduler)], [(two, {"lr_scale": 2.0})])
        split_groups([optimizer], [Config(scheduler)], [(two, {})])

    def test_unknown_option_is_an_error(self) -> None:
        one, two = parameters(2)
        with pytest.raises(ConfigError, match="lr_scle"):
            split_groups([torch.optim.SGD([one, two], lr=0.1)], [], [(two, {"lr_scle": 2.0})])


@dataclass(frozen=True, kw_only=True)
class FastB(lp.LoRA):
    """LoRA+ in one line: B learns faster, without decay."""

    def group_options(self, slot: Any) -> dict[str, float]:
        return {"lr_scale": 16.0, "weight_decay": 0.0} if slot.attribute == "lora_B" else {}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_callback_splits_the_users_groups_and_resumes(tmp_path: Path) -> None:
    def fit(folder: Path, path: Any = None) -> Any:
        torch.manual_seed(0)
        module, keep = Plain(), ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
        run = trainer(folder, callback(FastB(rank=2, targets=["0", "3"])), keep, enable_checkpointing=True, max_epochs=2)
        run.fit(module, loader(), ckpt_path=path)
        return module, run

    with registered(FastB):
        module, run = fit(tmp_path / "a")
        twin, _ = fit(tmp_path / "b", tmp_path / "a" / "epoch=0.ckpt")
    slow, fast = run.optimizers[0].param_groups
    assert (fast["lr"], fast["weight_decay"]) == (pytest.approx(16 * slow["lr"]), 0.0)
    assert [tuple(p.shape) for p in fast["params"]] == [(16, 2), (2, 2)]
    assert same(adapter_state(module), adapter_state(twin))


def test_strategy_that_is_not_registered_is_refused_at_once() -> None:
    with pytest.raises(UnknownMethodError, match="FastB"):
        callback(FastB(rank=2))
