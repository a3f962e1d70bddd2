"""The traps of bitsandbytes, each shown to be there and to be shut, and layers that somebody else quantized."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import DependencyError, UnsupportedLayerError
from lightning_peft.quantization import bnb_layers
from lightning_peft.quantization.backend import backend_for, backend_of, prepare
from lightning_peft.quantization.config import Quantization

OUT, IN = 64, 128
SCHEMES = pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
BACKEND = backend_for(Quantization(backend="bitsandbytes"))
repacks = pytest.mark.skipif(not functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only")


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """bitsandbytes compiles some of its functions for the CPU at their first call, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def theirs(scheme: str, *, columns: int = IN, **options: Any) -> Any:
    """Return a layer as transformers makes it."""
    if scheme == "int8":
        layer: Any = bnb.nn.Linear8bitLt(columns, OUT, has_fp16_weights=False, **options)
    else:
        layer = bnb.nn.Linear4bit(columns, OUT, quant_type=scheme, compute_dtype=torch.float32, **options)
    layer.weight.data.copy_(numbers(OUT, columns))
    layer.bias.data.copy_(numbers(OUT, seed=1))
    return layer.to("cpu").requires_grad_(False)


def ours(scheme: Any, *, columns: int = IN, **options: Any) -> Any:
    config = Quantization(scheme=scheme, backend="bitsandbytes", **options)
    return BACKEND.linear(numbers(OUT, columns), numbers(OUT, seed=1), config)


def gradient(layer: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    return g


@SCHEMES
def test_is_a_layer_of_bitsandbytes(scheme: str) -> None:
    mine, other = ours(scheme), theirs(scheme)
    assert isinstance(mine, type(other))
    assert type(mine).__name__ == type(other).__name__
    for name, tensor in other.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor), name
    assert list(mine.state_dict()) == list(other.state_dict())
    other.load_state_dict({"bias": mine.bias}, strict=False)
    x = numbers(3, IN)
    assert torch.equal(mine(x), other(x))  # in training, where bitsandbytes is right
    assert torch.equal(gradient(mine, x), gradient(other, x))


@repacks
def test_bitsandbytes_repacks_in_evaluation() -> None:
    """Trap S1. When this fails, bitsandbytes has changed, and `prepare` may have less to do."""
    layer = theirs("nf4")
    layer.eval()(numbers(3, IN))
    assert layer.weight.quant_state.packing_format_for_cpu
    for _ in range(2):
        for read in (BACKEND.config, BACKEND.dequantize, BACKEND.state, BACKEND.prepare):
            with pytest.raises(UnsupportedLayerError, match="repacked.*cannot be recovered exactly"):
                read(layer)
        assert BACKEND.dense_dtype(layer) == torch.float32
        layer.state_dict()  # packs back in place, but the scales stay rounded
    assert not layer.weight.quant_state.packing_format_for_cpu


@repacks
def test_preparing_is_all_or_nothing() -> None:
    model = nn.Sequential(theirs("nf4"), theirs("int8"), theirs("nf4"))
    model[2].eval()(numbers(3, IN))
    before = [type(layer) for layer in model]
    with pytest.raises(UnsupportedLayerError, match="repacked"):
        prepare(model)
    assert [type(layer) for layer in model] == before
    assert model[0].support_avx512bf16_for_cpu


@SCHEMES
@pytest.mark.parametrize("made", [ours, lambda scheme: prepared(theirs(scheme))], ids=["ours", "prepared"])
def test_evaluation_computes_and_keeps_what_training_does(scheme: str, made: Any) -> None:
    """eval → train, train → eval → train, eval → dequantize, with and without gradients around."""
    layer, x = made(scheme), numbers(3, IN)
    state = {name: t.clone() for name, t in layer.state_dict().items()}
    dense = BACKEND.dequantize(layer)
    with torch.no_grad():
        first = layer.eval()(x)
    g = gradient(layer.train(), x)
    assert torch.equal(layer.eval()(x.detach()), first)
    assert torch.equal(layer.train()(x), first)
    assert torch.equal(gradient(layer, x), g)
    assert torch.equal(BACKEND.dequantize(layer), dense)
    assert torch.equal(first, F.linear(x, dense, layer.bias))
    assert all(torch.equal(layer.state_dict()[name], t) for name, t in state.items())


