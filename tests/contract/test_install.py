"""Installing changes no base module, name or value; disabling and removing give the base back; a failure leaves no trace."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

import lightning_peft as lp
from lightning_peft.surgery.edits import Edit, Plan
from lightning_peft.surgery.inject import Surgery, apply_plan
from lightning_peft.surgery.layers import DENSE, layer_kind, storage_of
from tests.backbones import flat, run, tensors
from tests.contract.cases import WORKING, Case, assert_same, example, over, perturb, snapshot


@over(WORKING)
def test_identity_at_init_if_promised_else_bounded(case: Case) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    reference = case.base()
    for slot in handle.slots:
        if slot.claimed:  # torch picks other kernels for weights that want gradient
            reference.get_parameter(slot.key).requires_grad_(True)
    with torch.no_grad():
        expected, found = list(tensors(reference(**batch))), list(tensors(model(**batch)))
    if case.strategy.identity_at_init:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        return
    # The main output comes first; states of a longer sequence may follow.
    assert found[0].shape == expected[0].shape
    assert torch.isfinite(found[0]).all()
    assert (found[0] - expected[0]).abs().max() < 10 * (1 + expected[0].abs().max())


INEXACT = [info for info in lp.list_methods() if not example(info).identity_at_init]


@pytest.mark.parametrize("info", INEXACT, ids=lambda info: info.name)
def test_a_method_that_does_not_promise_identity_lacks_it_somewhere(info: lp.MethodInfo) -> None:
    for case in (case for case in WORKING if case.strategy.info is info):
        expected = next(tensors(case.base()(**case.backbone.batch())))
        if not torch.equal(next(tensors(case.installed()[0](**case.backbone.batch()))), expected):
            return
    pytest.fail(f"{info.name} is the identity at the start on every backbone; promise it")


@over(WORKING)
def test_keys_classes_and_objects_of_the_base_stay(case: Case) -> None:
    model = case.fresh()
    keys, objects = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    classes = {path: type(m) for path, m in model.named_modules()}
    values = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    handle = case.install(model, "mine")
    assert torch.equal(torch.get_rng_state(), rng), "initialisation must not draw from the global generator"
    added = [k for k in model.state_dict() if k not in values]
    assert [k for k in model.state_dict() if k in values] == keys
    assert all("peft.mine." in k for k in added)
    assert len(added) == sum(not slot.claimed for slot in handle.slots)
    assert all(model.get_parameter(name) is p for name, p in objects.items())
    assert all(model.get_buffer(name) is b for name, b in buffers.items())
    assert all(torch.equal(model.state_dict()[k], v) for k, v in values.items())
    assert all(type(model.get_submodule(path)) is cls for path, cls in classes.items())
    claimed = {id(s.tensor()) for s in handle.slots if s.claimed}
    assert all(p.requires_grad == (id(p) in claimed) for p in objects.values()), "exactly the claimed parameters train"
    trainable = {id(p) for p in handle.trainable_parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable
    assert handle.num_trainable() == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert lp.handles(model) == {"mine": handle}
    handle.verify()
    assert handle.summary()


@over(WORKING)
def test_a_full_checkpoint_of_the_plain_model_loads_after_injection(case: Case) -> None:
    model, _ = case.installed()
    saved = {k: v + 1 if v.is_floating_point() else v for k, v in case.base().state_dict().items()}
    result = model.load_state_dict(saved, strict=False)
    assert result.unexpected_keys == []
    assert set(result.missing_keys) == set(model.state_dict()) - set(saved)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in saved.items())


SEEDED = ("shared-vera",)  # drawn by a seed among its own options


def constant(value: torch.Tensor) -> bool:
    """Whether a tensor holds one number only, or zeros and ones, as the identity does."""
    return bool((value == value.flatten()[:1]).all() or ((value == 0) | (value == 1)).all())


@over(WORKING)
def test_same_seed_same_adapter_and_another_seed_another(case: Case) -> None:
    first, again = case.installed()[1].state_dict(), case.installed()[1].state_dict()
    assert first.keys() == again.keys()
    assert all(torch.equal(first[k], again[k]) for k in first)
    _, handle = case.installed(seed=12)
    drawn = [s.key for s in handle.slots if not s.claimed and not s.key.startswith(SEEDED) and not constant(first[s.key])]
    other = handle.state_dict()
    fixed = [k for k in drawn if torch.equal(other[k], first[k])]
    if not fixed or case.strategy.base_quantization is not None:  # DoRA's norms of codes, which cannot be moved
        return
    # What is no constant, and the same under every seed, can only come from the base.
    model = case.fresh()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    elsewhere = case.install(model).state_dict()
    assert not [k for k in fixed if torch.equal(elsewhere[k], first[k])], "drawn, but not with the seed"


@over(WORKING)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_disabled_is_the_base_bit_for_bit(case: Case, grad: bool) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    run(model, batch)
    perturb(handle)
    before = {k: v.clone() for k, v in handle.state_dict().items()}
    with torch.set_grad_enabled(grad):
        expected = flat(case.base()(**batch))
        adapted = flat(model(**batch))
        with handle.disabled():
            assert torch.equal(flat(model(**batch)), expected)
            with handle.disabled():  # nesting changes nothing
                assert torch.equal(flat(model(**batch)), expected)
            assert torch.equal(flat(model(**batch)), expected)
        assert adapted.shape != expected.shape or not torch.equal(adapted, expected)
        assert torch.equal(flat(model(**batch)), adapted)
    assert all(torch.equal(v, before[k]) for k, v in handle.state_dict().items())


@over(WORKING)
def test_remove_restores_all(case: Case) -> None:
    model = case.fresh()
    next(model.parameters()).requires_grad_(False)  # a flag of the user's own comes back as well
    before, expected = snapshot(model), run(case.base(), case.backbone.batch())
    handle = case.install(model)
    run(model, case.backbone.batch())
    perturb(handle)
    handle.remove()
    assert_same(snapshot(model), before)
    assert lp.handles(model) == {}
    assert torch.equal(run(model.requires_grad_(False), case.backbone.batch()), expected)
    handle.remove()  # the second time nothing happens
    assert_same(snapshot(model.requires_grad_(False)), snapshot(model))


@over(WORKING)
def test_install_remove_install_gives_the_same(case: Case) -> None:
    model, handle = case.installed()
    expected = run(model, case.backbone.batch())
    handle.remove()
    for p in model.parameters():
        p.requires_grad_(p.is_floating_point())  # codes cannot
    torch.manual_seed(11)
    case.install(model)
    assert torch.equal(run(model, case.backbone.batch()), expected)


@dataclass(frozen=True)
class Failing(Edit):
    """An edit that passes every check and then fails."""

    @property
    def place(self) -> tuple[str, str]:
        return "nowhere", "failing"

    def apply(self, surgery: Surgery) -> None:
        raise RuntimeError("injected failure")


@over(WORKING)
def test_a_failure_in_the_kth_edit_leaves_the_model_untouched(case: Case) -> None:
    model = case.fresh()
    before = snapshot(model)
    anatomy = lp.anatomy_of(model)
    plan = case.strategy.plan(anatomy)
    for k in sorted({0, 1, len(plan.edits) // 2, len(plan.edits)}):
        edits = (*plan.edits[:k], Failing(), *plan.edits[k:])
        with pytest.raises(RuntimeError, match="injected failure"):
            apply_plan(model, dataclasses.replace(plan, edits=edits), anatomy, case.strategy, name="default")
        assert_same(snapshot(model), before)
        assert lp.handles(model) == {}


def whole(case: Case, model: torch.nn.Module) -> lp.PEFTStrategy:
    """Return what trains all of the base that is not quantized."""
    if case.strategy.base_quantization is None:
        return lp.Full()
    places = {id(p): path for path, m in model.named_modules() for p in m.parameters(recurse=False) if storage_of(m) == DENSE}
    return lp.Head(targets=sorted({path for path in places.values() if layer_kind(model.get_submodule(path)) is not None}))


@over(WORKING)
def test_a_failure_beside_an_adapter_leaves_that_adapter_untouched(case: Case) -> None:
    model = case.fresh()
    first = lp.inject(model, whole(case, model), "first")
    perturb(first)
    expected, before = run(model, case.backbone.batch()), snapshot(model)
    anatomy = lp.anatomy_of(model)
    plan = case.strategy.plan(anatomy)
    edits = tuple(e for e in plan.edits if not e.place[1].startswith("="))  # what `Full` trains cannot be claimed twice
    with pytest.raises(RuntimeError, match="injected failure"):
        apply_plan(model, Plan((*edits, Failing()), plan.shared), anatomy, case.strategy, name="second")
    assert_same(snapshot(model), before)
    assert list(lp.handles(model)) == ["first"]
    assert torch.equal(run(model, case.backbone.batch()), expected)


@over(WORKING)
def test_the_same_name_twice_is_refused(case: Case) -> None:
    model, handle = case.installed()
    before = snapshot(model)
    with pytest.raises(lp.errors.ConflictError, match="default"):
        lp.inject(model, lp.Full())
    assert_same(snapshot(model), before)
    assert lp.handles(model) == {"default": handle}
