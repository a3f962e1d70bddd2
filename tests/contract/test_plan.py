"""Planning is pure, deterministic, and the same on meta tensors; a strategy is a value that YAML can spell."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
import yaml

import lightning_peft as lp
from lightning_peft.errors import ConfigError, PEFTError, PortError, TargetError
from lightning_peft.surgery.edits import SiteEdit
from tests.contract.cases import (
    ALL,
    BACKBONES,
    REFUSED,
    UNDECLARED,
    WORKING,
    Case,
    assert_same,
    example,
    members,
    over,
    snapshot,
)

METHODS = pytest.mark.parametrize("info", lp.list_methods(), ids=lambda info: info.name)


def described(plan: Any) -> str:
    """Return the plan as text: without addresses, and without the device, in which meta and real differ."""
    text = repr((plan.edits, {name: build for name, build in plan.shared.items()}))
    return re.sub(r" at 0x[0-9a-f]+|device\(type='\w+'\)", "", text)


@over(WORKING)
def test_planning_changes_nothing_and_gives_the_same_plan_twice(case: Case) -> None:
    model = case.fresh()
    before, state = snapshot(model), torch.get_rng_state()
    first = case.strategy.plan(lp.anatomy_of(model))
    second = case.strategy.plan(lp.anatomy_of(model))
    assert described(first) == described(second)
    assert_same(snapshot(model), before)
    assert torch.equal(torch.get_rng_state(), state)


@over(WORKING)
def test_plan_is_equal_on_meta_and_real_tensors(case: Case) -> None:
    with torch.device("meta"):
        meta = case.backbone.make()
    # Both dense: what is quantized later is planned, and its cost estimated, before.
    assert described(case.strategy.plan(lp.anatomy_of(meta))) == described(
        case.strategy.plan(lp.anatomy_of(case.backbone.fresh()))
    )


@over(REFUSED)
def test_what_the_record_rules_out_is_refused_and_nothing_changes(case: Case) -> None:
    model = case.fresh()
    before = snapshot(model)
    assert case.obstacle is not None
    with pytest.raises(case.obstacle) as caught:
        lp.inject(model, case.strategy)
    assert len(str(caught.value)) > 40, "an error names value, rule and remedy"
    assert_same(snapshot(model), before)
    assert lp.handles(model) == {}


@pytest.mark.parametrize("case", UNDECLARED, ids=lambda case: case.id)
def test_what_only_the_plan_can_find_missing_is_refused_and_nothing_changes(case: Case) -> None:
    model = case.fresh()
    before = snapshot(model)
    with pytest.raises((ConfigError, PortError, TargetError)):
        lp.inject(model, case.strategy)
    assert_same(snapshot(model), before)


@METHODS
def test_every_method_works_on_several_backbones(info: lp.MethodInfo) -> None:
    # Without this, a method whose plan always raised would pass all other tests by being refused everywhere.
    working = {case.backbone.name for case in WORKING if case.strategy.info is info}
    undeclared = {case.backbone.name for case in UNDECLARED if case.strategy.info is info}
    assert len(working) >= 3, f"{info.name} works on {working} only"
    assert len(undeclared) <= 4, f"{info.name}: declare what it needs that {undeclared} lack"


@METHODS
def test_every_layer_kind_that_is_declared_has_a_case(info: lp.MethodInfo) -> None:
    missing, adapts = set(info.layer_kinds) - {"module"}, False
    for case in (case for case in WORKING if case.strategy.info is info):
        sites = [e.site for e in case.strategy.plan(lp.anatomy_of(case.fresh())).edits if isinstance(e, SiteEdit)]
        missing, adapts = missing - {site.spec.kind for site in sites}, adapts or bool(sites)
        if not missing:
            return
    assert not adapts, f"no case adapts {missing}"  # what trains in place is chosen by its name, whatever kind it is


def test_the_suite_covers_every_backbone_and_method() -> None:
    assert {case.backbone.name for case in ALL} == set(BACKBONES)
    assert {case.strategy.info.name for case in ALL} == {info.name for info in lp.list_methods()}


@METHODS
def test_strategy_to_plain_values_and_back_is_equality(info: lp.MethodInfo) -> None:
    strategy = example(info)
    for text in (json.dumps(strategy.to_dict()), yaml.safe_dump(strategy.to_dict())):
        again = lp.resolve(yaml.safe_load(text))
        assert again == strategy
        assert type(again) is type(strategy)
        assert hash(again) == hash(strategy)
    assert strategy in {strategy: 1}


@METHODS
def test_strategy_is_immutable(info: lp.MethodInfo) -> None:
    strategy = example(info)
    with pytest.raises(AttributeError):
        strategy.targets = "all-linear"  # type: ignore[misc]


@METHODS
def test_a_misspelt_option_is_refused_with_the_nearest(info: lp.MethodInfo) -> None:
    with pytest.raises(PEFTError, match="unknown option 'targetz'.*targets"):
        lp.resolve({"class_path": info.cls.__name__, "init_args": {"targetz": "all-linear"}})


@METHODS
def test_record_is_complete(info: lp.MethodInfo) -> None:
    assert re.fullmatch(r"[a-z0-9_]+", info.name)
    assert info.summary.endswith(".")
    assert info.paper
    assert info.cls.info is info
    assert info.cls.__doc__
    assert info.lr > 0
    assert lp.get_method(info.name) is lp.get_method(info.cls.__name__) is info
    assert all(isinstance(part, lp.PEFTStrategy) for part in members(example(info)))
