"""AdaLoRA, arXiv 2303.10512: the budget, the scores, and HF peft's allocator on the same run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConfigError
from lightning_peft.strategies.reparameterized.adalora import RankAllocation
from tests.backbones import MLP

D = torch.float64


X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def adapted(**options: Any) -> tuple[MLP, lp.Handle]:
    torch.manual_seed(0)
    model = MLP().to(D)
    return model, lp.inject(model, lp.AdaLoRA(**{"initial_rank": 6, "target_rank": 2, "targets": "all-linear", **options}))


def allocation(handle: lp.Handle, total: int) -> RankAllocation:
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(total)
    return schedule


def kept(handle: lp.Handle) -> int:
    return sum(int((e.adapter.lora_E != 0).sum()) for e in handle.entries)


def test_count_and_equation() -> None:
    model, handle = adapted(alpha=12.0)
    assert handle.num_trainable() == 6 * (48 + 32) + 6 + 6 * (32 + 64) + 6 == 1068
    a = handle.entries[0].adapter
    assert a.lora_E.abs().max() == 0
    assert 0.015 < a.lora_A.std() < 0.025
    with torch.no_grad():
        a.lora_E.copy_(torch.randn(6, 1, dtype=D))
    delta = 12.0 / (6 + 1e-5) * a.lora_B @ torch.diag(a.lora_E[:, 0]) @ a.lora_A
    torch.testing.assert_close(a.delta(), delta)
    with torch.no_grad():
        torch.testing.assert_close(model.l1(X), nn.functional.linear(X, model.l1.weight + delta, model.l1.bias))
        a.lora_E[2:] = 0
    assert torch.linalg.matrix_rank(a.delta()) == 2


def test_budget_table() -> None:
    # methods.md K: b0 = 96, bT = 64, 10 warm-up and 20 final steps of 100.
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(12, 12) for _ in range(8)])
    handle = lp.inject(model, lp.AdaLoRA(initial_rank=12, target_rank=8, warmup=10, final=20, targets="all-linear"))
    schedule = allocation(handle, 100)
    steps = (0, 10, 11, 20, 40, 60, 80, 81, 100)
    assert [schedule.budget(t)[0] for t in steps] == [96, 96, 94, 84, 69, 64, 64, 64, 64]
    assert [schedule.budget(t)[1] for t in steps] == [False, False, True, True, True, True, True, True, True]
    fractions = lp.AdaLoRA(initial_rank=12, target_rank=8, warmup=0.1, final=0.2, targets="all-linear")
    same = RankAllocation(fractions, handle)
    same.on_start(100)
    assert [same.budget(t) for t in range(101)] == [schedule.budget(t) for t in range(101)]


def test_interval_allocates_at_its_multiples_and_at_the_end() -> None:
    _, handle = adapted(warmup=2, final=3, interval=4)
    schedule = allocation(handle, 20)
    assert [t for t in range(18) if schedule.budget(t)[1]] == [4, 8, 12, 16, 17]


def test_score_of_one_entry() -> None:
    # methods.md K: beta 0.85, (gradient, value) = (0.5, 2) then (-0.1, 1.9).
    _, handle = adapted()
    schedule = allocation(handle, 100)
    a, key = handle.entries[0].adapter, f"{handle.entries[0].key}.lora_E"
    for value, gradient, importance, uncertainty, score in (
        (2.0, 0.5, 0.15, 0.1275, 0.019125),
        (1.9, -0.1, 0.156, 0.113475, 0.0177021),
    ):
        for p in handle.trainable_parameters():
            p.grad = torch.zeros_like(p)
        with torch.no_grad():
            a.lora_E.fill_(value)
        a.lora_E.grad.fill_(gradient)
        schedule.after_step(None)
        assert schedule.importance[key][0, 0] == pytest.approx(importance)
        assert schedule.uncertainty[key][0, 0] == pytest.approx(uncertainty)
        assert schedule.scores()[handle.entries[0].key][0] == pytest.approx(score)


def test_penalty_is_the_mean_distance_from_orthogonality() -> None:
    _, handle = adapted(orthogonality=0.5)
    norms = []
    for entry in handle.entries:
        A, B = entry.adapter.lora_A, entry.adapter.lora_B
        norms += [(A @ A.T - torch.eye(6)).norm(), (B.T @ B - torch.eye(6)).norm()]
    torch.testing.assert_close(allocation(handle, 100).penalty(), 0.5 * torch.stack(norms).mean())
    _, without = adapted(orthogonality=0.0)
    assert allocation(without, 100).penalty() is None


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 48, generator=generator, dtype=D), torch.randn(8, 64, generator=generator, dtype=D)


def loop(model: nn.Module, handle: lp.Handle, schedule: RankAllocation, optimizer: Any, steps: range) -> list[int]:
    counts = []
    for step in steps:
        x, y = data(step)
        loss = (model(x) - y).square().mean()
        if (penalty := schedule.penalty()) is not None:
            loss = loss + penalty
        loss.backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
        counts.append(kept(handle))
    return counts


def test_the_budget_is_kept_during_training() -> None:
    model, handle = adapted(warmup=3, final=4)
    schedule = allocation(handle, 20)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    counts = loop(model, handle, schedule, optimizer, range(20))
    assert counts[:3] == [12, 12, 12]
    assert counts == [schedule.budget(t)[0] for t in range(1, 21)]
    assert counts[-5:] == [4] * 5


def test_the_ranks_stay_fixed_in_the_final_phase() -> None:
    model, handle = adapted(warmup=2, final=6)
    schedule = allocation(handle, 16)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    loop(model, handle, schedule, optimizer, range(10))
    chosen = [(e.adapter.lora_E != 0).clone() for e in handle.entries]
    values = [e.adapter.lora_E.detach().clone() for e in handle.entries]
    loop(model, handle, schedule, optimizer, range(10, 16))
    assert all(torch.equal(e.adapter.lora_E != 0, mask) for e, mask in zip(handle.entries, chosen, strict=True))
    assert any(not torch.equal(e.adapter.lora_E, old) for e, old in zip(handle.entries, values, strict=True))


@pytest.mark.parametrize("interval", [1, 3])
def test_the_run_is_hf_pefts_run(interval: int) -> None:
    import peft

    total, warmup, final = 24, 4, 6
    model, handle = adapted(alpha=12.0, warmup=warmup, final=final, interval=interval)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=2, lora_alpha=12, tinit=warmup, tfinal=final, deltaT=interval, total_step=total,
        target_modules=["l1", "l2"], orth_reg_weight=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = peft.get_peft_model(MLP(), config).to(D)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            for name in ("lora_A", "lora_B", "lora_E"):
                getattr(layer, name)["default"].copy_(getattr(entry.adapter, name))
    schedule = allocation(handle, total)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    their_optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, total + 1):
        x, y = data(step)
        loop(model, handle, schedule, optimizer, range(step, step + 1))
        loss = (theirs(x) - y).square().mean()
        norms = [
            (p @ p.T if "lora_A" in n else p.T @ p) - torch.eye(6, dtype=D)
            for n, p in theirs.named_parameters()
            if "lora_A" in n or "lora_B" in n
        ]
        loss = loss + 0.5 * torch.stack([m.norm() for m in norms]).mean()
        loss.backward()
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            for name in ("lora_A", "lora_B", "lora_E"):
                mine, other = getattr(entry.adapter, name).detach(), getattr(layer, name)["default"].detach()
                torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9, msg=lambda m, s=step, n=name: f"step {s}, {n}: {m}")
    assert kept(handle) == 4
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("stop", [3, 9, 15])
def test_an_interrupted_run_continues_exactly(stop: int) -> None:
    options = dict(warmup=2, final=5)
    model, handle = adapted(**options)
    schedule = allocation(handle, 18)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    whole = loop(model, handle, schedule, optimizer, range(18))

    first, first_handle = adapted(**options)
    first_schedule = allocation(first_handle, 18)
    first_optimizer = torch.optim.AdamW(first_handle.trainable_parameters(), lr=1e-2)
    counts = loop(first, first_handle, first_schedule, first_optimizer, range(stop))
    saved = copy.deepcopy((first_handle.state_dict(), first_schedule.state_dict(), first_optimizer.state_dict()))

    second, second_handle = adapted(**options)
    second_schedule = allocation(second_handle, 18)
    second_optimizer = torch.optim.AdamW(second_handle.trainable_parameters(), lr=1e-2)
    second_handle.load_state_dict(saved[0])
    second_schedule.load_state_dict(saved[1])
    second_optimizer.load_state_dict(saved[2])
    counts += loop(second, second_handle, second_schedule, second_optimizer, range(stop, 18))
    assert counts == whole
    assert all(torch.equal(v, second_handle.state_dict()[k]) for k, v in handle.state_dict().items())


def test_a_saved_schedule_is_not_changed_by_further_training() -> None:
    model, handle = adapted(warmup=2, final=5)
    schedule = allocation(handle, 18)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    loop(model, handle, schedule, optimizer, range(4))
    saved = schedule.state_dict()
    before = copy.deepcopy(saved)
    loop(model, handle, schedule, optimizer, range(4, 8))
    assert all(torch.equal(saved["importance"][k], v) for k, v in before["importance"].items())
    assert saved["step"] == before["step"] == 4


def test_a_skipped_step_does_not_count() -> None:
    model, handle = adapted()
    schedule = allocation(handle, 100)
    model(X).square().mean().backward()
    schedule.after_step(None, skipped=True)
    assert schedule.step == 0
    assert schedule.importance == {}


def test_a_schedule_of_another_model_is_refused() -> None:
    _, handle = adapted()
    schedule = allocation(handle, 100)
    state = {"step": 1, "total_steps": 100, "importance": {"elsewhere.lora_A": torch.zeros(1)}, "uncertainty": {}}
    with pytest.raises(CompatibilityError, match="elsewhere"):
        schedule.load_state_dict(state)
    assert schedule.step == 0


def test_a_run_too_short_for_its_phases_is_refused() -> None:
    _, handle = adapted(warmup=6, final=4)
    with pytest.raises(ConfigError, match="no step of 10"):
        allocation(handle, 10)
    allocation(handle, 11)


def test_a_convolution_equals_its_dense_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1)).to(D)
    plain = copy.deepcopy(model)
    handle = lp.inject(model, lp.AdaLoRA(initial_rank=3, target_rank=1, targets="0"))
    a = handle.entries[0].adapter
    with torch.no_grad():
        a.lora_E.copy_(torch.randn(3, 1, dtype=D))
        plain[0].weight += (a.scaling * a.lora_B @ (a.lora_E * a.lora_A)).reshape(6, 4, 3, 3)
        x = torch.randn(2, 4, 8, 8, dtype=D)
        torch.testing.assert_close(model(x), plain(x))


def _loop(schedule: RankAllocation, handle: lp.Handle, model: nn.Module, *, told: bool) -> None:
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), 1e-2)
    for _ in range(10):
        model(X).square().mean().backward()
        if told:
            schedule.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        schedule.after_step(optimizer)


def test_a_loop_that_drops_gradients_before_after_step_still_allocates() -> None:
    model, handle = adapted()
    _loop(allocation(handle, 10), handle, model, told=True)
    assert kept(handle) == 2 * 2
    model, handle = adapted()
    with pytest.raises(ConfigError, match="before_step"):
        _loop(allocation(handle, 10), handle, model, told=False)
