"""Gated, MAM and UniPELT, arXiv 2110.04366 and 2110.07577: gains of layer adapters and prefixes; systems made of other methods."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError, PortError, UnsupportedLayerError
from lightning_peft.nn.gates import Gate, GatedAdapter, InputGate
from lightning_peft.strategies.reparameterized.dylora import RandomRanks
from lightning_peft.surgery.prefixes import PrefixTap
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks
from tests.backbones import BACKBONES, DIM, flat, loss_of, run
from tests.contract.cases import install as contract_install
from tests.papers.toys import D, install, randomize


class Fixed(Gate):
    """A gain that is given, and noted where it is asked for."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def reset_parameters(self) -> None:
        pass

    def forward(self, h: Tensor, channel_dim: int = -1) -> Tensor:
        return h.new_full((len(h), *(1,) * (h.dim() - 1)), self.value)


def fix(handle: lp.Handle, value: float) -> None:
    for entry in handle.entries:
        if isinstance(entry.adapter, GatedAdapter | PrefixTap):
            entry.adapter.gate = Fixed(value)


def gains(gate: InputGate, h: Tensor) -> Tensor:
    """g (batch,): sigmoid first, then the mean over all positions."""
    return torch.sigmoid(h @ gate.weight + gate.bias).reshape(len(h), -1).mean(1)


SHAPES = [((3, 5, 8), -1), ((3, 8), -1), ((3, 8, 4, 6), -3), ((3, 8, 7), -2), ((3, 2, 5, 8), -1)]


@pytest.mark.parametrize(("shape", "channels"), SHAPES)
def test_a_gate_is_one_number_between_0_and_1_for_each_example(shape: tuple[int, ...], channels: int) -> None:
    handle = install(nn.Sequential(nn.Linear(8, 8)).double(), lp.Gated(part=lp.LoRA(rank=2, targets="0")))
    randomize(handle, 2.0)
    gate = handle.entries[0].adapter.gate
    h = torch.randn(shape, dtype=D) * 3
    g = gate(h, channels)
    assert g.shape == (3, *(1,) * (len(shape) - 1))
    assert bool(((g > 0) & (g < 1)).all())
    torch.testing.assert_close(g.flatten(), gains(gate, h.movedim(channels, -1)))


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6)])
def test_lora_under_a_gate_equals_the_formula_for_each_example(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 7)).double()
    handle = install(model, lp.Gated(part=lp.LoRA(rank=2, alpha=2.0, targets="0")))
    randomize(handle, 1.0)
    adapter, x = handle.entries[0].adapter, torch.randn(shape, dtype=D)
    a, g = adapter.adapter, gains(adapter.gate, x).reshape(-1, *(1,) * (len(shape) - 1))
    expected = F.linear(x, model[0].weight, model[0].bias) + g * (x @ a.lora_A.T @ a.lora_B.T)
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    parameters = handle.trainable_parameters()
    for mine, reference in zip(*(torch.autograd.grad(y.pow(3).sum(), parameters) for y in (found, expected)), strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(mine, reference, rtol=1e-8, atol=1e-8)
    assert handle.num_trainable() == 2 * (6 + 7) + 6 + 1


def test_a_convolution_is_gated_over_its_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2)).double()
    handle = install(model, lp.Gated(part=lp.LoRA(rank=2, alpha=2.0, targets="0")))
    randomize(handle, 1.0)
    adapter, x = handle.entries[0].adapter, torch.randn(3, 4, 9, 9, dtype=D)
    assert adapter.gate.weight.shape == (4,)
    plain = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, groups=2)).double()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "peft" not in k})
    y0 = plain(x)
    lora = install(plain, lp.LoRA(rank=2, alpha=2.0, targets="0"))
    lora.load_state_dict({f"0.{k}": v for k, v in adapter.adapter.state_dict().items()})
    g = gains(adapter.gate, x.movedim(1, -1))[:, None, None, None]
    torch.testing.assert_close(model(x), y0 + g * (plain(x) - y0), rtol=1e-10, atol=1e-10)


def test_an_embedding_is_gated_by_what_it_looks_up() -> None:
    model = nn.Sequential(nn.Embedding(9, 4)).double()
    handle = install(model, lp.Gated(part=lp.LoRA(rank=2, alpha=2.0, targets="0")))
    randomize(handle, 1.0)
    adapter, ids = handle.entries[0].adapter, torch.randint(9, (3, 5))
    a, y0 = adapter.adapter, F.embedding(ids, model[0].weight)
    expected = y0 + gains(adapter.gate, y0)[:, None, None] * (F.embedding(ids, a.lora_A.T) @ a.lora_B.T)
    torch.testing.assert_close(model(ids), expected, rtol=1e-10, atol=1e-10)


