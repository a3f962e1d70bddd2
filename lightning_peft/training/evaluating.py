"""Validation, testing and prediction of :class:`PEFTLightningModule`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_peft.training.generation import answer_scores, generate, matched
from lightning_peft.training.metrics import F1, Accuracy, collection
from lightning_peft.training.scoring import Scorer, Scores
from lightning_peft.training.tasks import ChoiceTask, Task, classify


class Evaluator(pl.LightningModule):
    """What the module does with a batch without training on it. The subclass sets the attributes."""

    base: Any  # nn.Module once it is there
    task: Task
    tokenizer: Any
    labels: list[str] | None
    answers: Literal["score", "generate"]
    generation: dict[str, Any]
    metrics: nn.ModuleDict
    _score: Scorer

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Score a batch."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole epoch."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole epoch."""
        self._log_metrics("test")

    def _evaluate(self, split: str, batch: Any) -> None:
        scores: Scores = self._score(self.base, batch)
        if len(scores.targets):
            self._metrics(split).update(**self.task.evaluate(scores, batch))
        rows = self.task.batch(batch) if self.task.generates else {}
        if "answer_labels" in rows:
            self._evaluate_answers(split, rows)
        elif "answers" in rows and self.answers == "generate":
            self._evaluate_texts(split, rows)

    def _evaluate_answers(self, split: str, batch: Mapping[str, Any]) -> None:
        """Compare the answer that the model prefers, or writes, with the right one."""
        target = batch["answer_labels"]
        if self.answers == "score":
            preds = answer_scores(self.base, batch).argmax(-1)
        else:
            ids, mask = batch["answer_input_ids"][0], batch["answer_attention_mask"][0]
            rows = [row[real.bool()] for row, real in zip(ids, mask, strict=True)]
            known = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
            longest = {"max_new_tokens": ids.shape[1]}
            preds = torch.tensor(matched(self._generate(batch, longest), known), device=target.device)
        real = target >= 0  # a row that only fills up a rank's last batch has no label
        classes = batch["answer_input_ids"].shape[1]
        metrics = self._metrics(f"{split}_answers", accuracy=Accuracy, f1=lambda: F1(classes))
        metrics.update(preds=preds[real], target=target[real])

    def _evaluate_texts(self, split: str, batch: Mapping[str, Any]) -> None:
        """Compare free texts with the expected ones, white space at the ends aside."""
        texts = self._generate(batch, {})
        right = [a.strip() == b.strip() for a, b in zip(texts, batch["answers"], strict=True)]
        keep = batch["example_ids"] >= 0
        preds = torch.tensor(right, device=keep.device).long()[keep]
        self._metrics(f"{split}_answers", exact_match=Accuracy).update(preds=preds, target=torch.ones_like(preds))

    def _generate(self, batch: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
        prompts = batch.get("prompt_input_ids", batch.get("input_ids"))
        mask = batch.get("prompt_attention_mask", batch.get("attention_mask"))
        if mask is None:
            mask = torch.ones_like(prompts)
        return generate(self.base, self.tokenizer, prompts, mask, {**defaults, **self.generation})

    def _metrics(self, name: str, **make: Any) -> MetricCollection:
        if name not in self.metrics:
            # `validate` runs in inference mode, `fit` validates without; sums must live in both
            with torch.inference_mode(False):
                self.metrics[name] = collection(**{key: new() for key, new in make.items()}).to(self.device)
        found = self.metrics[name]
        assert isinstance(found, MetricCollection)
        return found

    def _log_metrics(self, split: str) -> None:
        for name in (split, f"{split}_answers"):
            if name in self.metrics:
                metrics = self._metrics(name)
                seen = {f"{split}_{key}": metric.compute() for key, metric in metrics.items() if self._has_rows(metric)}
                with torch.inference_mode(False):
                    metrics.reset()
                # Exact over ranks already: the metrics added their sums and counts.
                self.log_dict(seen, prog_bar=True, rank_zero_only=False)

    def _has_rows(self, metric: Metric) -> bool:
        """Return whether any rank has updated a metric; then all have to compute it, which adds up their sums."""
        seen: bool = self.trainer.strategy.reduce_boolean_decision(metric.update_called, all=False)
        if seen and not metric.update_called:
            metric._update_count = 1  # torchmetrics would warn; the sums of this rank are zeros
        return seen

    def predict_step(self, batch: Any, batch_idx: int = 0) -> list[Any]:
        """Return one prediction per row.

        A generative task gives the text that follows the prompt; classification ``{"label", "score"}``, token classification a
        list of these for the row's real tokens; masked LM the likeliest token of every mask; multiple choice
        ``{"choice", "index", "score"}``.
        """
        if self.task.generates:
            return list(self._generate(self.task.batch(batch), {}))
        if isinstance(self.task, ChoiceTask):
            return list(self.task.choose(self._score(self.base, batch), batch))
        logits, inputs = self.task.logits(self.base, batch), self.task.inputs(batch)
        if self.task.name == "masked_lm":
            where = inputs["input_ids"] == self.tokenizer.mask_token_id
            best = logits.argmax(-1)
            return [[self.tokenizer.decode([i]).strip() for i in row[at].tolist()] for row, at in zip(best, where, strict=True)]
        assert self.labels is not None
        if logits.dim() == 2:
            return list(classify(logits, self.labels))
        mask = inputs.get("attention_mask", torch.ones(logits.shape[:2], device=logits.device)).bool()
        return [classify(row[real], self.labels) for row, real in zip(logits, mask, strict=True)]
