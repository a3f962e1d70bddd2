"""``PEFTLightningModule``: a base model, a strategy and a task as one LightningModule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_peft.errors import ConfigError, did_you_mean
from lightning_peft.loading.base import BaseSource, Dtype, load_model, load_tokenizer, quantized_as
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import anatomy_of
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.surgery.recompute import GradientCheckpointing
from lightning_peft.training.callback import PEFTCallback
from lightning_peft.training.evaluating import Evaluator
from lightning_peft.training.losses import LossWindow
from lightning_peft.training.param_groups import far_off, parameter_groups, set_rates
from lightning_peft.training.restoring import lenient, prepare
from lightning_peft.training.schedulers import SCHEDULES, ScheduleName, scheduler
from lightning_peft.training.scoring import Scorer, Scores
from lightning_peft.training.tasks import TASKS, ChoiceTask, compute_wide, configured
from lightning_peft.training.tokens import add_special_tokens, with_new_rows
from lightning_peft.training.units import data_parallel, shard
from lightning_peft.types import AdapterDtype, in_pieces

TaskName = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "multiple_choice",
    "seq2seq_multiple_choice",
    "sequence_classification",
    "token_classification",
    "image_classification",
]
BASE = "base"  # the attribute that holds the base model, which is the adapted root


class PEFTLightningModule(Evaluator):
    """Fine-tune a base model with one PEFT strategy.

    The base is loaded in ``configure_model``, so that making the module is cheap; an ``nn.Module`` is adapted at once. Checkpoints,
    exports and the checks during training are those of :class:`PEFTCallback`, which the module adds to the Trainer by itself.

    Logged: ``train_loss``; ``val_`` and ``test_`` with ``loss`` and, as the task has them, ``perplexity``, ``accuracy``, ``f1``
    (of the second of two classes, else macro), ``exact_match``.

    Args:
        strategy: The PEFT method: a strategy, a name, ``{class_path, init_args}``, or a list, which composes.
        base: Name on the hub, local folder, GGUF file, or a model.
        task: What the model is trained for.
        labels: Names of the classes, in the order of their indices; None takes those of the data module, or of the checkpoint.
        tokenizer: Name, folder or object; None takes the one that comes with a base given by name.
        dtype: dtype of the base's weights; ``auto`` takes the checkpoint's. Not used for a model.
        attn_implementation: ``sdpa``, ``eager``, ...; None leaves the choice to transformers. Not used for a model.
        revision: Branch, tag or commit of base and tokenizer on the hub.
        trust_remote_code: Run Python code that comes with base or tokenizer.
        quantization: Store the base's linear layers in few bits (QLoRA), as :class:`PEFTCallback` takes it. A base given by name is
            quantized while its weights are read, layer by layer.
        special_tokens: Tokens to add. The embeddings grow, and of them only these tokens' rows train.
        extra_modules: Parts of the base to train whole and save with the adapter, such as a task head; ``auto`` takes the modules
            that the checkpoint has no weights for, and of a model given for a classification task its head.
        gradient_checkpointing: Recompute the activations of blocks in the backward pass instead of keeping them, while ``fit`` runs:
            ``True``, or options as of :class:`PEFTCallback`, such as ``{"every": 2}``.
        lr: Learning rate. ``auto`` is the method's own, or that of ``optimizer`` where you give one.
        extra_lr: Learning rate of what trains beside the adapter, such as a new head, which starts at random and wants a higher one
            than most methods; None is ``lr``.
        weight_decay: For tensors with two or more dimensions; ``auto`` is the method's own.
        optimizer: Makes the optimizer from parameter groups; None is AdamW.
        lr_scheduler: ``cosine``, ``linear`` or ``constant`` after the warm-up, a callable that makes a scheduler, or None.
        warmup: Optimizer steps of linear warm-up, or below 1 a share of all steps. Not used for a callable.
        lr_scheduler_interval: When a scheduler made by a callable steps.
        label_smoothing: Share of a label's probability that is spread evenly over all classes, in training only: validation and test
            measure the plain loss.
        choice_losses: Of the multiple-choice tasks: ``mc_loss`` and ``unlikely_loss``, the weights of T-Few's two further losses, and
            ``length_norm``, the power of a choice's length that its log-likelihood is divided by. Each is 1 unless given.
        answers: How a generative model is tested where the data has fixed answers: ``score`` takes the answer with the highest mean
            log-likelihood per token, ``generate`` writes greedily and compares.
        generation: Arguments of ``generate`` in prediction and testing, such as ``{"max_new_tokens": 64}``.
        adapter_name: Name of the adapter.
        adapter_dtype: dtype of the adapter's parameters; ``auto`` is fp32.
        callback: Further arguments of the :class:`PEFTCallback`, such as ``{"merge_on_end": true}``.

    Raises:
        ConfigError: An argument is unknown or contradicts another.
    """

    base: Any  # nn.Module once it is there
    metrics: nn.ModuleDict

    def __init__(
        self,
        strategy: PEFTStrategy | str | dict[str, Any] | list[Any],
        base: str | nn.Module | None = None,
        task: TaskName = "causal_lm",
        *,
        labels: list[str] | None = None,
        tokenizer: Any = None,
        dtype: Dtype = "auto",
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        quantization: str | dict[str, Any] | None = "auto",
        special_tokens: list[str] | None = None,
        extra_modules: Literal["auto"] | list[str] = "auto",
        gradient_checkpointing: bool | dict[str, Any] = False,
        lr: float | Literal["auto"] = "auto",
        extra_lr: float | None = None,
        weight_decay: float | Literal["auto"] = "auto",
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | ScheduleName | None = "cosine",
        warmup: float = 0.05,
        lr_scheduler_interval: Literal["step", "epoch"] = "step",
        label_smoothing: float = 0.0,
        choice_losses: dict[str, float] | None = None,
        answers: Literal["score", "generate"] = "score",
        generation: dict[str, Any] | None = None,
        adapter_name: str = "default",
        adapter_dtype: AdapterDtype = "auto",
        callback: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        _check(task, base, lr_scheduler, label_smoothing, answers, lr, extra_lr)
        self.strategy = resolve(strategy)
        self.task = configured(task, choice_losses)
        self.labels = [str(label) for label in labels] if labels is not None else None
        self.special_tokens = list(special_tokens or ())
        self.extra_modules: Literal["auto"] | list[str] = extra_modules
        self.lr, self.extra_lr, self.weight_decay = lr, extra_lr, weight_decay
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.warmup, self.lr_scheduler_interval = warmup, lr_scheduler_interval
        self.label_smoothing = label_smoothing
        self.answers, self.generation = answers, dict(generation or {})
        self.adapter_name = adapter_name
        options: dict[str, Any] = {"name": adapter_name, "module": BASE, "adapter_dtype": adapter_dtype}
        options |= {"gradient_checkpointing": gradient_checkpointing, "quantization": quantization}
        self.peft = PEFTCallback(self.strategy, **{**options, **(callback or {})})
        self.strict_loading = False  # a checkpoint holds the adapter only; `lenient` is strict about that
        lenient(self, (adapter_name,))
        self.metrics = nn.ModuleDict()
        self.base = None
        self.source: BaseSource | None = None
        if isinstance(base, str):
            loading: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation, "revision": revision}
            loading |= {"quantization": self.peft.quantization}
            self.source = BaseSource(name=base, trust_remote_code=trust_remote_code, **loading)
        self._tokenizer = tokenizer
        self._tokenizer_ready = False
        self._window = LossWindow(self.task.counts)
        self._score = Scorer(self.task)
        # Plain data only, which is all that a checkpoint may hold; objects have to be given again to load_from_checkpoint. Under
        # LightningCLI these are the raw values of the YAML, optimizer and scheduler included.
        objects = [n for n, v in (("base", base), ("tokenizer", tokenizer)) if v is not None and not isinstance(v, str)]
        self.save_hyperparameters(ignore=objects)
        for name in ("optimizer", "lr_scheduler"):
            if callable(self.hparams.get(name)):
                del self.hparams[name]
        if isinstance(self.hparams["strategy"], (PEFTStrategy, list, tuple)):
            self.hparams["strategy"] = self.strategy.to_dict()
        if self.peft.quantization is not None:
            self.hparams["quantization"] = self.peft.quantization.to_dict()
        if isinstance(gradient_checkpointing, GradientCheckpointing):
            self.hparams["gradient_checkpointing"] = gradient_checkpointing.to_dict()
        self._hparams_initial = copy.deepcopy(self._hparams)  # what loggers write
        if isinstance(base, nn.Module):
            self.base = base
            self.configure_model()

    # ---- model

    @property
    def tokenizer(self) -> Any:
        """The tokenizer with the special tokens added, loaded when first asked for; None for a model given without one."""
        if not self._tokenizer_ready:
            given = self._tokenizer
            if isinstance(given, str):
                trust = bool(self.source and self.source.trust_remote_code)
                self._tokenizer = load_tokenizer(BaseSource(name=given, trust_remote_code=trust))
            elif given is None and self.source is not None and self.task.reads_text:
                self._tokenizer = load_tokenizer(self.source)
            if self.special_tokens:
                add_special_tokens(self._tokenizer, self.special_tokens)
            self._tokenizer_ready = True
        return self._tokenizer

    @property
    def handle(self) -> Handle:
        """The installed adapter.

        Raises:
            ConfigError: The base is not loaded yet.
        """
        found = handles(self.base).get(self.adapter_name) if self.base is not None else None
        if found is None:
            raise ConfigError("the adapter is not installed yet: the Trainer does it, or call configure_model().")
        return found

    def setup(self, stage: str) -> None:
        """Take the names of the classes from the data module where they were not given."""
        if self.labels is None and self.task.needs_labels:
            known = getattr(getattr(self.trainer, "datamodule", None), "labels", None)
            if known:
                self.labels = [str(label) for label in known]
                self.hparams["labels"] = list(self.labels)  # a checkpoint must build the same head

    def configure_model(self) -> None:
        """Load the base and install the adapter, once; under ``ModelParallelStrategy`` shard both."""
        if self.base is None or self.adapter_name not in handles(self.base):
            self._adapt()
        if self.device_mesh is not None and not in_pieces(self.base.parameters()):
            self.peft.install(self)  # once more: a model that was given was adapted before there were other ranks
            shard(self.base, data_parallel(self.device_mesh))

    def _adapt(self) -> None:
        new: tuple[str, ...] = ()
        if self.base is None:
            assert self.source is not None
            if self.peft.follows_method and self.source.quantization is not None and quantized_as(self.source) is not None:
                self.source = replace(self.source, quantization=None)  # the method's own wish yields to the checkpoint
            loaded = load_model(self.source, self.task.name, self.labels if self.task.needs_labels else None)
            self.base, new = loaded.model, loaded.new_modules
        elif self.task.needs_labels:
            new = tuple(site.path for site in anatomy_of(self.base).roles.get("head", ()))
        self.base.train()  # HF leaves eval mode, in which dropout is off
        self._fit_config()
        if self.special_tokens:
            self.peft.strategy = with_new_rows(self.strategy, self.base, self.tokenizer, self.special_tokens)
        if self.extra_modules == "auto":
            self.extra_modules = [f"{BASE}.{path}" for path in new]
        self.peft.extra_modules = tuple(dict.fromkeys((*self.peft.extra_modules, *self.extra_modules)))
        handle = self.peft.install(self)
        if self.task.needs_labels:
            for path in new:
                compute_wide(self.base.get_submodule(path))
        if self.source is not None:
            handle.usage |= {"base": self.source.name, "revision": self.source.revision, "dtype": self.source.dtype}
        handle.usage |= {"task": self.task.name, "labels": self.labels}
        # Whoever loads the adapter has to take this tokenizer, add these tokens and make room for them (serve.open_adapter).
        asked = {"tokenizer": self.hparams.get("tokenizer"), "special_tokens": self.special_tokens}
        handle.usage |= {key: value for key, value in asked.items() if value}
        for split in ("val", "test"):
            self.metrics[split] = self.task.metrics(len(self.labels or ()))

    def on_fit_start(self) -> None:
        """Note on the adapter how its prompts are made, so that it can be asked the same way later."""
        describe = getattr(getattr(self.trainer, "datamodule", None), "usage", None)
        if describe is not None:
            self.handle.usage |= describe()

    def _fit_config(self) -> None:
        """Read the classes from the base's config where nobody named them; give decoders that classify their pad token."""
        config = getattr(self.base, "config", None)
        if self.task.needs_labels and self.labels is None:
            names = getattr(config, "id2label", None)
            if not names:
                raise ConfigError(f"task {self.task.name} needs labels: the names of the classes, in the order of their indices.")
            self.labels = [str(names[i]) for i in sorted(names)]
            self.hparams["labels"] = list(self.labels)
        if config is not None and self.task.name == "sequence_classification" and getattr(config, "pad_token_id", None) is None:
            tokenizer = self.tokenizer
            if tokenizer is not None:
                config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def configure_callbacks(self) -> list[pl.Callback]:
        """Add the callback that saves, checks and exports the adapter, unless the Trainer has one of this name.

        Raises:
            ConfigError: The Trainer's has another strategy.
        """
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        given = next((c for c in callbacks if isinstance(c, PEFTCallback) and c.name == self.adapter_name), None)
        if given is None:
            return [self.peft]
        if given is not self.peft:
            if given.strategy not in (self.strategy, self.peft.strategy):
                raise ConfigError(
                    f"the Trainer's PEFTCallback has {given.strategy}, the module {self.strategy}, both named '{self.adapter_name}'. "
                    "Give them the same strategy, or leave the callback out and pass its options as callback=."
                )
            given.strategy, given.module = self.peft.strategy, BASE
            given.extra_modules = tuple(dict.fromkeys((*self.peft.extra_modules, *given.extra_modules)))
            if given.follows_method:  # it was not told how to store the base
                given.quantization, given.follows_method = self.peft.quantization, self.peft.follows_method
            given.gradient_checkpointing = given.gradient_checkpointing or self.peft.gradient_checkpointing
            self.peft = given
        return []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another base or strategy; with a Trainer its PEFTCallback has done so already."""
        if self._trainer is not None:
            return
        checkpoint.update(prepare(checkpoint, "the checkpoint", self, [(self.peft, self.handle)]))

    @contextmanager
    def base_only(self) -> Iterator[None]:
        """Run the untouched base, bit for bit: ``with module.base_only(): trainer.validate(module, data)``."""
        self.configure_model()
        with self.handle.disabled():
            yield

    def forward(self, **inputs: Any) -> Any:
        """Call the adapted base model."""
        return self.base(**inputs)

    # ---- steps

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the batch's share in the mean loss over all labelled positions of the optimizer step (see ``losses``)."""
        scores: Scores = self._score(self.base, batch)
        terms, counts = self.task.losses(scores, batch, self.label_smoothing), self.task.counts(batch)
        self.log("train_loss", _mean(terms, counts).detach(), prog_bar=True, batch_size=1)
        share = self._window.per_batch(self.trainer, batch, batch_idx)
        total = torch.stack([term / count for term, count in zip(terms, share, strict=True)]).sum()
        between = self.peft.second_pass(scores.logits, lambda: self._score(self.base, batch).logits())
        return total if between is None else total + between * (counts[0] / share[0])  # a mean over positions, as the first term

    def calibration_loss(self, batch: Any) -> Tensor:
        """Return the loss of a batch alone, for methods that start from data."""
        return _mean(self.task.losses(self._score(self.base, batch), batch, self.label_smoothing), self.task.counts(batch))

    # ---- optimisation

    def configure_optimizers(self) -> Any:
        """Build the groups by owner, the optimizer and the scheduler.

        Raises:
            ConfigError: The schedule does not fit the run.
        """
        own_lr, own_decay = self.strategy.suggested
        decay = own_decay if self.weight_decay == "auto" else float(self.weight_decay)
        groups = parameter_groups(self, weight_decay=decay, extra_lr=self.extra_lr, wrapped=self.trainer.strategy.model)
        optimizer = AdamW(groups, lr=own_lr) if self.optimizer is None else self.optimizer(groups)
        set_rates(optimizer, None if self.lr == "auto" else float(self.lr))
        lr = optimizer.defaults["lr"] if self.lr == "auto" else float(self.lr)
        warning = far_off(float(lr), self.strategy)
        if warning is not None and "Adam" in type(optimizer).__name__:
            warnings.warn(warning, stacklevel=2)
        if self.lr_scheduler is None:
            return optimizer
        if isinstance(self.lr_scheduler, str):
            total = float(self.trainer.estimated_stepping_batches)
            made: Any = scheduler(optimizer, self.lr_scheduler, warmup=self.warmup, total=total)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": made, "interval": "step"}}
        made = self.lr_scheduler(optimizer)
        config: dict[str, Any] = {"scheduler": made, "interval": self.lr_scheduler_interval}
        if isinstance(made, ReduceLROnPlateau):
            config["monitor"] = getattr(made, "monitor", "val_loss")
        return {"optimizer": optimizer, "lr_scheduler": config}


