"""Diff pruning, arXiv 2012.07463: hard-concrete gates, their penalty, and the three stages of a run."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, MergeError
from lightning_peft.nn.hard_concrete import CLOSED, HIGH, LOW, OPEN, GatedDifference, gate, open_probability
from lightning_peft.strategies.schedule import Schedule
from tests.backbones import BACKBONES, flat, loss_of, run
from tests.papers.toys import D, X, install, mlp, randomize

ENTRIES = 48 * 32 + 32 + 32 * 64
Y = torch.randn(5, 64, dtype=D, generator=torch.Generator().manual_seed(2))
BOTH = pytest.mark.parametrize("structured", [False, True], ids=["plain", "structured"])


def strategy(**more: Any) -> lp.DiffPruning:
    return lp.DiffPruning(**{"share": 0.05, **more})


def adapters(handle: lp.Handle) -> list[GatedDifference]:
    return [entry.adapter for entry in handle.entries]


@pytest.mark.parametrize(
    ("alpha", "u", "z", "probability", "fixed"),
    [(5, 0.3, 1.0, 0.993307, 1.0), (0.5, 0.3, 0.0, 0.622459, 0.367378), (-1, 0.9, 0.804092, 0.268941, 0.0)],
)
def test_golden_vectors(alpha: float, u: float, z: float, probability: float, fixed: float) -> None:
    a = torch.tensor(float(alpha), dtype=D)
    assert abs(float(gate(a, torch.tensor(u, dtype=D))) - z) < 1e-6
    assert abs(float(open_probability(a)) - probability) < 1e-6
    assert abs(float(gate(a)) - fixed) < 1e-6


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 0.7, 3.0])
def test_gates_are_open_as_often_as_the_penalty_says(alpha: float) -> None:
    u = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=D)
    z = gate(torch.full_like(u, alpha), u)
    assert abs(float((z > 0).double().mean()) - float(open_probability(torch.tensor(alpha)))) < 5e-3
    assert ((z >= 0) & (z <= 1)).all()


def test_gradients_are_those_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(3)
    alpha, w, g, u = (torch.randn(400, generator=generator, dtype=D) for _ in range(4))
    u, alpha_group = torch.sigmoid(u), torch.tensor([0.2], dtype=D)
    u_group = torch.tensor([0.6], dtype=D)
    for t in (alpha, w, alpha_group):
        t.requires_grad_(True)
    z, z_group = gate(alpha, u), gate(alpha_group, u_group)
    (z_group * z * w * g).sum().backward()

    def by_hand(a: Tensor, u: Tensor, of_z: Tensor) -> Tensor:
        s = torch.sigmoid(u.log() - (1 - u).log() + a)
        stretched = s * (HIGH - LOW) + LOW
        return of_z * ((stretched > 0) & (stretched < 1)) * (HIGH - LOW) * s * (1 - s)

    with torch.no_grad():
        torch.testing.assert_close(w.grad, z_group * z * g)
        torch.testing.assert_close(alpha.grad, by_hand(alpha, u, z_group * w * g))
        torch.testing.assert_close(alpha_group.grad, by_hand(alpha_group, u_group, (z * w * g).sum()))


def test_saturated_gates_are_exact_whatever_the_noise() -> None:
    u = torch.cat([torch.rand(10_000), torch.tensor([0.0, 1.0])])
    for dtype in (torch.float32, D):
        for alpha, value in ((OPEN, 1.0), (CLOSED, 0.0)):
            a = torch.full(u.shape, alpha, dtype=dtype)
            assert (gate(a, u.to(dtype)) == value).all()
            assert (gate(a) == value).all()


@BOTH
def test_count_start_and_penalty(structured: bool) -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, strategy(structured=structured, penalty=1e-3))
    assert handle.num_trainable() == 2 * ENTRIES + (3 if structured else 0)
    model.train()
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(10)
    assert torch.equal(model(X), plain), "w = 0 is the base for any gates"
    p = 1 / (1 + math.exp(-5.0))
    penalty = schedule.penalty()
    assert penalty is not None
    assert abs(float(penalty.detach()) / (1e-3 * ENTRIES * (p * p if structured else p)) - 1) < 1e-10
    for key, options in ((s.attribute, handle.strategy.group_options(s)) for s in handle.slots):
        assert options == ({"weight_decay": 0.0} if key == "diff_w" else {"weight_decay": 0.0, "lr_scale": 1e4})


@BOTH
def test_noise_is_the_same_within_a_step_and_new_in_the_next(structured: bool) -> None:
    model = mlp()
    handle = install(model, strategy(structured=structured, alpha=0.0))
    randomize(handle)
    deterministic = model.eval()(X)
    schedule = handle.strategy.schedule(handle)
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.0)
    schedule.on_start(10)
    assert torch.equal(model.eval()(X), deterministic)
    model.train()
    rng = torch.get_rng_state()
    first = model(X)
    assert torch.equal(model(X), first), "a second forward before the backward pass sees the same gates"
    assert torch.equal(torch.get_rng_state(), rng)
    assert not torch.equal(first, deterministic)
    schedule.before_step(optimizer)
    schedule.after_step(optimizer, skipped=True)
    assert torch.equal(model(X), first)
    schedule.after_step(optimizer)
    assert not torch.equal(model(X), first)


@pytest.mark.parametrize("name", ["llama", "attention"])
def test_gradients_are_equal_under_checkpointing_while_gates_are_drawn(name: str) -> None:
    backbone = BACKBONES[name]
    batch = backbone.batch(D)

    def gradients(checkpointing: bool) -> list[Any]:
        model = backbone.fresh(D)
        handle = install(model, strategy(alpha=0.0, structured=True))
        randomize(handle, 0.05)
        handle.strategy.schedule(handle).on_start(10)
        model.train()
        if checkpointing:
            out = torch.utils.checkpoint.checkpoint(lambda: flat(model(**batch)), use_reentrant=False)
        else:
            out = flat(model(**batch))
        loss_of(out).backward()
        return [p.grad for p in handle.trainable_parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def train(model: Any, handle: lp.Handle, schedule: Any, optimizer: Any, steps: int) -> None:
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(X), Y)
        penalty = schedule.penalty()
        (loss if penalty is None else loss + penalty).backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)


@BOTH
def test_stages(structured: bool) -> None:
    model = mlp()
    before = [p.detach().clone() for p in (model.l1.weight, model.l1.bias, model.l2.weight)]
    handle = install(model, strategy(structured=structured, penalty=1e-4))
    fast, slow = ([s.tensor() for s in handle.trainable_slots() if (s.attribute == "diff_w") == is_w] for is_w in (False, True))
    # With decay and momentum on everything, which must not reach what is pruned.
    optimizer = torch.optim.AdamW([{"params": slow, "lr": 1e-3}, {"params": fast, "lr": 1e-1}], weight_decay=0.1)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(20)
    assert schedule.prune_at == 12
    train(model, handle, schedule, optimizer, 11)
    w, alpha = (torch.cat([getattr(a, n).detach() for a in adapters(handle)]) for n in ("diff_w", "diff_alpha"))
    assert ((w != 0).double().mean(), (alpha != 5).all()) == (1.0, True)
    train(model, handle, schedule, optimizer, 1)
    assert schedule.pruned
    assert schedule.penalty() is None
    kept = torch.cat([a.difference().detach() != 0 for a in adapters(handle)])
    assert int(kept.sum()) == round(0.05 * ENTRIES)
    assert not optimizer.state, "the moments belong to other gates"
    alphas = [a.diff_alpha.detach().clone() for a in adapters(handle)]
    values = torch.cat([a.difference().detach() for a in adapters(handle)])
    train(model, handle, schedule, optimizer, 8)
    now = torch.cat([a.difference().detach() for a in adapters(handle)])
    assert (now[~kept] == 0).all()
    assert (now[kept] != values[kept]).all(), "what is kept trains on"
    assert all(torch.equal(a.diff_alpha, old) for a, old in zip(adapters(handle), alphas, strict=True))
    trained = model.eval()(X)
    assert torch.equal(model.train()(X), trained), "no noise is left"
    handle.merge()
    after = [model.l1.weight, model.l1.bias, model.l2.weight]
    moved = torch.cat([(a != b).flatten() for a, b in zip(after, before, strict=True)])
    assert torch.equal(moved, kept), "all others are the base's, bit for bit"
    torch.testing.assert_close(model(X), trained)


def test_pruning_keeps_the_largest_changes_of_the_whole_model() -> None:
    model = mlp()
    handle = install(model, strategy(alpha=0.5))
    randomize(handle)
    expected = torch.cat([a.difference().detach().abs() for a in adapters(handle)])
    optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.0)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(2)
    train(model, handle, schedule, optimizer, 1)
    kept = torch.cat([a.difference().detach() for a in adapters(handle)])
    chosen = expected.topk(round(0.05 * ENTRIES)).indices.sort().values
    assert torch.equal(kept.nonzero().flatten(), chosen)
    torch.testing.assert_close(kept.abs()[chosen], expected[chosen], rtol=0, atol=0)


@pytest.mark.parametrize("at", [5, 12, 16])
@BOTH
def test_resuming_in_every_stage_is_exact(at: int, structured: bool) -> None:
    def session(state: Any, first: int, last: int) -> tuple[Tensor, Any]:
        model = mlp()
        handle = install(model, strategy(structured=structured, alpha=1.0, penalty=1e-4))
        optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
        schedule = handle.strategy.schedule(handle)
        schedule.on_start(20)
        if state is not None:
            handle.load_state_dict(state["adapter"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
        train(model, handle, schedule, optimizer, last - first)
        found = {"adapter": handle.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        return run(model.eval(), {"x": X}), copy.deepcopy(found)

    whole, _ = session(None, 0, 20)
    _, half = session(None, 0, at)
    assert torch.equal(session(half, at, 20)[0], whole)


def test_a_resumed_run_draws_the_gates_of_the_one_that_was_saved() -> None:
    first = lp.inject(mlp(), strategy())
    state = first.strategy.schedule(first).state_dict()
    base = mlp()
    torch.manual_seed(77)
    other = lp.inject(base, strategy())
    assert [a.seed for a in adapters(other)] != [a.seed for a in adapters(first)]
    other.strategy.schedule(other).load_state_dict(state)
    assert [a.seed for a in adapters(other)] == [a.seed for a in adapters(first)]


def test_merging_in_the_middle_of_a_run_is_without_noise_and_the_end_takes_it_away() -> None:
    model = mlp()
    handle = install(model, strategy(alpha=0.5))
    randomize(handle)
    expected = model.eval()(X)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(20)
    assert not torch.equal(model.train()(X), expected)
    handle.merge()
    torch.testing.assert_close(model(X), expected)
    model.eval()
    handle.unmerge()
    torch.testing.assert_close(model(X), expected)
    schedule.on_end()
    torch.testing.assert_close(model.train()(X), expected)


def test_a_finished_adapter_loads_and_is_sparse(tmp_path: Any) -> None:
    model = mlp()
    handle = install(model, strategy())
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(4)
    train(model, handle, schedule, optimizer, 4)
    lp.save_adapter(handle, tmp_path / "a")
    fresh = mlp()
    loaded = lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert sum(int((a.difference() != 0).sum()) for a in adapters(loaded)) == round(0.05 * ENTRIES)


@BOTH
def test_finish_leaves_the_kept_entries_only(structured: bool, tmp_path: Any) -> None:
    model = mlp()
    handle = install(model, strategy(structured=structured))
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(4)
    train(model, handle, schedule, optimizer, 1)
    with pytest.raises(ConfigError, match="not pruned yet"):
        handle.strategy.finish(handle)
    train(model, handle, schedule, optimizer, 3)
    with pytest.raises(ConfigError, match="not of this strategy"):
        lp.DiffPruning().finish(handle)
    handle.usage = {"base": "a name"}
    handle.merge()
    with pytest.raises(MergeError, match=r"finish\(\)"):
        handle.strategy.finish(handle)
    handle.unmerge()
    other = install(model, lp.LoRA(rank=2, targets=["l1"]), "other")
    with pytest.raises(ConflictError, match=r"finish\(\).*other adapters"):
        handle.strategy.finish(handle)
    other.remove()
    expected = model.eval()(X)
    sparse = handle.strategy.finish(handle)
    assert sparse.usage == {"base": "a name"}
    assert lp.handles(model) == {"default": sparse}
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)
    count = round(0.05 * ENTRIES)
    assert {k: tuple(v.shape) for k, v in sparse.state_dict().items()} == {
        "shared-mask.values": (count,),
        "shared-mask.indices": (count,),
    }
    lp.save_adapter(sparse, tmp_path / "a")
    fresh = mlp()
    loaded = lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(fresh(X), model(X))
    assert type(loaded.strategy.schedule(loaded)) is Schedule
    assert loaded.strategy.group_options(loaded.slots[0]) == {"weight_decay": 0.0}
    with pytest.raises(ConfigError, match="for a new run leave finished out"):
        lp.calibrate(mlp(), loaded.strategy, [X], lambda x: x.sum())


def test_stages_that_do_not_fit_are_refused() -> None:
    handle = install(mlp(), strategy(fine_tune=0.2))
    for total in (1, 2):
        with pytest.raises(ConfigError, match=f"fine_tune=0.2 of {total} steps leaves {total} before.*Train longer"):
            handle.strategy.schedule(handle).on_start(total)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(3)
    assert schedule.prune_at == 2
    for wrong in ({"fine_tune": 0.0}, {"fine_tune": 1.0}, {"share": 0.0}, {"penalty": -1.0}, {"alpha": 30.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            lp.DiffPruning(**wrong)
    schedule.step = 1
    with pytest.raises(ConfigError, match="with it, not with None"):
        schedule.after_step(None)
