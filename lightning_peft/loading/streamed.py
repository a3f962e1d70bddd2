"""transformers and quantized layers: quantizing while ``from_pretrained`` reads the weights, and telling a model that it is quantized.

``from_pretrained`` knows names, conversions, ties and shards of every checkpoint. A quantizer registered with it is handed each dense
weight as it is read, so that only one is in memory at a time. Inside ``from_pretrained`` the layers keep their meta weights; they
become quantized once everything else is in place.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.errors import PEFTError
from lightning_peft.loading.quantize import become, canonical, give_back, layer_maker, settle
from lightning_peft.loading.saved import METHOD, read_layers
from lightning_peft.quantization.backend import backend_of
from lightning_peft.quantization.config import Quantization
from lightning_peft.quantization.options import QuantizeOptions
from lightning_peft.surgery.anatomy import Anatomy, anatomy_of
from lightning_peft.surgery.layers import LinearKind, layer_kind
from lightning_peft.surgery.selection import LeftDense, Selection, select
from lightning_peft.surgery.tree import join


class Stream:
    """The quantization of one model while its weights are read.

    Args:
        asked: What to do.
    """

    def __init__(self, asked: QuantizeOptions) -> None:
        self.asked = asked
        self.built: dict[str, nn.Linear] = {}
        self.unfit: set[str] = set()  # of another shape than the model's: transformers' business
        self.error: PEFTError | None = None  # transformers collects what is raised while it reads, as text

    def start(self, model: nn.Module, checkpoint_files: Sequence[str]) -> None:
        """Choose the layers of a model on the meta device."""
        self.anatomy: Anatomy = anatomy_of(model)
        self.selection = select(self.anatomy, self.asked.config, self.asked.skip, streamed=True)
        self.make = layer_maker(self.asked, self.anatomy, self.selection)
        self.waiting = {join(path, "weight"): path for path in self.selection.paths}

    def wants(self, key: str) -> bool:
        """Return whether a tensor is to be quantized."""
        return key in self.waiting and key not in self.unfit

    def take(self, key: str, weight: Tensor) -> bool:
        """Quantize the weight called ``key``; False if it is not to be, or of another shape than the model's."""
        if not self.wants(key):
            return False
        path = self.waiting[key]
        layer = self.anatomy.tree[path]
        expected = layer._parameters["weight"]
        assert expected is not None
        if weight.shape != expected.shape:
            self.unfit.add(key)
            return False
        try:
            with torch.no_grad():
                self.built[path] = self.make(path, canonical(layer, weight.detach()), None)
        except PEFTError as error:
            self.error = type(error)(f"'{path}': {error}")
            raise
        give_back()
        expected._is_hf_initialized = True  # type: ignore[attr-defined]  # else transformers would draw random values for it
        return True

    def finish(self) -> None:
        """Turn the layers into the quantized ones, biases included; what the checkpoint had no weight for stays dense."""
        for path, built in self.built.items():
            layer = self.anatomy.tree[path]
            bias = layer._parameters.get("bias")
            if bias is not None:
                built.bias = nn.Parameter(bias.detach(), requires_grad=False)
            become(layer, built)
        fresh = tuple(
            LeftDense(join(path, "weight"), "not in the checkpoint", _nbytes(self.anatomy, path))
            for path in self.selection.paths
            if path not in self.built
        )
        before = self.selection
        paths = tuple(path for path in before.paths if path in self.built)
        settle(self.anatomy, Selection(paths, (*before.left, *fresh), before.vectors, before.before), self.asked)


def _nbytes(anatomy: Anatomy, path: str) -> int:
    weight = anatomy.tree[path]._parameters["weight"]
    assert weight is not None
    return weight.numel() * weight.element_size()


def quantization_config(asked: QuantizeOptions | None = None) -> Any:
    """Return the value for ``from_pretrained(quantization_config=...)``; also makes saved quantized folders readable."""
    _quantizer_class()
    return _config_class()(stream=None if asked is None else Stream(asked))


