"""Load a base model and its tokenizer: by hub name, from a local folder, or from a GGUF file.

The model comes back in training mode: plain, with dense weights and no quantizer attached; quantized while its weights are read, where
that is asked; or quantized as the checkpoint is. transformers is imported inside functions.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from lightning_peft.errors import (
    CompatibilityError,
    ConfigError,
    ConflictError,
    DependencyError,
    FormatError,
    PEFTError,
    did_you_mean,
)
from lightning_peft.loading.quantize import quantize
from lightning_peft.loading.saved import METHOD, is_saved
from lightning_peft.quantization.backend import backend_for
from lightning_peft.quantization.options import Quantizable, QuantizeOptions
from lightning_peft.untrusted import parse_json, read_text

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16", "float64"]
DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

AUTO_CLASSES: dict[str, str] = {
    "causal_lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "seq2seq_lm": "AutoModelForSeq2SeqLM",
    "multiple_choice": "AutoModelForCausalLM",
    "seq2seq_multiple_choice": "AutoModelForSeq2SeqLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}
"""Task -> class of transformers that makes a model for it."""


@dataclass(frozen=True, kw_only=True)
class BaseSource:
    """Where a base model comes from and how it is loaded.

    Args:
        name: Name on the hub, local folder, or path of a ``.gguf`` file, whose weights are unpacked to dense ones.
        dtype: dtype of the weights; ``auto`` takes that of the checkpoint.
        attn_implementation: ``sdpa``, ``eager``, ...; None leaves the choice to transformers.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model. Off unless you say so.
        quantization: Store the linear layers in few bits, each as soon as it is read; None leaves the checkpoint as it is.

    Raises:
        ConfigError: Unknown dtype.
    """

    name: str
    dtype: Dtype = "auto"
    attn_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: Quantizable | None = None

    def __post_init__(self) -> None:
        if self.quantization is not None:
            object.__setattr__(self, "quantization", QuantizeOptions.parse(self.quantization))
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not one of {', '.join(DTYPES)}.{did_you_mean(str(self.dtype), DTYPES)}")

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, if ``name`` is one."""
        path = Path(self.name).expanduser()
        return path if path.suffix.lower() == ".gguf" else None

    def arguments(self) -> tuple[str, dict[str, Any]]:
        """Return what ``from_pretrained`` of a tokenizer and of a model both take.

        Raises:
            ConfigError: The GGUF file does not exist.
            DependencyError: The package gguf is missing.
        """
        kwargs: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.revision is not None:
            kwargs["revision"] = self.revision
        if self.gguf is None:
            return str(Path(self.name).expanduser()) if self.name.startswith("~") else self.name, kwargs
        if not self.gguf.is_file():
            raise ConfigError(f"base={self.name!r}: there is no such GGUF file.")
        if importlib.util.find_spec("gguf") is None:
            raise DependencyError(f"base={self.name!r} is a GGUF file, which needs the package gguf: pip install gguf")
        return str(self.gguf.parent), {**kwargs, "gguf_file": self.gguf.name}


@dataclass(frozen=True)
class LoadedBase:
    """A base model and what of it is new.

    Args:
        model: The model, in training mode.
        new_modules: Paths of the modules that the checkpoint has no weights for, such as a task head; they are initialised at
            random and must train.
    """

    model: nn.Module
    new_modules: tuple[str, ...]


def load_tokenizer(source: BaseSource) -> Any:
    """Return the tokenizer of a base model.

    Raises:
        ConfigError: There is none under this name.
        DependencyError: A package is missing.
    """
    where, kwargs = source.arguments()
    _check_folder(where)
    try:
        return _transformers().AutoTokenizer.from_pretrained(where, **kwargs)
    except (MemoryError, DependencyError):
        raise
    except Exception as error:  # tokenizers knows no other class
        raise ConfigError(
            f"cannot load a tokenizer from {source.name!r}: {_first_line(error)} Give tokenizer= a name, a folder or an object."
        ) from error


