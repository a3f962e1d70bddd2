"""``PEFTDataModule``: files or a data set of the hub, to batches for every text task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as pl

from lightning_peft.errors import ConfigError, DataError, DependencyError, did_you_mean
from lightning_peft.training.data.choices import CausalChoiceCollator, ChoiceCollator
from lightning_peft.training.data.collators import (
    CausalCollator,
    ClassCollator,
    Collator,
    MaskedCollator,
    Seq2SeqCollator,
    TokenLabelCollator,
)
from lightning_peft.training.data.encoders import CausalEncoder, Example, RowEncoder, Seq2SeqEncoder
from lightning_peft.training.data.loader import EpochSampler, StatefulLoader
from lightning_peft.training.data.rows import RowStore
from lightning_peft.training.data.sources import DataFormat, Reader, Row, TextUnit, load_hub
from lightning_peft.training.data.splits import ENCODERS, SplitReport, Truncation, encode_split
from lightning_peft.training.data.templates import Task, TextSpec
from lightning_peft.training.data.tokenization import TextEncoder, Tokenizer

_STAGES: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class PEFTDataModule(pl.LightningDataModule):
    r"""Text data for fine-tuning: JSONL, JSON, CSV, TSV, text files, or a data set of the package ``datasets``.

    The batches and their keys are described with the collators (``lightning_peft.training.data.collators``). Exact
    duplicates are removed before splitting; splits, few-shot choice, order and masks depend on ``seed``, never on the
    global random state; a run that is interrupted within an epoch resumes with the batch that was next.

    Args:
        data_path: training data, from which ``val_fraction`` and ``test_fraction`` are taken: a file, or ``name`` or
            ``name:configuration`` of a data set for the package datasets (its own splits are used where it has them).
        val_path: validation data, instead of a fraction.
        test_path: test data, instead of a fraction.
        predict_path: rows to predict.
        predict_texts: texts to predict; each fills the only column of ``prompt``, or is the text or the user's message.
        data_format: auto goes by the file's suffix; a TSV file knows no quoting.
        encoding: text encoding of the files.
        column_names: columns of a CSV or TSV file that has no header line.
        text_unit: what one row of a text file is; its column is called text.
        tokenizer: name, folder or tokenizer object; None takes the attribute ``tokenizer`` of the LightningModule.
        task: what the batches are made for.
        text_column: text to read; for token_classification the words (a list, or a text split at white space).
        text_pair_column: second text of a sequence_classification pair.
        prompt: template with columns in braces, such as "Classify: {text}\nAnswer:", with loss on the completion only.
        completion: column or template to be written after the prompt, such as " {label}"; for seq2seq_lm the target. How a choice is
            written in multiple_choice, such as " {choice}"; None writes it as it is.
        chat_template: put the prompt into a user's turn and the completion into the assistant's turn.
        system_prompt: system message before them.
        messages_column: column with conversations (lists of role and content); loss on the assistant's turns only.
        label_column: class, or list of tags for token_classification.
        labels: allowed labels in the order of their class indices; None takes the sorted labels of the training data.
            With a completion made of the label they become the fixed answers of evaluation.
        label_names: names to use instead of the values in the label column, such as {"0": "ham", "1": "spam"}.
        choices: multiple_choice and seq2seq_multiple_choice: the choices, one for each label in their order, such as ["no", "yes"]
            for the labels ham and spam; None takes the labels themselves. Or the column with each row's own list of choices; label_column
            then holds the index of the right one, from 0, or its text.
        max_length: longest sequence in tokens.
        truncation: a row longer than max_length is an error, is dropped, or is cut at the left or right; only texts
            from columns are cut, the longest first, never a completion or the words of a template. Counted and reported.
        packing: causal LM on plain text: join the training texts and cut them into full blocks of max_length tokens.
            Tokens then attend to the texts before theirs in the block.
        mlm_probability: share of the tokens to predict in masked_lm.
        whole_word_masking: mask whole words.
        few_shot: train on so many rows of each label.
        deduplicate: remove exact duplicates (equal in all columns that are used) from data_path before splitting.
        val_fraction: share of data_path for validation, where there is neither a file nor a split for it.
        test_fraction: share of data_path for testing, likewise.
        eval_prompts: add prompts and answers to validation and test batches; None does so if the answers are labels.
        batch_size: rows per batch and process.
        length_grouped: put rows of similar length together, in training and evaluation, which saves padding.
        pad_to_multiple_of: pad to a multiple of this many tokens.
        num_workers: processes that build batches.
        pin_memory: faster copies to a GPU.
        seed: of splits, few-shot choice, order and masks.

    Raises:
        ConfigError: arguments that contradict each other or are out of range.
    """

    def __init__(
        self,
        *,
        data_path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        predict_path: str | None = None,
        predict_texts: list[str] | None = None,
        data_format: DataFormat = "auto",
        encoding: str = "utf-8",
        column_names: list[str] | None = None,
        text_unit: TextUnit = "line",
        tokenizer: str | Tokenizer | None = None,
        task: Task = "causal_lm",
        text_column: str = "text",
        text_pair_column: str | None = None,
        prompt: str | None = None,
        completion: str | None = None,
        chat_template: bool = False,
        system_prompt: str | None = None,
        messages_column: str | None = None,
        label_column: str = "label",
        labels: list[str | int] | None = None,
        label_names: dict[str, str] | None = None,
        choices: list[str] | str | None = None,
        max_length: int = 512,
        truncation: Truncation = "error",
        packing: bool = False,
        mlm_probability: float = 0.15,
        whole_word_masking: bool = True,
        few_shot: int | None = None,
        deduplicate: bool = True,
        val_fraction: float = 0.1,
        test_fraction: float = 0.0,
        eval_prompts: bool | None = None,
        batch_size: int = 8,
        length_grouped: bool = False,
        pad_to_multiple_of: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Not to the logger: Lightning raises if the module logs another value under the same name.
        self.save_hyperparameters(ignore=["tokenizer"], logger=False)
        names = [str(label) for label in labels] if labels is not None else None
        self.spec = TextSpec(
            task=task,
            text_column=text_column,
            text_pair_column=text_pair_column,
            prompt=prompt,
            completion=completion,
            chat_template=chat_template,
            system_prompt=system_prompt,
            messages_column=messages_column,
            label_column=label_column,
            labels=tuple(names) if names is not None else None,
            choices=tuple(map(str, choices)) if isinstance(choices, (list, tuple)) else choices,
        )
        if task not in ENCODERS:
            raise ConfigError(f"unknown task {task!r}; tasks: {', '.join(ENCODERS)}.{did_you_mean(task, ENCODERS)}")
        if truncation not in ("error", "drop", "left", "right"):
            raise ConfigError(f"truncation must be error, drop, left or right, got {truncation!r}.")
        if names is not None and len(set(names)) != len(names):
            raise ConfigError(f"labels must differ, got {names}.")
        if packing and (task != "causal_lm" or prompt or messages_column):
            raise ConfigError("packing is for causal_lm on plain text: without task, prompt or messages_column.")
        least = {"max_length": (max_length, 2), "batch_size": (batch_size, 1), "num_workers": (num_workers, 0)}
        for name, (value, limit) in {**least, "pad_to_multiple_of": (pad_to_multiple_of, 1)}.items():
            if value < limit:
                raise ConfigError(f"{name} must be at least {limit}, got {value}.")
        self.rows = RowStore(
            spec=self.spec,
            reader=Reader(
                format=data_format,
                encoding=encoding,
                column_names=tuple(column_names) if column_names is not None else None,
                text_unit=text_unit,
            ),
            data_path=data_path,
            val_path=val_path,
            test_path=test_path,
            predict_path=predict_path,
            predict_texts=predict_texts,
            label_names={str(value): name for value, name in (label_names or {}).items()},
            few_shot=few_shot,
            deduplicate=deduplicate,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            seed=seed,
        )
        self.max_length, self.truncation, self.packing = max_length, truncation, packing
        self.mlm_probability, self.whole_word_masking = mlm_probability, whole_word_masking
        self.seed = seed
        self.eval_prompts = self.spec.fixed_answers if eval_prompts is None else eval_prompts
        if self.eval_prompts and (self.spec.has_choices or (self.spec.completion is None and messages_column is None)):
            raise ConfigError("eval_prompts needs a completion or messages_column: there is nothing to generate.")
        self.batch_size, self.length_grouped = batch_size, length_grouped
        self.pad_to_multiple_of, self.num_workers, self.pin_memory = pad_to_multiple_of, num_workers, pin_memory
        self.reports: dict[str, SplitReport] = {}
        self._tokenizer_source = tokenizer
        self._text: TextEncoder | None = None
        self._examples: dict[str, list[Example]] = {}

    # ---- Lightning hooks

    def prepare_data(self) -> None:
        """Download, once per node, what comes from a hub; sets nothing."""
        for source in self.rows.paths:
            if self.rows.reader.resolve_format(source) == "datasets":
                load_hub(source)
        if isinstance(self._tokenizer_source, str):
            _load_tokenizer(self._tokenizer_source)

    def setup(self, stage: str | None = None) -> None:
        """Read, split and tokenise what ``stage`` needs; what is there already is kept.

        Raises:
            DataError: missing file or column, unknown label, nothing left, or a row that is too long.
        """
        if stage not in _STAGES:
            raise ConfigError(f"unknown stage {stage!r}; stages: fit, validate, test, predict.")
        rows = {**self.rows.splits}
        if stage == "predict" or (stage is None and (self.rows.predict_path or self.rows.predict_texts is not None)):
            rows["predict"] = self.rows.predict_rows()
        wanted = [split for split in _STAGES[stage] if split in rows]
        if not wanted or (stage == "fit" and "train" not in wanted):
            missing = {"validate": "val_path or val_fraction", "test": "test_path or test_fraction"}
            raise DataError(f"there is no data to {stage or 'set up'}: give {missing.get(stage or '', 'data_path')}.")
        text = self._resolve_tokenizer()
        for split in wanted:
            if split not in self._examples:
                self._examples[split] = self._encode(split, rows[split], text)

    def train_dataloader(self) -> StatefulLoader:
        """Shuffled batches; under ``Trainer(overfit_batches=...)`` the same ones in every epoch."""
        return self._loader("train", shuffle=not (self.trainer is not None and getattr(self.trainer, "overfit_batches", 0.0) > 0))

    def val_dataloader(self) -> StatefulLoader | list[StatefulLoader]:
        """Batches in the order of the data; without validation data an empty list, of which Lightning warns."""
        return self._loader("val") if "val" in self._examples else []

    def test_dataloader(self) -> StatefulLoader:
        """Batches in the order of the data."""
        return self._loader("test")

    def predict_dataloader(self) -> StatefulLoader:
        """Batches without labels, in the order of the data."""
        return self._loader("predict")

    # ---- what others may ask

    @property
    def labels(self) -> list[str]:
        """The labels in the order of their class indices, empty if the task has none; reads the data if it must."""
        return self.rows.labels

    @property
    def text(self) -> TextEncoder:
        """The tokenizer with its rules, after :meth:`setup`."""
        if self._text is None:
            raise ConfigError("the tokenizer is not known before setup().")
        return self._text

    def usage(self) -> dict[str, Any]:
        """Return how texts become prompts, as plain values that are saved with an adapter."""
        fields = {name: getattr(self.spec, name) for name in ("prompt", "chat_template", "system_prompt")}
        return {name: value for name, value in fields.items() if value}

    def dataset(self, split: str) -> list[Example]:
        """Return the tokenised rows of a split, after :meth:`setup`."""
        if split not in self._examples:
            raise DataError(f"split {split!r} is not there; setup() made {sorted(self._examples)}.")
        return self._examples[split]

    # ---- tokens

    def _resolve_tokenizer(self) -> TextEncoder:
        """Return the tokenizer's rules; another tokenizer than before makes everything be tokenised again."""
        source = self._tokenizer_source
        if source is None:
            module = self.trainer.lightning_module if self.trainer is not None else None
            source = getattr(module, "tokenizer", None)
            if source is None:
                raise ConfigError(
                    "PEFTDataModule has no tokenizer: give tokenizer=, or a LightningModule that has one as 'tokenizer'."
                )
        elif isinstance(source, str):
            source = self._tokenizer_source = _load_tokenizer(source)
        if self._text is None or self._text.tokenizer is not source:
            self._text = TextEncoder(source)
            self._examples, self.reports = {}, {}
        return self._text

    def _encoder(self, text: TextEncoder) -> RowEncoder:
        side: Literal["left", "right"] | None = None
        if self.truncation == "left" or self.truncation == "right":
            side = self.truncation
        return ENCODERS[self.spec.task](self.spec, text, labels=self.labels, max_length=self.max_length, side=side)

    def _encode(self, split: str, rows: Sequence[Row], text: TextEncoder) -> list[Example]:
        bar = self.trainer is None or (self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None)
        packing = self.packing and split == "train"
        examples, self.reports[split] = encode_split(
            split, rows, self._encoder(text), truncation=self.truncation, packing=packing, visible=bar
        )
        return examples

    # ---- batches

    def _collator(self, split: str) -> Collator:
        text, task, multiple = self.text, self.spec.task, self.pad_to_multiple_of
        prompts = split == "predict" or (self.eval_prompts and split != "train")
        answers: list[list[int]] = []
        if prompts and self.spec.fixed_answers and split != "predict":
            encoder = self._encoder(text)
            assert isinstance(encoder, (CausalEncoder, Seq2SeqEncoder))
            answers = [encoder.answer_ids(self.spec.target_text({self.spec.label_column: label})) for label in self.labels]
        if task == "causal_lm":
            return CausalCollator(text, prompts=prompts, answers=answers, multiple_of=multiple)
        if task == "seq2seq_lm":
            return Seq2SeqCollator(text, prompts=prompts, answers=answers, multiple_of=multiple)
        if self.spec.has_choices:
            chooses = CausalChoiceCollator if task == "multiple_choice" else ChoiceCollator
            return chooses(text, texts=split == "predict", multiple_of=multiple)
        if task == "masked_lm":
            return MaskedCollator(
                text,
                probability=self.mlm_probability,
                whole_words=self.whole_word_masking,
                seed=self.seed,
                mask=split != "predict",
                multiple_of=multiple,
            )
        kind = ClassCollator if task == "sequence_classification" else TokenLabelCollator
        return kind(text, multiple_of=multiple)

    def _loader(self, split: str, *, shuffle: bool = False) -> StatefulLoader:
        examples = self.dataset(split)
        # Not (global_rank, world_size): tensor-parallel ranks of one group must see the same batches.
        shard = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        sampler = EpochSampler(
            [len(example.input_ids) for example in examples],
            batch_size=self.batch_size,
            shuffle=shuffle,
            seed=self.seed,
            rank=shard.get("rank", 0),
            world_size=shard.get("num_replicas", 1),
            length_grouped=self.length_grouped and split != "predict",  # predictions keep the order of the data
        )
        return StatefulLoader(examples, self._collator(split), sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)


def _load_tokenizer(name: str) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise DependencyError(f"tokenizer={name!r} needs transformers: pip install transformers") from error
    try:
        loaded: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load tokenizer {name!r}: {str(error).splitlines()[0]}") from error
    tokenizer: Tokenizer = loaded
    return tokenizer
