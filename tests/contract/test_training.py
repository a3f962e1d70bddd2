"""What an adapter owns trains, nothing else moves; under checkpointing, compilation and a bf16 base too."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.surgery.handle import Slot
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks
from tests.backbones import flat, loss_of, run
from tests.contract.cases import WORKING, Case, assert_same, over, perturb, snapshot, train, train_mode


def without_effect(case: Case, slot: Slot) -> bool:
    """Whether the base's output does not depend on a claimed tensor at all, as on the bias of keys in a softmax."""
    model = case.base(torch.float64)
    before = run(model, case.backbone.batch(torch.float64))
    with torch.no_grad():
        tensor = model.get_parameter(slot.key)
        tensor.add_(torch.randn_like(tensor))
    return torch.allclose(run(model, case.backbone.batch(torch.float64)), before, rtol=0, atol=1e-12)


@over(WORKING)
def test_every_owned_tensor_learns_and_nothing_else_moves(case: Case) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    run(model, batch)  # a forward without gradient before training, as Lightning's sanity check does
    owned = {id(s.tensor()) for s in handle.slots if s.trainable}
    before = {k: v.detach().clone() for k, v in model.state_dict(keep_vars=True).items()}
    start = {s.key: s.tensor().detach().clone() for s in handle.slots}
    gradients = train(model, handle, batch, weight_decay=0.0)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in owned:
            assert torch.equal(tensor, before[key]), f"{key} is not owned and moved"
            assert tensor.grad is None, f"{key} is not owned and has a gradient"
    still = [
        slot
        for slot in handle.trainable_slots()
        if torch.equal(slot.tensor(), start[slot.key]) or gradients[id(slot.tensor())] == 0
    ]
    dead = [s.key for s in still if not case.strategy.may_rest(s) and not (s.claimed and without_effect(case, s))]
    assert not dead, f"no gradient or no movement: {dead}"
    assert len(still) < len(handle.trainable_slots())


@over(WORKING)
def test_after_training_remove_gives_the_base_back(case: Case) -> None:
    model = case.fresh()
    model, handle = case.installed()
    train(model, handle, case.backbone.batch())
    handle.remove()
    reference = case.fresh()
    assert_same(snapshot(model), snapshot(reference), objects=False)
    assert torch.equal(run(model.requires_grad_(False), case.backbone.batch()), run(case.base(), case.backbone.batch()))


@over(WORKING)
def test_gradients_are_equal_under_gradient_checkpointing(case: Case) -> None:
    batch = case.backbone.batch(torch.float64)

    def gradients(checkpointing: bool) -> list[torch.Tensor | None]:
        model, handle = case.installed(torch.float64)
        perturb(handle)
        train_mode(model)
        anatomy = lp.anatomy_of(model)
        if checkpointing and anatomy.blocks:
            checkpoint_blocks(model, anatomy, GradientCheckpointing())
        if checkpointing and not anatomy.blocks:
            out = torch.utils.checkpoint.checkpoint(lambda: flat(model(**batch)), use_reentrant=False)
        else:
            out = flat(model(**batch))
        loss_of(out).backward()
        return [p.grad for p in handle.trainable_parameters()]

    plain, checkpointed = gradients(False), gradients(True)
    assert any(g is not None and g.abs().max() > 0 for g in plain)
    for a, b in zip(plain, checkpointed, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-9)


@over(WORKING)
def test_bf16_base_with_fp32_adapters(case: Case) -> None:
    batch = case.backbone.batch(torch.bfloat16)
    model, handle = case.installed(torch.bfloat16)
    for slot in handle.slots:
        wanted = torch.bfloat16 if slot.claimed else torch.float32
        assert not slot.tensor().is_floating_point() or slot.tensor().dtype == wanted, slot.key
    perturb(handle)
    out = run(model, batch)
    assert torch.isfinite(out).all()
    expected = case.base(torch.bfloat16)
    assert flat(expected(**batch)).dtype == out.dtype
    start = {s.key: s.tensor().detach().clone() for s in handle.slots}
    train(model, handle, batch)
    assert any(not torch.equal(s.tensor(), start[s.key]) for s in handle.slots if s.trainable)
    # In bf16 the adapted model still follows its fp32 twin, coarsely.
    twin, twin_handle = case.installed(torch.float32)
    twin_handle.load_state_dict(start)
    with torch.no_grad():
        reference = flat(twin(**case.backbone.batch()))
    assert (out.float() - reference).abs().mean() < 0.2 * (1 + reference.abs().mean())


@over(WORKING)
def test_deepcopy_is_independent(case: Case) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    run(model, batch)
    perturb(handle)
    expected, before = run(model, batch), snapshot(model)
    twin = copy.deepcopy(model)
    (copied,) = [h for m in twin.modules() for h in getattr(m, "_handles", {}).values()]
    assert copied is not handle
    assert torch.equal(run(twin, batch), expected)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert [s.key for s in copied.slots] == [s.key for s in handle.slots]
    copied.verify()
    train(twin, copied, batch)
    assert not torch.equal(run(twin, batch), expected), "the copy's handle owns the copy's tensors"
    copied.remove()
    assert_same(snapshot(twin), snapshot(case.fresh()), objects=False)
    assert_same(snapshot(model), before)
    assert torch.equal(run(model, batch), expected)


@over(WORKING)
def test_pickle_of_the_whole_model(case: Case) -> None:
    model, handle = case.installed()
    perturb(handle)
    again: nn.Module = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(again, case.backbone.batch()), run(model, case.backbone.batch()))


# What dynamo itself does with any autograd function, such as that of a quantized layer.
DYNAMO = "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
FAST = [case for case in WORKING if case.backbone.name in ("attention", "conv_net")]


def compiled_equals_eager(case: Case) -> None:
    torch.compiler.reset()
    batch = case.backbone.batch()
    model, handle = case.installed()
    perturb(handle)
    expected = run(model, batch)
    found = run(torch.compile(model, fullgraph=True, backend="aot_eager"), batch)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@over(FAST)
@pytest.mark.filterwarnings(DYNAMO)
def test_compiled_in_one_graph_equals_eager(case: Case) -> None:
    compiled_equals_eager(case)


@pytest.mark.slow
@over([case for case in WORKING if case not in FAST])
@pytest.mark.filterwarnings(DYNAMO)
def test_compiled_in_one_graph_equals_eager_on_larger_backbones(case: Case) -> None:
    compiled_equals_eager(case)
