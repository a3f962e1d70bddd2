"""The arguments of ``estimate``: any module, nothing touched, typed errors, and how long it takes."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.cost import memory
from lightning_peft.errors import ConfigError
from tests.backbones import BACKBONES
from tests.cost.test_flops import llama

LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": "all-linear"}}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone(name: str) -> None:
    backbone = BACKBONES[name]
    model = backbone.fresh()
    before = copy.deepcopy(model.state_dict())
    report = lp.estimate(model, LORA, inputs=backbone.inputs(), batch_size=3)
    assert report.peak > report.weights > 0
    assert report.backward_flops > 0
    assert not lp.handles(model)
    assert all(p.requires_grad for p in model.parameters())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("info", lp.list_methods(), ids=lambda info: info.name)
def test_any_method(info: Any) -> None:
    spec = {"class_path": info.cls.__name__, "init_args": dict(info.example)}
    try:
        lp.inject(llama(attention_bias=True), spec, calibration="later" if info.from_data else None)
    except lp.PEFTError as error:
        with pytest.raises(type(error)):
            lp.estimate(llama(attention_bias=True), spec, sequence_length=6, quantization=None)
        if info.base_quantization is None:
            return
    report = lp.estimate(llama(attention_bias=True), spec, sequence_length=6)
    assert report.method == info.name
    assert report.trainable > 0


def test_config_meta_and_live_models_agree() -> None:
    model = llama()
    with torch.device("meta"):
        meta = type(model)(model.config)
    found = [lp.estimate(m, LORA, sequence_length=8).to_dict() for m in (model, meta, model.config)]
    assert found[0] == found[1] == found[2]


def test_a_model_as_it_is() -> None:
    model = llama()
    planned = lp.estimate(model, LORA, sequence_length=8)
    lp.inject(model, LORA)
    present = lp.estimate(model, None, sequence_length=8)
    assert present.peak == planned.peak
    assert present.method == "as it is"
    with pytest.raises(ConfigError, match="adapter 'default' already"):
        lp.estimate(model, LORA, sequence_length=8)


def test_inputs_of_a_plain_module() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    given = lp.estimate(model, LORA, inputs=torch.empty(1, 8), batch_size=4)
    made = lp.estimate(model, LORA, inputs=lambda batch, length: (torch.empty(batch, 8),), batch_size=4)
    assert given == made
    # In fp32 for 4 rows: the ReLU's output, which the second layer reads too, the two branches' middles, the output.
    assert given.activations == 4 * 4 * (32 + 2 + 2 + 2)
    assert lp.estimate(model, LORA, inputs=torch.empty(1, 8), fit="1MiB").batch_size > 100


def test_extra_modules_train() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    lora = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": ["0"]}}
    alone, more = (lp.estimate(model, lora, inputs=torch.empty(1, 8), extra_modules=extra) for extra in ((), ["2"]))
    assert more.trainable == alone.trainable + 32 * 2 + 2


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": None}, "sequence_length is missing"),
        ({"optimizer": "adamv"}, "Did you mean 'adam"),
        ({"optimizer": 3}, "neither a name"),
        ({"precision": "bf16-tru"}, "Did you mean 'bf16-true'"),
        ({"sharding": "zero3"}, "sharding='zero3'"),
        ({"devices": 2}, "need sharding"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"labelled": 0.0}, "labelled=0.0"),
        ({"loss": "whole"}, "loss='whole'"),
        ({"dtype": "int8"}, "no floating-point dtype"),
        ({"fit": "many"}, "no size of memory"),
        ({"extra_modules": ["heads"]}, "no module 'heads'"),
        ({"quantization": "nf5"}, "nf5"),
        ({"gradient_checkpointing": {"evry": 2}}, "evry"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        lp.estimate(llama(), LORA, **{"sequence_length": 8, **changes})


def test_refused_models() -> None:
    with pytest.raises(ConfigError, match="Give inputs="):
        lp.estimate(nn.Sequential(nn.Linear(2, 2)), LORA)
    with pytest.raises(ConfigError, match="must be an nn.Module"):
        lp.estimate("llama", LORA)
    with pytest.raises(ConfigError, match="depends on the values"):
        lp.estimate(Routed(), LORA, inputs=torch.empty(1, 4))
    with pytest.raises(ConfigError, match="cannot be run"):
        lp.estimate(nn.Sequential(nn.Linear(2, 2)), LORA, inputs=torch.empty(1, 3))
    with pytest.raises(ConfigError, match="nothing of"):
        lp.estimate(llama().requires_grad_(False), None, sequence_length=8)


@pytest.mark.parametrize(
    ("text", "nbytes"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("1.5M", 1_500_000), (512, 512), ("7", 7)]
)
def test_sizes_of_memory(text: Any, nbytes: int) -> None:
    assert memory(text) == nbytes


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ],
    ids=["7b", "70b"],
)
@pytest.mark.slow  # a measurement: a busy machine may miss it
def test_large_models_take_less_than_two_seconds(sizes: dict[str, int]) -> None:
    from transformers import LlamaConfig

    seconds = []
    for _ in range(3):
        start = time.process_time()  # of this process: others do not count
        report = lp.estimate(
            LlamaConfig(**sizes), LORA, batch_size=4, sequence_length=1024, dtype="bfloat16", gradient_checkpointing=True
        )
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
    assert report.parameters == (68_976_648_192 if sizes else 6_738_415_616)
