"""Parallel adapters, arXiv 2110.04366: a bottleneck that reads what the sub-layer reads, and adds to what it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import lightning_peft as lp
from lightning_peft.errors import ConfigError, PortError, TargetError, UnsupportedLayerError
from lightning_peft.surgery import sublayers
from tests.backbones import BACKBONES, DIM, FFN, bert, llama, run

D = torch.float64


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.2)


def adapter_of(handle: lp.Handle) -> nn.Module:
    return next(e.adapter for e in handle.entries if hasattr(e.adapter, "down"))


def ad(adapter: nn.Module, x: Tensor, scaling: float = 4.0) -> Tensor:
    return scaling * (F.relu(x @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias)


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "gpt2", "torch_encoder"])
def test_count(name: str) -> None:
    handle = lp.inject(BACKBONES[name].fresh(), lp.ParallelAdapter(width=4))
    assert handle.num_trainable() == 2 * (2 * DIM * 4 + 4 + DIM), "L blocks x (2dr + r + d)"
    assert {s.key.rpartition(".")[2] for s in handle.slots} == {"down", "down_bias", "up", "up_bias"}


def test_reads_the_input_of_the_sub_layer_where_no_module_stands_for_it() -> None:
    model = BACKBONES["bert"].fresh(D)
    handle = lp.inject(model, lp.ParallelAdapter(width=4))
    randomize(handle)
    block, x = model.bert.encoder.layer[0], torch.randn(2, 5, DIM, dtype=D)
    found = block.feed_forward_chunk(x)
    h = F.gelu(F.linear(x, block.intermediate.dense.weight, block.intermediate.dense.bias))
    h = F.linear(h, block.output.dense.weight, block.output.dense.bias) + ad(adapter_of(handle), x)
    torch.testing.assert_close(found, block.output.LayerNorm(h + x))


def test_reads_behind_the_pre_norm() -> None:
    model = BACKBONES["llama"].fresh(D)
    handle = lp.inject(model, lp.ParallelAdapter(width=4, scaling=1.0, activation="silu"))
    randomize(handle)
    mlp, x, a = model.model.layers[0].mlp, torch.randn(2, 5, DIM, dtype=D), adapter_of(handle)
    h = F.linear(F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight), mlp.down_proj.weight)
    torch.testing.assert_close(mlp(x), h + F.silu(x @ a.down.T + a.down_bias) @ a.up.T + a.up_bias)


def test_attention() -> None:
    model = BACKBONES["vit"].fresh(D)
    handle = lp.inject(model, lp.ParallelAdapter(width=4, targets="attention.output"))
    plain = copy.deepcopy(model)
    randomize(handle)
    x = torch.randn(2, 5, DIM, dtype=D)
    with lp.handles(plain)["default"].disabled():
        base = plain.vit.layers[0].attention(x)[0]
    torch.testing.assert_close(model.vit.layers[0].attention(x)[0], base + ad(adapter_of(handle), x))


def test_cross_attention_is_a_sub_layer_of_its_own() -> None:
    model = BACKBONES["t5"].fresh()
    handle = lp.inject(model, lp.ParallelAdapter(width=4, targets=["attention.output", "mlp.down"]))
    randomize(handle)
    assert sum(hasattr(e.adapter, "down") for e in handle.entries) == 3 + 2
    assert run(model, BACKBONES["t5"].batch()).isfinite().all()


def test_on_a_relu_network_it_is_a_wider_hidden_layer() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 4, FFN, dropout=0.0, activation="relu", batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).to(D).eval()
    wide = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(DIM, 4, FFN + 6, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
    ).to(D).eval()  # fmt: skip
    state = model.state_dict()
    handle = lp.inject(model, lp.ParallelAdapter(width=6, scaling=4.0))
    randomize(handle)
    a = adapter_of(handle)
    state = {
        **state,
        "layers.0.linear1.weight": torch.cat([state["layers.0.linear1.weight"], a.down]),
        "layers.0.linear1.bias": torch.cat([state["layers.0.linear1.bias"], a.down_bias]),
        "layers.0.linear2.weight": torch.cat([state["layers.0.linear2.weight"], 4.0 * a.up], 1),
        "layers.0.linear2.bias": state["layers.0.linear2.bias"] + 4.0 * a.up_bias,
    }
    wide.load_state_dict(state)
    x = torch.randn(2, 5, DIM, dtype=D)
    torch.testing.assert_close(model(x), wide(x))


def test_gradients_equal_plain_autograd_also_when_recomputed_and_run_twice() -> None:
    model = BACKBONES["bert"].fresh(D)
    handle = lp.inject(model, lp.ParallelAdapter(width=4))
    randomize(handle)
    block, a = model.bert.encoder.layer[0], adapter_of(handle)
    x, other = torch.randn(2, 5, DIM, dtype=D), torch.randn(2, 5, DIM, dtype=D)

    def plain(x: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, block.intermediate.dense.weight, block.intermediate.dense.bias))
        h = F.linear(h, block.output.dense.weight, block.output.dense.bias) + ad(a, x)
        return block.output.LayerNorm(h + x)

    def gradients(layer: Callable[[Tensor], Tensor]) -> list[Tensor]:
        model.zero_grad()
        (layer(x).square().sum() + layer(other).sin().sum()).backward()  # a second forward before the one backward
        return [p.grad.clone() for p in a.parameters()]

    expected = gradients(plain)
    for layer in (block.feed_forward_chunk, lambda x: checkpoint(block.feed_forward_chunk, x, use_reentrant=False)):
        for found, reference in zip(gradients(layer), expected, strict=True):
            torch.testing.assert_close(found, reference)


def test_nothing_is_kept_between_calls() -> None:
    model = BACKBONES["gpt2"].fresh()
    lp.inject(model, lp.ParallelAdapter(width=4))
    run(model, BACKBONES["gpt2"].batch())
    assert sublayers._RUNNING.inputs == {}


def test_two_of_them_and_their_copies_keep_their_notes_apart() -> None:
    batch = BACKBONES["llama"].batch()
    model = BACKBONES["llama"].fresh()
    first, second = (lp.inject(model, lp.ParallelAdapter(width=w), name) for w, name in ((2, "first"), (3, "second")))
    randomize(first)
    alone = run(model, batch)
    randomize(second)
    both = run(model, batch)
    assert torch.equal(run(copy.deepcopy(model), batch), both)
    with second.disabled():
        assert torch.equal(run(model, batch), alone)
    composed = BACKBONES["llama"].fresh()
    handle = lp.inject(composed, [lp.ParallelAdapter(width=2), lp.ParallelAdapter(width=3)])
    with torch.no_grad():
        for target, source in zip(
            [s.tensor() for label in "01" for s in handle.slots if s.label == label],
            [*first.trainable_parameters(), *second.trainable_parameters()],
            strict=True,
        ):
            target.copy_(source)
    torch.testing.assert_close(run(composed, batch), both)


def test_a_last_layer_that_runs_alone_is_refused() -> None:
    model = llama()
    lp.inject(model, lp.ParallelAdapter(width=4))
    with pytest.raises(PortError, match="before the first layer of its sub-layer"):
        model.model.layers[0].mlp.down_proj(torch.randn(2, FFN))


def test_refusals() -> None:
    with pytest.raises(TargetError, match="mlp.down or attention.output"):
        lp.inject(bert(), lp.ParallelAdapter(width=4, targets="attention.query"))
    with pytest.raises(UnsupportedLayerError):
        lp.inject(BACKBONES["torch_encoder"].fresh(), lp.ParallelAdapter(width=4, targets="attention.output"))
    with pytest.raises(ConfigError, match="scaling=0"):
        lp.ParallelAdapter(scaling=0.0)
    with pytest.raises(ConfigError, match="width 17"):
        lp.inject(bert(), lp.ParallelAdapter(width=17))
