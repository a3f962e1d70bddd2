"""Tasks: what is predicted from a batch, at which positions there is a loss, and which metrics tell how good it is.

A batch is a mapping with the names of Hugging Face models (``input_ids``, ``attention_mask``, ``labels``, ``pixel_values``); a
label of -100 means no loss. Images may also come as a pair (images, labels).
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_peft.errors import ConfigError, DataError, UnsupportedLayerError, did_you_mean
from lightning_peft.nn.answer_choices import choice_counts, choice_losses, choice_scores
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.encoded_once import encoded_once
from lightning_peft.training.metrics import F1, Accuracy, Loss, Perplexity, collection

if TYPE_CHECKING:
    from lightning_peft.training.scoring import Scores

NOT_INPUTS = frozenset(
    {
        "labels",
        "choices",
        "choice_labels",
        "choice_counts",
        "example_ids",
        "prompt_input_ids",
        "prompt_attention_mask",
        "answers",
        "answer_labels",
        "answer_input_ids",
        "answer_attention_mask",
    }
)
"""Keys of a batch that the model is not called with; the tensors under all others are its arguments."""


class Task(ABC):
    """One kind of prediction. Stateless."""

    name: ClassVar[str]
    needs_labels: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    reads_text: ClassVar[bool] = True
    labels: ClassVar[str] = "labels"  # key of a batch

    def batch(self, batch: Any) -> Mapping[str, Any]:
        """Return the batch as a mapping.

        Raises:
            DataError: It is none.
        """
        if isinstance(batch, Mapping):
            return batch
        raise DataError(
            f"task {self.name} needs batches that are mappings such as {{input_ids, labels}}, got {type(batch).__name__}."
        )

    def targets(self, batch: Any) -> Tensor:
        """Return the class index of every position, aligned with the logits; -100 where there is no loss."""
        labels = self.batch(batch).get(self.labels)
        if not isinstance(labels, Tensor):
            raise DataError(f"task {self.name}: the batch has no '{self.labels}'; keys: {', '.join(self.batch(batch))}.")
        return labels

    def labelled(self, batch: Any) -> int:
        """Return the number of positions with loss."""
        return int((self.targets(batch) != IGNORE).sum())

    def counts(self, batch: Any) -> tuple[int, ...]:
        """Return for each term of the loss what it is averaged over."""
        return (self.labelled(batch),)

    def losses(self, scores: Scores, batch: Any, label_smoothing: float = 0.0) -> tuple[Tensor, ...]:
        """Return the terms of the loss, each as the sum over a batch; scalars."""
        return (scores.loss(label_smoothing),)

    def evaluate(self, scores: Scores, batch: Any) -> dict[str, Any]:
        """Return what the metrics are updated with: ``total`` and ``count`` of each term; ``preds`` and ``target`` (n,)."""
        total, preds = scores.evaluate()
        return {"total": (total,), "count": (len(preds),), "preds": preds, "target": scores.targets}

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        """Return the arguments of the model."""
        return {k: v for k, v in self.batch(batch).items() if k not in NOT_INPUTS and isinstance(v, Tensor)}

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the logits of all positions, (..., classes)."""
        return logits_of(model(**self.inputs(batch)))

    def head(self, model: nn.Module) -> nn.Module | None:
        """Return the module that makes logits of each position's hidden state by itself, or None if there is none."""
        return None

    @abstractmethod
    def metrics(self, classes: int) -> MetricCollection:
        """Return fresh metrics, updated with ``total``, ``count``, ``preds`` and ``target``."""


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: an HF output, a tensor, or a tuple with the logits first."""
    logits = getattr(output, "logits", output)
    logits = logits[0] if isinstance(logits, tuple) else logits
    if not isinstance(logits, Tensor):
        raise UnsupportedLayerError(
            f"the base model returned {type(output).__name__}, which holds no logits. Use a model with a head."
        )
    return logits


class LanguageTask(Task):
    """The classes are the tokens of a vocabulary; the head runs only where there is a label."""

    def head(self, model: nn.Module) -> nn.Module | None:
        getter = getattr(model, "get_output_embeddings", None)
        found: nn.Module | None = None if getter is None else getter()
        return found

    def metrics(self, classes: int) -> MetricCollection:
        return collection(loss=Loss(), perplexity=Perplexity())


class CausalLM(LanguageTask):
    """Predict the next token."""

    name = "causal_lm"
    generates = True
    with_encoder: ClassVar[str] = "seq2seq_lm"

    def targets(self, batch: Any) -> Tensor:
        # The logits at position t predict the token at t + 1.
        return F.pad(super().targets(batch)[:, 1:], (0, 1), value=IGNORE)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ConfigError(
                f"task {self.name} is for decoders, and {type(model).__name__} has an encoder: use {self.with_encoder}."
            )
        inputs = self.inputs(batch)
        # Without a cache: it would hold every key and value of the batch for nothing.
        return logits_of(model(**inputs, use_cache=False) if hasattr(model, "config") else model(**inputs))


class MaskedLM(LanguageTask):
    """Predict tokens that were masked."""

    name = "masked_lm"

    def metrics(self, classes: int) -> MetricCollection:
        return collection(loss=Loss(), perplexity=Perplexity(), accuracy=Accuracy())


class Seq2SeqLM(LanguageTask):
    """Predict a target text from a source text."""

    name = "seq2seq_lm"
    generates = True

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ConfigError(
                f"task {self.name}: {type(model).__name__} cannot make decoder inputs from labels; use an HF seq2seq model."
            )
        decoder: Tensor = shift(labels=self.targets(batch))
        return logits_of(model(**self.inputs(batch), decoder_input_ids=decoder, use_cache=False))


@dataclass(frozen=True)
class ChoiceTask(LanguageTask):
    """Tell the right one of several answer choices by their likelihood, trained with the losses of T-Few (``nn/answer_choices.py``).

    A batch of b examples with m choices in all holds ``choice_counts`` (b,); ``choice_labels`` (m, length), the tokens of the choices
    in order, -100 elsewhere; and ``answer_labels`` (b,), the index of the right choice or -100. To predict, ``choices`` may hold the
    texts. Only the tokens of choices get logits.

    Args:
        mc_loss: Weight of the length-normalised loss.
        unlikely_loss: Weight of the unlikelihood loss.
        length_norm: A choice is scored by its log-likelihood, divided by its length to this power.

    Raises:
        ConfigError: A value is negative or no number.
    """

    labels = "choice_labels"
    generates = False
    mc_loss: float = 1.0
    unlikely_loss: float = 1.0
    length_norm: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ConfigError(f"choice_losses: {field.name}={value!r} is no number of at least 0.")

    def counts(self, batch: Any) -> tuple[int, ...]:
        return choice_counts(self._mask(batch), self._answer(batch))

    def losses(self, scores: Scores, batch: Any, label_smoothing: float = 0.0) -> tuple[Tensor, ...]:
        return self._terms(*self._by_choice(scores, batch), self._answer(batch))

    def evaluate(self, scores: Scores, batch: Any) -> dict[str, Any]:
        logp, mask = self._by_choice(scores, batch)
        answer = self._answer(batch)
        best, known = choice_scores(logp, mask, length_norm=self.length_norm).argmin(-1), answer != IGNORE
        total, count = self._terms(logp, mask, answer), choice_counts(mask, answer)
        return {"total": total, "count": count, "preds": best[known], "target": answer[known]}

    def choose(self, scores: Scores, batch: Any) -> list[dict[str, Any]]:
        """Return for each example the text of the likeliest choice, if the batch has it, its index, and its softmax share."""
        logp, mask = self._by_choice(scores, batch)
        beta = choice_scores(logp, mask, length_norm=self.length_norm)
        best, shares = beta.argmin(-1).tolist(), torch.softmax(-beta, -1).amax(-1).tolist()
        found = [{"index": index, "score": share} for index, share in zip(best, shares, strict=True)]
        texts = self.batch(batch).get("choices")
        return found if texts is None else [{"choice": t[row["index"]], **row} for t, row in zip(texts, found, strict=True)]

    def metrics(self, classes: int) -> MetricCollection:
        known = {"f1": F1(classes)} if classes else {}
        return collection(loss=Loss(terms=3), accuracy=Accuracy(), **known)

    def _terms(self, logp: Tensor, mask: Tensor, answer: Tensor) -> tuple[Tensor, ...]:
        found = choice_losses(logp, mask, answer, length_norm=self.length_norm)
        return found.lm, self.mc_loss * found.length_normalized, self.unlikely_loss * found.unlikelihood

    def _answer(self, batch: Any) -> Tensor:
        counts = self._counts(batch)
        answer = self.batch(batch).get("answer_labels")
        return torch.full_like(counts, IGNORE) if answer is None else answer

    def _counts(self, batch: Any) -> Tensor:
        counts = self.batch(batch).get("choice_counts")
        rows = len(self.targets(batch))
        if not isinstance(counts, Tensor) or int(counts.sum()) != rows:
            raise DataError(f"task {self.name}: 'choice_counts' must tell how many of the {rows} choices belong to each example.")
        return counts

    def _mask(self, batch: Any) -> Tensor:
        """Return which tokens there are, (b, c, t): c the most choices of an example, t the longest of them."""
        counts, lengths = self._counts(batch), (self.targets(batch) != IGNORE).sum(1)  # (b,), (m,)
        there = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]
        by_example = torch.zeros_like(there, dtype=lengths.dtype).masked_scatter(there, lengths)  # (b, c)
        return torch.arange(int(lengths.max()), device=counts.device) < by_example[..., None]

    def _by_choice(self, scores: Scores, batch: Any) -> tuple[Tensor, Tensor]:
        """Return log-likelihoods and mask of the choices' tokens, (b, c, t)."""
        logp, mask = scores.log_likelihoods(), self._mask(batch)
        return torch.zeros_like(mask, dtype=logp.dtype).masked_scatter(mask, logp), mask


