"""LN-tuning, arXiv 2211.08682: gains and biases of the norms train in place."""

from __future__ import annotations

import copy

import pytest
import torch

import lightning_peft as lp
from lightning_peft.errors import TargetError
from tests.backbones import BACKBONES, DIM, MLP, loss_of, run


@pytest.mark.parametrize(("name", "count"), [("llama", (2 * 2 + 1) * DIM), ("bert", (2 * 2 + 1) * 2 * DIM), ("conv_net", 2 * 8)])
def test_count_and_names(name: str, count: int) -> None:
    model = BACKBONES[name].fresh()
    strategy = lp.LNTuning(targets="norm") if name == "conv_net" else lp.LNTuning()
    handle = lp.inject(model, strategy)
    assert handle.num_trainable() == count
    assert {s.key for s in handle.slots} == {n for n, _ in model.named_parameters() if "norm" in n.lower()}
    assert list(model.state_dict()) == list(BACKBONES[name].fresh().state_dict()), "no tensor is added"


def test_weight_decay_is_zero() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), "ln_tuning")
    assert all(handle.strategy.group_options(slot) == {"weight_decay": 0.0} for slot in handle.slots)


def test_targets_choose_blocks() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), lp.LNTuning(targets={"include": ["norm"], "layers": [1]}))
    assert {s.key.rpartition(".LayerNorm")[0] for s in handle.slots} == {
        f"bert.encoder.layer.1.{part}" for part in ("attention.output", "output")
    }


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF peft 0.21 asks for it
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # what HF peft says of norms
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_parity_with_hf_peft(name: str) -> None:
    import peft

    model = BACKBONES[name].fresh()
    norms = {"llama": ["input_layernorm", "post_attention_layernorm", "norm"], "bert": ["LayerNorm"]}[name]
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LNTuningConfig(target_modules=norms)).base_model.model.eval()
    handle = lp.inject(model, "ln_tuning")
    with torch.no_grad():
        for slot in handle.slots:
            slot.tensor().add_(torch.randn_like(slot.tensor()) * 0.3)
            path, _, attribute = slot.key.rpartition(".")
            getattr(theirs.get_submodule(path).ln_tuning_layers["default"], attribute).copy_(slot.tensor())
    batch = BACKBONES[name].batch()
    assert torch.equal(run(model, batch), run(theirs, batch))


def test_nothing_else_moves_under_weight_decay() -> None:
    backbone = BACKBONES["vit"]
    model = backbone.fresh()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    handle = lp.inject(model, "ln_tuning")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)  # a user's own, over everything
    for _ in range(3):
        loss_of(model(**backbone.batch())).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == {s.key for s in handle.slots}


def test_a_model_without_norms_is_refused() -> None:
    with pytest.raises(TargetError, match="norm"):
        lp.inject(MLP(), "ln_tuning")
    with pytest.raises(TargetError, match="kind 'linear'"):
        lp.inject(BACKBONES["bert"].fresh(), lp.LNTuning(targets="attention.query"))
