"""Layer and module selection: exactly the named parts train, and what lies in front of them keeps no activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lightning_peft as lp
from lightning_peft.errors import ConfigError, PortError, TargetError
from tests.backbones import BACKBONES, MLP, loss_of


def trained(name: str, strategy: lp.PEFTStrategy) -> set[str]:
    handle = lp.inject(BACKBONES[name].fresh(), strategy)
    assert all(s.claimed for s in handle.slots)
    return {s.key for s in handle.slots}


def named(name: str, *parts: str) -> set[str]:
    return {n for n, _ in BACKBONES[name].fresh().named_parameters() if any(part in n for part in parts)}


@pytest.mark.parametrize(
    ("name", "strategy", "parts"),
    [
        ("vit", lp.LayerSelection(), ["q_proj", "k_proj", "v_proj", "o_proj"]),
        ("gpt2", lp.LayerSelection(), ["attn.c_attn", "attn.c_proj"]),
        ("torch_encoder", lp.LayerSelection(), ["self_attn"]),
        ("t5", lp.LayerSelection(targets="cross_attention"), ["EncDecAttention"]),
        ("bert", lp.LayerSelection(targets="mlp"), ["intermediate.dense", "0.output.dense", "1.output.dense"]),
        ("llama", lp.LayerSelection(targets="embedding"), ["embed_tokens"]),
        ("llama", lp.LayerSelection(targets="model.layers.1.mlp"), ["layers.1.mlp"]),
        ("llama", lp.LayerSelection(last_layers=1), ["layers.1."]),
        ("llama", lp.LayerSelection(last_layers=1, head=True), ["layers.1.", "lm_head"]),
        ("bert", lp.LayerSelection(last_layers=1, targets="attention.query"), ["layer.1.attention.self.query"]),
        ("t5", lp.LayerSelection(last_layers=1), ["encoder.block.0.", "decoder.block.0."]),
        ("gpt2", lp.LayerSelection(targets={"include": ["block"], "layers": [0]}), ["h.0."]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_exactly_these_train(name: str, strategy: lp.PEFTStrategy, parts: list[str]) -> None:
    assert trained(name, strategy) == named(name, *parts) - ({"bert.pooler.dense.weight"} if name == "bert" else set())


def test_the_blocks_in_front_keep_nothing() -> None:
    backbone = BACKBONES["llama"]
    model = backbone.fresh()
    lp.inject(model, lp.LayerSelection(last_layers=1))
    seen: list[Tensor] = []
    for block in model.model.layers:
        block.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    loss_of(model(**backbone.batch())).backward()
    assert [h.grad_fn is None for h in seen] == [True, False]


def test_the_state_holds_values_and_removing_restores_them() -> None:
    backbone = BACKBONES["bert"]
    model = backbone.fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = lp.inject(model, lp.LayerSelection(last_layers=1))
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(1)
    assert all(torch.equal(value, before[key] + 1) for key, value in handle.state_dict().items())
    handle.remove()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="last_layers=3.*2 blocks"):
        trained("llama", lp.LayerSelection(last_layers=3))
    with pytest.raises(ConfigError, match="last_layers=0"):
        lp.LayerSelection(last_layers=0)
    with pytest.raises(PortError):
        lp.inject(MLP(), lp.LayerSelection(last_layers=1))
    with pytest.raises(TargetError, match="last 1 blocks"):
        trained("llama", lp.LayerSelection(last_layers=1, targets="embedding"))
    with pytest.raises(TargetError, match="cross_attention"):
        trained("bert", lp.LayerSelection(targets="cross_attention"))
