"""MoRA, arXiv 2405.12130: types 1, 2, 3, 4 and 6 of the authors' code, with the options of LoRA."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_peft as lp
from lightning_peft.errors import ConfigError, UnsupportedLayerError
from lightning_peft.nn.square_matrix import SquareMatrixAdapter, compress, expand, side_of
from tests.papers.toys import D, X, check_dense, context, install, mlp, randomize, shapes

TYPES = pytest.mark.parametrize("kind", [1, 2, 3, 4, 6])


def reference(M: Tensor, out: int, columns: int, kind: int) -> Tensor:
    """ΔW entry by entry, from the index rules of the specification instead of reshapes."""
    side = M.shape[0]
    if kind == 6:
        return rotated(M, out, columns)
    read, write = torch.zeros(side, columns, dtype=D), torch.zeros(out, side, dtype=D)
    if kind in (1, 4):
        for i in range(math.ceil(columns / side) * side):
            read[i % side, i % columns] += 1
    else:
        for group, members in enumerate(groups(columns, side)):
            read[group, members] = 1
    if kind in (1, 3):
        for o in range(out):
            write[o, o % side] = 1
    else:
        for group, members in enumerate(groups(out, side)):
            write[members, group] = 1
    return write @ M @ read


def groups(n: int, count: int) -> list[list[int]]:
    sizes = [n // count + (i < n % count) for i in range(count)]
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [list(range(a, b)) for a, b in itertools.pairwise(ends)]


def rotated(M: Tensor, out: int, columns: int) -> Tensor:
    side, half = M.shape[0], M.shape[0] // 2
    blocks = math.ceil(columns / side)
    rows = []
    frequencies = torch.tensor([10000 ** (-2 * k / side) for k in range(half)] * 2, dtype=D)
    for i in range(blocks):
        cos, sin = (i * frequencies).cos(), (i * frequencies).sin()
        block = M * cos + torch.cat([M[:, half:], -M[:, :half]], 1) * sin
        row = torch.zeros(side, columns, dtype=D)
        for j in range(side):
            row[:, (i * side + j) % columns] += block[:, j]
        rows.append(row)
    whole = torch.cat(rows)
    return torch.cat([whole] * math.ceil(out / len(whole)))[:out]


@pytest.mark.parametrize(
    ("rank", "out", "columns", "side"),
    [(8, 4096, 4096, 256), (8, 11008, 4096, 348), (8, 768, 768, 111), (4, 32, 48, 18), (4, 64, 32, 20)],
)
def test_side_of_the_square(rank: int, out: int, columns: int, side: int) -> None:
    assert side_of(rank, out, columns, (1,)) == side
    assert side_of(rank, out, columns, (6,)) == side - side % 2


GOLDEN = {
    1: [[3, 2, 1, 2, 1], [7, 4, 3, 4, 3]] * 3 + [[3, 2, 1, 2, 1]],
    2: [[1, 1, 1, 2, 2]] * 4 + [[3, 3, 3, 4, 4]] * 3,
    3: [[1, 1, 1, 2, 2], [3, 3, 3, 4, 4]] * 3 + [[1, 1, 1, 2, 2]],
    4: [[3, 2, 1, 2, 1]] * 4 + [[7, 4, 3, 4, 3]] * 3,
    6: [
        [1, 2, 0, 0, 0],
        [3, 4, 0, 0, 0],
        [0, 0, 2.223244, 0.239134, 0],
        [0, 0, 4.986791, -0.363204, 0],
        [-1.741591, 0, 0, 0, 1.402448],
        [-4.392480, 0, 0, 0, 2.388749],
        [1, 2, 0, 0, 0],
    ],
}


@TYPES
def test_golden_vectors(kind: Any) -> None:
    M = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
    found = expand(compress(torch.eye(5, dtype=D), 2, kind) @ M.T, 7, kind).T
    torch.testing.assert_close(found, torch.tensor(GOLDEN[kind], dtype=D), rtol=0, atol=1e-6)
    torch.testing.assert_close(reference(M, 7, 5, kind), torch.tensor(GOLDEN[kind], dtype=D), rtol=0, atol=1e-6)


@TYPES
def test_forward_gradients_and_merge_are_those_of_the_dense_model(kind: Any) -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, lp.MoRA(rank=4, mora_type=kind, targets="all-linear"))
    assert torch.equal(model(X), plain)
    assert shapes(handle) == {"l1.mora_M": (18, 18), "l2.mora_M": (20, 20)}
    assert handle.num_trainable() == 18**2 + 20**2
    randomize(handle)
    check_dense(model, handle, lambda a, W: W + reference(a.mora_M, *W.shape, kind))


@TYPES
def test_rank_is_far_above_that_of_lora_for_as_many_parameters(kind: Any) -> None:
    handle = install(mlp(), lp.MoRA(rank=4, mora_type=kind, targets="all-linear"))
    lora = install(mlp(), lp.LoRA(rank=4, targets="all-linear"))
    assert abs(handle.num_trainable() / lora.num_trainable() - 1) < 0.05
    randomize(handle)
    randomize(lora)
    found = [int(torch.linalg.matrix_rank(e.adapter.delta())) for e in handle.entries]
    assert found == ([32, 32] if kind == 6 else [18, 20])
    assert [int(torch.linalg.matrix_rank(e.adapter.delta())) for e in lora.entries] == [4, 4]


@TYPES
@pytest.mark.parametrize(("out", "columns", "side"), [(3, 12, 4), (12, 6, 8), (9, 7, 2), (8, 8, 4), (5, 11, 5)])
def test_sizes_that_divide_and_that_do_not(kind: Any, out: int, columns: int, side: int) -> None:
    if kind == 6 and side % 2:
        side -= 1
    M = torch.randn(side, side, dtype=D)
    adapter = SquareMatrixAdapter(context(out, columns), side=side, mora_type=kind, dropout=0.0)
    adapter.mora_M.data.copy_(M)
    torch.testing.assert_close(adapter.delta(), reference(M, out, columns, kind))


@TYPES
def test_every_expert_of_a_stack_has_its_own_matrix(kind: Any) -> None:
    adapter = SquareMatrixAdapter(context(10, 7, batch=(3,)), side=4, mora_type=kind, dropout=0.0)
    assert adapter.mora_M.shape == (3, 4, 4)
    torch.nn.init.normal_(adapter.mora_M)
    expected = torch.stack([reference(M, 10, 7, kind) for M in adapter.mora_M])
    torch.testing.assert_close(adapter.delta(), expected)


@TYPES
def test_a_grouped_convolution_equals_its_dense_form(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)).to(D)
    plain = copy.deepcopy(model)
    handle = install(model, lp.MoRA(rank=2, mora_type=kind, targets="0"))
    randomize(handle)
    with torch.no_grad():
        plain[0].weight += reference(handle.entries[0].adapter.mora_M, 6, 18, kind).reshape(6, 2, 3, 3)
        x = torch.randn(2, 4, 8, 8, dtype=D)
        torch.testing.assert_close(model(x), plain(x))


def test_the_name_is_all_that_changes_in_a_configuration() -> None:
    lora = lp.LoRA(rank=4, alpha=8.0, dropout=0.1, rank_stabilized=True, bias="adapted", targets="l1", rank_per_target={"l1": 2})
    mora = lp.resolve({**lora.to_dict(defaults=True), "class_path": "mora"})
    assert isinstance(mora, lp.MoRA)
    model = mlp()
    handle = install(model, mora)
    assert handle.entries[0].adapter.mora_M.shape == (12, 12)  # of rank 2: sqrt(80 * 2) = 12.6
    assert [s.key for s in handle.slots if s.claimed] == ["l1.bias"]
    handle.remove()
    other = install(model, lp.MoRA(rank=2, alpha=99.0, targets="l1"))
    randomize(other)
    adapter = other.entries[0].adapter
    torch.testing.assert_close(adapter.delta(), reference(adapter.mora_M, 32, 48, 6))  # no scaling


def test_dropout_drops_inputs_of_the_branch_in_training_only() -> None:
    model = mlp()
    handle = install(model, lp.MoRA(rank=4, dropout=0.5, targets="l1"))
    randomize(handle)
    expected = model.eval()(X)
    assert torch.equal(model(X), expected)
    model.train()
    mean = torch.stack([model.l1(X) for _ in range(1000)]).mean(0)
    assert not torch.equal(model(X), expected)
    model.eval()
    assert (mean - model.l1(X)).abs().mean() < 0.3


@pytest.mark.parametrize("init", ["gaussian", "pissa", "olora", "loftq"])
def test_initialisations_of_two_factors_are_refused(init: Any) -> None:
    with pytest.raises(ConfigError, match="init"):
        lp.MoRA(init=init)


def test_a_rank_that_no_square_fits_is_refused_before_any_change() -> None:
    model = mlp()
    keys = list(model.state_dict())
    with pytest.raises(ConfigError, match="rank=300.*l1.*rank_per_target"):
        install(model, lp.MoRA(rank=300, targets="all-linear"))
    with pytest.raises(ConfigError, match="side 0"):
        install(nn.Sequential(nn.Linear(1, 1)), lp.MoRA(rank=1, targets="0"))
    assert list(model.state_dict()) == keys


def test_an_embedding_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError):
        install(nn.Sequential(nn.Embedding(10, 8)), lp.MoRA(rank=2, targets="0"))