def prepared(layer: Any) -> Any:
    prepare(layer)
    return layer


@SCHEMES
def test_prepares_a_foreign_layer_and_gives_it_back(scheme: str) -> None:
    model = nn.Sequential(theirs(scheme), nn.ReLU())
    layer, x = model[0], numbers(3, IN)
    expected, cls, attributes = theirs(scheme)(x), type(layer), set(vars(layer))
    config, dense, dtype = BACKEND.config(layer), BACKEND.dequantize(layer), BACKEND.compute_dtype(layer)
    assert config == Quantization(scheme=scheme, backend="bitsandbytes", compute_dtype="auto" if scheme == "int8" else "float32")  # type: ignore[arg-type]
    assert not BACKEND.is_plain(layer)
    undo = prepare(model)
    assert isinstance(layer, cls)
    assert BACKEND.is_plain(layer) == (scheme != "int8")  # whose dtype nobody knows
    assert (BACKEND.config(layer), BACKEND.compute_dtype(layer)) == (config, dtype)
    assert torch.equal(BACKEND.dequantize(layer), dense)
    assert torch.equal(layer(x), expected)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x), model(x))
    undo()
    assert type(layer) is cls
    assert set(vars(layer)) == attributes
    assert torch.equal(layer(x), expected)


def test_a_subclass_is_kept_from_repacking_only() -> None:
    class Own(bnb.nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer = theirs("nf4")
    layer.__class__ = Own
    undo = BACKEND.prepare(layer)
    assert type(layer) is Own
    assert not layer.support_avx512bf16_for_cpu
    assert not BACKEND.is_plain(layer)
    with pytest.raises(UnsupportedLayerError, match="Own has a forward of its own"):
        BACKEND.densify(layer, numbers(OUT, IN))
    undo()
    assert layer.support_avx512bf16_for_cpu == functional.has_avx512bf16()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_a_foreign_layer_can_be_stored_anew_and_made_dense(scheme: str) -> None:
    for used in (False, True):  # the first forward of int8 moves its scales
        layer, x = theirs(scheme), numbers(3, IN)
        if used:
            layer(x)
        y = theirs(scheme)(x)
        undo = BACKEND.requantize(layer, numbers(OUT, IN, seed=5))
        assert not torch.equal(layer(x), y)
        undo()
        assert torch.equal(layer(x), y)
        undo = BACKEND.densify(layer, numbers(OUT, IN, seed=5))
        assert torch.equal(layer(x), F.linear(x, numbers(OUT, IN, seed=5), layer.bias))
        undo()
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("layer", [bnb.nn.Linear4bit(IN, OUT), bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)])
def test_a_layer_that_is_not_quantized_yet_is_refused(layer: Any) -> None:
    for read in (BACKEND.dequantize, BACKEND.state, BACKEND.prepare):
        with pytest.raises(UnsupportedLayerError, match="not quantized yet"):
            read(layer)


def test_int8_that_keeps_its_weight_in_16_bit_is_not_ours() -> None:
    assert backend_of(bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=True)) is None


