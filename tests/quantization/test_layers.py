"""Quantized layers of both backends: products, gradients, states, moves and copies, storing anew and dense."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft.errors import ConfigError, FormatError, UnsupportedLayerError
from lightning_peft.quantization.backend import QuantBackend, backend_for, backend_of
from lightning_peft.quantization.config import Quantization

OUT, IN = 48, 128
CONFIGS = {
    f"{backend}-{name}": Quantization(backend=backend, **options)  # type: ignore[arg-type]
    for backend in ("torch", "bitsandbytes")
    for name, options in {
        "nf4": {},
        "nf4-single": {"double_quant": False},
        "nf4-as-bf16": {"storage_dtype": "bfloat16", "compute_dtype": "bfloat16"},
        "nf4-128": {"block_size": 128, "compute_dtype": "float16"},
        "nf4-wide": {"block_size": 4096},
        "fp4-as-fp32": {"scheme": "fp4", "storage_dtype": "float32", "double_quant": False},
        "int8": {"scheme": "int8"},
        "int8-bf16": {"scheme": "int8", "compute_dtype": "bfloat16"},
    }.items()
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=list(CONFIGS))
BACKENDS = pytest.mark.parametrize("backend", ["torch", "bitsandbytes"])


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(
    config: Quantization, *, columns: int = IN, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[QuantBackend, Any]:
    backend = backend_for(config)
    return backend, backend.linear(numbers(OUT, columns).to(dtype), numbers(OUT, seed=1).to(dtype) if bias else None, config)


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: bytes(t.detach().reshape(-1).view(torch.uint8).tolist()) for name, t in tensors.items()}


def with_grad(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = function(x)
    (g,) = torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.shape[-1])).sum(), x)
    return y.detach(), g


@EACH
@pytest.mark.parametrize("columns", [IN, 96, 31], ids=str)  # a multiple of the block size, not one, odd
def test_product_and_gradient_are_those_of_the_dense_weight(config: Quantization, columns: int) -> None:
    if config.storage_dtype != "uint8":
        columns += columns % 2  # another test: such a weight is refused
    backend, layer = made(config, columns=columns)
    compute, dense = backend.compute_dtype(layer), backend.dequantize(layer)
    assert compute == dense.dtype == config.dtype(torch.float32)
    assert (layer.in_features, layer.out_features) == (columns, OUT)

    def reference(x: Tensor) -> Tensor:
        return F.linear(x.to(compute), dense, layer.bias.to(compute)).to(x.dtype)

    x = numbers(3, 5, columns)
    for training in (True, False):
        layer.train(training)
        assert all(map(torch.equal, with_grad(layer, x), with_grad(reference, x)))
        with torch.no_grad():
            assert torch.equal(layer(x), reference(x))
            assert layer(x[:0]).shape == (0, 5, OUT)
    half = layer(x.half())
    assert half.dtype == torch.float16


@EACH
def test_bias_trains_and_keeps_its_bits(config: Quantization) -> None:
    """bitsandbytes' own layers cast the bias to the dtype of the input, for good."""
    _, layer = made(config)
    before = layer.bias.detach().clone()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        layer(numbers(2, IN).to(dtype))
        layer.eval()(numbers(2, IN).to(dtype))
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, before)
    layer.bias.requires_grad_()
    layer(numbers(3, 5, IN)).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 15.0))


