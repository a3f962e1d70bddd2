"""What only LoRA's files have: patterns, biases, token rows, whole modules, embeddings, fused parts, experts, other starts."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, UnsupportedLayerError
from lightning_peft.interop import load_hf, save_hf, suitability
from lightning_peft.nn.square_matrix import side_of
from tests.backbones import BACKBONES, run
from tests.interop.peers import (
    Case,
    assert_same_tensors,
    close,
    config_of,
    fresh,
    hf_load,
    hf_model,
    hf_save,
    logits,
    shake,
    tensors_of,
)
from tests.papers.test_mora import reference

LORA = {"r": 3, "lora_alpha": 5}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            **LORA,
            "rank_pattern": {"v_proj": 2, "^model.layers.1.self_attn.q_proj": 4},
            "alpha_pattern": {"layers.0.*down_proj": 9},
        },
    ),
    "patterns rslora": ("llama", {**LORA, "use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 7}}),
    "layers": ("llama", {**LORA, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]}),
    "layers pattern": ("llama", {**LORA, "target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}),
    "regex": ("llama", {**LORA, "target_modules": r".*layers\.0.*(q_proj|v_proj)"}),
    "all-linear": ("llama", {**LORA, "target_modules": "all-linear"}),
    "exclude": ("bert", {**LORA, "target_modules": ["dense"], "exclude_modules": ["pooler.dense"]}),
    "bias of lora": ("gpt2", {**LORA, "bias": "lora_only"}),
    "all biases": ("bert", {**LORA, "bias": "all"}),
    "tokens": ("llama", {**LORA, "trainable_token_indices": [5, 2]}),
    "tokens by name": ("llama", {**LORA, "trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]}}),
    "tied tokens": ("gpt2", {**LORA, "trainable_token_indices": [5, 2]}),
    "tied tokens of t5": ("t5", {**LORA, "trainable_token_indices": [5, 2]}),
    "head": ("llama", {**LORA, "modules_to_save": ["lm_head", "norm"]}),
    "embedding": ("llama", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding dora": ("llama", {**LORA, "use_dora": True, "target_modules": ["embed_tokens", "q_proj"]}),
    "tied embedding": ("gpt2", {**LORA, "target_modules": ["wte", "c_attn"]}),
    "lm_head": ("llama", {**LORA, "target_modules": ["lm_head", "q_proj"]}),
}


@pytest.mark.parametrize(("backbone", "options"), VARIANTS.values(), ids=VARIANTS)
def test_variants_of_lora(backbone: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs = hf_model(Case(backbone, "LoraConfig", options))
    if options.get("bias") == "all":
        shake(p for n, p in theirs.named_parameters() if n.endswith("bias") and not p.requires_grad)
    expected = logits(theirs, backbone)
    hf_save(theirs, tmp_path / "theirs")
    model = fresh(backbone)
    before = copy.deepcopy(model.state_dict())
    handle = load_hf(model, tmp_path / "theirs")
    close(logits(model, backbone), expected)
    save_hf(handle, tmp_path / "ours")
    close(logits(hf_load(backbone, tmp_path / "ours"), backbone), expected)
    handle.remove()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


STARTS: dict[str, tuple[str, lp.PEFTStrategy]] = {
    "pissa": ("llama", lp.LoRA(rank=3, alpha=4.0, init="pissa", targets=["q_proj", "down_proj"])),
    "olora rslora": ("llama", lp.LoRA(rank=3, alpha=4.0, init="olora", rank_stabilized=True, targets=["q_proj", "down_proj"])),
    "pissa of conv1d": ("gpt2", lp.LoRA(rank=3, alpha=4.0, init="pissa", targets=["c_attn"])),
    "relora": ("llama", lp.ReLoRA(rank=2, alpha=4.0, rounds=3, targets=["q_proj"])),
    "dylora": ("llama", lp.DyLoRA(rank=4, alpha=4.0, targets=["q_proj"])),
    "lora plus": ("t5", lp.LoRAPlus(rank=2, alpha=4.0, targets=["q", "v"])),
    "lora fa": ("bert", lp.LoRAFA(rank=2, alpha=4.0, targets=["query"])),
    "dora pissa": ("llama", lp.DoRA(rank=2, alpha=4.0, init="pissa", targets=["q_proj"])),
    "fused parts": ("gpt2", lp.LoRA(rank=2, alpha=4.0)),
    "fused parts of other ranks": ("gpt2", lp.LoRA(rank=2, alpha=4.0, rank_per_target={"attention.value": 3})),
    "ia3 of fused parts": ("gpt2", lp.IA3()),
    "other ranks": ("llama", lp.LoRA(rank=2, targets=["q_proj", "v_proj"], rank_per_target={"re:.*0.*v_proj": 4}, alpha_per_target={"q_proj": 3.0})),
    "lora and bitfit": ("llama", lp.Compose(parts=(lp.LoRA(rank=2, targets=["q_proj"]), lp.BitFit()))),
    "lora and tokens": ("gpt2", lp.Compose(parts=(lp.LoRA(rank=2, targets=["c_attn"]), lp.TokenRows(ids=(3, 1))))),
    "lora and norms": ("llama", lp.Compose(parts=(lp.LoRA(rank=2, targets=["q_proj"]), lp.LNTuning()))),
    "lora and a head": ("bert", lp.Compose(parts=(lp.LoRA(rank=2, targets=["query"]), lp.LayerSelection(targets=["classifier"])))),
    "biases of the adapted": ("gpt2", lp.LoRA(rank=2, targets=["c_attn"], bias="adapted")),
    "prefix": ("llama", lp.PrefixTuning(num_virtual_tokens=3)),
    "prefix of an mlp": ("llama", lp.PrefixTuning(num_virtual_tokens=3, projection=True, projection_size=8)),
    "p-tuning": ("llama", lp.PTuning(num_virtual_tokens=3, encoder="lstm", hidden_size=8)),
    "tokens": ("gpt2", lp.TokenRows(ids=(3, 1))),
    "prompt": ("t5", lp.PromptTuning(num_virtual_tokens=3)),
    "oft of two sizes": ("llama", lp.OFT(block_size=4, targets=["q_proj", "down_proj"], block_size_per_target={"down_proj": 6}, neumann_terms=5)),
    "lokr": ("bert", lp.LoKr(rank=2, alpha=3.0, targets=["query", "intermediate.dense"], rank_per_target={"query": 1}, alpha_per_target={"query": 9.0})),
}  # fmt: skip


@pytest.mark.parametrize(("backbone", "strategy"), STARTS.values(), ids=STARTS)
def test_ours_in_hf(backbone: str, strategy: lp.PEFTStrategy, tmp_path: Path) -> None:
    model = fresh(backbone)
    before = logits(model, backbone)
    handle = lp.inject(model, strategy)
    shake(s.tensor() for s in handle.slots if s.trainable or s.attribute.startswith("finished"))
    model.eval()
    if isinstance(strategy, lp.DyLoRA):
        strategy.use_rank(handle, 2)
    expected = logits(model, backbone)
    assert not torch.allclose(before, expected, atol=1e-2)
    export = save_hf(handle, tmp_path / "ours")
    close(logits(hf_load(backbone, tmp_path / "ours"), backbone), expected)
    again = fresh(backbone)
    back = load_hf(again, tmp_path / "ours")
    close(logits(again, backbone), expected)
    save_hf(back, tmp_path / "again")
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")
    if getattr(strategy, "init", "") in ("pissa", "olora"):
        assert config_of(tmp_path / "ours")["r"] == 2 * strategy.rank  # type: ignore[attr-defined]
        assert export.notes
    if isinstance(strategy, lp.ReLoRA):
        assert config_of(tmp_path / "ours")["r"] == strategy.rounds * strategy.rank
    if isinstance(strategy, lp.DyLoRA):
        assert config_of(tmp_path / "ours")["r"] == 2


def test_adalora_cut_to_its_ranks(tmp_path: Path) -> None:
    model = fresh("llama")
    handle = lp.inject(model, lp.AdaLoRA(initial_rank=4, target_rank=2, alpha=6.0, targets=["q_proj", "down_proj"]))
    shake(handle.trainable_parameters())
    with torch.no_grad():
        for i, entry in enumerate(handle.entries):
            entry.adapter.lora_E[: i % 4] = 0  # type: ignore[index,operator]
    expected = logits(model, "llama")
    save_hf(handle, tmp_path / "ours")
    sizes = sorted({t.shape[0] for key, t in tensors_of(tmp_path / "ours").items() if key.endswith("lora_E")})
    assert sizes == [1, 2, 3, 4]
    close(logits(hf_load("llama", tmp_path / "ours"), "llama"), expected)
    other = fresh("llama")
    back = load_hf(other, tmp_path / "ours")
    close(logits(other, "llama"), expected)
    save_hf(back, tmp_path / "again")
    assert_same_tensors(tmp_path / "ours", tmp_path / "again")


def test_adalora_that_hf_has_cut(tmp_path: Path) -> None:
    theirs: Any = hf_model(Case("llama", "AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10}))
    pattern: dict[str, list[bool]] = {}
    for i, (path, module) in enumerate((p, m) for p, m in theirs.base_model.model.named_modules() if hasattr(m, "ranknum")):
        kept = [(i + j) % 3 != 0 for j in range(4)]
        pattern[f"{path}.lora_E.default"] = kept
        with torch.no_grad():
            module.lora_E["default"][[not k for k in kept]] = 0
    expected = logits(theirs, "llama")
    theirs.peft_config["default"].rank_pattern = pattern
    hf_save(theirs, tmp_path / "theirs")
    model = fresh("llama")
    handle = load_hf(model, tmp_path / "theirs")
    close(logits(model, "llama"), expected)
    save_hf(handle, tmp_path / "ours")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    assert config_of(tmp_path / "ours")["rank_pattern"] == config_of(tmp_path / "theirs")["rank_pattern"]


class Nets(nn.Module):
    """Convolutions of one and two dimensions, without groups or dilation, which HF computes differently."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.out = (
            nn.Conv1d(3, 6, 3, stride=2, padding=1),
            nn.Conv2d(6, 4, (3, 1), padding=(1, 0)),
            nn.Linear(4, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.c1(x))[..., None]
        return self.out(torch.tanh(self.c2(h)).mean((-1, -2)))


