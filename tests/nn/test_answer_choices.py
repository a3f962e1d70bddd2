"""The losses of T-Few, arXiv 2205.05638: golden vectors, and the sums written out choice by choice."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_peft.nn.answer_choices import choice_counts, choice_losses, choice_scores
from lightning_peft.nn.chunked_loss import IGNORE, chunked_log_likelihoods

D = torch.float64
GOLDEN = [[[-1.0, -0.5], [-0.2, -0.7, -0.3], [-2.0]]]
"""Log-likelihoods of the tokens of three choices, the second of which is right."""


def dense(rows: list[list[list[float]]], *, padding: float = -9.0, more: tuple[int, int] = (0, 0)) -> tuple[Tensor, Tensor]:
    """Examples of choices of tokens, as (b, c, t) with a mask; ``more`` choices and tokens of padding."""
    wide = max(len(example) for example in rows) + more[0]
    long = max(len(choice) for example in rows for choice in example) + more[1]
    logp = torch.full((len(rows), wide, long), padding, dtype=D)
    mask = torch.zeros(logp.shape, dtype=torch.bool)
    for b, example in enumerate(rows):
        for c, choice in enumerate(example):
            logp[b, c, : len(choice)] = torch.tensor(choice, dtype=D)
            mask[b, c, : len(choice)] = True
    return logp, mask


def means(logp: Tensor, mask: Tensor, answer: Tensor, **options: float) -> list[float]:
    found, counts = choice_losses(logp, mask, answer, **options), choice_counts(mask, answer)
    return [float(loss) / max(count, 1) for loss, count in zip(found, counts, strict=True)]


def test_golden_vector() -> None:
    logp, mask = dense(GOLDEN)
    assert choice_scores(logp, mask).tolist() == [pytest.approx([0.75, 0.4, 2.0])]
    assert choice_counts(mask, torch.tensor([1])) == (3, 1, 3)
    lm, normalized, unlikely = means(logp, mask, torch.tensor([1]))
    assert lm == pytest.approx(0.4)
    assert normalized == pytest.approx(0.645313, abs=1e-6)
    assert unlikely == pytest.approx(0.494850, abs=1e-6)


def test_the_authors_mask_differs_by_constants() -> None:
    """Their code gives masked positions ℓ = -100, each of which adds -log(1.01), and divides by the same number."""
    unlikely = means(*dense(GOLDEN), torch.tensor([1]))[2]
    masked = 9 - 3
    assert unlikely - masked * math.log(1.01) / 3 == pytest.approx(0.474949, abs=1e-6)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_examples_with_different_numbers_of_choices(power: float) -> None:
    """One batch has the sums of its examples, each computed with loops."""
    rows = [*GOLDEN, [[-0.4], [-0.1, -2.5]], [[-0.3, -0.6]], [[-1.0], [-1.5], [-0.1], [-3.0, -0.2]]]
    answer = torch.tensor([1, 0, 0, 3])
    logp, mask = dense(rows)
    lm = normalized = unlikely = 0.0
    for example, right in zip(rows, answer.tolist(), strict=True):
        beta = [-sum(choice) / len(choice) ** power for choice in example]
        lm -= sum(example[right])
        normalized += beta[right] + math.log(sum(math.exp(-b) for b in beta))
        for c, choice in enumerate(example):
            unlikely -= sum(math.log(1 - math.exp(x) + 0.01) for x in choice) if c != right else 0.0
    found = choice_losses(logp, mask, answer, length_norm=power)
    assert [float(x) for x in found] == pytest.approx([lm, normalized, unlikely], abs=1e-12)
    alone = [choice_losses(*dense([row]), answer[i : i + 1], length_norm=power) for i, row in enumerate(rows)]
    assert [float(sum(x)) for x in zip(*alone, strict=True)] == pytest.approx([lm, normalized, unlikely], abs=1e-12)


@pytest.mark.parametrize("padding", [0.0, -9.0, -torch.inf, torch.nan])
@pytest.mark.parametrize("more", [(0, 4), (2, 0), (3, 3)])
def test_padding_changes_nothing(padding: float, more: tuple[int, int]) -> None:
    plain, answer = dense(GOLDEN), torch.tensor([1])
    logp, mask = dense(GOLDEN, padding=padding, more=more)
    logp.requires_grad_()
    found = choice_losses(logp, mask, answer)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in choice_losses(*plain, answer)], abs=1e-14)
    sum(found).backward()
    assert torch.isfinite(logp.grad).all()
    assert (logp.grad[~mask] == 0).all()
    assert choice_scores(logp, mask)[0, :3].tolist() == pytest.approx(choice_scores(*plain)[0].tolist(), abs=1e-14)
    assert choice_scores(logp, mask).argmin(-1) == 1


def test_unlikelihood_does_not_touch_the_right_choice() -> None:
    """In terms of logits: their gradient is zero there, and elsewhere that of the formula."""
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 3, 7, dtype=D, requires_grad=True)
    targets, (_, mask) = torch.randint(0, 7, (1, 3, 3)), dense(GOLDEN)
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None]).squeeze(-1)
    (slope,) = torch.autograd.grad(choice_losses(logp, mask, torch.tensor([1])).unlikelihood, logits)
    assert (slope[0, 1] == 0).all()
    assert (slope[~mask] == 0).all()
    assert (slope[0, [0, 2]][mask[0, [0, 2]]].abs().amax(-1) > 0).all()


def test_one_choice_has_nothing_to_be_told_from() -> None:
    logp, mask = dense([[[-0.3, -0.6]]])
    found = choice_losses(logp, mask, torch.tensor([0]))
    assert found.length_normalized == 0
    assert found.unlikelihood == 0
    assert found.lm == pytest.approx(0.9)
    assert choice_counts(mask, torch.tensor([0])) == (2, 1, 0)


def test_an_example_without_answer_counts_nowhere() -> None:
    logp, mask = dense([*GOLDEN, [[-0.4], [-0.1, -2.5]]])
    known, answer = dense(GOLDEN), torch.tensor([1, IGNORE])
    expected = [float(x) for x in choice_losses(*known, answer[:1])]
    assert [float(x) for x in choice_losses(logp, mask, answer)] == pytest.approx(expected, abs=1e-14)
    assert choice_counts(mask, answer) == choice_counts(known[1], answer[:1])


def test_certain_tokens_have_finite_losses() -> None:
    logp = torch.zeros(1, 2, 1, dtype=torch.float32, requires_grad=True)
    found = choice_losses(logp, torch.ones(1, 2, 1, dtype=torch.bool), torch.tensor([0]))
    assert found.unlikelihood.item() == pytest.approx(-math.log(0.01))
    found.unlikelihood.backward()
    assert logp.grad.flatten().tolist() == pytest.approx([0.0, 100.0])


# ---- the log-likelihoods, chunk by chunk


def nonlinear(logp: Tensor) -> Tensor:
    return torch.log(1.01 - logp.exp()).sum() + torch.logsumexp(logp, 0) ** 2


@pytest.mark.parametrize("chunk", [1, 3, 7, 8])
@pytest.mark.parametrize("trains", [True, False])
def test_log_likelihoods_against_plain_autograd(chunk: int, trains: bool) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 5, dtype=D, requires_grad=True), torch.randint(0, 11, (7,))
    head = torch.nn.Linear(5, 11, dtype=D).requires_grad_(trains)
    wanted = [hidden, *(head.parameters() if trains else ())]
    plain = torch.log_softmax(head(hidden), -1)[range(7), targets]
    expected = torch.autograd.grad(nonlinear(plain), wanted)
    calls: list[int] = []
    found = chunked_log_likelihoods(hidden, targets, lambda x: calls.append(len(x)) or head(x), chunk=chunk)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-14)
    for a, b in zip(torch.autograd.grad(nonlinear(found), wanted), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert max(calls) <= chunk
    assert sum(calls) == (7 if chunk >= 7 else 14)  # one chunk is scored once
    with torch.no_grad():
        torch.testing.assert_close(chunked_log_likelihoods(hidden, targets, head, chunk=chunk), plain, rtol=0, atol=1e-14)


def test_log_likelihoods_repeat_the_dropout_of_the_head() -> None:
    hidden, targets = torch.randn(6, 5, dtype=D, requires_grad=True), torch.randint(0, 11, (6,))
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(5, 11, dtype=D))
    torch.manual_seed(1)
    plain = torch.cat([F.log_softmax(head(rows), -1) for rows in hidden.split(2)])[range(6), targets]
    (expected,) = torch.autograd.grad(nonlinear(plain), hidden)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(nonlinear(chunked_log_likelihoods(hidden, targets, head, chunk=2)), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
