"""(IA)³, arXiv 2205.05638: three vectors per block, started at one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError, TargetError, UnsupportedLayerError
from tests.backbones import BACKBONES, DIM, FFN, MLP, gpt2, run

D = torch.float64
X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p))


def vectors(handle: lp.Handle) -> dict[str, Tensor]:
    return {entry.key: entry.adapter.ia3_l for entry in handle.entries}


@pytest.mark.parametrize(("name", "kv"), [("bert", DIM), ("llama", DIM // 2), ("gpt2", DIM)])
def test_count(name: str, kv: int) -> None:
    handle = lp.inject(BACKBONES[name].fresh(), "ia3")
    assert handle.num_trainable() == 2 * (2 * kv + FFN), "L x (2 n_kv d_h + f)"
    assert all(torch.equal(v, torch.ones_like(v)) for v in vectors(handle).values())


def test_mlp_against_dense_float64() -> None:
    model = MLP().to(D)
    with torch.no_grad():
        model.l1.bias.normal_()
    handle = lp.inject(model, lp.IA3(targets=["l1", "l2"], feedforward=["l2"]))
    assert handle.num_trainable() == 64  # methods.md H.3
    randomize(handle)
    first, second = vectors(handle).values()
    hidden = torch.tanh(first * (X @ model.l1.weight.T + model.l1.bias))  # the bias is scaled with the output
    torch.testing.assert_close(model(X), (hidden * second) @ model.l2.weight.T)


def test_a_block_of_llama_equals_the_paper() -> None:
    model = BACKBONES["llama"].fresh(D)
    handle = lp.inject(model, "ia3")
    randomize(handle)
    block, scales = model.model.layers[0], {k.rpartition(".")[2]: v for k, v in vectors(handle).items() if ".0." in k}
    assert set(scales) == {"k_proj", "v_proj", "down_proj"}
    x = torch.randn(2, 5, DIM, dtype=D)
    for name in ("k_proj", "v_proj"):
        layer = getattr(block.self_attn, name)
        torch.testing.assert_close(layer(x), scales[name] * F.linear(x, layer.weight, layer.bias))
    mlp = block.mlp
    hidden = F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight)
    torch.testing.assert_close(mlp(x), F.linear(scales["down_proj"] * hidden, mlp.down_proj.weight))


def test_rows_of_a_fused_projection() -> None:
    # GPT-2: keys and values are scaled, queries are not (HF peft scales all of c_attn).
    model = BACKBONES["gpt2"].fresh(D)
    plain = copy.deepcopy(model)
    handle = lp.inject(model, lp.IA3(targets=["attention.key", "attention.value"]))
    randomize(handle)
    x = torch.randn(2, 5, DIM, dtype=D)
    key, value = (v for k, v in vectors(handle).items() if ".0." in k)
    scale = torch.cat([torch.ones(DIM, dtype=D), key, value])
    torch.testing.assert_close(model.transformer.h[0].attn.c_attn(x), scale * plain.transformer.h[0].attn.c_attn(x))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF peft 0.21 asks for it
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_parity_with_hf_peft(kind: str) -> None:
    import peft

    layers = {"llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]), "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"])}
    targets, feedforward = layers[kind]
    model = BACKBONES[kind].fresh()
    conv1d = {"fan_in_fan_out": True} if kind == "gpt2" else {}
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward, **conv1d)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model.eval()
    handle = lp.inject(model, lp.IA3(targets=targets, feedforward=feedforward))
    randomize(handle)
    with torch.no_grad():
        for path, vector in vectors(handle).items():
            hf_vector = theirs.get_submodule(path).ia3_l["default"]
            hf_vector.copy_(vector.reshape(hf_vector.shape))
    batch = BACKBONES[kind].batch()
    torch.testing.assert_close(run(model, batch), run(theirs, batch), rtol=1e-5, atol=1e-5)


def test_gradients_equal_plain_autograd() -> None:
    model = MLP().to(D)
    handle = lp.inject(model, lp.IA3(targets=["l1", "l2"], feedforward=["l2"]))
    randomize(handle)
    first, second = (v.detach().clone().requires_grad_() for v in vectors(handle).values())
    model(X).square().sum().backward()
    hidden = torch.tanh(first * (X @ model.l1.weight.T + model.l1.bias))
    ((hidden * second) @ model.l2.weight.T).square().sum().backward()
    for ours, plain in zip(vectors(handle).values(), (first, second), strict=True):
        torch.testing.assert_close(ours.grad, plain.grad)


def test_unmerging_a_scale_of_zero_brings_the_weight_back() -> None:
    model = MLP().to(D)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = lp.inject(model, lp.IA3(targets="l1"))
    with torch.no_grad():
        handle.trainable_parameters()[0][:3] = 0
    expected = model(X)
    handle.merge()
    torch.testing.assert_close(model(X), expected, rtol=0, atol=1e-12)
    handle.unmerge()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_step_is_not_lost_on_a_bf16_base() -> None:
    # Between 1 and 1.0078 there is no bf16 number; the product is taken in fp32.
    model = nn.Sequential(nn.Linear(8, 64)).to(torch.bfloat16)
    handle = lp.inject(model, lp.IA3(targets="0"))
    x = torch.randn(64, 8, dtype=torch.bfloat16)
    before = model(x)
    with torch.no_grad():
        handle.trainable_parameters()[0].mul_(1.002)
    after = model(x)
    assert after.dtype == torch.bfloat16
    assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_every_expert_has_its_own_scales(kind: str) -> None:
    from tests.surgery import zoo

    model = zoo.build(kind)
    handle = lp.inject(model, lp.IA3(targets=["attention.key", "attention.value", "experts.down"]))
    experts = [v for k, v in vectors(handle).items() if "experts" in k]
    assert {tuple(v.shape) for v in experts} == {(4, 64)}
    inputs: dict[str, Any] = zoo.inputs(model)
    with torch.no_grad():
        for v in handle.trainable_parameters():
            v.add_(torch.randn_like(v) * 0.1)
        expected = model(**inputs).logits
        handle.merge()
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UnsupportedLayerError, match="not done for convolutions"):
        lp.inject(BACKBONES["conv_net"].fresh(), lp.IA3(targets=["stem", "classifier"], feedforward=["stem"]))
    with pytest.raises(TargetError, match="names none of the adapted layers"):
        lp.inject(BACKBONES["llama"].fresh(), lp.IA3(targets="k_proj", feedforward=["down_proj"]))
    with pytest.raises(ConfigError, match="feedforward"):
        lp.IA3(feedforward="down_proj")  # type: ignore[arg-type]
    with pytest.raises(TargetError):
        lp.inject(gpt2(), lp.IA3(targets="wte"))
