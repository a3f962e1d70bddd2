"""What is known about architectures, as data. Only facts that a test checks against a model built from its config stand here.

To add an architecture whose layers carry other names, add a :class:`~.families.Family`; one whose layers carry the names of a known
family needs its ``model_type`` only. tests/surgery/zoo.py must build it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_peft.surgery.families import Bypass, Family, Fused, Positions, Roles, Stack
from lightning_peft.types import FrozenDict

# Measured with transformers 5.23 on CPU, in train and eval mode; tests/surgery/test_anatomy.py runs each again.
BYPASSES = (
    Bypass(
        r"WavLMAttention",
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        "WavLM's attention passes its weights to torch's fused attention function",
        "adapt the feed-forward layers (feed_forward.intermediate_dense, feed_forward.output_dense)",
    ),
    Bypass(
        r"(Falcon|Jamba)?Mamba\w*Mixer",
        ("conv1d", "dt_proj"),
        "the Mamba mixer reads this layer's weight in its scan",
        "adapt in_proj, x_proj or out_proj",
    ),
    Bypass(
        r"Longformer\w*Attention|LEDEncoderSelfAttention",
        ("query_global", "key_global", "value_global"),
        "the global projections run only for tokens with global attention",
        "adapt query, key and value",
    ),
    Bypass(
        r"Deberta(V2)?Encoder",
        ("rel_embeddings",),
        "the encoder reads the table of relative positions directly",
        "adapt pos_proj or pos_key_proj of the attention layers",
    ),
)

_LLAMA_ROLES: Roles = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": ("self_attn.o_proj", "self_attn.dense"),
    "mlp.gate": ("mlp.gate_proj", "mlp.shared_expert.gate_proj"),
    "mlp.up": ("mlp.up_proj", "mlp.shared_expert.up_proj", "mlp.fc1", "mlp.c_fc"),
    "mlp.down": ("mlp.down_proj", "mlp.shared_expert.down_proj", "mlp.fc2", "mlp.c_proj"),
}
_QKV = ("attention.query", "attention.key", "attention.value")
_LLAMA_FUSED = {
    "self_attn.qkv_proj": Fused(parts=_QKV),
    "mlp.gate_up_proj": Fused(parts=("mlp.gate", "mlp.up")),
}
_BERT_ROLES: Roles = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "cross_attention.query": "crossattention.self.query",
    "cross_attention.key": "crossattention.self.key",
    "cross_attention.value": "crossattention.self.value",
    "cross_attention.output": "crossattention.output.dense",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_NEOX_ROLES: Roles = {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
_BART_ROLES: Roles = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "cross_attention.query": "encoder_attn.q_proj",
    "cross_attention.key": "encoder_attn.k_proj",
    "cross_attention.value": "encoder_attn.v_proj",
    "cross_attention.output": "encoder_attn.out_proj",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
_T5_ROLES: Roles = {
    "attention.query": "layer.0.SelfAttention.q",
    "attention.key": "layer.0.SelfAttention.k",
    "attention.value": "layer.0.SelfAttention.v",
    "attention.output": "layer.0.SelfAttention.o",
    "cross_attention.query": "layer.1.EncDecAttention.q",
    "cross_attention.key": "layer.1.EncDecAttention.k",
    "cross_attention.value": "layer.1.EncDecAttention.v",
    "cross_attention.output": "layer.1.EncDecAttention.o",
    "mlp.gate": ("layer.1.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_0"),
    "mlp.up": tuple(f"layer.{i}.DenseReluDense.{name}" for i in (1, 2) for name in ("wi", "wi_1")),
    "mlp.down": ("layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"),
}
_VIT_ROLES: Roles = {
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_CLIP_ROLES: Roles = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.out_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def _bert(name: str, *model_types: str, **changes: Any) -> Family:
    stack = Stack(
        blocks="encoder.layer",
        roles=_BERT_ROLES,
        embedding="embeddings.word_embeddings",
        causal="is_decoder",
        positions="absolute",
        pooler="pooler",
    )
    return Family(name=name, model_types=model_types or (name,), stacks=(dataclasses.replace(stack, **changes),))


def _seq2seq(name: str, model_types: tuple[str, ...], roles: Roles, blocks: str, positions: Positions) -> Family:
    def stack(scope: str) -> Stack:
        return Stack(
            scope=scope,
            path=scope,
            blocks=blocks,
            roles=roles,
            embedding="embed_tokens",
            causal=scope == "decoder",
            positions=positions,
        )

    return Family(name=name, model_types=model_types, stacks=(stack("encoder"), stack("decoder")))


def _tower(name: str, model_type: str, scope: str, embedding: str, roles: Mapping[str, str]) -> Family:
    # Towers take no inputs_embeds. A bare CLIPTextModel and one inside CLIPModel keep the encoder at the same place.
    stack = Stack(
        scope=scope, blocks="encoder.layers", roles=_CLIP_ROLES, embedding=embedding, tokens=False, positions="absolute",
        causal=model_type == "clip_text_model",
    )  # fmt: skip
    return Family(name=name, model_types=(model_type,), stacks=(stack,), roles=roles)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        model_types=(
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "phi",
            "phi3",
            "olmo",
            "olmo2",
            "olmo3",
            "olmoe",
            "mixtral",
            "qwen2_moe",
            "qwen3_moe",
            "gpt_oss",
            "smollm3",
            "starcoder2",
            "stablelm",
            "cohere",
            "cohere2",
            "granite",
            "granitemoe",
            "helium",
            "exaone4",
            "nemotron",
            "glm",
            "glm4",
            "ernie4_5",
            "seed_oss",
            "arcee",
        ),
        stacks=(
            Stack(
                blocks="layers",
                roles=_LLAMA_ROLES,
                fused=_LLAMA_FUSED,
                embedding="embed_tokens",
                causal=True,
                positions="rotary",
            ),
        ),
    ),
    Family(
        name="gpt2",
        model_types=("gpt2",),
        stacks=(
            Stack(
                blocks="h",
                roles={
                    "attention.output": "attn.c_proj",
                    "cross_attention.query": "crossattention.q_attn",
                    "cross_attention.output": "crossattention.c_proj",
                    "mlp.up": "mlp.c_fc",
                    "mlp.down": "mlp.c_proj",
                },
                fused={
                    "attn.c_attn": Fused(parts=_QKV),
                    "crossattention.c_attn": Fused(parts=("cross_attention.key", "cross_attention.value")),
                },
                embedding="wte",
                causal=True,
                positions="absolute",
            ),
        ),
    ),
    Family(
        name="gpt_neox",
        model_types=("gpt_neox",),
        stacks=(
            Stack(
                blocks="layers",
                roles={"attention.output": "attention.dense", **_NEOX_ROLES},
                fused={"attention.query_key_value": Fused(parts=_QKV, per_head=True)},
                embedding="embed_in",
                causal=True,
                positions="rotary",
            ),
        ),
    ),
    Family(
        name="falcon",
        model_types=("falcon",),
        stacks=(
            Stack(
                blocks="h",
                roles={"attention.output": "self_attention.dense", **_NEOX_ROLES},
                fused={"self_attention.query_key_value": Fused(parts=_QKV, per_head=True)},
                embedding="word_embeddings",
                causal=True,
                positions="rotary",
            ),
        ),
    ),
    Family(
        name="bloom",
        model_types=("bloom",),
        stacks=(
            Stack(
                blocks="h",
                roles={"attention.output": "self_attention.dense", **_NEOX_ROLES},
                fused={"self_attention.query_key_value": Fused(parts=_QKV, per_head=True)},
                embedding="word_embeddings",
                causal=True,
                positions="alibi",
            ),
        ),
    ),
    Family(
        name="opt",
        model_types=("opt",),
        stacks=(
            Stack(
                path="decoder",
                blocks="layers",
                roles=_BART_ROLES,
                embedding="embed_tokens",
                causal=True,
                positions="absolute",
            ),
        ),
    ),
    _bert("bert", "bert", "roberta", "camembert", "xlm-roberta", "electra"),
    _bert(
        "distilbert",
        blocks="transformer.layer",
        causal=False,
        roles={
            "attention.query": "attention.q_lin",
            "attention.key": "attention.k_lin",
            "attention.value": "attention.v_lin",
            "attention.output": "attention.out_lin",
            "mlp.up": "ffn.lin1",
            "mlp.down": "ffn.lin2",
            "mlp_norm": "output_layer_norm",
        },
    ),
    _bert(
        "deberta",
        causal=False,
        positions="relative",
        roles={k: _BERT_ROLES[k] for k in ("attention.output", "mlp.up", "mlp.down", "mlp_norm")},
        fused={"attention.self.in_proj": Fused(parts=_QKV, per_head=True)},
    ),
    _bert(
        "deberta-v2",
        causal=False,
        positions="relative",
        roles={
            **{k: _BERT_ROLES[k] for k in ("attention.output", "mlp.up", "mlp.down", "mlp_norm")},
            "attention.query": "attention.self.query_proj",
            "attention.key": "attention.self.key_proj",
            "attention.value": "attention.self.value_proj",
        },
    ),
    Family(
        name="modernbert",
        model_types=("modernbert",),
        stacks=(
            Stack(
                blocks="layers",
                roles={"attention.output": "attn.Wo", "mlp.down": "mlp.Wo"},
                fused={"attn.Wqkv": Fused(parts=_QKV), "mlp.Wi": Fused(parts=("mlp.gate", "mlp.up"))},
                embedding="embeddings.tok_embeddings",
                positions="rotary",
            ),
        ),
    ),
    _seq2seq("t5", ("t5", "mt5", "umt5"), _T5_ROLES, "block", "relative"),
    _seq2seq("bart", ("mbart", "pegasus", "m2m_100", "blenderbot"), _BART_ROLES, "layers", "absolute"),
    _seq2seq(
        "bart",
        ("bart", "marian", "blenderbot-small"),
        {**_BART_ROLES, "mlp_norm": "final_layer_norm"},
        "layers",
        "absolute",
    ),
    Family(
        name="vit",
        model_types=("vit", "deit"),
        stacks=(
            Stack(
                blocks="layers",
                roles=_VIT_ROLES,
                embedding="embeddings.patch_embeddings.projection",
                tokens=False,
                positions="absolute",
            ),
        ),
    ),
    Family(
        name="dinov2",
        model_types=("dinov2",),
        stacks=(
            Stack(
                blocks="encoder.layer",
                roles=_VIT_ROLES,
                embedding="embeddings.patch_embeddings.projection",
                tokens=False,
                positions="absolute",
            ),
        ),
    ),
    Family(
        name="clip",
        model_types=("clip",),
        parts={"text": "text_model", "vision": "vision_model"},
        roles={"text.projection": "text_projection", "vision.projection": "visual_projection"},
    ),
    _tower("clip", "clip_text_model", "text", "embeddings.token_embedding", {"text.projection": "text_projection"}),
    _tower("clip", "clip_vision_model", "vision", "embeddings.patch_embedding", {"vision.projection": "visual_projection"}),
    Family(
        name="encoder-decoder",
        model_types=("encoder-decoder", "vision-encoder-decoder"),
        parts={"encoder": "encoder", "decoder": "decoder"},
    ),
    Family(
        name="vision-language",
        model_types=("llava", "gemma3", "paligemma"),
        parts={"text": "language_model", "vision": "vision_tower"},
    ),
    Family(name="siglip", model_types=("siglip",), parts={"text": "text_model", "vision": "vision_model"}),
    _tower("siglip", "siglip_text_model", "text", "embeddings.token_embedding", {"text.projection": "head"}),
    _tower("siglip", "siglip_vision_model", "vision", "embeddings.patch_embedding", {}),
)
BY_MODEL_TYPE: Mapping[str, Family] = FrozenDict({key: family for family in FAMILIES for key in family.model_types})
