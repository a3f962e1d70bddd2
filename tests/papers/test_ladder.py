"""Ladder side tuning, arXiv 2206.06522: facts that only this method has."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, ConflictError, MergeError, PortError, TargetError, UnsupportedLayerError
from lightning_peft.nn.ladder import Attended, Rung
from lightning_peft.strategies import LoRA, inject
from lightning_peft.strategies.architectural import LadderSideTuning
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.surgery.side_network import _pack, _unpack

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0, "initializer_range": 0.3}
SMALL = {"reduction": 4, "heads": 2}


def llama(implementation: str = "sdpa") -> nn.Module:
    config = hf.LlamaConfig(**TEXT, num_key_value_heads=2, attn_implementation=implementation, bos_token_id=1, eos_token_id=None)
    return hf.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=200, vocab_size=99, n_positions=64)).eval()


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**TEXT)).eval()


def deberta() -> nn.Module:
    config = hf.DebertaV2Config(**TEXT, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return hf.DebertaV2ForSequenceClassification(config).eval()


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**SIZES, image_size=16, patch_size=8)).eval()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 200, batch_first=True)
    return nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()


def ids() -> Tensor:
    return torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Any, ...]], dict[str, Any]]] = {
    "llama": (llama, lambda: (ids(),), {}),
    "llama-eager": (lambda: llama("eager"), lambda: (ids(),), {}),
    "gpt2": (gpt2, lambda: (ids(),), {}),
    "bert": (bert, lambda: (ids(),), {}),
    "deberta": (deberta, lambda: (ids(),), {}),
    "vit": (vit, lambda: (torch.ones(2, 3, 16, 16),), {}),
    "encoder": (encoder, lambda: (torch.ones(2, 5, 32).cumsum(1),), {"hidden": 32}),
}


def stir(handle: Handle) -> None:
    """Leave the zero start, where the side network has no effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


@pytest.mark.parametrize("name", MODELS)
def test_life_cycle(name: str) -> None:
    make, batch, extra = MODELS[name]
    model = make()

    @torch.no_grad()  # torch's encoder layer takes its fast path then, with and without adapter
    def run(module: nn.Module) -> Tensor:
        return logits(module(*batch()))

    base, keys = run(model), list(model.state_dict())
    handle = inject(model, LadderSideTuning(**SMALL, **extra))
    assert torch.equal(run(model), base)  # Up starts at zero
    stir(handle)
    adapted = run(model)
    assert not torch.allclose(adapted, base)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), adapted)
        handles(other)["default"].remove()
        assert torch.equal(run(other), base)
        assert list(other.state_dict()) == keys
    with handle.disabled():
        assert torch.equal(run(model), base)
    with pytest.raises(MergeError, match="not a change of a weight"):
        handle.merge()
    handle.remove()
    assert torch.equal(run(model), base)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", MODELS)
def test_autograd_keeps_nothing_from_inside_the_backbone(name: str) -> None:
    make, batch, extra = MODELS[name]
    model = make()
    width = 200
    shapes: list[torch.Size] = []

    def measured() -> Tensor:
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(t.shape) or t, lambda t: t):
            return logits(model(*batch()))

    model.train()
    for p in model.parameters():
        p.requires_grad_(True)
    measured()
    assert any(width in s for s in shapes)  # the plain model does keep its wide activations
    handle = inject(model, LadderSideTuning(**SMALL, **extra))
    if name != "encoder":
        model.enable_input_require_grads()  # as activation checkpointing does: the backbone would record all the same
    seen: list[bool] = []
    hooks = [
        model.get_submodule(e.path).register_forward_hook(
            lambda m, a, out: seen.append((out if isinstance(out, Tensor) else out[0]).requires_grad)
        )
        for e in handle.entries[1:]
    ]
    out = measured()
    assert not any(width in s for s in shapes)
    assert seen == [False] * 3  # h^b.requires_grad is False everywhere
    out.square().sum().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} <= {id(p) for p in handle.trainable_parameters()}
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_trains(name: str) -> None:
    make, batch, extra = MODELS[name]
    model = make()
    handle = inject(model, LadderSideTuning(**SMALL, **extra))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(handle.trainable_parameters(), lr=1e-2)
    with torch.no_grad():
        model(*batch())
    for _ in range(2):
        optimizer.zero_grad()
        (logits(model(*batch())) * torch.linspace(-1, 1, logits(model(*batch())).shape[-1])).sum().backward()
        optimizer.step()
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".peft." in f".{k}"}


def rungs(outputs: list[Tensor]) -> list[Rung]:
    return [Rung(y, y, None) for y in outputs]


