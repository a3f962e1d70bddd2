"""The registry and ``resolve``: one reading of Python, YAML and checkpoints; every wrong word is a typed error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, UnknownMethodError
from lightning_peft.strategies import registry
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.edits import Plan
from lightning_peft.types import FrozenDict


@pytest.fixture
def clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    yield
    registry._load_entry_points.cache_clear()


def third_party(**info: Any) -> type[lp.PEFTStrategy]:
    @lp.register(**{"name": "mine", "family": "selective", "summary": "Mine.", "paper": "none", **info})
    @dataclass(frozen=True, kw_only=True)
    class Mine(lp.PEFTStrategy):
        """A third party's method."""

        size: int

        def plan(self, anatomy: Anatomy) -> Plan:
            return Plan(())

    return Mine


@pytest.mark.parametrize(
    "spec",
    [
        lp.LoRA(rank=4, targets=("q_proj",)),
        {"class_path": "LoRA", "init_args": {"rank": 4, "targets": ["q_proj"]}},
        {"class_path": "lora", "init_args": {"rank": 4, "targets": "q_proj"}},
        {"class_path": "lightning_peft.LoRA", "init_args": {"rank": 4, "targets": {"include": ["q_proj"]}}},
    ],
)
def test_every_spelling_gives_the_same_strategy(spec: Any) -> None:
    assert lp.resolve(spec) == lp.LoRA(rank=4, targets="q_proj")


def test_a_name_means_the_defaults_and_a_list_composes() -> None:
    assert lp.resolve("lora") == lp.resolve("LoRA") == lp.resolve({"class_path": "LoRA"}) == lp.LoRA()
    composed = lp.resolve(["bitfit", {"class_path": "LoRA", "init_args": {"rank": 2}}])
    assert composed == lp.Compose(parts=(lp.BitFit(), lp.LoRA(rank=2)))


@pytest.mark.parametrize(
    ("spec", "error", "match"),
    [
        ("lroa", UnknownMethodError, "'lora'"),
        ({"class_path": "LoRa"}, UnknownMethodError, "LoRA"),
        ({"rank": 4}, ConfigError, "class_path"),
        ({"class_path": "LoRA", "args": {}}, ConfigError, "'args'"),
        ({"class_path": "LoRA", "init_args": {"rnak": 4}}, ConfigError, "'rnak'.*'rank'"),
        ({"class_path": "LoRA", "init_args": {"rank": "4"}}, ConfigError, "rank='4'.*int"),
        ({"class_path": "LoRA", "init_args": {"rank": 2.5}}, ConfigError, "rank=2.5"),
        ({"class_path": "LoRA", "init_args": {"rank": True}}, ConfigError, "rank=True"),
        ({"class_path": "LoRA", "init_args": {"rank": None}}, ConfigError, "rank=None"),
        ({"class_path": "LoRA", "init_args": {"init": "pizza"}}, ConfigError, "pizza"),
        ({"class_path": "LoRA", "init_args": {"rank_per_target": {"q_proj": "x"}}}, ConfigError, "rank_per_target"),
        ({"class_path": "LoRA", "init_args": {"targets": {"inclde": ["x"]}}}, ConfigError, "include"),
        ({"class_path": "LoRA", "init_args": {"targets": []}}, ConfigError, "include"),
        ({"class_path": "LoRA", "init_args": {"targets": 3}}, ConfigError, "targets"),
        (3, ConfigError, "int"),
        (None, ConfigError, "NoneType"),
        ([], ConfigError, "two or more"),
        (["lora"], ConfigError, "two or more"),
        (["lora", "bitfti"], UnknownMethodError, "bitfit"),
        ({"class_path": "Compose", "init_args": {"parts": ["lora", "bitfit"], "targets": "x"}}, ConfigError, "parts"),
    ],
)
def test_a_wrong_word_is_a_typed_error(spec: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        lp.resolve(spec)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: lp.LoRA(rank=0), "rank"),
        (lambda: lp.LoRA(rank=-3), "rank"),
        (lambda: lp.LoRA(rank=2.5), "rank"),
        (lambda: lp.LoRA(rank="8"), "rank"),
        (lambda: lp.LoRA(alpha=0), "alpha"),
        (lambda: lp.LoRA(alpha=float("nan")), "alpha"),
        (lambda: lp.LoRA(alpha=float("inf")), "alpha"),
        (lambda: lp.LoRA(dropout=1.0), "dropout"),
        (lambda: lp.LoRA(dropout=-0.1), "dropout"),
        (lambda: lp.LoRA(bias="some"), "bias"),
        (lambda: lp.LoRA(init="pizza"), "init"),
        (lambda: lp.LoRA(rank_per_target={"q": 0}), "rank_per_target"),
        (lambda: lp.LoRA(alpha_per_target={"q": -1.0}), "alpha_per_target"),
        (lambda: lp.VeRA(rank=0), "rank"),
        (lambda: lp.VeRA(d_initial=0.0), "d_initial"),
        (lambda: lp.AdaLoRA(target_rank=13), "target_rank"),
        (lambda: lp.AdaLoRA(beta1=1.0), "beta1"),
        (lambda: lp.AdaLoRA(interval=0), "interval"),
        (lambda: lp.HoulsbyAdapter(width=0), "width"),
        (lambda: lp.HoulsbyAdapter(reduction_factor=0), "reduction_factor"),
        (lambda: lp.HoulsbyAdapter(activation="swish2"), "activation"),
        (lambda: lp.HoulsbyAdapter(init="zeros"), "init"),
        (lambda: lp.Full(targets="head"), "targets"),
    ],
)
def test_a_hyperparameter_out_of_range_names_itself(make: Any, field: str) -> None:
    with pytest.raises(lp.PEFTError, match=field) as caught:
        make()
    assert isinstance(caught.value, ValueError)


