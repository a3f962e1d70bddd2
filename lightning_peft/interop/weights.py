"""The tables of the other types that adapt layers: VERA, LOHA, LOKR, OFT, HRA, IA3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_peft.errors import CompatibilityError, ConfigError, FormatError, UnsupportedLayerError
from lightning_peft.interop.files import PREFIX
from lightning_peft.interop.lora import per_layer
from lightning_peft.interop.names import hf_values, our_values, strings
from lightning_peft.interop.table import (
    CONV,
    CONV1D,
    LINEAR,
    Fields,
    Layer,
    LayerFormat,
    Parsed,
    Row,
    Written,
    check_kernel,
    column,
    integer,
    layers_of,
    most_common,
    number,
    require_one,
    whole,
)
from lightning_peft.strategies.additive.ia3 import IA3
from lightning_peft.strategies.reparameterized.hra import HRA
from lightning_peft.strategies.reparameterized.loha import LoHa
from lightning_peft.strategies.reparameterized.lokr import LoKr
from lightning_peft.strategies.reparameterized.oft import OFT
from lightning_peft.strategies.reparameterized.vera import VeRA
from lightning_peft.surgery.anatomy import Anatomy
from lightning_peft.surgery.handle import Handle
from lightning_peft.surgery.sites import Site

_NO_BIAS = {"bias": (("none",), "biases beside this type are not read")}

# ---------------------------------------------------------------------- VeRA


@dataclass(frozen=True, kw_only=True)
class VeRAFormat(LayerFormat):
    """VERA. The shared projections are in the file, or made again from their seed (``save_projection=False``)."""

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        written = super().write(handle, anatomy)
        shared = {f"base_model.{s.attribute}": s.tensor().detach() for s in handle.slots if s.attribute in ("vera_A", "vera_B")}
        return Written(written.config | {"save_projection": True}, written.tensors | shared)

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        rank = integer(file.config.get("r", 256), "r", file.where)
        for path, tensors in file.layers.items():  # before projections of this rank are made
            if "vera_lambda_d" in tensors and tuple(tensors["vera_lambda_d"].shape) != (rank,):
                raise CompatibilityError(f"{file.where}: '{path}' was not made with r={rank}, which the config says.")
        return {"rank": rank}

    def takes(self, file: Parsed, key: str) -> bool:
        return key in ("base_model.vera_A", "base_model.vera_B")

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        found = super().state(file, part, anatomy)
        saved = file.config.get("save_projection", True)
        for slot in part.slots:
            if slot.attribute not in ("vera_A", "vera_B"):
                continue
            value = file.rest.get(f"base_model.{slot.attribute}")
            if value is None and saved:
                raise FormatError(f"{file.where}: 'base_model.{slot.attribute}' is missing. The file is incomplete.")
            if value is not None and value.shape != slot.tensor().shape:
                raise CompatibilityError(
                    f"{file.where}: 'base_model.{slot.attribute}' has shape {tuple(value.shape)}, and the widest adapted layers make it "
                    f"{tuple(slot.tensor().shape)}. It was made for other layers."
                )
            found[slot.key] = slot.tensor().detach().clone() if value is None else value
        return found


VERA = VeRAFormat(
    peft_type="VERA",
    methods=(VeRA,),
    layers=frozenset({LINEAR, CONV1D}),
    fields=Fields(
        same={"r": "rank", "vera_dropout": "dropout", "d_initial": "d_initial", "projection_prng_key": "projection_seed"},
        only=_NO_BIAS,
        free=frozenset({"init_weights"}),
        own=frozenset({"save_projection"}),
    ),
    rows=(Row("vera_lambda_b", "vera_lambda_b"), Row("vera_lambda_d", "vera_lambda_d")),
)

# ---------------------------------------------------------------------- LoHa, LoKr

_TUCKER = "a Tucker decomposition of kernels is not done here; merge it with peft (merge_and_unload)"
_LYCORIS_FREE = frozenset({"rank_dropout", "module_dropout", "init_weights", "rank_dropout_scale"})
_LYCORIS_OWN = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"})


@dataclass(frozen=True, kw_only=True)
class LycorisFormat(LayerFormat):
    """LOHA and LOKR."""

    def check_layer(self, layer: Layer) -> None:
        super().check_layer(layer)
        check_kernel(layer)
        if len(layer.weight_shape) == 3 and hasattr(layer.adapter, "lokr_w2"):
            raise UnsupportedLayerError(
                f"'{layer.path}' is a one-dimensional convolution, of which HF peft takes a wrong Kronecker product where the second factor "
                "is whole. Take a smaller rank, or exclude it."
            )

    def config(self, handle: Handle, found: list[Layer]) -> dict[str, Any]:
        ranks = {layer.path: layer.adapter.rank for layer in found}
        alphas = {layer.path: whole(layer.adapter.scaling * layer.adapter.rank) for layer in found}  # type: ignore[operator,arg-type]
        rank, alpha = most_common(ranks.values()), most_common(alphas.values())
        patterns = {"rank_pattern": hf_values(ranks, rank), "alpha_pattern": hf_values(alphas, alpha)}
        return {"r": rank, "alpha": alpha, **patterns}

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        ranks, alphas = per_layer(file, sites)
        rank, alpha = integer(file.config.get("r", 8), "r", file.where), number(file.config.get("alpha", 8), "alpha", file.where)
        return {
            "rank": rank,
            "alpha": alpha,
            "rank_per_target": our_values(ranks, rank, sites, anatomy),
            "alpha_per_target": our_values(alphas, alpha, sites, anatomy),
        }


LOHA = LycorisFormat(
    peft_type="LOHA",
    methods=(LoHa,),
    layers=frozenset({LINEAR, CONV}),
    fields=Fields(only={"use_effective_conv2d": ((False,), _TUCKER)}, free=_LYCORIS_FREE, own=_LYCORIS_OWN),
    rows=tuple(Row(name, name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
)


def _kernel(tensor: Tensor, layer: Layer) -> Tensor:
    """Of a convolution: (o₂, i₂ x kernel size) -> (o₂, i₂, *kernel)."""
    return tensor.unflatten(-1, (-1, *layer.weight_shape[2:])) if layer.kind == CONV else tensor


LOKR = LycorisFormat(
    peft_type="LOKR",
    methods=(LoKr,),
    layers=frozenset({LINEAR, CONV}),
    fields=Fields(
        same={"decompose_both": "decompose_both", "decompose_factor": "factor"},
        only={"use_effective_conv2d": ((False,), _TUCKER)},
        free=_LYCORIS_FREE,
        own=_LYCORIS_OWN,
    ),
    rows=(
        Row("lokr_w2", "lokr_w2", _kernel),
        *(Row(name, name) for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")),
    ),
)

# ---------------------------------------------------------------------- OFT, HRA


@dataclass(frozen=True, kw_only=True)
class OFTFormat(LayerFormat):
    """OFT. With Neumann's series HF turns the other way than with the inverse, so that a file made with it holds −Q."""

    def check(self, strategy: Any) -> None:
        if (terms := strategy.neumann_terms) in (2, 3):
            raise ConfigError(f"OFT: neumann_terms={terms} is no series that HF peft computes; it has 4 and more. Train with 4.")

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        written = super().write(handle, anatomy)
        if not handle.strategy.neumann_terms:
            return written
        return Written(written.config, {key: -value for key, value in written.tensors.items()})

    def config(self, handle: Handle, found: list[Layer]) -> dict[str, Any]:
        strategy: Any = handle.strategy
        sizes = {layer.adapter.block_size for layer in found}
        if len(sizes) == 1:
            size = {"oft_block_size": sizes.pop(), "r": 0}
        else:
            blocks = require_one((layer.adapter.blocks for layer in found), "block size, or number of blocks,", "OFT")
            size = {"oft_block_size": 0, "r": blocks}
        neumann = {"use_cayley_neumann": bool(strategy.neumann_terms), "num_cayley_neumann_terms": strategy.neumann_terms or 5}
        coft = {"coft": strategy.epsilon is not None, "eps": strategy.epsilon or 6e-5}
        return {**size, **neumann, **coft}

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        config, where = file.config, file.where
        sizes: dict[str, int] = {}
        for site in sites:
            tensor = file.layers[site.path]["oft_R.weight"]
            entries = tensor.shape[-1]
            size = (1 + math.isqrt(1 + 8 * entries)) // 2
            if tensor.dim() != 2 or size * (size - 1) // 2 != entries:
                raise CompatibilityError(f"{where}: '{site.path}' has {entries} numbers in a block, which make no skew matrix.")
            sizes[site.path] = size
        size, terms = most_common(sizes.values()), config.get("num_cayley_neumann_terms", 5)
        if not config.get("use_cayley_neumann", True):
            terms = 0
        elif type(terms) is not int or terms < 3:
            raise CompatibilityError(f"{where}: num_cayley_neumann_terms={terms!r} is no rotation; 3 and more are read.")
        return {
            "block_size": size,
            "block_size_per_target": our_values(sizes, size, sites, anatomy),
            "neumann_terms": max(terms, 4) if terms else 0,  # HF's 3 and 4 are one series
            "epsilon": number(config.get("eps", 6e-5), "eps", where) if config.get("coft") else None,
        }

    def state(self, file: Parsed, part: Handle, anatomy: Anatomy) -> dict[str, Tensor]:
        found = super().state(file, part, anatomy)
        return {key: -value for key, value in found.items()} if part.strategy.neumann_terms else found


