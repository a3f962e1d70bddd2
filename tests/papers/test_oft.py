"""OFT, arXiv 2306.07280: block-diagonal rotations of a layer's input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_peft as lp
from lightning_peft.errors import ConfigError
from lightning_peft.nn.orthogonal import BlockRotationAdapter
from tests.backbones import BACKBONES, run
from tests.papers.toys import D, X, check_dense, context, install, mlp, randomize, shapes

MODES: dict[str, dict[str, Any]] = {
    "exact": {},
    "neumann": {"neumann_terms": 5},
    "shared": {"share_blocks": True},
    "bounded": {"epsilon": 0.5},
}
EVERY = pytest.mark.parametrize("options", MODES.values(), ids=MODES)


def strategy(**options: Any) -> lp.OFT:
    return lp.OFT(block_size=8, targets="all-linear", **options)


def skew(entries: Tensor, size: int) -> Tensor:
    Q = torch.zeros(size, size, dtype=entries.dtype)
    values = iter(entries)
    for i in range(size):
        for j in range(i + 1, size):
            value = next(values)
            Q = Q + torch.zeros(size, size, dtype=D).index_put(
                (torch.tensor([i, j]), torch.tensor([j, i])), torch.stack([value, -value])
            )
    return Q


def rotation(entries: Tensor, options: dict[str, Any], blocks: int, size: int = 8) -> Tensor:
    """R as a whole matrix, from the formulas of the specification."""
    identity, found = torch.eye(size, dtype=D), []
    for row in entries:
        Q = skew(row, size)
        if bound := options.get("epsilon"):
            bound = bound / len(entries) ** 0.5
            Q = Q if Q.norm() <= bound else Q * bound / Q.norm()
        if options.get("neumann_terms"):
            found.append(identity - 2 * Q + 2 * Q @ Q - 2 * Q @ Q @ Q + Q @ Q @ Q @ Q)
        else:
            found.append((identity - Q) @ torch.linalg.inv(identity + Q))
    return torch.block_diag(*(found * blocks)[:blocks])


@EVERY
def test_names_count_and_identity(options: dict[str, Any]) -> None:
    model = mlp()
    plain = model(X)
    handle = install(model, strategy(**options))
    blocks = (1, 1) if options.get("share_blocks") else (6, 4)
    assert shapes(handle) == {"l1.oft_R": (blocks[0], 28), "l2.oft_R": (blocks[1], 28)}
    assert handle.num_trainable() == (56 if options.get("share_blocks") else 280)
    assert torch.equal(model(X), plain)


@EVERY
def test_forward_gradients_and_merge_are_those_of_the_dense_model(options: dict[str, Any]) -> None:
    model = mlp()
    handle = install(model, strategy(**options))
    randomize(handle, 0.1)
    check_dense(model, handle, lambda a, W: W @ rotation(a.oft_R, options, a.blocks).T)


def test_cayley_golden_vectors_turn_the_same_way() -> None:
    exact, series = (
        BlockRotationAdapter(context(3, 2), block_size=2, share_blocks=False, neumann_terms=n, epsilon=None) for n in (0, 5)
    )
    for adapter in (exact, series):
        adapter.oft_R.data.fill_(0.1)
    torch.testing.assert_close(
        exact.rotation()[0], torch.tensor([[0.980198, -0.198020], [0.198020, 0.980198]], dtype=D), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        series.rotation()[0], torch.tensor([[0.9801, -0.1980], [0.1980, 0.9801]], dtype=D), rtol=0, atol=1e-8
    )


def test_the_exact_rotation_is_orthogonal_and_keeps_the_angles_between_rows() -> None:
    model = mlp()
    handle = install(model, strategy())
    randomize(handle)
    gram = model.l2.weight @ model.l2.weight.T
    for entry in handle.entries:
        R = entry.adapter.rotation()
        torch.testing.assert_close(R @ R.mT, torch.eye(8, dtype=D).expand_as(R))
    handle.merge()
    torch.testing.assert_close(model.l2.weight @ model.l2.weight.T, gram)


def test_the_series_comes_near_the_inverse() -> None:
    errors = []
    for terms in (3, 5, 9):
        handle, exact = (install(mlp(), strategy(neumann_terms=n)) for n in (terms, 0))
        randomize(handle, 0.03)
        exact.load_state_dict(handle.state_dict())
        pairs = zip(handle.entries, exact.entries, strict=True)
        errors.append(max(float((a.adapter.rotation() - b.adapter.rotation()).abs().max().detach()) for a, b in pairs))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]


def test_the_bound_holds_for_each_block() -> None:
    handle = install(mlp(), strategy(epsilon=1e-3))
    for entry in handle.entries:
        assert entry.adapter.skew().abs().max() == 0
    randomize(handle)
    for entry in handle.entries:
        norms = torch.linalg.matrix_norm(entry.adapter.skew())
        torch.testing.assert_close(norms, torch.full_like(norms, 1e-3 / entry.adapter.blocks**0.5))


@pytest.mark.parametrize("neumann", [False, True])
@pytest.mark.parametrize("share", [False, True])
def test_parity_with_hf_peft(neumann: bool, share: bool) -> None:
    import peft

    model = mlp()
    config = peft.OFTConfig(
        r=0,
        oft_block_size=8,
        target_modules=["l1", "l2"],
        use_cayley_neumann=neumann,
        num_cayley_neumann_terms=5,
        block_share=share,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config).to(D)
    handle = install(model, strategy(neumann_terms=5 if neumann else 0, share_blocks=share))
    randomize(handle, 0.1)
    with torch.no_grad():
        for entry in handle.entries:
            weight = theirs.base_model.model.get_submodule(entry.path).oft_R["default"].weight
            weight.copy_(-entry.adapter.oft_R if neumann else entry.adapter.oft_R)  # HF's series turns the other way
    torch.testing.assert_close(model(X), theirs(X), rtol=1e-6, atol=1e-6)


def test_every_expert_of_a_stack_has_its_own_rotation() -> None:
    adapter = BlockRotationAdapter(context(6, 8, batch=(3,)), block_size=4, share_blocks=False, neumann_terms=0, epsilon=None)
    torch.nn.init.normal_(adapter.oft_R)
    weight = torch.randn(3, 6, 8, dtype=D)
    merged, _ = adapter.merged(weight, None)
    expected = [w @ rotation(entries, {}, 2, 4).T for w, entries in zip(weight, adapter.oft_R, strict=True)]
    torch.testing.assert_close(merged, torch.stack(expected))
    torch.testing.assert_close(adapter.unmerged(merged, None)[0], weight)


def test_slices_of_a_fused_layer_turn_by_themselves() -> None:
    backbone = BACKBONES["gpt2"]
    model = backbone.fresh(D)
    handle = install(model, lp.OFT(block_size=4))
    assert {(e.path.rpartition(".")[2], e.member) for e in handle.entries} == {("c_attn", "query"), ("c_attn", "value")}
    randomize(handle, 0.2)
    expected = run(model, backbone.batch(D))
    handle.merge()
    torch.testing.assert_close(run(model, backbone.batch(D)), expected)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"block_size": 1}, "block_size"), ({"neumann_terms": 1}, "neumann_terms"), ({"epsilon": 0.0}, "epsilon")],
)
def test_wrong_options_name_themselves(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        lp.OFT(**options)


def test_block_size_per_target() -> None:
    handle = install(mlp(), strategy(block_size_per_target={"l2": 16}))
    assert [e.adapter.block_size for e in handle.entries] == [8, 16]
    randomize(handle, 0.1)


def test_a_block_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="block_size=7.*l1.*48.*2, 3, 4, 6, 8"):
        install(mlp(), lp.OFT(block_size=7, targets="all-linear"))