@EACH
def test_keeps_nothing_dense_for_the_backward_pass(config: Quantization) -> None:
    backend, layer = made(config, bias=False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(numbers(3, IN).requires_grad_())
    assert sum(t.nbytes for t in kept) <= backend.nbytes(layer)


@EACH
def test_under_autocast_its_dtype_holds(config: Quantization) -> None:
    backend, layer = made(config)
    x = numbers(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    expected = F.linear(x.bfloat16(), backend.dequantize(layer, torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(y, expected.float())


@EACH
def test_describes_itself(config: Quantization) -> None:
    backend, layer = made(config, dtype=torch.bfloat16)
    assert backend_of(layer) is backend
    assert backend.config(layer) == config
    assert backend.dense_dtype(layer) == torch.bfloat16
    assert backend.compute_dtype(layer) == config.dtype(torch.bfloat16)
    assert backend.is_plain(layer)
    assert isinstance(layer, nn.Linear)
    assert not any(p.requires_grad for p in layer.parameters())
    share = backend.nbytes(layer) / (OUT * IN)
    assert share < (1.1 if config.scheme == "int8" else 0.85)  # tables of values weigh much in a layer this small


@EACH
def test_dtype_moves_leave_the_codes(config: Quantization) -> None:
    backend, layer = made(config)
    before, exact = bits(backend.state(layer)), backend.dequantize(layer, torch.float64)
    weight = layer.weight
    model = nn.Sequential(nn.Linear(2, 2), layer)
    for move in (
        lambda: model.to(torch.bfloat16),
        lambda: model.half(),
        lambda: model.to("cpu", torch.float32),
        lambda: model.type(torch.float32),
        lambda: layer.to(torch.bfloat16),
    ):
        move()
        after = {name: stored for name, stored in bits(backend.state(layer)).items() if "quant_state" not in name}
        assert after == {name: before[name] for name in after}  # the rest is a note of the dtype
        assert torch.equal(backend.dequantize(layer, torch.float64), exact)
        assert layer.weight is weight
        assert layer.bias.dtype == model[0].weight.dtype or move is not None
    assert backend.dense_dtype(layer) == torch.bfloat16
    assert backend.compute_dtype(layer) == config.dtype(torch.bfloat16)
    y = layer(numbers(2, IN).bfloat16())
    assert y.dtype == torch.bfloat16


@BACKENDS
def test_compute_dtype_of_its_own_survives_dtype_moves(backend: str) -> None:
    _, layer = made(Quantization(backend=backend, compute_dtype="float16"))  # type: ignore[arg-type]
    assert backend_of(layer.to(torch.bfloat16)).compute_dtype(layer) == torch.float16  # type: ignore[union-attr]


@EACH
def test_goes_to_meta_and_comes_back_empty(config: Quantization) -> None:
    backend, layer = made(config)
    layer.to("meta")
    assert all(t.is_meta for name, t in layer.state_dict().items() if "quant_state" not in name and name != "weight_format")
    layer.to_empty(device="cpu")
    assert not layer.weight.is_meta
    assert backend.dequantize(layer).shape == (OUT, IN)


@EACH
@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_are_equal_and_apart(config: Quantization, how: Callable[[Any], Any]) -> None:
    backend, layer = made(config)
    x = numbers(2, IN)
    layer.eval()(x)
    twin = how(layer)
    assert type(twin) is type(layer)
    assert backend.config(twin) == config
    assert torch.equal(twin(x), layer(x))
    before = bits(backend.state(layer))
    backend.requantize(twin, numbers(OUT, IN, seed=7))
    assert not torch.equal(twin(x), layer(x))
    assert bits(backend.state(layer)) == before


@EACH
def test_state_dict_loads_into_another_layer(config: Quantization) -> None:
    backend, layer = made(config)
    layer(numbers(2, IN))
    other = backend.linear(numbers(OUT, IN, seed=5), numbers(OUT, seed=6), config)
    other.eval()(numbers(2, IN))
    weight = other.weight
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    assert set(layer.state_dict()) | {"dense"} == {"bias", "dense", *backend.state(layer)}
    other.load_state_dict(torch.load(file, weights_only=True))
    assert bits(backend.state(other)) == bits(backend.state(layer))
    assert other.weight is weight
    assert torch.equal(other(numbers(2, IN)), layer(numbers(2, IN)))


@EACH
def test_state_dict_of_another_storage_is_refused(config: Quantization) -> None:
    backend, layer = made(config)
    before = bits(backend.state(layer))
    wrong = [{}, nn.Linear(IN, OUT).state_dict(), made(config, columns=64)[1].state_dict()]
    for name, other in CONFIGS.items():
        codes = (config.scheme == "int8", config.block_size, config.double_quant)
        if other.backend == config.backend and codes != (other.scheme == "int8", other.block_size, other.double_quant):
            wrong.append(made(CONFIGS[name])[1].state_dict())
    for state in wrong:
        with pytest.raises(RuntimeError, match="Error\\(s\\) in loading"):
            layer.load_state_dict(state)
        assert bits(backend.state(layer)) == before


@EACH
def test_from_state_is_exact(config: Quantization) -> None:
    backend, layer = made(config, dtype=torch.bfloat16)
    state = {name: t.clone() for name, t in backend.state(layer).items()}
    again: Any = backend.from_state((OUT, IN), state, layer.bias, config)
    assert backend.dense_dtype(again) == torch.bfloat16
    assert backend.compute_dtype(again) == backend.compute_dtype(layer)
    assert bits(backend.state(again)) == bits(state)
    assert backend.config(again) == config
    assert torch.equal(again(numbers(2, IN)), layer(numbers(2, IN)))
    assert again.weight.data_ptr() == state["weight"].data_ptr()  # used, not copied

    without = {name: t for name, t in state.items() if name != next(iter(state))}
    wrong = [
        (without, (OUT, IN), "lacks weight"),
        ({**state, "more": torch.zeros(1)}, (OUT, IN), "unknown more"),
        (state, (OUT + 1, IN), "asks? for|not \\("),
        ({**state, "weight": state["weight"][:-1]}, (OUT, IN), "asks? for"),
    ]
    for tensors, shape, message in wrong:
        with pytest.raises(FormatError, match=message):
            backend.from_state(shape, tensors, None, config)


@EACH
def test_requantizes_and_takes_it_back(config: Quantization) -> None:
    backend, layer = made(config)
    before, weight = bits(backend.state(layer)), layer.weight
    new = numbers(OUT, IN, seed=3)
    undo = backend.requantize(layer, new)
    fresh = backend.linear(new, None, config)
    assert bits(backend.state(layer)) == bits(backend.state(fresh))
    assert layer.weight is weight
    twin, its_undo = copy.deepcopy((layer, undo))
    undo()
    assert bits(backend.state(layer)) == before
    assert bits(backend.state(twin)) == bits(backend.state(fresh))
    its_undo()  # of a copy, takes back the copy
    assert bits(backend.state(twin)) == before


@EACH
def test_what_is_stored_once_is_stored_the_same_again(config: Quantization) -> None:
    """So merging nothing changes nothing, unless the scales are rounded as well."""
    backend, layer = made(config)
    dense = backend.dequantize(layer, torch.float32)
    backend.requantize(layer, dense)
    tolerance = 0.0 if config.scheme == "int8" or not config.double_quant else 2e-2
    torch.testing.assert_close(backend.dequantize(layer, torch.float32), dense, rtol=tolerance, atol=1e-6)


@EACH
def test_becomes_dense_and_takes_it_back(config: Quantization) -> None:
    backend, layer = made(config)
    cls, weight, before, x = type(layer), layer.weight, bits(layer.state_dict()), numbers(2, IN)
    y = layer(x)
    layer.child = nn.Linear(1, 1)
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))

    undo = backend.densify(layer, numbers(OUT, IN, seed=3))
    assert type(layer) is nn.Linear
    assert backend_of(layer) is None
    assert set(layer.state_dict()) == {"weight", "bias", "child.weight", "child.bias"}
    assert torch.equal(layer(x), F.linear(x, numbers(OUT, IN, seed=3), layer.bias))
    assert len(calls) == 1

    undo()
    assert type(layer) is cls
    assert layer.weight is weight
    del layer.child
    assert bits(layer.state_dict()) == before
    assert torch.equal(layer(x), y)


@EACH
def test_a_layer_that_became_dense_can_be_copied(config: Quantization) -> None:
    backend, layer = made(config)
    backend.densify(layer, numbers(OUT, IN, seed=3))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is nn.Linear
        assert torch.equal(twin.weight, layer.weight)
    layer.to(torch.bfloat16).load_state_dict(nn.Linear(IN, OUT).state_dict())


@EACH
def test_refuses_weights_that_it_cannot_store(config: Quantization) -> None:
    backend, layer = made(config)
    before = bits(backend.state(layer))
    bad = numbers(OUT, IN)
    bad[3, 5] = torch.nan
    huge = numbers(OUT, IN)
    huge[3, 5] = torch.inf
    wrong: list[tuple[Tensor, str]] = [
        (torch.empty(OUT, IN, device="meta"), "meta"),
        (torch.ones(OUT, IN, dtype=torch.int32), "dtype int32"),
        (torch.ones(OUT, IN, dtype=torch.float8_e4m3fn), "dtype float8"),
        (torch.ones(OUT), "shape \\(48,\\)"),
        (torch.ones(0, IN), "has entries"),
        (bad, "NaN or infinite"),
        (huge, "NaN or infinite"),
    ]
    if config.backend == "bitsandbytes":
        wrong.append((torch.ones(OUT, IN, dtype=torch.float64), "dtype float64.*torch backend"))
    if config.storage_dtype != "uint8":
        wrong.append((torch.ones(3, 3), f"storage_dtype={config.storage_dtype}"))
    for weight, message in wrong:
        for store in (lambda w: backend.linear(w, None, config), lambda w: backend.requantize(layer, w)):
            with pytest.raises(UnsupportedLayerError, match=message):
                store(weight)
    assert bits(backend.state(layer)) == before


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8"])
def test_the_backends_hold_the_same_layer(scheme: Any) -> None:
    for columns in (IN, 96, 31):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            layers = [
                made(Quantization(scheme=scheme, backend=name), columns=columns, dtype=dtype)[1]
                for name in ("torch", "bitsandbytes")
            ]
            ours, theirs = (backend_of(layer) for layer in layers)
            assert ours is not None
            assert theirs is not None
            assert torch.equal(layers[0].weight, layers[1].weight)
            assert torch.equal(ours.dequantize(layers[0]), theirs.dequantize(layers[1]))
            x = numbers(4, columns).to(dtype)
            assert torch.equal(layers[0](x), layers[1](x))


def test_float64() -> None:
    backend, layer = made(Quantization(backend="torch"), dtype=torch.float64)
    x = numbers(2, IN).double()
    y, g = with_grad(layer, x)
    dense = backend.dequantize(layer)
    assert dense.dtype == y.dtype == torch.float64
    torch.testing.assert_close(y, x @ dense.T + layer.bias, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert g.dtype == torch.float64


@BACKENDS
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_compiles_whole(backend: Any, scheme: Any) -> None:
    _, layer = made(Quantization(scheme=scheme, backend=backend))
    x = numbers(2, IN)
    with warnings.catch_warnings():
        # torch 2.13: its own tracing of autograd functions instantiates one, which it deprecates.
        warnings.filterwarnings("ignore", ".*autograd.function.Function.* should not be instantiated", DeprecationWarning)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for got, expected in zip(with_grad(compiled, x), with_grad(layer, x), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int8", "threshold": 6.0, "backend": "torch"}, "does not quantize inputs"),
        ({"compute_dtype": "float64", "backend": "bitsandbytes"}, "float64"),
        ({"block_size": 16, "backend": "bitsandbytes"}, "bitsandbytes knows 32"),
        ({"block_size": 8192}, "bitsandbytes knows"),
        ({"scheme": "nf4", "threshold": 6.0}, "no effect on nf4"),
        ({"scheme": "int8", "block_size": 128}, "no effect on int8"),
        ({"scheme": "int8", "storage_dtype": "bfloat16"}, "no effect on int8"),
        ({"threshold": float("nan")}, "0 or more"),
    ],
)
def test_refuses_storages_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        backend_for(Quantization(**options))


def test_torch_takes_any_block_size() -> None:
    for size in (2, 16, 1 << 23):
        backend, layer = made(Quantization(block_size=size, backend="torch"))
        assert torch.equal(layer(numbers(2, IN)), F.linear(numbers(2, IN), backend.dequantize(layer), layer.bias))
