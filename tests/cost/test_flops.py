"""FLOPs against torch's FlopCounterMode on the real model and against closed formulas; caches against the real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_peft as lp
from tests.cost.formulas import Decoder

B, S = 2, 10
SIZES = Decoder(layers=3, hidden=24, heads=6, kv_heads=2, ffn=40, vocab=50)


def llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=SIZES.vocab, hidden_size=SIZES.hidden, intermediate_size=SIZES.ffn, num_hidden_layers=SIZES.layers)
    heads = dict(num_attention_heads=SIZES.heads, num_key_value_heads=SIZES.kv_heads, attn_implementation="eager", pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


def mistral() -> nn.Module:
    from transformers import MistralConfig, MistralForCausalLM

    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6)
    return MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, sliding_window=4, attn_implementation="eager"))


def gemma() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = dict(vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=6, head_dim=4)
    more = dict(num_key_value_heads=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more, attn_implementation="eager"))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=24, n_layer=3, n_head=6, n_positions=64, attn_implementation="eager"))


def added(target: list[int], a: list[int], b: list[int], **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def counted(run: Callable[[], Any]) -> int:
    # torch leaves products out that are added in place, as the branches of fused LoRA layers are.
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter:
        run()
    return counter.get_total_flops()


def ids(length: int = S) -> torch.Tensor:
    return torch.randint(1, 50, (B, length))


def test_forward_is_the_closed_formula_and_what_torch_counts() -> None:
    model = llama()
    report = lp.estimate(model, "full", batch_size=B, sequence_length=S, loss="full")
    assert report.forward_flops == SIZES.forward_flops(B, S)
    assert report.forward_flops == counted(lambda: model(input_ids=ids(), use_cache=False))


@pytest.mark.parametrize("strategy", ["full", "lora", "prompt_tuning", "houlsby", "bitfit"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_backward_counts_what_really_runs(make: Callable[[], nn.Module], strategy: str) -> None:
    if strategy == "bitfit" and make is llama:
        make = lambda: llama(attention_bias=True)  # noqa: E731
    model = make()
    report = lp.estimate(model, strategy, batch_size=B, sequence_length=S, loss="full")
    lp.inject(model, strategy)
    model.train()
    found: list[int] = []

    def forward() -> None:
        out = model(input_ids=ids(), use_cache=False)
        found.append(out.logits.float().logsumexp(-1).sum())

    assert report.forward_flops == counted(forward)
    assert report.backward_flops == counted(lambda: found[0].backward())


def test_nothing_below_the_first_adapted_block_runs_backward() -> None:
    model = llama()
    costs = []
    for layer in range(3):
        strategy = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": [f"layers.{layer}.mlp.down_proj"]}}
        costs.append(lp.estimate(model, strategy, batch_size=B, sequence_length=S).backward_flops)
    block = SIZES.forward_flops(B, S, 0) // SIZES.layers
    attention = 4 * B * S * S * SIZES.hidden  # its two products have two gradients each
    assert costs[0] - costs[1] == costs[1] - costs[2] == block + attention


@pytest.mark.parametrize("make", [llama, mistral, gemma, gpt2])
@pytest.mark.parametrize("strategy", ["lora", "prompt_tuning", "prefix_tuning"])
def test_generation_is_what_the_real_model_does(make: Callable[[], nn.Module], strategy: str) -> None:
    model = make()
    spec = {"class_path": strategy, "init_args": {"rank": 2} if strategy == "lora" else {"num_virtual_tokens": 3}}
    made = lp.estimate(model, spec, batch_size=B, sequence_length=S).generation
    assert made is not None
    lp.inject(model, spec)
    model.eval()
    out: list[Any] = []
    with torch.no_grad():
        last = {"logits_to_keep": 1}
        read = counted(lambda: out.append(model(input_ids=ids(), use_cache=True, **last)))
        cache = out[0].past_key_values
        size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
        step = counted(lambda: model(input_ids=ids(1), past_key_values=cache, use_cache=True))
        again = counted(lambda: model(input_ids=ids(S + 1), use_cache=False, **last))
    assert made.kv_cache == size
    assert made.prefill_flops == read
    assert made.decode_flops == step
    assert made.decode_flops_without_cache == again


def test_generation_is_the_closed_formula() -> None:
    model = llama(num_key_value_heads=SIZES.kv_heads)
    made = lp.estimate(model, None, batch_size=B, sequence_length=S).generation
    assert made is not None
    assert made.prefill_flops == SIZES.forward_flops(B, S, logits=1)
    assert made.decode_flops == SIZES.decode_flops(B, S)
    assert made.kv_cache == SIZES.kv_cache(B, S, 4)
    assert made.adapter_kv_cache == made.adapter_prefill_flops == made.adapter_decode_flops == 0


def test_virtual_tokens_cost_what_text_of_their_length_costs() -> None:
    spec = {"class_path": "PromptTuning", "init_args": {"num_virtual_tokens": 3}}
    made = lp.estimate(llama(), spec, batch_size=B, sequence_length=S).generation
    assert made is not None
    assert made.adapter_kv_cache == SIZES.kv_cache(B, 3, 4)
    assert made.adapter_prefill_flops == SIZES.forward_flops(B, S + 3, logits=1) - SIZES.forward_flops(B, S, logits=1)
    assert made.adapter_decode_flops == SIZES.decode_flops(B, S + 3) - SIZES.decode_flops(B, S)


def test_opt_30b_of_the_survey() -> None:
    """methods.md F6: L = 48, h = 7168, batch 128, length 1024 in fp16 is 180.4 GB of cache."""
    from transformers import OPTConfig

    config = OPTConfig(hidden_size=7168, num_hidden_layers=48, num_attention_heads=56, ffn_dim=28672, word_embed_proj_dim=7168)
    made = lp.estimate(config, "bitfit", batch_size=128, sequence_length=1024, dtype="float16").generation
    assert made is not None
    assert made.kv_cache == 2 * 128 * 1024 * 48 * 7168 * 2 == pytest.approx(180.4e9, rel=1e-3)
