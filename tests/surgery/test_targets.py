"""Targets: what each way to name a layer selects, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_peft.errors import ConfigError, TargetError, UnsupportedLayerError
from lightning_peft.surgery.anatomy import Anatomy, anatomy_of
from lightning_peft.surgery.targets import Targets, value_for, values_for
from tests.surgery.zoo import INFERRED, Translator, build

LINEAR = frozenset({"linear"})


@pytest.fixture(scope="module")
def llama() -> Anatomy:
    return anatomy_of(build("llama"))


@pytest.fixture(scope="module")
def gpt2() -> Anatomy:
    return anatomy_of(build("gpt2"))


@pytest.fixture(scope="module")
def bart() -> Anatomy:
    return anatomy_of(build("bart"))


def keys(anatomy: Anatomy, value: Any, **options: Any) -> list[str]:
    targets = Targets.parse(value)
    assert targets is not None
    return [site.key for site in targets.resolve(anatomy, **options)]


# Saying it


def test_parse_takes_what_python_and_yaml_say() -> None:
    full = Targets(include=("q_proj", "v_proj"), exclude=("layers.0",), layers=(1, 2))
    assert Targets.parse(None) is None
    assert Targets.parse(full) is full
    assert Targets.parse("all-linear") == Targets(include=("all-linear",))
    assert Targets.parse(["q_proj"]) == Targets(include=("q_proj",))
    mapping = {"include": ["q_proj", "v_proj"], "exclude": "layers.0", "layers": [1, 2]}
    assert Targets.parse(mapping) == full
    assert hash(Targets.parse(mapping)) == hash(full)


def test_layers_take_numbers_and_ranges() -> None:
    assert Targets.parse({"include": "mlp", "layers": ["4-6", 0]}) == Targets(include=("mlp",), layers=(0, 4, 5, 6))
    assert Targets(include=("mlp",), layers="2-3").layers == (2, 3)  # type: ignore[arg-type]
    assert Targets(include=("mlp",), layers=range(2)).layers == (0, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"includes": ["a"]}, "unknown field 'includes'.*'include'"),
        ({"exclude": ["a"]}, "`include` is missing"),
        ([], "`include` is empty"),
        ([1], "`targets` must be a string or a list of strings"),
        ({"include": "a", "layers": [-1]}, "`layers` takes numbers"),
        ({"include": "a", "layers": [0, "3-1"]}, "`layers` takes numbers"),
        ({"include": "a", "layers": [True]}, "`layers` takes numbers"),
        ({"include": "a", "layers": 1.5}, "`layers` takes numbers"),
    ],
)
def test_parse_refuses(value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Targets.parse(value)


# What each pattern means


def test_a_plain_list_means_suffixes_as_in_hf_peft(llama: Anatomy) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    for names in (["q_proj", "v_proj"], ["self_attn.o_proj"], ["model.layers.1.mlp.up_proj"], ["lm_head", "down_proj"]):
        config = LoraConfig(target_modules=names)
        theirs = [path for path in llama.tree.modules if path and check_target_module_exists(config, path)]
        assert keys(llama, names) == theirs


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-mlm", "t5", "bart", "opt", "deberta-v2", "qwen2_moe"])
def test_all_linear_is_what_hf_peft_takes(name: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules="all-linear", fan_in_fan_out=name == "gpt2")
    theirs = {path for path, m in inject_adapter_in_model(config, build(name)).named_modules() if hasattr(m, "lora_A")}
    routers = {f"model.layers.{i}.mlp.shared_expert_gate" for i in (0, 1)} if name == "qwen2_moe" else set()
    heads = {"pooler.dense", "classifier"} if name == "deberta-v2" else set()
    assert set(keys(anatomy_of(build(name)), "all-linear")) == theirs - routers - heads


def test_all_linear_leaves_out_heads_routers_attention_children_and_what_never_runs() -> None:
    assert "classifier.dense" not in keys(anatomy_of(build("roberta")), "all-linear")
    torch_keys = keys(anatomy_of(Translator(decoder=False)), "all-linear")
    assert torch_keys == [*(f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)), "out"]
    wavlm = keys(anatomy_of(INFERRED["wavlm"]()), "all-linear")
    assert not any("q_proj" in key for key in wavlm)
    assert "encoder.layers.0.feed_forward.output_dense" in wavlm
    experts = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(2)), "gate": nn.Linear(4, 2)})
    assert keys(anatomy_of(nn.ModuleDict({"moe": experts, "other": nn.Linear(4, 4)})), "all-linear") == ["other"]


def test_roles_prefixes_and_slices(gpt2: Anatomy) -> None:
    assert keys(gpt2, "attention.value") == [f"transformer.h.{i}.attn.c_attn[value]" for i in (0, 1)]
    assert keys(gpt2, ["attention.value", "attention.query", "attention.query"]) == [
        f"transformer.h.{i}.attn.c_attn[{part}]" for i in (0, 1) for part in ("query", "value")
    ]
    assert keys(gpt2, "mlp") == [f"transformer.h.{i}.mlp.{name}" for i in (0, 1) for name in ("c_fc", "c_proj")]


def test_a_whole_fused_weight_takes_the_place_of_its_parts(gpt2: Anatomy) -> None:
    assert keys(gpt2, ["attention.query", "c_attn"]) == [f"transformer.h.{i}.attn.c_attn" for i in (0, 1)]


def test_globs_and_regular_expressions_match_whole_paths(llama: Anatomy) -> None:
    assert keys(llama, "*.0.*.q_proj") == ["model.layers.0.self_attn.q_proj"]
    assert keys(llama, "*layers.?.mlp.up_proj") == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert keys(llama, r"re:.*\.(q|v)_proj") == [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qv"]
    with pytest.raises(TargetError, match="matches no role and no module"):
        keys(llama, "re:q_proj")
    with pytest.raises(TargetError, match="is no regular expression"):
        keys(llama, "re:(")


def test_broad_patterns_skip_what_a_method_cannot_adapt(llama: Anatomy) -> None:
    inside = keys(llama, "model.*", kinds=LINEAR)
    assert "model.layers.0.mlp.up_proj" in inside
    assert not any("norm" in key or "embed" in key for key in inside)
    with pytest.raises(UnsupportedLayerError, match="none with a weight that this method can adapt"):
        keys(llama, "*norm*", kinds=LINEAR)


def test_exclude_and_layers(bart: Anatomy, llama: Anatomy) -> None:
    value = {"include": ["attention.query"], "exclude": ["decoder"], "layers": [1]}
    assert keys(bart, value) == ["model.encoder.layers.1.self_attn.q_proj"]
    assert keys(llama, {"include": "all-linear", "exclude": ["mlp", "layers.0", "re:.*[kv]_proj"]}) == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.o_proj",
    ]
    assert len(keys(llama, {"include": ["all-linear", "norm"], "layers": [0]})) == 9
    assert keys(llama, {"include": ["norm"], "exclude": ["model.layers"]}) == ["model.norm"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"include": "mlp", "layers": [2]}, r"layers \[2\] do not exist; this model has 2 blocks"),
        ({"include": "lm_head", "layers": [0]}, "outside the blocks"),
        ({"include": "mlp", "exclude": ["mlp"]}, "nothing is left"),
        ({"include": "mlp", "exclude": ["downproj"]}, "'downproj' matches no role and no module.*'down_proj'"),
    ],
)
def test_exclude_and_layers_refuse(llama: Anatomy, value: Any, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        keys(llama, value)


def test_paths_as_seen_from_an_enclosing_module() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    anatomy = anatomy_of(net)
    for name in ("0", "net.0", "re:net\\.0"):
        assert keys(anatomy, name, prefix="net.") == ["0"]
    with pytest.raises(TargetError):
        keys(anatomy, "net.0")


def test_a_root_that_is_a_layer() -> None:
    assert keys(anatomy_of(nn.Linear(3, 3)), "all-linear") == [""]


def test_shared_modules_are_found_under_each_name_and_once() -> None:
    layer = nn.Linear(4, 4)
    anatomy = anatomy_of(nn.ModuleDict({"first": layer, "second": layer}))
    assert keys(anatomy, "second") == keys(anatomy, ["first", "second"]) == keys(anatomy, "all-linear") == ["first"]


def test_nothing_inside_an_adapter_is_matched() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4)})
    model["fc"].add_module("peft", nn.ModuleDict({"fc": nn.Linear(4, 4)}))
    assert keys(anatomy_of(model), "fc") == keys(anatomy_of(model), "*fc*") == ["fc"]


def test_order_is_that_of_the_model_whatever_the_order_of_patterns(llama: Anatomy) -> None:
    assert keys(llama, ["v_proj", "mlp", "q_proj"]) == keys(llama, ["q_proj", "v_proj", "mlp.down", "mlp.gate", "mlp.up"])


# nn.MultiheadAttention and expert stacks


def test_attention_and_its_children_lead_to_its_weights() -> None:
    anatomy = anatomy_of(Translator(decoder=False))
    path = "encoder.layers.0.self_attn"
    assert keys(anatomy, path) == [f"{path}[input]", f"{path}[output]"]
    assert keys(anatomy, "*.0.self_attn.out_proj") == [f"{path}[output]"]
    assert keys(anatomy, "layers.0.self_attn.out_proj") == [f"{path}[output]"]
    assert keys(anatomy, "attention.value") == [f"encoder.layers.{i}.self_attn[value]" for i in (0, 1)]
    assert keys(anatomy, "*.0.*") == keys(anatomy, "re:.*\\.0\\..*")
    with pytest.raises(UnsupportedLayerError, match="'tensor'"):
        keys(anatomy, "out_proj", kinds=LINEAR)


def test_experts_by_role_module_and_parameter() -> None:
    anatomy = anatomy_of(build("mixtral"))
    both = [f"model.layers.{i}.mlp.experts[{part}]" for i in (0, 1) for part in ("down", "gate_up")]
    assert keys(anatomy, "experts") == both
    assert keys(anatomy, "mlp.experts") == both
    assert keys(anatomy, "experts.gate_up_proj") == keys(anatomy, "experts.gate_up") == both[1::2]


# Refusals


@pytest.mark.parametrize(
    ("name", "value", "kinds", "error", "message"),
    [
        ("llama", "qproj", None, TargetError, "'qproj' matches no role and no module.*Did you mean 'q_proj'.*attention.query"),
        ("llama", "model.layers", None, TargetError, "a ModuleList.*never adapted.*'model.layers.0'"),
        ("llama", "self_attn", None, UnsupportedLayerError, "LlamaAttention.*q_proj"),
        ("llama", "embedding", LINEAR, UnsupportedLayerError, "model.embed_tokens.*'embedding'.*linear"),
        ("llama", "embed_tokens", LINEAR, UnsupportedLayerError, "'embedding'"),
        ("t5", "shared", None, TargetError, "never runs.*encoder.embed_tokens"),
        ("deberta-relative", "rel_embeddings", None, TargetError, "never runs.*pos_proj"),
        ("bart-decoder", "encoder_attn.q_proj", None, TargetError, "never runs.*add_cross_attention"),
    ],
)
def test_refusals(name: str, value: str, kinds: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keys(anatomy_of(build(name)), value, kinds=kinds)


@pytest.mark.parametrize(("name", "value"), [("wavlm", "q_proj"), ("mamba", "dt_proj"), ("longformer", "query_global")])
def test_a_layer_that_never_runs_is_refused(name: str, value: str) -> None:
    with pytest.raises(TargetError, match=f"'{value}' matches .*never runs.*adapt"):
        keys(anatomy_of(INFERRED[name]()), value)


def test_a_role_in_all_scopes_is_named_outright(bart: Anatomy) -> None:
    with pytest.raises(UnsupportedLayerError, match="kind 'linear'"):
        keys(bart, "attention.query", kinds={"norm"})
    assert {key.rpartition(".")[2] for key in keys(bart, "encoder", kinds={"norm"})} == {
        "self_attn_layer_norm", "final_layer_norm", "layernorm_embedding",
    }  # fmt: skip


def test_suffixes_skip_nothing_silently(bart: Anatomy) -> None:
    # `embed_tokens` names two layers outright; a method for linear layers gets neither, with an error.
    assert keys(bart, "embed_tokens") == ["model.encoder.embed_tokens", "model.decoder.embed_tokens"]
    with pytest.raises(UnsupportedLayerError):
        keys(bart, ["embed_tokens", "q_proj"], kinds=LINEAR)


def test_whole_modules_for_methods_that_adapt_outputs(llama: Anatomy) -> None:
    (site, *_) = Targets(include=("self_attn",)).resolve(llama, kinds={"module"})
    assert (site.path, site.spec.kind) == ("model.layers.0.self_attn", "module")
    assert len(keys(llama, "block", kinds={"module"})) == 2
    assert [s.spec.kind for s in Targets(include=("down_proj",)).resolve(llama, kinds={"module"})] == ["module"] * 2
    assert [s.spec.kind for s in Targets(include=("down_proj",)).resolve(llama, kinds={"module", "linear"})] == ["linear"] * 2


# Values per target


def test_values_per_target(llama: Anatomy) -> None:
    sites = Targets(include=("all-linear",)).resolve(llama)
    patterns = {"layers.1.mlp.up_proj": 1, "mlp.up": 2, "re:.*layers\\.0.*": 3, "*v_proj": 4}
    values = {site.path: value for site, value in zip(sites, values_for(sites, patterns, 8, llama), strict=True)}
    assert values["model.layers.1.mlp.up_proj"] == 1
    assert values["model.layers.0.mlp.up_proj"] == 2
    assert values["model.layers.0.self_attn.v_proj"] == 3
    assert values["model.layers.1.self_attn.v_proj"] == 4
    assert values["model.layers.1.self_attn.q_proj"] == 8
    assert [value_for(site, patterns, 8, llama) for site in sites] == list(values.values())


def test_values_per_target_know_slices(gpt2: Anatomy) -> None:
    sites = gpt2.sites("attention")
    assert values_for(sites, {"attention.query": 4, "c_attn": 2}, 8, gpt2)[:4] == (4, 2, 2, 8)


def test_a_pattern_that_decides_nothing_is_an_error(llama: Anatomy) -> None:
    sites = llama.sites("attention.query")
    with pytest.raises(TargetError, match="'v_proj' sets a value for no target: it names none of the adapted layers"):
        values_for(sites, {"v_proj": 1}, 8, llama)
    with pytest.raises(TargetError, match="'q_proj' sets a value for no target: an earlier pattern"):
        values_for(sites, {"attention.query": 1, "q_proj": 2}, 8, llama)


def test_resolving_changes_nothing(gpt2: Anatomy) -> None:
    before = {name: value.clone() for name, value in gpt2.root.state_dict().items()}
    first, second = keys(gpt2, ["all-linear", "attention.query"]), keys(gpt2, ["all-linear", "attention.query"])
    assert first == second
    assert all(torch.equal(before[name], value) for name, value in gpt2.root.state_dict().items())