def test_a_bottleneck_before_a_post_norm_is_gated_inside_the_norm() -> None:
    model = BACKBONES["bert"].fresh(D)
    handle = install(model, lp.Gated(part=lp.PfeifferAdapter(width=4), gate_std=0.02))
    gate = handle.entries[0].adapter.gate
    assert torch.equal(gate.bias, torch.zeros(1, dtype=D))
    assert 0 < float(gate.weight.detach().std()) < 0.05
    randomize(handle)
    block, x = model.bert.encoder.layer[0], torch.randn(2, 5, DIM, dtype=D)
    norm, adapter = block.output.LayerNorm, handle.entries[0].adapter
    with torch.no_grad():
        found = block(x)
        found = found[0] if isinstance(found, tuple) else found
        x = block.attention.output(block.attention.self(x)[0], x)
        h = block.output.dense(block.intermediate(x))
        t = F.layer_norm(h + x, (DIM,), norm.weight, norm.bias, norm.eps)
        inner = t + gains(gate, t)[:, None, None] * adapter.adapter.ad(t) - t
        expected = F.layer_norm(h + inner + x, (DIM,), norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected)


def test_a_parallel_adapter_is_gated_by_the_input_of_the_sublayer() -> None:
    model = BACKBONES["llama"].fresh(D)
    handle = install(model, lp.Gated(part=lp.ParallelAdapter(width=4)))
    randomize(handle)
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 5, DIM, dtype=D)
    adapter = next(
        e.adapter for e in handle.entries if e.path.startswith("model.layers.0") and isinstance(e.adapter, GatedAdapter)
    )
    h = F.linear(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.weight)
    expected = h + gains(adapter.gate, x)[:, None, None] * 4.0 * adapter.adapter.ad(x)
    torch.testing.assert_close(mlp(x), expected)


def prefix_of(model: nn.Module, **options: Any) -> tuple[lp.Handle, nn.Module, dict[str, Tensor]]:
    handle = install(model, lp.PrefixTuning(num_virtual_tokens=3) if not options else lp.Gated(**options))
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 5, DIM, dtype=D, generator=torch.Generator().manual_seed(2))
    position = torch.arange(5)[None]
    return handle, attention, {"hidden_states": x, "position_embeddings": model.model.rotary_emb(x, position)}


def test_a_prefix_has_the_gain_of_each_example_on_keys_and_values() -> None:
    handle, attention, call = prefix_of(BACKBONES["llama"].fresh(D), part=lp.PrefixTuning(num_virtual_tokens=3))
    randomize(handle, 1.0)
    tap = handle.entries[0].adapter
    assert tap.gate.weight.shape == (DIM,)
    found = attention(**call, attention_mask=None)[0]
    g = gains(tap.gate, call["hidden_states"])
    assert float((g[0] - g[1]).detach().abs()) > 1e-3
    for row, gain in enumerate(g):
        plain, other, _ = prefix_of(BACKBONES["llama"].fresh(D))
        with torch.no_grad():
            plain.entries[0].adapter.tokens.key.copy_(gain * tap.tokens.key)
            plain.entries[0].adapter.tokens.value.copy_(gain * tap.tokens.value)
        torch.testing.assert_close(other(**call, attention_mask=None)[0][row], found[row], rtol=1e-10, atol=1e-10)


def test_a_prefix_with_gain_0_still_takes_attention() -> None:
    backbone = BACKBONES["llama"]
    model = backbone.fresh(D)
    handle = install(model, lp.Gated(part=lp.PrefixTuning(num_virtual_tokens=3)))
    fix(handle, 0.0)
    zero = backbone.fresh(D)
    plain = install(zero, lp.PrefixTuning(num_virtual_tokens=3))
    with torch.no_grad():
        for p in plain.trainable_parameters():
            p.zero_()
    batch = backbone.batch(D)
    assert torch.equal(run(model, batch), run(zero, batch)), "keys and values are zero"
    assert (run(model, batch) - run(backbone.fresh(D), batch)).abs().max() > 1e-3, "and not absent"


def test_unipelt_with_gates_at_0_leaves_the_prefix_only() -> None:
    backbone = BACKBONES["bert"]
    model = backbone.fresh(D)
    handle = install(model, lp.UniPELT(num_virtual_tokens=3, projection_size=5, rank=2, reduction_factor=4))
    randomize(handle)
    batch = backbone.batch(D)
    some = run(model, batch)
    fix(handle, 0.0)
    zero = backbone.fresh(D)
    prefix = install(zero, lp.PrefixTuning(num_virtual_tokens=3))
    with torch.no_grad():
        for p in prefix.trainable_parameters():
            p.zero_()
    torch.testing.assert_close(run(model, batch), run(zero, batch), rtol=1e-12, atol=1e-12)
    assert (run(model, batch) - some).abs().max() > 1e-3
    fix(handle, 1.0)
    ungated = backbone.fresh(D)
    parts = lp.UniPELT(num_virtual_tokens=3, projection_size=5, rank=2, reduction_factor=4).strategies
    plain = install(ungated, lp.Compose(parts=tuple(part.part for part in parts)))
    state = {k.replace(".adapter.", "."): v for k, v in handle.state_dict().items() if ".gate." not in k}
    plain.load_state_dict(state)
    torch.testing.assert_close(run(model, batch), run(ungated, batch), rtol=1e-10, atol=1e-10)


