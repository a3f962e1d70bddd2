"""Every layer kind: LoRA equals a dense float64 reference on the layer's own forward, and merged equals unmerged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError, UnsupportedLayerError
from lightning_peft.surgery.layers import Rows

D = torch.float64


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(6, 10)


class RMSNorm(nn.Module):
    """As the models of transformers write it: recognised by its name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as BART's and Gemma 3's scaled ones."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class EmbedScaled(nn.Embedding):
    """As transformers writes it, which the adapter follows without computing the whole table."""

    embed_scale = 2.0

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class Standardized(nn.Conv2d):
    """A convolution that standardises its weight on the way, as in BiT."""

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight
        return self._conv_forward(
            input, (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5), self.bias
        )


def x(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=D)


def ids() -> Tensor:
    return torch.tensor([[1, 0, 3, 3], [6, 2, 0, 1]])


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(10, 6), x(2, 3, 10), 3),
    "linear-wide": (lambda: nn.Linear(6, 10), x(2, 3, 6), 3),
    "linear-no-bias": (lambda: nn.Linear(10, 6, bias=False), x(4, 10), 3),
    "linear-vector": (lambda: nn.Linear(10, 6), x(10), 6),
    "hf-conv1d": (conv1d, x(2, 3, 10), 3),
    "embedding": (lambda: nn.Embedding(7, 5), ids, 3),
    "embedding-padding": (lambda: nn.Embedding(7, 5, padding_idx=0), ids, 3),
    "embedding-scaled": (lambda: EmbedScaled(7, 5), ids, 3),
    "embedding-own-forward": (lambda: Scaled(7, 5), ids, 3),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), x(2, 4, 9), 2),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), x(2, 4, 9, 8), 2),
    "conv2d-stride": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), x(2, 4, 9, 8), 2),
    "conv2d-dilation": (lambda: nn.Conv2d(4, 6, 3, dilation=2, padding=2), x(2, 4, 9, 8), 2),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same", bias=False), x(2, 4, 9, 8), 2),
    "conv2d-groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), x(2, 4, 9, 8), 4),
    "conv2d-depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), x(2, 4, 9, 8), 4),
    "conv2d-unbatched": (lambda: nn.Conv2d(4, 6, 3), x(4, 9, 8), 2),
    "conv2d-own-forward": (lambda: Standardized(4, 6, 3), x(2, 4, 9, 8), 2),
    **{
        f"conv2d-{mode}": ((lambda mode=mode: nn.Conv2d(4, 6, 3, padding=2, padding_mode=mode)), x(2, 4, 9, 8), 2)
        for mode in ("reflect", "replicate", "circular")
    },
    "conv3d": (lambda: nn.Conv3d(2, 4, 2, padding=1), x(2, 2, 4, 5, 3), 2),
    "layer-norm": (lambda: nn.LayerNorm(6), x(3, 6), 1),
    "torch-rms-norm": (lambda: nn.RMSNorm(6), x(3, 6), 1),
    "rms-norm": (lambda: RMSNorm(6), x(3, 6), 1),
    "group-norm": (lambda: nn.GroupNorm(2, 6), x(3, 6, 4), 1),
    "batch-norm": (lambda: nn.BatchNorm2d(6), x(3, 6, 4, 4), 1),
}