class MultipleChoice(ChoiceTask, CausalLM):
    """Answer choices after a prompt, which is repeated for each of them: ``input_ids`` and ``attention_mask`` (m, length)."""

    name = "multiple_choice"
    with_encoder = "seq2seq_multiple_choice"


class Seq2SeqMultipleChoice(ChoiceTask, Seq2SeqLM):
    """Answer choices of a decoder; the encoder reads each example once: ``input_ids`` and ``attention_mask`` (b, length)."""

    name = "seq2seq_multiple_choice"

    def inputs(self, batch: Any) -> dict[str, Tensor]:
        example = self._example(batch)
        return {name: tensor[example] for name, tensor in super().inputs(batch).items()}

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        with encoded_once(model, self._example(batch)):
            return super().logits(model, batch)

    def _example(self, batch: Any) -> Tensor:
        """Return the example that each choice belongs to, (m,)."""
        counts = self._counts(batch)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


class ClassificationTask(Task):
    """The classes are labels that the user names."""

    needs_labels = True

    def metrics(self, classes: int) -> MetricCollection:
        return collection(loss=Loss(), accuracy=Accuracy(), f1=F1(classes))


class SequenceClassification(ClassificationTask):
    """One label per text."""

    name = "sequence_classification"


class TokenClassification(ClassificationTask):
    """One label per token."""

    name = "token_classification"


