"""The model whose cost is asked, as it would be in training, without its numbers: copied or built on meta, adapted, quantized."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_peft.cost.blocks import outermost, signature
from lightning_peft.cost.quantized import Stored, numberless, store
from lightning_peft.cost.tracer import Tracer
from lightning_peft.errors import ConfigError, DependencyError, UnsupportedLayerError, did_you_mean
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.strategies.registry import resolve
from lightning_peft.strategies.strategy import PEFTStrategy
from lightning_peft.surgery.anatomy import Anatomy, Family, anatomy_of
from lightning_peft.surgery.builder import output_embeddings
from lightning_peft.surgery.handle import Handle, handles
from lightning_peft.surgery.inject import apply_plan
from lightning_peft.surgery.recompute import GradientCheckpointing, checkpoint_blocks
from lightning_peft.surgery.selection import select
from lightning_peft.surgery.stack import CallAdapter
from lightning_peft.surgery.walk import base_modules, base_parameters
from lightning_peft.types import AdapterDtype

Inputs: TypeAlias = Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor
GiveInputs: TypeAlias = Callable[[int, "int | None"], Inputs]

# Lightning's precisions: dtype of the base's weights (None leaves it), and of autocast.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "64-true": (torch.float64, None),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "bf16-mixed": (None, torch.bfloat16),
    "16-mixed": (None, torch.float16),
}
_SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def precision_of(value: str | int) -> str:
    """Return Lightning's full name of a precision.

    Raises:
        ConfigError: There is no such precision, or its memory is not known here.
    """
    name = _SHORT.get(str(value), str(value))
    if name not in PRECISIONS:
        raise ConfigError(f"precision={value!r} is not one of {', '.join(PRECISIONS)}.{did_you_mean(name, PRECISIONS)}")
    return name


@dataclass(eq=False)
class Planned:
    """A model as it would train.

    Args:
        model: The adapted root, its tensors fake.
        handle: The adapter; None for a model that trains as it is.
        anatomy: What is known about the model.
        tracer: The mode that counts its tensors.
        blocks: Blocks that do not lie in one another, with what equal ones have in common.
        autocast: dtype of autocast, or None.
        head: The output embeddings of a language model that computes logits of every position, else None.
        weights: Bytes of the base as stored, statistics of quantized weights and buffers included.
        parameters: Entries of the base, quantized ones by what they stand for.
        quantized: Those of them that are stored in few bits, and their bytes.
    """

    model: nn.Module
    handle: Handle | None
    anatomy: Anatomy
    tracer: Tracer
    blocks: dict[nn.Module, Hashable]
    autocast: torch.dtype | None
    head: nn.Module | None
    weights: int
    parameters: int
    quantized: Stored

    @property
    def handles(self) -> list[Handle]:
        """Every adapter on the model."""
        return list(handles(self.model).values())

    def trainable(self) -> list[nn.Parameter]:
        """Return what receives gradient, each tensor once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def inputs(
        self, batch: int, length: int | None, given: Inputs | GiveInputs | None, *, padded: bool
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """Return arguments of the model's forward: fake tensors.

        Raises:
            ConfigError: What the model reads is not known, or ``length`` is missing.
        """
        found = given(batch, length) if callable(given) else given
        if found is None:
            found = known_inputs(self.model, batch, length, padded=padded)
        with self.tracer:
            if isinstance(found, Mapping):
                return (), {name: self._resized(x, batch, fixed=callable(given) or given is None) for name, x in found.items()}
            many = (found,) if isinstance(found, Tensor) else tuple(found)
            return tuple(self._resized(x, batch, fixed=callable(given)) for x in many), {}

    def _resized(self, x: Tensor, batch: int, *, fixed: bool) -> Tensor:
        shape = tuple(x.shape) if fixed or not x.dim() else (batch, *x.shape[1:])
        return torch.zeros(shape, dtype=x.dtype)


def plan_model(
    model: Any,
    strategy: PEFTStrategy | str | Mapping[str, Any] | list[Any] | None,
    *,
    dtype: torch.dtype | None,
    precision: str,
    quantization: Any,
    gradient_checkpointing: GradientCheckpointing | None,
    adapter_dtype: AdapterDtype,
    on_cuda: bool,
    extra_modules: Sequence[str] = (),
    anatomy: Family | Mapping[str, Any] | str | None = None,
) -> Planned:
    """Return the model as it would train; the given one is not touched.

    Raises:
        PEFTError: As :func:`lightning_peft.inject` and :func:`lightning_peft.quantize` would raise.
    """
    own_dtype, autocast = PRECISIONS[precision]
    copied = meta_copy(model) if isinstance(model, nn.Module) else from_config(model)
    _cast(copied.model, own_dtype or dtype)
    described = anatomy_of(copied.model, anatomy)
    resolved = None if strategy is None else resolve(strategy)
    if quantization == "auto":
        quantization = None if resolved is None or copied.stored else resolved.base_quantization
    if quantization is not None:
        config, paths = select_layers(described, quantization)
        copied.stored |= dict.fromkeys(paths, config)
    tracer = Tracer()
    with numberless():
        quantized = store(copied.model, copied.stored, on_cuda=on_cuda)
        described = anatomy_of(copied.model, anatomy) if copied.stored else described
        handle = None if resolved is None else _adapted(copied.model, described, resolved, tracer, adapter_dtype, anatomy)
    if gradient_checkpointing is not None:
        checkpoint_blocks(copied.model, described, gradient_checkpointing)
    for path in extra_modules:
        if path not in described.tree.modules:
            hint = did_you_mean(path, described.tree.modules)
            raise ConfigError(f"extra_modules: {type(copied.model).__name__} has no module '{path}'.{hint}")
        described.tree[path].requires_grad_(True)
    copied.model.train()
    base = [p for _, _, p in base_parameters(copied.model)]
    weights = sum(t.nbytes for t in (*base, *_base_buffers(copied.model)))
    parameters = sum(p.numel() for p in base) + quantized.entries - quantized.codes
    tracer.fake(copied.model)
    whole = (block for block in (described.tree[path] for path in outermost(described.blocks)) if _traced_alone(block))
    blocks = {block: signature(block) for block in whole}
    return Planned(
        copied.model, handle, described, tracer, blocks, autocast, language_head(copied.model), weights, parameters, quantized
    )


def _adapted(
    model: nn.Module, anatomy: Anatomy, strategy: PEFTStrategy, tracer: Tracer, adapter_dtype: AdapterDtype, data: Any
) -> Handle:
    present = next(iter(handles(model)), None)
    if present is not None:
        raise ConfigError(
            f"{type(model).__name__} has the adapter '{present}' already. Pass strategy=None for the cost of the model as it is, or "
            "remove() the adapter."
        )

    def install(anatomy: Anatomy) -> Handle:
        strategy.check_base(anatomy)
        return apply_plan(model, strategy.plan(anatomy), anatomy, strategy, name="estimate", adapter_dtype=adapter_dtype)

    try:
        return install(anatomy)
    except UnsupportedLayerError:
        # An initialisation reads the base's weights, which meta refuses. Fake ones take longer, but answer.
        tracer.fake(model)
        with tracer, tracer.any_values():
            return install(anatomy_of(model, data))


def _traced_alone(block: nn.Module) -> bool:
    return all(module.traced_alone for module in block.modules() if isinstance(module, CallAdapter))


def _base_buffers(model: nn.Module) -> list[Tensor]:
    found = {id(b): b for _, module in base_modules(model) for b in module._buffers.values() if b is not None}
    return list(found.values())


@dataclass
class Copied:
    """A model on meta.

    Args:
        model: Its layers all dense.
        stored: How layers that were quantized in the original are stored, by path.
    """

    model: nn.Module
    stored: dict[str, Quantization]


def meta_copy(model: nn.Module) -> Copied:
    """Return a copy of a model whose tensors are on meta; quantized layers are dense in it, and listed."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None and id(tensor) not in memo:
                memo[id(tensor)] = _on_meta(tensor)
    memo_only = {**memo}
    stored: dict[str, Quantization] = {}
    dense: dict[str, tuple[int, int, torch.dtype]] = {}
    for path, module in model.named_modules():
        backend = backend_of(module)
        if backend is not None:
            assert isinstance(module, nn.Linear)
            stored[path] = backend.config(module)
            dense[path] = (module.out_features, module.in_features, backend.compute_dtype(module))
    copied = copy.deepcopy(model, memo_only)
    for path, (rows, columns, dtype) in dense.items():
        layer = copied.get_submodule(path)
        layer.__class__ = nn.Linear
        layer._buffers.clear()  # statistics of the reference
        layer._parameters["weight"] = nn.Parameter(torch.empty(rows, columns, dtype=dtype, device="meta"), requires_grad=False)
    return Copied(copied, stored)


def _on_meta(tensor: Tensor) -> Tensor:
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(new, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def from_config(config: Any) -> Copied:
    """Return the model that a configuration of transformers describes, on meta.

    Raises:
        ConfigError: It is none, or does not say which class it belongs to.
    """
    if not hasattr(config, "model_type") or not hasattr(config, "to_dict"):
        raise ConfigError(f"model is a {type(config).__name__}, but it must be an nn.Module or a configuration of transformers.")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise DependencyError(
            "a model given by its configuration needs transformers: pip install 'transformers>=5,<6'"
        ) from error
    config = copy.deepcopy(config)
    name = next(iter(getattr(config, "architectures", None) or ()), None)
    made: Any = None
    dtype = getattr(config, "dtype", None)
    with torch.device("meta"):
        if name is not None and hasattr(transformers, name):
            made = getattr(transformers, name)._from_config(config, **({} if dtype is None else {"dtype": dtype}))
        elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
            made = transformers.AutoModelForCausalLM.from_config(config)
    if made is None:
        raise ConfigError(
            f"{type(config).__name__} does not say which model it belongs to (architectures={getattr(config, 'architectures', None)}). "
            "Build the model: `with torch.device('meta'): model = Class(config)`."
        )
    return Copied(made, {})


def _cast(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Give the floating-point tensors of a model on meta another dtype; ties stay."""
    if dtype is not None:
        model.to(dtype)


def select_layers(anatomy: Anatomy, quantization: Any) -> tuple[Quantization, tuple[str, ...]]:
    """Return how and which layers ``lp.quantize`` would store in few bits."""
    asked = QuantizeOptions.parse(quantization)
    return asked.config, select(anatomy, asked.config, asked.skip, streamed=True).paths


def language_head(model: nn.Module) -> nn.Module | None:
    """Return the output embeddings of a language model, None for any other model."""
    head = output_embeddings(model)
    return head if head is not None and isinstance(getattr(head, "weight", None), Tensor) else None


def known_inputs(model: nn.Module, batch: int, length: int | None, *, padded: bool) -> dict[str, Tensor]:
    """Return an input of a transformers model, on meta: token ids, images, or both.

    Raises:
        ConfigError: The model is none, or reads something else.
    """
    config, name = getattr(model, "config", None), getattr(model, "main_input_name", None)
    accepted = inspect.signature(type(model).forward).parameters
    found: dict[str, Tensor] = {}
    if config is not None and (name == "input_ids" or "input_ids" in accepted):
        if length is None:
            raise ConfigError(f"sequence_length is missing: {type(model).__name__} reads texts.")
        found["input_ids"] = torch.empty(batch, length, dtype=torch.long, device="meta")
        if padded and "attention_mask" in accepted:
            found["attention_mask"] = torch.empty(batch, length, dtype=torch.long, device="meta")
        if getattr(config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = torch.empty(batch, length, dtype=torch.long, device="meta")
    if config is not None and "pixel_values" in accepted:
        vision = getattr(config, "vision_config", config)
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", None)
        if size is not None and channels is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            dtype = next(model.parameters()).dtype
            found["pixel_values"] = torch.empty(batch, channels, height, width, dtype=dtype, device="meta")
    if not found or (name is not None and name not in found):
        raise ConfigError(
            f"what {type(model).__name__} reads is not known. Give inputs=: its arguments for one batch as a tensor, a tuple or a mapping "
            "(the first dimension becomes the batch size), or a function of (batch_size, sequence_length) that returns them."
        )
    return found
