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

from lightning_peft.errors import ConfigError, ConflictError, MergeError, PortError
from lightning_peft.strategies import inject
from lightning_peft.strategies.architectural import LadderSideTuning
from lightning_peft.surgery.handle import Handle, handles

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


def test_gates_start_at_a_half_and_shut_the_backbone_out_at_one() -> None:
    model = llama()
    handle = inject(model, LadderSideTuning(**SMALL))
    network = handle.entries[0].adapter.network
    assert torch.equal(network.gates(), torch.full((3,), 0.5))
    stir(handle)
    with torch.no_grad():
        network.alpha.fill_(100.0)  # σ(α / 0.1) = 1
    rungs = [torch.randn(2, 5, 32) for _ in range(3)]
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(network(x, rungs, [None] * 3, True), network(x, [r + 1 for r in rungs], [None] * 3, True))
    with torch.no_grad():
        network.alpha.fill_(-100.0)
    torch.testing.assert_close(network(x, rungs, [None] * 3, True), network(x + 1, rungs, [None] * 3, True))


def test_equations() -> None:
    """h_0 = D_0 x; h = Block_i(μ_i h + (1 - μ_i) D_i h^b_i); Up LN(h), written out once more without attention."""
    model = llama().double()
    handle = inject(model, LadderSideTuning(reduction=4, heads=0, layers=[0, 2], output="replace"))
    stir(handle)
    net = handle.entries[0].adapter.network
    x, rungs = torch.randn(1, 4, 32).double(), [torch.randn(1, 4, 32).double() for _ in range(2)]
    h = x @ net.down[0].T
    for i in range(2):
        mu = 1 / (1 + torch.exp(-net.alpha[i] / 0.1))
        h = mu * h + (1 - mu) * (rungs[i] @ net.down[i + 1].T)
        b = net.blocks[i]
        n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        inner = nn.functional.gelu((n * b.mlp_norm_weight + b.mlp_norm_bias) @ b.up_weight.T + b.up_bias)
        h = h + inner @ b.down_weight.T + b.down_bias
    n = (h - h.mean(-1, keepdim=True)) / (h.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (n * net.norm_weight + net.norm_bias) @ net.up.T
    torch.testing.assert_close(net(x, rungs, [None, None], True), expected, rtol=0, atol=1e-10)
    # d = 32, w = 8, n = 2: D (n+1)wd, α n, blocks n(2w + 8w² + 5w), LN 2w, Up dw
    assert handle.num_trainable() == 3 * 8 * 32 + 2 + 2 * (2 * 8 + 8 * 64 + 5 * 8) + 16 + 32 * 8


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
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99))
    with pytest.raises(PortError, match="one body"):
        inject(t5, LadderSideTuning(**SMALL))
    model = llama()
    inject(model, LadderSideTuning(**SMALL), "first")
    keys = model.state_dict().keys()
    with pytest.raises(ConflictError, match="already run by"):
        inject(model, LadderSideTuning(**SMALL), "second")
    assert model.state_dict().keys() == keys