def test_gates_start_at_a_half_and_shut_the_backbone_out_at_one() -> None:
    model = llama()
    handle = inject(model, LadderSideTuning(**SMALL))
    network = handle.entries[0].adapter.network
    assert torch.equal(network.gates(), torch.full((3,), 0.5))
    stir(handle)
    with torch.no_grad():
        network.alpha.fill_(100.0)  # σ(α / 0.1) = 1
    outputs = [torch.randn(2, 5, 32) for _ in range(3)]
    x, causal = torch.randn(2, 5, 32), Attended(causal=True)
    torch.testing.assert_close(network(x, rungs(outputs), causal), network(x, rungs([y + 1 for y in outputs]), causal))
    with torch.no_grad():
        network.alpha.fill_(-100.0)
    torch.testing.assert_close(network(x, rungs(outputs), causal), network(x + 1, rungs(outputs), causal))


def test_equations() -> None:
    """h_0 = D_0 x; h = Block_i(μ_i h + (1 - μ_i) D_i h^b_i); Up LN(h), written out once more without attention."""
    model = llama().double()
    handle = inject(model, LadderSideTuning(reduction=4, heads=0, layers=[0, 2], output="replace"))
    stir(handle)
    net = handle.entries[0].adapter.network
    x, outputs = torch.randn(1, 4, 32).double(), [torch.randn(1, 4, 32).double() for _ in range(2)]
    h = x @ net.down[0].T
    for i in range(2):
        mu = 1 / (1 + torch.exp(-net.alpha[i] / 0.1))
        h = mu * h + (1 - mu) * (outputs[i] @ net.down[i + 1].T)
        b = net.blocks[i]
        n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        inner = nn.functional.gelu((n * b.mlp_norm_weight + b.mlp_norm_bias) @ b.up_weight.T + b.up_bias)
        h = h + inner @ b.down_weight.T + b.down_bias
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (n * net.norm_weight + net.norm_bias) @ net.up.T
    torch.testing.assert_close(net(x, rungs(outputs), Attended()), expected, rtol=0, atol=1e-10)
    # d = 32, w = 8, d_ff = 200, m = 200 / 4, n = 2: D (n+1)wd, α n, blocks n(2w + 2wm + m + w), LN 2w, Up dw
    assert handle.num_trainable() == 3 * 8 * 32 + 2 + 2 * (2 * 8 + 2 * 8 * 50 + 50 + 8) + 16 + 32 * 8


def test_replace_feeds_the_head_with_the_ladder_alone() -> None:
    model = llama()
    handle = inject(model, LadderSideTuning(**SMALL, output="replace"))
    plain = model.lm_head(model.model(ids()).last_hidden_state)
    assert torch.equal(model(ids()).logits, plain)
    with torch.no_grad():
        handle.entries[0].adapter.network.up.zero_()
    assert model(ids()).logits.abs().max() == 0