class ImageClassification(ClassificationTask):
    """One label per image."""

    name = "image_classification"
    reads_text = False

    def batch(self, batch: Any) -> Mapping[str, Any]:
        if isinstance(batch, Sequence) and len(batch) == 2:
            return {"pixel_values": batch[0], "labels": batch[1]}
        return super().batch(batch)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
        inputs = self.inputs(batch)
        if "pixel_values" in inspect.signature(model.forward).parameters:
            return logits_of(model(**inputs))
        return logits_of(model(inputs["pixel_values"]))  # a plain torch model names its argument as it likes


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CausalLM(),
        MaskedLM(),
        Seq2SeqLM(),
        MultipleChoice(),
        Seq2SeqMultipleChoice(),
        SequenceClassification(),
        TokenClassification(),
        ImageClassification(),
    )
}


def configured(name: str, choice_losses: Mapping[str, float] | None) -> Task:
    """Return a task, with options of its loss.

    Raises:
        ConfigError: Another task than multiple choice is given options, or one is unknown or out of range.
    """
    task = TASKS[name]
    if choice_losses is None:
        return task
    if not isinstance(task, ChoiceTask):
        raise ConfigError(f"choice_losses are for the multiple-choice tasks, not for {name}.")
    known = [field.name for field in fields(task)]
    for option in choice_losses:
        if option not in known:
            raise ConfigError(f"choice_losses: {option!r} is unknown; there are {', '.join(known)}.{did_you_mean(option, known)}")
    return replace(task, **choice_losses)


def compute_wide(head: nn.Module) -> None:
    """Let a new task head train and compute in fp32 on a base of 16 bit, where small steps would be rounded away."""
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in head.parameters()):
        head.float()
        head.register_forward_pre_hook(_in_own_dtype)


def _in_own_dtype(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = next(module.parameters()).dtype
    return tuple(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def classify(logits: Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return ``{"label", "score"}`` for each row of logits (n, classes): the likeliest label and its probability."""
    scores, best = torch.softmax(logits.float(), -1).max(-1)
    return [{"label": labels[i], "score": score} for i, score in zip(best.tolist(), scores.tolist(), strict=True)]
