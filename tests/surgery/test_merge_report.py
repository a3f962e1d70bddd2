"""What a merge says about its rounding errors, and what it refuses to write."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, MergeError

BITS = ("nf4", "fp4", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORAGES = (*DTYPES, *BITS)


class Net(nn.Module):
    """Rows as long as a small model's, so that their extremes are those of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(512, 128), nn.Linear(128, 512)
        with torch.no_grad():
            for layer in (self.up, self.down):
                layer.weight.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(storage: str, size: float) -> tuple[Net, lp.Handle]:
    """Return a model and an adapter whose ΔW has ``size`` times the size of the weights."""
    torch.manual_seed(0)
    model = Net()
    if storage in DTYPES:
        model.to(DTYPES[storage])
    else:
        lp.quantize(model, storage)
    handle = lp.inject(model, lp.LoRA(rank=8, alpha=8.0, targets="all-linear"))
    with torch.no_grad():
        for entry in handle.entries:
            entry.adapter.lora_B.normal_()
            entry.adapter.lora_B.mul_(size * entry.site.weight(entry.module).float().norm() / entry.adapter.delta().norm())
    return model, handle


def merge(handle: lp.Handle, storage: str, **options: Any) -> Any:
    return handle.merge(quantized="requantize" if storage in BITS else None, **options)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    x = torch.randn(3, 512, dtype=model.up.bias.dtype)
    before, keys = copy.deepcopy(model.state_dict()), list(model.state_dict())
    expected = model(x).detach()
    yield
    assert list(model.state_dict()) == keys
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True) if not a.isnan().any()
    )
    torch.testing.assert_close(model(x).detach(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("storage", STORAGES)
def test_large_changes_come_through_with_the_predicted_error(storage: str) -> None:
    _, handle = adapted(storage, 0.5)
    report = merge(handle, storage)
    assert [layer.path for layer in report.layers] == ["up.weight", "down.weight"]
    assert report.swallowed == ()
    for layer in report.layers:
        assert layer.storage == storage
        assert 0.97 < layer.kept < 1.03
        if storage == "float32":  # in which it was computed
            assert layer.measured == layer.predicted == 0
        else:
            assert 0.7 < layer.measured / layer.predicted < 1.25
        assert 0.4 < layer.change < 0.5  # of the weight with the change: 0.5 / √(1 + 0.5²) = 0.447
    assert all(text in str(report) for text in ("up.weight", "down.weight", storage, "predicted", "measured", "kept"))


def test_errors_are_ordered_as_the_storages_are_fine() -> None:
    errors = [max(layer.measured for layer in merge(adapted(storage, 0.5)[1], storage).layers) for storage in STORAGES]
    by = dict(zip(STORAGES, errors, strict=True))
    assert by["float32"] < by["float16"] < by["bfloat16"] < by["int8"] < by["nf4"] < by["fp4"] < 0.2


@pytest.mark.parametrize(("storage", "size"), [("bfloat16", 1e-5), ("nf4", 1e-3), ("int8", 1e-5)])
def test_a_change_that_the_rounding_swallows_is_told(storage: str, size: float) -> None:
    model, handle = adapted(storage, size)
    with pytest.warns(UserWarning, match="swallowed the change of 2 of 2 weights, such as 'up.weight'"):
        report = merge(handle, storage)
    assert report.swallowed == ("up.weight", "down.weight")
    assert all(abs(layer.kept) < 0.05 for layer in report.layers)
    handle.unmerge()
    again, expected = model(torch.ones(2, 512, dtype=model.up.bias.dtype)), adapted(storage, size)[0]
    assert torch.equal(again, expected(torch.ones(2, 512, dtype=model.up.bias.dtype)))


@pytest.mark.parametrize("storage", BITS)
def test_the_same_small_change_comes_through_in_a_layer_left_dense(storage: str) -> None:
    _, handle = adapted(storage, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = handle.merge(quantized="dense")
    assert {layer.storage for layer in report.layers} == {"float32"}
    assert all(0.99 < layer.kept < 1.01 for layer in report.layers)


def test_no_change_is_no_swallowed_change() -> None:
    _, handle = adapted("bfloat16", 0.0)
    report = handle.merge()
    assert report.swallowed == ()
    assert all(layer.change == 0 and layer.kept == 1 for layer in report.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("storage", STORAGES)
def test_what_is_not_finite_is_refused_and_nothing_changes(storage: str, value: float) -> None:
    model, handle = adapted(storage, 0.1)
    with torch.no_grad():
        handle.entries[1].adapter.lora_B[3, 2] = value  # the second layer, when the first could be written already
    with unchanged(model), pytest.raises(MergeError, match="merging 'down' would write values that are not finite"):
        merge(handle, storage)
    assert not handle.merged
    if storage in BITS:
        with unchanged(model), pytest.raises(MergeError, match="not finite"):
            handle.merge(quantized="dense")


def test_what_is_beyond_the_range_of_the_dtype_is_refused() -> None:
    model, handle = adapted("float16", 0.1)
    with torch.no_grad():
        handle.entries[1].adapter.lora_B[3] = 1e6
    with unchanged(model), pytest.raises(MergeError, match="float16.*exceed the range"):
        handle.merge()


@pytest.mark.parametrize("storage", ["float32", "nf4"])
def test_an_unknown_way_to_treat_quantized_weights_is_refused(storage: str) -> None:
    model, handle = adapted(storage, 0.1)
    with unchanged(model), pytest.raises(ConfigError, match="'requantise' is not one of requantize, dense"):
        handle.merge(quantized="requantise")  # type: ignore[arg-type]