class Holder(nn.Module):
    """One layer below a root, so that it is found by its path."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def holder(make: Callable[[], nn.Module], dtype: torch.dtype = D) -> Holder:
    torch.manual_seed(0)
    model = Holder(make()).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        if getattr(model.layer, "padding_idx", None) is not None:
            model.layer.weight[model.layer.padding_idx] = 0
    return model


def randomize(handle: lp.Handle, scale: float = 0.5) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * scale)


def dense_delta(weight: Tensor, A: Tensor, B: Tensor, scaling: float, groups: int, layout: str) -> Tensor:
    """ΔW in the layer's own layout, entry by entry from the definition: methods.md C1.1."""
    if layout == "linear":
        return scaling * torch.einsum("or,ri->oi", B, A)
    if layout == "transposed":
        return scaling * torch.einsum("or,ri->io", B, A)
    if layout == "norm":
        return scaling * (B @ A)[:, 0].reshape(weight.shape)
    out = torch.zeros_like(weight)
    per_group, rank = weight.shape[0] // groups, A.shape[0] // groups
    kernels = A.reshape(A.shape[0], *weight.shape[1:])
    for o in range(weight.shape[0]):
        for q in range(rank):
            out[o] += scaling * B[o, q] * kernels[(o // per_group) * rank + q]
    return out


def layout_of(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, nn.Embedding) or type(layer).__name__ == "Conv1D":
        return "transposed"
    return "norm" if layer.weight.dim() == 1 else "conv"


@pytest.mark.parametrize("rank_stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", LAYERS)
def test_lora_equals_the_layer_with_the_dense_weight(name: str, rank_stabilized: bool) -> None:
    make, data, rank = LAYERS[name]
    model, value = holder(make), data()
    plain = copy.deepcopy(model)
    base = model(value).detach()
    handle = lp.inject(model, lp.LoRA(rank=rank, alpha=5.0, rank_stabilized=rank_stabilized, targets="layer"))
    assert torch.equal(model(value), base)
    randomize(handle)
    adapter = handle.entries[0].adapter
    scaling = 5.0 / (rank**0.5 if rank_stabilized else rank)
    layer, A, B = plain.layer, adapter.lora_A.detach(), adapter.lora_B.detach()
    with torch.no_grad():
        layer.weight += dense_delta(layer.weight, A, B, scaling, getattr(layer, "groups", 1), layout_of(layer))
        expected, found = plain(value), model(value)
    assert (found - base).abs().max() > 0.02
    torch.testing.assert_close(found.detach(), expected, rtol=1e-11, atol=1e-11)
    handle.merge()
    torch.testing.assert_close(model.layer.weight.detach(), layer.weight.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(value).detach(), expected, rtol=1e-11, atol=1e-11)
    handle.unmerge()
    torch.testing.assert_close(model(value).detach(), expected, rtol=1e-11, atol=1e-11)
    with handle.disabled():
        torch.testing.assert_close(model(value).detach(), base, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_lora_has_the_gradients_of_the_dense_weight(name: str) -> None:
    make, data, rank = LAYERS[name]
    model, value = holder(make), data()
    handle = lp.inject(model, lp.LoRA(rank=rank, targets="layer"))
    randomize(handle)
    adapter = handle.entries[0].adapter
    out = model(value)
    probe = torch.randn(out.shape, dtype=D)
    (out * probe).sum().backward()
    layer = copy.deepcopy(holder(make).layer)
    A, B = adapter.lora_A.detach().clone().requires_grad_(), adapter.lora_B.detach().clone().requires_grad_()
    weight = layer.weight.detach() + dense_delta(
        layer.weight.detach(), A, B, adapter.scaling, getattr(layer, "groups", 1), layout_of(layer)
    )
    expected = torch.func.functional_call(layer, {"weight": weight}, (value,))
    (expected * probe).sum().backward()
    if getattr(layer, "padding_idx", None) is None:
        torch.testing.assert_close(adapter.lora_A.grad, A.grad, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(adapter.lora_B.grad, B.grad, rtol=1e-9, atol=1e-9)
    else:
        assert adapter.lora_A.grad[:, layer.padding_idx].abs().max() == 0, "the padding row gets no gradient"


HF = {
    "linear": "linear", "linear-no-bias": "linear", "hf-conv1d": "linear", "embedding": "embedding",
    "conv1d": "conv", "conv2d": "conv", "conv2d-stride": "conv", "conv3d": "conv",
}  # fmt: skip


@pytest.mark.parametrize("name", HF)
def test_lora_equals_hf_peft_with_the_same_weights(name: str) -> None:
    import peft

    make, data, rank = LAYERS[name]
    model, value = holder(make), data()
    config = peft.LoraConfig(r=rank, lora_alpha=5, target_modules=["layer"], fan_in_fan_out=name == "hf-conv1d")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).base_model.model
    handle = lp.inject(model, lp.LoRA(rank=rank, alpha=5.0, targets=["layer"]))
    randomize(handle)
    adapter, layer = handle.entries[0].adapter, theirs.layer
    with torch.no_grad():
        if HF[name] == "embedding":
            layer.lora_embedding_A["default"].copy_(adapter.lora_A)
            layer.lora_embedding_B["default"].copy_(adapter.lora_B)
        else:
            layer.lora_A["default"].weight.copy_(adapter.lora_A.reshape(layer.lora_A["default"].weight.shape))
            layer.lora_B["default"].weight.copy_(adapter.lora_B.reshape(layer.lora_B["default"].weight.shape))
        theirs.to(D)
        assert (theirs(value) - holder(make)(value)).abs().max() > 0.1
        torch.testing.assert_close(model(value), theirs(value), rtol=1e-9, atol=1e-9)


# Attention and expert stacks: the weight is read inside somebody else's forward


def attention(**extra: Any) -> nn.Module:
    return nn.MultiheadAttention(12, 3, batch_first=True, **extra)


ATTENTIONS = {
    "fused": {},
    "no-bias": {"bias": False},
    "other-widths": {"kdim": 5, "vdim": 7},
    "added-bias": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_multihead_attention_equals_dense_weights(kind: str, grad: bool, training: bool) -> None:
    options = ATTENTIONS[kind]
    model = holder(lambda: attention(**options)).train(training)
    q, k, v = torch.randn(2, 4, 12, dtype=D), torch.randn(2, 5, 12, dtype=D), torch.randn(2, 5, 12, dtype=D)
    if "kdim" in options:
        k, v = torch.randn(2, 5, 5, dtype=D), torch.randn(2, 5, 7, dtype=D)
    elif not grad:
        q = k = v  # self attention: what torch's fast path takes
    plain = copy.deepcopy(model).requires_grad_(False)
    base = plain(q, k, v)[0]
    handle = lp.inject(model, lp.LoRA(rank=2, alpha=4.0, targets="layer"))
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            adapter = entry.adapter
            weight = plain.layer.get_parameter(entry.site.tensor)
            weight += 2.0 * adapter.lora_B @ adapter.lora_A
    assert {e.site.tensor for e in handle.entries} == {
        n for n, p in plain.layer.named_parameters() if n.endswith("weight") and p.dim() == 2
    }
    with torch.set_grad_enabled(grad):
        found, expected = model(q, k, v), plain(q, k, v)
    assert (found[0] - base).abs().max() > 0.05
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-10, atol=1e-10)
    handle.merge()
    torch.testing.assert_close(model(q, k, v)[0], expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("part", ["query", "key", "value", "output"])
def test_one_projection_of_a_fused_attention_touches_its_rows_only(part: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    model = Net().to(D)
    handle = lp.inject(model, lp.LoRA(rank=2, targets=f"attention.{part}"))
    (entry,) = handle.entries
    randomize(handle)
    before = {k: v.clone() for k, v in model.state_dict().items() if "peft" not in k}
    handle.merge()
    changed = {k for k, v in before.items() if not torch.equal(model.state_dict()[k], v)}
    if part == "output":
        assert changed == {"attention.out_proj.weight"}
        return
    assert changed == {"attention.in_proj_weight"}
    start = 12 * ["query", "key", "value"].index(part)
    difference = model.attention.in_proj_weight - before["attention.in_proj_weight"]
    delta = entry.adapter.scaling * entry.adapter.lora_B @ entry.adapter.lora_A
    torch.testing.assert_close(difference[start : start + 12].detach(), delta.detach(), rtol=1e-12, atol=1e-12)
    assert difference[:start].abs().sum() + difference[start + 12 :].abs().sum() == 0


@pytest.mark.parametrize(("rows", "total"), [(Rows(2, 5), 9), (Rows(0, 9), 9), (Rows(1, 3, 4), 12), (Rows(0, 2, 6), 12)])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_rows_take_and_put_are_inverse(rows: Rows, total: int, dim: int) -> None:
    tensor = torch.randn(total, total, dtype=D)
    part = rows.take(tensor, dim)
    assert part.shape[dim] == rows.count(total)
    assert torch.equal(rows.put(tensor, part, dim), tensor)
    changed = rows.put(tensor, part + 1, dim) - tensor
    index = [i for i in range(total) if rows.start <= (i if rows.period is None else i % rows.period) < rows.stop]
    assert torch.equal(changed.abs().sum(1 - dim % 2) > 0, torch.tensor([i in index for i in range(total)]))
    assert torch.equal(part, tensor.index_select(dim, torch.tensor(index)))


def gpt2() -> nn.Module:
    import transformers as hf

    return hf.GPT2Model(hf.GPT2Config(vocab_size=11, n_embd=12, n_layer=1, n_head=3, n_positions=16, use_cache=False))


def neox() -> nn.Module:
    import transformers as hf

    sizes = dict(hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=16, vocab_size=11)
    return hf.GPTNeoXModel(hf.GPTNeoXConfig(**sizes, max_position_embeddings=16, use_cache=False))


@pytest.mark.parametrize("role", ["query", "key", "value"])
@pytest.mark.parametrize("build", [gpt2, neox], ids=["contiguous", "interleaved"])
def test_slice_of_a_fused_projection(build: Callable[[], nn.Module], role: str) -> None:
    torch.manual_seed(0)
    model = build().to(D).eval()
    plain = copy.deepcopy(model)
    tokens = torch.randint(0, 11, (2, 5))
    handle = lp.inject(model, lp.LoRA(rank=2, alpha=4.0, targets=f"attention.{role}"))
    (entry,) = handle.entries
    assert entry.adapter.lora_B.shape == (12, 2)
    randomize(handle)
    layer = plain.get_submodule(entry.path)
    delta = 2.0 * (entry.adapter.lora_B @ entry.adapter.lora_A).detach()
    part = ["query", "key", "value"].index(role)
    with torch.no_grad():
        if build is gpt2:
            layer.weight[:, 12 * part : 12 * (part + 1)] += delta.T
        else:  # per head: 4 rows of query, 4 of key, 4 of value
            layer.weight.view(3, 3, 4, 12)[:, part] += delta.view(3, 4, 12)
        expected = plain(tokens).last_hidden_state
        found = model(tokens).last_hidden_state
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        handle.merge()
        torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.get_submodule(entry.path).weight, layer.weight, rtol=1e-12, atol=1e-12)


def moe(name: str) -> nn.Module:
    import transformers as hf

    sizes = dict(vocab_size=11, hidden_size=12, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, use_cache=False)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, num_key_value_heads=3, max_position_embeddings=16)
    if name == "mixtral":
        return hf.MixtralModel(hf.MixtralConfig(**sizes, **special, num_local_experts=3, num_experts_per_tok=2))
    if name == "qwen3_moe":
        more = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=4)
        return hf.Qwen3MoeModel(hf.Qwen3MoeConfig(**sizes, **special, **more))
    more = dict(num_local_experts=3, num_experts_per_tok=2, head_dim=4)
    return hf.GptOssModel(hf.GptOssConfig(**sizes, **special, **more))


@pytest.mark.parametrize("tensor", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_expert_stack(name: str, tensor: str) -> None:
    torch.manual_seed(0)
    model = moe(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    plain = copy.deepcopy(model)
    tokens = torch.randint(3, 11, (2, 5))
    with torch.no_grad():
        base = model(tokens).last_hidden_state
    handle = lp.inject(model, lp.LoRA(rank=2, alpha=4.0, targets=f"experts.{tensor}"))
    (entry,) = handle.entries
    assert entry.adapter.lora_A.dim() == 3
    assert entry.conditional, "a routed expert may legally rest"
    randomize(handle)
    delta = 2.0 * torch.einsum("eor,eri->eoi", entry.adapter.lora_B, entry.adapter.lora_A).detach()
    weight = plain.get_submodule(entry.path).get_parameter(tensor)
    with torch.no_grad():
        weight += delta if weight.shape == delta.shape and name != "gpt_oss" else delta.mT
        expected, found = plain(tokens).last_hidden_state, model(tokens).last_hidden_state
        assert (found - base).abs().max() > 1e-2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        handle.merge()
        torch.testing.assert_close(model(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.get_submodule(entry.path).get_parameter(tensor), weight, rtol=1e-6, atol=1e-6)


# Refusals that belong to layer kinds


def test_a_layer_that_is_not_materialised_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="lazy|materiali"):
        lp.inject(Holder(nn.LazyLinear(4)), lp.LoRA(rank=2, targets="layer"))


def test_an_embedding_that_renormalises_itself_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="max_norm"):
        lp.inject(Holder(nn.Embedding(7, 5, max_norm=1.0)), lp.LoRA(rank=2, targets="layer"))


def test_dropout_leaves_token_ids_alone() -> None:
    model = holder(lambda: nn.Embedding(7, 5)).train()
    handle = lp.inject(model, lp.LoRA(rank=2, dropout=0.5, targets="layer"))
    randomize(handle)
    assert torch.equal(model(ids()), model(ids()))


def test_a_transposed_convolution_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="ConvTranspose2d"):
        lp.inject(Holder(nn.ConvTranspose2d(3, 4, 2)), lp.LoRA(rank=2, targets="layer"))


def test_an_integer_weight_is_refused() -> None:
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedLayerError, match="int8"):
        lp.inject(Holder(layer), lp.LoRA(rank=2, targets="layer"))


@pytest.mark.parametrize(
    ("layer", "strategy"),
    [
        (lambda: nn.Linear(10, 6), lp.LoRA(rank=7, targets="layer")),
        (lambda: nn.LayerNorm(6), lp.LoRA(rank=2, targets="layer")),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), lp.LoRA(rank=3, targets="layer")),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), lp.AdaLoRA(initial_rank=2, target_rank=1, targets="layer")),
        (lambda: nn.Linear(10, 6), lp.AdaLoRA(initial_rank=7, target_rank=2, targets="layer")),
        (lambda: nn.Linear(10, 6), lp.HoulsbyAdapter(width=7, targets="layer")),
    ],
)
def test_a_rank_beyond_the_layer_is_refused_before_anything_changes(
    layer: Callable[[], nn.Module], strategy: lp.PEFTStrategy
) -> None:
    model = Holder(layer())
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="layer"):
        lp.inject(model, strategy)
    assert list(model.state_dict()) == keys
    assert all(p.requires_grad for p in model.parameters())


def test_merging_a_diverged_adapter_is_refused() -> None:
    model = Holder(nn.Linear(6, 4))
    handle = lp.inject(model, lp.LoRA(rank=2, targets="layer"))
    before = model.layer.weight.clone()
    with torch.no_grad():
        handle.entries[0].adapter.lora_B.fill_(float("nan"))
    with pytest.raises(MergeError, match="finite"):
        handle.merge()
    assert torch.equal(model.layer.weight, before)
