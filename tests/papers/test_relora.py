"""ReLoRA, arXiv 2307.05695, and ReMoRA, arXiv 2405.12130: rounds that add up beside the weight, and an optimizer that forgets."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.strategies.reparameterized.relora import Restarts
from tests.backbones import MLP
from tests.papers.test_mora import reference
from tests.papers.toys import D, X, check_dense, install, mlp, randomize, shapes, train

METHODS: dict[str, lp.PEFTStrategy] = {
    "relora": lp.ReLoRA(rank=3, alpha=6.0, rounds=3, targets="all-linear"),
    "remora": lp.ReMoRA(rank=4, rounds=3, targets="all-linear", mora_types=(1, 2)),
}
BOTH = pytest.mark.parametrize("name", METHODS)


def started(name: str, total: int = 12, **changes: Any) -> tuple[MLP, lp.Handle, Restarts, torch.optim.AdamW]:
    model = mlp()
    strategy = lp.resolve({**METHODS[name].to_dict(), "init_args": {**METHODS[name].to_dict()["init_args"], **changes}})
    handle = install(model, strategy)
    schedule = strategy.schedule(handle)
    assert isinstance(schedule, Restarts)
    schedule.on_start(total)
    return model, handle, schedule, torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)


def step(model: nn.Module, schedule: Restarts, optimizer: torch.optim.Optimizer) -> None:
    model(X).square().mean().backward()
    schedule.before_step(optimizer)
    optimizer.step()
    schedule.after_step(optimizer)
    optimizer.zero_grad()


def deltas(handle: lp.Handle) -> list[Tensor]:
    return [e.adapter.delta().detach() for e in handle.entries]


@BOTH
def test_a_restart_leaves_the_function_and_begins_anew(name: str) -> None:
    model, handle, schedule, optimizer = started(name)
    plain = mlp()
    initial = {k: v.clone() for k, v in handle.state_dict().items()}
    for done in range(1, 13):
        step(model, schedule, optimizer)
        if done in (4, 8):  # rounds of 4 steps
            assert not optimizer.state
            assert all(not e.adapter.delta().isnan().any() for e in handle.entries)
            live = handle.state_dict()
            last = [k for k in live if k.endswith(("lora_B", "mora_M"))]
            assert all(live[k].abs().max() == 0 for k in last)
            drawn = [k for k in live if k.endswith("lora_A")]
            assert all(not torch.equal(live[k], initial[k]) and live[k].std() > 0.5 * initial[k].std() for k in drawn)
        else:
            assert len(optimizer.state) == len(handle.trainable_parameters())
    for path, weight in plain.state_dict().items():
        assert torch.equal(model.state_dict()[path], weight), "the base never moves"
    with handle.disabled():
        assert torch.equal(model(X), plain(X))


@BOTH
def test_rounds_add_up(name: str) -> None:
    model, handle, schedule, optimizer = started(name)
    gained, before = [], [torch.zeros_like(d) for d in deltas(handle)]
    for done in range(1, 13):
        model(X).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        now, expected = deltas(handle), model(X).detach()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
        if done in (4, 8):
            for a, b in zip(deltas(handle), now, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
            torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-13)
        if done in (4, 8, 12):
            gained.append([n - b for n, b in zip(now, before, strict=True)])
            before = now
    for layer in range(2):
        ranks = [int(torch.linalg.matrix_rank(g[layer], rtol=1e-9)) for g in gained]
        total = int(torch.linalg.matrix_rank(deltas(handle)[layer], rtol=1e-9))
        if name == "relora":
            assert ranks == [3, 3, 3]
            assert total == 9
        else:
            side = (18, 20)[layer]
            assert ranks == [side] * 3
            assert total > side, "one type alone never goes beyond the side of its matrix"


def test_relora_is_the_sum_of_its_rounds() -> None:
    model, handle, schedule, optimizer = started("relora")
    assert shapes(handle) == {
        "l1.lora_A": (3, 48), "l1.lora_B": (32, 3), "l1.finished_A": (6, 48), "l1.finished_B": (32, 6),
        "l2.lora_A": (3, 32), "l2.lora_B": (64, 3), "l2.finished_A": (6, 32), "l2.finished_B": (64, 6),
    }  # fmt: skip
    assert handle.num_trainable() == 3 * (48 + 32) + 3 * (32 + 64)
    for _ in range(10):
        step(model, schedule, optimizer)
    randomize(handle)

    def changed(a: Any, W: Tensor) -> Tensor:
        rounds = [a.finished_B[:, i : i + 3] @ a.finished_A[i : i + 3] for i in (0, 3)]
        assert all(r.abs().max() > 0 for r in rounds)
        return W + 2.0 * (a.lora_B @ a.lora_A + sum(rounds))

    check_dense(model, handle, changed)


def test_remora_is_the_sum_of_its_rounds() -> None:
    model, handle, schedule, optimizer = started("remora", mora_types=[2, 6, 1])
    assert shapes(handle)["l1.finished"] == (3, 18, 18)
    assert handle.num_trainable() == 18**2 + 20**2
    for _ in range(10):
        step(model, schedule, optimizer)
    randomize(handle)
    assert all(e.adapter.active.tolist() == [0, 0, 1] for e in handle.entries)

    def changed(a: Any, W: Tensor) -> Tensor:
        one, two, three = a.finished
        assert all(m.abs().max() > 0 for m in (one, two))
        return W + reference(one, *W.shape, 2) + reference(two, *W.shape, 6) + reference(three + a.mora_M, *W.shape, 1)

    check_dense(model, handle, changed)


@pytest.mark.parametrize(
    ("total", "rounds", "restarts"), [(12, 3, [4, 8]), (10, 3, [4, 7]), (7, 7, [1, 2, 3, 4, 5, 6]), (100, 4, [25, 50, 75])]
)
def test_when_rounds_end(total: int, rounds: int, restarts: list[int]) -> None:
    _, _, schedule, _ = started("relora", total, rounds=rounds, warmup=0)
    assert [s for s in range(1, total + 20) if schedule.round_at(s) > schedule.round_at(s - 1)] == restarts


def test_updates_grow_after_a_restart_as_with_a_smaller_learning_rate() -> None:
    model, handle, schedule, optimizer = started("relora", rounds=2, warmup=3)
    assert [schedule.pace(s) for s in range(12)] == [1] * 6 + [0.25, 0.5, 0.75] + [1] * 3
    for _ in range(6):
        step(model, schedule, optimizer)
    twin = copy.deepcopy(model)
    (copied,) = lp.handles(twin).values()
    by_rate = torch.optim.AdamW(copied.trainable_parameters(), lr=1e-2)
    for rate in (0.25, 0.5, 0.75, 1, 1):
        step(model, schedule, optimizer)
        by_rate.param_groups[0]["lr"] = 1e-2 * rate
        twin(X).square().mean().backward()
        by_rate.step()
        by_rate.zero_grad()
    for mine, theirs in zip(handle.trainable_parameters(), copied.trainable_parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_only_the_adapters_are_forgotten_and_slowed() -> None:
    model, handle, schedule, _ = started("relora", rounds=2, warmup=2, bias="adapted")
    head = nn.Parameter(torch.ones(64, dtype=D))
    optimizer = torch.optim.SGD([*handle.trainable_parameters(), head], lr=1e-2, momentum=0.9)
    for done in range(1, 9):
        (model(X) * head).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        if done == 6:
            kept = {id(p) for p in optimizer.state}
            assert kept == {id(head), id(model.l1.bias)}
        optimizer.zero_grad()


@BOTH
@pytest.mark.parametrize("stop", [3, 4, 6, 9])
def test_a_resumed_run_goes_on_exactly(name: str, stop: int) -> None:
    model, _, schedule, optimizer = started(name, warmup=3)
    for _ in range(12):
        step(model, schedule, optimizer)
    first, handle, schedule, optimizer = started(name, warmup=3)
    for _ in range(stop):
        step(first, schedule, optimizer)
    saved = copy.deepcopy((handle.state_dict(), schedule.state_dict(), optimizer.state_dict()))
    second, handle, schedule, optimizer = started(name, warmup=3)
    handle.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    for _ in range(12 - stop):
        step(second, schedule, optimizer)
    assert torch.equal(second(X), model(X))


@BOTH
def test_finished_rounds_are_in_the_file(name: str, tmp_path: Path) -> None:
    model, handle, schedule, optimizer = started(name)
    for _ in range(6):
        step(model, schedule, optimizer)
    lp.save_adapter(handle, tmp_path / "a")
    fresh = mlp()
    lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))


@pytest.mark.parametrize(("total", "changes"), [(2, {}), (12, {"warmup": 4}), (12, {"rounds": 13})])
def test_a_run_too_short_for_its_rounds_is_refused(total: int, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rounds"):
        started("relora", total, **changes)


def test_a_restart_without_the_optimizer_is_refused() -> None:
    model, _, schedule, optimizer = started("relora", warmup=0)
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        schedule.after_step(None)
    with pytest.raises(ConfigError, match="optimizer"):
        schedule.after_step(None)


def test_a_skipped_step_does_not_count() -> None:
    model, handle, schedule, optimizer = started("relora", rounds=2, warmup=3)
    for _ in range(6):
        step(model, schedule, optimizer)
    before = copy.deepcopy(handle.state_dict())
    schedule.before_step(optimizer)
    schedule.after_step(optimizer, skipped=True)
    assert schedule.step == 6
    assert all(torch.equal(v, before[k]) for k, v in handle.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "options", "match"),
    [
        (lp.ReLoRA, {"rounds": 1}, "rounds"),
        (lp.ReLoRA, {"warmup": -1}, "warmup"),
        (lp.ReLoRA, {"init": "pissa"}, "init"),
        (lp.ReMoRA, {"mora_types": []}, "mora_types"),
        (lp.ReMoRA, {"mora_types": [1, 1]}, "mora_types"),
        (lp.ReMoRA, {"mora_types": [5]}, "mora_types"),
    ],
)
def test_wrong_options_name_themselves(cls: type[lp.PEFTStrategy], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        cls(**options)


def test_a_grouped_convolution_is_refused_by_relora() -> None:
    with pytest.raises(UnsupportedLayerError, match="grouped"):
        install(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lp.ReLoRA(rank=2, targets="0"))


@BOTH
def test_a_quantized_base_keeps_every_code(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    lp.quantize(model, {"scheme": "nf4", "backend": "torch"})
    x = torch.randn(4, 64)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    strategy = lp.resolve({**METHODS[name].to_dict()})
    handle = install(model, strategy)
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    schedule = strategy.schedule(handle)
    schedule.on_start(6)
    for _ in range(6):
        model(x).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(int(torch.linalg.matrix_rank(d, rtol=1e-4)) > 3 for d in deltas(handle))


def test_training_helper_runs_a_whole_schedule() -> None:
    model = mlp()
    handle = install(model, METHODS["relora"])
    start = model(X).square().mean()
    train(model, handle, 30)
    assert model(X).square().mean() < start
