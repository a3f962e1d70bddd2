"""Files that are damaged, foreign or ask for what is not here: a typed error that says what to do, and the model untouched."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, MergeError, PEFTError, UnsupportedLayerError
from lightning_peft.interop import load_hf, save_hf, suitability
from tests.backbones import BACKBONES
from tests.interop.peers import Case, change, config_of, fresh, hf_model, hf_save, tensors_of

Change = Callable[[Path], Any]


def fields(**values: Any) -> Change:
    return lambda folder: change(folder, **values)


def tensors(edit: Callable[[dict[str, Tensor]], Any]) -> Change:
    def apply(folder: Path) -> None:
        held = tensors_of(folder)
        edit(held)
        save_file(held, folder / "adapter_model.safetensors")

    return apply


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
BAD: dict[str, tuple[Change, str]] = {
    "unknown type": (fields(peft_type="BOFT"), "type BOFT, which lightning_peft does not read.*CUDA"),
    "other type": (fields(peft_type="MISS"), "type MISS, which lightning_peft does not read.*merge_and_unload"),
    "unknown field": (fields(use_magic=True), "unknown field 'use_magic'"),
    "misspelt field": (fields(rank_patern={"q_proj": 2}), "Did you mean 'rank_pattern'"),
    "no type": (fields(peft_type=None), "names no peft_type"),
    "tied by peft": (fields(ensure_weight_tying=True), "ensure_weight_tying=True"),
    "lora bias": (fields(lora_bias=True), "lora_bias=True.*variant"),
    "aLoRA": (fields(alora_invocation_tokens=[1]), "aLoRA"),
    "pissa": (fields(init_lora_weights="pissa_niter_4"), "base was changed.*path_initial_model_for_weight_conversion"),
    "loftq": (fields(init_lora_weights="loftq"), "base was changed"),
    "another rank": (fields(r=5), "rank 3 in the tensors and 5 in the config"),
    "rank that is none": (fields(r="3"), "r='3' is no positive whole number"),
    "alpha that is none": (fields(lora_alpha=-1), "lora_alpha=-1"),
    "bias that is none": (fields(bias="some"), "bias='some'"),
    "pattern that explodes": (fields(rank_pattern={"(a+)+": 3}), "repeats a group"),
    "regex that is none": (fields(target_modules="([a-z"), "is no regular expression"),
    "targets that are none": (fields(target_modules=[1]), "target_modules"),
    "more targets": (fields(target_modules=["q_proj", "v_proj", "down_proj", "up_proj"]), "none for .*up_proj.*incomplete"),
    "fewer targets": (fields(target_modules=["q_proj", "v_proj"]), "unasked ones for .*down_proj"),
    "a tensor is missing": (tensors(lambda held: held.pop(KEY)), "is missing. The file is incomplete"),
    "a tensor too many": (
        tensors(lambda held: held.update({KEY.replace("_A", "_C"): torch.zeros(2)})),
        "belongs to no adapter tensor",
    ),
    "a wrong shape": (tensors(lambda held: held.update({KEY: torch.zeros(3, 7)})), r"has shape \(3, 7\), and \(3, 16\)"),
    "integers": (tensors(lambda held: held.update({KEY: torch.zeros(3, 16, dtype=torch.int32)})), "holds torch.int32"),
    "another model": (
        tensors(lambda held: held.update({KEY.replace("layers.0", "layers.9"): held.pop(KEY)})),
        "adapts 'model.layers.9.self_attn.q_proj', which LlamaForCausalLM has not",
    ),
    "a path that climbs": (
        tensors(lambda held: held.update({KEY.replace("model.layers.0", "../../etc"): held.pop(KEY)})),
        "adapts '../../etc.self_attn.q_proj', which",
    ),
    "a name of python": (tensors(lambda held: held.update({"__class__.weight": torch.zeros(1)})), "belongs to no adapter tensor"),
    "no tensors": (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors; the copy is incomplete",
    ),
    "a pickle": (
        lambda folder: os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin"),
        "a pickle, which is not read",
    ),
    "cut tensors": (lambda folder: os.truncate(folder / "adapter_model.safetensors", 300), "adapter_model.safetensors"),
    "config that is none": (lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON"),
    "config twice": (
        lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "peft_type": "IA3"}'),
        "stands there twice",
    ),
    "token ids": (fields(trainable_token_indices=[1, 1]), "no list of different token ids"),
    "token ids without rows": (fields(trainable_token_indices=[1]), "do not belong together"),
    "experts": (fields(target_parameters=[3]), "target_parameters"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    hf_save(hf_model(Case("llama", "LoraConfig", {"r": 3, "lora_alpha": 5})), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    return tmp_path


@pytest.mark.parametrize(("spoil", "match"), BAD.values(), ids=BAD)
def test_bad_files(spoil: Change, match: str, folder: Path) -> None:
    spoil(folder)
    model = fresh("llama")
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, [type(m) for m in model.modules()]
    with pytest.raises(PEFTError, match=match):
        load_hf(model, folder)
    assert [type(m) for m in model.modules()] == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_unknown_fields_that_are_off(folder: Path) -> None:
    change(folder, use_next_year=False, next_config=None)
    with pytest.warns(UserWarning, match="unknown fields that are off: use_next_year, next_config"):
        load_hf(fresh("llama"), folder)


def test_links_out_of_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    (folder / "adapter_model.safetensors").rename(secret)
    (folder / "adapter_model.safetensors").symlink_to(secret)
    with pytest.raises(FormatError, match="leads out of its folder"):
        load_hf(fresh("llama"), folder)


@pytest.mark.parametrize("name", ["../adapter", "no/such/adapter", "nowhere", "user/../x/y"])
def test_names_that_are_nothing(name: str) -> None:
    with pytest.raises(FormatError, match="no folder"):
        load_hf(fresh("llama"), name)


def test_a_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(ConfigError, match="revision='main'"):
        load_hf(fresh("llama"), folder, revision="main")


def test_a_repository_comes_from_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    load_hf(fresh("llama"), "user/adapter", revision="v1")
    assert asked["name"] == "user/adapter"
    assert asked["revision"] == "v1"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["allow_patterns"])
    with pytest.raises(FormatError, match="Hugging Face peft, which is another format"):
        lp.load_adapter(fresh("llama"), "user/adapter", revision="v2")
    assert asked["revision"] == "v2"
    with pytest.raises(ConfigError, match="revision='v2'"):
        lp.load_adapter(fresh("llama"), folder, revision="v2")


def test_hra_with_gram_schmidt_and_odd_rank(tmp_path: Path) -> None:
    hf_save(hf_model(Case("llama", "HRAConfig", {"r": 4, "apply_GS": True})), tmp_path / "gs")
    with pytest.raises(CompatibilityError, match="apply_GS=True: Gram-Schmidt"):
        load_hf(fresh("llama"), tmp_path / "gs")
    hf_save(hf_model(Case("llama", "HRAConfig", {"r": 3})), tmp_path / "odd")
    with pytest.raises(ConfigError, match="even"):
        load_hf(fresh("llama"), tmp_path / "odd")


def test_tucker_kernels(tmp_path: Path) -> None:
    hf_save(hf_model(Case("llama", "LoKrConfig", {"r": 2})), tmp_path)
    change(tmp_path, use_effective_conv2d=True)
    with pytest.raises(CompatibilityError, match="Tucker"):
        load_hf(fresh("llama"), tmp_path)


def test_prefixes_of_encoder_decoders_and_prompts_before_a_pooler(tmp_path: Path) -> None:
    hf_save(hf_model(Case("t5", "PrefixTuningConfig", {"num_virtual_tokens": 3})), tmp_path / "prefix")
    with pytest.raises(CompatibilityError, match="decoder's self-attention only"):
        load_hf(fresh("t5"), tmp_path / "prefix")
    hf_save(hf_model(Case("bert", "PromptTuningConfig", {"num_virtual_tokens": 3})), tmp_path / "prompt")
    with pytest.raises(CompatibilityError, match="pooler.*reads position 0"):
        load_hf(fresh("bert"), tmp_path / "prompt")


UNSAYABLE: dict[str, tuple[str, lp.PEFTStrategy, type[Exception], str]] = {
    "no type": ("llama", lp.HoulsbyAdapter(), CompatibilityError, "HF peft has no type for HoulsbyAdapter"),
    "no type, merges": ("llama", lp.SSF(), CompatibilityError, "no type for SSF.*as_lora"),
    "biases alone": ("bert", lp.BitFit(), CompatibilityError, "no type for BitFit"),
    "two methods": (
        "llama",
        lp.Compose(parts=(lp.LoRA(rank=2, targets=["q_proj"]), lp.IA3(targets=["k_proj"], feedforward=[]))),
        CompatibilityError,
        "one method in a file",
    ),
    "tokens beside loha": (
        "llama",
        lp.Compose(parts=(lp.LoHa(rank=2, targets=["q_proj"]), lp.TokenRows(ids=(1,)))),
        CompatibilityError,
        "beside a LoRA only, not beside LOHA",
    ),
    "conv1d": (
        "gpt2",
        lp.LoHa(rank=2, targets=["c_attn"]),
        UnsupportedLayerError,
        "kind 'Conv1D', which LOHA of HF peft does not adapt",
    ),
    "parts": ("gpt2", lp.DoRA(rank=2), UnsupportedLayerError, "part of a fused weight"),
    "norms": ("llama", lp.LoRA(rank=1, targets="norm"), UnsupportedLayerError, "kind 'norm'"),
    "attention": ("attention", lp.LoRA(rank=2, targets=["attention"]), UnsupportedLayerError, "kind 'tensor'"),
    "dilated": ("conv_net", lp.LoRA(rank=2, targets=["body"]), UnsupportedLayerError, "dilation"),
    "groups": ("conv_net", lp.OFT(block_size=2, targets=["classifier"], neumann_terms=3), ConfigError, "neumann_terms=3"),
    "ranks of hra": (
        "llama",
        lp.HRA(rank=2, targets=["q_proj", "v_proj"], rank_per_target={"v_proj": 4}),
        ConfigError,
        "one rank for all layers",
    ),
    "half a module": (
        "bert",
        lp.Compose(parts=(lp.LoRA(rank=2, targets=["query"]), lp.BitFit(targets=["key"]))),
        ConfigError,
        "all biases of a model, or those of the adapted layers",
    ),
    "prefix of learned positions": ("gpt2", lp.PrefixTuning(num_virtual_tokens=2), PEFTError, "shift_positions=True"),
}


@pytest.mark.parametrize(("backbone", "strategy", "error", "match"), UNSAYABLE.values(), ids=UNSAYABLE)
def test_what_hf_cannot_say(backbone: str, strategy: lp.PEFTStrategy, error: type[Exception], match: str, tmp_path: Path) -> None:
    handle = lp.inject(BACKBONES[backbone].fresh(), strategy)
    with pytest.raises(error, match=match):
        save_hf(handle, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("name", "match"),
    {
        "no type": "no type for HoulsbyAdapter",
        "two methods": "several methods",
        "tokens beside loha": "beside a LoRA only, not beside LOHA",
        "groups": "neumann_terms=3",
    }.items(),
)
def test_inspect_says_it_before(name: str, match: str, tmp_path: Path) -> None:
    backbone, strategy, *_ = UNSAYABLE[name]
    lp.save_adapter(lp.inject(BACKBONES[backbone].fresh(), strategy), tmp_path)
    verdict = suitability(tmp_path, "hf")
    assert verdict.blockers
    assert re.search(match, verdict.text())


def test_a_merged_adapter(tmp_path: Path) -> None:
    handle = lp.inject(fresh("llama"), lp.LoRA(rank=2))
    handle.merge()
    with pytest.raises(MergeError, match="save_hf"):
        save_hf(handle, tmp_path)


def test_every_method_is_written_or_named_as_one_without_a_type() -> None:
    """A method added later is here on purpose: give it a table in interop, or a name in this set."""
    from lightning_peft.interop.registry import FORMATS

    written = {cls.info.name for table in FORMATS for cls in table.methods}
    without = {
        "adamix", "bitfit", "compacter", "compacter_plus_plus", "compose", "diff_pruning", "fish", "full", "gated", "head", "houlsby",
        "ladder_side_tuning", "layer_selection", "magnitude_mask", "mam", "meft", "mixture", "parallel_adapter", "pfeiffer", "random_mask",
        "remora", "ssf", "unipelt", "visual_prompt_tuning",
    }  # fmt: skip
    ours = {info.name for info in lp.list_methods() if info.cls.__module__.startswith("lightning_peft.")}
    assert not written & without
    assert written | without == ours


def test_configs_are_read_within_bounds(folder: Path) -> None:
    config = config_of(folder)
    config["auto_mapping"] = [[]] * 10
    for _ in range(80):
        config["auto_mapping"] = [config["auto_mapping"]]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="deeper"):
        load_hf(fresh("llama"), folder)
