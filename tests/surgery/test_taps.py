"""Taps on ports: soft prompts and prefixes through caches, masks, padding and generation, on every kind of model."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import AdapterBypassedError, ConfigError, PortError, TargetError
from lightning_peft.strategies import Compose, LoRA, inject
from lightning_peft.strategies.additive import PrefixTuning, PromptTuning
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.positions import PositionTap
from lightning_peft.surgery.prefixes import ATTENTION, PrefixTap, _implementation
from lightning_peft.surgery.soft_prompts import SoftPrompt

N = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 99,
}
PLAIN = {"initializer_range": 0.3}  # large weights: every position matters visibly


def llama(implementation: str = "sdpa", **extra: Any) -> nn.Module:
    config = hf.LlamaConfig(
        **SIZES, **PLAIN, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None,
        attn_implementation=implementation, **extra,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def gpt2(implementation: str = "sdpa") -> nn.Module:
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
        attn_implementation=implementation, **PLAIN,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config).eval()


def bert(implementation: str = "sdpa") -> nn.Module:
    config = hf.BertConfig(**SIZES, **PLAIN, max_position_embeddings=64, pad_token_id=0, attn_implementation=implementation)
    return hf.BertForSequenceClassification(config).eval()


def roberta(implementation: str = "sdpa") -> nn.Module:
    config = hf.RobertaConfig(**SIZES, **PLAIN, max_position_embeddings=64, pad_token_id=1, attn_implementation=implementation)
    return hf.RobertaForMaskedLM(config).eval()


def t5(implementation: str = "sdpa") -> nn.Module:
    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0, eos_token_id=None,
        attn_implementation=implementation,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config).eval()


def bart(implementation: str = "sdpa") -> nn.Module:
    config = hf.BartConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, vocab_size=99, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.3, attn_implementation=implementation,
    )  # fmt: skip
    return hf.BartForConditionalGeneration(config).eval()


DECODERS = {"llama": llama, "gpt2": gpt2}
MODELS: dict[str, Callable[..., nn.Module]] = {**DECODERS, "bert": bert, "roberta": roberta, "t5": t5, "bart": bart}
METHODS = {
    "prompt": PromptTuning(num_virtual_tokens=N),
    "prefix": PrefixTuning(num_virtual_tokens=N, projection=True, projection_size=8),
}


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(3))


def inputs(name: str) -> dict[str, Tensor]:
    batch = {"input_ids": tokens(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    return {**batch, "decoder_input_ids": tokens(2, 5)} if name in ("t5", "bart") else batch


def generate(model: nn.Module, **kwargs: Any) -> Tensor:
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(**options)  # type: ignore[operator, no-any-return]


def prompt_of(handle: Handle) -> Tensor:
    return next(v for k, v in handle.state_dict().items() if k.endswith("tokens.weight"))


# ---------------------------------------------------------------- soft prompts


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prompt_equals_concatenated_embeddings(name: str, implementation: str) -> None:
    model = DECODERS[name](implementation)
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    ids = tokens(2, 7)
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    ours, reference = model(ids, labels=ids, output_hidden_states=True, output_attentions=True), plain(inputs_embeds=embeds)
    torch.testing.assert_close(ours.logits, reference.logits[:, N:], rtol=0, atol=0)
    assert [h.shape[1] for h in ours.hidden_states] == [7] * 3
    if implementation == "eager":
        assert ours.attentions[0].shape == (2, 4, 7, 7 + N)
    assert ours.loss is not None
    logits = model(ids, return_dict=False)[0]
    torch.testing.assert_close(logits, ours.logits)
    with handle.disabled():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("how", ["cache", "no cache", "static", "beams"])
def test_prompt_generates_like_concatenated_embeddings(name: str, how: str) -> None:
    model = DECODERS[name]()
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    options: dict[str, Any] = {
        "cache": {},
        "no cache": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "beams": {"num_beams": 3},
    }[how]
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    # The reference for the padded row is the row alone, without padding: embeddings passed to generate() have their positions
    # counted over the whole mask, [prompt][padding][text] included.
    alone = generate(plain, inputs_embeds=embeds[:1], attention_mask=torch.ones(1, N + 7, dtype=torch.long), **options)
    short = torch.cat([embeds[1:, :N], embeds[1:, N + 3 :]], 1)
    other = generate(plain, inputs_embeds=short, attention_mask=torch.ones(1, N + 4, dtype=torch.long), **options)
    ours = generate(model, input_ids=ids, attention_mask=mask, **options)[:, 7:]
    assert torch.equal(ours, torch.cat([alone, other]))
    again = generate(model, input_ids=ids, attention_mask=mask, **options)[:, 7:]
    assert torch.equal(ours, again)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_left_padding_changes_nothing(name: str, method: str, implementation: str) -> None:
    model = DECODERS[name](implementation)
    inject(model, METHODS[method])
    ids = tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    reference = model(ids).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:], reference, rtol=1e-4, atol=1e-4
    )
    if method == "prompt":  # positions are counted from the mask when none are given
        torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("static", [False, True])
def test_cached_steps_equal_one_forward(name: str, method: str, static: bool) -> None:
    model = DECODERS[name]()
    inject(model, METHODS[method])
    ids = tokens(2, 8)
    whole = model(ids).logits
    cache = hf.StaticCache(config=model.config, max_cache_len=12) if static else hf.DynamicCache(config=model.config)
    steps, mask = [], torch.ones_like(ids)
    for start, stop in ((0, 4), (4, 7), (7, 8)):  # a prefill, a chunk, a single token
        positions = torch.arange(start, stop)[None]
        out = model(
            ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, position_ids=positions, use_cache=True
        )
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert int(cache.get_seq_length()) == 8 + (N if method == "prompt" else 0)  # a prefix never enters the cache


def test_prompt_with_four_dimensional_masks() -> None:
    model = llama()
    inject(model, METHODS["prompt"])
    ids = tokens(2, 6)
    reference = model(ids).logits
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].expand(2, 1, 6, 6)
    torch.testing.assert_close(model(ids, attention_mask=causal).logits, reference)
    additive = torch.zeros(2, 1, 6, 6).masked_fill(~causal, torch.finfo(torch.float32).min)
    torch.testing.assert_close(model(ids, attention_mask=additive).logits, reference)
    with pytest.raises(PortError, match="given as dict"):
        model(ids, attention_mask={"full_attention": causal})


def test_prompt_on_bert_hides_the_prompt_from_the_pooler() -> None:
    model = bert()
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    types = torch.zeros_like(ids)
    types[:, 4:] = 1
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    longer = {
        "attention_mask": torch.cat([mask.new_ones(2, N), mask], 1),
        "token_type_ids": torch.cat([types.new_zeros(2, N), types], 1),
    }
    hidden = plain.bert(inputs_embeds=embeds, **longer).last_hidden_state[:, N:]
    logits = model(ids, attention_mask=mask, token_type_ids=types).logits
    torch.testing.assert_close(logits, plain.classifier(plain.bert.pooler(hidden)))
    short = model(ids[1:, :5], token_type_ids=types[1:, :5]).logits
    torch.testing.assert_close(logits[1:], short, rtol=1e-4, atol=1e-4)


def test_prompt_on_roberta_counts_positions_from_the_padding_index() -> None:
    model = roberta()
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    ids = tokens(2, 7)
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    # without ids RoBERTa counts all positions in order, from padding_idx + 1
    torch.testing.assert_close(model(ids).logits, plain(inputs_embeds=embeds).logits[:, N:])
    padded = torch.cat([torch.full((2, 4), 1), ids], 1)  # left padding, seen in the ids
    out = model(padded, attention_mask=(padded != 1).long()).logits[:, 4:]
    torch.testing.assert_close(out, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_decoder_sees_the_prompt_of_the_encoder(name: str) -> None:
    model = MODELS[name]()
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    ids, decoder_ids = tokens(2, 7), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    longer = torch.cat([mask.new_ones(2, N), mask], 1)
    reference = plain(inputs_embeds=embeds, attention_mask=longer, decoder_input_ids=decoder_ids)
    torch.testing.assert_close(model(ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits, reference.logits)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}, {"cache_implementation": "static"}):
        theirs = generate(plain, inputs_embeds=embeds, attention_mask=longer, **options)
        assert torch.equal(generate(model, input_ids=ids, attention_mask=mask, **options), theirs), options
    assert model.get_encoder()(ids, attention_mask=mask).last_hidden_state.shape[1] == 7 + N


def test_prompt_on_an_encoder_without_decoder_is_cut_off() -> None:
    model = hf.T5EncoderModel(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99))
    inject(model, METHODS["prompt"])
    assert model(tokens(2, 7)).last_hidden_state.shape == (2, 7, 32)


def test_two_prompts_nest_in_install_order() -> None:
    model = bert()
    plain = copy.deepcopy(model)
    first, second = inject(model, METHODS["prompt"], "first"), inject(model, PromptTuning(num_virtual_tokens=2), "second")
    ids = tokens(2, 7)
    embeds = plain.get_input_embeddings()(ids)
    parts = [prompt_of(h).expand(2, -1, -1) for h in (first, second)]
    hidden = plain.bert(inputs_embeds=torch.cat([*parts, embeds], 1)).last_hidden_state[:, N + 2 :]
    torch.testing.assert_close(model(ids).logits, plain.classifier(plain.bert.pooler(hidden)))
    first.remove()
    hidden = plain.bert(inputs_embeds=torch.cat([parts[1], embeds], 1)).last_hidden_state[:, 2:]
    torch.testing.assert_close(model(ids).logits, plain.classifier(plain.bert.pooler(hidden)))


def test_two_prompts_generate_with_a_static_cache() -> None:
    model = llama()
    inject(model, METHODS["prompt"], "first")
    inject(model, PromptTuning(num_virtual_tokens=2), "second")
    ids = tokens(2, 7)
    reference = generate(model, input_ids=ids, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, input_ids=ids, **options), reference)


def test_packed_rows_are_refused_and_other_positions_are_not() -> None:
    model = llama()
    inject(model, METHODS["prompt"])
    ids = tokens(2, 6)
    with pytest.raises(PortError, match="packed into one row"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    late = model(ids, position_ids=torch.arange(9, 15)[None]).logits  # the prompt keeps positions 0 to N - 1, and is still seen
    reference = model(ids, position_ids=torch.arange(9, 15)[None], attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(late, reference)
    assert not torch.allclose(late, model(ids).logits)


def test_prompt_with_a_sliding_window() -> None:
    config = hf.MistralConfig(
        **SIZES, **PLAIN, num_key_value_heads=2, sliding_window=6, max_position_embeddings=64, pad_token_id=0, eos_token_id=None
    )
    model = hf.MistralForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    handle = inject(model, METHODS["prompt"])
    ids = tokens(2, 7)
    embeds = torch.cat([prompt_of(handle).expand(2, -1, -1), plain.get_input_embeddings()(ids)], 1)
    reference = generate(plain, inputs_embeds=embeds, attention_mask=torch.ones(2, N + 7, dtype=torch.long))
    for options in ({}, {"use_cache": False}):
        assert torch.equal(generate(model, input_ids=ids, **options)[:, 7:], reference)
    with pytest.raises(PortError, match="sliding-window"):
        generate(model, input_ids=ids, cache_implementation="static")


def test_prompt_refuses_a_decoder_that_does_not_make_its_masks() -> None:
    sizes = hf.BertConfig(**SIZES), hf.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    model = hf.EncoderDecoderModel(encoder=hf.BertModel(sizes[0], add_pooling_layer=False), decoder=hf.BertLMHeadModel(sizes[1]))
    with pytest.raises(PortError, match="ready-made"):
        inject(model, METHODS["prompt"])


def test_resized_embeddings_are_used() -> None:
    model = llama()
    inject(model, METHODS["prompt"])
    model.resize_token_embeddings(120, mean_resizing=False)
    assert model(torch.full((1, 3), 110)).logits.shape == (1, 3, 120)


@pytest.mark.parametrize("name", ["gpt2", "bert", "roberta"])
def test_text_beyond_the_learned_positions_is_refused(name: str) -> None:
    model = MODELS[name]()
    limit = 64 if name != "roberta" else 62
    inject(model, METHODS["prompt"])
    model(tokens(1, limit - N))
    with pytest.raises(PortError, match=f"Cut the text to {limit - N} tokens"):
        model(tokens(1, limit - N + 1))
    with pytest.raises(ConfigError, match="leave no room"):
        inject(MODELS[name](), PromptTuning(num_virtual_tokens=limit))


def test_a_full_static_cache_is_refused() -> None:
    model = llama()
    inject(model, METHODS["prompt"])
    cache = hf.StaticCache(config=model.config, max_cache_len=7)
    model(tokens(1, 7), past_key_values=cache, use_cache=True)
    with pytest.raises(PortError, match="static cache holds 10 positions, 11 are needed"):
        model(tokens(1, 1), past_key_values=cache, use_cache=True)


# ---------------------------------------------------------------- prefixes


def cached_prefix(model: nn.Module, handles: list[Handle], batch: int) -> Any:
    """The reference: the prefixes as the start of a KV cache."""
    cache = hf.DynamicCache(config=model.config)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    taps = [e for handle in handles for e in handle.entries if isinstance(e.adapter, PrefixTap)]
    for layer, path in enumerate(dict.fromkeys(e.path for e in taps)):
        pairs = zip(*(e.adapter.tokens() for e in taps if e.path == path), strict=True)
        key, value = (torch.cat(parts).detach().unflatten(1, (heads, -1)).transpose(0, 1) for parts in pairs)
        cache.update(key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefix_equals_the_start_of_a_cache(name: str, implementation: str, projection: bool) -> None:
    model = DECODERS[name](implementation)
    plain = copy.deepcopy(model)
    handle = inject(model, PrefixTuning(num_virtual_tokens=N, projection=projection, projection_size=8))
    ids = tokens(2, 7)
    positions = torch.arange(7)[None]
    cache = cached_prefix(plain, [handle], 2)
    mask = torch.ones(2, 7 + N, dtype=torch.long)
    theirs = plain(ids, past_key_values=cache, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(model(ids).logits, theirs, rtol=0, atol=1e-6)
    with handle.disabled():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_prefix_generates_the_same_with_every_cache(name: str, implementation: str) -> None:
    model = DECODERS[name](implementation)
    inject(model, METHODS["prefix"])
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    alone = [generate(model, input_ids=row, use_cache=False)[:, row.shape[1] :] for row in (ids[:1], ids[1:, 3:])]
    reference = torch.cat(alone)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, input_ids=ids, attention_mask=mask, **options)[:, 7:], reference), options
    beams = [generate(model, input_ids=ids, num_beams=3, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*beams)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_prefix_is_seen_by_every_query_and_keeps_masks(name: str, implementation: str) -> None:
    model = MODELS[name](implementation)
    inject(model, METHODS["prefix"])
    batch = inputs(name)
    batch["attention_mask"][1, 5:] = 0
    full = model(**batch).logits
    short = {k: v[1:, :5] for k, v in batch.items()}
    decoder = "decoder_input_ids" in batch
    rows = slice(None) if decoder or full.dim() == 2 else slice(5)
    kept = full[1:][:, rows] if full.dim() == 3 else full[1:]
    torch.testing.assert_close(kept, model(**short).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_prefix_of_an_encoder_decoder(name: str) -> None:
    models = [MODELS[name](implementation) for implementation in ("sdpa", "eager")]
    models[1].load_state_dict(models[0].state_dict())
    handles = [inject(m, METHODS["prefix"]) for m in models]
    handles[1].load_state_dict(handles[0].state_dict())
    assert {k.split(".")[0] for k in handles[0].state_dict() if "shared" in k} == {
        "shared-prefix_encoder", "shared-prefix_decoder", "shared-prefix_decoder_cross",
    }  # fmt: skip
    batch = inputs(name)
    torch.testing.assert_close(models[0](**batch).logits, models[1](**batch).logits, rtol=1e-4, atol=1e-4)
    ids = {"input_ids": batch["input_ids"]}
    assert torch.equal(generate(models[0], **ids), generate(models[0], **ids, use_cache=False))
    assert torch.equal(generate(models[0], **ids), generate(models[0], **ids, cache_implementation="static"))


def test_two_prefixes_nest_in_install_order_and_leave_in_any() -> None:
    model = llama()
    plain = copy.deepcopy(model)
    ids = tokens(2, 6)
    config = model.model.layers[0].self_attn.config
    first = inject(model, METHODS["prefix"], "first")
    alone = model(ids).logits
    second = inject(model, PrefixTuning(num_virtual_tokens=2), "second")
    both = model(ids).logits
    keys = torch.cat([second.entries[0].adapter.tokens()[0], first.entries[0].adapter.tokens()[0]])
    single = inject(copy.deepcopy(plain), PrefixTuning(num_virtual_tokens=N + 2))
    assert keys.shape == single.entries[0].adapter.tokens.key.shape
    with torch.no_grad():
        for a, b, c in zip(first.entries, second.entries, single.entries, strict=True):
            c.adapter.tokens.key.copy_(torch.cat([b.adapter.tokens()[0], a.adapter.tokens()[0]]))
            c.adapter.tokens.value.copy_(torch.cat([b.adapter.tokens()[1], a.adapter.tokens()[1]]))
    torch.testing.assert_close(both, single.root(ids).logits)
    first.remove()
    assert model.model.layers[0].self_attn.config is not config
    with second.disabled():
        assert torch.equal(model(ids).logits, plain(ids).logits)
    second.remove()
    assert model.model.layers[0].self_attn.config is config
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not torch.equal(alone, both)


def test_prefix_leaves_the_saved_config_alone(tmp_path: Path) -> None:
    model = llama()
    handle = inject(model, METHODS["prefix"])
    assert model.config._attn_implementation == "sdpa"
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert ATTENTION not in text
    assert "_peft" not in text
    handle.remove()
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "config"))


def test_prefix_follows_a_change_of_the_attention_implementation() -> None:
    model = llama("eager")
    handle = inject(model, METHODS["prefix"])
    ids = tokens(2, 6)
    reference = model(ids).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids).logits, reference, rtol=1e-4, atol=1e-4)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(PortError, match="flash_attention_2"):
        _implementation(handle.entries[0].module)


def test_a_prefix_that_is_not_reached_raises() -> None:
    model = llama()
    inject(model, METHODS["prefix"])
    attention = model.model.layers[1].self_attn
    attention.config = model.config  # as code would that gives the module its config anew
    with pytest.raises(AdapterBypassedError, match="layers.1.self_attn"):
        model(tokens(1, 4))


def test_prefix_refuses_other_attention_functions() -> None:
    model = llama()
    model.config._attn_implementation_internal = "flash_attention_2"
    before = model.state_dict().keys()
    with pytest.raises(PortError, match="sdpa and eager"):
        inject(model, METHODS["prefix"])
    assert model.state_dict().keys() == before
    upcast = gpt2("eager")
    upcast.transformer.h[1].attn.reorder_and_upcast_attn = True
    with pytest.raises(PortError, match="reorder_and_upcast_attn"):
        inject(upcast, METHODS["prefix"])


# ---------------------------------------------------------------- both

SHIFTED = PrefixTuning(num_virtual_tokens=2, shift_positions=True)
PAIRS = {
    f"{a}+{b}": (one, other)
    for (a, one), (b, other) in itertools.product({**METHODS, "shifted": SHIFTED}.items(), repeat=2)
    if {a, b} & {"prefix", "shifted"} and (a, b) != ("prefix", "prefix")
}


def installed(model: nn.Module, pair: tuple[lp.PEFTStrategy, lp.PEFTStrategy], composed: bool = False) -> list[Handle]:
    return [inject(model, Compose(parts=pair))] if composed else [inject(model, s, n) for n, s in zip("ab", pair, strict=True)]


@pytest.mark.parametrize("composed", [False, True], ids=["two", "composed"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", DECODERS)
def test_two_that_add_positions_equal_embeddings_behind_a_cache(name: str, pair: str, composed: bool) -> None:
    """Prefixes in the cache, prompts in front of the text; what is shifted starts to count behind the prefix, prompts included."""
    model = DECODERS[name]()
    plain = copy.deepcopy(model)
    handles = installed(model, PAIRS[pair], composed)
    ids = tokens(2, 7)
    adapters = [e.adapter for handle in handles for e in handle.entries]
    prompts = [a.tokens().expand(2, -1, -1) for a in adapters if isinstance(a, SoftPrompt)]
    embeds = torch.cat([*prompts, plain.get_input_embeddings()(ids)], 1)
    first = sum(a.count for a in adapters if isinstance(a, PositionTap))
    cache = cached_prefix(plain, handles, 2)
    with torch.no_grad():
        whole = plain(
            inputs_embeds=embeds,
            past_key_values=cache,
            position_ids=torch.arange(first, first + embeds.shape[1])[None],
            attention_mask=torch.ones(2, int(cache.get_seq_length()) + embeds.shape[1], dtype=torch.long),
        ).logits[:, -7:]
        torch.testing.assert_close(model(ids).logits, whole, rtol=1e-4, atol=1e-5)
        begun = model(ids[:, :4], use_cache=True)
        rest = model(ids[:, 4:], past_key_values=begun.past_key_values)
        torch.testing.assert_close(torch.cat([begun.logits, rest.logits], 1), whole, rtol=1e-4, atol=1e-4)
    if not composed:
        handles[0].remove()
        alone = inject(plain, PAIRS[pair][1])
        alone.load_state_dict(handles[1].state_dict())
        assert torch.equal(model(ids).logits, plain(ids).logits), "the one that stays is as if there had been no other"


@pytest.mark.parametrize("pair", ["prompt+shifted", "shifted+prompt", "shifted+shifted"])
@pytest.mark.parametrize("name", [*DECODERS, "bert", "roberta"])
def test_two_that_add_positions_leave_padding_out(name: str, pair: str) -> None:
    model = MODELS[name]()
    installed(model, PAIRS[pair])
    ids, padding = tokens(1, 5), 1 if name == "roberta" else 0
    padded = torch.cat([ids, torch.full((1, 3), padding)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    full, alone = model(padded, attention_mask=mask).logits, model(ids).logits
    torch.testing.assert_close(full[:, :5] if full.dim() == 3 else full, alone, rtol=1e-4, atol=1e-4)
    if name in DECODERS:
        generated = [generate(model, input_ids=ids, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*generated)
    limit = {"gpt2": 64, "bert": 64, "roberta": 62}.get(name)
    if limit is not None:
        with pytest.raises(PortError, match="learned positions"):
            model(tokens(1, limit - 3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_gives_the_same_gradients(name: str, method: str) -> None:
    model = MODELS[name]()
    handle = inject(model, METHODS[method])
    batch = inputs(name)

    def gradients() -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch).logits.square().sum().backward()
        return [p.grad.clone() for p in handle.trainable_parameters() if p.grad is not None]

    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    plain = gradients()
    assert len(plain) == len(handle.trainable_parameters())
    assert all(g.abs().max() > 0 for g in plain)
    model.activation_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)  # sums over layers in another order


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_pickle_and_remove(name: str, method: str) -> None:
    model = MODELS[name]()
    batch = inputs(name)
    base, keys = model(**batch).logits, list(model.state_dict())
    handle = inject(model, METHODS[method])
    adapted = model(**batch).logits
    assert not torch.equal(adapted, base)
    clone, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (clone, unpickled):
        assert torch.equal(other(**batch).logits, adapted)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.zero_()
    for other in (clone, unpickled):
        assert torch.equal(other(**batch).logits, adapted)
        lp.handles(other)["default"].remove()
        assert torch.equal(other(**batch).logits, base)
        assert list(other.state_dict()) == keys
    handle.remove()
    assert torch.equal(model(**batch).logits, base)
    assert list(model.state_dict()) == keys
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_pickle_in_a_fresh_process(tmp_path: Path) -> None:
    ids = tokens(2, 5)
    for name, method in METHODS.items():
        model = llama()
        inject(model, method)
        torch.save((model, ids, model(ids).logits), tmp_path / name)
    code = (
        "import sys, torch\n"
        "from lightning_peft.surgery.handle import handles\n"
        "for path in sys.argv[1:]:\n"
        "    model, ids, logits = torch.load(path, weights_only=False)\n"
        "    assert torch.equal(model(ids).logits, logits)\n"
        "    handles(model)['default'].remove()\n"
        "    assert not torch.equal(model(ids).logits, logits)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "prefix"), str(tmp_path / "prompt")]  # the prefix registers itself
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_compiled_forward_gives_the_eager_result(method: str) -> None:
    model = llama()
    inject(model, METHODS[method])
    ids = tokens(2, 5)
    reference = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, reference)


@pytest.mark.parametrize("method", METHODS)
def test_low_precision_base_keeps_adapters_in_single_precision(method: str) -> None:
    model = llama().to(torch.bfloat16)
    handle = inject(model, METHODS[method])
    assert {p.dtype for p in handle.trainable_parameters()} == {torch.float32}
    assert model(tokens(1, 4)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("method", METHODS)
def test_models_without_the_port_are_refused(method: str) -> None:
    with pytest.raises(PortError, match="has no port"):
        inject(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_a_tap_beside_lora(method: str) -> None:
    model = llama()
    lora = inject(model, LoRA(rank=2), "lora")
    with torch.no_grad():
        for p in lora.trainable_parameters():
            p.normal_(std=0.1)
    tapped = inject(model, METHODS[method], "tap")
    ids = tokens(2, 5)
    both = model(ids).logits
    tapped.remove()
    only = model(ids).logits
    lora.merge()
    again = copy.deepcopy(model)
    torch.testing.assert_close(again(ids).logits, only, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both, only)


def test_taps_compose() -> None:
    """Two soft prompts and two prefixes with trunks of their own, in one adapter."""
    model, other = llama(), llama()
    other.load_state_dict(model.state_dict())
    prompt, prefix = METHODS.values()
    handle = inject(model, Compose(parts=(prompt, prefix, prompt, prefix)))
    ids = tokens(2, 5)
    parts = [inject(other, part, str(i)) for i, part in enumerate((prompt, prefix, prompt, prefix))]
    state = handle.state_dict()
    assert handle.num_trainable() == sum(p.num_trainable() for p in parts)
    for i, part in enumerate(parts):
        part.load_state_dict({k: state[_composed(k, i)] for k in part.state_dict()})
    torch.testing.assert_close(model(ids).logits, other(ids).logits)
    assert torch.equal(generate(model, input_ids=ids), generate(model, input_ids=ids, use_cache=False))


def _composed(key: str, index: int) -> str:
    if key.startswith("shared-"):
        return key.replace("shared-", f"shared-{index}-", 1)
    path, _, rest = key.partition(".tokens.")
    return f"{path}.{index}.tokens.{rest}"


def test_targets_are_refused() -> None:
    for method in (PromptTuning, PrefixTuning):
        with pytest.raises(TargetError, match="no meaning"):
            method(targets="q_proj")
