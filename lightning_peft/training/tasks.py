"""Tasks: what is predicted from a batch, at which positions there is a loss, and which metrics tell how good it is.

A batch is a mapping with the names of Hugging Face models (``input_ids``, ``attention_mask``, ``labels``, ``pixel_values``); a
label of -100 means no loss. Images may also come as a pair (images, labels).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MetricCollection

from lightning_peft.errors import ConfigError, DataError, UnsupportedLayerError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.metrics import F1, Accuracy, Loss, Perplexity, collection

NOT_INPUTS = frozenset(
    {
        "labels",
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
        labels = self.batch(batch).get("labels")
        if not isinstance(labels, Tensor):
            raise DataError(f"task {self.name}: the batch has no 'labels'; keys: {', '.join(self.batch(batch))}.")
        return labels

    def labelled(self, batch: Any) -> int:
        """Return the number of positions with loss."""
        return int((self.targets(batch) != IGNORE).sum())

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

    def targets(self, batch: Any) -> Tensor:
        # The logits at position t predict the token at t + 1.
        return F.pad(super().targets(batch)[:, 1:], (0, 1), value=IGNORE)

    def logits(self, model: nn.Module, batch: Any) -> Tensor:
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
                f"task seq2seq_lm: {type(model).__name__} cannot make decoder inputs from labels; use an HF seq2seq model."
            )
        decoder: Tensor = shift(labels=self.targets(batch))
        return logits_of(model(**self.inputs(batch), decoder_input_ids=decoder, use_cache=False))


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
    for task in (CausalLM(), MaskedLM(), Seq2SeqLM(), SequenceClassification(), TokenClassification(), ImageClassification())
}


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
