"""The baselines: everything trains, or the head only."""

from __future__ import annotations

import pytest
import torch

import lightning_peft as lp
from lightning_peft.errors import TargetError
from tests.backbones import BACKBONES, loss_of


@pytest.mark.parametrize("name", list(BACKBONES))
def test_full_trains_every_parameter_once(name: str) -> None:
    model = BACKBONES[name].fresh()
    handle = lp.inject(model, "full")
    assert {id(p) for p in handle.trainable_parameters()} == {id(p) for p in model.parameters()}
    assert handle.num_trainable() == sum(p.numel() for p in model.parameters()), "tied parameters count once"


@pytest.mark.parametrize("name", ["bert", "gpt2", "conv_net"])
def test_full_trains_as_the_plain_model_does(name: str) -> None:
    backbone = BACKBONES[name]
    plain, model = backbone.fresh(), backbone.fresh()
    handle = lp.inject(model, "full")
    for net, parameters in ((plain, list(plain.parameters())), (model, handle.trainable_parameters())):
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        for _ in range(3):
            loss_of(net(**backbone.batch())).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("vit", {"classifier.weight", "classifier.bias"}),
        ("llama", {"lm_head.weight"}),
    ],
)
def test_head_trains_the_head(name: str, expected: set[str]) -> None:
    handle = lp.inject(BACKBONES[name].fresh(), "head")
    assert {s.key for s in handle.slots} == expected


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_tied_head_is_refused(name: str) -> None:
    with pytest.raises(TargetError, match="tied"):
        lp.inject(BACKBONES[name].fresh(), "head")


def test_head_with_targets_trains_those_layers() -> None:
    handle = lp.inject(BACKBONES["conv_net"].fresh(), lp.Head(targets=["classifier", "body"]))
    assert {s.key for s in handle.slots} == {"classifier.weight", "classifier.bias", "body.weight", "body.bias"}
