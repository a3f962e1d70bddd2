"""Tiny backbones built from configs, with what they take as input; the contract suite runs every method on each of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCAB, DIM, HEADS, FFN = 23, 16, 4, 24
BATCH, LENGTH = 2, 5


class MLP(nn.Module):
    """The reference MLP of the specification: wide to narrow with bias, narrow to wide without."""

    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2 = nn.Linear(48, 32), nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(torch.tanh(self.l1(x)))


class ConvNet(nn.Module):
    """Convolutions with stride and dilation, BatchNorm, a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 6, 3, padding=2, dilation=2, padding_mode="reflect")
        self.classifier = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.stem(x)))
        return self.classifier(torch.tanh(self.body(h)).mean((-1, -2)))


class UNet(nn.Module):
    """Two scales with a skip connection, GroupNorm and a time embedding, as in diffusion models."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(4, 6)
        self.down = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(2, 6)
        self.middle = nn.Conv2d(6, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        skip = F.silu(self.norm(self.down(x) + self.time(t)[..., None, None]))
        return self.out(torch.cat([skip, self.up(F.silu(self.middle(skip)))], 1))


class AttentionNet(nn.Module):
    """nn.MultiheadAttention, self and cross (other key and value widths), below a head; names that look like an adapter's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM, padding_idx=0)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.cross = nn.MultiheadAttention(DIM, HEADS, kdim=6, vdim=10, bias=False, batch_first=True)
        self.magnitude = nn.LayerNorm(DIM)
        self.lora_head = nn.Linear(DIM, 4)

    def forward(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        h = self.embed(tokens)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.cross(h, keys, values, need_weights=False)[0]
        return self.lora_head(self.magnitude(h))


class Experts(nn.Module):
    """Four gated experts whose weights are 3-D parameters, as transformers 5 stores them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 12, 8) * 0.4)
        self.down_proj = nn.Parameter(torch.randn(4, 8, 6) * 0.4)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        gate, up = torch.einsum("eod,bd->beo", self.gate_up_proj, x).chunk(2, -1)
        return torch.einsum("eod,bed,be->bo", self.down_proj, F.silu(gate) * up, shares)


class ExpertNet(nn.Module):
    """A stack of experts, and norms of every sort between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.first_norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.router, self.experts, self.second_norm = nn.Linear(8, 4), Experts(), nn.RMSNorm(8)
        self.middle, self.third_norm = nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.fourth_norm, self.classifier = nn.GroupNorm(2, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first_norm(self.inside(x))
        h = self.second_norm(h + self.experts(h, self.router(h).softmax(-1)))
        h = self.third_norm(torch.tanh(self.middle(h)))
        return self.classifier(torch.tanh(self.fourth_norm(h)))


def _ids(seed: int = 0) -> Tensor:
    ids = torch.randint(4, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids[:, 1], ids[:, 2] = 1, 3  # low ids occur too, but neither padding (0) nor end of text (2), from which masks are derived
    return ids


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(DIM, HEADS, FFN, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def llama(**extra: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS)
    more = dict(num_key_value_heads=2, max_position_embeddings=32, attention_bias=True, use_cache=False)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **more, **special, **extra}))


def gpt2(**extra: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=VOCAB, n_embd=DIM, n_layer=2, n_head=HEADS, n_positions=32, n_inner=FFN, use_cache=False)
    quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **quiet, **extra}))


def bert(**extra: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS)
    quiet = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, max_position_embeddings=32, num_labels=3)
    return BertForSequenceClassification(BertConfig(**{**sizes, **quiet, **extra}))


def t5(**extra: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(vocab_size=VOCAB, d_model=DIM, d_kv=4, d_ff=FFN, num_layers=1, num_heads=HEADS, decoder_start_token_id=0)
    return T5ForConditionalGeneration(T5Config(**{**sizes, "dropout_rate": 0.0, "use_cache": False, **extra}))


def vit(**extra: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = dict(hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=2, num_attention_heads=HEADS, image_size=8)
    more = dict(patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3)
    return ViTForImageClassification(ViTConfig(**{**sizes, **more, **extra}))


def clip() -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    sizes = dict(hidden_size=DIM, intermediate_size=FFN, num_hidden_layers=1, num_attention_heads=HEADS, projection_dim=6)
    text = dict(sizes, vocab_size=VOCAB, max_position_embeddings=16, eos_token_id=2, pad_token_id=0, bos_token_id=1)
    vision = dict(sizes, image_size=8, patch_size=4)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))


@dataclass(frozen=True)
class Backbone:
    """One model and its input."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]

    @functools.cached_property
    def _built(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = self.make()
            # Fresh biases are zero, fresh norms one, and fresh transformers weights tiny: all of that hides mistakes.
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.2)
                for module in model.modules():
                    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                        module.weight[module.padding_idx] = 0
        return model.eval()

    def fresh(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model, always with the same weights, in eval mode."""
        model = copy.deepcopy(self._built)
        return model if dtype == torch.float32 else model.to(dtype)

    def batch(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Return the input, its floating-point tensors in ``dtype``."""
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs().items()}


BACKBONES: Mapping[str, Backbone] = {
    b.name: b
    for b in (
        Backbone("torch_encoder", torch_encoder, lambda: {"src": _noise(BATCH, LENGTH, DIM)}),
        Backbone("llama", llama, lambda: {"input_ids": _ids()}),
        Backbone("gpt2", gpt2, lambda: {"input_ids": _ids()}),
        Backbone("bert", bert, lambda: {"input_ids": _ids()}),
        Backbone("t5", t5, lambda: {"input_ids": _ids(), "decoder_input_ids": _ids(1)}),
        Backbone("vit", vit, lambda: {"pixel_values": _noise(BATCH, 3, 8, 8)}),
        Backbone("clip", clip, lambda: {"input_ids": _ids(), "pixel_values": _noise(BATCH, 3, 8, 8)}),
        Backbone("conv_net", ConvNet, lambda: {"x": _noise(BATCH, 3, 9, 9)}),
        Backbone("unet", UNet, lambda: {"x": _noise(BATCH, 3, 8, 8), "t": _noise(BATCH, 4)}),
        Backbone("experts", ExpertNet, lambda: {"x": _noise(5, 6)}),
        Backbone(
            "attention",
            AttentionNet,
            lambda: {"tokens": _ids(), "keys": _noise(BATCH, 3, 6), "values": _noise(BATCH, 3, 10)},
        ),
    )
}


def tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a model's output, whatever it is made of."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors(getattr(output, field.name))


def flat(output: Any) -> Tensor:
    """Return all of a model's output as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors(output)])


def loss_of(output: Any) -> Tensor:
    """Return a scalar that depends on every entry of the output differently (a plain sum after a norm has no gradient)."""
    values = flat(output)
    weights = torch.randn(values.numel(), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return (values * weights.to(values.dtype)).mean() + values.square().mean()


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the flat output without gradient."""
    with torch.no_grad():
        return flat(model(**batch))
