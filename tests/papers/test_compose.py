"""Compose: several strategies as one adapter; no method knows of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConflictError, MergeError
from lightning_peft.strategies.reparameterized.adalora import RankAllocation
from lightning_peft.strategies.schedule import Schedule
from tests.backbones import BACKBONES, run

D = torch.float64


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * 0.3)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_parts_nest_in_the_order_given(order: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parts = (lp.LoRA(rank=2, alpha=2.0, targets="0"), lp.HoulsbyAdapter(width=3, targets="0"))
    model = nn.Sequential(nn.Linear(6, 5)).to(D)
    handle = lp.inject(model, lp.Compose(parts=tuple(parts[i] for i in order)))
    randomize(handle)
    x = torch.randn(3, 6, dtype=D)
    y = F.linear(x, model[0].weight, model[0].bias)
    for entry in handle.entries:
        a = entry.adapter
        y = (
            y + x @ a.lora_A.T @ a.lora_B.T
            if hasattr(a, "lora_A")
            else y + F.gelu(y @ a.down.T + a.down_bias) @ a.up.T + a.up_bias
        )
    assert [e.label for e in handle.entries] == ["0", "1"]
    torch.testing.assert_close(model(x), y)


def test_a_composition_equals_the_parts_installed_one_after_the_other() -> None:
    backbone = BACKBONES["bert"]
    parts = (lp.LoRA(rank=2), lp.HoulsbyAdapter(width=3), lp.BitFit())
    together, apart = backbone.fresh(), backbone.fresh()
    whole = lp.inject(together, lp.Compose(parts=parts))
    singles = [lp.inject(apart, part, f"p{i}") for i, part in enumerate(parts)]
    randomize(whole)
    for i, single in enumerate(singles):
        theirs = whole.part(str(i)).slots
        assert len(theirs) == len(single.slots)
        for slot, other in zip(single.slots, theirs, strict=True):
            with torch.no_grad():
                slot.tensor().copy_(other.tensor())
    assert torch.equal(run(together, backbone.batch()), run(apart, backbone.batch()))
    assert whole.num_trainable() == sum(s.num_trainable() for s in singles)


def test_the_same_method_twice_on_one_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(D)
    handle = lp.inject(model, [lp.LoRA(rank=2, targets="0"), lp.LoRA(rank=3, targets="0")])
    assert sorted(handle.state_dict()) == ["0.0.lora_A", "0.0.lora_B", "0.1.lora_A", "0.1.lora_B"]
    randomize(handle)
    x = torch.randn(3, 6, dtype=D)
    expected = model(x).detach()
    handle.merge()
    torch.testing.assert_close(model(x), expected)


def test_compositions_nest() -> None:
    inner = lp.Compose(parts=(lp.LoRA(rank=2, targets="0"), lp.VeRA(rank=2, targets="0")))
    strategy = lp.Compose(parts=(inner, lp.VeRA(rank=3, targets="0")))
    model = nn.Sequential(nn.Linear(6, 5)).to(D)
    handle = lp.inject(model, strategy)
    assert [e.label for e in handle.entries] == ["0-0", "0-1", "1"]
    assert [e.label for e in handle.part("0").part("1").entries] == [""]
    assert handle.entries[1].adapter.projections is not handle.entries[2].adapter.projections
    randomize(handle)
    x = torch.randn(3, 6, dtype=D)
    out = model(x).detach()
    with handle.disabled():
        torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias))
    handle.merge()
    torch.testing.assert_close(model(x), out)
    assert lp.resolve(strategy.to_dict()) == strategy


def test_what_a_composition_promises_follows_from_its_parts() -> None:
    lora, bottleneck = lp.LoRA(targets="0"), lp.HoulsbyAdapter(targets="0", width=2)
    assert lp.Compose(parts=(lora, lp.BitFit())).mergeable
    assert not lp.Compose(parts=(lora, bottleneck)).mergeable
    assert lp.Compose(parts=(lora, bottleneck)).identity_at_init
    assert not lp.Compose(parts=(lora, lp.HoulsbyAdapter(targets="0", init="houlsby"))).identity_at_init


def test_one_part_that_cannot_merge_stops_the_merge_of_all() -> None:
    model = nn.Sequential(nn.Linear(6, 5)).to(D)
    handle = lp.inject(model, [lp.LoRA(rank=2, targets="0"), lp.HoulsbyAdapter(width=3, targets="0")])
    randomize(handle)
    weight = model[0].weight.detach().clone()
    with pytest.raises(MergeError, match="BottleneckAdapter"):
        handle.merge()
    assert torch.equal(model[0].weight, weight)
    assert not handle.merged


def test_a_schedule_sees_its_own_part_only() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(D)
    ada = lp.AdaLoRA(initial_rank=4, target_rank=1, warmup=1, final=2, targets="1")
    handle = lp.inject(model, [lp.LoRA(rank=2, targets="0"), ada])
    schedule = handle.strategy.schedule(handle)
    (_, own) = schedule.parts
    assert isinstance(own, RankAllocation)
    assert list(own.adapters.values()) == [handle.entries[1].adapter]
    schedule.on_start(8)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    for _ in range(8):
        (model(torch.randn(4, 6, dtype=D)).square().mean() + schedule.penalty()).backward()
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
    assert int((handle.entries[1].adapter.lora_E != 0).sum()) == 1
    again = handle.strategy.schedule(handle)
    again.load_state_dict(schedule.state_dict())
    assert again.state_dict()["1"]["step"] == 8


def test_group_options_come_from_the_part_that_owns_the_tensor() -> None:
    handle = lp.inject(nn.Sequential(nn.Linear(6, 6)), [lp.LoRA(rank=2, targets="0"), lp.BitFit()])
    for slot in handle.slots:
        assert handle.strategy.group_options(slot) == handle.strategy.strategies[int(slot.label)].group_options(slot)


def test_a_conflict_of_two_parts_comes_before_the_first_edit() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    with pytest.raises(ConflictError):
        lp.inject(model, [lp.LoRA(rank=2, targets="0", bias="adapted"), lp.BitFit()])
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("exact", [False, True])
def test_two_mergeable_parts_on_one_layer_merge_and_unmerge(exact: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    plain = net[0].weight.detach().clone()
    handle = lp.inject(net, [lp.LoRA(rank=2, targets="0"), lp.VeRA(rank=3, targets="0")])
    for parameter in handle.trainable_parameters():
        nn.init.normal_(parameter)
    expected = net(x)
    handle.merge(exact=exact)
    torch.testing.assert_close(net(x), expected)
    handle.unmerge()
    torch.testing.assert_close(net[0].weight, plain)
    torch.testing.assert_close(net(x), expected)


def test_what_may_rest_is_what_the_owning_part_says() -> None:
    handle = lp.inject(
        nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), [lp.LoRA(rank=2, targets="1"), lp.TokenRows(ids=(8,), targets="0")]
    )
    resting = {slot.attribute: handle.strategy.may_rest(slot) for slot in handle.trainable_slots()}
    assert resting == {"lora_A": False, "lora_B": False, "rows": True}


def test_parts_without_a_schedule_plan_nothing() -> None:
    handle = lp.inject(nn.Sequential(nn.Linear(6, 6)), [lp.LoRA(rank=2, targets="0"), lp.BitFit()])
    assert type(handle.strategy.schedule(handle)) is Schedule  # such a run may be endless
