"""The fingerprints of a base: equal for one model however it is stored, different for another one."""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import lightning_peft as lp
from lightning_peft.surgery.fingerprint import UNCHECKED, base_fingerprint, compare_fingerprints, fingerprint


def llama(seed: int = 0, *, layers: int = 2, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, tie_word_embeddings=tied)).eval()


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Return a copy with every linear layer but the head stored in another way."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))
    return model


def as_conv1d(linear: nn.Linear) -> nn.Module:
    layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight.data = linear.weight.data.T.contiguous()
    layer.bias = None  # type: ignore[assignment]
    return layer


def with_bitsandbytes(code: str) -> Callable[[nn.Linear], nn.Module]:
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        sizes = (linear.in_features, linear.out_features)
        layer: nn.Module = (
            bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            if code == "int8"
            else bnb.nn.Linear4bit(*sizes, bias=False, quant_type=code)
        )
        layer.load_state_dict(linear.state_dict())
        return layer.to("cpu")

    return make


STORED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "copy": copy.deepcopy,
    "bfloat16": lambda m: copy.deepcopy(m).bfloat16(),
    "float16": lambda m: copy.deepcopy(m).half(),
    "float64": lambda m: copy.deepcopy(m).double(),
    "bfloat16 and back": lambda m: copy.deepcopy(m).bfloat16().float(),
    "Conv1D": lambda m: replaced(m, as_conv1d),
    "nf4": lambda m: replaced(m, with_bitsandbytes("nf4")),
    "fp4": lambda m: replaced(m, with_bitsandbytes("fp4")),
    "int8": lambda m: replaced(m, with_bitsandbytes("int8")),
}


@pytest.mark.parametrize("store", STORED.values(), ids=STORED)
def test_the_same_weights_in_another_storage_pass_and_others_do_not(store: Callable[[nn.Module], nn.Module]) -> None:
    model, other = llama(), llama(seed=1)
    stored = fingerprint(store(model))
    for a, b in ((fingerprint(model), stored), (stored, fingerprint(model))):
        assert compare_fingerprints(a, b) is None
    for a, b in ((fingerprint(other), stored), (stored, fingerprint(other))):
        assert "weights are other ones" in str(compare_fingerprints(a, b))
    assert stored["structure"] == fingerprint(other)["structure"]


