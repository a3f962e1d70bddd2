"""DyLoRA, arXiv 2210.07558: a random rank in every step, nested ranks afterwards."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError, UnsupportedLayerError
from tests.backbones import MLP
from tests.papers.toys import X, check_dense, install, mlp, randomize, train


def adapted(rank: int = 4, **options: Any) -> tuple[MLP, lp.Handle]:
    model = mlp()
    return model, install(model, lp.DyLoRA(rank=rank, alpha=8.0, targets="all-linear", **options))


def drawn(handle: lp.Handle) -> list[int]:
    return [e.adapter.trained_rank for e in handle.entries]


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
@pytest.mark.parametrize("stabilized", [False, True])
def test_every_rank_is_a_lora_of_it(rank: int, stabilized: bool) -> None:
    model, handle = adapted(rank_stabilized=stabilized)
    randomize(handle)
    lp.DyLoRA.use_rank(handle, rank)
    model.eval()
    scaling = 8 / rank**0.5 if stabilized else 8 / rank

    def cut(a: Any, W: Tensor) -> Tensor:
        return W + scaling * a.lora_B[:, :rank] @ a.lora_A[:rank]

    assert all(torch.linalg.matrix_rank(e.adapter.delta()) == rank for e in handle.entries)
    check_dense(model, handle, cut)
    lora = mlp()
    other = install(lora, lp.LoRA(rank=rank, alpha=8.0, rank_stabilized=stabilized, targets="all-linear"))
    state = {k: v[:rank] if k.endswith("A") else v[:, :rank] for k, v in handle.state_dict().items()}
    other.load_state_dict(state)
    torch.testing.assert_close(lora(X), model(X))


def test_without_a_schedule_it_is_lora() -> None:
    model, handle = adapted()
    plain = mlp()
    lora = install(plain, lp.LoRA(rank=4, alpha=8.0, targets="all-linear"))
    assert handle.num_trainable() == lora.num_trainable() == 704
    assert all(torch.equal(v, lora.state_dict()[k]) for k, v in handle.state_dict().items())
    assert torch.equal(model(X), mlp()(X))
    randomize(handle)
    lora.load_state_dict(handle.state_dict())
    assert torch.equal(model(X), plain(X))


@pytest.mark.parametrize("frozen", [False, True])
def test_only_the_rows_of_the_drawn_rank_learn(frozen: bool) -> None:
    model, handle = adapted(frozen=frozen)
    randomize(handle)
    for e in handle.entries:
        e.adapter.trained_rank = 3
    model.train()
    model(X).square().mean().backward()
    for e in handle.entries:
        rows = e.adapter.lora_A.grad.abs().amax(1) > 0
        assert rows.tolist() == ([False, False, True, False] if frozen else [True, True, True, False])
        assert torch.equal(e.adapter.lora_B.grad.abs().amax(0) > 0, rows)
    expected = model(X).detach()
    lp.DyLoRA.use_rank(handle, 3)
    torch.testing.assert_close(model.eval()(X), expected)


def test_ranks_are_drawn_uniformly_once_a_step_and_equally_in_all_layers() -> None:
    _, handle = adapted(rank_per_target={"l2": 2})
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(2000)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(2000):
        seen[tuple(drawn(handle))] += 1
        schedule.after_step(None)
    assert set(seen) == {(1, 1), (2, 1), (3, 2), (4, 2)}
    assert all(400 < count < 600 for count in seen.values())


def test_two_processes_with_one_seed_draw_the_same_and_the_global_state_is_untouched() -> None:
    state = torch.get_rng_state()

    def run() -> list[int]:
        _, handle = adapted(rank=8)
        schedule = handle.strategy.schedule(handle)
        schedule.on_start(20)
        found = []
        for _ in range(20):
            found += drawn(handle)
            schedule.after_step(None)
        return found

    first = run()
    torch.manual_seed(99)
    _ = torch.rand(5)
    assert run() == first
    assert len(set(first)) > 3
    torch.set_rng_state(state)


def test_a_skipped_step_keeps_its_rank_and_a_resumed_run_goes_on() -> None:
    _, handle = adapted(rank=8)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(20)
    ranks = []
    for _ in range(12):
        ranks.append(drawn(handle))
        schedule.after_step(None, skipped=True)
        assert drawn(handle) == ranks[-1]
        schedule.after_step(None)
        if len(ranks) == 6:
            saved = copy.deepcopy(schedule.state_dict())
    torch.manual_seed(55)  # another seed than the first run had
    model = mlp()
    other = lp.inject(model, lp.DyLoRA(rank=8, alpha=8.0, targets="all-linear"))
    resumed = other.strategy.schedule(other)
    resumed.on_start(20)
    resumed.load_state_dict(saved)
    for expected in ranks[6:]:
        assert drawn(other) == expected
        resumed.after_step(None)


def test_training_orders_the_ranks_by_use() -> None:
    model, handle = adapted()
    goal = torch.randn(5, 64, dtype=X.dtype, generator=torch.Generator().manual_seed(4))
    losses = []
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=2e-2)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(150)
    start = float((mlp()(X) - goal).square().mean().detach())
    for _ in range(150):
        (model.train()(X) - goal).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
    model.eval()
    for rank in (1, 2, 3, 4):
        lp.DyLoRA.use_rank(handle, rank)
        losses.append(float((model(X) - goal).square().mean().detach()))
    assert all(loss < 0.8 * start for loss in losses), (start, losses)
    # A LoRA trained at rank 4 only is worse when cut to rank 1.
    plain = mlp()
    lora = install(plain, lp.LoRA(rank=4, alpha=8.0, targets="all-linear"))
    optimizer = torch.optim.AdamW(lora.trainable_parameters(), lr=2e-2)
    for _ in range(150):
        (plain(X) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.load_state_dict(lora.state_dict())
    lp.DyLoRA.use_rank(handle, 1)
    assert float((model(X) - goal).square().mean().detach()) > losses[0]


def test_use_rank_refuses_what_there_is_not() -> None:
    model, handle = adapted()
    for rank in (0, 5):
        with pytest.raises(ConfigError, match="from 1 to 4"):
            lp.DyLoRA.use_rank(handle, rank)
    handle.merge()
    with pytest.raises(MergeError, match="unmerge"):
        lp.DyLoRA.use_rank(handle, 2)
    handle.remove()
    with pytest.raises(ConfigError, match="rank"):
        lp.DyLoRA.use_rank(install(model, lp.LoRA(rank=2, targets="l1"), "other"), 1)


def test_dropout_acts_in_training_only() -> None:
    model, handle = adapted(dropout=0.5)
    randomize(handle)
    assert torch.equal(model.eval()(X), model(X))
    assert not torch.equal(model.train()(X), model(X))
    train(model, handle, 2)


def test_what_cannot_be_nested_is_refused() -> None:
    with pytest.raises(ConfigError, match="init"):
        lp.DyLoRA(init="pissa")
    with pytest.raises(UnsupportedLayerError, match="grouped"):
        install(nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), lp.DyLoRA(rank=2, targets="0"))
