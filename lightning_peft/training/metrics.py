"""Metrics that are exact over batches of different length and over ranks: sums and counts are added, never averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection


class Loss(Metric):
    """Sum of the terms of a loss, each averaged over all that it counts, such as labelled positions.

    Args:
        terms: Number of terms.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, terms: int = 1) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(terms, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(terms, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, total: Sequence[Tensor], count: Sequence[int]) -> None:
        """Add a batch: for each term its sum, and what it is to be averaged over."""
        # Lightning's bf16-true converts the states of metrics too, and a sum in bf16 stands still after 256 batches.
        self.total = self.total.double() + torch.stack([term.detach().double() for term in total])
        self.count += torch.tensor(count, device=self.count.device)

    def compute(self) -> Tensor:
        """Return the loss in nats; NaN if nothing had a label. A further term that counts nothing is 0."""
        return (self.total[0] / self.count[0] + (self.total / self.count.clamp(min=1))[1:].sum()).float()


class Perplexity(Loss):
    """exp of the mean cross-entropy over all tokens, not a mean of the batches' perplexities."""

    def compute(self) -> Tensor:
        """Return the perplexity, at least 1."""
        return (self.total / self.count).sum().exp().float()


class Accuracy(Metric):
    """Share of predictions that are right."""

    higher_is_better = True
    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add class indices (n,) and (n,); a prediction of -1 is none of the classes."""
        self.right += (preds == target).sum()
        self.count += target.numel()

    def compute(self) -> Tensor:
        """Return a value between 0 and 1."""
        return self.right / self.count


class F1(Metric):
    """F1 of the second of two classes; the unweighted mean over classes (macro) of more.

    As in scikit-learn, classes that occur neither among targets nor predictions are left out of the mean.

    Args:
        classes: Number of classes.
    """

    higher_is_better = True
    full_state_update = False
    hit: Tensor
    predicted: Tensor
    actual: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        for name in ("hit", "predicted", "actual"):
            self.add_state(name, torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add class indices (n,) and (n,); a prediction of -1 is none of the classes."""
        numbers = torch.arange(self.classes, device=target.device)
        guessed, true = preds[:, None] == numbers, target[:, None] == numbers
        self.hit += (guessed & true).sum(0)
        self.predicted += guessed.sum(0)
        self.actual += true.sum(0)

    def compute(self) -> Tensor:
        """Return a value between 0 and 1."""
        size = self.predicted + self.actual
        score = 2 * self.hit / size.clamp(min=1)
        if self.classes == 2:
            return score[1]
        return score[size > 0].mean()


def collection(**metrics: Metric) -> MetricCollection:
    """Return the metrics under their names; each takes from an update what it needs."""
    members: dict[str, Any] = dict(metrics)
    return MetricCollection(members, compute_groups=False)