def tell_transformers(model: nn.Module) -> None:
    """Make a transformers model say that it is quantized, as its own quantizers do.

    Then ``.half()`` and ``.float()`` are refused. A base that bitsandbytes stores all in one way gets transformers' own description, so
    that ``save_pretrained`` writes a folder that everybody can read; of any other ``save_pretrained`` refuses, and
    :func:`~lightning_peft.loading.saved.save_quantized` is the way.
    """
    import transformers

    if not isinstance(model, transformers.PreTrainedModel):
        return
    layers = {path: module for path, module in model.named_modules() if backend_of(module) is not None}
    found = {
        (backend.name, backend.config(m)) for m in layers.values() if (backend := backend_of(m)) and isinstance(m, nn.Linear)
    }
    name, config = next(iter(found))
    described: Any = model
    if len(found) == 1 and name == "bitsandbytes":
        from transformers.quantizers.auto import AutoHfQuantizer

        dense = [p for p, m in model.named_modules() if isinstance(layer_kind(m), LinearKind) and p not in layers]
        quantizer = AutoHfQuantizer.from_config(_bitsandbytes(config, dense), pre_quantized=True)
        setattr(described, "is_loaded_in_8bit" if config.scheme == "int8" else "is_loaded_in_4bit", True)
    else:
        quantizer = _quantizer()
    described.hf_quantizer, described.is_quantized = quantizer, True
    described.quantization_method = quantizer.quantization_config.quant_method
    described.config.quantization_config = quantizer.quantization_config
    described.config._is_quantized = True


def _bitsandbytes(config: Quantization, skip: list[str]) -> Any:
    make: Any = importlib.import_module("transformers").BitsAndBytesConfig
    if config.scheme == "int8":
        return make(load_in_8bit=True, llm_int8_threshold=config.threshold, llm_int8_skip_modules=skip)
    return make(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.scheme,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=config.dtype(torch.float32),
        bnb_4bit_quant_storage=getattr(torch, config.storage_dtype),
        llm_int8_skip_modules=skip,
    )


class Folder:
    """The quantized layers of a folder that :func:`~lightning_peft.loading.saved.save_quantized` wrote; like :class:`Stream`."""

    def start(self, model: nn.Module, checkpoint_files: Sequence[str]) -> None:
        """Read the layers and take their dense weights off the model, which then asks nobody for them."""
        self.model, self.saved = model, read_layers(model, checkpoint_files)
        self.built = self.saved.build()

    def wants(self, key: str) -> bool:
        """Nothing that transformers reads itself."""
        return False

    def finish(self) -> None:
        """Turn the layers into the saved ones."""
        self.saved.place(self.model, self.built)
        tell_transformers(self.model)


@functools.cache
def _config_class() -> Any:
    """Return the configuration that transformers knows as ``lightning_peft``, registered on first use."""
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import QuantizationConfigMixin

    @auto.register_quantization_config(METHOD)
    class Config(QuantizationConfigMixin):
        quant_method: Any = METHOD

        def __init__(self, stream: Stream | None = None, **_: Any) -> None:
            self.stream = stream

        def __deepcopy__(self, memo: Any) -> Config:
            return self  # one load, one stream

        def __reduce__(self) -> tuple[Any, ...]:
            return quantization_config, ()  # the stream has ended where a model is pickled

        def to_dict(self) -> dict[str, Any]:
            return {"quant_method": METHOD}

    return Config


@functools.cache
def _operation_class() -> Any:
    """Return the operation by which transformers hands over a weight that it has read."""
    from transformers.core_model_loading import ConversionOps

    class Quantize(ConversionOps):
        def __init__(self, stream: Stream) -> None:
            self.stream = stream

        def convert(self, input_dict: dict[str, Any], *args: Any, missing_keys: Any = None, **kwargs: Any) -> dict[str, Any]:
            left: dict[str, Any] = {}
            for key, value in input_dict.items():
                if not self.stream.take(key, value[0] if isinstance(value, list) else value):
                    left[key] = value
                elif missing_keys is not None:
                    missing_keys.discard(key)
            return left

    return Quantize


def _quantizer() -> Any:
    """Return the quantizer of a model that is quantized already."""
    return _quantizer_class()(quantization_config(), pre_quantized=True)


@functools.cache
def _quantizer_class() -> Any:
    """Return the quantizer that transformers knows as ``lightning_peft``, registered on first use."""
    from transformers.quantizers import auto, base

    @auto.register_quantizer(METHOD)
    class Quantizer(base.HfQuantizer):
        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.work: Any = quantization_config.stream or Folder()

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
            self.work.start(model, checkpoint_files)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return bool(self.work.wants(param_name))

        def get_quantize_ops(self) -> Any:
            return _operation_class()(self.work)

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            self.work.finish()
            return model

        def __reduce__(self) -> tuple[Any, ...]:
            return _quantizer, ()

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    return Quantizer
