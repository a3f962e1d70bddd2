"""What is known about architectures, as data: where each family keeps its blocks, projections and embeddings.

Only facts that a test checks against a model built from its config stand here. A user's own architecture is said with the same
words, in Python (:class:`Family`), as a mapping or in a YAML file; anything else is inferred (:mod:`.inference`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.types import FrozenDict, freeze

Positions = Literal["rotary", "learned", "relative", "alibi", "none"]


@dataclass(frozen=True, kw_only=True)
class Fused:
    """A projection whose rows hold several roles.

    Args:
        parts: Roles in the order of the rows.
        per_head: The parts alternate within each key/value head (GPT-NeoX, Falcon) instead of lying one after the other.
    """

    parts: tuple[str, ...]
    per_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """One stack of blocks: an encoder, a decoder, a vision tower, or the only one that a model has.

    Args:
        scope: Prefix of its role names, ``""`` if the family has one stack only.
        path: Module that takes ``input_ids`` (or the images), relative to the base model.
        blocks: ModuleList of the blocks, relative to ``path``.
        roles: Role -> path or paths relative to a block; paths that a model lacks are skipped. An ``nn.MultiheadAttention``
            stands under ``attention`` or ``cross_attention`` and expands to its four projections.
        fused: Path relative to a block -> the roles among its rows.
        embedding: Input embedding (or patch projection), relative to ``path``.
        tokens: The module at ``path`` takes ``inputs_embeds`` in place of ``input_ids``.
        causal: Position i sees positions up to i only; a string names the config field that says so.
        positions: How the stack knows positions.
        pooler: Module, relative to ``path``, that reads position 0 of the stack's output.
    """

    scope: str = ""
    path: str = ""
    blocks: str
    roles: Mapping[str, str | tuple[str, ...]] = field(default_factory=FrozenDict)
    fused: Mapping[str, Fused] = field(default_factory=FrozenDict)
    embedding: str | None = None
    tokens: bool = True
    causal: bool | str = False
    positions: Positions = "none"
    pooler: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", freeze(self.roles))
        fused = {k: v if isinstance(v, Fused) else _build(Fused, v, f"fused.{k}") for k, v in self.fused.items()}
        object.__setattr__(self, "fused", FrozenDict(fused))


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture. Paths of stacks are relative to the base model: the HF model without head, else the adapted root.

    Args:
        name: Name of the family.
        model_types: Values of ``config.model_type`` that it covers.
        stacks: Its stacks of blocks.
        parts: Scope -> path of a nested HF model with a family of its own (CLIP: two towers).
        roles: Full role name -> path relative to the HF model, for layers outside the blocks.
    """

    name: str
    model_types: tuple[str, ...] = ()
    stacks: tuple[Stack, ...] = ()
    parts: Mapping[str, str] = field(default_factory=FrozenDict)
    roles: Mapping[str, str] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        stacks = tuple(s if isinstance(s, Stack) else _build(Stack, s, f"stacks[{i}]") for i, s in enumerate(self.stacks))
        object.__setattr__(self, "stacks", stacks)
        object.__setattr__(self, "model_types", tuple(self.model_types))
        object.__setattr__(self, "parts", freeze(self.parts))
        object.__setattr__(self, "roles", freeze(self.roles))
        if not self.stacks and not self.parts:
            raise ConfigError(f"Anatomy '{self.name}' names neither stacks nor parts; give at least one stack with its blocks.")

    @classmethod
    def load(cls, value: Family | Mapping[str, Any] | str | Path) -> Family:
        """Return a family from itself, a mapping, or a YAML file.

        Raises:
            ConfigError: The file is no mapping, or a field is unknown or missing.
        """
        if isinstance(value, Family):
            return value
        if isinstance(value, (str, Path)):
            import yaml  # kept out of the import of the package

            path = Path(value)
            if not path.is_file():
                raise ConfigError(f"No anatomy file at '{path}'. Give a YAML file, a mapping, or a Family.")
            value = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _build(cls, value, "anatomy")


def _build(cls: type[Any], value: object, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected a mapping with the fields of {cls.__name__}, got {type(value).__name__}.")
    names = [f.name for f in dataclasses.fields(cls)]
    for key in value:
        if key not in names:
            raise ConfigError(f"{where}: unknown field '{key}'.{did_you_mean(str(key), names)} Fields: {', '.join(names)}.")
    try:
        return cls(**value)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Bypass:
    """Modules whose forward never runs, because their owner reads their weight directly.

    Args:
        owner: Regular expression over the owner's class name.
        children: Paths relative to the owner.
        reason: What happens instead.
        remedy: What to adapt instead.
    """

    owner: str
    children: tuple[str, ...]
    reason: str
    remedy: str


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

_LLAMA_ROLES = {
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
_BERT_ROLES = {
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
}
_NEOX_ROLES = {"mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"}
_BART_ROLES = {
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
_T5_ROLES = {
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
_VIT_ROLES = {
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.output": "attention.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
_CLIP_ROLES = {
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
        positions="learned",
        pooler="pooler",
    )
    return Family(name=name, model_types=model_types or (name,), stacks=(dataclasses.replace(stack, **changes),))


def _seq2seq(name: str, model_types: tuple[str, ...], roles: Mapping[str, Any], blocks: str, positions: Positions) -> Family:
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
        scope=scope, blocks="encoder.layers", roles=_CLIP_ROLES, embedding=embedding, tokens=False, positions="learned",
        causal=model_type == "clip_text_model",
    )  # fmt: skip
    return Family(name=name, model_types=(model_type,), stacks=(stack,), roles=roles)


FAMILIES: tuple[Family, ...] = (
    Family(
        name="llama",
        model_types=(
            "llama", "mistral", "ministral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2",
            "olmo3", "olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "smollm3", "starcoder2", "stablelm", "cohere",
            "cohere2", "granite", "granitemoe", "helium", "exaone4", "nemotron", "glm", "glm4", "ernie4_5", "seed_oss", "arcee",
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
                positions="learned",
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
                positions="learned",
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
        },
    ),
    _bert(
        "deberta",
        causal=False,
        positions="relative",
        roles={k: _BERT_ROLES[k] for k in ("attention.output", "mlp.up", "mlp.down")},
        fused={"attention.self.in_proj": Fused(parts=_QKV, per_head=True)},
    ),
    _bert(
        "deberta-v2",
        causal=False,
        positions="relative",
        roles={
            **{k: _BERT_ROLES[k] for k in ("attention.output", "mlp.up", "mlp.down")},
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
    _seq2seq(
        "bart",
        ("bart", "mbart", "pegasus", "m2m_100", "marian", "blenderbot", "blenderbot-small"),
        _BART_ROLES,
        "layers",
        "learned",
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
                positions="learned",
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
                positions="learned",
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
    Family(name="siglip", model_types=("siglip",), parts={"text": "text_model", "vision": "vision_model"}),
    _tower("siglip", "siglip_text_model", "text", "embeddings.token_embedding", {"text.projection": "head"}),
    _tower("siglip", "siglip_vision_model", "vision", "embeddings.patch_embedding", {}),
)
BY_MODEL_TYPE: Mapping[str, Family] = FrozenDict({key: family for family in FAMILIES for key in family.model_types})
