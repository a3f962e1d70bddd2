"""LoRA, arXiv 2106.09685; rank stabilisation, arXiv 2312.03732; PiSSA, arXiv 2404.02948."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnsupportedLayerError
from tests.backbones import BACKBONES, MLP, run

D = torch.float64


def mlp(dtype: torch.dtype = D) -> MLP:
    torch.manual_seed(0)
    return MLP().to(dtype)


X = torch.randn(5, 48, dtype=D, generator=torch.Generator().manual_seed(1))


def install(model: nn.Module, **options: Any) -> lp.Handle:
    return lp.inject(model, lp.LoRA(**{"rank": 4, "targets": "all-linear", **options}))


def randomize(handle: lp.Handle) -> None:
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.add_(torch.randn_like(p) * 0.3)


def test_count_names_and_shapes() -> None:
    handle = install(mlp())
    assert handle.num_trainable() == 4 * (48 + 32) + 4 * (32 + 64) == 704
    assert {k: tuple(v.shape) for k, v in handle.state_dict().items()} == {
        "l1.lora_A": (4, 48), "l1.lora_B": (32, 4), "l2.lora_A": (4, 32), "l2.lora_B": (64, 4),
    }  # fmt: skip


def test_rank_of_the_change_and_its_scale() -> None:
    model = mlp()
    handle = install(model, alpha=8.0)
    randomize(handle)
    adapter = handle.entries[0].adapter
    assert torch.linalg.matrix_rank(adapter.delta()) == 4
    torch.testing.assert_close(adapter.delta(), 2.0 * adapter.lora_B @ adapter.lora_A)
    # The branch is linear in x: what it does to the identity is ΔW.
    with torch.no_grad():
        branch = model.l1(torch.eye(48, dtype=D)) - nn.functional.linear(torch.eye(48, dtype=D), model.l1.weight, model.l1.bias)
    torch.testing.assert_close(branch.T, adapter.delta().detach())


@pytest.mark.parametrize(("stabilized", "expected"), [(False, 16 / 4), (True, 16 / 2)])
def test_scaling_and_its_rank_stabilised_form(stabilized: bool, expected: float) -> None:
    assert {e.adapter.scaling for e in install(mlp(), rank_stabilized=stabilized).entries} == {expected}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_parity_with_hf_peft(options: dict[str, Any]) -> None:
    import peft

    model = mlp()
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["l1", "l2"], **options))
    handle = install(model, alpha=8.0, rank_stabilized="use_rslora" in options)
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            layer.lora_A["default"].weight.copy_(entry.adapter.lora_A)
            layer.lora_B["default"].weight.copy_(entry.adapter.lora_B)
    theirs.to(D)
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-10, atol=1e-10)
    # The same loss gives the same gradients, and merging the same weights.
    model(X).square().sum().backward()
    theirs(X).square().sum().backward()
    for entry in handle.entries:
        layer = theirs.base_model.model.get_submodule(entry.path)
        torch.testing.assert_close(entry.adapter.lora_A.grad, layer.lora_A["default"].weight.grad.to(D), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entry.adapter.lora_B.grad, layer.lora_B["default"].weight.grad.to(D), rtol=1e-9, atol=1e-9)
    handle.merge()
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(model.l1.weight, merged.l1.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # HF peft 0.21 asks transformers 5.23 for it
def test_parity_with_hf_peft_on_a_language_model() -> None:
    import peft

    backbone = BACKBONES["llama"]
    model = backbone.fresh(D)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(backbone.fresh(D), config).to(D).eval()
    handle = lp.inject(model, lp.LoRA(rank=2, alpha=4.0))
    randomize(handle)
    with torch.no_grad():
        for entry in handle.entries:
            layer = theirs.base_model.model.get_submodule(entry.path)
            layer.lora_A["default"].weight.copy_(entry.adapter.lora_A)
            layer.lora_B["default"].weight.copy_(entry.adapter.lora_B)
    assert len(handle.entries) == 4
    torch.testing.assert_close(run(model, backbone.batch(D)), run(theirs, backbone.batch(D)), rtol=1e-5, atol=1e-5)


def test_default_targets_are_query_and_value_or_their_slices() -> None:
    llama = lp.inject(BACKBONES["llama"].fresh(), "lora")
    assert {e.path.rpartition(".")[2] for e in llama.entries} == {"q_proj", "v_proj"}
    gpt2 = lp.inject(BACKBONES["gpt2"].fresh(), "lora")
    assert {(e.path.rpartition(".")[2], e.member) for e in gpt2.entries} == {("c_attn", "query"), ("c_attn", "value")}


def test_rank_and_alpha_per_target_the_first_match_wins() -> None:
    model = BACKBONES["llama"].fresh()
    strategy = lp.LoRA(
        rank=2, alpha=2.0, targets=["attention.query", "mlp.up", "v_proj"],
        rank_per_target={"attention.query": 3, "*.layers.1.*": 5, "re:.*": 4},
        alpha_per_target={"v_proj": 8.0},
    )  # fmt: skip
    ranks = {
        e.path.removeprefix("model.layers."): (e.adapter.rank, e.adapter.scaling) for e in lp.inject(model, strategy).entries
    }
    assert ranks == {
        "0.self_attn.q_proj": (3, 2 / 3), "0.self_attn.v_proj": (4, 2.0), "0.mlp.up_proj": (4, 0.5),
        "1.self_attn.q_proj": (3, 2 / 3), "1.self_attn.v_proj": (5, 8 / 5), "1.mlp.up_proj": (5, 2 / 5),
    }  # fmt: skip


def test_a_rank_per_target_that_matches_nothing_is_refused() -> None:
    with pytest.raises(lp.PEFTError, match="nothing"):
        install(mlp(), rank_per_target={"nothing": 2})


@pytest.mark.parametrize(
    ("bias", "targets", "expected"),
    [("none", "l1", set()), ("adapted", "l1", {"l1.bias"}), ("all", "l2", {"l1.bias"})],
)
def test_bias_options(bias: Any, targets: str, expected: set[str]) -> None:
    model = mlp()
    handle = install(model, bias=bias, targets=targets)
    assert {s.key for s in handle.slots if s.claimed} == expected
    assert {n for n, p in model.named_parameters() if p.requires_grad and "peft" not in n} == expected
    plain = model(X).detach()
    randomize(handle)
    assert not torch.equal(model(X), plain)
    with handle.disabled():
        assert torch.equal(model(X), plain)
    expected_output = model(X).detach()
    handle.merge()
    torch.testing.assert_close(model(X), expected_output)


def test_bias_where_there_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no bias"):
        install(mlp(), bias="adapted", targets="l2")


def test_dropout_acts_in_training_only_and_follows_the_seed() -> None:
    model = mlp()
    handle = install(model, dropout=0.5)
    randomize(handle)
    model.eval()
    expected = model(X)
    assert torch.equal(model(X), expected)
    plain = mlp()
    other = install(plain, dropout=0.0)
    other.load_state_dict(handle.state_dict())
    assert torch.equal(plain(X), expected)
    model.train()
    torch.manual_seed(3)
    first = model(X)
    assert not torch.equal(first, expected)
    assert not torch.equal(model(X), first)
    torch.manual_seed(3)
    assert torch.equal(model(X), first)
    torch.manual_seed(0)
    mean = torch.stack([model.l1(X) for _ in range(4000)]).mean(0)
    model.eval()
    assert (mean - model.l1(X)).abs().mean() < 0.15, "dropped inputs are scaled up: the mean is the branch without dropout"


def test_dropout_without_an_input_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="dropout"):
        lp.inject(BACKBONES["torch_encoder"].fresh(), lp.LoRA(rank=2, dropout=0.1))


def test_initial_values() -> None:
    default = install(mlp(), init="default").entries[0].adapter
    assert default.lora_A.abs().max() <= 48**-0.5
    assert default.lora_A.abs().max() > 0.9 * 48**-0.5
    assert default.lora_B.abs().max() == 0
    gaussian = install(mlp(), init="gaussian").entries[0].adapter
    assert 0.15 < gaussian.lora_A.std() < 0.35, "standard deviation 1/r = 0.25"
    assert gaussian.lora_A.abs().max() > 48**-0.5
    assert gaussian.lora_B.abs().max() == 0


# PiSSA


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (D, 1e-13)])
def test_pissa_starts_at_the_base_and_leaves_its_weight(dtype: torch.dtype, tolerance: float) -> None:
    model = mlp(dtype)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    plain = model(X.to(dtype)).detach()
    handle = install(model, init="pissa")
    assert (model(X.to(dtype)) - plain).abs().max() <= tolerance
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not handle.strategy.identity_at_init
    with handle.disabled():
        assert torch.equal(model(X.to(dtype)), plain)


def test_pissa_takes_the_principal_part_of_the_weight() -> None:
    model = mlp()
    adapter = install(model, init="pissa", alpha=8.0).entries[0].adapter
    U, S, Vh = torch.linalg.svd(model.l1.weight.detach())
    product = adapter.scaling * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], S[:4])
    torch.testing.assert_close(product, U[:, :4] @ torch.diag(S[:4]) @ Vh[:4])
    # A and B carry equal shares of the singular values.
    torch.testing.assert_close(adapter.lora_A.norm(dim=1), adapter.lora_B.norm(dim=0))


def test_pissa_changes_the_weight_by_at_most_twice_the_rank_and_merges() -> None:
    model = mlp()
    weight = model.l1.weight.detach().clone()
    handle = install(model, init="pissa")
    randomize(handle)
    expected = model(X).detach()
    handle.merge()
    torch.testing.assert_close(model(X), expected)
    assert torch.linalg.matrix_rank(model.l1.weight - weight, rtol=1e-9) <= 8
    handle.unmerge()
    torch.testing.assert_close(model.l1.weight.detach(), weight, rtol=0, atol=1e-12)


def test_pissa_factors_travel_with_the_state_and_are_not_trained() -> None:
    model = mlp()
    handle = install(model, init="pissa")
    randomize(handle)
    assert {k.rpartition(".")[2] for k in handle.state_dict()} == {"lora_A", "lora_B", "initial_A", "initial_B"}
    assert handle.num_trainable() == 704
    other = mlp()
    again = install(other, init="pissa")
    with torch.no_grad():
        for entry in again.entries:
            entry.adapter.initial_A.zero_()  # as a singular-value routine of another machine would differ
    again.load_state_dict(handle.state_dict())
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("name", ["gpt2", "conv_net", "torch_encoder"])
def test_pissa_on_other_layer_kinds(name: str) -> None:
    backbone = BACKBONES[name]
    model = backbone.fresh(D).requires_grad_(False)
    plain = run(model, backbone.batch(D))
    targets = {"gpt2": None, "conv_net": ["stem", "body"], "torch_encoder": None}[name]
    handle = lp.inject(model, lp.LoRA(rank=2, init="pissa", targets=targets))
    torch.testing.assert_close(run(model, backbone.batch(D)), plain, rtol=0, atol=1e-10)
    randomize(handle)
    expected = run(model, backbone.batch(D))
    handle.merge()
    torch.testing.assert_close(run(model, backbone.batch(D)), expected, rtol=1e-9, atol=1e-9)


def test_pissa_on_a_grouped_convolution_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match="grouped"):
        lp.inject(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), lp.LoRA(rank=2, init="pissa", targets="0"))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf"), float("nan")])
def test_alphas_per_target_are_positive_and_finite(alpha: float) -> None:
    with pytest.raises(ConfigError, match="positive and finite"):
        lp.LoRA(alpha_per_target={"q_proj": alpha})
