"""What tests of methods that change a weight share: the reference MLP in float64, and the dense model that a paper's formula makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.nn.adapter import BuildContext, LayerSpec
from tests.backbones import MLP

D = torch.float64
X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def mlp(dtype: torch.dtype = D) -> MLP:
    torch.manual_seed(0)
    return MLP().to(dtype)


def install(model: nn.Module, strategy: lp.PEFTStrategy, name: str = "default") -> lp.Handle:
    torch.manual_seed(3)
    return lp.inject(model, strategy, name)


def randomize(handle: lp.Handle, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=D).to(p.dtype) * scale)


def shapes(handle: lp.Handle) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in handle.state_dict().items()}


def check_dense(model: MLP, handle: lp.Handle, changed: Callable[[Any, Tensor], Tensor]) -> None:
    """Forward, gradients, merged weights and unmerged ones are those of the MLP with weights ``changed(adapter, W)``."""
    entries = {entry.path: entry for entry in handle.entries}
    before = {path: e.module.weight.clone() for path, e in entries.items()}
    weights = {
        p: changed(entries[p].adapter, w) if p in entries else w for p, w in (("l1", model.l1.weight), ("l2", model.l2.weight))
    }
    expected = torch.tanh(F.linear(X, weights["l1"], model.l1.bias)) @ weights["l2"].T
    found = model(X)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = handle.trainable_parameters()
    ours, theirs = (torch.autograd.grad(y.pow(3).sum(), parameters) for y in (found, expected))
    for mine, reference in zip(ours, theirs, strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8)
    handle.merge()
    for path, entry in entries.items():
        torch.testing.assert_close(entry.module.weight, weights[path], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(X), expected, rtol=1e-10, atol=1e-10)
    handle.unmerge()
    for path, entry in entries.items():
        torch.testing.assert_close(entry.module.weight, before[path], rtol=0, atol=1e-12)


def train(model: nn.Module, handle: lp.Handle, steps: int, total: int | None = None, lr: float = 1e-2) -> None:
    """Take AdamW steps with the method's schedule."""
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=lr)
    schedule = handle.strategy.schedule(handle)
    schedule.on_start(total or steps)
    model.train()
    for _ in range(steps):
        model(X).square().mean().backward()
        schedule.before_step(optimizer)
        optimizer.step()
        schedule.after_step(optimizer)
        optimizer.zero_grad()
    model.eval()


def context(out_features: int, in_features: int, **spec: Any) -> BuildContext:
    """Return the place of an adapter that is built by itself."""
    described = LayerSpec("tensor" if spec.get("batch") else "linear", out_features, in_features, dtype=D, **spec)
    return BuildContext(
        "layer", described, lambda: torch.zeros(out_features, in_features, dtype=D), D, torch.device("cpu"), seed=5
    )