def test_count_of_unipelt_is_its_parts_and_a_gate_for_each_adapter() -> None:
    options: dict[str, Any] = dict(num_virtual_tokens=3, projection_size=5, rank=2, reduction_factor=4)
    handle = install(BACKBONES["bert"].fresh(), lp.UniPELT(**options))
    layers, d, p, mid = 2, DIM, 3, 5
    prefix = p * d + d * mid + mid + layers * (mid * 2 * d + 2 * d)
    bottleneck, lora = layers * (2 * d * 4 + 4 + d), layers * 2 * 2 * (2 * d)
    gates = layers * (1 + 1 + 2) * (d + 1)  # the adapter's, the prefix's, those of query and value
    assert handle.num_trainable() == prefix + bottleneck + lora + gates
    with_biases = install(BACKBONES["bert"].fresh(), lp.UniPELT(bias=True, **options))
    biases = install(BACKBONES["bert"].fresh(), lp.BitFit())
    assert with_biases.num_trainable() == handle.num_trainable() + biases.num_trainable()
    assert [s for s in handle.slots if handle.strategy.group_options(s) == {"weight_decay": 0.0}] == [
        s for s in handle.slots if s.key.split(".")[-2] == "gate"
    ]
    lr = lp.UniPELT().strategies[2].part
    assert (lr.rank, lr.alpha) == (8, 8.0), "the gate replaces alpha / r"


def test_a_static_gate_is_one_number_for_all() -> None:
    model = nn.Sequential(nn.Linear(6, 7)).double()
    handle = install(model, lp.Gated(part=lp.LoRA(rank=2, alpha=2.0, targets="0"), gate="static"))
    randomize(handle, 1.0)
    adapter, x = handle.entries[0].adapter, torch.randn(4, 6, dtype=D)
    a, g = adapter.adapter, torch.sigmoid(adapter.gate.logit)
    torch.testing.assert_close(model(x), F.linear(x, model[0].weight, model[0].bias) + g * (x @ a.lora_A.T @ a.lora_B.T))
    assert handle.num_trainable() == 2 * (6 + 7) + 1
    with pytest.raises(MergeError, match="GatedAdapter"):
        handle.merge()