def test_strategies_are_values() -> None:
    a = lp.LoRA(rank=4, targets=["q_proj"], rank_per_target={"x": 2})
    b = lp.LoRA(rank=4, targets=("q_proj",), rank_per_target={"x": 2})
    assert a == b
    assert len({a, b, lp.LoRA(rank=5)}) == 2
    assert copy.deepcopy(a) == a
    assert pickle.loads(pickle.dumps(a)) == a
    with pytest.raises(TypeError, match="immutable"):
        a.rank_per_target["y"] = 3
    table = a.rank_per_target
    with pytest.raises(TypeError, match="immutable"):
        table |= {"y": 3}
    assert a == b


def test_a_frozen_dict_refuses_every_change() -> None:
    frozen = FrozenDict({"a": 1})
    for change in (
        lambda: frozen.__setitem__("b", 2),
        lambda: frozen.update(b=2),
        lambda: frozen.pop("a"),
        lambda: frozen.clear(),
        lambda: frozen.setdefault("b", 2),
        lambda: frozen.__ior__({"b": 2}),
        lambda: frozen.__delitem__("a"),
        lambda: frozen.popitem(),
    ):
        with pytest.raises(TypeError):
            change()
    assert frozen == {"a": 1}
    assert hash(frozen) == hash(FrozenDict({"a": 1}))


@pytest.mark.usefixtures("clean_registry")
def test_a_third_party_method_registers_itself_and_a_clash_is_an_error() -> None:
    cls = third_party()
    assert lp.get_method("mine").cls is cls
    assert cls.info in lp.list_methods()
    assert lp.resolve({"class_path": "Mine", "init_args": {"size": 3}}) == cls(size=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="'size' has no default"):
        lp.resolve("mine")
    with pytest.raises(ConflictError, match="lora"):
        third_party(name="lora")
    assert lp.get_method("lora").cls is lp.LoRA


@pytest.mark.usefixtures("clean_registry")
def test_entry_points_load_at_the_first_query_and_a_broken_one_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name, value = "broken", "nowhere:Nothing"

        def load(self) -> None:
            raise ImportError("no such module")

    class Good(Entry):
        name, value = "mine", "here:Mine"

        def load(self) -> type[lp.PEFTStrategy]:
            return third_party()

    registry._load_entry_points.cache_clear()
    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(), Good()] if group == "lightning_peft.methods" else [])
    with pytest.warns(UserWarning, match="broken.*no such module"):
        methods = lp.list_methods()
    assert {"mine", "lora"} <= {m.name for m in methods}
    registry._load_entry_points.cache_clear()


def test_methods_are_listed_by_name_with_a_family_that_is_their_folder() -> None:
    infos = lp.list_methods()
    assert [i.name for i in infos] == sorted(i.name for i in infos)
    for info in infos:
        module = info.cls.__module__
        if module.startswith("lightning_peft.strategies."):
            folder = module.split(".")[2]
            assert folder == info.family or (folder == "baselines" and info.family == "baseline")


@pytest.mark.parametrize("spec", [{"class_path": None}, {"class_path": "LoRA", "init_args": [1]}, {"class_path": ["LoRA"]}])
def test_a_mapping_of_the_wrong_shape_is_a_typed_error(spec: Any) -> None:
    with pytest.raises(ConfigError, match="a name and a mapping are needed"):
        lp.resolve(spec)
