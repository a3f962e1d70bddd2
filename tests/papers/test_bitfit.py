"""BitFit, arXiv 2106.10199: the biases train, nothing else does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import TargetError
from tests.backbones import BACKBONES, loss_of


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "clip", "torch_encoder", "conv_net", "attention"])
def test_every_bias_and_nothing_else(name: str) -> None:
    model = BACKBONES[name].fresh()
    names = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    handle = lp.inject(model, "bitfit")
    assert {s.key for s in handle.slots} == names
    assert handle.num_trainable() == sum(model.get_parameter(n).numel() for n in names)
    assert list(model.state_dict()) == list(BACKBONES[name].fresh().state_dict()), "no tensor is added"


def test_weight_decay_moves_no_frozen_weight() -> None:
    backbone = BACKBONES["bert"]
    model = backbone.fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = lp.inject(model, "bitfit")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)  # a user's own, over everything
    for _ in range(5):
        loss_of(model(**backbone.batch())).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {s.key for s in handle.slots}


def test_targets_choose_biases() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), lp.BitFit(targets=["attention.query", "mlp.up"]))
    assert {s.key.removeprefix("bert.encoder.layer.")[2:] for s in handle.slots} == {
        "attention.self.query.bias",
        "intermediate.dense.bias",
    }


def test_a_model_without_biases_is_refused() -> None:
    model = BACKBONES["t5"].fresh()
    with pytest.raises(TargetError, match="no bias"):
        lp.inject(model, "bitfit")
    with pytest.raises(TargetError, match="no bias"):
        lp.inject(BACKBONES["conv_net"].fresh(), lp.BitFit(targets="stem"))


def test_a_layer_that_is_merely_called_bias_is_no_bias() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias_net, self.unbiased = nn.Linear(3, 3, bias=False), nn.Linear(3, 3)

    handle = lp.inject(Net(), "bitfit")
    assert {s.key for s in handle.slots} == {"unbiased.bias"}


def test_the_state_holds_values_and_merging_keeps_them() -> None:
    backbone = BACKBONES["bert"]
    model = backbone.fresh()
    handle = lp.inject(model, "bitfit")
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(1)
    state = {k: v.clone() for k, v in handle.state_dict().items()}
    handle.merge()
    handle.remove()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