@pytest.mark.parametrize("code", ["nf4", "int8"])
def test_quantized_layers_alone_tell_models_apart(code: str) -> None:
    """Without an embedding in full precision to help."""
    make = with_bitsandbytes(code)

    def quantized(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return replaced(nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3))), make)

    saved = fingerprint(quantized(0))
    assert all(entry is not None for value in saved["values"].values() for entry in value["entries"])
    assert compare_fingerprints(saved, fingerprint(quantized(0))) is None
    assert "3 of 3" in str(compare_fingerprints(saved, fingerprint(quantized(1))))
    if code == "int8":  # the first forward moves the scales from the weight to the layer
        used = quantized(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            used(torch.randn(2, 64))
        assert compare_fingerprints(saved, fingerprint(used)) is None


def test_weights_repacked_for_the_cpu_are_not_read() -> None:
    """bitsandbytes' first forward may repack 4-bit bytes; reading them as plain ones gives wrong numbers (trap S1)."""
    quantized = replaced(nn.Sequential(nn.Linear(64, 64, bias=False)), with_bitsandbytes("nf4"))
    saved = fingerprint(quantized)
    quantized[0].weight.quant_state.packing_format_for_cpu = True  # type: ignore[index]
    assert compare_fingerprints(saved, fingerprint(quantized)) == UNCHECKED


def test_meta_has_the_structure_and_no_values() -> None:
    with torch.device("meta"):
        model = llama()
    found = fingerprint(model)
    assert found["values"] is None
    assert found["structure"] == fingerprint(llama())["structure"]
    assert compare_fingerprints(found, fingerprint(llama())) == UNCHECKED
    assert compare_fingerprints(fingerprint(llama()), found) == UNCHECKED
    assert "structure" in str(compare_fingerprints(found, fingerprint(llama(layers=3))))


def test_reading_changes_nothing() -> None:
    model = llama()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    fingerprint(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_plain_small_and_bounded() -> None:
    found = fingerprint(llama(layers=40))
    assert json.loads(json.dumps(found)) == found
    assert len(json.dumps(found)) < 10_000
    assert len(found["values"]) <= 32
    assert all(len(v["entries"]) == 8 for v in found["values"].values())
    assert found["structure"]["tensors"]["model.layers.*.self_attn.q_proj.weight 64x64"] == 40


def test_entries_are_those_of_the_model() -> None:
    """An independent look-up: every sampled number is one of the tensor's, and they come from different rows."""
    model = llama()
    for name, value in fingerprint(model)["values"].items():
        numbers = model.get_parameter(name).flatten()
        for entry in value["entries"]:
            assert (numbers - entry).abs().min() <= 1e-6 * max(abs(entry), 1e-3)
        if numbers.numel() > 1000:
            assert len(set(value["entries"])) >= 6


@pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.layers.1.mlp.up_proj"])
def test_a_changed_structure_is_named(part: str) -> None:
    model, other = llama(tied=False), llama(tied=False)
    layer = other.get_submodule(part)
    other.set_submodule(
        part, nn.LayerNorm(64, bias=False) if "norm" in part else nn.Linear(64, layer.out_features + 1, bias=False)
    )
    reason = compare_fingerprints(fingerprint(model), fingerprint(other))
    if "norm" in part:
        assert reason is None or "structure" not in reason  # the same parameter: what it does is not seen here
    else:
        assert part.replace("1", "*") in str(reason)


def test_layers_that_trade_places_are_another_structure() -> None:
    def model(*widths: int) -> nn.Module:
        return nn.ModuleDict({str(i): nn.Linear(w, w) for i, w in enumerate(widths)})

    saved, current = fingerprint(model(4, 6)), fingerprint(model(6, 4))
    assert saved["structure"]["tensors"] == current["structure"]["tensors"]
    assert "layer numbers" in str(compare_fingerprints(saved, current))


def test_tied_tensors_are_sampled_once_and_a_lost_tie_changes_no_structure() -> None:
    tied = llama()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    found = fingerprint(tied)
    assert not {"lm_head.weight", "model.embed_tokens.weight"} <= set(found["values"])
    untied = copy.deepcopy(tied)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    assert compare_fingerprints(found, fingerprint(untied)) is None


def test_adapters_are_no_part_of_the_base() -> None:
    model = llama()
    before = fingerprint(model)
    lora = lp.inject(model, lp.LoRA(rank=2), "lora")
    biases = lp.inject(model, lp.VeRA(rank=2), "vera")  # with tensors at the root
    assert fingerprint(model) == before == lora.base_fingerprint == biases.base_fingerprint
    assert base_fingerprint(model) == before


def test_later_handles_have_the_fingerprint_of_the_untouched_base() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50))
    before = fingerprint(model)
    first = lp.inject(model, lp.Full(), "full")
    with torch.no_grad():
        for p in first.trainable_parameters():
            p.add_(1)
    assert fingerprint(model) != before
    model_handle = lp.inject(model, lp.LoRA(rank=2), "lora")
    assert model_handle.base_fingerprint == before


def test_tensors_that_the_file_brings_may_differ() -> None:
    saved, current = fingerprint(nn.Sequential(nn.Linear(4, 4))), fingerprint(nn.Sequential(nn.Linear(4, 4)))
    assert compare_fingerprints(saved, current) is not None
    assert compare_fingerprints(saved, current, carried={"0.weight"}) is not None
    assert compare_fingerprints(saved, current, carried={"0.weight", "0.bias"}) is None


def test_numbers_that_any_model_has_prove_nothing() -> None:
    """A fresh norm is 1 and 0 in every model: agreement there is not evidence, disagreement is."""
    norm = nn.ModuleDict({"norm": nn.LayerNorm(16)})
    assert compare_fingerprints(fingerprint(norm), fingerprint(norm)) == UNCHECKED
    other = copy.deepcopy(norm)
    nn.init.constant_(other["norm"].weight, 2.0)  # type: ignore[arg-type]
    assert "other ones" in str(compare_fingerprints(fingerprint(norm), fingerprint(other)))


