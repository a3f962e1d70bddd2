"""A mergeable method's two views agree; any other refuses and changes nothing."""

from __future__ import annotations

import pytest
import torch

import lightning_peft as lp
from lightning_peft.errors import MergeError
from tests.backbones import run, tensors
from tests.contract.cases import WORKING, Case, assert_same, calls, over, perturb, snapshot

MERGEABLE = [case for case in WORKING if case.strategy.mergeable]
OTHERS = [case for case in WORKING if not case.strategy.mergeable]


REMEDIES = {"tied": "untie", "needs a bias": "add_bias"}


def merge(handle: lp.Handle, *, exact: bool = False) -> set[str]:
    """Merge; where a weight is tied or a bias missing the refusal must come first. Return the options that helped.

    Quantized bases become dense: what quantizing anew does to them is told by the tests of storages.
    """
    before = snapshot(handle.root)
    into = None if handle.strategy.base_quantization is None else "dense"
    needed: dict[str, bool] = {}
    while True:
        try:
            handle.merge(exact=exact, quantized=into, **needed)
            return set(needed)
        except MergeError as refusal:
            reason = str(refusal)
        (remedy,) = (option for words, option in REMEDIES.items() if words in reason)
        assert remedy in reason
        assert remedy not in needed
        assert_same(snapshot(handle.root), before)
        needed[remedy] = True


def needs_backup(handle: lp.Handle) -> bool:
    """Whether some adapter cannot compute the old weight from the merged one."""
    with torch.no_grad():
        return any(e.adapter.unmerged(e.site.weight(e.module), e.site.bias(e.module)) is None for e in handle.entries)


@over(MERGEABLE)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_forward_equals_merged_and_unmerge_returns(case: Case, training: bool) -> None:
    batch = case.backbone.batch(torch.float64)
    model, handle = case.installed(torch.float64)
    perturb(handle)
    model.train(training)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    expected = run(model, batch)
    seen = calls(model, handle, batch)
    model.load_state_dict(weights)  # running statistics of BatchNorm in training
    merge(handle, exact=needs_backup(handle))
    assert handle.merged
    for module, args, kwargs, out in seen:
        with torch.no_grad():
            merged = next(tensors(module(*args, **kwargs)))
        assert (merged - out).abs().max() <= 1e-10 * (1 + out.abs().max())
    assert (run(model, batch) - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    for forbidden in (handle.merge, handle.state_dict, lambda: handle.disabled().__enter__(), lambda: handle.load_state_dict({})):
        with pytest.raises(MergeError):
            forbidden()
    handle.unmerge()
    for key, value in model.state_dict().items():
        if "running" not in key and "batches" not in key:
            torch.testing.assert_close(value, weights[key], rtol=0, atol=1e-12)
    torch.testing.assert_close(run(model, batch), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(MergeError):
        handle.unmerge()


@over(MERGEABLE)
def test_exact_merge_and_unmerge_return_every_bit_in_bf16(case: Case) -> None:
    model, handle = case.installed(torch.bfloat16)
    perturb(handle)
    before = snapshot(model)
    options = merge(handle, exact=True)
    handle.unmerge()
    assert_same(snapshot(model), before, objects="untie" not in options)


@over(MERGEABLE)
def test_merge_then_remove_leaves_a_plain_model_with_the_effect(case: Case) -> None:
    batch = case.backbone.batch(torch.float64)
    model, handle = case.installed(torch.float64)
    perturb(handle)
    expected = run(model, batch)
    options = merge(handle)
    handle.remove()
    if case.strategy.base_quantization is not None:
        assert (run(model, batch) - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
        return
    plain = case.fresh(torch.float64)
    if "add_bias" in options:
        for key in model.state_dict().keys() - plain.state_dict().keys():
            path, _, name = key.rpartition(".")
            assert name == "bias"
            plain.get_submodule(path).bias = torch.nn.Parameter(torch.empty_like(model.get_parameter(key)), requires_grad=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(model.state_dict())
    assert (run(plain, batch) - expected).abs().max() <= 1e-5 * (1 + expected.abs().max())
    flags, expected_flags = (
        {n: p.requires_grad for n, p in m.named_parameters(remove_duplicate=False)}
        for m in (model, plain)  # some were untied
    )
    assert flags == expected_flags


@over(OTHERS)
def test_what_cannot_be_merged_says_so_and_changes_nothing(case: Case) -> None:
    batch = case.backbone.batch()
    model, handle = case.installed()
    perturb(handle)
    expected, before = run(model, batch), snapshot(model)
    with pytest.raises(MergeError):
        handle.merge()
    assert not handle.merged
    assert_same(snapshot(model), before)
    assert torch.equal(run(model, batch), expected)
