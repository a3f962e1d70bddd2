"""AdaMix and Mixture, arXiv 2205.12410: random routing, a second pass, averages."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, MergeError, UnsupportedLayerError
from lightning_peft.nn.low_rank import LowRankAdapter
from lightning_peft.nn.mixture import Clock, MixedAdapter, consistency
from lightning_peft.surgery.passes import in_pass, pass_number
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks
from tests.backbones import BACKBONES, DIM, flat, loss_of, run
from tests.papers.toys import D, X, install, mlp, randomize

LORA = lp.LoRA(rank=2, alpha=4.0, targets="all-linear")
HOULSBY = lp.HoulsbyAdapter(width=4, targets="all-linear")


def adapted(strategy: lp.PEFTStrategy | None = None, **options: Any) -> tuple[nn.Module, lp.Handle, Any]:
    """The reference MLP with a mixture that is trained."""
    model = mlp()
    handle = install(model, strategy or lp.Mixture(part=LORA, **options))
    randomize(handle)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(10)
    return model.train(), handle, schedule


def two_passes(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    first = flat(model(**batch))
    with in_pass(1):
        return first, flat(model(**batch))


def drawn(handle: lp.Handle, clock: Clock, number: int = 0) -> list[tuple[int, int]]:
    return [clock.draw(e.adapter.experts, e.key, number) for e in handle.entries]


def test_consistency_of_the_specification() -> None:
    p, q = torch.tensor([[0.7, 0.3]], dtype=D), torch.tensor([[0.6, 0.4]], dtype=D)
    assert float(consistency(p.log(), q.log())) == pytest.approx(0.02209164, abs=5e-9)
    rows = consistency(torch.cat([p, p]).log(), torch.cat([q, p]).log())
    assert float(rows) == pytest.approx(0.02209164 / 2, abs=5e-9), "batchmean"
    assert float(consistency(p[:0], q[:0])) == 0


def test_the_target_side_of_each_divergence_is_a_constant() -> None:
    first, second = (torch.randn(4, 5, dtype=D, requires_grad=True) for _ in range(2))
    consistency(first, second).backward()
    p, q = first.detach().softmax(-1), second.detach().softmax(-1)
    torch.testing.assert_close(
        first.grad, (p - q) / (2 * 4)
    )  # of KL(q || p) only: the other one would add p (log p - log q) terms
    torch.testing.assert_close(second.grad, (q - p) / (2 * 4))


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize(
    "part", [lp.HoulsbyAdapter(width=4), lp.PfeifferAdapter(width=4), lp.LoRA(rank=4)], ids=lambda p: p.info.name
)
def test_count_in_training_and_deployed(part: lp.PEFTStrategy, sharing: bool) -> None:
    backbone = BACKBONES["bert"]
    handle = install(backbone.fresh(), lp.Mixture(part=part, experts=4, sharing_up=sharing))
    plain = install(backbone.fresh(), part)
    names = {"lora_A": 0, "lora_B": 1, "down": 0, "down_bias": 0, "up": 1, "up_bias": 1}
    counts = [sum(s.tensor().numel() for s in plain.slots if names[s.attribute] == side) for side in (0, 1)]
    assert handle.num_trainable() == 4 * counts[0] + (1 if sharing else 4) * counts[1]
    assert lp.Mixture.deploy(handle).num_trainable() == plain.num_trainable()


def test_stacks_of_biases_do_not_decay() -> None:
    handle = install(BACKBONES["bert"].fresh(), lp.Mixture(part=lp.HoulsbyAdapter(width=4), sharing_up=False))
    for slot in handle.slots:
        biased = slot.attribute.endswith("_bias")
        assert handle.strategy.group_options(slot) == ({"weight_decay": 0.0} if biased else {})


def test_adamix_is_the_papers() -> None:
    strategy = lp.AdaMix()
    assert (strategy.experts, strategy.sharing_up, strategy.consistency) == (4, True, 1.0)
    assert strategy.inner == lp.HoulsbyAdapter(targets="mlp.down", width=16)
    handle = install(BACKBONES["bert"].fresh(), strategy)
    r, d, layers = 16, DIM, 2
    assert handle.num_trainable() == layers * (4 * (d * r + r) + d * r + d), "L (M dr + dr + biases)"
    assert [e.path for e in handle.entries] == [f"bert.encoder.layer.{i}.output.dense" for i in (0, 1)]
    assert lp.resolve(strategy.to_dict(defaults=True)) == strategy
    assert lp.resolve({"class_path": "AdaMix", "init_args": {"part": "lora"}}).inner == lp.LoRA()


def with_copies(layer: nn.Linear, a: Any, i: int, j: int, x: Tensor) -> Tensor:
    """The layer with the i-th first projection and the j-th second one of its adapter."""
    if isinstance(a.adapter, LowRankAdapter):
        return F.linear(x, layer.weight + 2.0 * a.lora_B[j] @ a.lora_A[i], layer.bias)
    h = F.linear(x, layer.weight, layer.bias)
    return h + F.linear(F.gelu(F.linear(h, a.down[i], a.down_bias[i])), a.up[j], a.up_bias[j])


@pytest.mark.parametrize("part", [LORA, HOULSBY], ids=lambda p: p.info.name)
def test_a_pass_runs_the_drawn_copies(part: lp.PEFTStrategy) -> None:
    model, handle, schedule = adapted(lp.Mixture(part=part, experts=3, sharing_up=False))
    for step in range(6):
        for number in (0, 1):
            x = X
            for (i, j), entry, layer in zip(
                drawn(handle, schedule.clock, number), handle.entries, (model.l1, model.l2), strict=True
            ):
                x = with_copies(layer, entry.adapter, i, j, x)
                x = torch.tanh(x) if layer is model.l1 else x
            with in_pass(number):
                torch.testing.assert_close(model(X), x, rtol=1e-10, atol=1e-10)
        schedule.after_step(None)
        assert schedule.clock.step == step + 1


def test_equal_copies_make_training_equal_to_evaluation() -> None:
    model = mlp()
    handle = install(model, lp.Mixture(part=LORA, sharing_up=False))
    assert all(torch.equal(e.adapter.lora_A[0], a) for e in handle.entries for a in e.adapter.lora_A), "so they start"
    for e in handle.entries:
        with torch.no_grad():
            e.adapter.lora_B.copy_(torch.randn(e.adapter.lora_B.shape[1:], dtype=D).expand_as(e.adapter.lora_B))
    handle.strategy.schedule(handle).on_start(1)
    torch.testing.assert_close(model.train()(X), model.eval()(X), rtol=1e-12, atol=1e-12)
    randomize(handle)
    assert (model.train()(X) - model.eval()(X)).abs().max() > 1e-2


def test_one_expert_without_dropout_is_consistent_with_itself() -> None:
    model, _, schedule = adapted(experts=1)
    first, second = two_passes(model, {"x": X})
    assert consistency(first.reshape(5, -1), second.reshape(5, -1)) == 0
    model, _, schedule = adapted(lp.Mixture(part=lp.LoRA(rank=2, dropout=0.5, targets="all-linear"), experts=1))
    first, second = two_passes(model, {"x": X})
    assert schedule.second_pass().loss(first.reshape(5, -1), second.reshape(5, -1)) > 0, "dropout is drawn anew"


def test_draws_differ_between_passes_steps_and_layers_and_are_uniform_and_independent() -> None:
    _, handle, schedule = adapted(experts=4, sharing_up=False)
    seen: Counter[tuple[int, int]] = Counter()
    same = Counter[str]()
    for _ in range(1600):
        (one, other), (again, _) = drawn(handle, schedule.clock, 0), drawn(handle, schedule.clock, 1)
        seen[one] += 1
        same["layers"] += one == other
        same["passes"] += one == again
        schedule.after_step(None)
    assert len(seen) == 16
    assert all(60 < count < 145 for count in seen.values())
    assert all(60 < count < 145 for count in same.values())


def test_every_copy_has_a_gradient_and_the_optimizer_treats_all_alike() -> None:
    model, handle, _ = adapted(experts=4, sharing_up=False)
    model(X).square().mean().backward()
    for parameter in handle.trainable_parameters():
        touched = [bool(part.abs().max() > 0) for part in parameter.grad]
        assert sum(touched) == 1, "one is drawn; the others have gradient zero, not none"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_recomputation_replays_the_routing_of_its_own_pass(name: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = BACKBONES[name].fresh(D).train()
        part = lp.Compose(parts=(lp.Mixture(part="lora", sharing_up=False), lp.AdaMix(part=lp.HoulsbyAdapter(width=4))))
        handle = install(model, part)
        randomize(handle)
        handle.strategy.schedule(handle).on_start(10)
        if checkpointing:
            checkpoint_blocks(model, lp.anatomy_of(model), GradientCheckpointing(reentrant=reentrant))
        first, second = two_passes(model, BACKBONES[name].batch(D))
        assert not torch.equal(first, second)
        (loss_of(first) + 2 * loss_of(second) + (first - second.detach()).square().sum()).backward()
        return [p.grad for p in handle.trainable_parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


def under_a_checkpoint(call: Any, reentrant: bool, x: Tensor, **kwargs: Any) -> Any:
    return checkpoint(functools.partial(call, **kwargs), x.requires_grad_() if x.is_leaf else x, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_somebody_elses_checkpoint_two_passes_are_refused_and_one_is_right(reentrant: bool) -> None:
    def gradients(consistency: float, checkpointing: bool) -> list[Tensor]:
        model = BACKBONES["llama"].fresh(D).train()
        handle = install(model, lp.Mixture(part="lora", sharing_up=False, consistency=consistency))
        randomize(handle)
        handle.strategy.schedule(handle).on_start(10)
        if checkpointing:
            for block in model.model.layers:
                own = functools.partial(type(block).forward, block)
                block.forward = functools.partial(under_a_checkpoint, own, reentrant)
        loss_of(flat(model(**BACKBONES["llama"].batch(D)))).backward()
        return [p.grad for p in handle.trainable_parameters()]

    with pytest.raises(ConflictError, match=r"gradient_checkpointing=True"):
        gradients(1.0, True)
    for plain, again in zip(gradients(0.0, False), gradients(0.0, True), strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


def test_the_number_of_a_pass_ends_with_it() -> None:
    with in_pass(1):
        assert pass_number() == 1
        with in_pass(0):
            assert pass_number() == 0
        assert pass_number() == 1
    assert pass_number() == 0


PARTS = [lp.LoRA(rank=2, bias="adapted"), lp.LoRA(rank=2, init="pissa"), lp.HoulsbyAdapter(width=4), lp.ParallelAdapter(width=4)]


@pytest.mark.parametrize("part", PARTS, ids=["lora", "pissa", "houlsby", "parallel"])
def test_what_is_deployed_equals_evaluation_and_is_the_plain_strategy(part: lp.PEFTStrategy, tmp_path: Path) -> None:
    backbone = BACKBONES["bert"]
    model = backbone.fresh()
    handle = install(model, lp.Mixture(part=part, sharing_up=False), "mine")
    randomize(handle)
    handle.usage["note"] = 1
    batch = backbone.batch()
    expected, state = run(model, batch), copy.deepcopy(handle.state_dict())
    plain = lp.Mixture.deploy(handle)
    assert plain.strategy == part
    assert lp.handles(model) == {"mine": plain}
    assert plain.usage == {"note": 1}
    torch.testing.assert_close(run(model, batch), expected, rtol=0, atol=1e-6)
    for slot in plain.slots:
        source = state.get(slot.key, state.get(slot.key.replace(".initial", ".adapter.initial")))
        copies = source.dim() > slot.tensor().dim()
        torch.testing.assert_close(slot.tensor(), source.mean(0) if copies else source, rtol=0, atol=0)
    lp.save_adapter(plain, tmp_path / "plain")
    fresh = backbone.fresh()
    assert lp.load_adapter(fresh, tmp_path / "plain").strategy == part
    assert torch.equal(run(fresh, batch), run(model, batch))


def test_merged_averages_equal_evaluation() -> None:
    model, handle, _ = adapted(experts=3, sharing_up=False)
    model.eval()
    expected = model(X)
    handle.merge()
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(MergeError, match="deploy"):
        lp.Mixture.deploy(handle)
    handle.unmerge()
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)


def test_deploy_refuses_what_has_no_averages_and_changes_nothing() -> None:
    model = mlp()
    lora = install(model, LORA)
    with pytest.raises(ConfigError, match="only a mixture"):
        lp.Mixture.deploy(lora)
    mixture = install(model, lp.Mixture(part=LORA), "second")
    with pytest.raises(ConflictError, match="other adapters"):
        lp.Mixture.deploy(mixture)
    assert lp.handles(model) == {"default": lora, "second": mixture}


def test_after_the_run_the_averages_act_in_training_mode_too() -> None:
    model, _, schedule = adapted(experts=4, sharing_up=False)
    drawn_copies = model(X)
    schedule.on_end()
    torch.testing.assert_close(model(X), model.eval()(X))
    assert not torch.allclose(model(X), drawn_copies)


def test_a_resumed_schedule_draws_what_the_first_one_would_have() -> None:
    _, handle, schedule = adapted(experts=4)
    for _ in range(3):
        schedule.after_step(None)
    schedule.after_step(None, skipped=True)
    saved, expected = schedule.state_dict(), drawn(handle, schedule.clock)
    torch.manual_seed(77)
    other = lp.inject(mlp(), lp.Mixture(part=LORA))
    resumed = other.strategy.schedule(other)
    resumed.on_start(10)
    assert resumed.clock.seed != schedule.clock.seed
    resumed.load_state_dict(saved)
    assert saved["step"] == 3
    assert drawn(other, resumed.clock) == expected
    assert all(e.adapter.routing[0] is resumed.clock for e in other.entries)


def test_a_gated_mixture_routes_and_reset_makes_equal_copies_again() -> None:
    model = mlp()
    handle = install(model, lp.Gated(part=lp.Mixture(part=LORA, sharing_up=False)))
    randomize(handle)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(3)
    assert schedule.second_pass() is not None
    assert any(not torch.equal(*two_passes(model.train(), {"x": X})) for _ in range(3) if not schedule.after_step(None))
    inner = handle.entries[0].adapter.adapter
    assert isinstance(inner, MixedAdapter)
    inner.reset_parameters()
    fresh = install(mlp(), lp.Mixture(part=LORA, sharing_up=False)).entries[0].adapter
    assert all(torch.equal(a, inner.lora_A[0]) for a in inner.lora_A)
    assert not inner.lora_B.any()
    assert inner.lora_A.shape == fresh.lora_A.shape


def test_compositions_have_one_second_pass() -> None:
    mixtures = [lp.Mixture(part=lp.LoRA(rank=2, targets=t), consistency=c) for t, c in (("l1", 1.0), ("l2", 2.0))]
    _, _, schedule = adapted(lp.Compose(parts=tuple(mixtures)))
    first, second = (torch.randn(3, 4) for _ in range(2))
    torch.testing.assert_close(schedule.second_pass().loss(first, second), 3 * consistency(first, second))
    other = lp.Mixture(part=lp.LoRA(rank=2, targets="l2"), outputs="0")
    handle = install(mlp(), lp.Compose(parts=(mixtures[0], other)))
    with pytest.raises(ConfigError, match="different outputs"):
        handle.strategy.schedule(handle).second_pass()
    handle = install(mlp(), lp.Compose(parts=(lp.Mixture(part=lp.LoRA(targets="l1"), consistency=0.0), lp.LoRA(targets="l2"))))
    assert handle.strategy.schedule(handle).second_pass() is None


def test_what_cannot_be_mixed_is_refused() -> None:
    for options, word in (({"experts": 0}, "experts"), ({"consistency": -1.0}, "consistency"), ({"targets": "l1"}, "targets")):
        with pytest.raises(ConfigError, match=word):
            lp.Mixture(part="lora", **options)
    with pytest.raises(ConfigError, match="schedule of its own"):
        lp.Mixture(part="adalora")
    with pytest.raises(ConfigError, match="'part' has no default"):
        lp.resolve("mixture")
    model = mlp()
    with pytest.raises(UnsupportedLayerError, match="two projections"):
        install(model, lp.Mixture(part=lp.LoHa(rank=2, targets="l1")))
    with pytest.raises(UnsupportedLayerError, match="beside the forward"):
        install(BACKBONES["attention"].fresh(), lp.Mixture(part=lp.LoRA(rank=2, targets="attention")))
    assert lp.handles(model) == {}
