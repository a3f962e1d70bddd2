"""Optimizer, groups by owner and schedule of PEFTLightningModule."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import transformers
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.strategies.reparameterized.lora import LoRA
from lightning_peft.training.callback import PEFTCallback
from lightning_peft.training.module import PEFTLightningModule
from lightning_peft.training.param_groups import parameter_groups, set_rates
from lightning_peft.training.schedulers import factor
from tests.training import tiny
from tests.training.tiny import loader, ragged, trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


def _module(strategy="lora", **options):
    return PEFTLightningModule(strategy, transformers.GPT2LMHeadModel(tiny.gpt2()), **options)


def _fit(module, **options):
    generator = torch.Generator().manual_seed(0)
    run = trainer(**options)
    data = loader([ragged([6, 4], generator=generator) for _ in range(10)])
    run.fit(module, data)
    return run


def test_the_defaults_are_adamw_at_the_methods_own_rate_with_warmup_and_cosine():
    module = _module(warmup=0.2)
    rates = []
    module.on_before_zero_grad = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"])
    run = _fit(module, max_epochs=2)  # 20 steps, 4 of warm-up
    (optimizer,) = run.optimizers
    assert type(optimizer) is AdamW
    peak = LoRA.info.lr
    expected = [peak * factor(s, name="cosine", warmup=4, total=20) for s in range(20)]
    assert rates[-20:] == pytest.approx(expected)
    assert expected[0] == pytest.approx(peak / 4)
    assert max(expected) == peak
    assert factor(20, name="cosine", warmup=4, total=20) == pytest.approx(0)
    assert factor(12, name="linear", warmup=4, total=20) == pytest.approx(0.5)


def test_every_trainable_parameter_is_in_one_group_and_only_matrices_decay():
    module = _module(LoRA(bias="adapted"), weight_decay=0.1)
    groups = parameter_groups(module, weight_decay=0.1)
    listed = [p for g in groups for p in g["params"]]
    assert {id(p) for p in listed} == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(listed) == len({id(p) for p in listed})
    for group in groups:
        assert {p.dim() > 1 for p in group["params"]} == {group["weight_decay"] > 0}
    assert {g["weight_decay"] for g in groups} == {0.0, 0.1}


def test_owners_have_groups_of_their_own():
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    base = transformers.BertForSequenceClassification(tiny.bert(**labels))
    module = PEFTLightningModule("lora", base, "sequence_classification")
    names = {g["name"]: {id(p) for p in g["params"]} for g in parameter_groups(module, weight_decay=0.0)}
    assert set(names) == {"default-decay_0", "extra-decay_0"}
    assert names["extra-decay_0"] == {id(p) for p in base.classifier.parameters()}


def test_a_new_head_may_have_a_rate_of_its_own():
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    base = transformers.BertForSequenceClassification(tiny.bert(**labels))
    module = PEFTLightningModule("lora_plus", base, "sequence_classification", lr=1e-4, extra_lr=1e-2)
    optimizer = SGD(parameter_groups(module, weight_decay=0.1, extra_lr=module.extra_lr), lr=1.0)
    set_rates(optimizer, module.lr)
    head = {id(p) for p in base.classifier.parameters()}
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[p] for p in head} == {1e-2}
    assert sorted({rate for p, rate in rates.items() if p not in head}) == pytest.approx([1e-4, 16e-4])
    with pytest.raises(ConfigError, match="extra_lr=-1"):
        PEFTLightningModule("lora", base, "sequence_classification", extra_lr=-1)


def test_combinators_suggest_what_their_parts_do():
    assert lp.Gated(part="lora").suggested == lp.Mixture(part="lora").suggested == (LoRA.info.lr, LoRA.info.weight_decay)
    assert lp.AdaMix(part="lora").suggested == (lp.AdaMix.info.lr, lp.AdaMix.info.weight_decay)
    assert lp.MAM().suggested == (lp.MAM.info.lr, lp.MAM.info.weight_decay)


def test_a_methods_options_scale_the_rate_and_are_not_split_again(monkeypatch):
    monkeypatch.setattr(LoRA, "group_options", lambda self, slot: {"lr_scale": 16.0} if slot.attribute == "lora_B" else {})
    module = _module(lr=1e-3, lr_scheduler=None)
    run = _fit(module)
    (optimizer,) = run.optimizers
    assert sorted(g["lr"] for g in optimizer.param_groups) == pytest.approx([1e-3, 16e-3])
    fast = max(optimizer.param_groups, key=lambda g: g["lr"])
    assert {id(p) for p in fast["params"]} == {id(s.tensor()) for s in module.handle.slots if s.attribute == "lora_B"}
    own = SGD(parameter_groups(module, weight_decay=0.0), lr=2.0)
    set_rates(own, None)
    assert sorted(g["lr"] for g in own.param_groups) == [2.0, 32.0]


@pytest.mark.parametrize("lr", [2e-3, 2e-5, 1.0])
def test_a_rate_ten_times_away_from_the_methods_own_warns(lr):
    with pytest.warns(UserWarning, match="what lora usually trains with"):
        _fit(_module(lr=lr), max_steps=1)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1.9e-3},
        {"lr": 2.1e-5},
        {"lr": "auto"},
        {"optimizer": partial(AdamW, lr=1e-3)},
        {"optimizer": partial(SGD, lr=1.0)},  # the suggestion is for Adam-like optimizers
    ],
)
def test_rates_near_the_methods_own_do_not_warn(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*LeafSpec|You defined a|.*workers|.*logging interval")
        _fit(_module(**options), max_steps=1)


def test_an_optimizer_of_ones_own_keeps_its_rate_unless_lr_is_a_number():
    run = _fit(_module(optimizer=partial(Adam, lr=3e-4), lr_scheduler=None), max_steps=1)
    assert type(run.optimizers[0]) is Adam
    assert run.optimizers[0].param_groups[0]["lr"] == 3e-4
    run = _fit(_module(optimizer=partial(Adam, lr=3e-4), lr=1e-4, lr_scheduler=None), max_steps=1)
    assert run.optimizers[0].param_groups[0]["lr"] == 1e-4


def test_schedulers_of_ones_own():
    module = _module(lr=1e-3, lr_scheduler=partial(StepLR, step_size=1, gamma=0.5), lr_scheduler_interval="epoch")
    run = _fit(module, max_epochs=2)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25e-3)
    module = _module(lr=1e-3, lr_scheduler=lambda o: ReduceLROnPlateau(o))
    module.trainer = trainer()
    assert module.configure_optimizers()["lr_scheduler"]["monitor"] == "val_loss"


def test_the_rate_of_a_composition_is_its_most_careful_part():
    assert _module([LoRA(), "bitfit"]).strategy.suggested[0] == min(LoRA.info.lr, 1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 11}, "between 0 and the 10"),
        ({"warmup": -1}, "between 0"),
        ({"lr_scheduler": "cosin"}, "cosine, linear, constant"),
        ({"lr": "fast"}, "neither a number"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        _fit(_module(**options))


def test_a_run_without_end_has_no_cosine():
    with pytest.raises(ConfigError, match="need a run with an end"):
        _fit(_module(), max_epochs=-1)


def test_the_callback_agrees_with_the_groups():
    """PEFTCallback finds nothing to add to, or to split in, the groups that the module made."""
    run = _fit(_module(lr_scheduler=None))
    assert any(isinstance(c, PEFTCallback) for c in run.callbacks)
    assert len(run.optimizers[0].param_groups) == 1
