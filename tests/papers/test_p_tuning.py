"""P-tuning, arXiv 2103.10385, and P-tuning v2, arXiv 2110.07602: facts that only these methods have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError, TargetError

N = 5
ENCODERS = pytest.mark.parametrize("encoder", ["mlp", "lstm"])


def llama(**extra: Any) -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, initializer_range=0.3, **extra,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def ids() -> Tensor:
    return torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def tuning(encoder: str, **options: Any) -> lp.PTuning:
    return lp.PTuning(**{"num_virtual_tokens": N, "encoder": encoder, "hidden_size": 16, **options})


def generate(model: nn.Module, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
    out = model.generate(input_ids=tokens, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, **options)
    return out[:, tokens.shape[1] :]


@pytest.mark.parametrize(("encoder", "count"), [("mlp", 1504), ("lstm", 15072)])
def test_count(encoder: str, count: int) -> None:
    handle = lp.inject(llama(), tuning(encoder))
    assert handle.num_trainable() == count  # methods.md H.3
    with pytest.raises(MergeError, match="not a change of a weight"):
        handle.merge()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF peft 0.21 asks for it
@ENCODERS
def test_parity_with_hf_peft(encoder: str) -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=N, encoder_hidden_size=16, encoder_reparameterization_type=encoder.upper()
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    reference = theirs.prompt_encoder["default"]
    handle = lp.inject(model, tuning(encoder))
    ours = handle.entries[0].adapter.tokens
    with torch.no_grad():
        ours.embedding.copy_(reference.embedding.weight)
        layers = [layer for layer in reference.mlp_head if isinstance(layer, nn.Linear)]
        for i, layer in enumerate(layers):
            ours.get_parameter(f"weight{i}").copy_(layer.weight)
            ours.get_parameter(f"bias{i}").copy_(layer.bias)
        for name, value in reference.lstm_head.named_parameters() if encoder == "lstm" else ():
            ours.get_parameter(name).copy_(value)
    assert sum(p.numel() for p in reference.parameters()) == handle.num_trainable()
    expected = theirs(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits[:, N:]
    torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-5)


@ENCODERS
def test_the_stored_prompt_gives_the_same_output_and_the_same_text(encoder: str) -> None:
    model, plain = llama(), llama()
    plain.load_state_dict(model.state_dict())
    handle = lp.inject(model, tuning(encoder))
    stored = lp.inject(plain, lp.PromptTuning(num_virtual_tokens=N))
    stored.load_state_dict({"model.tokens.weight": handle.entries[0].adapter.tokens()})
    assert torch.equal(model(ids()).logits, plain(ids()).logits)
    mask = torch.ones_like(ids())
    mask[1, :3] = 0  # left padding
    expected = generate(plain, ids(), mask)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids(), mask, **options), expected), options
    alone = generate(model, ids()[1:, 3:], mask[1:, 3:])
    assert torch.equal(expected[1:], alone)


@ENCODERS
def test_checkpointing_gives_the_same_gradients(encoder: str) -> None:
    model = llama().train()
    handle = lp.inject(model, tuning(encoder))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids()).logits.square().sum().backward()
        return [p.grad.clone() for p in handle.trainable_parameters()]

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain)
    model.activation_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_lstm_equals_torchs_own() -> None:
    tokens = lp.inject(llama().double(), tuning("lstm", lstm_layers=3)).entries[0].adapter.tokens
    lstm = nn.LSTM(32, 16, 3, batch_first=True, bidirectional=True).double()
    lstm.load_state_dict({name: tokens.get_parameter(name) for name in tokens.recurrent})
    h = lstm(tokens.embedding[None])[0][0]
    expected = (h @ tokens.weight0.T + tokens.bias0).relu() @ tokens.weight1.T + tokens.bias1
    torch.testing.assert_close(tokens(), expected)
    plain = torch.autograd.grad(expected.square().sum(), [tokens.embedding, tokens.weight0])
    ours = torch.autograd.grad(tokens().square().sum(), [tokens.embedding, tokens.weight0])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_acts_in_training_only() -> None:
    model = llama()
    lp.inject(model, tuning("lstm", dropout=0.5))
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_the_start_is_seeded_and_draws_nothing_from_the_users_generator() -> None:
    torch.manual_seed(4)
    first = lp.inject(llama(), tuning("lstm")).state_dict()
    torch.manual_seed(4)
    model, state = llama(), torch.get_rng_state()
    second = lp.inject(model, tuning("lstm")).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert first["model.tokens.weight_ih_l0"].abs().max() <= 16**-0.5


def test_p_tuning_v2_is_prefix_tuning_without_the_mlp() -> None:
    model, twin = llama(), llama()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    handle = lp.inject(model, lp.PTuningV2(num_virtual_tokens=N))
    torch.manual_seed(1)
    lp.inject(twin, lp.PrefixTuning(num_virtual_tokens=N))
    assert handle.num_trainable() == N * 2 * 2 * 2 * 8, "p x 2 x L x n_kv x d_h"
    assert torch.equal(model(ids()).logits, twin(ids()).logits)
    assert handle.strategy.dropout == 0.1
    assert lp.get_method("p_tuning_v2").cls is lp.PTuningV2


def test_bad_values() -> None:
    wrong = {"num_virtual_tokens": 0, "hidden_size": 0, "lstm_layers": 0, "dropout": 1.0}
    for field, value in wrong.items():
        with pytest.raises(ConfigError, match=f"{field}="):
            tuning("lstm", **{field: value})
    with pytest.raises(ConfigError, match="encoder='gru'"):
        tuning("gru")
    with pytest.raises(ConfigError, match="between the layers of an LSTM"):
        tuning("mlp", dropout=0.1)
    for cls in (lp.PTuning, lp.PTuningV2):
        with pytest.raises(TargetError, match=f"{cls.__name__}.*no meaning"):
            cls(targets="q_proj")