def load_model(source: BaseSource, task: str, labels: Sequence[str] | None = None) -> LoadedBase:
    """Load the model of ``source`` with the head of ``task``.

    Args:
        source: Where it comes from.
        task: A key of :data:`AUTO_CLASSES`.
        labels: Names of the classes. A head of another size is replaced by a new one. None keeps the checkpoint's.

    Raises:
        ConfigError: There is no such model, or it has no head for this task.
        CompatibilityError: Weights other than those of a head have the wrong shape.
        DependencyError: A package is missing.
    """
    where, kwargs = source.arguments()
    _check_folder(where)
    transformers = _transformers()
    kwargs["dtype"] = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    if source.attn_implementation is not None:
        kwargs["attn_implementation"] = source.attn_implementation
    asked = None if source.quantization is None else QuantizeOptions.parse(source.quantization)
    config = _quantization_config(source, where, asked)
    if config is not None:
        kwargs["quantization_config"] = config
    if labels is not None:
        names = dict(enumerate(labels))
        kwargs |= {"id2label": names, "label2id": {name: i for i, name in names.items()}, "ignore_mismatched_sizes": True}
    try:
        model, info = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(where, output_loading_info=True, **kwargs)
    except (PEFTError, MemoryError):
        raise
    except Exception as error:  # a config says what is built, and wrong values in it fail anywhere
        stream = getattr(config, "stream", None)
        if stream is not None and stream.error is not None:
            raise stream.error from error
        if isinstance(error, RuntimeError):
            raise
        raise ConfigError(f"cannot load base={source.name!r} for task {task}: {_first_line(error)}") from error
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    body = getattr(model, "base_model_prefix", "")
    foreign = sorted(key for key in mismatched if body and key.startswith(body + "."))
    if foreign:
        raise CompatibilityError(
            f"base={source.name!r}: '{foreign[0]}' of the checkpoint has another shape than the model needs."
        )
    _forget_quantizer(model)
    model.train()  # from_pretrained leaves eval mode, in which dropout and activation checkpointing are off
    new = new_modules(model, mismatched | set(info["missing_keys"]))
    if asked is not None and source.gguf is not None:
        quantize(model, asked.skipping(new))
    return LoadedBase(model, new)


def _quantization_config(source: BaseSource, where: str, asked: QuantizeOptions | None) -> Any:
    """Return what ``from_pretrained`` has to know about quantized weights, None if nothing.

    Raises:
        ConflictError: The checkpoint is quantized already, and is to be quantized.
    """
    if asked is not None:
        backend_for(asked.config)
        if (stored := quantized_as(source)) is not None:
            raise ConflictError(
                f"base={source.name!r} is quantized already ({stored}). Leave quantization out to use it as it is, or name the dense "
                "model."
            )
    if source.gguf is not None:
        # The weights unpacked into a plain model; otherwise they may stay in GGUF's blocks.
        return _transformers().GgufConfig(dequantize=True)
    if asked is None and not is_saved(where):
        return None
    from lightning_peft.loading.streamed import quantization_config

    config = quantization_config(asked)  # in any case makes transformers know the folders of save_quantized
    return None if asked is None else config


def _check_folder(where: str) -> None:
    """Check the JSON files by which a local model folder says what is built and read, before transformers believes them.

    Raises:
        FormatError: One is too long or too deep, or names weights outside the folder. Links are the owner's own way to store weights.
    """
    folder = Path(where)
    for path in (folder / "config.json", *folder.glob("*.index.json")) if os.path.isdir(where) else ():
        if not path.is_file():
            continue
        described = parse_json(read_text(path), f"'{path}'", unique=False)  # foreign files may hold a key twice, and some do
        files = described.get("weight_map") if isinstance(described, dict) else None
        for name in set(map(str, files.values())) if isinstance(files, dict) else ():
            if os.path.isabs(name) or ".." in Path(name).parts or "\0" in name:
                raise FormatError(f"'{path}' names the weights {name!r}, which lie outside the folder.")


def quantized_as(source: BaseSource) -> str | None:
    """Return the name of the method by which a checkpoint is quantized, None for a dense one; a GGUF file is unpacked, so it is dense.

    Raises:
        ConfigError: There is no such model.
    """
    if source.gguf is not None:
        return None
    where, kwargs = source.arguments()
    _check_folder(where)
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(where, **kwargs)
    except Exception as error:
        raise ConfigError(f"cannot load base={source.name!r}: {_first_line(error)}") from error
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method", "?") if isinstance(stored, dict) else getattr(stored, "quant_method", "?")
    return "save_quantized" if method == METHOD else str(getattr(method, "value", method))


def new_modules(model: nn.Module, keys: set[str]) -> tuple[str, ...]:
    """Return the paths of the outermost modules of which every parameter is among ``keys``, then of the owners of the rest."""
    found: list[str] = []
    for path, module in model.named_modules():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if path and names and names <= keys and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    covered = {f"{path}.{name}" for path in found for name, _ in model.get_submodule(path).named_parameters()}
    rest = {key.rpartition(".")[0] for key in keys - covered if key in dict(model.named_parameters())}
    return (*found, *sorted(rest - {""}))


def _forget_quantizer(model: Any) -> None:
    """Make a model with unpacked weights say so: transformers still calls one read from GGUF quantized and will not save it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or type(quantizer).__name__ != "GgufHfQuantizer":
        return
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise DependencyError("a base model given by name needs transformers: pip install 'transformers>=5,<6'") from error


def _first_line(error: BaseException) -> str:
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith(".") else line + "."
