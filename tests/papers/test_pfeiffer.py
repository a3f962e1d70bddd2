"""Pfeiffer adapters, arXiv 2005.00247: one bottleneck per block; a post-norm runs before it and after it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import UnsupportedLayerError
from tests.backbones import BACKBONES, DIM, run

D = torch.float64


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.2)


def ad(adapter: nn.Module, h: Tensor) -> Tensor:
    return F.relu(h @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "torch_encoder"])
def test_count_is_half_of_houlsby(name: str) -> None:
    handle = lp.inject(BACKBONES[name].fresh(), lp.PfeifferAdapter(width=4))
    assert handle.num_trainable() == 2 * (2 * DIM * 4 + 4 + DIM), "L blocks x (2dr + r + d)"
    assert len(handle.entries) == 2


def test_a_post_norm_block_equals_the_paper() -> None:
    model = BACKBONES["bert"].fresh(D)
    handle = lp.inject(model, lp.PfeifferAdapter(width=4))
    randomize(handle)
    assert [e.path for e in handle.entries] == [f"bert.encoder.layer.{i}.output.LayerNorm" for i in (0, 1)]
    block, x = model.bert.encoder.layer[0], torch.randn(2, 5, DIM, dtype=D)
    norm = block.output.LayerNorm
    with torch.no_grad():
        found = block(x)
        found = found[0] if isinstance(found, tuple) else found
        x = block.attention.output(block.attention.self(x)[0], x)
        h = block.output.dense(block.intermediate(x))
        t = F.layer_norm(h + x, (DIM,), norm.weight, norm.bias, norm.eps)
        expected = F.layer_norm(h + ad(handle.entries[0].adapter, t) + x, (DIM,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected)


def test_a_pre_norm_block_has_it_in_series() -> None:
    model = BACKBONES["llama"].fresh(D)
    handle = lp.inject(model, lp.PfeifferAdapter(width=4))
    randomize(handle)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, DIM, dtype=D)
    h = F.linear(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    torch.testing.assert_close(mlp(x), h + ad(handle.entries[0].adapter, h))


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_layers_know_where_their_norm_is(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 4, 24, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(D).eval()
    handle = lp.inject(model, lp.PfeifferAdapter(width=4))
    randomize(handle)
    assert handle.entries[0].path == ("layers.0.linear2" if norm_first else "layers.0.norm2")


def test_initialisations() -> None:
    backbone = BACKBONES["bert"]
    base = run(backbone.fresh().requires_grad_(False), backbone.batch())
    model = backbone.fresh()
    handle = lp.inject(model, lp.PfeifferAdapter(width=8, init="bert"))
    assert not handle.strategy.identity_at_init
    assert 0 < (run(model, backbone.batch()) - base).abs().max() < 0.1
    down = torch.cat([e.adapter.down.flatten() for e in handle.entries])
    assert 0.017 < down.std() < 0.023


def test_gradients_equal_plain_autograd() -> None:
    model = BACKBONES["bert"].fresh(D)
    handle = lp.inject(model, lp.PfeifferAdapter(width=4))
    randomize(handle)
    norm, adapter = model.bert.encoder.layer[0].output.LayerNorm, handle.entries[0].adapter
    s = torch.randn(3, DIM, dtype=D)
    norm(s).square().sum().backward()
    found = [p.grad.clone() for p in adapter.parameters()]
    model.zero_grad()
    t = F.layer_norm(s, (DIM,), norm.weight, norm.bias, norm.eps)
    F.layer_norm(s + ad(adapter, t), (DIM,), norm.weight, norm.bias, norm.eps).square().sum().backward()
    for one, other in zip(found, adapter.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad)


def test_other_targets_have_it_in_series() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), lp.PfeifferAdapter(width=4, targets="attention.output"))
    assert all(e.path.endswith("attention.output.dense") for e in handle.entries)
    with pytest.raises(UnsupportedLayerError, match="kind 'tensor'"):
        lp.inject(BACKBONES["torch_encoder"].fresh(), lp.PfeifferAdapter(width=4, targets="attention.output"))