def _check(task: str, base: Any, lr_scheduler: Any, label_smoothing: float, answers: str, lr: Any, extra_lr: Any) -> None:
    """Refuse what no annotation can: values that come from a YAML file or contradict each other."""
    if task not in TASKS:
        raise ConfigError(f"task={task!r} is unknown; tasks: {', '.join(TASKS)}.{did_you_mean(str(task), TASKS)}")
    if base is None:
        raise ConfigError(
            "base is missing: a name, a folder, a GGUF file or a model. A checkpoint of a module that was given a model does not "
            "hold it: load_from_checkpoint(path, base=model)."
        )
    if isinstance(lr_scheduler, str) and lr_scheduler not in SCHEDULES:
        raise ConfigError(f"lr_scheduler={lr_scheduler!r} is not one of {', '.join(SCHEDULES)}.")
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing={label_smoothing!r} is not at least 0 and below 1.")
    if label_smoothing and isinstance(TASKS[task], ChoiceTask):
        raise ConfigError(
            f"label_smoothing={label_smoothing} is not for {task}: its losses ask for the likelihood of the choices themselves."
        )
    if answers not in ("score", "generate"):
        raise ConfigError(f"answers={answers!r} is not one of score, generate.")
    if isinstance(lr, str) and lr != "auto":
        raise ConfigError(f"lr={lr!r} is neither a number nor 'auto'.")
    if extra_lr is not None and not (isinstance(extra_lr, (int, float)) and extra_lr >= 0):
        raise ConfigError(f"extra_lr={extra_lr!r} is no number of at least 0.")


def _mean(terms: tuple[Tensor, ...], counts: tuple[int, ...]) -> Tensor:
    """Return the loss of a batch by itself: each term over what it counts."""
    return torch.stack([term / max(count, 1) for term, count in zip(terms, counts, strict=True)]).sum()