@pytest.mark.parametrize("name", ["llama", "llama-eager", "gpt2"])
def test_causal(name: str) -> None:
    model = MODELS[name][0]()
    stir(inject(model, LadderSideTuning(**SMALL)))
    changed = ids()
    changed[:, 4] = 2
    a, b = model(ids()).logits, model(changed).logits
    torch.testing.assert_close(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("name", ["llama", "llama-eager", "bert", "deberta"])
def test_padding_is_not_read(name: str) -> None:
    model = MODELS[name][0]()
    stir(inject(model, LadderSideTuning(**SMALL)))
    mask = torch.ones_like(ids())
    left = name.startswith("llama")
    mask[1, : 3 if left else None] = 0
    mask[1, 4:] = 1 if left else 0
    mask[1, :4] = 0 if left else 1
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if left else {}
    full = model(ids(), attention_mask=mask, **positions).logits[1:]
    row = ids()[1:, 4:] if left else ids()[1:, :4]
    torch.testing.assert_close(full[:, 4:] if left else full, model(row).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("boolean", [False, True])
def test_masks_of_torch_layers(boolean: bool) -> None:
    model = encoder()
    stir(inject(model, LadderSideTuning(**SMALL, hidden=32)))
    x = torch.randn(2, 6, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    given = (causal, padding) if boolean else tuple(torch.zeros(m.shape).masked_fill(m, float("-inf")) for m in (causal, padding))
    full = model(x, mask=given[0], src_key_padding_mask=given[1])
    short = model(x[1:, :4], mask=given[0][:4, :4])
    torch.testing.assert_close(full[1:, :4], short, rtol=1e-4, atol=1e-5)
    changed = x.clone()
    changed[:, 3:] += 1
    other = model(changed, mask=given[0], src_key_padding_mask=given[1])
    torch.testing.assert_close(full[:, :3], other[:, :3])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_causal_side_network_sees_no_later_position_behind_a_padding_mask(dtype: torch.dtype) -> None:
    """What blocks are handed by some attention implementations says which tokens are padding, and nothing of the order."""
    handle = inject(llama(), LadderSideTuning(reduction=4, heads=2, layers=[0, 2]))
    stir(handle)
    net = handle.entries[0].adapter.network
    x, outputs = torch.randn(2, 5, 32), [torch.randn(2, 5, 32) for _ in range(2)]
    shown = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    shown[1, ..., :2] = False
    mask = shown if dtype == torch.bool else torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
    later = torch.ones(5, 5, dtype=torch.bool).tril()
    found, expected = (
        net(x, [Rung(x, out, m) for out in outputs], Attended(causal=causal))
        for m, causal in ((mask, True), (shown & later, False))
    )
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, 2:], expected[1, 2:])


class Stack(nn.Module):
    """A model that hands boolean masks to torch's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(3))

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return x


def test_boolean_padding_of_torch_layers() -> None:
    model = Stack().eval()
    stir(inject(model, LadderSideTuning(**SMALL, hidden=32)))
    x = torch.randn(2, 6, 32)
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    full = model(x, padding)
    torch.testing.assert_close(full[1:, :4], model(x[1:, :4], padding[1:, :4]), rtol=1e-4, atol=1e-5)


def test_generation() -> None:
    model = llama()
    stir(inject(model, LadderSideTuning(**SMALL)))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    greedy = ids()
    for _ in range(4):
        greedy = torch.cat([greedy, model(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(ids(), use_cache=False, **options), greedy)
    with pytest.raises(PortError, match="use_cache=False"):
        model.generate(ids(), **options)


def test_generation_with_a_cache_without_attention() -> None:
    model = llama()
    stir(inject(model, LadderSideTuning(reduction=4, heads=0)))
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))


def test_pooled_output_follows_the_ladder() -> None:
    model = hf.ViTModel(hf.ViTConfig(**SIZES, image_size=16, patch_size=8)).eval()
    stir(inject(model, LadderSideTuning(**SMALL)))
    out = model(torch.ones(1, 3, 16, 16))
    torch.testing.assert_close(out.pooler_output, model.pooler(out.last_hidden_state))
    assert out.pooler_output.requires_grad


def test_low_precision_base() -> None:
    model = llama().to(torch.bfloat16)
    handle = inject(model, LadderSideTuning(**SMALL))
    assert {p.dtype for p in handle.trainable_parameters()} == {torch.float32}
    out = model(ids()).logits
    assert out.dtype == torch.bfloat16
    plain = llama()
    inject(plain, LadderSideTuning(**SMALL))
    with torch.autocast("cpu", torch.bfloat16):
        plain(ids()).logits.float().sum().backward()


def test_checkpointing_gives_the_same_gradients() -> None:
    model = llama()
    handle = inject(model, LadderSideTuning(**SMALL))
    stir(handle)
    model.train()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(ids()).logits.square().mean().backward()
        return [p.grad.clone() for p in handle.trainable_parameters()]

    plain = gradients()
    model.activation_checkpointing_enable()
    for a, b in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_compiled_forward_gives_the_eager_result() -> None:
    model = llama()
    stir(inject(model, LadderSideTuning(**SMALL)))
    reference = model(ids(), use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(ids(), use_cache=False).logits, reference)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="reduction=0"):
        LadderSideTuning(reduction=0)
    with pytest.raises(ConfigError, match="blocks 0 to 2"):
        inject(llama(), LadderSideTuning(**SMALL, layers=[0, 3]))
    with pytest.raises(ConfigError, match="multiple of heads=3"):
        inject(llama(), LadderSideTuning(reduction=4, heads=3))
    with pytest.raises(ConfigError, match="Set hidden"):
        inject(encoder(), LadderSideTuning(**SMALL))
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    with pytest.raises(PortError, match="batch_first=True"):
        inject(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), LadderSideTuning(**SMALL, hidden=32))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    clip = hf.CLIPModel(hf.CLIPConfig(text_config=sizes, vision_config={**sizes, "image_size": 16, "patch_size": 8}))
    with pytest.raises(PortError, match="one body"):
        inject(clip, LadderSideTuning(**SMALL))
    model = llama()
    inject(model, LadderSideTuning(**SMALL), "first")
    keys = model.state_dict().keys()
    with pytest.raises(ConflictError, match="already run by"):
        inject(model, LadderSideTuning(**SMALL), "second")
    assert model.state_dict().keys() == keys


# ---------------------------------------------------------------- encoder-decoder models


def t5(**more: Any) -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 200, "num_layers": 3, "num_heads": 4, "vocab_size": 99, "dropout_rate": 0.0}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**{**sizes, "decoder_start_token_id": 0, "initializer_factor": 0.3, **more})
    ).eval()


def bart(kind: str = "Bart") -> nn.Module:
    both = {
        f"{side}_{k}": n for side in ("encoder", "decoder") for k, n in (("layers", 3), ("ffn_dim", 200), ("attention_heads", 4))
    }
    config = getattr(hf, f"{kind}Config")(
        vocab_size=99, d_model=32, max_position_embeddings=64, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=None, init_std=0.3, **both,
    )  # fmt: skip
    return getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()


def two_berts() -> nn.Module:
    config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(hf.BertConfig(**TEXT), hf.BertConfig(**TEXT))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return hf.EncoderDecoderModel(config).eval()


PAIRS: dict[str, Callable[[], nn.Module]] = {"t5": t5, "bart": bart, "mbart": lambda: bart("MBart"), "two_berts": two_berts}
EACH_PAIR = pytest.mark.parametrize("name", PAIRS)


def pairs() -> dict[str, Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return {"input_ids": ids(), "attention_mask": mask, "decoder_input_ids": ids()[:, :5].flip(1)}


@EACH_PAIR
def test_life_cycle_of_encoder_and_decoder(name: str) -> None:
    model = PAIRS[name]()
    with torch.no_grad():
        base = model(**pairs())
        handle = inject(model, LadderSideTuning(**SMALL))
        start = model(**pairs())
        assert torch.equal(start.logits, base.logits)  # Up starts at zero
        assert torch.equal(start.encoder_last_hidden_state, base.encoder_last_hidden_state)
        stir(handle)
        adapted = model(**pairs())
        assert not torch.allclose(adapted.logits, base.logits)
        assert torch.equal(
            adapted.encoder_last_hidden_state, base.encoder_last_hidden_state
        )  # the frozen decoder reads what it did
        assert torch.equal(copy.deepcopy(model)(**pairs()).logits, adapted.logits)
        with handle.disabled():
            assert torch.equal(model(**pairs()).logits, base.logits)
        handle.remove()
        assert torch.equal(model(**pairs()).logits, base.logits)


@EACH_PAIR
def test_the_decoder_reads_the_encoders_side_network_and_trains_it(name: str) -> None:
    model = PAIRS[name]()
    handle = inject(model, LadderSideTuning(**SMALL))
    stir(handle)
    seen: list[bool] = []
    anatomy = anatomy_of(model)
    for path in anatomy.blocks:
        model.get_submodule(path).register_forward_hook(
            lambda m, a, out: seen.append((out if isinstance(out, Tensor) else out[0]).requires_grad)
        )
    model(**pairs()).logits.square().sum().backward()
    assert seen == [False] * 6
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in handle.trainable_parameters())
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in handle.trainable_parameters()}
    first, second = (e.adapter for e in handle.entries if hasattr(e.adapter, "network"))
    assert first.network.up is None
    assert first.network.blocks[0].cross is None
    assert second.network.up is not None
    assert second.network.blocks[0].cross is not None
    before = model(**pairs()).logits
    with torch.no_grad():
        first.network.norm_bias.add_(1.0)  # only the encoder's side network changes
    assert not torch.allclose(model(**pairs()).logits, before)


@EACH_PAIR
def test_padding_of_the_source_and_later_targets_are_not_read(name: str) -> None:
    model = PAIRS[name]()
    stir(inject(model, LadderSideTuning(**SMALL)))
    batch = pairs()
    full = model(**batch).logits
    row = {"input_ids": ids()[1:, :4], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    short = model(**row, decoder_input_ids=batch["decoder_input_ids"][1:]).logits
    torch.testing.assert_close(full[1:], short, rtol=1e-4, atol=1e-4)
    changed = batch["decoder_input_ids"].clone()
    changed[:, 3] = 7
    other = model(**{**batch, "decoder_input_ids": changed}).logits
    torch.testing.assert_close(full[:, :3], other[:, :3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(full[:, 3:], other[:, 3:])


@EACH_PAIR
def test_generation_of_encoder_and_decoder(name: str) -> None:
    model = PAIRS[name]()
    stir(inject(model, LadderSideTuning(**SMALL)))
    batch = pairs()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": False}
    start = model.config.decoder_start_token_id
    greedy = torch.full((2, 1), start)
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        for _ in range(4):
            greedy = torch.cat([greedy, model(**given, decoder_input_ids=greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(**given, **options), greedy)
    assert model.generate(**given, **options, num_beams=3).shape[0] == 2  # the encoder's output is repeated for the beams
    with pytest.raises(PortError, match="use_cache=False"):
        model.generate(**given, **{**options, "use_cache": True})


def test_what_is_handed_on_comes_back_for_every_length() -> None:
    for d, width in ((32, 8), (32, 5), (16, 16), (576, 72)):
        for length in (1, 2, 3, 7, 30, 31):
            states, side = torch.randn(2, length, d), torch.randn(2, length, width)
            found = _unpack(_pack(states, side), width)
            assert torch.equal(found[0], states)
            assert torch.equal(found[1], side)
    with pytest.raises(PortError, match="encoder's output"):
        _unpack(torch.randn(2, 1, 32), 8)
    model = t5()
    stir(inject(model, LadderSideTuning(**SMALL)))
    plain = t5().get_encoder()(input_ids=ids())  # of a model without the adapter
    with pytest.raises(PortError, match="encoder"):
        model(encoder_outputs=plain, attention_mask=torch.ones_like(ids()), decoder_input_ids=ids())


def test_without_attention_the_decoder_alone_has_a_side_network() -> None:
    model = t5()
    handle = inject(model, LadderSideTuning(reduction=4, heads=0))
    stir(handle)
    assert all(e.path.startswith("decoder") for e in handle.entries)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids(), **options), model.generate(ids(), use_cache=False, **options))


# ---------------------------------------------------------------- sizes, start and memory


def test_sizes_are_the_bases_over_the_reduction() -> None:
    for make, heads in ((llama, 4), (bert, 4), (gpt2, 4), (t5, 4)):
        handle = inject(make(), LadderSideTuning(reduction=4))
        network = handle.entries[0].adapter.network
        assert network.down.shape[1] == 8
        assert network.blocks[0].up_weight.shape == (50, 8)
        assert network.blocks[0].attention.heads == heads
    network = inject(llama(), LadderSideTuning(reduction=4, expansion=2)).entries[0].adapter.network
    assert network.blocks[0].up_weight.shape == (16, 8)


def test_files_of_version_1_had_wider_mlps() -> None:
    old = LadderSideTuning.upgrade({"reduction": 4, "heads": 2}, 1)
    assert LadderSideTuning(**old) == LadderSideTuning(reduction=4, heads=2, expansion=4)


@pytest.mark.parametrize("make", [llama, bert, gpt2, t5])
def test_pruned_start_copies_the_largest_parts_of_the_base(make: Callable[[], nn.Module]) -> None:
    model = make()
    anatomy = anatomy_of(model)
    handle = inject(model, LadderSideTuning(reduction=4, init="pruned", output="replace"))
    network = handle.entries[0].adapter.network
    picks = network.down[0]
    assert torch.equal(picks.sum(1), torch.ones(8))
    assert picks.count_nonzero() == 8
    kept = picks.argmax(1)
    scope = "encoder." if make is t5 else ""
    up, down, query = (anatomy.sites(f"{scope}{role}")[0] for role in ("mlp.up", "mlp.down", "attention.query"))
    up, down, query = (site.weight(site.module(model)) for site in (up, down, query))
    rows = (up.abs().sum(1) + down.abs().sum(0)).topk(50).indices.sort().values
    assert torch.equal(network.blocks[0].up_weight, up[rows][:, kept])
    assert torch.equal(network.blocks[0].down_weight, down[kept][:, rows])
    for row in network.blocks[0].attention.qkv_weight[:8]:
        assert any(torch.equal(row, base) for base in query[:, kept])
    model(ids()) if make is not t5 else model(**pairs())


def test_a_pruned_start_needs_weights_and_known_layers() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(UnsupportedLayerError, match="init='random'"):
        inject(model, LadderSideTuning(**SMALL, init="pruned"))
    with pytest.raises(TargetError, match="no single MLP"):
        inject(llama(), LadderSideTuning(**SMALL, init="pruned", expansion=100))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_memory_beside_loras(name: str) -> None:
    """What autograd keeps per block: a small part of what LoRA makes it keep."""
    from tests.benchmarks.reversible_memory import saved_bytes

    make, batch, _ = MODELS[name]

    def of(strategy: Any) -> int:
        model = make()
        inject(model, strategy)
        return saved_bytes(model.train(), {"input_ids": batch()[0]})

    assert of(LadderSideTuning(reduction=8)) < 0.35 * of(LoRA(rank=4, targets="all-linear"))
