"""Examples to batches. Padding is masked by length, never by id, so a pad token that equals EOS hides no EOS.

All batches are dicts that a Hugging Face model takes as they are (``model(**batch)``), except for the extra keys of
evaluation and prediction, which are listed with :class:`GenerationCollator`, and of multiple choice (see ``choices``).
``(labels != -100).sum()`` is the number of tokens (or rows) with loss in every batch that has labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.errors import ConfigError
from lightning_peft.nn.chunked_loss import IGNORE
from lightning_peft.training.data.encoders import Example
from lightning_peft.training.data.tokenization import TextEncoder
from lightning_peft.types import stable_seed

Batch = dict[str, Tensor | list[str] | list[list[str]]]


@dataclass(frozen=True, slots=True)
class BatchKey:
    """Which rows make up a batch.

    Attributes:
        epoch: the epoch, for draws that differ between epochs.
        indices: positions in the data set.
        filler: the last row only fills up the shard of a rank; it gets no label and the example id -1.
    """

    epoch: int
    indices: tuple[int, ...]
    filler: bool = False


def pad(
    rows: Iterable[Sequence[int]], value: int, *, side: Literal["left", "right"] = "right", multiple_of: int = 1
) -> tuple[Tensor, Tensor]:
    """Return ``rows`` padded with ``value`` and the mask of the real entries, both (batch, length), int64."""
    rows = list(rows)
    length = -(-max(map(len, rows)) // multiple_of) * multiple_of
    ids = torch.full((len(rows), length), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask


class Collator(ABC):
    """Base of all collators: inputs padded on the right.

    Keys: ``input_ids``, ``attention_mask`` and, if the tokenizer has them, ``token_type_ids``, each (batch, length),
    int64; ``labels`` if the task and the stage have them.

    Args:
        text: gives the pad id.
        multiple_of: lengths are padded to a multiple of this.
    """

    def __init__(self, text: TextEncoder, *, multiple_of: int = 1) -> None:
        self.pad_id = text.pad_id
        self.multiple_of = multiple_of

    def __call__(self, examples: Sequence[Example], key: BatchKey) -> Batch:
        ids, mask = self.pad([e.input_ids for e in examples], self.pad_id)
        batch: Batch = {"input_ids": ids, "attention_mask": mask}
        if examples[0].token_type_ids is not None:
            batch["token_type_ids"] = self.pad([e.token_type_ids or () for e in examples], 0)[0]
        self.extend(batch, examples, key)
        if key.filler:
            for name, value in (("labels", IGNORE), ("answer_labels", IGNORE), ("example_ids", -1)):
                tensor = batch.get(name)
                if isinstance(tensor, Tensor):
                    tensor[-1] = value
        return batch

    def pad(self, rows: Iterable[Sequence[int]], value: int, side: Literal["left", "right"] = "right") -> tuple[Tensor, Tensor]:
        """:func:`pad` to a multiple of ``multiple_of``."""
        return pad(rows, value, side=side, multiple_of=self.multiple_of)

    @abstractmethod
    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        """Add what the task needs to ``batch``."""


class TokenLabelCollator(Collator):
    """One label per token: ``labels`` (batch, length), -100 on padding. Token classification."""

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        rows = [e.labels for e in examples if isinstance(e.labels, array)]
        if rows:
            batch["labels"] = self.pad(rows, IGNORE)[0]


class ClassCollator(Collator):
    """One label per row: ``labels`` (batch,), the class index. Sequence classification."""

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        labels = [e.labels for e in examples if isinstance(e.labels, int)]
        if labels:
            batch["labels"] = torch.tensor(labels)


class GenerationCollator(TokenLabelCollator):
    """Adds what generation needs to evaluation and prediction batches, and the fixed answers if there are any.

    Extra keys with ``prompts=True``:

    * ``prompt_input_ids``, ``prompt_attention_mask`` (batch, prompt length): the prompt alone; padded on the LEFT for a
      decoder (:class:`CausalCollator`), on the right for an encoder (:class:`Seq2SeqCollator`).
    * ``example_ids`` (batch,): the row's position in its split, -1 for a row that only fills up a rank's last batch.
    * ``answers``: list of texts, what should be generated; only where known. Give ``batch_size=`` to ``self.log`` in
      steps that see it, as Lightning cannot infer a batch size past a list of texts.
    * ``answer_labels`` (batch,): the index of the right answer among the fixed ones, -100 for a filler row.
    * ``answer_input_ids``, ``answer_attention_mask`` (batch, answers, answer length): the tokens of every fixed answer
      with its end, the same for all rows (an expanded view), padded on the right. To score answer a of row b, run the
      prompt followed by ``answer_input_ids[b, a]`` and sum the log-probabilities where the mask is 1.

    Args:
        text: gives the pad id.
        prompts: add the keys above.
        answers: token ids of each fixed answer.
        multiple_of: lengths are padded to a multiple of this.
    """

    prompt_side: Literal["left", "right"]

    def __init__(
        self, text: TextEncoder, *, prompts: bool = False, answers: Sequence[Sequence[int]] = (), multiple_of: int = 1
    ) -> None:
        super().__init__(text, multiple_of=multiple_of)
        self.prompts = prompts
        self.answers = pad(answers, self.pad_id) if answers else None

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        super().extend(batch, examples, key)
        if not self.prompts:
            return
        prompts = self.pad([self.prompt(e) for e in examples], self.pad_id, self.prompt_side)
        batch["prompt_input_ids"], batch["prompt_attention_mask"] = prompts
        batch["example_ids"] = torch.tensor(key.indices)
        known = [e.answer for e in examples if e.answer is not None]
        if known:
            batch["answers"] = known
        if known and self.answers is not None:
            batch["answer_labels"] = torch.tensor([e.answer_label for e in examples])
            ids, mask = (tensor.expand(len(examples), *tensor.shape) for tensor in self.answers)
            batch["answer_input_ids"], batch["answer_attention_mask"] = ids, mask

    @abstractmethod
    def prompt(self, example: Example) -> Sequence[int]:
        """Return the ids that generation starts from."""


class CausalCollator(GenerationCollator):
    """Causal LM. Training: right padding, ``labels`` (batch, length), unshifted as HF models take them.

    Without labels (prediction) ``input_ids`` and ``attention_mask`` are the left-padded prompts themselves.
    """

    prompt_side = "left"

    def prompt(self, example: Example) -> Sequence[int]:
        return example.input_ids[: example.prompt_length]

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        super().extend(batch, examples, key)
        if "labels" not in batch and self.prompts:
            batch["input_ids"], batch["attention_mask"] = batch["prompt_input_ids"], batch["prompt_attention_mask"]


class Seq2SeqCollator(GenerationCollator):
    """Seq2seq LM: encoder inputs and ``labels`` (batch, target length); HF models shift them into decoder inputs."""

    prompt_side = "right"

    def prompt(self, example: Example) -> Sequence[int]:
        return example.input_ids


class MaskedCollator(Collator):
    """Masked LM (BERT, arXiv:1810.04805, section 3.1), whole words by default.

    Per row words are drawn until they cover ``probability`` of the tokens, at least one word. Of the tokens drawn 80 %
    become the mask token, 10 % a random ordinary token, 10 % stay; ``labels`` (batch, length) hold the originals, -100
    elsewhere. The draw depends on (seed, epoch, row) only: not on the batch, the worker, the rank or an interruption.

    Args:
        text: the tokenizer's rules; it needs a mask token.
        probability: share of the tokens to predict.
        whole_words: draw words; False draws single tokens.
        seed: of the draws.
        mask: False (prediction) leaves the text as it is, without labels.
        multiple_of: lengths are padded to a multiple of this.

    Raises:
        ConfigError: no mask token, or ``probability`` outside (0, 1].
    """

    def __init__(
        self, text: TextEncoder, *, probability: float, whole_words: bool, seed: int, mask: bool, multiple_of: int = 1
    ) -> None:
        super().__init__(text, multiple_of=multiple_of)
        tokenizer = text.tokenizer
        if tokenizer.mask_token_id is None:
            raise ConfigError("task masked_lm needs a tokenizer with a mask token; set tokenizer.mask_token.")
        if not 0 < probability <= 1:
            raise ConfigError(f"mlm_probability must lie in (0, 1], got {probability}.")
        self.mask_id = tokenizer.mask_token_id
        self.ordinary = torch.tensor(sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids)))
        self.probability, self.whole_words, self.seed, self.mask = probability, whole_words, seed, mask

    def extend(self, batch: Batch, examples: Sequence[Example], key: BatchKey) -> None:
        if not self.mask:
            batch["example_ids"] = torch.tensor(key.indices)
            return
        ids = batch["input_ids"]
        assert isinstance(ids, Tensor)
        labels = torch.full_like(ids, IGNORE)
        for i, (example, index) in enumerate(zip(examples, key.indices, strict=True)):
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "mask", key.epoch, index))
            chosen = self._choose(example, generator)
            labels[i, chosen] = ids[i, chosen]
            fate = torch.rand(len(chosen), generator=generator)
            other = self.ordinary[torch.randint(len(self.ordinary), (len(chosen),), generator=generator)]
            replaced = torch.where(fate < 0.8, torch.full_like(other, self.mask_id), other)
            ids[i, chosen] = torch.where(fate < 0.9, replaced, ids[i, chosen])
        batch["labels"] = labels

    def _choose(self, example: Example, generator: torch.Generator) -> Tensor:
        """Return the sorted positions to predict."""
        words: dict[int, list[int]] = {}
        for position, word in enumerate(example.word_ids or ()):
            if word >= 0:
                words.setdefault(word if self.whole_words else position, []).append(position)
        groups = list(words.values())
        budget = max(1, round(self.probability * sum(map(len, groups))))
        chosen: list[int] = []
        for number in torch.randperm(len(groups), generator=generator).tolist():
            if not chosen or len(chosen) + len(groups[number]) <= budget:
                chosen += groups[number]
        return torch.tensor(sorted(chosen), dtype=torch.long)
