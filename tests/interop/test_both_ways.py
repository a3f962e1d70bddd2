"""Every type: a file of HF peft with random weights gives its output here, and our file gives ours there; the tensors come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lightning_peft as lp
from lightning_peft.interop import load_hf, save_hf
from tests.interop.peers import Case, assert_same_tensors, close, fresh, hf_load, hf_model, hf_save, logits

ALL = ("llama", "gpt2", "bert", "t5")
LINEAR = ("llama", "bert", "t5")  # those without Conv1D, which HF adapts with some types only
DOWN = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bert": ["intermediate.dense"], "t5": ["wo"]}
NORMS = {"llama": ["input_layernorm", "norm"], "gpt2": ["ln_1", "ln_f"], "bert": ["LayerNorm"], "t5": ["layer_norm"]}
TABLES = {"llama": ["embed_tokens"], "gpt2": ["wte"], "bert": ["word_embeddings"], "t5": ["shared"]}
TYPES: dict[str, tuple[str, tuple[str, ...], dict]] = {
    "lora": ("LoraConfig", ALL, {"r": 3, "lora_alpha": 5}),
    "rslora": ("LoraConfig", ("llama",), {"r": 4, "lora_alpha": 5, "use_rslora": True}),
    "dora": ("LoraConfig", ALL, {"r": 3, "lora_alpha": 5, "use_dora": True}),
    "adalora": ("AdaLoraConfig", ALL, {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}),
    "vera": ("VeraConfig", ALL, {"r": 5}),
    "vera_seed": ("VeraConfig", ("llama",), {"r": 5, "save_projection": False, "projection_prng_key": 7}),
    "loha": ("LoHaConfig", LINEAR, {"r": 2, "alpha": 3}),
    "lokr": ("LoKrConfig", LINEAR, {"r": 2, "alpha": 3}),
    "lokr_both": ("LoKrConfig", ("llama",), {"r": 1, "alpha": 3, "decompose_both": True, "decompose_factor": 4}),
    "oft": ("OFTConfig", LINEAR, {"oft_block_size": 4}),
    "oft_exact": ("OFTConfig", ("llama",), {"oft_block_size": 4, "use_cayley_neumann": False}),
    "oft_blocks": ("OFTConfig", ("llama",), {"oft_block_size": 0, "r": 4}),
    "oft_shared": ("OFTConfig", ("llama",), {"oft_block_size": 8, "block_share": True, "num_cayley_neumann_terms": 4}),
    "coft": ("OFTConfig", ("llama",), {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    "hra": ("HRAConfig", LINEAR, {"r": 4}),
    "ia3": ("IA3Config", ALL, {}),
    "ln": ("LNTuningConfig", ALL, {}),
    "prompt": ("PromptTuningConfig", ("llama", "gpt2", "t5"), {"num_virtual_tokens": 3}),
    "p_tuning": ("PromptEncoderConfig", ("llama", "gpt2", "t5"), {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "prefix": ("PrefixTuningConfig", ("llama", "gpt2", "bert"), {"num_virtual_tokens": 3}),
    "prefix_mlp": (
        "PrefixTuningConfig",
        ("llama",),
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "tokens": ("TrainableTokensConfig", ALL, {"token_indices": [7, 3, 1]}),
}


def cases() -> list[pytest.ParameterSet]:
    found = []
    for name, (config, backbones, options) in TYPES.items():
        for backbone in backbones:
            more = dict(options)
            if name == "ia3":
                more["feedforward_modules"] = DOWN[backbone]
            if name == "ln":
                more["target_modules"] = NORMS[backbone]
            if name == "tokens":
                more["target_modules"] = TABLES[backbone]
            found.append(pytest.param(name, Case(backbone, config, more), id=f"{name}-{backbone}"))
    return found


@pytest.mark.parametrize(("name", "case"), cases())
def test_files_give_the_same_output_on_both_sides(name: str, case: Case, tmp_path: Path) -> None:
    theirs = hf_model(case)
    expected = logits(theirs, case.backbone)
    hf_save(theirs, tmp_path / "theirs")

    model = fresh(case.backbone)
    before = logits(model, case.backbone)
    handle = load_hf(model, tmp_path / "theirs")
    close(logits(model, case.backbone), expected)
    assert not torch.allclose(before, expected, atol=1e-2)  # the comparison could have failed
    with handle.disabled():
        assert torch.equal(logits(model, case.backbone), before)

    export = save_hf(handle, tmp_path / "ours")
    close(logits(hf_load(case.backbone, tmp_path / "ours"), case.backbone), expected)
    if name != "p_tuning":  # read as prompt tuning: its encoder is in no file
        assert export.peft_type == theirs.peft_config["default"].peft_type.value
    if name not in ("prompt", "p_tuning", "vera_seed") or case.backbone != "t5":
        same = tmp_path / "again"
        other = fresh(case.backbone)
        save_hf(load_hf(other, tmp_path / "ours"), same)
        assert_same_tensors(tmp_path / "ours", same)
    if name not in ("vera_seed",) and not (case.backbone == "t5" and name in ("prompt", "p_tuning")):
        assert_unchanged(name, tmp_path)


def assert_unchanged(name: str, folder: Path) -> None:
    """What HF wrote comes back from here bit for bit; token rows in the order of their ids."""
    if name == "tokens":
        return
    assert_same_tensors(folder / "theirs", folder / "ours")


def test_a_loaded_adapter_is_one_of_ours(tmp_path: Path) -> None:
    case = Case("llama", "LoraConfig", {"r": 3, "lora_alpha": 5})
    hf_save(hf_model(case), tmp_path / "theirs")
    model = fresh("llama")
    handle = load_hf(model, tmp_path / "theirs", name="mine")
    assert handle.name == "mine"
    assert handle.strategy == lp.LoRA(rank=3, alpha=5.0, targets=["q_proj", "down_proj", "v_proj"]) or isinstance(
        handle.strategy, lp.LoRA
    )
    expected = logits(model, "llama")
    lp.save_adapter(handle, tmp_path / "native")
    handle.merge()
    close(logits(model, "llama"), expected)
    handle.unmerge()
    handle.remove()
    lp.load_adapter(model, tmp_path / "native")
    close(logits(model, "llama"), expected)
