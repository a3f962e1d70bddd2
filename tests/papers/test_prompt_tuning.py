"""Prompt tuning, arXiv 2104.08691: facts that only this method has."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, MergeError, UnsupportedLayerError
from lightning_peft.strategies import get_method, inject, resolve
from lightning_peft.strategies.additive import PromptTuning

N = 5


def llama(**extra: Any) -> nn.Module:
    config = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
        max_position_embeddings=64, pad_token_id=0, initializer_range=0.3, **extra,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def ids() -> Tensor:
    return torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def test_count_and_record() -> None:
    handle = inject(llama(), PromptTuning(num_virtual_tokens=N))
    assert handle.num_trainable() == N * 32  # methods.md: p * d
    assert list(handle.state_dict()) == ["model.tokens.weight"]
    info = get_method("prompt_tuning")
    assert info.cls is PromptTuning
    assert (info.adds_positions, info.mergeable, info.identity_at_init) == (True, False, False)
    with pytest.raises(MergeError, match="not a change of a weight"):
        handle.merge()


def test_prompt_of_real_tokens_equals_running_them() -> None:
    model = llama()
    plain = copy.deepcopy(model)
    handle = inject(model, PromptTuning(num_virtual_tokens=N))
    first = torch.tensor([11, 5, 60, 7, 98])
    handle.load_state_dict({"model.tokens.weight": plain.get_input_embeddings()(first)})
    whole = plain(torch.cat([first.expand(2, -1), ids()], 1)).logits[:, N:]
    assert torch.equal(model(ids()).logits, whole)


def test_vocabulary_init_takes_rows_of_the_embedding() -> None:
    model = llama()
    table = model.get_input_embeddings().weight.detach()
    handle = inject(model, PromptTuning(num_virtual_tokens=N, init="vocabulary"))
    prompt = handle.state_dict()["model.tokens.weight"]
    rows = [int((table == row).all(-1).nonzero()[0, 0]) for row in prompt]
    assert len(set(rows)) > 1
    again = inject(copy.deepcopy(llama()), PromptTuning(num_virtual_tokens=N, init="vocabulary"))
    assert again.state_dict()["model.tokens.weight"].shape == (N, 32)
    with torch.no_grad():
        handle.trainable_parameters()[0].zero_()
    handle.entries[0].adapter.reset_parameters()
    assert torch.equal(handle.state_dict()["model.tokens.weight"], table[rows])


@pytest.mark.parametrize(("text", "ids"), [([7, 8, 9], [7, 8, 9, 7, 8]), ([4, 5, 6, 7, 8, 9, 10], [4, 5, 6, 7, 8])])
def test_text_init_takes_the_embeddings_of_the_text_repeated_or_cut(text: list[int], ids: list[int]) -> None:
    model = llama()
    plain = copy.deepcopy(model)
    handle = inject(model, PromptTuning(num_virtual_tokens=N, init="text", init_ids=text))  # type: ignore[arg-type]
    assert torch.equal(handle.state_dict()["model.tokens.weight"], plain.get_input_embeddings().weight[ids])
    inputs = torch.randint(3, 99, (2, 7))
    whole = plain(torch.cat([torch.tensor(ids).expand(2, -1), inputs], 1)).logits[:, N:]
    assert torch.equal(model(inputs).logits, whole), "it starts as the model that has read the text"


def test_vocabulary_init_draws_from_the_given_tokens() -> None:
    model = llama()
    frequent = [5, 17, 40]
    handle = inject(model, PromptTuning(num_virtual_tokens=30, init="vocabulary", init_ids=frequent))  # type: ignore[arg-type]
    table = model.get_input_embeddings().weight.detach()
    rows = {int((table == row).all(-1).nonzero()[0, 0]) for row in handle.state_dict()["model.tokens.weight"]}
    assert rows == set(frequent)


def test_text_beyond_the_vocabulary_is_refused() -> None:
    model = llama()
    with pytest.raises(ConfigError, match="init_ids holds 99, but 'model.embed_tokens' has 99 rows"):
        inject(model, PromptTuning(init="text", init_ids=[3, 99]))  # type: ignore[arg-type]


def test_vocabulary_init_keeps_the_scale_of_the_embedding() -> None:
    config = hf.Gemma3TextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        vocab_size=50,
    )  # fmt: skip
    model = hf.Gemma3ForCausalLM(config).eval()
    embedded = model.get_input_embeddings()(torch.arange(50))  # scaled by sqrt(d)
    handle = inject(model, PromptTuning(num_virtual_tokens=2, init="vocabulary"))
    for row in handle.trainable_parameters()[0]:
        assert (embedded - row).abs().amax(-1).min() == 0


def test_random_init_is_uniform_and_seeded() -> None:
    torch.manual_seed(4)
    first = inject(llama(), PromptTuning(num_virtual_tokens=40)).trainable_parameters()[0]
    torch.manual_seed(4)
    second = inject(llama(), PromptTuning(num_virtual_tokens=40)).trainable_parameters()[0]
    assert torch.equal(first, second)
    assert 0.49 < first.abs().max() <= 0.5
    assert abs(first.std().item() - 12**-0.5) < 0.02


def test_vocabulary_init_needs_weights() -> None:
    with torch.device("meta"):
        model = llama()
    for strategy in (PromptTuning(init="vocabulary"), PromptTuning(init="text", init_ids=(4, 5))):
        with pytest.raises(UnsupportedLayerError, match="meta device"):
            inject(model, strategy)
    handle = inject(model, PromptTuning(num_virtual_tokens=N))
    assert handle.trainable_parameters()[0].is_meta


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # HF peft 0.21 asks for it
def test_parity_with_hf_peft() -> None:
    peft = pytest.importorskip("peft")
    model = llama()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    handle = inject(model, PromptTuning(num_virtual_tokens=N))
    prompt = handle.trainable_parameters()[0]
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prompt)
    tokens = ids()
    mask = torch.ones_like(tokens)
    reference = theirs(input_ids=tokens, attention_mask=mask, labels=tokens)
    ours = model(input_ids=tokens, attention_mask=mask, labels=tokens)
    torch.testing.assert_close(ours.logits, reference.logits[:, N:], rtol=0, atol=1e-5)
    # HF's loss also predicts the first text token from the last virtual one, which ours leaves out: labels are the text's.
    logits = reference.logits[:, N:-1]
    torch.testing.assert_close(ours.loss, nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_training_moves_the_prompt_and_nothing_else() -> None:
    model = llama()
    handle = inject(model, PromptTuning(num_virtual_tokens=N))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(ids(), labels=ids()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])] == ["model.peft.default.tokens.weight"]


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="num_virtual_tokens=0"):
        PromptTuning(num_virtual_tokens=0)
    with pytest.raises(ConfigError, match="num_virtual_tokns"):
        resolve({"class_path": "PromptTuning", "init_args": {"num_virtual_tokns": 3}})
    with pytest.raises(ConfigError, match="random.*vocabulary.*text"):
        PromptTuning(init="words")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs the token ids"):
        PromptTuning(init="text")
    with pytest.raises(ConfigError, match="set init to 'text'"):
        PromptTuning(init_ids=(4, 5))
    with pytest.raises(ConfigError, match="not negative"):
        PromptTuning(init="text", init_ids=(4, -5))
    strategy = PromptTuning(num_virtual_tokens=7, init="vocabulary")
    assert resolve(strategy.to_dict()) == strategy == dataclasses.replace(strategy)