def test_the_kernel_that_reads_wrong_scales() -> None:
    """bitsandbytes 0.50.2 on AVX512: blocks that run over the end of a row. Ours multiplies what was stored."""
    layer, x = ours("nf4", columns=96), numbers(3, 96)
    error = (BACKEND.dequantize(layer) - numbers(OUT, 96)).norm() / numbers(OUT, 96).norm()
    assert error < 0.1
    assert torch.equal(layer(x), F.linear(x, BACKEND.dequantize(layer), layer.bias))
    foreign = prepared(theirs("nf4", columns=96))
    assert torch.equal(foreign(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_logs_no_warning(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    """bitsandbytes says at each forward that it casts to float16."""
    x = numbers(3, IN).to(dtype)
    with caplog.at_level(logging.WARNING):
        for layer in (ours("int8"), prepared(theirs("int8")), ours("nf4")):
            layer(x)
            layer.eval()(x)
    assert not caplog.records


@pytest.mark.parametrize("threshold", [0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_in_8_bits_is_that_of_bitsandbytes(threshold: float, dtype: torch.dtype) -> None:
    """What CUDA runs, here on the CPU's kernels, against bitsandbytes' own function."""
    layer, x = ours("int8", threshold=threshold), numbers(2, 3, IN).to(dtype)
    weight, scales = bnb_layers.operands(layer)
    bias = layer.bias.to(dtype)
    state = bnb.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training, state.threshold = weight, scales, False, False, threshold
    before = x.clone()
    y = bnb_layers.multiply_int8(x, bias, weight, scales, threshold=threshold)
    assert torch.equal(y, bnb.matmul(x, weight, state=state, bias=bias))
    assert torch.equal(x, before)
    dense = F.linear(x, BACKEND.dequantize(layer, dtype), bias).float()
    error = (y.float() - dense).norm() / dense.norm()
    assert error < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_default_dtype_leaves_no_trace(dtype: torch.dtype) -> None:
    """bitsandbytes makes its tables in the default dtype, which Lightning's `bf16-true` changes while a model is built."""
    torch.set_default_dtype(dtype)
    layer = ours("nf4")
    again = BACKEND.from_state((OUT, IN), BACKEND.state(layer), layer.bias, BACKEND.config(layer))
    twin = copy.deepcopy(layer)
    with torch.device("meta"):
        other = BACKEND.from_state((OUT, IN), BACKEND.state(layer), layer.bias, BACKEND.config(layer))
    torch.set_default_dtype(torch.float32)
    for made in (layer, again, twin, other):
        assert made.quant_state.offset.dtype == made.quant_state.code.dtype == torch.float32
        assert torch.equal(BACKEND.dequantize(made), BACKEND.dequantize(ours("nf4")))
    assert torch.get_default_dtype() == torch.float32


def test_draws_no_random_numbers() -> None:
    before = torch.get_rng_state()
    ours("nf4"), ours("int8")
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_or_old_package_is_an_error_with_the_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnb, "__version__", "0.45.3")
    with pytest.raises(DependencyError, match="0.45.3 is too old.*pip install 'lightning-peft\\[quantization\\]'"):
        backend_for(Quantization())
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DependencyError, match="pip install 'lightning-peft\\[quantization\\]'.*backend='torch'"):
        backend_for(Quantization())
    assert backend_for(Quantization(backend="torch")).name == "torch"


def test_looking_at_a_layer_imports_nothing() -> None:
    code = """
import sys, torch
from lightning_peft.quantization import Quantization, backend_for, backend_of, prepare
assert backend_of(torch.nn.Linear(2, 2)) is None
backend = backend_for(Quantization(backend="torch"))
assert backend_of(backend.linear(torch.ones(2, 2), None, Quantization(backend="torch"))) is backend
prepare(torch.nn.Sequential(torch.nn.Linear(2, 2)))
assert "bitsandbytes" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pickle_opens_in_a_process_that_has_not_imported_bitsandbytes() -> None:
    layer, x = ours("nf4"), numbers(3, IN)
    code = "import pickle, sys, torch\nlayer, x, y = pickle.load(sys.stdin.buffer)\nassert torch.equal(layer(x), y)"
    subprocess.run([sys.executable, "-c", code], input=pickle.dumps((layer, x, layer(x).detach())), check=True)


@pytest.mark.slow
def test_error_on_real_weights() -> None:
    """Four matrices of SmolLM2-135M. They come from a 4-bit file with 32 weights a block, hence a bit off the normal distribution."""
    from safetensors import safe_open

    from examples.assets import smollm2

    layers = ("0.self_attn.q_proj", "15.self_attn.v_proj", "15.mlp.down_proj", "29.mlp.up_proj")
    for scheme, low, high in (("nf4", 0.07, 0.11), ("fp4", 0.09, 0.16), ("int8", 0.004, 0.02)):
        config = Quantization.parse(scheme)
        with safe_open(smollm2() / "model.safetensors", "pt") as file:
            for name in layers:
                weight = file.get_tensor(f"model.layers.{name}.weight")
                stored = BACKEND.dequantize(BACKEND.linear(weight, None, config), torch.float32)
                error = ((stored - weight.float()).norm() / weight.float().norm()).item()
                print(f"{scheme} {name}: {error:.4f}, normal weights {BACKEND.expected_error(config):.4f}")
                assert low < error < high
