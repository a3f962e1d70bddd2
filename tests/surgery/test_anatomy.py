"""Every fact of the families is checked against what the model computes, not against names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft.errors import ConfigError, PortError, TargetError
from lightning_peft.surgery.anatomy import Anatomy, anatomy_of
from lightning_peft.surgery.architectures import BY_MODEL_TYPE
from lightning_peft.surgery.families import Family, Fused, Stack
from lightning_peft.surgery.layers import parameter
from lightning_peft.surgery.ports import AttentionPort, BodyPort, EmbeddingsPort, PatchesPort
from lightning_peft.surgery.sites import Site
from tests.surgery.zoo import IMAGE, INFERRED, MODELS, SIZES, TEXT, Translator, build, inputs, seq2seq, tokens

NAMES = tuple(MODELS)


@contextmanager
def changed(model: nn.Module, site: Site, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Apply ``change`` to the weight and bias of a site, and take it back."""
    module = site.module(model)
    weight = parameter(module, site.tensor)
    name = site.bias_name(module)
    bias = None if name is None else parameter(module, name)
    kept = [value.detach().clone() for value in (weight, bias) if value is not None]
    with torch.no_grad():
        weight.copy_(site.effective(module, change(site.weight(module)), weight.detach()))
        if bias is not None:
            part = change(site.bias(module))
            bias.copy_(part if site.rows is None else site.rows.put(bias.detach(), part, -1))
    try:
        yield
    finally:
        with torch.no_grad():
            for value, old in zip((v for v in (weight, bias) if v is not None), kept, strict=True):
                value.copy_(old)


