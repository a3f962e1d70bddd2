"""Bytes: against the storages that real runs keep, against closed forms, and stand-ins against whole traces."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.cost import planned as planning
from lightning_peft.cost import step as stepping
from lightning_peft.cost.quantized import stored_bytes
from lightning_peft.quantization.config import Quantization
from tests.cost.test_flops import B, S, gpt2, ids, llama

LORA = {"class_path": "LoRA", "init_args": {"rank": 2, "targets": "all-linear"}}


def kept(model: nn.Module, **inputs: Any) -> int:
    """Bytes of the storages that a real forward pass saves, without those of parameters and buffers, and those of its logits."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, Tensor] = {}  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            found[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**inputs)
    found.pop(out.logits.untyped_storage()._cdata, None)
    return sum(t.untyped_storage().nbytes() for t in found.values())


@pytest.mark.parametrize("strategy", [LORA, "full", "houlsby", "prompt_tuning", {**LORA, "class_path": "DoRA"}], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_activations_are_the_storages_that_a_real_forward_keeps(strategy: Any, implementation: str) -> None:
    model = llama(attn_implementation=implementation)
    report = lp.estimate(model, strategy, batch_size=B, sequence_length=S)
    lp.inject(model, strategy)
    model.train()
    # The embedding keeps the ids, which the caller holds anyway; besides, tensors that the frames of the forward hold at the head.
    assert report.activations == pytest.approx(kept(model, input_ids=ids(), use_cache=False), rel=0.04)


def test_checkpointing_keeps_the_inputs_of_blocks() -> None:
    model, hidden = llama(num_hidden_layers=12), 4 * B * S * 24
    whole = lp.estimate(model, LORA, batch_size=B, sequence_length=S)
    every = lp.estimate(model, LORA, batch_size=B, sequence_length=S, gradient_checkpointing=True)
    third = lp.estimate(model, LORA, batch_size=B, sequence_length=S, gradient_checkpointing={"every": 3})
    assert every.activations == pytest.approx(13 * hidden, rel=0.15)
    block = (whole.activations - every.activations) // 12 + hidden
    assert third.activations == pytest.approx(8 * block + 4 * hidden, rel=0.05)
    assert every.backward_flops > third.backward_flops > whole.backward_flops
    assert every.forward_flops == whole.forward_flops


def test_offload_frees_the_device_and_not_the_cpu() -> None:
    model = llama(num_hidden_layers=12)
    options: dict[str, Any] = dict(batch_size=B, sequence_length=S, gradient_checkpointing={"offload": True})
    on_cpu, on_cuda = (lp.estimate(model, LORA, device=device, **options) for device in ("cpu", "cuda"))
    assert on_cuda.activations < 0.3 * on_cpu.activations
    assert on_cpu.activations == lp.estimate(model, LORA, **{**options, "gradient_checkpointing": True}, device="cpu").activations


@pytest.mark.parametrize("checkpointing", [False, True, {"every": 2}])
@pytest.mark.parametrize(
    "strategy", [LORA, "full", "prompt_tuning", {**LORA, "init_args": {"rank": 2, "targets": ["*layers.4.mlp*proj"]}}], ids=str
)
def test_stand_ins_cost_what_their_blocks_cost(strategy: Any, checkpointing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(num_hidden_layers=5)
    options: dict[str, Any] = dict(batch_size=B, sequence_length=S, gradient_checkpointing=checkpointing)
    options |= {"sharding": "fsdp", "devices": 2} if strategy == "full" else {"generate": checkpointing is False}
    short = lp.estimate(model, strategy, **options)
    monkeypatch.setattr(planning, "outermost", lambda paths: [])  # no block is stood in for
    whole = lp.estimate(model, strategy, **options)
    for name in ("forward_flops", "backward_flops", "activations", "generation"):
        assert getattr(short, name) == getattr(whole, name), name
    for phase, nbytes in short.phases.items():
        rest = short.device.gathered - whole.device.gathered if phase != "optimizer step" else 0
        # A block by itself copies the gradient of its input, which in the whole model is passed on.
        assert nbytes - rest == pytest.approx(whole.phases[phase], rel=0.03), phase


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adafactor", "NAdam"])
def test_optimizer_state_is_the_real_one(name: str) -> None:
    model = llama()
    make = getattr(torch.optim, name)
    report = lp.estimate(model, LORA, batch_size=1, sequence_length=4, optimizer=name.lower())
    handle = lp.inject(model, LORA)
    parameters = handle.trainable_parameters()
    optimizer = make(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = [t for p in parameters for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    assert report.optimizer == sum(t.nbytes for t in state)
    assert report.gradients == sum(p.nbytes for p in parameters)
    assert report.checkpoint == report.adapter_file + report.optimizer


def test_momentum_is_seen_through_a_function() -> None:
    report = lp.estimate(
        llama(), LORA, batch_size=1, sequence_length=4, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )
    assert report.optimizer == report.gradients


def test_parameters_and_weights_of_dense_models() -> None:
    for model in (llama(), gpt2(), llama(tie_word_embeddings=True)):
        report = lp.estimate(model, LORA, batch_size=1, sequence_length=4)
        buffers = sum(b.nbytes for b in model.buffers())
        assert report.parameters == sum(p.numel() for p in model.parameters())
        assert report.weights == 4 * report.parameters + buffers
        handle = lp.inject(model, LORA)
        assert report.trainable == handle.num_trainable()
        assert report.adapter == report.gradients == 4 * report.trainable


def test_full_fine_tuning_keeps_the_originals() -> None:
    report = lp.estimate(llama(), "full", batch_size=1, sequence_length=4)
    assert report.trainable == report.parameters
    assert report.adapter == report.gradients == 4 * report.parameters


def test_four_bits_are_4_127() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, hidden_size=1024, intermediate_size=4096, num_attention_heads=8)
    for options, bits in (("nf4", 4.127), ({"scheme": "nf4", "double_quant": False}, 4.5), ("int8", 8.0)):
        report = lp.estimate(config, LORA, batch_size=1, sequence_length=8, quantization=options)
        assert report.bits_per_weight == pytest.approx(bits, abs=0.03 if bits == 8 else 5e-4)
        dense = report.parameters - report.quantized_parameters
        assert report.quantized_parameters == 2 * (4 * 1024**2 + 3 * 1024 * 4096)
        assert report.weights == pytest.approx(4 * dense + report.quantized_weights, rel=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])
def test_stored_bytes_are_those_of_the_backend(scheme: Any, double_quant: bool, backend: Any) -> None:
    from lightning_peft.quantization.backend import backend_for

    config = Quantization(scheme=scheme, double_quant=double_quant, backend=backend)
    made = backend_for(config)
    layer = made.linear(torch.randn(256, 512), None, config)
    tables = 4 * (16 + 256 * double_quant) + 1024  # tables of values, and bitsandbytes' description
    assert 0 <= made.nbytes(layer) - stored_bytes(256, 512, config) <= (tables if scheme != "int8" else 64)


def test_a_quantized_model_is_found_to_be_one() -> None:
    dense = lp.estimate(llama(), LORA, batch_size=1, sequence_length=4, quantization={"scheme": "nf4", "backend": "torch"})
    live = lp.quantize(llama(), {"scheme": "nf4", "backend": "torch"})
    report = lp.estimate(live, LORA, batch_size=1, sequence_length=4)
    for name in ("parameters", "quantized_parameters", "quantized_weights", "weights", "activations", "peak", "forward_flops"):
        assert getattr(report, name) == getattr(dense, name), name


def test_qlora_brings_its_quantization() -> None:
    qlora = {"class_path": "QLoRA", "init_args": {"rank": 2}}
    report = lp.estimate(llama(), qlora, batch_size=1, sequence_length=4)
    assert report.settings["quantization"] == "nf4"
    with pytest.raises(lp.errors.UnsupportedLayerError, match="quantized"):
        lp.estimate(llama(), qlora, batch_size=1, sequence_length=4, quantization=None)


def test_chunked_loss_needs_less_than_the_logits() -> None:
    model = llama(vocab_size=4000)
    options: dict[str, Any] = dict(batch_size=8, sequence_length=512)
    full, chunked = (lp.estimate(model, LORA, loss=loss, **options) for loss in ("full", "chunked"))
    logits = 4 * 8 * 512 * 4000
    assert full.loss_buffers >= 2 * logits
    assert chunked.loss_buffers < 1.2 * logits
    few = lp.estimate(model, LORA, loss="full", labelled=0.1, **options)
    assert few.loss_buffers == pytest.approx(0.1 * full.loss_buffers, rel=0.1)


def test_chunks_that_are_left_out_cost_what_they_would(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(vocab_size=20_000)  # 209 positions a chunk
    options: dict[str, Any] = dict(batch_size=4, sequence_length=400, generate=False)
    some = lp.estimate(model, LORA, **options)
    monkeypatch.setattr(stepping, "CHUNKS", 100)
    whole = lp.estimate(model, LORA, **options)
    assert some.forward_flops == whole.forward_flops
    assert some.peak == pytest.approx(whole.peak, rel=0.01)
    assert some.loss_buffers == pytest.approx(whole.loss_buffers, rel=0.01)


def test_precision_changes_what_is_kept() -> None:
    model = llama(num_hidden_layers=6)
    options: dict[str, Any] = dict(batch_size=4, sequence_length=32)
    wide = lp.estimate(model, LORA, **options)
    mixed = lp.estimate(model, LORA, precision="bf16-mixed", **options)
    narrow = lp.estimate(model, LORA, precision="bf16-true", **options)
    assert narrow.weights == pytest.approx(wide.weights / 2, rel=0.01)
    assert mixed.weights == wide.weights
    assert narrow.activations < mixed.activations < wide.activations
    assert narrow.adapter == wide.adapter  # stays in fp32


def test_devices_share() -> None:
    model = llama(num_hidden_layers=6)
    options: dict[str, Any] = dict(batch_size=2, sequence_length=8)
    one = lp.estimate(model, "full", **options)
    ddp = lp.estimate(model, "full", devices=4, sharding="ddp", **options)
    fsdp = lp.estimate(model, "full", devices=4, sharding="fsdp", **options)
    assert ddp.peak == one.peak + one.gradients
    assert ddp.device.weights == one.device.weights
    assert fsdp.device.optimizer == one.optimizer // 4
    assert fsdp.device.gradients == one.gradients // 4
    assert fsdp.device.gathered < one.weights
    assert fsdp.peak < one.peak


@pytest.mark.slow
def test_fit_finds_the_largest() -> None:
    options: dict[str, Any] = dict(sequence_length=16, generate=False)
    model = llama()
    best = lp.estimate(model, LORA, fit="1MiB", **options)
    assert best.peak <= 2**20
    assert lp.estimate(model, LORA, batch_size=best.batch_size + 1, **options).peak > 2**20
    longest = lp.estimate(model, LORA, batch_size=2, fit=2**20, vary="sequence_length", **{**options, "sequence_length": 1})
    assert longest.batch_size == 2
    assert longest.peak <= 2**20
    with pytest.raises(lp.errors.ConfigError, match="batch_size=1, which takes"):
        lp.estimate(model, LORA, fit="10KiB", **options)


def test_report_is_plain_and_frozen() -> None:
    import json

    report = lp.estimate(llama(), LORA, batch_size=1, sequence_length=4)
    assert json.loads(json.dumps(report.to_dict()))["peak"] == report.peak
    assert report.peak == max(report.phases.values()) == report.phases[report.peak_phase]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.peak = 1  # type: ignore[misc]
