"""Injection refuses bad input before it changes anything, and touches neither global random state nor what it does not own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, ConflictError, MergeError, TargetError, UnsupportedLayerError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def assert_plain(model: nn.Module) -> None:
    assert not [k for k in model.state_dict() if "peft" in k]
    assert all("forward" not in vars(m) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert lp.handles(model) == {}


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../x", "ä"])
def test_a_name_that_cannot_be_part_of_a_key_is_refused(name: str) -> None:
    model = Net()
    with pytest.raises(ConfigError, match="letters, digits"):
        lp.inject(model, lp.LoRA(targets="head", rank=2), name)
    assert_plain(model)


@pytest.mark.parametrize("name", ["forward", "training", "_modules"])
def test_a_name_that_modules_use_themselves_is_refused(name: str) -> None:
    model = Net()
    with pytest.raises(ConflictError, match=name):
        lp.inject(model, lp.LoRA(targets="head", rank=2), name)
    assert_plain(model)


@pytest.mark.parametrize(
    ("targets", "error", "match"),
    [
        ("haed", TargetError, "head"),
        ("encoder", TargetError, "container|Sequential"),
        ("encoder.1", UnsupportedLayerError, "Tanh"),
        (["head", "nothing"], TargetError, "nothing"),
        ("re:^nothing$", TargetError, "nothing"),
        ({"include": ["head"], "exclude": ["head"]}, TargetError, "exclude"),
        ({"include": ["head"], "layers": [9]}, TargetError, "9"),
    ],
)
def test_targets_that_match_nothing_are_refused(targets: Any, error: type[Exception], match: str) -> None:
    model = Net()
    with pytest.raises(error, match=match):
        lp.inject(model, {"class_path": "LoRA", "init_args": {"targets": targets, "rank": 2}})
    assert_plain(model)


def test_an_inferred_model_gets_no_guess() -> None:
    model = Net()
    with pytest.raises(TargetError, match="all-linear"):
        lp.inject(model, "lora")
    assert_plain(model)


@pytest.mark.parametrize(
    "parts",
    [
        [lp.BitFit(), lp.BitFit()],
        [lp.BitFit(), lp.Full()],
        [lp.LoRA(targets="head", rank=2, bias="adapted"), lp.BitFit(targets="head")],
    ],
)
def test_two_parts_that_train_the_same_tensor_conflict(parts: list[lp.PEFTStrategy]) -> None:
    model = Net()
    with pytest.raises(ConflictError, match="meet|trained by"):
        lp.inject(model, lp.Compose(parts=tuple(parts)))
    assert_plain(model)


def test_two_handles_that_train_the_same_tensor_conflict() -> None:
    model = Net()
    lp.inject(model, lp.BitFit(targets="head"), "first")
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with pytest.raises(ConflictError, match="head.bias.*'first'"):
        lp.inject(model, lp.BitFit(), "second")
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert list(lp.handles(model)) == ["first"]


def test_an_adapted_root_inside_or_around_is_a_conflict() -> None:
    model = Net()
    inner = lp.inject(model.encoder, lp.LoRA(rank=2, targets="all-linear"), "inner")
    with pytest.raises(ConflictError, match="encoder"):
        lp.inject(model, lp.LoRA(rank=2, targets="head"), "outer")
    inner.remove()
    lp.inject(model, lp.LoRA(rank=2, targets="all-linear"), "outer")
    with pytest.raises(ConflictError, match="outer"):
        lp.inject(model.encoder, lp.LoRA(rank=2, targets="all-linear"), "inner")


def test_installing_over_a_merged_adapter_is_refused() -> None:
    model = Net()
    lp.inject(model, lp.LoRA(rank=2, targets="head"), "first").merge()
    with pytest.raises(MergeError, match="first"):
        lp.inject(model, lp.LoRA(rank=2, targets="head"), "second")
    assert list(lp.handles(model)) == ["first"]


def test_the_root_may_be_the_adapted_layer_itself() -> None:
    layer = nn.Linear(4, 3)
    x = torch.randn(2, 4)
    expected = layer(x)
    handle = lp.inject(layer, lp.LoRA(rank=2, targets="all-linear"))
    assert torch.equal(layer(x), expected)
    handle.remove()
    assert_plain(layer)


def test_a_layer_used_twice_gets_one_adapter() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = Shared()
    handle = lp.inject(model, lp.LoRA(rank=2, targets=["first", "second"]))
    assert len(handle.entries) == 1
    assert handle.num_trainable() == 16
    model(torch.randn(2, 4))


def test_a_role_and_a_path_to_the_same_weight_are_one_site() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.MultiheadAttention(8, 2, kdim=3, vdim=5, batch_first=True)

        def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.cross(x, k, v)[0]

    handle = lp.inject(Cross(), lp.LoRA(rank=2, targets=["attention", "cross"]))
    assert sorted(e.site.tensor for e in handle.entries) == [
        "k_proj_weight", "out_proj.weight", "q_proj_weight", "v_proj_weight",
    ]  # fmt: skip


@pytest.mark.parametrize("strategy", [lp.LoRA(rank=2, targets="all-linear"), lp.VeRA(rank=4, targets="all-linear")])
def test_initialisation_follows_the_seed_and_not_the_global_state(strategy: lp.PEFTStrategy) -> None:
    def state(seed: int, draws: int) -> dict[str, Tensor]:
        model = Net()
        torch.manual_seed(seed)
        torch.rand(draws)
        before = torch.get_rng_state()
        handle = lp.inject(model, strategy)
        assert torch.equal(torch.get_rng_state(), before)
        return handle.state_dict()

    first = state(1, 0)
    assert all(torch.equal(v, first[k]) for k, v in state(1, 5).items())
    if isinstance(strategy, lp.LoRA):
        assert any(not torch.equal(v, first[k]) for k, v in state(2, 0).items())
        twins = lp.inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), strategy).state_dict()
        assert not torch.equal(twins["0.lora_A"], twins["1.lora_A"]), "each layer draws its own"


@pytest.mark.parametrize(
    ("base", "choice", "expected"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.float32),
        (torch.float16, "auto", torch.float32),
        (torch.float64, "auto", torch.float64),
        (torch.bfloat16, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_of_adapter_parameters(base: torch.dtype, choice: Any, expected: torch.dtype) -> None:
    model = Net().to(base)
    handle = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"), adapter_dtype=choice)
    assert {p.dtype for p in handle.trainable_parameters()} == {expected}
    assert model(torch.randn(2, 6, dtype=base)).dtype == base


def test_adapters_on_meta_are_materialised_and_reset() -> None:
    with torch.device("meta"):
        model = Net()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"))
    assert all(p.is_meta for p in handle.trainable_parameters())
    model.to_empty(device="cpu")
    for entry in handle.entries:
        entry.adapter.reset_parameters()
    real = Net()
    reference = lp.inject(real, lp.LoRA(rank=2, targets="all-linear")).state_dict()
    assert all(torch.equal(v, reference[k]) for k, v in handle.state_dict().items())


@pytest.mark.parametrize("strategy", [lp.LoRA(rank=2, targets="all-linear"), lp.VeRA(rank=2, targets="all-linear")])
def test_installing_inside_a_meta_device_context(strategy: lp.PEFTStrategy) -> None:
    # Lightning runs configure_model in such a context under sharding strategies.
    with torch.device("meta"):
        model = Net()
        handle = lp.inject(model, strategy)
    assert all(p.is_meta for p in handle.trainable_parameters())


def test_pissa_needs_the_weights_and_says_so_on_meta() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(UnsupportedLayerError, match="meta"):
        lp.inject(model, lp.LoRA(rank=2, targets="head", init="pissa"))
    assert_plain(model)


def test_autocast() -> None:
    model = Net()
    handle = lp.inject(model, lp.LoRA(rank=2, targets="all-linear"))
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * 0.1)
    x = torch.randn(2, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), model(x), rtol=0.1, atol=0.1)


def test_an_adapted_sequential_still_has_its_own_layers_only() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    last = net[-1]
    handle = lp.inject(net, lp.LoRA(rank=2, targets="0"))
    assert len(net) == 3
    assert net[-1] is last
    assert lp.handles(net) == {"default": handle}
    copied = copy.deepcopy(net)
    lp.handles(copied)["default"].remove()
    assert "forward" in net.__dict__
    assert "forward" not in copied.__dict__
    handle.remove()
    assert "peft" not in net.__dict__
