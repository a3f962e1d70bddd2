"""SSF, arXiv 2210.08823: a scale and a shift after every operation, merged exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError
from tests.backbones import BACKBONES, DIM, FFN, MLP, ConvNet, run

D = torch.float64
X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p))


def test_count_on_a_vision_transformer() -> None:
    # Patch embedding, per block q, k, v, projection, fc1, fc2 and two norms, and the final norm.
    handle = lp.inject(BACKBONES["vit"].fresh(), "ssf")
    per_block = 4 * DIM + FFN + DIM + 2 * DIM
    assert handle.num_trainable() == 2 * (DIM + 2 * per_block + DIM)
    assert len(handle.entries) == 1 + 2 * 8 + 1


def test_mlp_against_dense_float64() -> None:
    model = MLP().to(D)
    handle = lp.inject(model, lp.SSF(targets=["l1", "l2"]))
    randomize(handle)
    one, two = (e.adapter for e in handle.entries)
    hidden = torch.tanh(one.scale * F.linear(X, model.l1.weight, model.l1.bias) + one.shift)
    expected = two.scale * F.linear(hidden, model.l2.weight) + two.shift
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(MergeError, match="l2.*needs a bias.*add_bias=True"):
        handle.merge()
    handle.merge(add_bias=True)
    assert model.l2.bias is not None
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    handle.unmerge()
    assert model.l2.bias is None
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


def test_convolutions_and_norms_are_scaled_along_their_channels() -> None:
    model = ConvNet().to(D).eval()
    x = torch.randn(2, 3, 9, 9, dtype=D)
    handle = lp.inject(model, lp.SSF(targets=["stem", "norm", "body"]))
    randomize(handle)
    stem, norm, body = (e.adapter for e in handle.entries)

    def shifted(y: Tensor, adapter: nn.Module) -> Tensor:
        return adapter.scale[:, None, None] * y + adapter.shift[:, None, None]

    h = shifted(F.conv2d(x, model.stem.weight, None, 2, 1), stem)
    n = model.norm
    h = torch.tanh(shifted(F.batch_norm(h, n.running_mean, n.running_var, n.weight, n.bias), norm))
    h = F.conv2d(F.pad(h, (2, 2, 2, 2), mode="reflect"), model.body.weight, model.body.bias, dilation=2)
    expected = model.classifier(torch.tanh(shifted(h, body)).mean((-1, -2)))
    torch.testing.assert_close(model(x), expected)


def test_a_norm_without_bias_is_scaled_only() -> None:
    model = BACKBONES["llama"].fresh(D)
    handle = lp.inject(model, lp.SSF(targets="norm"))
    assert handle.num_trainable() == 5 * DIM
    assert {name for e in handle.entries for name, _ in e.adapter.named_parameters()} == {"scale"}
    plain = BACKBONES["llama"].fresh(D)
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            plain.get_submodule(entry.path).weight.mul_(entry.adapter.scale)
    batch = BACKBONES["llama"].batch()
    torch.testing.assert_close(run(model, batch), run(plain, batch))


def test_paper_initialisation_is_near_the_base_and_not_on_it() -> None:
    backbone = BACKBONES["vit"]
    model = backbone.fresh()
    handle = lp.inject(model, lp.SSF(init="normal"))
    assert not handle.strategy.identity_at_init
    scales = torch.cat([e.adapter.scale for e in handle.entries])
    shifts = torch.cat([e.adapter.shift for e in handle.entries])
    assert abs(scales.mean() - 1) < 0.005
    assert abs(shifts.mean()) < 0.005
    assert 0.015 < scales.std() < 0.025
    assert 0.015 < shifts.std() < 0.025
    assert not torch.equal(run(model, backbone.batch()), run(backbone.fresh(), backbone.batch()))
    with pytest.raises(ConfigError, match="init='paper'.*identity.*normal"):
        lp.SSF(init="paper")  # type: ignore[arg-type]


def test_gradients_equal_plain_autograd() -> None:
    model = MLP().to(D)
    handle = lp.inject(model, lp.SSF(targets=["l1", "l2"]))
    randomize(handle)
    plain = [p.detach().clone().requires_grad_() for p in handle.trainable_parameters()]
    model(X).square().sum().backward()
    hidden = torch.tanh(plain[0] * F.linear(X, model.l1.weight, model.l1.bias) + plain[1])
    (plain[2] * F.linear(hidden, model.l2.weight) + plain[3]).square().sum().backward()
    for ours, reference in zip(handle.trainable_parameters(), plain, strict=True):
        torch.testing.assert_close(ours.grad, reference.grad)
