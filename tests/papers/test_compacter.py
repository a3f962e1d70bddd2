"""Compacter, arXiv 2106.04647: bottlenecks of Kronecker products whose small factors all layers share."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.adapter import BuildContext, LayerSpec
from lightning_peft.nn.hypercomplex import HypercomplexLinear, HypercomplexRules
from tests.backbones import BACKBONES, DIM, run

D = torch.float64
SPEC = LayerSpec(kind="linear", out_features=DIM, in_features=DIM)
CONTEXT = BuildContext("", SPEC, lambda: torch.empty(0), D, torch.device("cpu"), 3)


def layer(n: int, inside: int, outside: int, rank: int) -> HypercomplexLinear:
    made = HypercomplexLinear(CONTEXT, rules=HypercomplexRules(CONTEXT, n=n), inside=inside, outside=outside, rank=rank)
    with torch.no_grad():
        for p in (*made.parameters(), made.shared.rules):
            p.normal_()
    return made


def adapted(name: str = "bert", **options: object) -> tuple[torch.nn.Module, lp.Handle]:
    model = BACKBONES[name].fresh(D)
    handle = lp.inject(model, lp.Compacter(**{"width": 4, "n": 2, **options}))  # type: ignore[arg-type]
    with torch.no_grad():
        for p in handle.trainable_parameters():
            p.copy_(torch.randn_like(p) * 0.5)
    return model, handle


def test_golden_matrix() -> None:
    made = layer(2, 4, 4, 1)
    with torch.no_grad():
        made.shared.rules.copy_(torch.tensor([[[1, 2], [0, 1]], [[0, 1], [1, 0]]]))
        made.s.copy_(torch.tensor([[[1], [2]], [[3], [-1]]]))
        made.t.copy_(torch.tensor([[[1, -1]], [[2, 1]]]))
    expected = [[1, -1, 8, 1], [2, -2, 2, -5], [6, 3, 1, -1], [-2, -1, 2, -2]]  # methods.md K
    assert made.matrix().tolist() == expected


@pytest.mark.parametrize(("n", "inside", "outside", "rank"), [(2, 6, 4, 1), (4, 8, 12, 2), (3, 6, 9, 1), (1, 5, 7, 2)])
def test_matrix_is_the_sum_of_kronecker_products(n: int, inside: int, outside: int, rank: int) -> None:
    made = layer(n, inside, outside, rank)
    H = sum(torch.kron(made.shared.rules[i], made.s[i] @ made.t[i]) for i in range(n))
    torch.testing.assert_close(made.matrix(), H)
    x = torch.randn(5, inside, dtype=D)
    torch.testing.assert_close(made(x), x @ H + made.bias)
    limit = sum(int(torch.linalg.matrix_rank(made.shared.rules[i])) * rank for i in range(n))
    assert torch.linalg.matrix_rank(made.matrix()) <= limit


@pytest.mark.parametrize(("strategy", "per_block"), [(lp.Compacter, 2), (lp.CompacterPlusPlus, 1)])
@pytest.mark.parametrize(("n", "rank", "width"), [(2, 1, 4), (4, 2, 8)])
def test_count(strategy: type[lp.Compacter], per_block: int, n: int, rank: int, width: int) -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), strategy(n=n, phm_rank=rank, width=width))
    assert handle.num_trainable() == n**3 + 2 * per_block * (2 * rank * (DIM + width) + width + DIM)
    assert len(handle.entries) == 2 * per_block


def test_a_sub_layer_equals_the_paper() -> None:
    model, handle = adapted(activation="gelu")
    rules = handle.shared["phm"].rules
    x, dense, adapter = (
        torch.randn(3, DIM, dtype=D),
        model.bert.encoder.layer[0].attention.output.dense,
        handle.entries[0].adapter,
    )

    def product(part: HypercomplexLinear, h: Tensor) -> Tensor:
        return h @ sum(torch.kron(rules[i], part.s[i] @ part.t[i]) for i in range(2)) + part.bias

    h = F.linear(x, dense.weight, dense.bias)
    expected = h + product(adapter.up, F.gelu(product(adapter.down, h)))
    torch.testing.assert_close(dense(x), expected)


def test_rules_are_one_tensor_whose_gradient_sums_over_the_layers(tmp_path: Path) -> None:
    model, handle = adapted()
    rules = handle.shared["phm"].rules
    assert all(e.adapter.down.shared.rules is rules is e.adapter.up.shared.rules for e in handle.entries)
    assert [k for k in handle.state_dict() if "rules" in k] == ["shared-phm.rules"]
    twin = copy.deepcopy(model)
    copied = lp.handles(twin)["default"]
    assert copied.entries[0].adapter.up.shared is copied.shared["phm"] is not handle.shared["phm"]

    x = torch.randn(3, DIM, dtype=D)
    layers = [model.get_submodule(e.path) for e in handle.entries if e.path.endswith("attention.output.dense")]
    parts = []
    for dense in layers:
        model.zero_grad()
        dense(x).square().sum().backward()
        parts.append(rules.grad.clone())
    model.zero_grad()
    sum(dense(x).square().sum() for dense in layers).backward()
    torch.testing.assert_close(rules.grad, parts[0] + parts[1])

    lp.save_adapter(handle, tmp_path / "a")
    fresh = BACKBONES["bert"].fresh(D)
    lp.load_adapter(fresh, tmp_path / "a")
    assert torch.equal(run(fresh, BACKBONES["bert"].batch()), run(model, BACKBONES["bert"].batch()))


def test_composed_compacters_have_rules_of_their_own() -> None:
    handle = lp.inject(BACKBONES["bert"].fresh(), [lp.Compacter(n=2, width=4), lp.CompacterPlusPlus(n=4, width=4)])
    assert {k: tuple(v.shape) for k, v in handle.state_dict().items() if "rules" in k} == {
        "shared-0-phm.rules": (2, 2, 2),
        "shared-1-phm.rules": (4, 4, 4),
    }


def test_initialisations() -> None:
    backbone = BACKBONES["bert"]
    base = run(backbone.fresh().requires_grad_(False), backbone.batch())
    model = backbone.fresh()
    handle = lp.inject(model, lp.Compacter(n=4, width=8, init="compacter"))
    assert not handle.strategy.identity_at_init
    assert 0 < (run(model, backbone.batch()) - base).abs().max() < 1e-2
    assert 0.006 < handle.shared["phm"].rules.std() < 0.014
    s = torch.cat([e.adapter.down.s.flatten() for e in handle.entries])
    bound = (2 * 6 / (DIM / 4 + 1)) ** 0.5
    assert 0.8 * bound < s.abs().max() <= bound


def test_widths_are_multiples_of_n() -> None:
    # 16 / 3 = 5 becomes 8, the next multiple of 4.
    handle = lp.inject(BACKBONES["bert"].fresh(), lp.Compacter(reduction_factor=3))
    assert {e.adapter.down.bias.numel() for e in handle.entries} == {8}
    with pytest.raises(ConfigError, match="width=6.*multiple of n=4"):
        lp.Compacter(width=6)
    with pytest.raises(ConfigError, match="n=3 does not divide the width 16"):
        lp.inject(BACKBONES["bert"].fresh(), lp.Compacter(n=3, width=6))
    assert lp.handles(BACKBONES["bert"].fresh()) == {}


def test_norms_train_where_asked() -> None:
    model = BACKBONES["bert"].fresh()
    handle = lp.inject(model, lp.CompacterPlusPlus(width=4, n=2, train_norms=True))
    assert {s.key for s in handle.slots if s.claimed} == {n for n, _ in model.named_parameters() if "LayerNorm" in n}
