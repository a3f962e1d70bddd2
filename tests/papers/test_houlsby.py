"""Houlsby adapters, arXiv 1902.00751: two bottlenecks per block, before the residual sum and the norm."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import UnsupportedLayerError
from tests.backbones import BACKBONES, DIM, run

D = torch.float64


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.2)


@pytest.mark.parametrize("width", [1, 4, DIM])
@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2"])
def test_count(name: str, width: int) -> None:
    handle = lp.inject(BACKBONES[name].fresh(), lp.HoulsbyAdapter(width=width))
    assert handle.num_trainable() == 2 * 2 * (2 * DIM * width + width + DIM), "L blocks x 2 x (2dr + r + d)"
    assert len(handle.entries) == 4


def test_reduction_factor_gives_the_width() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), lp.HoulsbyAdapter(reduction_factor=8))
    assert {e.adapter.down.shape[0] for e in handle.entries} == {DIM // 8}


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu), ("silu", F.silu), ("tanh", torch.tanh)])
def test_equation(activation: str, function: object) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 6)).to(D)
    handle = lp.inject(model, lp.HoulsbyAdapter(width=3, activation=activation, targets="0"))  # type: ignore[arg-type]
    randomize(handle)
    a, x = handle.entries[0].adapter, torch.randn(4, 10, dtype=D)
    h = F.linear(x, model[0].weight, model[0].bias)
    expected = h + function(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias  # type: ignore[operator]
    torch.testing.assert_close(model(x), expected)


def test_a_block_of_bert_equals_the_paper() -> None:
    # Post-norm block: x <- LN1(x + [a + Ad1(a)]); x <- LN2(x + [u + Ad2(u)]).
    model = BACKBONES["bert"].fresh(D)
    handle = lp.inject(model, lp.HoulsbyAdapter(width=4))
    randomize(handle)
    block = model.bert.encoder.layer[0]
    ads = {e.path: e.adapter for e in handle.entries}

    def series(path: str, h: torch.Tensor) -> torch.Tensor:
        a = ads[f"bert.encoder.layer.0.{path}"]
        return h + F.gelu(h @ a.down.T + a.down_bias) @ a.up.T + a.up_bias

    x = torch.randn(2, 5, DIM, dtype=D)
    with torch.no_grad():
        found = block(x)
        found = found[0] if isinstance(found, tuple) else found
        context = block.attention.self(x)[0]
        out = block.attention.output
        x = out.LayerNorm(x + series("attention.output.dense", F.linear(context, out.dense.weight, out.dense.bias)))
        hidden, out = block.intermediate(x), block.output
        x = out.LayerNorm(x + series("output.dense", F.linear(hidden, out.dense.weight, out.dense.bias)))
    torch.testing.assert_close(found, x)


def test_paper_initialisation_is_near_the_base_and_not_on_it() -> None:
    backbone = BACKBONES["bert"]
    base = run(backbone.fresh().requires_grad_(False), backbone.batch())
    model = backbone.fresh()
    handle = lp.inject(model, lp.HoulsbyAdapter(width=4, init="houlsby"))
    assert not handle.strategy.identity_at_init
    difference = (run(model, backbone.batch()) - base).abs().max()
    assert 0 < difference < 1e-2
    down = torch.cat([e.adapter.down.flatten() for e in handle.entries])
    assert 0.008 < down.std() < 0.012


def test_norms_train_where_asked() -> None:
    model = BACKBONES["bert"].fresh()
    handle = lp.inject(model, lp.HoulsbyAdapter(width=4, train_norms=True))
    claimed = {s.key for s in handle.slots if s.claimed}
    assert claimed == {n for n, _ in model.named_parameters() if "LayerNorm" in n and "peft" not in n}
    assert handle.num_trainable() == 4 * (2 * DIM * 4 + 4 + DIM) + 5 * 2 * DIM


def test_no_unit_is_dead_at_the_start() -> None:
    # A narrow ReLU bottleneck may have no active unit; it would never train.
    for seed in range(5):
        torch.manual_seed(seed)
        backbone = BACKBONES["bert"]
        model = backbone.fresh()
        handle = lp.inject(model, lp.HoulsbyAdapter(width=2))
        optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            sum(v.square().sum() for v in model(**backbone.batch()).values()).backward()
            optimizer.step()
        assert all(p.grad.abs().max() > 0 for p in handle.trainable_parameters())


def test_a_projection_without_a_forward_of_its_own_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="mlp.down"):
        lp.inject(BACKBONES["torch_encoder"].fresh(), lp.HoulsbyAdapter(width=4))
    handle = lp.inject(BACKBONES["torch_encoder"].fresh(), lp.HoulsbyAdapter(width=4, targets="mlp.down"))
    assert len(handle.entries) == 2
