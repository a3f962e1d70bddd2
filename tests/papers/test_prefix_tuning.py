"""Prefix tuning, arXiv 2101.00190: facts that only this method has."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, MergeError, PortError
from lightning_peft.nn.virtual_tokens import PrefixTokens
from lightning_peft.strategies import get_method, inject, resolve
from lightning_peft.strategies.additive import PrefixTuning

P = 5


def llama(**extra: Any) -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        vocab_size=99, max_position_embeddings=64, pad_token_id=0, initializer_range=0.3, **extra,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2(**extra: Any) -> nn.Module:
    config = hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, n_positions=64, initializer_range=0.3, **extra)
    return hf.GPT2LMHeadModel(config).eval()


MODELS = {"llama": llama, "gpt2": gpt2}


def ids(length: int = 7) -> Tensor:
    return torch.randint(3, 99, (2, length), generator=torch.Generator().manual_seed(1))


def test_count() -> None:
    # methods.md A2.2, Llama d=32, L=3, n_kv=2, d_h=8, p=5: 480 without MLP, 1984 with mid=16
    assert inject(llama(), PrefixTuning(num_virtual_tokens=P)).num_trainable() == P * 2 * 3 * 2 * 8 == 480
    handle = inject(llama(), PrefixTuning(num_virtual_tokens=P, projection=True, projection_size=16))
    assert handle.num_trainable() == P * 16 + 16 * 16 + 16 + 16 * 2 * 3 * 16 + 2 * 3 * 16 == 1984
    shared = [k for k in handle.state_dict() if k.startswith("shared-prefix")]
    assert shared == ["shared-prefix.embedding", "shared-prefix.weight", "shared-prefix.bias"]  # stored once
    with pytest.raises(MergeError, match="not a change of a weight"):
        handle.merge()
    info = get_method("prefix_tuning")
    assert (info.adds_positions, info.mergeable, info.identity_at_init) == (True, False, False)


def test_attention_is_a_weighted_mean_of_text_and_prefix() -> None:
    """The equivalent form of He et al. 2022: (1-λ) Attn(Q, K, V) + λ Attn(Q, K_p, V_p)."""
    model = llama().double()  # sdpa: the eager function computes its softmax in fp32
    attention = model.model.layers[0].self_attn
    plain = copy.deepcopy(attention)
    handle = inject(model, PrefixTuning(num_virtual_tokens=P))
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    rotary = model.model.rotary_emb(x, torch.arange(7)[None])
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64)
    mask.masked_fill_(~torch.ones(7, 7, dtype=torch.bool).tril(), torch.finfo(torch.float64).min)

    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, v = (f(x).view(2, 7, -1, 8).transpose(1, 2) for f in (plain.q_proj, plain.k_proj, plain.v_proj))
    q, k = apply_rotary_pos_emb(q, k, *rotary)
    pk, pv = (t.view(P, 2, 8).transpose(0, 1) for t in handle.entries[0].adapter.tokens())
    k, v, pk, pv = (t.repeat_interleave(2, dim=-3) for t in (k, v, pk, pv))
    text, prefix = q @ k.mT / math.sqrt(8) + mask, q @ pk.mT / math.sqrt(8)
    a, b = text.exp().sum(-1, keepdim=True), prefix.exp().sum(-1, keepdim=True)
    share = b / (a + b)  # λ per query and head
    mixed = (1 - share) * (text.softmax(-1) @ v) + share * (prefix.softmax(-1) @ pv)
    expected = plain.o_proj(mixed.transpose(1, 2).flatten(2))
    out = attention(x, position_embeddings=rotary, attention_mask=mask)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_causal(name: str, implementation: str) -> None:
    model = MODELS[name](attn_implementation=implementation)
    inject(model, PrefixTuning(num_virtual_tokens=P))
    changed = ids()
    changed[:, 4] = 2
    a, b = model(ids()).logits, model(changed).logits
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("name", MODELS)
def test_flattened_projection_gives_the_same_output(name: str) -> None:
    model = MODELS[name]()
    flat = copy.deepcopy(model)
    long = inject(model, PrefixTuning(num_virtual_tokens=P, projection=True, projection_size=16))
    short = inject(flat, PrefixTuning(num_virtual_tokens=P))
    with torch.no_grad():
        for a, b in zip(long.entries, short.entries, strict=True):
            assert isinstance(b.adapter.tokens, PrefixTokens)
            key, value = a.adapter.tokens()
            b.adapter.tokens.key.copy_(key)
            b.adapter.tokens.value.copy_(value)
    torch.testing.assert_close(model(ids()).logits, flat(ids()).logits, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF peft 0.21 asks for it
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("projection", [False, True])
def test_parity_with_hf_peft(name: str, projection: bool) -> None:
    peft = pytest.importorskip("peft")
    model = MODELS[name]()
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, prefix_projection=projection, encoder_hidden_size=16
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    handle = inject(model, PrefixTuning(num_virtual_tokens=P, projection=projection, projection_size=16))
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        taps = [entry.adapter.tokens for entry in handle.entries]
        if projection:
            trunk = handle.shared["prefix"]
            first, _, second = encoder.transform
            for ours, hf_value in (
                (trunk.embedding, encoder.embedding.weight),
                (trunk.weight, first.weight),
                (trunk.bias, first.bias),
            ):
                ours.copy_(hf_value)
            for i, tap in enumerate(taps):  # rows of layer i: keys 2i, values 2i + 1
                rows = slice(i * tap.bias.numel(), (i + 1) * tap.bias.numel())
                tap.weight.copy_(second.weight[rows])
                tap.bias.copy_(second.bias[rows])
        else:
            values = encoder.embedding.weight.view(P, 2 * len(taps), -1)
            for i, tap in enumerate(taps):
                tap.key.copy_(values[:, 2 * i])
                tap.value.copy_(values[:, 2 * i + 1])
    mask = torch.ones_like(ids())
    reference = theirs(input_ids=ids(), attention_mask=mask).logits
    shifted = torch.arange(P, P + 7)[None]  # HF starts the text at position p
    ours = model(ids(), attention_mask=mask, position_ids=shifted).logits
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


@pytest.mark.parametrize("projection", [False, True])
def test_dropout_acts_in_training_only(projection: bool) -> None:
    model = llama()
    inject(model, PrefixTuning(num_virtual_tokens=P, projection=projection, projection_size=8, dropout=0.5))
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_a_second_forward_before_one_backward() -> None:
    """Nothing is kept between calls: the gradient of a sum is the sum of the gradients."""
    model = llama()
    handle = inject(model, PrefixTuning(num_virtual_tokens=P, projection=True, projection_size=8))

    def gradients(*batches: Tensor) -> list[Tensor]:
        model.zero_grad()
        torch.stack([model(b).logits.square().mean() for b in batches]).sum().backward()
        return [p.grad.clone() for p in handle.trainable_parameters()]

    a, b = ids(), ids(5)
    for both, one, two in zip(gradients(a, b), gradients(a), gradients(b), strict=True):
        torch.testing.assert_close(both, one + two, rtol=1e-4, atol=1e-5)


def test_training_moves_the_prefix_and_nothing_else() -> None:
    model = gpt2()
    handle = inject(model, PrefixTuning(num_virtual_tokens=P, projection=True, projection_size=8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=0.01)
    with torch.no_grad():
        model(ids())
    for _ in range(2):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".peft." in f".{k}"}


def test_bad_values() -> None:
    for field, value in {"num_virtual_tokens": 0, "projection_size": 0, "dropout": 1.0, "init_std": 0.0}.items():
        with pytest.raises(ConfigError, match=f"{field}={value}"):
            PrefixTuning(projection=True, **{field: value})
    strategy = PrefixTuning(num_virtual_tokens=7, projection=True)
    assert resolve(strategy.to_dict()) == strategy


@pytest.mark.parametrize("name", MODELS)
def test_the_text_may_start_behind_the_prefix(name: str) -> None:
    model = MODELS[name]()
    positions = torch.arange(P, P + 7)[None]
    plain = inject(model, PrefixTuning(num_virtual_tokens=P))
    with torch.no_grad():
        expected = model(ids(), position_ids=positions).logits
        assert not torch.allclose(model(ids()).logits, expected, atol=1e-3)
    state = plain.state_dict()
    plain.remove()
    handle = inject(model, PrefixTuning(num_virtual_tokens=P, shift_positions=True))
    handle.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(ids()).logits, expected)
        # What the caller counts is shifted too, and a cache counts on.
        torch.testing.assert_close(model(ids(), position_ids=positions - P).logits, expected)
        first = model(ids()[:, :4], use_cache=True)
        rest = model(ids()[:, 4:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected, rtol=1e-4, atol=1e-4)


def test_positions_of_roberta_leave_padding_out() -> None:
    config = hf.RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, vocab_size=99, max_position_embeddings=16,
        pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model = hf.RobertaModel(config, add_pooling_layer=False).eval()
    tokens = ids()
    tokens[0, 5:] = 1
    mask = (tokens != 1).long()
    plain = inject(model, PrefixTuning(num_virtual_tokens=P))
    real = (tokens != 1).long()
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=(real.cumsum(-1) + P) * real + 1).last_hidden_state
    state = plain.state_dict()
    plain.remove()
    inject(model, PrefixTuning(num_virtual_tokens=P, shift_positions=True)).load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, attention_mask=mask).last_hidden_state, expected)
    with pytest.raises(PortError, match="exceed the 14 learned positions"):
        model(ids(12))


def test_what_cannot_be_shifted_is_refused() -> None:
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=99, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(PortError, match="no position_ids"):
        inject(t5, PrefixTuning(num_virtual_tokens=P, shift_positions=True))