def seen_by(model: nn.Module, path: str) -> Tensor:
    """Return the input of the module at ``path`` in a forward of the model."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(**inputs(model))
    hook.remove()
    return seen[0]


def in_first_block(anatomy: Anatomy, role: str) -> Site:
    return next(site for site in anatomy.roles[role] if anatomy.block_index(site.path) == 0)


def of(anatomy: Anatomy, local: str) -> list[str]:
    """Return prefixes of the full roles that end in ``local``, such as ``decoder.`` for ``decoder.mlp.up``."""
    return [role.removesuffix(local) for role in anatomy.roles if role.endswith(local)]


@contextmanager
def first_position_changed(model: nn.Module, site: Site) -> Iterator[None]:
    """Change what a projection, or its rows of a fused one, gives for position 0."""

    def change(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        part = (out if site.rows is None else site.rows.take(out, -1)).clone()
        part[:, 0, ::2] *= -3  # not all of it: a norm per head would undo a common factor
        return part if site.rows is None else site.rows.put(out, part, -1)

    hook = site.module(model).register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("name", NAMES)
def test_query_key_value_are_what_they_are_called(name: str) -> None:
    # True of any attention: without values no context; a query matters at its own position only, a key at the others too.
    model = build(name)
    anatomy = anatomy_of(model)
    local = ("attention.query", "attention.key", "attention.value", "attention.output")
    prefixes = of(anatomy, local[0])
    assert prefixes
    for prefix in prefixes:
        query, key, value, output = (in_first_block(anatomy, prefix + part) for part in local)
        context = seen_by(model, output.path)
        with changed(model, value, torch.zeros_like):
            assert seen_by(model, output.path).abs().max() == 0
        with first_position_changed(model, query):
            moved = (seen_by(model, output.path) - context).abs()
            assert moved[:, 1:].max() < 1e-6
        with first_position_changed(model, key):
            assert (seen_by(model, output.path) - context)[:, -1].abs().max() > 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_up_gate_down_are_what_they_are_called(name: str) -> None:
    # act(0) = 0 for every activation here; with a gate, the product is linear in `up` and not in `gate`.
    model = build(name)
    anatomy = anatomy_of(model)
    prefixes = of(anatomy, "mlp.down")
    assert prefixes or "experts.down" in anatomy.roles
    for prefix in prefixes:
        up, down = (in_first_block(anatomy, f"{prefix}mlp.{part}") for part in ("up", "down"))
        hidden = seen_by(model, down.path)
        with changed(model, up, torch.zeros_like):
            assert seen_by(model, down.path).abs().max() == 0
        if f"{prefix}mlp.gate" in anatomy.roles:
            with changed(model, up, lambda w: w * 2):
                torch.testing.assert_close(seen_by(model, down.path), hidden * 2)
            with changed(model, in_first_block(anatomy, f"{prefix}mlp.gate"), lambda w: w * 2):
                assert not torch.allclose(seen_by(model, down.path), hidden * 2)


@pytest.mark.parametrize("name", NAMES)
def test_mlp_norm_reads_the_sum_around_the_feed_forward_layer_and_no_other_norm_does(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            read[path], given[path] = args[0].flatten(0, -2).clone(), out.flatten(0, -2).clone()  # some models go on in place

        return hook

    norms = anatomy.sites("norm") if anatomy.role_names("norm") else ()
    downs = [site for role, sites in anatomy.roles.items() if role.endswith("mlp.down") for site in sites]
    pairs = [(anatomy.partner(down, "mlp.down", "mlp.up"), down) for down in downs]
    for path in {site.path for pair in pairs for site in pair if site is not None} | {norm.path for norm in norms}:
        model.get_submodule(path).register_forward_hook(note(path))
    with torch.no_grad():
        model(**inputs(model))
    for up, down in pairs:
        assert up is not None
        total = read[up.path] + given[down.path]
        inside = [s.path for s in norms if s.path in read and anatomy.block_of(s.path) == anatomy.block_of(down.path)]
        reading = [p for p in inside if read[p].shape == total.shape and torch.allclose(read[p], total, atol=1e-5)]
        named = anatomy.partner(down, "mlp.down", "mlp_norm")
        assert reading == ([] if named is None else [named.path])


@pytest.mark.parametrize("name", NAMES)
def test_patches_are_read_where_no_tokens_are(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    found = {port.path: port for port in anatomy.ports.get("patches", ()) if isinstance(port, PatchesPort)}
    assert bool(found) == ("pixel_values" in inputs(model))
    for port in found.values():
        tower = model.get_submodule(port.path)
        assert not any(isinstance(m, nn.Embedding) and m.num_embeddings == 99 for m in tower.modules())
        assert port.hidden == 32
        assert port.patch == 3 * 8 * 8
        assert anatomy.roles[f"{port.scope}.body".lstrip(".")]


@pytest.mark.parametrize("name", NAMES)
def test_family_is_known_and_complete(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    assert anatomy.family != "inferred"
    assert not anatomy.notes
    layers = {"attention.query", "attention.output", "mlp.up", "norm", "embedding", "block", "body"}
    if "experts.down" in anatomy.roles:
        layers -= {"mlp.up"}
    if "Olmo" in type(model).__name__:
        layers -= {"norm"}  # OLMo 1 has norms without weights
    for role in layers:
        assert anatomy.sites(role)
    for path in anatomy.blocks:
        assert anatomy.block_index(path + ".anything") == anatomy.layers[path]
    assert len(anatomy.blocks) == 2 * len(anatomy.ports["body"])
    assert type(model).__name__ in anatomy.describe()


def test_every_known_model_type_is_in_the_zoo() -> None:
    built = {m.config.model_type for name in NAMES for m in build(name).modules() if hasattr(m, "config")}
    assert set(BY_MODEL_TYPE) - built == {"gemma3", "paligemma"}  # built below; they share llava's data


@pytest.mark.parametrize("kind", ["Gemma3", "PaliGemma"])
def test_vision_language_models_have_two_scopes(kind: str) -> None:
    text = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**SIZES, **IMAGE, "model_type": "siglip_vision_model", "projection_dim": 32}
    model_type = "gemma3_text" if kind == "Gemma3" else "gemma"
    config = getattr(hf, f"{kind}Config")(text_config={**text, "model_type": model_type}, vision_config=vision)
    anatomy = anatomy_of(getattr(hf, f"{kind}ForConditionalGeneration")(config))
    assert anatomy.family == "vision-language"
    assert {site.path.split(".")[1] for site in anatomy.sites("text.attention.query")} == {"language_model"}
    assert {site.path.split(".")[1] for site in anatomy.sites("vision.mlp")} == {"vision_tower"}
    assert len(anatomy.sites("attention.query")) == 4


@pytest.mark.parametrize("name", NAMES)
def test_roles_on_meta_are_the_same(name: str) -> None:
    model = build(name)
    real, meta = anatomy_of(model), anatomy_of(copy.deepcopy(model).to("meta"))
    assert list(real.roles) == list(meta.roles)
    for role, sites in real.roles.items():
        assert [(s.key, s.rows, s.spec.out_features) for s in sites] == [
            (s.key, s.rows, s.spec.out_features) for s in meta.roles[role]
        ]
    assert real.ports == meta.ports


# Ports


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_port(name: str) -> None:
    model = build(name)
    anatomy = anatomy_of(model)
    if "embeddings" not in anatomy.ports:
        assert name in {"vit", "deit", "dinov2", "clip", "clip-text", "clip-vision", "siglip"}
        with pytest.raises(PortError, match="has no port 'embeddings'"):
            anatomy.port(EmbeddingsPort)
        return
    (port,) = anatomy.port(EmbeddingsPort)
    module, ids = model.get_submodule(port.path), tokens()
    extra = {k: v for k, v in inputs(model).items() if k == "encoder_hidden_states"}
    if "Decoder" in type(model).__name__ and port.scope == "decoder":
        extra["encoder_hidden_states"] = torch.randn(2, 7, 32)
    with torch.no_grad():
        embeddings = model.get_submodule(port.embedding)(ids)
        hidden = module(input_ids=ids, **extra)[0]
        assert embeddings.shape == (*ids.shape, port.hidden)
        torch.testing.assert_close(module(inputs_embeds=embeddings, **extra)[0], hidden)
        later = ids.clone()
        later[:, -1] = ids[:, -1] % 50 + 7
        moved = (module(input_ids=later, **extra)[0] - hidden)[:, 0].abs().max() > 1e-6
    assert moved.item() is not port.causal
    pooler = getattr(module, "pooler", None)
    assert (None if port.pooler is None else model.get_submodule(port.pooler)) is pooler


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "gpt2", "opt", "bart", "pegasus", "blenderbot"])
def test_max_positions_is_the_longest_sequence_that_runs(name: str) -> None:
    model = build(name)
    (port,) = anatomy_of(model).port(EmbeddingsPort)
    module = model.get_submodule(port.path)
    assert port.positions == "absolute"
    assert port.max_positions is not None
    with torch.no_grad():
        module(input_ids=tokens(1, port.max_positions))
        with pytest.raises((IndexError, RuntimeError)):
            module(input_ids=tokens(1, port.max_positions + 1))


@pytest.mark.parametrize("name", NAMES)
def test_attention_ports_are_the_calls_of_the_attention_interface(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import AttentionInterface

    model = build(name)
    anatomy = anatomy_of(model)
    calls: dict[int, tuple[int, int, int]] = {}
    original = AttentionInterface.get_interface

    def get_interface(self: Any, *args: Any) -> Any:
        function = original(self, *args)

        def record(module: nn.Module, query: Tensor, key: Tensor, *rest: Any, **kwargs: Any) -> Any:
            calls[id(module)] = (key.shape[1], key.shape[2], key.shape[3])
            return function(module, query, key, *rest, **kwargs)

        return record

    monkeypatch.setattr(AttentionInterface, "get_interface", get_interface)
    given = inputs(model)
    if "encoder_hidden_states" not in given:
        given = {k: v[:, :6] if k == "decoder_input_ids" else v for k, v in given.items()}
    with torch.no_grad():
        model(**given)
    ports = [port for port in anatomy.ports.get("attention_kv", ()) if isinstance(port, AttentionPort)]
    reached = {id(model.get_submodule(port.path)): port for port in ports}
    assert set(calls) == set(reached)
    for key, (kv_heads, length, head_dim) in calls.items():
        port = reached[key]
        assert (port.kv_heads, port.head_dim) == (kv_heads, head_dim)
        if "decoder_input_ids" in given and port.scope == "decoder":
            assert port.cross == (length != 6)
        assert port.layer == anatomy.block_index(port.path)
    if "cross" in name:
        assert sum(port.cross for port in ports) == 2


@pytest.mark.parametrize("name", NAMES)
def test_body_port_runs_its_blocks(name: str) -> None:
    model = build(name)
    for port in anatomy_of(model).port(BodyPort):
        assert all(model.get_submodule(block) in set(model.get_submodule(port.path).modules()) for block in port.blocks)
        seen: list[Any] = []
        hook = model.get_submodule(port.blocks[1]).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
        with torch.no_grad():
            model(**inputs(model))
        hook.remove()
        out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        assert out.shape[-1] == port.hidden


# What never runs, and what may not


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", [*NAMES, *INFERRED])
def test_bypassed_is_exactly_what_does_not_run(name: str, train: bool) -> None:
    model = (INFERRED[name]() if name in INFERRED else build(name)).train(train)
    anatomy = anatomy_of(model)
    called: set[str] = set()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    with torch.no_grad():
        model(**inputs(model))
    owners = {path for path, module in model.named_modules() if path and any(True for _ in module.parameters(recurse=False))}
    owners = {path for path in owners if "parametrizations" not in path}  # weight norm runs outside the module's forward
    assert {path for path in owners if anatomy.bypassed(path)} == owners - called
    for sites in anatomy.roles.values():
        assert not any(anatomy.bypassed(site.path) for site in sites)


def test_shared_names_the_remedy() -> None:
    reason = anatomy_of(build("t5")).bypassed("shared")
    assert reason is not None
    assert "encoder.embed_tokens" in reason


def test_conditional_are_experts_and_layers_under_layerdrop() -> None:
    anatomy = anatomy_of(build("mixtral"))
    assert anatomy.conditional("model.layers.0.mlp.experts")
    assert not anatomy.conditional("model.layers.0.mlp")
    dropped = anatomy_of(seq2seq("Bart", encoder_layerdrop=0.5))
    assert dropped.conditional("model.encoder.layers.1.fc1")
    assert not dropped.conditional("model.decoder.layers.1.fc1")
    assert not anatomy_of(seq2seq("Bart")).conditional("model.encoder.layers.1.fc1")


# Experts, heads, scopes


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "olmoe", "granitemoe"])
def test_expert_stacks_are_canonical(name: str) -> None:
    # The canonical (experts, out, in) of one expert maps hidden states to gate and up, and back.
    model = build(name)
    anatomy = anatomy_of(model)
    for role, columns in (("experts.gate_up", 32), ("experts.down", None)):
        for site in anatomy.roles[role]:
            weight = site.weight(site.module(model))
            assert weight.shape == (4, site.spec.out_features, site.spec.in_features)
            assert site.spec.kind == "tensor"
            assert columns in (None, site.spec.in_features)
            assert role == "experts.gate_up" or site.spec.out_features == 32
    assert any("is_transposed" in vars(m) and m.is_transposed for m in model.modules()) == (name == "gpt_oss")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("llama", ["lm_head"]),
        ("llama-base", []),
        ("llama-classifier", ["score"]),
        ("bert-mlm", ["cls.predictions.decoder"]),
        ("bert", ["classifier"]),
        ("roberta", ["classifier.dense", "classifier.out_proj"]),
        ("distilbert", ["pre_classifier", "classifier"]),
        ("deberta", ["pooler.dense", "classifier"]),
        ("t5", ["lm_head"]),
        ("vit", ["classifier"]),
        ("clip", []),
    ],
)
def test_head(name: str, head: list[str]) -> None:
    assert [site.path for site in anatomy_of(build(name)).roles.get("head", ())] == head


def test_a_model_inside_a_module_has_its_roles_and_the_outer_classifier_is_a_head() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("bert-mlm").bert
            self.config = self.net.config  # a LightningModule often keeps it; that makes it no HF model
            self.classifier = nn.Linear(32, 3)

    anatomy = anatomy_of(Outer())
    assert anatomy.family == "bert"
    assert anatomy.sites("attention.query")[0].path == "net.encoder.layer.0.attention.self.query"
    assert [site.path for site in anatomy.sites("head")] == ["classifier"]
    assert anatomy.port(EmbeddingsPort)[0].path == "net"


def test_two_models_side_by_side_are_scoped_by_their_attributes() -> None:
    anatomy = anatomy_of(nn.ModuleDict({"teacher": build("bert"), "student": build("gpt2")}))
    assert anatomy.family == "bert+gpt2"
    assert anatomy.sites("student.attention.query")[0].path == "student.transformer.h.0.attn.c_attn"
    assert len(anatomy.sites("attention.query")) == 4
    assert [port.scope for port in anatomy.port(EmbeddingsPort)] == ["teacher", "student"]


def test_unscoped_and_scoped_names() -> None:
    anatomy = anatomy_of(build("bart"))
    assert len(anatomy.sites("attention.query")) == 6  # 2 layers x (encoder, decoder, cross)
    assert len(anatomy.sites("decoder.attention.query")) == 2
    assert len(anatomy.sites("cross_attention")) == 8
    assert len(anatomy.sites("decoder.cross_attention.query")) == 2
    assert {site.path.split(".")[1] for site in anatomy.sites("encoder")} == {"encoder"}
    order = list(anatomy.tree.order)
    paths = [order.index(site.path) for site in anatomy.sites("attention")]
    assert paths == sorted(paths)


def test_unknown_role_names_the_nearest_and_those_found() -> None:
    with pytest.raises(TargetError, match=r"'attention.quary'.*Did you mean 'attention.query'.*mlp.down"):
        anatomy_of(build("llama")).sites("attention.quary")


def test_adapters_are_no_part_of_the_anatomy() -> None:
    model = build("llama")
    before = anatomy_of(model)
    for module in list(model.modules()):
        module.add_module("peft", nn.Linear(2, 2))
    after = anatomy_of(model)
    assert before.roles == after.roles
    assert list(before.tree.modules) == list(after.tree.modules)


def test_planning_data_is_hashable_and_the_model_untouched() -> None:
    model = build("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy_of(model)
    assert hash(BY_MODEL_TYPE["gpt2"]) == hash(Family.load(BY_MODEL_TYPE["gpt2"]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


# Torch's own layers


def test_torch_transformer_is_known() -> None:
    anatomy = anatomy_of(Translator(decoder=False))
    assert anatomy.family == "torch"
    assert anatomy.blocks == ("encoder.layers.0", "encoder.layers.1")
    (query, *_) = anatomy.default_sites(("attention.query",))
    assert (query.path, query.tensor, query.member) == ("encoder.layers.0.self_attn", "in_proj_weight", "query")
    assert (query.rows.start, query.rows.stop) == (0, 16)
    assert [site.path for site in anatomy.sites("mlp.down")] == ["encoder.layers.0.linear2", "encoder.layers.1.linear2"]
    assert anatomy.port(BodyPort)[0].path == "encoder"
    assert [site.path for site in anatomy.sites("embedding")] == ["embed"]
    reason = anatomy.bypassed("encoder.layers.0.self_attn.out_proj")
    assert reason is not None
    assert "encoder.layers.0.self_attn" in reason


def test_torch_encoder_and_decoder_are_scoped() -> None:
    anatomy = anatomy_of(Translator(decoder=True))
    assert len(anatomy.sites("encoder.attention.query")) == 2
    assert len(anatomy.sites("decoder.cross_attention.value")) == 3
    assert len(anatomy.sites("attention.value")) == 8
    assert anatomy.block_index("decoder.layers.2.linear1") == 2


# The user's own data, and inference


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(9, 8)
        self.parts = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(8, 24), "b": nn.Linear(8, 8)}) for _ in range(3))


OWN = {
    "name": "own",
    "stacks": [
        {
            "blocks": "parts",
            "embedding": "tok",
            "roles": {"attention.output": "b"},
            "fused": {"a": {"parts": ["attention.query", "attention.key", "attention.value"]}},
        }
    ],
}


def test_a_users_own_mapping_family_and_yaml_say_the_same(tmp_path: Path) -> None:
    import yaml

    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(OWN))
    stack = Stack(
        blocks="parts",
        embedding="tok",
        roles={"attention.output": "b"},
        fused={"a": Fused(parts=("attention.query", "attention.key", "attention.value"))},
    )
    model = Own()
    views = [anatomy_of(model, given) for given in (OWN, str(file), file, Family(name="own", stacks=(stack,)))]
    for anatomy in views:
        assert anatomy.family == "own"
        assert anatomy.roles == views[0].roles
        value = anatomy.default_sites(("attention.value",))[1]
        assert (value.path, value.rows.start, value.rows.stop) == ("parts.1.a", 16, 24)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({**OWN, "stakcs": []}, "unknown field 'stakcs'.*'stacks'"),
        ({"name": "own"}, "neither stacks nor parts"),
        ({"name": "own", "stacks": [{"roles": {}}]}, "blocks"),
        ("/no/such/file.yaml", "No anatomy file"),
    ],
)
def test_wrong_data_of_a_user(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        anatomy_of(Own(), given)


def test_data_that_does_not_fit_the_model() -> None:
    with pytest.raises(TargetError, match="'layers'.*Top-level modules: tok, parts"):
        anatomy_of(Own(), {"name": "x", "stacks": [{"blocks": "layers"}]})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
        self.norm = nn.LayerNorm(8)


def test_inference_reads_facts_and_says_so() -> None:
    model = nn.Module()
    model.tok = nn.Embedding(9, 8)
    model.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model.blocks = nn.ModuleList(Block() for _ in range(3))
    model.out = nn.Linear(8, 9)
    anatomy = anatomy_of(model)
    assert anatomy.family == "inferred"
    assert anatomy.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert [site.path for site in anatomy.sites("attention.value")] == [f"blocks.{i}.v_proj" for i in range(3)]
    assert [site.path for site in anatomy.sites("mlp.down")] == [f"blocks.{i}.mlp.fc2" for i in range(3)]
    assert anatomy.sites("norm")[0].path == "stem.1"
    assert "head" not in anatomy.roles  # nothing says that `out` is one
    assert "inferred" in anatomy.describe()
    assert "'blocks' is the longest list" in anatomy.describe()
    with pytest.raises(TargetError, match='would be a guess.*"all-linear".*attention.query'):
        anatomy.default_sites(("attention.query", "attention.value"))


def test_default_roles_must_all_exist() -> None:
    with pytest.raises(TargetError, match="no role 'mlp.down'.*experts.down"):
        anatomy_of(build("mixtral")).default_sites(("attention.value", "mlp.down"))


def test_unknown_hf_model_is_inferred_and_its_attention_still_a_port() -> None:
    anatomy = anatomy_of(hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)))
    assert anatomy.family == "inferred"
    assert "model_type 'albert' is not a known family" in anatomy.notes
    assert anatomy.port(AttentionPort)[0].kv_heads == 4
    assert anatomy.sites("embedding")[0].spec.out_features == 16


def test_known_model_type_with_foreign_blocks_is_inferred() -> None:
    model = hf.LlamaModel(hf.LlamaConfig(**{**TEXT, "num_hidden_layers": 0}))
    assert "the blocks of family 'llama' were not found in model_type 'llama'" in anatomy_of(model).notes
