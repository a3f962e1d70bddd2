"""Base models as files that others made: what their JSON says is checked before anything is built, read or allocated from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import lightning_peft as lp
from lightning_peft.errors import ConfigError, FormatError, PEFTError
from lightning_peft.loading.base import BaseSource, load_model, load_tokenizer, quantized_as
from lightning_peft.loading.saved import DENSE, DESCRIPTION, QUANTIZED
from tests.training import tiny


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 64)


def stored(folder: Path, backend: str, scheme: str = "nf4") -> Path:
    torch.manual_seed(0)
    return lp.save_quantized(lp.quantize(Net(), scheme, backend=backend), folder)


def craft(
    folder: Path, change: Callable[[dict[str, Any]], object], tensors: Callable[[dict[str, Any]], object] = lambda t: None
) -> None:
    """Change the description and the stored tensors as somebody would who knows the format: the files belong together."""
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    text = json.dumps(description)
    (folder / DESCRIPTION).write_text(text)
    for name in (DENSE, QUANTIZED):
        values = load_file(folder / name)
        if name == QUANTIZED:
            tensors(values)
        save_file(values, folder / name, metadata={"description": hashlib.sha256(text.encode()).hexdigest()})


def layer(**fields: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["layers"]["up"].update(fields)


DESCRIPTIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "vast shape": layer(shape=[10**9, 10**9]),
    "shape of words": layer(shape=["a", "b"]),
    "one side": layer(shape=[64]),
    "no side": layer(shape=[0, 64]),
    "no shape": lambda d: d["layers"]["up"].pop("shape"),
    "dtype that is a function": layer(dtype="load"),
    "dtype of integers": layer(dtype="int64"),
    "no configuration": lambda d: d["layers"]["up"].pop("quantization"),
    "configuration of words": layer(quantization="nf4"),
    "configuration of nonsense": layer(quantization={"scheme": "nf4", "block_size": 10**18}),
    "other blocks": lambda d: d["layers"]["up"]["quantization"].update(block_size=32),
    "recipe of words": layer(recipe="none"),
    "layers that are a list": lambda d: d.update(layers=[]),
    "a layer that is a list": lambda d: d["layers"].update(up=[]),
    "a layer of another model": lambda d: d["layers"].update({"../up": d["layers"].pop("up")}),
    "ties to nothing": lambda d: d["ties"].update({"up.bias": "nowhere"}),
    "ties to numbers": lambda d: d["ties"].update({"up.bias": 3}),
}


@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
@pytest.mark.parametrize("change", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_crafted_description(change: Callable[[dict[str, Any]], object], backend: str, tmp_path: Path) -> None:
    stored(tmp_path, backend)
    craft(tmp_path, lambda d: None)
    lp.load_quantized(Net(), tmp_path)  # what is changed below is what is refused
    craft(tmp_path, change)
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PEFTError):
        lp.load_quantized(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


BLOBS: dict[str, Callable[[dict[str, Any]], object]] = {
    "scales of scales of one": lambda b: b.update(nested_blocksize=1),
    "another block size": lambda b: b.update(blocksize=2),
    "another shape": lambda b: b.update(shape=[10**6, 10**6]),
    "no shape": lambda b: b.update(shape=None),
    "another scheme": lambda b: b.update(quant_type="fp4"),
    "dtype that is a function": lambda b: b.update(dtype="load"),
    "dtype that is private": lambda b: b.update(dtype="__builtins__"),
    "a field less": lambda b: b.pop("blocksize"),
    "a field more": lambda b: b.update(stride=1),
}


@pytest.mark.parametrize("change", BLOBS.values(), ids=BLOBS)
def test_crafted_blob_of_bitsandbytes(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    """Its kernels read as many scales as the blob says, whatever there is."""
    stored(tmp_path, "bitsandbytes")

    def apply(tensors: dict[str, Any]) -> None:
        (key,) = (key for key in tensors if key.startswith("up/") and "bitsandbytes__" in key)
        blob = json.loads(bytes(tensors[key].tolist()))
        change(blob)
        tensors[key] = torch.tensor(list(json.dumps(blob).encode()), dtype=torch.uint8)

    craft(tmp_path, lambda d: None, apply)
    with pytest.raises(FormatError, match="layer 'up'"):
        lp.load_quantized(Net(), tmp_path)


def test_half_of_the_factors_of_loftq(tmp_path: Path) -> None:
    lp.save_quantized(lp.quantize(Net(), "nf4", backend="torch", loftq={"rank": 4}), tmp_path)
    craft(tmp_path, lambda d: None, lambda t: t.pop("up/loftq.right"))
    with pytest.raises(FormatError, match="two factors"):
        lp.load_quantized(Net(), tmp_path)


def test_a_description_without_bounds_is_refused(tmp_path: Path) -> None:
    stored(tmp_path, "torch")
    (tmp_path / DESCRIPTION).write_text('{"a":' * 100_000)
    with pytest.raises(FormatError, match="deeper than"):
        lp.load_quantized(Net(), tmp_path)


# ---- transformers models, by name


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(tiny.llama()).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_config_without_bounds_is_refused(model_folder: Path) -> None:
    source = BaseSource(name=str(model_folder))
    load_model(source, "causal_lm")
    (model_folder / "config.json").write_text('{"model_type":' + "[" * 100_000)
    for read in (lambda: load_model(source, "causal_lm"), lambda: load_tokenizer(source), lambda: quantized_as(source)):
        with pytest.raises(FormatError, match="deeper than"):
            read()


def test_a_config_with_a_key_twice_is_read(model_folder: Path) -> None:
    path = model_folder / "config.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "model_type": "llama"}')
    load_model(BaseSource(name=str(model_folder)), "causal_lm")


@pytest.mark.parametrize("place", ["../outside.safetensors", "/etc/passwd", "a/../../outside.safetensors", "model.safetensors\0"])
def test_weights_outside_the_folder_are_not_read(place: str, model_folder: Path) -> None:
    weights = load_file(model_folder / "model.safetensors")
    (model_folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": 1}, "weight_map": {key: place for key in weights}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FormatError, match="outside the folder"):
        load_model(BaseSource(name=str(model_folder)), "causal_lm")


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "no_such_model"},
        {"model_type": 3},
        {"hidden_size": "wide"},
        {"num_attention_heads": 0},
        {"rope_parameters": [1]},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"}, "model_type": "evil"},
    ],
    ids=lambda fields: f"{next(iter(fields))}={next(iter(fields.values()))}"[:40],
)
def test_a_config_of_nonsense_is_a_typed_error_and_runs_no_code(
    fields: dict[str, Any], model_folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(model_folder)
    (model_folder / "evil.py").write_text("open('pwned', 'w')\nclass Model: pass\nclass Config: pass\n")
    edit(model_folder, **fields)
    with pytest.raises(PEFTError):
        load_model(BaseSource(name=str(model_folder)), "causal_lm")
    assert not (model_folder / "pwned").exists()


def test_pickled_weights_run_nothing(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model_folder)
    (model_folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, model_folder / "pytorch_model.bin")
    with pytest.raises(PEFTError):
        load_model(BaseSource(name=str(model_folder)), "causal_lm")
    assert not (model_folder / "pwned").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("open('pwned', 'w')",)


@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"\xff" * 8 + data[8:], lambda data: b""])
def test_damaged_weights_are_a_typed_error(damage: Callable[[bytes], bytes], model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError, match="cannot load base"):
        load_model(BaseSource(name=str(model_folder)), "causal_lm")


@pytest.mark.parametrize("text", ["{}", "[]", '{"version": 3}', "nonsense", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_of_nonsense_is_a_typed_error(text: str, model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text(text)
    with pytest.raises(ConfigError, match="cannot load a tokenizer"):
        load_tokenizer(BaseSource(name=str(model_folder)))


def test_the_stamp_is_in_the_metadata(tmp_path: Path) -> None:
    """What `craft` relies on."""
    stored(tmp_path, "torch")
    with safe_open(tmp_path / DENSE, framework="pt") as file:
        assert "description" in file.metadata()
