"""Quantized models as files: bit for bit, atomic, refused when torn; and quantized while the weights are read."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft import files
from lightning_peft.errors import CompatibilityError, ConfigError, ConflictError, FormatError, PEFTError, UnsupportedLayerError
from lightning_peft.loading.base import BaseSource, load_model
from lightning_peft.loading.saved import DENSE, DESCRIPTION, QUANTIZED
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.preparation import loftq_factors, preparation_of
from tests.loading import memory
from tests.training import tiny

BACKENDS = ("bitsandbytes", "torch")
SCHEMES = ({"scheme": "nf4"}, {"scheme": "fp4", "double_quant": False, "block_size": 128}, {"scheme": "int8"})


class Net(nn.Module):
    """A quantized layer with and without bias, a tied pair, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)
        self.norm, self.head = nn.BatchNorm1d(32), nn.Linear(32, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(32), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.up(self.embed(ids) * self.scale)))))


def net(**options: Any) -> nn.Module:
    return lp.quantize(Net().eval(), skip="head", **options)


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Every stored tensor of the quantized layers, as bytes."""
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        backend = backend_of(module)
        if backend is not None:
            found |= {f"{path}/{k}": v.reshape(-1).view(torch.uint8) for k, v in backend.state(module).items()}
    return found


def assert_same(a: nn.Module, b: nn.Module) -> None:
    left, right = stored(a), stored(b)
    assert left.keys() == right.keys()
    assert left
    assert all(torch.equal(left[k], right[k]) for k in left)
    dense = {k: v for k, v in b.state_dict().items() if v.is_floating_point()}
    assert all(torch.equal(v, dense[k]) and v.dtype == dense[k].dtype for k, v in a.state_dict().items() if k in dense)


# ---- any module


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s["scheme"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip(scheme, backend, device, tmp_path):
    model = net(backend=backend, **scheme).bfloat16()
    lp.save_quantized(model, tmp_path / "q")
    torch.manual_seed(1)
    other = Net().eval()
    scale = model.scale
    other = other.to(device)
    other.scale = scale  # not persistent: whoever builds the model has it
    assert lp.load_quantized(other, tmp_path / "q") is other
    assert_same(model, other)
    assert other.head.weight is other.embed.weight
    assert other.up.bias.dtype == torch.bfloat16
    ids = torch.randint(20, (7,))
    assert torch.equal(model(ids), other(ids))


def test_loftq_comes_back(tmp_path):
    model = net(loftq={"rank": 3, "iterations": 2, "targets": ["up"]})
    other = lp.load_quantized(Net(), lp.save_quantized(model, tmp_path))
    assert preparation_of(other) == preparation_of(model) != {}
    assert all(torch.equal(a, b) for a, b in zip(loftq_factors(model.up), loftq_factors(other.up), strict=True))
    assert loftq_factors(other.down) is None


def test_nothing_is_pickled(tmp_path):
    lp.save_quantized(net(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [DENSE, DESCRIPTION, QUANTIZED]
    load_file(tmp_path / DENSE)
    json.loads((tmp_path / DESCRIPTION).read_text())


def test_a_dense_model_and_an_adapted_one_are_not_saved(tmp_path):
    with pytest.raises(ConfigError, match="has no quantized layer"):
        lp.save_quantized(Net(), tmp_path)
    model = net()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="up"))
    with pytest.raises(ConflictError, match="save_adapter"):
        lp.save_quantized(model, tmp_path)
    handle.remove()
    lp.save_quantized(model, tmp_path)


def test_a_failure_leaves_the_previous_folder(tmp_path, monkeypatch):
    model = net()
    lp.save_quantized(model, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(path: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(OSError, match="no space"):
        lp.save_quantized(net(), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def _drop(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Any:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def _newer(folder: Path) -> None:
    path = folder / DESCRIPTION
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))


def _torn(folder: Path) -> None:
    """The dense file of another save."""
    save_file({}, folder / DENSE, metadata={"description": "0" * 64})


def _less(folder: Path) -> None:
    """One stored tensor is gone, with the stamp of the folder."""
    from safetensors import safe_open

    with safe_open(folder / QUANTIZED, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / QUANTIZED)
    tensors.pop("up/absmax" if "up/absmax" in tensors else "up/weight.absmax")
    save_file(tensors, folder / QUANTIZED, metadata=metadata)


DAMAGE = {
    "no description": (_drop(DESCRIPTION), "has no quantized.json"),
    "no codes": (_drop(QUANTIZED), "missing or damaged"),
    "no dense file": (_drop(DENSE), "missing or damaged"),
    "cut codes": (_cut(QUANTIZED), "missing or damaged"),
    "cut description": (_cut(DESCRIPTION), "is not JSON"),
    "newer": (_newer, "Upgrade"),
    "torn": (_torn, "does not belong to"),
    "a tensor less": (_less, "absmax"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_damage_is_refused(case, backend, tmp_path):
    damage, words = DAMAGE[case]
    lp.save_quantized(net(backend=backend), tmp_path)
    damage(tmp_path)
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(FormatError, match=words):
        lp.load_quantized(model, tmp_path)
    assert all(type(m) is nn.Linear for m in (model.up, model.down))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_model_is_refused(tmp_path):
    lp.save_quantized(net(), tmp_path)
    other = Net()
    other.more = nn.Linear(2, 2)
    with pytest.raises(CompatibilityError, match="more"):
        lp.load_quantized(other, tmp_path)
    other = Net()
    other.up = nn.Linear(32, 48)
    with pytest.raises(CompatibilityError, match="'up.bias' has shape"):
        lp.load_quantized(other, tmp_path)
    with pytest.raises(ConflictError, match="fresh dense model"):
        lp.load_quantized(net(), tmp_path)


# ---- transformers models, by name


def base(kind: str) -> Any:
    torch.manual_seed(0)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(tiny.llama(attention_bias=True)),
        "gpt2": lambda: transformers.GPT2LMHeadModel(tiny.gpt2()),
        "bert": lambda: transformers.BertForMaskedLM(tiny.bert()),
    }
    return made[kind]().to(torch.bfloat16).eval()


TASKS = {"llama": "causal_lm", "gpt2": "causal_lm", "bert": "masked_lm"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TASKS)
def test_reading_and_quantizing_at_once_is_quantizing_the_dense_model(kind, backend, tmp_path):
    model = base(kind)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load_model(BaseSource(name=str(tmp_path), quantization={"scheme": "nf4", "backend": backend}), TASKS[kind])
    lp.quantize(model, backend=backend)
    assert loaded.new_modules == ()
    assert loaded.model.training
    assert_same(model, loaded.model)
    ours, theirs = lp.quantization_report(loaded.model), lp.quantization_report(model)
    assert (ours.layers, ours.before, ours.quantized, ours.dense) == (
        theirs.layers,
        theirs.before,
        theirs.quantized,
        theirs.dense,
    )
    ids = torch.randint(4, tiny.VOCABULARY, (2, 5))
    assert torch.equal(loaded.model.eval()(ids).logits, model(ids).logits)


def test_a_cast_comes_before_the_rounding(tmp_path):
    model = base("llama")
    model.save_pretrained(tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path), dtype="float32", quantization="nf4"), "causal_lm").model
    assert_same(lp.quantize(model.float()), loaded)
    layer = loaded.model.layers[0].mlp.up_proj
    assert backend_of(layer).compute_dtype(layer) == torch.float32


def test_what_the_checkpoint_has_no_weights_for_stays_dense(tmp_path):
    base("bert").bert.save_pretrained(tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path), quantization="nf4"), "sequence_classification", ["a", "b", "c"])
    assert loaded.new_modules == ("bert.pooler", "classifier")
    assert type(loaded.model.bert.pooler.dense) is nn.Linear
    assert loaded.model.bert.pooler.dense.weight.std() > 0
    reasons = {part.key: part.reason for part in lp.quantization_report(loaded.model).left}
    assert reasons["bert.pooler.dense.weight"] == "not in the checkpoint"
    assert len(lp.quantization_report(loaded.model).layers) == 12


def test_loftq_and_skip_by_name(tmp_path):
    model = base("llama")
    model.save_pretrained(tmp_path)
    asked = {"scheme": "nf4", "skip": ["v_proj"], "loftq": {"rank": 2, "iterations": 2, "targets": ["q_proj"]}}
    loaded = load_model(BaseSource(name=str(tmp_path), quantization=asked), "causal_lm").model
    lp.quantize(model, asked)
    assert_same(model, loaded)
    assert preparation_of(loaded) == preparation_of(model) != {}
    assert torch.equal(
        loaded.model.layers[1].self_attn.q_proj._peft_factors[0], model.model.layers[1].self_attn.q_proj._peft_factors[0]
    )


def test_what_cannot_be_stored_is_a_typed_error(tmp_path):
    model = base("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedLayerError, match="'model.layers.1.mlp.up_proj'"):
        load_model(BaseSource(name=str(tmp_path), quantization="nf4"), "causal_lm")
    with pytest.raises(PEFTError, match="matches no role and no module"):
        load_model(BaseSource(name=str(tmp_path), quantization={"skip": ["nothing"]}), "causal_lm")
    with pytest.raises(ConfigError, match="Did you mean 'nf4'"):
        BaseSource(name=str(tmp_path), quantization="nf5")


def test_another_shape_is_still_refused(tmp_path):
    transformers.BertForSequenceClassification(tiny.bert()).save_pretrained(tmp_path)
    config = tiny.bert()
    config.intermediate_size = 64
    config.save_pretrained(tmp_path)
    with pytest.raises(CompatibilityError, match="another shape"):
        load_model(BaseSource(name=str(tmp_path), quantization="nf4"), "sequence_classification", ["a", "b"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TASKS)
def test_a_saved_folder_is_a_base_like_any_other(kind, backend, tmp_path):
    model = lp.quantize(base(kind), "nf4", backend=backend)
    lp.save_quantized(model, tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path)), TASKS[kind])
    assert loaded.new_modules == ()
    assert_same(model, loaded.model)
    ids = torch.randint(4, tiny.VOCABULARY, (2, 5))
    assert torch.equal(loaded.model.eval()(ids).logits, model(ids).logits)
    with pytest.raises(ConflictError, match="quantized already .save_quantized"):
        load_model(BaseSource(name=str(tmp_path), quantization="nf4"), TASKS[kind])
    fresh = type(model)(copy.deepcopy(model.config)).to(torch.bfloat16)
    assert_same(model, lp.load_quantized(fresh, tmp_path))


def test_a_saved_body_gets_a_new_head(tmp_path):
    model = lp.quantize(base("bert").bert)
    lp.save_quantized(model, tmp_path)
    loaded = load_model(BaseSource(name=str(tmp_path)), "sequence_classification", ["a", "b", "c"])
    assert loaded.new_modules == ("bert.pooler", "classifier") or loaded.new_modules == ("classifier",)
    assert_same(model, loaded.model.bert)


# ---- transformers knows


def test_transformers_saves_and_reads_what_bitsandbytes_stores(tmp_path):
    model = lp.quantize(base("gpt2"))
    assert model.is_quantized
    for cast in (model.half, model.float):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for module in (*theirs.modules(), *model.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.randint(4, tiny.VOCABULARY, (2, 5))
    # In train mode: in eval mode the layers of bitsandbytes repack their weights on some CPUs.
    torch.testing.assert_close(theirs.train()(ids).logits, model.train()(ids).logits, rtol=2e-2, atol=2e-2)
    ours = load_model(BaseSource(name=str(tmp_path)), "causal_lm").model
    assert_same(model, ours)
    with pytest.raises(ConflictError, match="quantized already .bitsandbytes"):
        load_model(BaseSource(name=str(tmp_path), quantization="nf4"), "causal_lm")


def test_transformers_refuses_to_save_what_it_cannot_read(tmp_path):
    model = lp.quantize(base("llama"), backend="torch")
    with pytest.raises(ValueError, match="lightning_peft and is not serializable"):
        model.save_pretrained(tmp_path)


# ---- memory


def _measured(folder: Path, *arguments: str) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, memory.__file__, str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(measured)
    return measured


@pytest.mark.slow
def test_memory_of_a_small_folder(tmp_path):
    """55 million parameters: enough to tell a second copy, dense or quantized, from what one layer takes."""
    sizes = dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8)
    memory.make_folder(tmp_path, vocab_size=2000, **sizes)
    found = _measured(tmp_path, "nf4")
    inside = 24 * 768 * 2048  # what bitsandbytes takes on a CPU while it quantizes the largest layer
    assert found["peak"] <= 1.3 * (found["quantized"] + found["dense"]) + found["largest"] + inside
    assert found["peak"] < 0.75 * found["before"]


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_memory_of_a_billion_parameters(scheme, dtype, tmp_path):
    memory.make_folder(tmp_path)
    found = _measured(tmp_path, scheme, dtype)
    assert found["peak"] <= 1.3 * (found["quantized"] + found["dense"]) + found["largest"]