OFT_ = OFTFormat(
    peft_type="OFT",
    methods=(OFT,),
    layers=frozenset({LINEAR}),
    fields=Fields(
        same={"block_share": "share_blocks"},
        only=_NO_BIAS,
        free=frozenset({"module_dropout", "init_weights"}),
        own=frozenset({"r", "oft_block_size", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"}),
    ),
    rows=(Row("oft_R", "oft_R.weight"),),
)


@dataclass(frozen=True, kw_only=True)
class HRAFormat(LayerFormat):
    """HRA."""

    def config(self, handle: Handle, found: list[Layer]) -> dict[str, Any]:
        return {"r": require_one((layer.adapter.rank for layer in found), "rank", "HRA")}


HRA_ = HRAFormat(
    peft_type="HRA",
    methods=(HRA,),
    layers=frozenset({LINEAR}),
    fields=Fields(
        same={"r": "rank"},
        only={
            "apply_GS": ((False,), "Gram-Schmidt makes another product of reflections, which is no identity at the start"),
            **_NO_BIAS,
        },
        free=frozenset({"init_weights"}),
    ),
    rows=(Row("hra_u", "hra_u"),),
)

# ---------------------------------------------------------------------- (IA)³


def _scales(tensor: Tensor, layer: Layer) -> Tensor:
    """(out, 1); of an input (1, in); of a convolution (1, out, 1, 1)."""
    if layer.kind == CONV:
        return tensor.reshape(1, -1, *(1,) * (len(layer.weight_shape) - 2))
    return tensor[None, :] if layer.adapter.side == "input" else column(tensor, layer)


@dataclass(frozen=True, kw_only=True)
class IA3Format(LayerFormat):
    """IA3. ``feedforward_modules`` scale their input. Parts of a fused weight become one vector, with ones elsewhere."""

    def write(self, handle: Handle, anatomy: Anatomy) -> Written:
        found = layers_of(handle)
        tensors: dict[str, Tensor] = {}
        for layer in found:
            self.check_layer(replace(layer, site=replace(layer.site, rows=None)))
            key, rows, scales = f"{PREFIX}{layer.path}.ia3_l", layer.site.rows, layer.adapter.ia3_l.detach()  # type: ignore[operator]
            if rows is None:
                tensors[key] = _scales(scales, layer)
                continue
            width = layer.site.kind.spec(layer.module, layer.site.tensor).out_features
            before = tensors.get(key, torch.ones(width, 1, dtype=scales.dtype, device=scales.device))
            tensors[key] = rows.put(before, scales[:, None], 0)
        paths = list(dict.fromkeys(layer.path for layer in found))
        inputs = {layer.path for layer in found if layer.adapter.side == "input"}
        where = self.where(found, anatomy)
        for names in (where["target_modules"], paths):
            chosen = [name for name in names if any(path.endswith(name) for path in inputs)] if isinstance(names, list) else []
            # As HF has it: by the end of the path, wherever that begins.
            if {path for path in paths if any(path.endswith(name) for name in chosen)} == inputs:
                return Written(where | {"target_modules": names, "feedforward_modules": chosen}, tensors)
        raise ConfigError("IA3: HF peft cannot tell the layers whose input is scaled from the others by their names.")

    def args(self, file: Parsed, sites: list[Site], anatomy: Anatomy) -> dict[str, Any]:
        given, where = file.config.get("feedforward_modules"), file.where
        if given is not None and not isinstance(given, str):
            strings(given, "feedforward_modules", where)
        shapes = {site.path: tuple(file.layers[site.path]["ia3_l"].shape) for site in sites}
        inputs = {s.path: s.spec.kind != "conv" and shapes[s.path] == (1, s.spec.in_features) for s in sites}
        return {"feedforward": list(our_values(inputs, False, sites, anatomy))}


IA3_ = IA3Format(
    peft_type="IA3",
    methods=(IA3,),
    layers=frozenset({LINEAR, CONV1D, CONV}),
    fields=Fields(free=frozenset({"init_ia3_weights"}), own=frozenset({"feedforward_modules"})),
    rows=(Row("ia3_l", "ia3_l", _scales),),
)
