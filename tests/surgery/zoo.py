"""Tiny models of every architecture that the families name, built from configs with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCAB = 99
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64}
GQA = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
    "decoder_start_token_id": 2, "eos_token_id": 2, "bos_token_id": 1, "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB, "decoder_start_token_id": 0}
IMAGE = {"image_size": 16, "patch_size": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# model_type -> (prefix of its classes, what its config needs beside GQA)
LLAMA_LIKE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {}),
    "ministral": ("Ministral", {"head_dim": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16}),
    "gemma3_text": ("Gemma3Text", {"head_dim": 16}),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {}),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("Qwen3Moe", {**MOE, "head_dim": 16}),
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
    "smollm3": ("SmolLM3", {}),
    "starcoder2": ("Starcoder2", {}),
    "stablelm": ("StableLm", {}),
    "cohere": ("Cohere", {}),
    "cohere2": ("Cohere2", {}),
    "granite": ("Granite", {}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "helium": ("Helium", {"head_dim": 8}),
    "exaone4": ("Exaone4", {}),
    "nemotron": ("Nemotron", {"head_dim": 8}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "seed_oss": ("SeedOss", {"head_dim": 8}),
    "arcee": ("Arcee", {}),
}


def llama_like(name: str) -> nn.Module:
    prefix, extra = LLAMA_LIKE[name]
    config = getattr(hf, f"{prefix}Config")(**{**GQA, **extra})
    return getattr(hf, f"{prefix.removesuffix('Text')}ForCausalLM")(config)


def seq2seq(prefix: str, head: str = "ForConditionalGeneration", **extra: Any) -> nn.Module:
    return getattr(hf, f"{prefix}{head}")(getattr(hf, f"{prefix}Config")(**{**SEQ2SEQ, **extra}))


def bert(prefix: str, head: str = "ForSequenceClassification", **extra: Any) -> nn.Module:
    return getattr(hf, f"{prefix}{head}")(getattr(hf, f"{prefix}Config")(**{**TEXT, "pad_token_id": 0, **extra}))


def deberta(prefix: str, **extra: Any) -> nn.Module:
    return bert(prefix, **extra)


def falcon(**extra: Any) -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCAB}
    return hf.FalconForCausalLM(hf.FalconConfig(**sizes, **extra))


def clip(model: str = "CLIP", **extra: Any) -> nn.Module:
    text = {**TEXT, "max_position_embeddings": 16, "projection_dim": 16, "eos_token_id": 2}
    config = getattr(hf, f"{model}Config")(text_config=text, vision_config={**SIZES, **IMAGE}, **extra)
    return getattr(hf, f"{model}Model")(config)


CROSS = {"is_decoder": True, "add_cross_attention": True}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: (lambda name=name: llama_like(name)) for name in LLAMA_LIKE},  # type: ignore[misc]
    "llama-base": lambda: hf.LlamaModel(hf.LlamaConfig(**GQA)),
    "llama-classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**GQA)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)),
    "falcon-new": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-multi-query": lambda: falcon(),
    "falcon-per-head": lambda: falcon(multi_query=False),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**TEXT, ffn_dim=64, word_embed_proj_dim=32)),
    "bert-mlm": lambda: bert("Bert", "ForMaskedLM"),
    "bert": lambda: bert("Bert"),
    "bert-decoder": lambda: bert("Bert", "LMHeadModel", is_decoder=True),
    "bert-cross": lambda: bert("Bert", "LMHeadModel", is_decoder=True, add_cross_attention=True),
    "gpt2-cross": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
    "roberta": lambda: bert("Roberta", pad_token_id=1),
    "camembert": lambda: bert("Camembert", pad_token_id=1),
    "xlm-roberta": lambda: bert("XLMRoberta", pad_token_id=1),
    "electra": lambda: bert("Electra", embedding_size=16),
    "distilbert": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCAB)
    ),
    "deberta": lambda: bert("Deberta"),
    "deberta-relative": lambda: bert("Deberta", **RELATIVE),
    "deberta-v2": lambda: bert("DebertaV2"),
    "deberta-v2-relative": lambda: bert("DebertaV2", **RELATIVE, conv_kernel_size=3),
    "modernbert": lambda: bert("ModernBert", "ForMaskedLM", cls_token_id=1, sep_token_id=2),
    "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
    "t5-gated": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, feed_forward_proj="gated-gelu")),
    "t5-encoder": lambda: hf.T5EncoderModel(hf.T5Config(**T5)),
    "mt5": lambda: hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
    "bart": lambda: seq2seq("Bart"),
    "bart-decoder": lambda: seq2seq("Bart", "ForCausalLM"),
    "mbart": lambda: seq2seq("MBart"),
    "pegasus": lambda: seq2seq("Pegasus"),
    "m2m_100": lambda: seq2seq("M2M100"),
    "marian": lambda: hf.MarianMTModel(hf.MarianConfig(**SEQ2SEQ)),
    "blenderbot": lambda: seq2seq("Blenderbot"),
    "blenderbot-small": lambda: seq2seq("BlenderbotSmall"),
    "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SIZES, **IMAGE)),
    "deit": lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**SIZES, **IMAGE)),
    "dinov2": lambda: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **IMAGE)
    ),
    "clip": clip,
    "clip-text": lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**TEXT, projection_dim=16, eos_token_id=2)),
    "clip-vision": lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**SIZES, **IMAGE, projection_dim=16)),
    "siglip": lambda: clip("Siglip"),
    "vision-encoder-decoder": lambda: hf.VisionEncoderDecoderModel(
        encoder=hf.ViTModel(hf.ViTConfig(**SIZES, **IMAGE), add_pooling_layer=False),
        decoder=hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, add_cross_attention=True)),
    ),
    "encoder-decoder": lambda: hf.EncoderDecoderModel(
        encoder=hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False), decoder=seq2seq("Bart", "ForCausalLM", **CROSS)
    ),
    "llava": lambda: hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            text_config=hf.LlamaConfig(**GQA),
            vision_config=hf.CLIPVisionConfig(**SIZES, **IMAGE),
            image_token_id=4,
            image_seq_length=4,
        )
    ),
}


# Architectures without data of their own
INFERRED: dict[str, Callable[[], nn.Module]] = {
    "wavlm": lambda: hf.WavLMModel(hf.WavLMConfig(**SIZES, num_conv_pos_embedding_groups=4, layerdrop=0.0)),
    "mamba": lambda: hf.MambaForCausalLM(hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4)),
    "falcon_mamba": lambda: hf.FalconMambaForCausalLM(
        hf.FalconMambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4)
    ),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=4, num_heads=8, head_dim=8, n_groups=1)
    ),
    "longformer": lambda: hf.LongformerModel(hf.LongformerConfig(**TEXT, attention_window=4, pad_token_id=0)),
    "led": lambda: seq2seq("LED", attention_window=4),
    "longt5": lambda: hf.LongT5ForConditionalGeneration(hf.LongT5Config(**T5)),
}


class Translator(nn.Module):
    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 16)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32), 3) if decoder else None
        self.out = nn.Linear(16, 9)


def tokens(batch: int = 2, length: int = 12) -> Tensor:
    """Random tokens above the special ones, so that no mask is derived from them."""
    return torch.randint(5, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """Return what a model of the zoo takes."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    if config.model_type == "vision-encoder-decoder":
        return {"pixel_values": pixels, "decoder_input_ids": tokens()}
    if config.model_type == "llava":
        image = torch.full((2, 4), config.image_token_id)
        return {"input_ids": torch.cat([image, tokens()], dim=1), "pixel_values": pixels}
    if getattr(config, "add_cross_attention", False):
        return {"input_ids": tokens(), "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator)}
    if hasattr(config, "vision_config"):
        return {"input_ids": tokens(), "pixel_values": pixels}
    if hasattr(config, "patch_size"):
        return {"pixel_values": pixels}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 4000, generator=generator)}
    if getattr(config, "is_encoder_decoder", False) and not isinstance(model, hf.T5EncoderModel):
        return {"input_ids": tokens(), "decoder_input_ids": tokens()}
    return {"input_ids": tokens()}


def build(name: str) -> nn.Module:
    """Return the model in eval mode, every weight random (zero biases and unit norms would hide mistakes)."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith((".q_bias", ".v_bias")):
                continue  # DeBERTa adds these outside the projection: zero, so that a zero weight means a zero value
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