def test_a_few_new_rows_of_an_embedding_are_not_another_base() -> None:
    """Rows that a resize of the vocabulary filled at random may be sampled; a whole other table is refused."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"table": nn.Embedding(40, 16)})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other["table"].weight[-2:] += 1  # type: ignore[operator,index]
    assert compare_fingerprints(fingerprint(model), fingerprint(other)) is None
    nn.init.normal_(other["table"].weight)  # type: ignore[arg-type]
    assert compare_fingerprints(fingerprint(model), fingerprint(other)) is not None


def test_other_parameters_than_layers_count_too() -> None:
    class Odd(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale, self.table = nn.Parameter(torch.tensor(scale)), nn.Parameter(torch.arange(12.0).reshape(3, 4))
            self.empty = nn.Parameter(torch.empty(0, 3))
            self.attention = nn.MultiheadAttention(4, 2, bias=False)
            self.conv = nn.Conv2d(2, 4, 3, groups=2)

    torch.manual_seed(0)
    model = Odd(1.5)
    tensors = fingerprint(model)["structure"]["tensors"]
    assert (
        tensors["scale scalar"] == tensors["table 3x4"] == tensors["empty 0x3"] == tensors["attention.in_proj_weight 12x4"] == 1
    )
    assert tensors["conv.weight 4x1x3x3"] == 1
    torch.manual_seed(0)
    reason = compare_fingerprints(fingerprint(model), fingerprint(Odd(1.6)))
    assert "1 of " in str(reason)
    assert "'scale'" in str(reason)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_base_that_is_not_finite_agrees_with_nothing_finite(bad: float) -> None:
    model = llama()
    for saved in (fingerprint(model), fingerprint(replaced(model, with_bitsandbytes("nf4")))):
        broken = copy.deepcopy(model)
        with torch.no_grad():
            for p in broken.parameters():
                p.fill_(bad)
        assert "other ones" in str(compare_fingerprints(saved, fingerprint(broken)))


# ---------------------------------------------------------------- sharded


@pytest.fixture
def mesh() -> Iterator[Any]:
    """This process is rank 0 of 2; the other one is not needed, since nothing is communicated."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


def sharded(model: nn.Module, mesh: Any, store: Callable[[Tensor], Tensor] = lambda t: t) -> nn.Module:
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                module._parameters[name] = nn.Parameter(
                    distribute_tensor(store(p.detach()), mesh, [Shard(0)], src_data_rank=None)
                )
    return model


@pytest.mark.parametrize("rows", [64, 65], ids=["even", "uneven"])
def test_sharded_base_reads_its_own_shard(mesh: Any, rows: int) -> None:
    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.ModuleDict({str(i): nn.Linear(16, rows) for i in range(4)})

    whole, local = fingerprint(model(0)), fingerprint(sharded(model(0), mesh))
    assert local["structure"] == whole["structure"]
    entries = {name: value["entries"] for name, value in local["values"].items()}
    known = [e is not None for value in entries.values() for e in value]
    assert 0.25 < sum(known) / len(known) < 0.75  # about half lies here
    for name, value in entries.items():
        assert all(a in (None, b) for a, b in zip(value, whole["values"][name]["entries"], strict=True))
    assert compare_fingerprints(whole, local) is None
    assert "other ones" in str(compare_fingerprints(whole, fingerprint(sharded(model(1), mesh))))


def test_sharded_conv1d_is_read_in_its_own_layout(mesh: Any) -> None:
    torch.manual_seed(0)
    linear = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False)})
    local = fingerprint(sharded(nn.ModuleDict({"a": as_conv1d(linear["a"])}), mesh))  # type: ignore[arg-type]
    whole = fingerprint(linear)
    assert any(entry is not None for entry in local["values"]["a.weight"]["entries"])
    assert compare_fingerprints(whole, local) is None