def test_gates_that_nest_run_the_base_layer_once() -> None:
    model = BACKBONES["gpt2"].fresh(D)  # query and value are parts of one layer
    handle = install(model, lp.Gated(part=lp.LoRA(rank=2)))
    randomize(handle)
    layer, calls = model.transformer.h[0].attn.c_attn, []
    inner = type(layer).forward

    def counted(self: nn.Module, x: Tensor) -> Tensor:
        calls.append(self is layer)
        return inner(self, x)

    type(layer).forward = counted  # type: ignore[method-assign]
    try:
        run(model, BACKBONES["gpt2"].batch(D))
    finally:
        type(layer).forward = inner  # type: ignore[method-assign]
    assert sum(calls) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_unipelt_has_equal_gradients_under_gradient_checkpointing(reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        model = BACKBONES["bert"].fresh(D)
        handle = install(model, lp.UniPELT(num_virtual_tokens=3, projection_size=5, rank=2, reduction_factor=4))
        randomize(handle)
        if checkpointing:
            checkpoint_blocks(model, lp.anatomy_of(model), GradientCheckpointing(reentrant=reentrant))
        batch = BACKBONES["bert"].batch(D)
        (loss_of(flat(model(**batch))) + loss_of(flat(model(**batch)))).backward()
        return [p.grad for p in handle.trainable_parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, rtol=1e-9, atol=1e-12)


def test_the_schedule_of_a_gated_part_finds_its_adapters() -> None:
    model = nn.Sequential(nn.Linear(6, 7))
    handle = install(model, lp.Gated(part=lp.DyLoRA(rank=4, targets="0")))
    schedule = handle.strategy.schedule(handle)
    assert isinstance(schedule, RandomRanks)
    assert schedule.adapters == [handle.entries[0].adapter.adapter]
    again = copy.deepcopy(model)
    assert torch.equal(again(torch.ones(2, 6)), model(torch.ones(2, 6)))


GATED = {
    "dora", "dylora", "houlsby", "hra", "ia3", "loha", "lokr", "lora", "lora_fa", "lora_plus", "magnitude_mask", "mora", "oft", "pfeiffer",
    "random_mask", "relora", "remora", "ssf", "vera", "fish", "adalora", "parallel_adapter", "compacter", "compacter_plus_plus",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(GATED))
def test_a_gain_of_1_is_the_part_and_of_0_the_base(name: str) -> None:
    backbone, record = BACKBONES["bert"], lp.get_method(name)
    linear = {"targets": "all-linear"} if "norm" in record.layer_kinds else {}  # norms change their weight, which has no gain
    part = lp.resolve({"class_path": name, "init_args": {**record.example, **linear}})

    def outputs(strategy: lp.PEFTStrategy, gain: float | None = None) -> Tensor:
        model = backbone.fresh(D)
        handle = contract_install(model, strategy, backbone.batch(D))
        if gain is not None:
            fix(handle, gain)
            handle.slots = [s for s in handle.slots if not isinstance(s.owner, Gate)]
        randomize(handle, 0.1)
        return run(model, backbone.batch(D))

    base, changed = run(backbone.fresh(D), backbone.batch(D)), outputs(part)
    assert not torch.allclose(changed, base)
    torch.testing.assert_close(outputs(lp.Gated(part=part), 1.0), changed)
    torch.testing.assert_close(outputs(lp.Gated(part=part), 0.0), base)


def test_what_cannot_be_gated_is_refused() -> None:
    bert = BACKBONES["bert"].fresh()
    with pytest.raises(UnsupportedLayerError, match="parameters of the base"):
        install(bert, lp.Gated(part="bitfit"))
    with pytest.raises(UnsupportedLayerError, match="beside the forward"):
        install(BACKBONES["attention"].fresh(), lp.Gated(part=lp.LoRA(rank=2, targets="attention")))
    with pytest.raises(UnsupportedLayerError, match="SoftPromptEdit|Tap"):
        install(bert, lp.Gated(part=lp.PromptTuning(num_virtual_tokens=2)))
    with pytest.raises(ConfigError, match="part"):
        lp.resolve("gated")
    with pytest.raises(ConfigError, match="belongs to the part"):
        lp.Gated(part="lora", targets="all-linear")
    with pytest.raises(ConfigError, match="gate_std"):
        lp.Gated(part="lora", gate_std=0.0)
    with pytest.raises(ConfigError, match="belongs to the parts"):
        lp.MAM(targets="all-linear")
    with pytest.raises(ConfigError, match="num_virtual_tokens"):
        lp.UniPELT(num_virtual_tokens=0)
    with pytest.raises(PortError):
        install(BACKBONES["torch_encoder"].fresh(), lp.MAM())
    assert lp.handles(bert) == {}


# ---------------------------------------------------------------- MAM


def parts_of_mam(name: str) -> tuple[lp.MAM, lp.Handle, nn.Module]:
    strategy = lp.MAM(num_virtual_tokens=3, projection_size=5, width=4)
    model = BACKBONES[name].fresh(D)
    handle = install(model, strategy)
    randomize(handle)
    return strategy, handle, model


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
@pytest.mark.parametrize("half", [0, 1], ids=["prefix", "parallel"])
def test_mam_with_one_half_disabled_is_the_other_method(name: str, half: int) -> None:
    strategy, handle, model = parts_of_mam(name)
    for entry in handle.part(str(1 - half)).entries:
        original = next(e for e in handle.entries if e.adapter is entry.adapter)
        original.enabled = False
    alone = BACKBONES[name].fresh(D)
    other = install(alone, strategy.strategies[half])
    with torch.no_grad():
        for mine, theirs in zip(other.slots, handle.part(str(half)).slots, strict=True):
            mine.tensor().copy_(theirs.tensor())
    batch = BACKBONES[name].batch(D)
    assert torch.equal(run(model, batch), run(alone, batch))


def test_mam_has_the_hyperparameters_of_the_paper() -> None:
    prefix, adapter = lp.MAM().strategies
    assert isinstance(prefix, lp.PrefixTuning)
    assert isinstance(adapter, lp.ParallelAdapter)
    assert (prefix.num_virtual_tokens, prefix.projection, prefix.projection_size) == (30, True, 800)
    assert (adapter.scaling, adapter.activation, adapter.init, adapter.reduction_factor) == (4.0, "relu", "identity", 2)
    _, handle, _ = parts_of_mam("bert")
    counts = [sum(s.tensor().numel() for s in handle.part(str(i)).trainable_slots()) for i in (0, 1)]
    alone = [install(BACKBONES["bert"].fresh(), part).num_trainable() for part in handle.strategy.strategies]
    assert counts == alone
    assert handle.num_trainable() == sum(alone)