@pytest.mark.parametrize("config", ["LoraConfig", "LoraConfig dora", "LoHaConfig", "LoKrConfig"])
def test_convolutions(config: str, tmp_path: Path) -> None:
    import peft

    name, dora = config.split()[0], config.endswith("dora")
    torch.manual_seed(0)
    base, x = Nets().eval(), torch.randn(2, 3, 8)
    options: dict[str, Any] = {"use_dora": True} if dora else {}
    targets = ["c2", "out"] if name == "LoKrConfig" else ["c1", "c2", "out"]
    theirs = peft.get_peft_model(copy.deepcopy(base), getattr(peft, name)(r=2, target_modules=targets, **options)).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = run(theirs, {"x": x})
    model = copy.deepcopy(base)
    handle = load_hf(model, tmp_path / "theirs")
    close(run(model, {"x": x}), expected)
    save_hf(handle, tmp_path / "ours")
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    close(run(loaded, {"x": x}), expected)


def test_a_wrong_product_of_hf_is_refused(tmp_path: Path) -> None:
    import peft

    theirs = peft.get_peft_model(Nets(), peft.LoKrConfig(r=2, target_modules=["c1"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedLayerError, match="wrong Kronecker product"):
        load_hf(Nets(), tmp_path)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts(name: str, tmp_path: Path) -> None:
    import peft
    import transformers

    sizes = dict(
        vocab_size=23, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    more = dict(
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    if name == "mixtral":
        config: Any = transformers.MixtralConfig(**sizes, **more)
    else:
        config = transformers.GptOssConfig(**sizes, **more, head_dim=4)
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(config).eval()
    shake(base.parameters(), scale=0.2)
    batch = BACKBONES["llama"].batch()
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    options = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj"], target_parameters=names, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), options).eval()
    shake(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = run(theirs, batch)
    model = copy.deepcopy(base)
    handle = load_hf(model, tmp_path / "theirs")
    close(run(model, batch), expected)
    save_hf(handle, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    close(run(loaded, batch), expected)
    assert_same_tensors(tmp_path / "theirs", tmp_path / "ours")


def test_mora_of_the_fork(tmp_path: Path) -> None:
    model = fresh("llama")
    handle = lp.inject(model, lp.MoRA(rank=2, mora_type=1, targets=["q_proj", "down_proj"]))
    shake(handle.trainable_parameters())
    expected = logits(model, "llama")
    save_hf(handle, tmp_path / "ours")
    config, tensors = config_of(tmp_path / "ours"), tensors_of(tmp_path / "ours")
    assert config["use_mora"] is True
    assert config["mora_type"] == 1
    assert len(tensors) == 2 * len(handle.entries)  # both keys, as the fork writes its one tensor
    other = fresh("llama")
    back = load_hf(other, tmp_path / "ours")
    assert isinstance(back.strategy, lp.MoRA)
    close(logits(other, "llama"), expected)


@pytest.mark.parametrize("kind", [None, 1, 2, 3, 4, 6])
def test_a_file_of_the_forks_own(kind: int | None, tmp_path: Path) -> None:
    """Written by hand as the fork writes it: one square matrix under both keys, no scaling by alpha; the change is the paper's."""
    model, key = fresh("llama"), "model.layers.1.mlp.down_proj"
    weight = model.get_submodule(key).weight
    side = side_of(2, *weight.shape, (kind or 1,))
    M = torch.randn(side, side, generator=torch.Generator().manual_seed(5))
    names = [f"base_model.model.{key}.lora_{name}.weight" for name in "AB"]
    save_file({name: M.clone() for name in names}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "use_mora": True, "r": 2, "lora_alpha": 64, "target_modules": [key]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | ({} if kind is None else {"mora_type": kind})))
    handle = load_hf(model, tmp_path)
    found = logits(model, "llama")
    handle.remove()
    with torch.no_grad():
        weight += reference(M.double(), *weight.shape, kind or 1).float()
    close(found, logits(model, "llama"))
    assert "the fork of MoRA's authors" in "".join(suitability(tmp_path, "hf").blockers)

    save_file({name: M + i for i, name in enumerate(names)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FormatError, match="two different matrices"):
        load_hf(fresh("llama"), tmp_path)


def test_a_prefix_that_shifts_the_text_is_written_as_it_is(tmp_path: Path) -> None:
    for backbone in ("llama", "gpt2"):
        model = fresh(backbone)
        handle = lp.inject(model, lp.PTuningV2(num_virtual_tokens=3, shift_positions=True))
        model.eval()
        expected = logits(model, backbone)
        save_hf(handle, tmp_path / backbone)
        close(logits(hf_load(backbone, tmp_path / backbone), backbone), expected)


def test_tied_weights_are_refused(tmp_path: Path) -> None:
    model = fresh("gpt2")
    handle = lp.inject(model, lp.Compose(parts=(lp.LoRA(rank=2, targets=["c_attn"]), lp.LayerSelection(targets=["wte"]))))
    with pytest.raises(ConfigError, match="'transformer.wte.weight' is tied to 'lm_head'"):
        save_hf(handle, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    hf_save(hf_model(Case("gpt2", "LoraConfig", {**LORA, "modules_to_save": ["lm_head"]})), tmp_path / "theirs")
    with pytest.raises(CompatibilityError, match="tied"):
        load_hf(fresh("gpt2"), tmp_path / "theirs")


def test_a_quantized_base(tmp_path: Path) -> None:
    model = lp.quantize(fresh("llama"), "nf4", backend="torch")
    handle = lp.inject(model, lp.QLoRA(rank=2, dropout=0.0, targets=["q_proj", "down_proj"]))
    shake(handle.trainable_parameters())
    expected = logits(model.eval(), "llama")
    save_hf(handle, tmp_path)
    handle.remove()
    back = load_hf(model, tmp_path)
    assert type(back.strategy) is lp.LoRA  # the file does not say how the base is stored
    close(logits(model.eval(), "llama"), expected)


def test_a_prepared_base_is_noted(tmp_path: Path) -> None:
    model = lp.quantize(fresh("llama"), "nf4", backend="torch", loftq={"rank": 2})
    handle = lp.inject(model, lp.LoRA(rank=2, init="loftq", targets=["q_proj"]))
    export = save_hf(handle, tmp_path)
    assert "LoftQ" in export.notes[0]
